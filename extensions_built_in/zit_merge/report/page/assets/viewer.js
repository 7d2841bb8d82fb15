// One picture large: its neighbours a key away, another of its row to compare with, and the YAML that makes it.

/**
 * Opens a dialog that shows a picture of a gallery.
 *
 * gallery: {title, previews, rows, columns, texts, pictures}. A gallery of looks has no pictures but `small(n)` and `load(n)`, an address and
 * the promise of that of the large one; `compared`, the column that was compared with last; and `favourite(n)`, true, false or null, with
 * `favour(n)`, a promise.
 * onleave(at): it was closed while it showed that picture.
 */
function viewPicture(gallery, at, onleave) {
  const { title, previews, rows, columns, texts } = gallery;
  const all = previews.map((_, n) => n);
  let isFlipped = false; // the other picture of the row is in the place of this one
  const caption = el("p", { role: "status", class: "caption" });
  const image = el("img", { onclick: zoom });
  const stage = el("div", { class: "stage", tabindex: 0, role: "region", "aria-label": "the picture" }, image);
  const [flipButton, zoomButton] = [button("", () => flip(!isFlipped)), button("Zoom", zoom)];
  const told = el("p", { class: "hint", role: "status" });
  const yaml = copyBox("The section that makes this picture", { tag: "p", tell: (text) => { told.textContent = text; } }, told);
  const looks = gallery.load ? lookTools() : null;
  const dialog = el("dialog", { class: "large", "aria-label": title, onkeydown, onkeyup, onclose: () => { dialog.remove(); onleave(at); } },
    caption,
    el("p", { class: "tools" },
      button("Previous", () => turn(all, -1)), button("Next", () => turn(all, 1)),
      rows.length > 1 ? [button("Row above", () => turn(inColumn(), -1)), button("Row below", () => turn(inColumn(), 1))] : null,
      looks?.compared, flipButton, looks?.buttons, zoomButton, button("Close", () => dialog.close())),
    looks?.range,
    el("div", { class: "body" }, stage, yaml),
    el("p", { class: "hint" }, looks ? "Arrow keys go to the other pictures; hold B to see the one that it is compared with; F marks a favourite."
      : "Arrow keys go to the other pictures; hold B to see the first of the row."));

  /** What is there for looks only: which picture to compare with, a slider between the two, and favourites. */
  function lookTools() {
    let isSliding = false;
    const over = el("img", { class: "over", hidden: true });
    const edge = el("span", { class: "edge", hidden: true });
    const slider = el("input", { type: "range", min: 0, max: 100, value: 50, step: 1, "aria-label": "how much of the compared picture is seen", oninput: slide });
    const range = el("p", { class: "slider", hidden: true }, slider);
    const [slideButton, favouriteButton] = [button("Slider", () => { isSliding = !isSliding; isFlipped = false; stage.classList.remove("zoomed"); draw(); }), button("Favourite", favour)];
    const compared = select("Compared with", columns.map((column, c) => [c, clip(column)]), 0, (c) => { gallery.compared = Number(c); isFlipped = false; draw(); });
    const choices = compared.querySelector("select");
    stage.append(over, edge);
    stage.addEventListener("pointerdown", drag);
    stage.addEventListener("pointermove", (e) => { if (e.buttons) drag(e); });

    function slide() {
      stage.style.setProperty("--slide", `${slider.value}%`);
      slider.setAttribute("aria-valuetext", `${slider.value} % ${columns[previews[other()].column]}, then ${columns[previews[at].column]}`);
    }

    function drag(e) {
      if (!isSliding) return;
      const box = image.getBoundingClientRect();
      slider.value = (100 * (e.clientX - box.left)) / box.width;
      slide();
      e.preventDefault();
    }

    async function favour() {
      if (gallery.favourite(at) === null) return;
      await gallery.favour(at);
      drawTools();
    }

    function drawTools() {
      const isThere = inRow();
      [...choices.options].forEach((option, c) => { option.disabled = !isThere.some((n) => previews[n].column === c); });
      choices.value = String(previews[other()].column);
      for (const part of [over, edge, range]) part.hidden = !isSliding;
      stage.classList.toggle("sliding", isSliding);
      setAttributes(slideButton, { "aria-pressed": String(isSliding) });
      setAttributes(favouriteButton, { "aria-pressed": String(gallery.favourite(at) === true), "aria-disabled": String(gallery.favourite(at) === null) });
      setAttributes(flipButton, { "aria-disabled": String(isSliding || other() === at) });
      if (isSliding) put(over, other());
      slide();
    }
    return { compared, range, buttons: [slideButton, favouriteButton], draw: drawTools, favour, isSliding: () => isSliding };
  }

  /** Shows a picture: at once what is there, then the large one. */
  function put(target, n) {
    setAttributes(target, pictureAttributes(gallery, n));
    target.dataset.shown = n;
    gallery.load?.(n).then((src) => { if (target.dataset.shown === String(n)) target.src = src; }, (e) => say(e.message));
  }

  function inColumn() {
    return all.filter((n) => previews[n].column === previews[at].column);
  }

  function inRow() {
    return all.filter((n) => previews[n].row === previews[at].row);
  }

  /** The picture to compare with: the first of the row, or that of the column which was chosen. */
  function other() {
    const own = inRow();
    return own.find((n) => previews[n].column === gallery.compared) ?? own[0];
  }

  function turn(among, by) {
    at = among[(among.indexOf(at) + by + among.length) % among.length];
    isFlipped = false;
    told.textContent = "";
    draw();
  }

  function flip(isOn) {
    isFlipped = isOn && other() !== at && !looks?.isSliding();
    draw();
  }

  function zoom() {
    if (looks?.isSliding()) return;
    stage.classList.toggle("zoomed");
    stage.scrollTo((stage.scrollWidth - stage.clientWidth) / 2, (stage.scrollHeight - stage.clientHeight) / 2);
    draw();
  }

  function onkeydown(e) {
    if (e.ctrlKey || e.metaKey || e.altKey || e.target.matches("textarea")) return;
    const moves = { ArrowLeft: [all, -1], ArrowRight: [all, 1], ArrowUp: [inColumn(), -1], ArrowDown: [inColumn(), 1] };
    const key = e.key.toLowerCase();
    const isMovable = e.target.matches("select, input") || (e.target === stage && stage.classList.contains("zoomed"));
    if (key === "b") flip(true);
    else if (key === "f" && looks && !e.repeat) looks.favour();
    else if (moves[e.key] && !isMovable) turn(...moves[e.key]);
    else return;
    e.preventDefault();
  }

  function onkeyup(e) {
    if (e.key.toLowerCase() === "b" && isFlipped) flip(false);
  }

  function draw() {
    const [first, text] = [other(), texts[previews[at].text]];
    const name = (n) => foreign(columns[previews[n].column]);
    put(image, isFlipped ? first : at);
    caption.replaceChildren(el("strong", {}, name(isFlipped ? first : at)), ...(isFlipped ? [" in the place of ", name(at)] : []),
      ` (${at + 1} of ${all.length}) `, foreign(rows[previews[at].row], 300));
    flipButton.replaceChildren("Compare with ", name(first));
    setAttributes(flipButton, { "aria-pressed": String(isFlipped), "aria-disabled": String(first === at) });
    setAttributes(zoomButton, { "aria-pressed": String(stage.classList.contains("zoomed")) });
    looks?.draw();
    yaml.hidden = !text;
    yaml.write(text ?? "");
  }

  draw();
  document.body.append(dialog);
  dialog.showModal();
}

function pictureAttributes(gallery, n) {
  const { row, column } = gallery.previews[n];
  const src = gallery.load ? gallery.small(n) : `data:image/jpeg;base64,${gallery.pictures[n]}`;
  return { src, alt: `${gallery.columns[column]}: ${gallery.rows[row]}` };
}

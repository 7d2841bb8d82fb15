// One picture large: its neighbours a key away, the first of its row to compare with, and the YAML that makes it.

/**
 * Opens a dialog that shows a picture of a gallery.
 *
 * onleave(at): it was closed while it showed that picture.
 */
function viewPicture(gallery, at, onleave) {
  const { title, previews, rows, columns, texts } = gallery;
  const all = previews.map((_, n) => n);
  let isFlipped = false; // the first picture of the row is in the place of this one
  const caption = el("p", { role: "status", class: "caption" });
  const image = el("img", { onclick: zoom });
  const stage = el("div", { class: "stage", tabindex: 0, role: "region", "aria-label": "the picture" }, image);
  const [flipButton, zoomButton] = [button("", () => flip(!isFlipped)), button("Zoom", zoom)];
  const told = el("p", { class: "hint", role: "status" });
  const yaml = copyBox("The section that makes this picture", { tag: "p", tell: (text) => { told.textContent = text; } }, told);
  const dialog = el("dialog", { class: "large", "aria-label": title, onkeydown, onkeyup, onclose: () => { dialog.remove(); onleave(at); } },
    caption,
    el("p", { class: "tools" },
      button("Previous", () => turn(all, -1)), button("Next", () => turn(all, 1)),
      rows.length > 1 ? [button("Row above", () => turn(inColumn(), -1)), button("Row below", () => turn(inColumn(), 1))] : null,
      flipButton, zoomButton, button("Close", () => dialog.close())),
    el("div", { class: "body" }, stage, yaml),
    el("p", { class: "hint" }, "Arrow keys go to the other pictures; hold B to see the first of the row."));

  function inColumn() {
    return all.filter((n) => previews[n].column === previews[at].column);
  }

  function firstOfRow() {
    return previews.findIndex((p) => p.row === previews[at].row);
  }

  function turn(among, by) {
    at = among[(among.indexOf(at) + by + among.length) % among.length];
    isFlipped = false;
    told.textContent = "";
    draw();
  }

  function flip(isOn) {
    isFlipped = isOn && firstOfRow() !== at;
    draw();
  }

  function zoom() {
    stage.classList.toggle("zoomed");
    stage.scrollTo((stage.scrollWidth - stage.clientWidth) / 2, (stage.scrollHeight - stage.clientHeight) / 2);
    draw();
  }

  function onkeydown(e) {
    if (e.ctrlKey || e.metaKey || e.altKey || e.target.matches("textarea")) return;
    const moves = { ArrowLeft: [all, -1], ArrowRight: [all, 1], ArrowUp: [inColumn(), -1], ArrowDown: [inColumn(), 1] };
    if (e.key.toLowerCase() === "b") flip(true);
    else if (moves[e.key] && !(e.target === stage && stage.classList.contains("zoomed"))) turn(...moves[e.key]);
    else return;
    e.preventDefault();
  }

  function onkeyup(e) {
    if (e.key.toLowerCase() === "b" && isFlipped) flip(false);
  }

  function draw() {
    const [first, text] = [firstOfRow(), texts[previews[at].text]];
    const name = (n) => foreign(columns[previews[n].column]);
    setAttributes(image, pictureAttributes(gallery, isFlipped ? first : at));
    caption.replaceChildren(el("strong", {}, name(isFlipped ? first : at)), ...(isFlipped ? [" in the place of ", name(at)] : []),
      ` (${at + 1} of ${all.length}) `, foreign(rows[previews[at].row], 300));
    flipButton.replaceChildren("Compare with ", name(first));
    setAttributes(flipButton, { "aria-pressed": String(isFlipped), "aria-disabled": String(first === at) });
    setAttributes(zoomButton, { "aria-pressed": String(stage.classList.contains("zoomed")) });
    yaml.hidden = !text;
    yaml.write(text);
  }

  draw();
  document.body.append(dialog);
  dialog.showModal();
}

function button(text, onclick) {
  return el("button", { type: "button", onclick }, text);
}

function pictureAttributes({ previews, pictures, rows, columns }, n) {
  const { row, column } = previews[n];
  return { src: `data:image/jpeg;base64,${pictures[n]}`, alt: `${columns[column]}: ${rows[row]}` };
}

"""A page in an iframe with `sandbox="allow-scripts"` and `srcdoc`, as AI-Toolkit's UI shows a job's plugin.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from extensions_built_in.zit_merge.files.text import parse

HEIGHT = 900
LOAD = """html => new Promise((done) => {
    const frame = document.querySelector("iframe");
    frame.onload = () => done();
    frame.srcdoc = html;
})"""


def new_tab(browser: Any) -> Any:
    """A tab with an empty frame, into which one page after the other may be loaded."""
    tab = browser.new_context().new_page()
    tab.set_content(
        f'<body style="margin:0"><iframe sandbox="allow-scripts" style="width:100%;height:{HEIGHT}px;border:0"></iframe>'
    )
    return tab


class Frame:
    """The page in its frame.

    Attributes:
        page: The browser's tab.
        inner: The frame.
        troubles: Console messages, errors and requests.
        is_quiet: There were none; else the browser may tell them again to the next page of the tab.
    """

    def __init__(self, tab: Any, html: str, width: int, scheme: str):
        self.page = tab
        self.troubles: list[str] = []
        self.is_quiet = True
        self._listeners = {
            "console": lambda m: self._note(f"console {m.type}: {m.text}"),
            "pageerror": lambda e: self._note(f"error: {e}"),
            "request": lambda r: None if r.url.startswith("data:") else self._note(f"request: {r.url[:200]}"),
            "dialog": lambda d: (self._note(f"dialog: {d.message}"), d.dismiss()),
        }
        tab.set_viewport_size({"width": width, "height": HEIGHT})
        tab.emulate_media(media="null", color_scheme=scheme, forced_colors="null")
        for event, listener in self._listeners.items():
            tab.on(event, listener)
        self._load(html)
        self.inner = tab.frames[1]
        self.inner.wait_for_selector("footer")

    def _note(self, trouble: str) -> None:
        self.troubles.append(trouble)
        self.is_quiet = False

    def _load(self, html: str) -> None:
        self.page.evaluate(LOAD, html)

    def close(self) -> None:
        """Leaves the tab as another page may have it: without this one's timers, keys and listeners."""
        for event, listener in self._listeners.items():
            self.page.remove_listener(event, listener)
        self._load("")
        self.page.mouse.move(0, 0)

    def find(self, selector: str) -> Any:
        """A locator inside of the frame."""
        return self.inner.locator(selector)

    def number(self, name: str) -> Any:
        """A number field, by its label."""
        return self.inner.get_by_label(name, exact=True)

    def type(self, name: str, value: float) -> None:
        """Types a number into a field, and leaves it."""
        field = self.number(name)
        field.fill(repr(value))
        field.press("Tab")

    def colour(self, scheme: str) -> None:
        """Shows the page in light colours; in a frame it is dark at first."""
        if scheme == "light":
            self.press("Light colours")

    def press(self, name: str) -> None:
        """Clicks a button by its text."""
        self.inner.get_by_role("button", name=name, exact=True).click()

    def closed(self) -> None:
        """Waits until the dialog is gone: a browser says that it was closed some time after the key."""
        self.find("dialog").wait_for(state="detached")

    def choose(self, label: str, value: str) -> None:
        """Chooses an option of a select by its value."""
        self.inner.get_by_label(label, exact=True).select_option(value)

    def energy(self) -> None:
        """Has the maps show energies."""
        self.inner.get_by_role("radio", name="energy").check()

    def text(self) -> str:
        """The YAML as it stands there."""
        return self.find(".yaml textarea").input_value()

    def section(self) -> dict[str, Any]:
        """The one section of the YAML."""
        (section,) = parse(self.text(), Path("page.yaml"))
        return section

    def map(self, label: str) -> dict[str, float | None]:
        """Module -> value of a heat map, by the beginning of its label; None where the LoRA has nothing."""
        script = """(table) => JSON.stringify(Object.fromEntries([...table.querySelectorAll("td[data-module]")]
            .map((cell) => [cell.dataset.module, cell.dataset.value])))"""
        found = json.loads(self.find(f'table[aria-label^="{label}"]').evaluate(script))
        return {module: float(value) if value else None for module, value in found.items()}

    def cell(self, label: str, module: str) -> Any:
        """A cell of a heat map."""
        return self.find(f'table[aria-label^="{label}"] td[data-module="{module}"]')

    def listen(self) -> None:
        """Notes from now on what the notice says: after an edit it tells the energy a moment later. See `heard`."""
        note = "n => { n.heard = []; new MutationObserver(() => n.heard.push(n.textContent)).observe(n, { childList: true }); }"
        self.find(".notice").evaluate(note)

    def heard(self) -> list[str]:
        """What the notice has said since `listen`, one text after the other."""
        return self.find(".notice").evaluate("n => n.heard")

    def overflow(self) -> int:
        """By how many pixels the page is wider than the frame."""
        return self.inner.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def violations(self) -> list[str]:
        """What axe-core finds."""
        from importlib.resources import files

        self.inner.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
        found = self.inner.evaluate("axe.run({resultTypes: ['violations']}).then((results) => results.violations)")
        return [f"{v['id']}: {v['help']}: {[n['html'][:150] for n in v['nodes'][:3]]}" for v in found]

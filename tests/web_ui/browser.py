"""Somebody who clicks through AI-Toolkit's UI."""

from __future__ import annotations

import mimetypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from web_ui.server import WebUi, until

CDN = "https://cdn.jsdelivr.net/npm/monaco-editor@"
EDITORS = "window.monaco ? monaco.editor.getEditors() : []"
PICTURE_WIDTH, PICTURE_HEIGHT = 1280, 900


class User:
    """A tab of the browser, and what a user does in it.

    Attributes:
        page: The tab.
        ui: The UI behind it.
    """

    def __init__(self, browser: Any, ui: WebUi):
        self.ui = ui
        self.context = browser.new_context(viewport={"width": PICTURE_WIDTH, "height": PICTURE_HEIGHT})
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=ui.url)
        self.context.add_init_script(f"if (window === top) localStorage.setItem('AI_TOOLKIT_AUTH', '{ui.token}')")
        self.context.route(lambda url: not url.startswith((ui.url, "data:", "blob:")), self._answer)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.alerts: list[str] = []
        self.page.on("dialog", lambda dialog: (self.alerts.append(dialog.message), dialog.dismiss()))

    def _answer(self, route: Any) -> None:
        """The editor comes from the npm package of the same version; nothing else comes from elsewhere."""
        _, _, rest = route.request.url.partition(CDN)
        path = self.ui.toolkit / "ui" / "node_modules" / "monaco-editor" / rest.partition("/")[2].partition("?")[0]
        if rest and path.is_file():
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            route.fulfill(body=path.read_bytes(), content_type=kind, headers={"Access-Control-Allow-Origin": "*"})
        else:
            route.abort()

    def close(self) -> None:
        """Closes the tab."""
        self.context.close()

    def screen(self) -> str:
        """What there is to read, for a failure."""
        frames = "\n".join(frame.locator("body").inner_text()[:1500] for frame in self.page.frames[:3])
        return f"{self.page.url}\n{frames}\nalerts: {self.alerts}"

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> None:
        """Waits for a condition; the failure tells what is on the screen."""
        until(condition, seconds, self.screen, lambda s: self.page.wait_for_timeout(1000 * s))

    def press(self, name: str) -> None:
        """Clicks a button by its text."""
        self.page.get_by_role("button", name=name, exact=True).click()

    def icon(self, name: str) -> Any:
        """A button of the bar that only has a picture."""
        return self.page.locator(f"button:has(svg.lucide-{name})")

    # --- New Job, Advanced

    def new_job(self) -> None:
        """New Job, Show Advanced."""
        self.page.goto(f"{self.ui.url}/jobs")
        # what is imported or pasted before the settings have come gets an empty training_folder
        with self.page.expect_response("**/api/settings"):
            self.page.get_by_role("link", name="New Training Job").click()
        self.page.wait_for_url("**/jobs/new")
        self.press("Show Advanced")
        self.wait(lambda: "meta:" in self.yaml())

    def import_config(self, path: Path) -> None:
        """Import Config: a file."""
        with self.page.expect_file_chooser() as chooser:
            self.press("Import Config")
        chooser.value.set_files(path)
        self.wait(lambda: path.stem in self.yaml())

    def yaml(self) -> str:
        """What stands in the editor."""
        return self.page.evaluate(f"(({EDITORS})[0]?.getValue() ?? '')")

    def cursor(self) -> tuple[int, int]:
        """Line and column."""
        found = self.page.evaluate(f"({EDITORS})[0].getPosition()")
        return found["lineNumber"], found["column"]

    def to_end(self) -> None:
        """Clicks into the editor and goes to its end."""
        self.page.locator(".monaco-editor .view-line").first.click()
        self.page.keyboard.press("Control+End")

    def to_meta(self) -> None:
        """Puts the cursor in column 1 of `meta:`."""
        self.to_end()
        lines = self.yaml().split("\n")
        for _ in range(len(lines) - 1 - lines.index("meta:")):
            self.page.keyboard.press("ArrowUp")
        self.page.keyboard.press("Home")
        assert self.cursor() == (lines.index("meta:") + 1, 1), self.screen()

    def to_new_line_above_meta(self) -> None:
        """Goes to the end of the last line of `process` and presses Enter: the editor indents the new line."""
        self.to_meta()
        for key in ("ArrowUp", "End", "Enter"):
            self.page.keyboard.press(key)
        assert self.cursor()[1] > 1, self.screen()

    def paste(self, text: str) -> None:
        """Ctrl+V."""
        self.page.evaluate("text => navigator.clipboard.writeText(text)", text)
        before = self.yaml()
        self.page.keyboard.press("Control+v")
        self.wait(lambda: self.yaml() != before)

    def is_red(self) -> bool:
        """The editor's frame glows."""
        return self.page.locator("div[style*='rgba(239, 68, 68']").count() > 0

    def create(self) -> None:
        """Create Job; the job's page opens."""
        self.press("Create Job")
        self.page.wait_for_url(lambda url: "/jobs/" in url and "/new" not in url)
        self.wait(lambda: self.heading() is not None)

    # --- the page of a job

    def open(self, name: str) -> None:
        """The page of a job."""
        self.page.goto(f"{self.ui.url}/jobs/{self.ui.row(name)['id']}")
        self.wait(lambda: self.heading() is not None)

    def tab(self, name: str) -> None:
        """Opens a tab of the job's page."""
        self.press(name)

    def heading(self) -> str | None:
        """The info above the progress; None on another tab."""
        found = self.page.locator("h2:has(svg.lucide-info)")
        return found.inner_text().strip() if found.count() else None

    def status(self) -> str:
        """The word beside it."""
        return self.page.locator("h2:has(svg.lucide-info) + span").inner_text()

    def progress(self) -> str:
        """`Step 3 of 3`, or nothing."""
        found = self.page.locator("span", has_text="Step ").filter(has_text=" of ")
        return found.first.inner_text() if found.count() else ""

    def checkpoints(self) -> list[str]:
        """The names in the card."""
        card = self.page.locator("div.shadow-lg", has=self.page.get_by_role("heading", name="Checkpoints"))
        return [text.strip() for text in card.locator("span.direction-rtl").all_inner_texts()]

    def start(self, name: str) -> None:
        """The play button; the job waits in the queue or runs then."""
        self.icon("play").click()
        self.wait(lambda: self.ui.row(name)["status"] in ("queued", "running"))

    def stop(self) -> None:
        """The pause button, and its question."""
        self.icon("pause").click()
        self.press("Stop")

    def plugin(self) -> Any:
        """The frame of the Plugin tab."""
        self.tab("Plugin")
        frame = self.page.frame_locator("iframe[sandbox]")
        frame.locator("footer").wait_for()
        return frame

    def queue_info(self, name: str) -> tuple[str, bool]:
        """The info column of the job's line in the list of jobs, and whether it is cut."""
        self.page.goto(f"{self.ui.url}/jobs")
        cell = self.page.locator("tr", has=self.page.get_by_role("link", name=name, exact=True)).locator("td.truncate")
        return cell.inner_text(), cell.evaluate("cell => cell.scrollWidth > cell.clientWidth")

"""The page that a run leaves behind, where AI-Toolkit's UI looks for it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...analysis.compare import Watched
from ...errors import ZitMergeError
from ...merging.made import Done
from ...planning.context import RunContext
from ...wording import copyable
from .facts import step_facts
from .galleries import Gallery
from .render import Page, is_ours

PLUGIN = "plugin.html"  # of the job's folder: the tab "Plugin" of the job in AI-Toolkit's UI


class RunPage:
    """A page for the sections of one run. Trouble with it is a sentence and stops no merge.

    Args:
        site: Where the first section runs.

    Attributes:
        path: Where the page will be.
        has_pictures: Whether any have been shown.
    """

    def __init__(self, site: RunContext):
        self.has_pictures = False
        self.path, self._why_not = page_path(site), _why_not(site)
        self._page = Page(site.job)

    def begin(self, site: RunContext, raw: Mapping[str, Any], index: int) -> None:
        """A section starts.

        Args:
            site: Where it runs.
            raw: As the config has it.
            index: Which process of the job it is.
        """
        has_home = "output_dir" in raw or site.training or site.home  # else only the command line named a folder
        self._page.begin(site.place, raw if has_home else {**raw, "output_dir": str(site.output_dir)}, first=index == 0)

    def add(self, done: Done, watched: Watched = iter) -> None:
        """A step is done; its inputs must still be there.

        Args:
            done: The step.
            watched: Passes modules that are read again on one by one; may raise to stop.
        """
        if not self._why_not:
            self._page.add(step_facts(done, watched))

    def show(self, site: RunContext, step: str, gallery: Gallery) -> None:
        """Pictures of a step, whether it was merged in this run or not.

        Args:
            site: Where its section runs, which has begun.
            step: The step's name.
            gallery: What is shown below the galleries that are there.

        Raises:
            ZitMergeError: A picture can't be read.
        """
        self.has_pictures = True
        if not self._why_not:
            self._page.show(site.place, step, gallery)

    def write(self) -> str:
        """Writes the page as far as it has come; may be called again.

        Returns:
            What a person should know: where it is, or why there is none.
        """
        if self._why_not:
            return f"no page: {self._why_not}"
        try:
            self._page.write(self.path)
        except ZitMergeError as e:
            return f"no page: {e}"
        return f"page to look at:\n    {copyable(self.path)}"


def run_page(site: RunContext, earlier: Iterable[RunPage]) -> RunPage:
    """The page of a section: that of an earlier section of the run, where both would be one file, else a new one."""
    return next((page for page in earlier if page.path == page_path(site)), None) or RunPage(site)


def page_path(site: RunContext) -> Path:
    """In the job's own folder under the name that the UI looks for; beside the output of a job that has none."""
    if site.home and (site.home.folder.is_dir() or site.home.folder == site.output_dir):
        return site.home.folder / PLUGIN
    job = re.sub(r"[/\\]", "_", site.job)
    return site.output_dir / f"{site.prefix}{job}.html"


def _why_not(site: RunContext) -> str:
    """Why there can be no page; empty where it can."""
    path = page_path(site)
    if any(home.claims(path) for home in (site.home, site.training) if home):
        return f"AI-Toolkit would take {path.name} for a checkpoint of {site.job}"
    if os.path.lexists(path) and not is_ours(path):
        return f"{path} is not a page of zit_merge, so it stays"
    return ""

"""The page that a run leaves behind, where AI-Toolkit's UI looks for it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...analysis.measure import Measurement
from ...errors import ZitMergeError
from ...files.paths import file_name
from ...merging.made import Done
from ...planning.context import RunContext
from ...planning.types import StepPlan
from ...progress import Progress
from ...wording import copyable
from .facts import files_facts, start_facts, step_facts
from .galleries import Gallery
from .render import Page, is_ours
from .whole_job import of_context

PLUGIN = "plugin.html"  # of the job's folder: the tab "Plugin" of the job in AI-Toolkit's UI


class RunPage:
    """A page for the sections of one run. Trouble with it is a sentence and stops no merge.

    Args:
        context: Where the first section runs.

    Attributes:
        path: Where the page will be.
        has_pictures: Whether any have been shown.
    """

    def __init__(self, context: RunContext):
        self.has_pictures = False
        self.path, self._why_not = page_path(context), _why_not(context)
        self._page = Page(context.job)

    def begin(self, context: RunContext, raw: Mapping[str, Any], index: int) -> None:
        """A section starts.

        Args:
            context: Where it runs.
            raw: As the config has it.
            index: Which process of the job it is.
        """
        has_home = "output_dir" in raw or context.training or context.home  # else only the command line named a folder
        section = raw if has_home else {**raw, "output_dir": str(context.output_dir)}
        self._page.begin(context.loc, section, first=index == 0, alone=of_context(context))

    def add(self, done: Done, progress: Progress) -> None:
        """A step is done; its inputs must still be there.

        Args:
            done: The step.
            progress: Shows the modules that are read again.
        """
        if not self._why_not:
            self._page.add(step_facts(done, progress))

    def look_at(self, measured: Measurement) -> None:
        """Files of a section that has merged nothing yet.

        Args:
            measured: The files.

        Raises:
            ZitMergeError: One of them is broken.
        """
        if not self._why_not:
            self._page.add(files_facts(measured))

    def start(self, plan: StepPlan, measured: Measurement) -> None:
        """A step that is not written, to compose from.

        Args:
            plan: The step; its inputs are files.
            measured: Them.
        """
        self._page.add(start_facts(plan, measured))

    def has(self, step: str) -> bool:
        """Whether a step of the last section is on the page, and can be composed.

        Args:
            step: Its name.
        """
        return self._page.has(step)

    def show(self, context: RunContext, step: str, gallery: Gallery) -> None:
        """Pictures of a step, whether it was merged in this run or not.

        Args:
            context: Where its section runs, which has begun.
            step: The step's name.
            gallery: What is shown below the galleries that are there.

        Raises:
            ZitMergeError: A picture can't be read.
        """
        self.has_pictures = True
        if not self._why_not:
            self._page.show(context.loc, step, gallery)

    @property
    def why_not(self) -> str:
        """Why there can be no page; empty where it can."""
        return self._why_not

    def studio(self, facts: Mapping[str, Any] | None) -> None:
        """A studio answers the page from now on, or no more.

        Args:
            facts: What the page has to know of it; None for none.
        """
        self._page.studio = facts

    def html(self) -> str:
        """The page as far as it has come."""
        return self._page.html()

    def replace_raw(self, raw: Mapping[str, Any]) -> None:
        """The last section has other steps now.

        Args:
            raw: The section as a config would have it.
        """
        self._page.replace_raw(raw)

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
        return f"report:\n    {copyable(self.path)}"


def run_page(context: RunContext, earlier: Iterable[RunPage]) -> RunPage:
    """The page of a section: that of an earlier section of the run, where both would be one file, else a new one.

    Args:
        context: Where the section runs.
        earlier: The pages of the sections before it.
    """
    return next((page for page in earlier if page.path == page_path(context)), None) or RunPage(context)


def page_path(context: RunContext) -> Path:
    """In the job's own folder under the name that the UI looks for; beside the output of a job that has none."""
    if context.home and (context.home.folder.is_dir() or context.home.folder == context.output_dir):
        return context.home.folder / PLUGIN
    return context.output_dir / f"{context.prefix}{file_name(context.job)}.html"


def _why_not(context: RunContext) -> str:
    """Why there can be no page; empty where it can."""
    path = page_path(context)
    if context.claims(path):
        return f"AI-Toolkit would take {path.name} for a checkpoint of {context.job}"
    if os.path.lexists(path) and not is_ours(path):
        return f"{path} is not a page of zit_merge, so it stays"
    return ""

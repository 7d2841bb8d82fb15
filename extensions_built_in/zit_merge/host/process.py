"""The process of type `zit_merge` in an AI-Toolkit job.

AI-Toolkit builds every process of a job before it runs the first one. So the section is checked, and the merge forecast, before
the training starts; the merge itself runs when its turn comes.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.process import BaseExtensionProcess

from ..errors import ZitMergeError
from ..wording import shown
from . import toolkit

if TYPE_CHECKING:
    from ..merging.made import Done
    from ..report.page.run import RunPage


class ZitMergeProcess(BaseExtensionProcess):
    """Merges what the job trained with other LoRAs."""

    def __init__(self, process_id: int, job, config: OrderedDict):
        super().__init__(process_id, job, config)
        # Not at the top: a package that is missing must stop this job only, with its name, not every job of the toolkit.
        from .status import Status, status_of

        self.page: RunPage | None = None  # once it runs
        self.done: list[Done] = []
        self.trouble = ""  # with the pictures, for the last section to end the job with
        self._raw = config
        self._status = status_of(job, process_id, config) if _is_main() else Status()
        try:
            self._forecast(process_id, job, config)
        except BaseException as e:
            self._status.refuse(self._sentence_first(e))
            raise

    def _forecast(self, process_id: int, job, config: OrderedDict) -> None:
        """Checks everything that can be known before the training."""
        from ..config.job import Job
        from ..planning.job import plan_job
        from ..report.text.plan import plan_text
        from . import fixes

        whole = Job(job.name, job.config["process"], _config_folder(job, process_id, config))
        (planned,) = plan_job(whole, index=process_id, may_download=True, before_training=True, toolkit=toolkit.found())
        self._planned, context = planned, planned.context
        told = [f"advice: {text}" for text in planned.advice]
        if training := context.training:
            fixed = fixes.apply(planned.section.train_fixes, job.process[training.index], training, context.at("train_fixes"))
            told = [*fixed, *told]
        if _is_main():
            _say("\n\n".join([*map(plan_text, planned.plans), *self._pictures_to_come(), *told]))

    def run(self):
        """Releases the trainer's memory, plans again with the trained file present, merges, reports."""
        super().run()
        if not _is_main():
            return  # no barrier: the trainer has ended the process group (accelerator.end_training)
        from ..section import summary
        from .status import JobStopped

        try:
            self._merge()
            told = self._show_and_serve()
        except BaseException as e:
            self._status.fail(self._sentence_first(e))
            if isinstance(e, JobStopped):
                _say(e.row["info"])
            raise
        merged = summary([done for process in self._ours(self.process_id + 1) for done in process.done])
        self._status.complete(", ".join(filter(None, (merged, told))))

    def on_error(self, e: BaseException) -> None:
        """run.py calls this for whatever ended the job, on its first process only."""
        from .status import pass_on

        super().on_error(e)
        pass_on(e, [p for p in self.job.process[self.process_id + 1 :] if not isinstance(p, ZitMergeProcess)])

    def _sentence_first(self, error: BaseException) -> BaseException:
        """The error as the UI's columns show it best; whoever prints it later, run.py and the trainer, says the same."""
        if isinstance(error, ZitMergeError):
            error.sentence_first = True
            error.step = error.step or self._step_at(getattr(error, "loc", ""))
        return error

    def _step_at(self, loc: str) -> str:
        """The name of the step that a location is in, as the config has it, right or wrong."""
        found, steps = re.match(rf"process\[{self.process_id}\]\.steps\[(\d+)\]", loc), self._raw.get("steps")
        step = steps[int(found[1])] if found and isinstance(steps, list) else None
        return str(step["name"]) if isinstance(step, Mapping) and "name" in step else ""

    def _ours(self, end: int | None = None) -> list[ZitMergeProcess]:
        """The sections of the job, those before process `end`."""
        return [p for p in self.job.process[:end] if isinstance(p, ZitMergeProcess)]

    def _merge(self) -> None:
        from ..planning.build import plan_section
        from ..report.page.run import run_page
        from ..report.progress import Bar
        from ..section import run_section
        from .memory import release
        from .watch import JobProgress

        self._status.say("Merging LoRAs")
        for process in self.job.process[: self.process_id]:
            release(process)
        context, section = self._planned.context, self._planned.section
        self._planned = replace(self._planned, plans=plan_section(section, context), placed=toolkit.device_of(section.device))
        self.page = page = run_page(context, [p.page for p in self._ours(self.process_id) if p.page])
        page.begin(context, self._raw, self.process_id)
        with JobProgress(self._status, Bar(), self._planned.plans) as progress:
            self.done += run_section(self._planned, page, _say, progress)

    def _show(self) -> None:
        """Renders the pictures that the section asks for. Trouble with them stops no merge of the sections that follow."""
        sections = self._ours()
        try:
            self._render()
        except ZitMergeError as e:
            if self is sections[-1]:
                raise
            self.trouble = str(self._sentence_first(e))  # not the error itself: its frames hold what the model took
            _say(f"NO PICTURES: {self.trouble}\n  the job goes on, merges, and ends with this error")
        if self is sections[-1] and (troubles := [p.trouble for p in sections if p.trouble]):
            raise ZitMergeError(troubles[0])

    def _render(self) -> None:
        """The pictures; the merges of this section are done."""
        from ..preview.grids import preview_plan
        from ..preview.runner import render_section
        from ..report.progress import Bar
        from .render import ToolkitRenderer
        from .watch import JobProgress

        planned, page = self._planned, self.page
        if not (planned.section.wants_pictures and page):
            return
        self._status.say("Merged, pictures next")
        made = {done.plan.name: done.plan for done in self.done}
        preview = preview_plan(planned.section, planned.context, [made.get(p.name, p) for p in planned.plans])
        with JobProgress(self._status, Bar()) as progress:
            render_section(preview, planned, page, _say, progress, progress.loading(ToolkitRenderer))

    def _show_and_serve(self) -> str:
        """The pictures, then the studio, which opens without them too: a smaller one may fit there. Returns what to tell."""
        try:
            self._show()
        except ZitMergeError as e:
            if self._planned.section.studio:
                _say(f"NO PICTURES: {self._sentence_first(e)}\n  the studio opens, then the job ends with this error")
                self._open_studio()
            raise
        return self._open_studio()

    def _open_studio(self) -> str:
        """Serves the merge page until it is closed, if the section asks for it. Returns why not, where it could not."""
        planned, page, asked = self._planned, self.page, self._planned.section.studio
        if not (asked and page):
            return ""
        from ..report.progress import Bar
        from ..section import run_section
        from ..studio.bench import Bench
        from ..studio.run import serve_studio
        from .render import ToolkitRenderer
        from .watch import JobProgress

        made = {done.plan.name: done.plan for done in self.done}
        planned = replace(planned, plans=[made.get(plan.name, plan) for plan in planned.plans])
        with JobProgress(self._status, Bar()) as progress:
            try:
                serve_studio(
                    Bench(planned, self._raw),
                    page,
                    _say,
                    progress,
                    keep=lambda section, watch: list(run_section(section, None, _say, watch)),
                    load=progress.loading(ToolkitRenderer),
                    minutes=asked.minutes,
                )
            except ZitMergeError as e:
                _say(f"NO STUDIO: {e}")
                return f"no studio: {e}"
        return ""

    def _pictures_to_come(self) -> list[str]:
        """The pictures of the section; what prevents them stops no merge."""
        from ..preview.grids import preview_plan
        from ..preview.runner import import_metrics

        planned = self._planned
        if not planned.section.wants_pictures:
            return []
        try:
            preview = preview_plan(planned.section, planned.context, planned.plans)
            for text in import_metrics(preview):
                _say(text)
            return [preview.text()]
        except ZitMergeError as e:
            return [
                f"NO PICTURES: {e}\n  the job goes on, merges, and ends with this error; to fix the config first, stop it now"
            ]


def _say(text: str) -> None:
    """Prints what the log can hold: on Windows AI-Toolkit's is not UTF-8."""
    print(shown(text), flush=True)


def _is_main() -> bool:
    return toolkit.accelerator().is_main_process


def _config_folder(job, process_id: int, section) -> Path:
    """Where the job's config lies. The toolkit does not hand it on, so the files on its command line are read again."""
    from yaml import YAMLError

    from ..config.job import hide_environment
    from ..files.text import TextFile

    endings = (".json", ".jsonc", ".yaml", ".yml")
    for word in sys.argv[1:]:
        in_root = [toolkit.config_root() / f"{word}{ending}" for ending in ("", *endings)]  # get_config looks there first
        for path in (p for p in (*in_root, Path(word)) if p.suffix in endings and p.is_file()):
            try:
                processes = toolkit.read_config(path, job.name)["config"]["process"]
            except (ValueError, KeyError, TypeError, OSError, YAMLError):
                continue  # another file that the command line names: no config of ours
            if len(processes) > process_id and processes[process_id] == section:
                hide_environment(TextFile.read(path).text)
                return path.parent
    return Path()

"""The process of type `zit_merge` in an AI-Toolkit job.

AI-Toolkit builds every process of a job before it runs the first one. So the section is checked, and the merge forecast, before
the training starts; the merge itself runs when its turn comes.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.process import BaseExtensionProcess

from ..errors import ZitMergeError
from . import toolkit

if TYPE_CHECKING:
    from ..planning.job import Planned
    from ..planning.plan import StepPlan


class ZitMergeProcess(BaseExtensionProcess):
    """Merges what the job trained with other LoRAs."""

    def __init__(self, process_id: int, job, config: OrderedDict):
        super().__init__(process_id, job, config)
        # Not at the top: a package that is missing must stop this job only, with its name, not every job of the toolkit.
        from .status import Status, status_of

        self.page = None  # of report.page.run, once it runs
        self.trouble = ""  # with the pictures, for the last section to end the job with
        self._raw = config
        self._status = status_of(job, process_id, config) if _is_main() else Status()
        try:
            self._forecast(process_id, job, config)
        except BaseException as e:
            self._status.refuse(e)
            raise

    def _forecast(self, process_id: int, job, config: OrderedDict) -> None:
        """Checks everything that can be known before the training."""
        from ..config.job import Job
        from ..planning.job import plan_job
        from ..report.tables import plan_text
        from . import fixes

        whole = Job(job.name, job.config["process"], _config_folder(job, process_id, config))
        (planned,) = plan_job(whole, index=process_id, may_download=True, before_training=True, toolkit=toolkit.at_hand())
        section, site = self._section, self._site = planned.section, planned.site
        told = [f"advice: {text}" for text in planned.advice]
        if training := site.training:
            told = [*fixes.apply(section.train_fixes, job.process[training.index], training, site.at("train_fixes")), *told]
        if _is_main():
            _say("\n\n".join([*map(plan_text, planned.plans), *_pictures(planned), *told]))

    def run(self):
        """Releases the trainer's memory, plans again with the trained file at hand, merges, reports."""
        super().run()
        if not _is_main():
            return  # no barrier: the trainer has ended the process group (accelerator.end_training)
        try:
            self._merge()
        except BaseException as e:
            self._status.fail(e)
            raise
        self._status.complete()

    def on_error(self, e: BaseException) -> None:
        """run.py calls this for whatever ended the job, on its first process only."""
        from .status import pass_on

        super().on_error(e)
        pass_on(e, [p for p in self.job.process[self.process_id + 1 :] if not isinstance(p, ZitMergeProcess)])

    def _merge(self) -> None:
        from ..merging.runner import run_plans
        from ..planning.plan import plan_section
        from ..report.page.run import run_page
        from ..report.progress import Bar, passing
        from ..report.tables import done_text
        from .memory import release
        from .status import Watch

        self._status.say("Merging LoRAs")
        for process in self.job.process[: self.process_id]:
            release(process)
        plans = plan_section(self._section, self._site)
        settled = {plan.name: plan for plan in plans}
        ours = [p.page for p in self.job.process[: self.process_id] if isinstance(p, ZitMergeProcess) and p.page]
        self.page = run_page(self._site, ours)
        self.page.begin(self._site, self._raw, self.process_id)
        device = toolkit.device_of(self._section.device)
        with Bar() as bar, Watch(self._status, plans, bar.tick) as watch:
            shown = passing(quiet=False)
            for done in run_plans(plans, device, watch.tick, lambda *looked: watch.passing(shown(*looked))):
                bar.close()
                settled[done.plan.name] = done.plan
                _say(done_text(done))
                self.page.add(done, watch.passing)
        _say(self.page.write())
        self._show(list(settled.values()))

    def _show(self, plans: Sequence[StepPlan]) -> None:
        """Renders the pictures that the section asks for. Trouble with them stops no merge of the sections that follow."""
        sections = [p for p in self.job.process if isinstance(p, ZitMergeProcess)]
        try:
            self._render(plans)
        except ZitMergeError as e:
            if self is sections[-1]:
                raise
            self.trouble = str(e)  # not the error itself: its frames hold what the model took
            _say(f"NO PICTURES: {e}\n  the job goes on, merges, and ends with this error")
        if self is sections[-1] and (troubles := [p.trouble for p in sections if p.trouble]):
            raise ZitMergeError(troubles[0])

    def _render(self, plans: Sequence[StepPlan]) -> None:
        """The pictures; the merges of this section are done."""
        from ..preview.grids import asks_for_pictures, preview_plan
        from ..preview.show import show
        from ..report.progress import Pictures
        from .render import Renderer
        from .status import PictureWatch

        if not asks_for_pictures(self._section):
            return
        self._status.say("Merged, pictures next")
        exhibition, device = preview_plan(self._section, self._site, plans), toolkit.device_of(self._section.device)
        try:
            with Pictures() as bar, PictureWatch(self._status, bar.tick) as watch:
                load = watch.loading(Renderer)
                for text in show(exhibition, device, load, self.page, watch.tick, watched=watch.passing):
                    _say(text)
        finally:
            _say(self.page.write())


def _pictures(planned: Planned) -> list[str]:
    """The pictures to come; what stands in their way stops no merge."""
    from ..preview.grids import asks_for_pictures, preview_plan

    if not asks_for_pictures(planned.section):
        return []
    try:
        return [preview_plan(planned.section, planned.site, planned.plans).text()]
    except ZitMergeError as e:
        return [f"NO PICTURES: {e}\n  the job goes on, merges, and ends with this error; stop it now to mend the config first"]


def _say(text: str) -> None:
    """Prints what the log can hold: on Windows AI-Toolkit's is not UTF-8."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _is_main() -> bool:
    return toolkit.accelerator().is_main_process


def _config_folder(job, process_id: int, section) -> Path:
    """Where the job's config lies. The toolkit does not hand it on, so the files on its command line are read again."""
    from yaml import YAMLError

    endings = (".json", ".jsonc", ".yaml", ".yml")
    for word in sys.argv[1:]:
        in_root = [toolkit.config_root() / f"{word}{ending}" for ending in ("", *endings)]  # get_config looks there first
        for path in (p for p in (*in_root, Path(word)) if p.suffix in endings and p.is_file()):
            try:
                processes = toolkit.read_config(path, job.name)["config"]["process"]
            except (ValueError, KeyError, TypeError, OSError, YAMLError):
                continue  # another file that the command line names: no config of ours
            if len(processes) > process_id and processes[process_id] == section:
                return path.parent
    return Path()

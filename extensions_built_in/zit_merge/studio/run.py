"""Opens a studio on a section, and serves until it is closed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from ..algebra.methods import METHODS
from ..algebra.parameters import Parameter, paragraphs
from ..analysis.measure import measure
from ..config.schema import Section
from ..errors import ZitMergeError
from ..formats.checkpoint import Checkpoint, Seen
from ..merging.made import Done, Hashes
from ..merging.measure import measure_step
from ..planning.planned import Planned
from ..planning.types import StepPlan
from ..preview.grids import preview_plan
from ..preview.plan import PreviewPlan
from ..preview.rendering import Load, Renderer
from ..preview.settings import RenderSettings
from ..progress import Progress
from ..report.page.facts import result_facts
from ..report.page.run import RunPage
from ..wording import copyable
from .bench import TRIED, Bench
from .entries import Look
from .held import HeldReaders
from .looks import Strip
from .server import PORT, Door
from .session import Session
from .setting import Setting
from .steps import steps_file

Keep = Callable[[Planned, Progress], Sequence[Done]]  # runs a section, tells what came of it, shows it on the page


class Studio:
    """The workshop of a studio: it plans, measures, renders and writes as a section is.

    Args:
        bench: The section.
        page: Of the run, the section the last on it.
        keep: Writes the steps of a section.
        load: Loads the model; None where there are no pictures.
        why_not: Why there are none.

    Attributes:
        no_pictures: Why there are none; empty where there are.
        strip: The looks; None where there are no pictures.
        steps: The file of what was kept.
    """

    def __init__(self, bench: Bench, page: RunPage, keep: Keep, load: Load | None, why_not: str):
        self.bench, self._page, self._run, self._load, self.no_pictures = bench, page, keep, load, why_not
        self.strip: Strip | None = None
        planned = bench.planned
        if load:
            try:
                self.strip, self.no_pictures = Strip(planned.section, planned.context, self._pictures), ""
            except ZitMergeError as e:
                self.no_pictures = str(e)
        self.steps = steps_file(planned.context)
        self._open = ExitStack()
        self._renderer: Renderer | None = None

    def __enter__(self) -> Studio:
        planned = self.bench.planned
        self._files = {path: seen for plan in planned.plans for path, seen in plan.hashed.items()}
        self._hashes = self._open.enter_context(Hashes(self._files))
        self._readers = self._open.enter_context(HeldReaders(self._hashes, planned.device))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._open.__exit__(*exc)

    @property
    def looks(self) -> Sequence[Look]:
        """See `Workshop`."""
        return self.strip.looks if self.strip else ()

    @property
    def ready(self) -> set[str]:
        """See `Workshop`."""
        return self.strip.ready if self.strip else set()

    def is_start(self, setting: Setting) -> bool:
        """See `Workshop`."""
        return self.bench.is_start(setting)

    def measure(self, setting: Setting, progress: Progress) -> Mapping[str, Any]:
        """See `Workshop`.

        Raises:
            ZitMergeError: The step can't be made.
        """
        _, (*_, plan) = self._planned(self.bench.step(setting, TRIED))
        return result_facts(*measure_step(plan, self._readers, self.bench.planned.device, progress))

    def _planned(self, step: Mapping[str, Any]) -> tuple[Section, Sequence[StepPlan]]:
        """The plans of a step, its files as they were when the studio was opened: what was seen is what is kept."""
        section, plans = self.bench.plan(step)
        for path, seen in plans[-1].hashed.items():
            before = self._files.get(path)
            if before is not None and _facts(before) != _facts(seen):
                raise ZitMergeError(f"{path}: was changed since the studio opened: close it and open it again")
        return section, plans

    def _pictures(self, setting: Setting, asked: Mapping[str, Any]) -> PreviewPlan:
        section, plans = self._planned(self.bench.step(setting, TRIED) | {"preview": dict(asked)})
        return preview_plan(section, self.bench.planned.context, plans[-1:])

    def add(self, setting: Setting, draft: bool) -> Look:
        """See `Workshop`."""
        assert self.strip, "there are pictures"
        return self.strip.add(setting, draft, self.bench.label(setting))

    def render(self, look: Look, progress: Progress, on_load: Callable[[str], None]) -> Iterator[None]:
        """See `Workshop`.

        Raises:
            ZitMergeError: It can't be planned or rendered.
        """
        assert self.strip, "there are pictures"

        @contextmanager
        def loaded(settings: RenderSettings) -> Iterator[Renderer]:
            """The model, loaded for the first picture and kept until the studio closes."""
            assert self._load, "there are pictures"
            if self._renderer is None:
                on_load(settings.name)
                self._renderer = self._open.enter_context(self._load(settings))
                on_load("")
            self._renderer.on_step = progress.check
            yield self._renderer

        yield from self.strip.render(look, self._hashes, self._readers, loaded, progress)

    def write(self, done: Look | None = None) -> None:
        """See `Workshop`."""
        if self.strip:
            self.strip.write(done)

    def jpeg(self, digest: str, edge: int) -> bytes:
        """See `Workshop`."""
        assert self.strip, "there are pictures"
        return self.strip.jpeg(digest, edge)

    def name(self, found: object) -> str:
        """See `Workshop`.

        Raises:
            ZitMergeError: It can't be one, or is taken.
        """
        name = self.bench.name(found)
        if self.bench.path(name).exists():
            raise ZitMergeError(f"name: {self.bench.path(name).name} is there already: choose another name")
        return name

    def keep(self, setting: Setting, name: str, progress: Progress) -> Mapping[str, Any]:
        """See `Workshop`.

        Raises:
            ZitMergeError: The file can't be written, or one of that name is there already.
        """
        step = self.bench.step(setting, name)
        section, plans = self._planned(step)
        if any(target.exists() for target in plans[-1].targets):  # since it was asked for
            raise ZitMergeError(f"name: {plans[-1].path.name} is there already: choose another name")
        *_, done = self._run(replace(self.bench.planned, section=section, plans=plans), progress)
        self.bench.kept.append(step)
        remark = self._note()
        self._page.replace_raw(self.bench.section())
        self._page.add(done, progress)
        self._page.write()
        facts = result_facts(done.plan, done.verdict) if done.verdict else {}
        told = "; ".join(filter(None, (facts.get("judgement"), remark)))
        return {"file": done.path.name, "verdict": facts.get("status"), "judgement": told or None}

    def _note(self) -> str:
        """Writes the file of what was kept. Returns what is wrong with it: the LoRA itself is written."""
        try:
            self.steps.write(self.bench.section())
        except ZitMergeError as e:
            return f"the section is not noted: {e}"
        return ""


def serve_studio(
    bench: Bench,
    page: RunPage,
    say: Callable[[str], None],
    progress: Progress,
    *,
    keep: Keep,
    load: Load | None,
    why_not: str = "",
    minutes: float = 30,
    port: int = PORT,
    is_served: bool = False,
    grace: float = 1.5,
    on_open: Callable[[Door], None] = lambda door: None,
) -> None:
    """Serves the page of a section until somebody closes the studio, or nobody uses it.

    Args:
        bench: The section.
        page: Of the run, the section the last on it.
        say: Prints a text.
        progress: May stop it, and shows what is going on.
        keep: Writes the steps of a section.
        load: Loads the model; None where there are no pictures.
        why_not: Why there are none.
        minutes: Without a request after which it closes.
        port: Where it listens.
        is_served: The page is served too, under an address with the token.
        grace: Seconds in which its tabs may hear that it is closed; a stop does not wait for them.
        on_open: Called when the studio is open.

    Raises:
        ZitMergeError: The port is taken, there can be no page, or an input was changed meanwhile.
    """
    if page.why_not:
        raise ZitMergeError(f"there is no page: {page.why_not}")
    if not _show_starts(bench, page, progress):
        raise ZitMergeError("no step can be composed: give one with loras, files that are there")
    studio = Studio(bench, page, keep, load, why_not)
    session = Session(studio, minutes, progress)
    try:
        with studio, Door(session, bench.planned.context.job, port, page.html if is_served else None) as door:
            page.studio(studio_facts(studio, door))
            say(page.write())
            on_open(door)
            session.serve()
            time.sleep(grace)
    finally:
        session.close("the job ended")
        page.studio(None)
        page.write()
    say(f"studio closed: {session.closed}" + (f"\n  what was kept:\n    {copyable(studio.steps.path)}" if bench.kept else ""))


def _show_starts(bench: Bench, page: RunPage, progress: Progress) -> bool:
    """Shows the steps on the page that composing may start from and that were not written: those with `keep: false`.

    Returns:
        Whether there is any step to start from.
    """
    for plan in bench.planned.plans:
        loras = [i.lora for i in plan.inputs]
        if plan.name in bench.templates and not page.has(plan.name) and all(loras):
            page.start(plan, measure([lora for lora in loras if lora], 0, progress))
    return any(map(page.has, bench.templates)) or not bench.is_made


def studio_facts(studio: Studio, door: Door) -> dict[str, Any]:
    """What the page has to know of its studio.

    Args:
        studio: Its workshop.
        door: Its server.
    """
    strip = studio.strip
    return {
        "token": door.token,
        "port": door.port,
        "steps": list(studio.bench.templates),
        "is_made": studio.bench.is_made,
        "taken": studio.bench.taken(),
        "no_pictures": studio.no_pictures or None,
        "prompts": strip.headings if strip else [],
        "full": strip.text(False) if strip else "",
        "draft": strip.text(True) if strip else "",
        "methods": [
            {
                "name": name,
                "summary": " ".join(paragraphs(method.doc)[""].split()),
                "takes": method.takes,
                "params": list(map(_parameter, method.parameters.values())),
            }
            for name, method in METHODS.items()
        ],
    }


def _facts(seen: Seen) -> object:
    return seen.files if isinstance(seen, Checkpoint) else seen


def _parameter(p: Parameter) -> Mapping[str, Any]:
    """The field of a parameter."""
    kinds = {int: "integer", bool: "flag", float: "number"}
    high = p.within.high if p.within and p.within.high != float("inf") else None
    return {
        "name": p.name,
        "kind": "choice" if p.choices else kinds.get(p.kind, "number"),
        "default": p.default,
        "choices": list(p.choices) or None,
        "least": p.within.low if p.within else None,
        "most": high,
        "text": p.text,
    }

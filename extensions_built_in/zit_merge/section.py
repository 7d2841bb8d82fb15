"""One section from its plans to files and page: the one conductor, of the command line and of AI-Toolkit's process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .formats.verdict import RIGHT, Verdict
from .merging.made import Done
from .merging.runner import run_plans
from .planning.planned import Planned
from .progress import Progress
from .report.page.run import RunPage
from .report.text.result import done_text, verdict_text
from .wording import listed

Say = Callable[[str], None]


def run_section(planned: Planned, page: RunPage | None, say: Say, progress: Progress) -> Iterator[Done]:
    """Merges a section's steps, tells what came of each, and writes the page.

    Args:
        planned: The section.
        page: Of the run, the section begun; None for none.
        say: Prints a text.
        progress: Shows how far it is, and may stop it.

    Yields:
        Each step when it is done; files of steps that are not kept are gone after the last one.

    Raises:
        ZitMergeError: With no part of the failing step's file left behind.
    """
    is_shown = False
    for done in run_plans(planned.plans, planned.device, progress):
        say(done_text(done))
        if page and done.is_lora:
            page.add(done, progress)
            is_shown = True
        yield done
    if page and is_shown:
        say(page.write())


def what_is_not_right(done: Sequence[Done]) -> dict[str, str]:
    """Step -> why its result is off or empty, for those that are."""
    plans = {name: one.plan for one in done for name in _verdicts([one])}
    return {name: verdict_text(plans[name], v) for name, v in _verdicts(done).items() if v.status != RIGHT}


def _verdicts(done: Sequence[Done]) -> dict[str, Verdict]:
    """Name -> verdict, of LoRAs and of whole models."""
    found = {one.plan.name: one.verdict for one in done if one.is_lora and one.verdict}
    return found | {f"{one.plan.name} (baked)": one.baked.verdict for one in done if one.baked}


def summary(done: Sequence[Done]) -> str:
    """`2 merged`, `1 merged, 1 up to date, with_style is off: see the Plugin tab`: the end of a job in a few words."""
    loras = [one.made for one in done if one.is_lora]
    models = [one.baked.made for one in done if one.baked]
    counts = {"merged": sum(loras), "baked": sum(models), "up to date": len(loras + models) - sum(loras + models)}
    merged = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    groups: dict[str, list[str]] = {}
    for name, verdict in _verdicts(done).items():
        if verdict.status != RIGHT:
            groups.setdefault(verdict.status, []).append(name)
    told = [f"{listed(names)} {'is' if len(names) == 1 else 'are'} {status}" for status, names in groups.items()]
    return f"{merged}, {', '.join(told)}: see the Plugin tab" if told else merged

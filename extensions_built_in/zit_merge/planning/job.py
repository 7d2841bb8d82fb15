"""From a job to the plans of its sections: what check, run, attach and the process in AI-Toolkit share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config.job import Job
from ..config.schema import Section
from ..errors import ZitMergeError
from ..merging.runner import pick_device
from .plan import StepPlan, plan_section
from .preflight import NO_TOOLKIT, Toolkit, preflight
from .sources import RunContext, make_context


@dataclass(frozen=True)
class Planned:
    """A section that can run.

    Attributes:
        index: Which process it is.
        section: Validated.
        site: Where it runs.
        plans: Of its steps, in order.
        device: What its `device` is here.
        advice: On the training before it, a sentence each.
    """

    index: int
    section: Section
    site: RunContext
    plans: Sequence[StepPlan]
    device: torch.device
    advice: Sequence[str] = ()


def plan_job(
    job: Job,
    *,
    index: int | None = None,
    only: str | None = None,
    output_dir: str | None = None,
    lora_folders: Sequence[Path] = (),
    may_download: bool = False,
    before_training: bool = False,
    toolkit: Toolkit = NO_TOOLKIT,
) -> Iterator[Planned]:
    """Plans the sections of a job, each when its turn comes.

    Args:
        job: The whole config.
        index: Only the section that is this process.
        only: Only this step and the earlier ones that it uses, in the sections that have it.
        output_dir: Overrides the sections'.
        lora_folders: Where inputs are looked for by hash.
        may_download: Whether sources on the hub may be fetched.
        before_training: The trainings are still to come, and are looked at too; else their LoRAs must be there.
        toolkit: What tells of a training to come.

    Raises:
        ZitMergeError: Anything that would stop the job and can be known now.
    """
    check_sections(job, output_dir)
    sections = [(i, s) for i, s in job.sections() if index in (None, i)]
    if only and len(sections) > 1:
        sections = [(i, s) for i, s in sections if only in {step.name for step in s.steps}] or sections[:1]
    for i, section in sections:
        site = make_context(job, i, section, output_dir=output_dir, lora_folders=lora_folders, may_download=may_download)
        device = pick_device(section.device)
        plans = plan_section(section, site, before_training=before_training and site.training is not None, only=only)
        advice = preflight(job, site, section, toolkit) if before_training else ()
        yield Planned(i, section, site, plans, device, advice)


def check_sections(job: Job, output_dir: str | None = None) -> None:
    """Raises if a section writes a file that an earlier section writes, or reads one: it is not there before the job runs.

    Within a section the steps' names differ, and are how a step reads an earlier one.
    """
    owners: dict[str, tuple[int, str]] = {}  # path -> (section, place of the step)
    for index, section in job.sections():
        site = make_context(job, index, section, output_dir=output_dir)
        names = {step.name for step in section.steps}
        for i, step in enumerate(section.steps):
            own = index, site.at(f"steps[{i}]")
            for j, lora in enumerate(step.loras):
                paths = [] if lora.lora in names or lora.sha256 else [folder / lora.lora for folder in site.folders]
                for writer, other in (owners.get(_alike(path), own) for path in paths):
                    if writer != index:
                        raise ZitMergeError(
                            f"{own[1]}.loras[{j}].lora: {other} writes {lora.lora}, which is not there before the job runs: put "
                            "both steps into one section and use the step's name"
                        )
            path = site.output(step)
            if (other := owners.setdefault(_alike(path), own)) != own:
                raise ZitMergeError(f"{own[1]}.name: {other[1]} writes {path.name} too: give one of them another name")


def _alike(path: Path) -> str:
    """The same for names that some file system takes for one."""
    return str(path.absolute()).lower()

"""From a job to the plans of its sections: what check, run, attach and the process in AI-Toolkit share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..config.job import Job
from ..config.schema import Section
from ..errors import SettingError, located
from ..files.paths import user_path
from .build import plan_section
from .context import PREFIXES, RunContext
from .device import pick_device
from .models import baked_path
from .planned import Planned
from .preflight import NO_TOOLKIT, Toolkit, check_types, preflight
from .training import Training, training_before


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
    if before_training:
        check_types(job, toolkit)
    _check_sections(job, output_dir)
    sections = [(i, s) for i, s in job.sections() if index in (None, i)]
    if only and len(sections) > 1:
        sections = [(i, s) for i, s in sections if only in {step.name for step in s.steps}] or sections[:1]
    for i, section in sections:
        context = make_context(job, i, section, output_dir=output_dir, lora_folders=lora_folders, may_download=may_download)
        if section.device not in ("auto", "cpu"):
            pick_device(section.device)  # raises where torch does not see it
        plans = plan_section(section, context, before_training=before_training and context.training is not None, only=only)
        advice = preflight(job, context, section, toolkit) if before_training else ()
        yield Planned(i, section, context, plans, advice=advice)


def make_context(
    job: Job,
    index: int,
    section: Section,
    *,
    output_dir: str | None = None,
    lora_folders: Sequence[Path] = (),
    may_download: bool = False,
) -> RunContext:
    """Finds the training before a section, the folder for its output, and names that the toolkit will leave alone.

    Args:
        job: The whole config.
        index: Which process the section is.
        section: The section.
        output_dir: Overrides the section's.
        lora_folders: Where inputs are looked for by hash.
        may_download: Whether sources on the hub may be fetched.

    Raises:
        SettingError: There is no such folder.
    """
    training = training_before(job.name, job.processes, index)
    # A job of ours alone has a folder of its own too, where a training of that name may come to look for checkpoints.
    own = Training(job.loc(index), job.name, {"training_folder": section.training_folder, "name": section.name})
    homes = [t for t in (training, own if section.training_folder else None) if t]
    for folder in lora_folders:
        if not folder.is_dir():
            raise SettingError("is not a folder: correct the path", f"--loras {folder}")
    with located(job.loc(index)):
        context = RunContext(
            job=job.name,
            loc=job.loc(index),
            output_dir=_output_dir(output_dir or section.output_dir, homes),
            training=training,
            folders=(job.folder, Path()),
            lora_folders=lora_folders,
            may_download=may_download,
            home=homes[0] if homes and not output_dir else None,
        )
        return _with_prefix(context, section, homes)


def _output_dir(chosen: str | None, homes: Sequence[Training]) -> Path:
    with located("output_dir"):
        if chosen is None and not homes:
            raise SettingError(
                "is missing, and there is no training before this section whose folder could be used: give output_dir (or "
                "--output-dir on the command line)"
            )
        return user_path(chosen or homes[0].folder)


def _with_prefix(context: RunContext, section: Section, homes: Sequence[Training]) -> RunContext:
    """The context with the first prefix that no glob of the toolkit matches."""
    for prefix in PREFIXES:
        named = replace(context, prefix=prefix)
        if not any(home.claims(named.output(s)) for home in homes for s in section.steps):
            return named
    raise SettingError(
        f"AI-Toolkit would take any file in {context.output_dir} for a checkpoint of the job {context.job!r}: set another "
        "output_dir, or give the job a name without wildcards",
        "output_dir",
    )


def _check_sections(job: Job, output_dir: str | None = None) -> None:
    """Raises if a section writes a file that an earlier section writes, or reads one: it is not there before the job runs.

    Within a section the steps' names differ, and are how a step reads an earlier one.
    """
    owners: dict[str, tuple[int, str]] = {}  # path -> (section, location of the step)
    for index, section in job.sections():
        context = make_context(job, index, section, output_dir=output_dir)
        if section.studio and index + 1 < len(job.processes):
            told = f"the job would wait in the studio before {job.loc(index + 1)}: put studio on the job's last process"
            raise SettingError(told, context.at("studio"))
        names = {step.name for step in section.steps}
        for i, step in enumerate(section.steps):
            own = index, context.at(f"steps[{i}]")
            for j, lora in enumerate(step.loras):
                paths = [] if lora.source in names or lora.sha256 else [folder / lora.source for folder in context.folders]
                for path in paths:
                    writer, other = owners.get(_alike(path), own)
                    if writer != index:
                        raise SettingError(
                            f"{other} writes {lora.source}, which is not there before the job runs: put both steps into one "
                            "section and use the step's name",
                            f"{own[1]}.loras[{j}].lora",
                        )
            for path in (context.output(step), *([baked_path(step, context)] if step.bake else [])):
                if (first := owners.setdefault(_alike(path), own)) != own:
                    raise SettingError(f"{first[1]} writes {path.name} too: give one of them another name", f"{own[1]}.name")


def _alike(path: Path) -> str:
    """The same for names that some file system takes for one."""
    return str(path.absolute()).lower()

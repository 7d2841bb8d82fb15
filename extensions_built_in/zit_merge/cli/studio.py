"""`studio`: the live merge page of LoRA files."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ..analysis.measure import measure
from ..config.job import Job
from ..errors import SettingError, ZitMergeError
from ..formats.reader import load_lora
from ..host.status import Status
from ..host.watch import JobProgress
from ..planning.job import plan_job
from ..planning.planned import Planned
from ..preview.rendering import Load
from ..progress import Progress
from ..report.page.files import section_of
from ..report.page.run import run_page
from ..report.progress import Bar
from ..section import run_section
from ..studio.bench import Bench
from ..studio.run import serve_studio
from ..studio.server import Door
from .console import say, show

NAME = "studio"  # of the job: in the names of what is kept
_PROMPT = "a portrait of a person in a garden, soft light"


def studio(args: argparse.Namespace) -> None:
    """Measures the files, opens the studio, and serves until it is closed."""
    loras = [load_lora(path) for path in args.files]
    raw = section_of(loras) | {"output_dir": str(args.out), "device": args.device} | _pictures(args)
    job = Job(NAME, [raw], Path(), recipe=True)
    (planned,) = _planned(job)
    measured = measure(loras, 0, Bar(args.quiet))
    page = run_page(planned.context, ())
    page.begin(planned.context, raw, 1)
    page.look_at(measured)

    def keep(section: Planned, progress: Progress) -> list[Any]:
        return list(run_section(section, None, partial(say, args), progress))

    with JobProgress(Status(), Bar(args.quiet)) as progress:
        load, why_not = _loading(args, progress)
        serve_studio(
            Bench(planned, raw, is_made=False),
            page,
            partial(say, args),
            progress,
            keep=keep,
            load=load,
            why_not=why_not,
            minutes=args.minutes,
            port=args.port,
            is_served=True,
            on_open=partial(_tell, args),
        )


def _planned(job: Job) -> list[Planned]:
    """The section, its mistakes in the words of the flags."""
    try:
        return list(plan_job(job))
    except SettingError as e:
        found = e.loc.removeprefix("steps[0]").lstrip(".")
        number = found.removeprefix("loras[").partition("]")[0]
        flags = {"output_dir": "--out", "device": "--device"}
        e.loc = f"file {int(number) + 1}" if found.startswith("loras[") else flags.get(found, found)
        raise


def _pictures(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of the section that pictures need."""
    if not args.model:
        for flag in ("prompt", "size", "steps", "quantize", "low_vram"):
            if getattr(args, flag):
                raise SettingError("is about pictures, which need --model: add it, or drop this", f"--{flag.replace('_', '-')}")
        return {}
    flags = {"quantize": args.quantize, "low_vram": args.low_vram}
    model = {"name_or_path": args.model, "arch": "zimage:turbo", **{key: True for key, is_on in flags.items() if is_on}}
    shot = {"width": args.size, "height": args.size} if args.size else {}
    samples = [{"prompt": prompt} for prompt in args.prompt or [_PROMPT]]
    return {"model": model, "sample": {"samples": samples, **shot, **({"sample_steps": args.steps} if args.steps else {})}}


def _loading(args: argparse.Namespace, progress: JobProgress) -> tuple[Load | None, str]:
    """(what loads the model, why there are no pictures)."""
    if not args.model:
        return None, "there is no model: start the studio with --model PATH, in AI-Toolkit's folder"
    from ..host.render import ToolkitRenderer
    from ..host.toolkit import part

    try:
        part("toolkit.config_modules", "ModelConfig")
    except ZitMergeError as e:
        return None, str(e)
    return progress.loading(ToolkitRenderer), ""


def _tell(args: argparse.Namespace, door: Door) -> None:
    """Whoever started it has to know the address, quiet or not, and why there are no pictures where some were asked for."""
    if args.model and door.session.no_pictures:
        show(f"NO PICTURES: {door.session.no_pictures}")
    show(f"studio open, Ctrl+C closes it:\n    http://127.0.0.1:{door.port}/open/{door.token}")

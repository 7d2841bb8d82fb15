"""A job of a section alone, for *Import Config* in AI-Toolkit's UI: what it needs besides the section.

The composer fills in the section, with the paths of files in the place of names that only mean something in the old job.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...config.schema import PROCESS_TYPE
from ...planning.context import RunContext
from ...planning.training import table

_MODEL = {"name_or_path": "Tongyi-MAI/Z-Image-Turbo", "arch": "zimage:turbo"}


def whole_job(name: str = "files", training: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A job whose one process merges, without its steps.

    The UI's pages break where a process has no model, datasets or samples (page.tsx, jobConfig.ts, SampleImages.tsx); a step to
    do brings its Start button back after a merge (jobs.ts).

    Args:
        name: Of the old job.
        training: The training that the section stood behind, whose model and samples the pictures need.
    """
    training = training or {}
    model = {key: value for key, value in table(training, "model").items() if key != "assistant_lora_path"}
    sample = dict(table(training, "sample"))
    prompts = sample.pop("prompts", None)
    sample["samples"] = sample.get("samples") or [{"prompt": p} for p in (prompts if isinstance(prompts, list) else [])]
    process: dict[str, Any] = {
        "type": PROCESS_TYPE,
        "training_folder": training.get("training_folder") or "output",
        "model": _MODEL | model,
        "datasets": [],
        "sample": sample,
        "train": {"steps": 1},
    }
    if trigger := training.get("trigger_word"):
        process["trigger_word"] = trigger
    named = re.sub(r"[^\w.-]+", "_", name)
    return {
        "job": "extension",
        "config": {"name": f"{named}_merge", "process": [process]},
        "meta": {"name": "[name]", "version": "1.0"},
    }


def of_context(context: RunContext) -> dict[str, Any]:
    """The job of a section that runs there."""
    return whole_job(context.job, context.training.config if context.training else None)

"""The section of a config that makes one step, as YAML."""

from __future__ import annotations

from typing import Any

from ..config.schema import Section, Step
from ..files.paths import without_users
from ..files.text import to_yaml

_HOST_KEYS = ("device", "output_dir", "training_folder", "name")


def section_yaml(section: Section, step: Step, *, shared: bool = False) -> str:
    """The section that makes one step and the earlier steps that it uses, without pictures.

    Args:
        section: As it was read.
        step: One of its steps, whose strengths may differ; its file is kept.
        shared: For others to see, without the names of users in paths.
    """
    steps = [{key: value for key, value in _plain(step).items() if key != "keep"}]
    used = [lora.source for lora in step.loras]
    for earlier in reversed(section.steps):
        if earlier.name in used and earlier.name != step.name:
            steps.insert(0, _plain(earlier))
            used += [lora.source for lora in earlier.loras]
    settings = {key: value for key in _HOST_KEYS if (value := getattr(section, key)) not in (None, "auto")}
    made = {"type": "zit_merge", **settings, "steps": steps}
    return to_yaml(without_users(made) if shared else made)


def _plain(step: Step) -> dict[str, Any]:
    """A step as in a config, without the keys that ask for pictures."""
    rank = {"rank": step.rank_rule.record()} if step.rank_rule else {}
    plain = step.model_dump(exclude_defaults=True, exclude={"sweep", "ablate", "preview", "file", *rank})
    return {"name": step.name, **plain, **rank}

"""Settings as steps of a config: what is measured, looked at and kept is planned like any other step."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.parse import parse_section
from ..config.schema import Section
from ..errors import SettingError, ZitMergeError
from ..planning.build import plan_section
from ..planning.planned import Planned
from ..planning.types import StepPlan
from ..wording import masked
from .setting import STRENGTHS, Setting

TRIED = "_studio_"  # the step that is measured and looked at, and never written
_SPELLED = (*STRENGTHS, "preset", "effects")  # keys of a LoRA that the page's strengths replace
# Keys of a step that are about its own file and pictures, or are composed.
_OWN = ("name", "preview", "sweep", "ablate", "bake", "copy_to", "keep", "file", "loras", "method", "params", "rank")

_LISTED = 6  # ratios in a label


@dataclass(frozen=True)
class Bench:
    """A section whose steps can be composed anew, and what was made of them.

    Attributes:
        planned: The section.
        raw: As the config has it.
        kept: Steps that were added, as a config has them.
        is_made: Whether the section's own steps were run; else they are only what composing starts from.
    """

    planned: Planned
    raw: Mapping[str, Any]
    kept: list[dict[str, Any]] = field(default_factory=list)
    is_made: bool = True

    @property
    def templates(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> raw step, of those that can be composed anew."""
        return {str(step["name"]): step for step in self.raw["steps"] if not step.get("checkpoints")}

    def step(self, setting: Setting, name: str) -> dict[str, Any]:
        """A setting as a step of a config.

        Args:
            setting: The setting.
            name: Of the step.

        Raises:
            ZitMergeError: There is no such step to start from, or it has other LoRAs.
        """
        template = self.templates.get(setting.step)
        if template is None:
            raise ZitMergeError(f"setting.step: there is no step {masked(setting.step[:80])} to start from")
        before = template.get("loras", [])
        if len(before) != len(setting.loras):
            raise ZitMergeError(f"setting.loras: {setting.step} has {len(before)} LoRAs, not {len(setting.loras)}")
        loras = [
            lora if own is None else {key: value for key, value in lora.items() if key not in _SPELLED} | dict(own)
            for lora, own in zip(before, setting.loras, strict=True)
        ]
        kept = {key: value for key, value in template.items() if key not in _OWN}
        has_params = bool(setting.params) or "params" in self.raw
        params = {"params": dict(setting.params)} if has_params else {}
        return {"name": name, **kept, "method": setting.method, **params, "rank": setting.rank, "loras": loras}

    def label(self, setting: Setting) -> str:
        """`ties, 0.8 + 0.5`: the method and the ratios.

        Args:
            setting: The setting.

        Raises:
            ZitMergeError: As `step`.
        """
        ratios = [f"{lora['ratio']:g}" for lora in self.step(setting, TRIED)["loras"]]
        return f"{setting.method}, {' + '.join(ratios[:_LISTED])}{' + ...' * (len(ratios) > _LISTED)}"

    def is_start(self, setting: Setting) -> bool:
        """Whether a setting is a step as the section has it.

        Args:
            setting: The setting.
        """
        plan = next((plan for plan in self.planned.plans if plan.name == setting.step), None)
        return plan is not None and not any(setting.loras) and setting.method == plan.spec.method and not setting.params

    def path(self, name: str) -> Path:
        """The file of a step that is kept.

        Args:
            name: Of the step.
        """
        own = self.planned.section.steps[0].model_copy(update={"name": name, "file": None})
        return self.planned.context.output(own)

    def taken(self) -> list[str]:
        """The names of steps whose files are there already."""
        before, after = self.path("*").name.split("*")
        files = self.path("*").parent.glob(f"{glob.escape(before)}*{after}")
        return sorted(file.name.removeprefix(before).removesuffix(after) for file in files)

    def section(self, step: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The section as a config has it, with the steps that were kept.

        Args:
            step: One more, the last.
        """
        own = list(self.raw["steps"]) if self.is_made else []
        return {**self.raw, "steps": [*own, *self.kept, *([step] if step else [])]}

    def plan(self, step: Mapping[str, Any]) -> tuple[Section, Sequence[StepPlan]]:
        """The section with one more step, and the plans of this step and of those that it uses, the last its own.

        Args:
            step: As a config has it.

        Raises:
            ZitMergeError: The step can't be made.
        """
        planned = self.planned
        raw = {**self.section(step), "device": planned.section.device}
        try:
            section = parse_section(raw, folder=planned.context.folders[0])
            return section, plan_section(section, planned.context, only=str(step["name"]))
        except SettingError as e:
            e.loc = re.sub(r"^.*?steps\[\d+\]\.?", "", e.loc)  # the page knows one step
            e.is_complete = True
            raise

    def name(self, found: object) -> str:
        """A name for a step that is kept.

        Args:
            found: What was asked for.

        Raises:
            ZitMergeError: It can't be one, or there is a step of that name.
        """
        if not isinstance(found, str) or not re.fullmatch(r"[\w.-]{1,100}", found):
            raise ZitMergeError("name: use letters, digits, _ . and -, 100 at most")
        names = [TRIED, *(str(step["name"]) for step in self.section()["steps"])]
        if found.lower() in map(str.lower, names):
            raise ZitMergeError(f"name: there is a step {found} already: choose another name")
        return found

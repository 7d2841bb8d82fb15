"""A job section, from the raw mapping of a config to a validated one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import SettingError, located
from ..files.extent import ExtentError, check_extent
from .messages import setting_error
from .plain import plain_keys
from .presets import find_preset
from .rules import check_method, check_names, check_step
from .schema import PROCESS_TYPE, Ablate, Bake, Checkpoints, Extract, Lora, Preview, Save, Section, Settings, Step, Studio

_OWNERS: Mapping[str, type[BaseModel]] = {
    "steps": Step,
    "loras": Lora,
    "save": Save,
    "checkpoints": Checkpoints,
    "preview": Preview,
    "ablate": Ablate,
    "bake": Bake,
    "lora": Extract,
    "studio": Studio,
}


def parse_section(raw: object, *, first: bool = False, folder: Path = Path()) -> Section:
    """A validated section; what a step leaves open is filled in from the section.

    Args:
        raw: The mapping of the config, as parsed.
        first: It is the job's first process, where the UI writes `device: cuda` and means `auto`.
        folder: Where the paths of presets start.

    Raises:
        SettingError: Located from the section on, with the nearest right name.
    """
    if not isinstance(raw, Mapping):
        raise SettingError(f"must be a mapping with type: {PROCESS_TYPE}, not {raw!r}")
    try:
        check_extent(raw)  # AI-Toolkit has read it, not we
    except ExtentError as e:
        raise SettingError(str(e)) from None
    settings: dict[str, Any] = plain_keys(raw)
    if first and settings.get("device") == "cuda":
        settings["device"] = "auto"
    section = _validate(settings, raw)  # as it is, so that a message names where a setting was written
    shared = {k: settings[k] for k in Settings.model_fields if k in settings}
    section = _validate(settings | {"steps": [_inherit(shared, step) for step in settings["steps"]]})
    check_names(section.steps)
    check_method(section)
    for i, step in enumerate(section.steps):
        with located(f"steps[{i}]"):
            check_step(step)
            _find_presets(step, folder)
            if step.file and not section.made_by:
                raise SettingError("unknown key; the file is named by the job and the step", "file")
            if step.bake and step.bake.file and not section.made_by:
                raise SettingError("unknown key; the model is named by the job and the step", "bake.file")
    return section


def _validate(settings: Mapping[str, Any], written: object = None) -> Section:
    try:
        return Section.model_validate(settings)
    except ValidationError as e:
        raise setting_error(e, _OWNERS, Section, written) from None


def _find_presets(step: Step, folder: Path) -> None:
    for j, lora in enumerate(step.loras):
        if lora.preset:
            with located(f"loras[{j}].preset"):
                lora.keep_preset(find_preset(lora.preset, folder))


def _inherit(shared: Mapping[str, Any], step: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**shared, **step}
    for key in ("save", "preview"):
        if isinstance(shared.get(key), Mapping) and isinstance(step.get(key), Mapping):
            merged[key] = {**shared[key], **step[key]}
    if step.get("preview") is True:
        merged["preview"] = shared.get("preview") or True
    if step.get("keep") is False and "preview" not in step:
        merged.pop("preview", None)  # a step that only feeds others is shown where it asks for it
    if "params" not in step and step.get("method", shared.get("method")) != shared.get("method"):
        merged.pop("params", None)  # they belong to the section's method
    if "checkpoints" in step:
        merged.setdefault("rank", "same")
    return merged

"""What settings mean together: rules that no single key can break."""

from __future__ import annotations

from collections.abc import Sequence

from ..algebra.ema import gamma_of
from ..algebra.methods import METHODS
from ..algebra.ratios import cancels
from ..errors import SettingError, located, nearest
from ..formats.spec import FP8
from .schema import TRAINED, TRAINING_ADAPTER, Checkpoints, Settings, Step


def check_method(settings: Settings) -> None:
    """Raises unless the method exists and has these parameters, in their ranges."""
    if settings.method not in METHODS:
        known = f"{nearest(settings.method, METHODS)}; there are {', '.join(METHODS)}"
        raise SettingError(f"no such method: {settings.method!r}{known}", "method")
    method = METHODS[settings.method]
    with located("params"):
        for key, value in settings.params.items():
            if key not in method.parameters:
                known = f"; there are {', '.join(method.parameters)}" if method.parameters else ", it takes none"
                raise SettingError(
                    f"the method {settings.method} has no such parameter{nearest(key, method.parameters)}{known}", key
                )
            if trouble := method.parameters[key].trouble(value):
                raise SettingError(trouble, key)
        try:
            method.check(settings.params)
        except ValueError as e:
            raise SettingError(str(e)) from None


def check_step(step: Step) -> None:
    """Raises where the parts of a step don't fit together."""
    check_method(step)
    rule = step.rank_rule
    if rule and rule.weigh and rule.size_mb and step.save.uniform:
        raise SettingError("chooses among modules, which have one rank now: set save: {uniform: false}, or drop it", "rank.weigh")
    if step.bake and step.bake.dtype == FP8:
        with located("bake"):
            if step.bake.format != "comfyui":
                raise SettingError("fp8 is a form of ComfyUI's: set format: comfyui, or another dtype", "dtype")
            if step.bake.rounding != "stochastic":
                raise SettingError(
                    "fp8 rounds most of a LoRA away to the nearest number: set rounding: stochastic, or another dtype", "dtype"
                )
    if not step.checkpoints:
        _check_loras(step)
    elif step.loras:
        raise SettingError("has loras and checkpoints: make two steps, the second can use the first by its name")
    elif step.method != "sum":
        raise SettingError("an average over checkpoints is a weighted sum: set method: sum on this step", "method")
    else:
        with located("checkpoints"):
            _check_checkpoints(step.checkpoints)


def _check_loras(step: Step) -> None:
    if not step.loras:
        raise SettingError("is missing: list the LoRAs to merge (or give checkpoints)", "loras")
    method, count, ratios = METHODS[step.method], len(step.loras), [lora.ratio for lora in step.loras]
    if method.takes and count != method.takes:
        other = " (karcher takes any number)" if method.is_spherical else ""
        raise SettingError(f"{step.method} takes exactly two LoRAs, the step has {count}{other}", "method")
    for j, ratio in enumerate(ratios):
        if method.is_spherical and ratio < 0:
            raise SettingError(
                f"{step.method} goes between directions, where {ratio:g} has no meaning: use a number from 0, or method: sum",
                f"loras[{j}].ratio",
            )
    if method.is_mean and cancels(ratios):
        raise SettingError(f"the ratios sum to 0, {step.method} divides by their sum: change one of them")


def _check_checkpoints(asked: Checkpoints) -> None:
    given = [key for key in ("sigma_rel", "gamma", "weights") if getattr(asked, key) is not None]
    if len(given) > 1:
        raise SettingError(f"{' and '.join(given)} both set the weights: keep one")
    if asked.sigma_rel is not None:
        try:
            gamma_of(asked.sigma_rel)
        except ValueError as e:
            raise SettingError(str(e), "sigma_rel") from None
    if asked.weights is not None:
        if asked.last not in (None, len(asked.weights)):
            raise SettingError(f"{len(asked.weights)} weights for last: {asked.last}: give one for each", "weights")
        if cancels(asked.weights):
            raise SettingError("sum to 0, an average divides by their sum: change one of them", "weights")


def check_names(steps: Sequence[Step]) -> None:
    """Raises unless every step has a name of its own that no source can be mistaken for."""
    seen: dict[str, str] = {}
    for i, step in enumerate(steps):
        with located(f"steps[{i}].name"):
            if step.name.lower().endswith(".safetensors"):
                raise SettingError(f"{step.name} looks like a file, sources could not be told apart: drop the ending")
            if step.name.lower() in (TRAINED, TRAINING_ADAPTER):
                of = "what the training saved" if step.name.lower() == TRAINED else "the adapter of the training"
                raise SettingError(f"{step.name} is the name of {of}: choose another one")
            if step.name.lower() in seen:
                raise SettingError(f"{step.name} is also the name of {seen[step.name.lower()]}: two steps can't write one file")
        seen[step.name.lower()] = f"steps[{i}]"

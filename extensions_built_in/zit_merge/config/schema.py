"""The job section: its schema.

Every message names the place in the config. What selects modules (`blocks`, `layers`, `effects`, `overrides`) is only given its
form here; its meaning is checked in `weights`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, PrivateAttr, ValidationError

from ..algebra.ema import gamma_of
from ..algebra.factors import Factors
from ..algebra.methods import METHODS
from ..errors import ZitMergeError, nearest, not_available_yet
from ..formats.scales import ALPHA_FORMS, TWINS, VECTORS, is_alpha
from ..model.strengths import Weights
from .presets import Preset, expand, is_file, load

PROCESS_TYPE = "zit_merge"
TRAINED = "trained"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")

# Settings of the interface that later versions bring: they are named, not mistaken for typing errors.
_LATER = ("bake",)
FORMATS = ("ai-toolkit", "diffusers", "kohya", "comfyui")


@dataclass(frozen=True)
class RankRule:
    """A rank that follows from the numbers.

    Attributes:
        energy: The smallest rank that keeps this share of the squared norm of the whole file.
        max: With energy: no rank above it.
        size_mb: The largest rank whose file takes at most so many MB (10^6 bytes).
    """

    energy: float | None = None
    max: int | None = None
    size_mb: float | None = None

    def record(self) -> dict[str, float]:
        """As it stands in a config."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def _rank(value: object) -> object:
    if isinstance(value, Mapping):
        return _rank_rule(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if (whole and value >= 1) or value in ("exact", "same"):
        return value
    raise ValueError(f"must be exact, same, a whole number from 1, {{energy: 0.99}} or {{size_mb: 150}}, not {value!r}")


def _rank_rule(value: Mapping[str, Any]) -> RankRule:
    for key in value:
        if key not in ("energy", "max", "size_mb"):
            raise ValueError(f"has no {key}{nearest(str(key), ('energy', 'max', 'size_mb'))}; there are energy, max, size_mb")
    if ("energy" in value) == ("size_mb" in value):
        raise ValueError("needs either energy, such as {energy: 0.99, max: 64}, or size_mb, such as {size_mb: 150}")
    for key, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < float("inf"):
            raise ValueError(f"needs a number above 0 for {key}, not {number!r}")
    if value.get("energy", 0) > 1:
        raise ValueError(f"takes energy as a share from 0 to 1, not {value['energy']!r}: 0.99 keeps 99 %")
    if not isinstance(value.get("max", 1), int):
        raise ValueError(f"needs a whole number for max, not {value['max']!r}")
    if "max" in value and "size_mb" in value:
        raise ValueError("takes max beside energy only: size_mb is a limit itself")
    return RankRule(**value)


def _alpha(value: object) -> object:
    if not is_alpha(value):
        raise ValueError(f"must be {ALPHA_FORMS}, not {value!r}")
    return value


def _asked(value: object) -> object:
    """`preview: true` asks for the defaults, `false` for none."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


def _choice(known: Iterable[str], what: str) -> BeforeValidator:
    known = tuple(known)

    def check(value: object) -> object:
        if value in known:
            return value
        raise ValueError(f"no such {what}: {value!r}{nearest(str(value), known)}; there are {', '.join(known)}")

    return BeforeValidator(check)


Dtype = Annotated[str, _choice(("bf16", "fp16", "fp32", "same"), "dtype")]
Format = Annotated[str, _choice(FORMATS, "format")]
Alpha = Annotated[str | float, BeforeValidator(_alpha)]
Qkv = Annotated[str, _choice(TWINS, "qkv")]
Vector = Annotated[str, _choice(VECTORS, "drop")]
Method = Annotated[str, _choice(METHODS, "method")]
Rank = Annotated[int | str | RankRule, PlainValidator(_rank)]
Table = dict[str, float]
Depths = dict[str, float | list[float]] | list[float]
Axis = Annotated[list[float | Annotated[list[float], Field(min_length=2)]], Field(min_length=1)]
Text = Annotated[str, Field(pattern=r"\S")]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # what a generator of torch takes
SHOWN = ("base", "inputs", "result")
Shown = Annotated[str, _choice(SHOWN, "thing to compare")]
DIVISIONS = ("layers", "components", "cells")
MODES = ("leave_out", "only")
METRICS = ("pixels", "structure", "colour", "detail")
StepName = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Save(_Model):
    """How a file is stored."""

    dtype: Dtype = "bf16"
    format: Format = "ai-toolkit"
    uniform: bool = True
    keep_lokr: bool = False


class Lora(_Model):
    """One LoRA of a step, with its strength keys. `sha256`, `strengths`, `unmatched`, `adapter` stand in recipes."""

    lora: str
    ratio: float
    preset: str | None = None
    blocks: Table = {}
    layers: Depths = {}
    effects: Table = {}
    overrides: Table = {}
    alpha: Alpha | None = None
    qkv: Qkv | None = None
    drop: list[Vector] = []
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    strengths: dict[str, list[float]] | None = None
    unmatched: list[str] | None = None
    adapter: dict[str, Any] | None = None

    # The preset as it was when the section was read: its file may be gone when a training is done.
    _chosen: Preset | None = PrivateAttr(None)

    @property
    def chosen(self) -> Preset | str | None:
        """The preset, for `presets.expand`."""
        return self._chosen or self.preset

    def read_preset(self, place: str, folder: Path) -> None:
        """Looks the preset up, once.

        Args:
            place: Of the LoRA, for messages.
            folder: Where the path of a preset's file starts, before the working directory.

        Raises:
            ZitMergeError: There is no such preset, or its file is wrong.
        """
        if self.preset:
            near = folder / Path(self.preset).expanduser()
            self._chosen = load(str(near) if is_file(self.preset) and os.path.isfile(near) else self.preset, place)

    def tables(self, place: str) -> dict[str, Any]:
        """blocks, layers, effects and overrides, on top of those of the preset."""
        own = {key: getattr(self, key) for key in ("blocks", "layers", "effects", "overrides")}
        return expand(self.chosen, own, place) if self.preset else own

    def weights(self, place: str) -> Weights:
        """The strength keys, with the place they stand at."""
        return Weights(self.ratio, **self.tables(place), place=place)


class Preview(_Model):
    """Pictures of a step. What is left out is taken from the training job's samples, else as Z-Image Turbo wants it.

    Attributes:
        prompts: A list, or a text file with one prompt on each line.
        seed: One for every prompt, or several, with each of which every prompt is rendered.
        size: Pixels: a side, or [width, height].
        steps: As the toolkit counts them.
        guidance: As the toolkit counts it: 1 is none.
        compare: What is rendered.
        confirm: Render however many pictures that makes.
    """

    prompts: Annotated[list[Text], Field(min_length=1)] | Text | None = None
    seed: Annotated[list[Seed], Field(min_length=1)] | Seed | None = None
    size: Annotated[list[int], Field(min_length=2, max_length=2)] | int | None = None
    steps: Annotated[int, Field(ge=1, le=200)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    compare: Annotated[list[Shown], Field(min_length=1)] = list(SHOWN)
    confirm: bool = False


class Ablate(_Model):
    """What the parts of a step's result do in pictures.

    Attributes:
        by: Into which parts the modules are divided.
        groups: Runs that the 30 layers are divided into; for `components` there are none.
        mode: Each part is left out in turn, or is all there is.
        prompts: As in `preview`, whose other settings hold here too.
        metrics: How distances between pictures are taken: built-in names, or `module:function`.
        preset: A name: the preset that follows from the shares is written.
        confirm: Render however many pictures that makes.
    """

    by: Annotated[str, _choice(DIVISIONS, "way to divide")]
    groups: Annotated[int, Field(ge=1, le=30)] | None = None
    mode: Annotated[str, _choice(MODES, "mode")] = "leave_out"
    prompts: Annotated[list[Text], Field(min_length=1)] | Text | None = None
    metrics: Annotated[list[Text], Field(min_length=1)] = list(METRICS)
    preset: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    confirm: bool = False


class _Settings(_Model):
    """What may stand on the section or on a step; the step wins."""

    save: Save = Save()
    method: Method = "sum"
    params: dict[str, Any] = {}
    rank: Rank = "exact"
    shapes: Literal["strict", "free"] = "strict"
    allow_unmatched: bool = False
    confirm_size: bool = False
    preview: Annotated[Preview | None, BeforeValidator(_asked)] = None


class Checkpoints(_Model):
    """An average over the checkpoints of the training before us, weighed by training step.

    The profile is step^gamma, given by `gamma` or by its relative width `sigma_rel`; or `weights`, oldest first. `alpha`, `qkv`
    and `drop` answer what the files leave open, as for a LoRA.
    """

    last: Annotated[int, Field(ge=1)] | None = None
    sigma_rel: float | None = None
    gamma: Annotated[float, Field(ge=0)] | None = None
    weights: Annotated[list[float], Field(min_length=1)] | None = None
    alpha: Alpha | None = None
    qkv: Qkv | None = None
    drop: list[Vector] = []


class Step(_Settings):
    """One merge and the file it makes."""

    name: StepName
    loras: Annotated[list[Lora], Field(min_length=1)] = []
    checkpoints: Checkpoints | None = None
    keep: bool = True
    copy_to: str | None = None
    sweep: Annotated[dict[str, Axis], Field(min_length=1, max_length=2)] | None = None
    ablate: Ablate | None = None
    file: Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")] | None = None  # in recipes


class Section(_Settings):
    """A process of type zit_merge. The keys from `name` on are AI-Toolkit's and its UI's, accepted and left alone."""

    type: Literal["zit_merge"]
    steps: Annotated[list[Step], Field(min_length=1)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:(0|[1-9]\d{0,2})|mps)$")] = "auto"
    output_dir: str | None = None
    train_fixes: list[Annotated[str, _choice(("cosine_with_restarts",), "fix")]] = []
    training_folder: str | None = None
    name: str | None = None
    sqlite_db_path: Any = None
    performance_log_every: Any = None
    model: Any = None
    datasets: Any = None
    sample: Any = None
    train: Any = None
    trigger_word: Any = None
    logging: Any = None
    # A recipe, printed as a section, says which job and version made it.
    job: str | None = None
    made_by: str | None = None


def parse_section(raw: object, place: str = "", *, first: bool = False, folder: Path = Path()) -> Section:
    """A validated section; what a step leaves open is filled in from the section.

    Args:
        raw: The mapping of the config, as parsed.
        place: Where it stands: `process[1]`; empty for a recipe.
        first: It is the job's first process, where the UI writes `device: cuda` and means `auto`.
        folder: Where the paths of presets start.

    Raises:
        ZitMergeError: With the place and the nearest right name.
    """
    if not isinstance(raw, Mapping):
        raise ZitMergeError(f"{place or 'section'}: must be a mapping with type: {PROCESS_TYPE}, not {raw!r}")
    raw = _plain(raw, place)
    _refuse_later(raw, place)
    if first and raw.get("device") == "cuda":
        raw["device"] = "auto"
    section = _validate(raw, place)  # as it stands, so that a message names where a setting was written
    shared = {k: raw[k] for k in _Settings.model_fields if k in raw}
    section = _validate(raw | {"steps": [_inherit(shared, step) for step in raw["steps"]]}, place)
    _check_names(section.steps, place)
    _check_params(section, place)
    for i, step in enumerate(section.steps):
        check_step(step, _join(place, f"steps[{i}]"))
    for i, step in enumerate(section.steps):
        for j, lora in enumerate(step.loras):
            lora.read_preset(_join(place, f"steps[{i}].loras[{j}]"), folder)
        if step.file and not section.made_by:
            raise ZitMergeError(f"{_join(place, f'steps[{i}].file')}: unknown key; the file is named by the job and the step")
    return section


def _validate(raw: Mapping[str, Any], place: str) -> Section:
    try:
        return Section.model_validate(raw)
    except ValidationError as e:
        raise ZitMergeError(_sentence(e, place)) from None


def _plain(value: Any, place: str) -> Any:
    """Without nulls, which AI-Toolkit treats as absent, and with every key as text: layers may be written as integers."""
    if isinstance(value, list):
        return [_plain(v, f"{place}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    plain: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise ZitMergeError(f"{_join(place, str(key))}: a key must be text")
        if str(key) in plain:
            raise ZitMergeError(f"{place}: {key} stands there twice: keep one of them")
        if entry is not None:
            plain[str(key)] = _plain(entry, _join(place, str(key)))
    return plain


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


def _refuse_later(raw: Mapping[str, Any], place: str) -> None:
    def refuse(value: object, at: str) -> None:
        for key in value if isinstance(value, Mapping) else ():
            if key in _LATER and value[key] is not None:
                raise not_available_yet(_join(at, key))

    refuse(raw, place)
    for i, step in enumerate(raw.get("steps") if isinstance(raw.get("steps"), list) else ()):
        refuse(step, _join(place, f"steps[{i}]"))


def _check_params(settings: _Settings, place: str) -> None:
    """Raises unless a method has these parameters, in their ranges."""
    method, at = METHODS[settings.method], _join(place, "params")
    for key, value in settings.params.items():
        if key not in method.parameters:
            known = f"; there are {', '.join(method.parameters)}" if method.parameters else ", it takes none"
            raise ZitMergeError(
                f"{at}.{key}: the method {settings.method} has no such parameter{nearest(key, method.parameters)}{known}"
            )
        if trouble := method.parameters[key].trouble(value):
            raise ZitMergeError(f"{at}.{key}: {trouble}")
    if not method.is_linear:
        try:  # what two parameters mean together shows on the smallest merge there is
            method.function([Factors(torch.ones(1, 1), torch.ones(1, 1))] * 2, **settings.params)
        except ValueError as e:
            raise ZitMergeError(f"{at}: {e}") from None


def check_step(step: Step, place: str) -> None:
    """Raises where the parts of a step don't fit together."""
    _check_params(step, place)
    if step.checkpoints:
        if step.loras:
            raise ZitMergeError(f"{place}: has loras and checkpoints: make two steps, the second can use the first by its name")
        if step.method != "sum":
            raise ZitMergeError(f"{place}.method: an average over checkpoints is a weighted sum: set method: sum on this step")
        _check_checkpoints(step.checkpoints, _join(place, "checkpoints"))
        return
    if not step.loras:
        raise ZitMergeError(f"{_join(place, 'loras')}: is missing: list the LoRAs to merge (or give checkpoints)")
    method, count = METHODS[step.method], len(step.loras)
    if method.takes and count != method.takes:
        other = " (karcher takes any number)" if method.is_spherical else ""
        raise ZitMergeError(f"{place}.method: {step.method} takes exactly two LoRAs, the step has {count}{other}")
    for j, lora in enumerate(step.loras):
        if method.is_spherical and lora.ratio < 0:
            raise ZitMergeError(
                f"{place}.loras[{j}].ratio: {step.method} goes between directions, where {lora.ratio:g} has no meaning: use a "
                "number from 0, or method: sum"
            )
    total = sum(lora.ratio for lora in step.loras)
    if method.is_mean and abs(total) <= 1e-12 * sum(abs(lora.ratio) for lora in step.loras):
        raise ZitMergeError(f"{place}: the ratios sum to 0, {step.method} divides by their sum: change one of them")


def _check_checkpoints(asked: Checkpoints, place: str) -> None:
    given = [key for key in ("sigma_rel", "gamma", "weights") if getattr(asked, key) is not None]
    if len(given) > 1:
        raise ZitMergeError(f"{place}: {' and '.join(given)} both say how to weigh: keep one")
    if asked.sigma_rel is not None:
        try:
            gamma_of(asked.sigma_rel)
        except ValueError as e:
            raise ZitMergeError(f"{place}.sigma_rel: {e}") from None
    if asked.weights is not None:
        if asked.last not in (None, len(asked.weights)):
            raise ZitMergeError(f"{place}.weights: {len(asked.weights)} weights for last: {asked.last}: give one for each")
        if abs(sum(asked.weights)) <= 1e-12 * sum(map(abs, asked.weights)):
            raise ZitMergeError(f"{place}.weights: sum to 0, an average divides by their sum: change one of them")


def _check_names(steps: Sequence[Step], place: str) -> None:
    seen: dict[str, str] = {}
    for i, step in enumerate(steps):
        at = _join(place, f"steps[{i}].name")
        if step.name.lower().endswith(".safetensors"):
            raise ZitMergeError(f"{at}: {step.name} looks like a file, sources could not be told apart: drop the ending")
        if step.name.lower() == TRAINED:
            raise ZitMergeError(f"{at}: {step.name} is the name of what the training saved: choose another one")
        if step.name.lower() in seen:
            raise ZitMergeError(
                f"{at}: {step.name} is also the name of {seen[step.name.lower()]}: two steps can't write one file"
            )
        seen[step.name.lower()] = _join(place, f"steps[{i}]")


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


_FORMS = {
    "name": "letters, digits, _ . and - are",
    "preset": "letters, digits, _ . and - are",
    "prompts": "any text but an empty one is",
    "metrics": "any text but an empty one is",
    "device": "auto, cpu, cuda, cuda:N and mps are",
    "sha256": "64 hexadecimal digits are",
    "file": "a file name that ends in .safetensors is",
}
_HOST_KEYS = (
    "sqlite_db_path",
    "performance_log_every",
    "model",
    "datasets",
    "sample",
    "train",
    "trigger_word",
    "logging",
    "training_folder",
)
_RECIPE_KEYS = ("job", "made_by", "file", "strengths", "unmatched", "adapter")
# What keys take that may have one form or another.
_EITHER = {
    "layers": "ranges, such as {0-9: 0.5}, or 30 numbers",
    "preview": "true, false or a mapping, such as {size: 768}",
    "sweep": "a mapping of one key or two, such as {ratio: [0.5, 1.0]}",
    "ablate": "a mapping, such as {by: layers}",
    "prompts": "a list of prompts, or a text file with one on each line",
    "seed": "a whole number from 0 to 2^63 - 1, or a list of them",
    "size": "a side in pixels, or [width, height]",
}
_SHOWN = 300  # letters of a value that a message repeats
_OF_FORM = ("dict_type", "list_type", "model_type", "int_type", "string_type", "too_short", "too_long")


def _sentence(error: ValidationError, place: str) -> str:
    """One of pydantic's errors in our words: an unknown key before a missing one, since it is often the same mistake; then the
    innermost, since a number or a list is tried as both."""
    first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", -len(_path(e["loc"]))))
    loc = _path(first["loc"])
    where = place
    for part in loc:
        where = f"{where}[{part}]" if isinstance(part, int) else _join(where, str(part))
    if first["type"] == "extra_forbidden":
        return f"{where}: {_unknown(loc)}"
    hint = " (the strength of this LoRA, such as ratio: 1.0)" if first["type"] == "missing" and loc[-1] == "ratio" else ""
    return f"{where}: {_trouble(first, loc)}{hint}"


def _trouble(error: Mapping[str, Any], loc: Sequence[int | str]) -> str:
    """What is wrong with the value at a location."""
    kind, limits, value = error["type"], error.get("ctx", {}), repr(error["input"])
    value = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    if kind in _OF_FORM and loc and loc[-1] in _EITHER:
        return f"must be {_EITHER[loc[-1]]}, not {value}"
    form = _FORMS.get(next((part for part in reversed(loc) if isinstance(part, str)), ""), "another form is")
    messages = {
        "missing": "is missing",
        "float_type": f"must be a number, not {value}",
        "int_type": f"must be a whole number, not {value}",
        "finite_number": f"must be a finite number, not {value}",
        "string_type": f"must be text, not {value}",
        "bool_type": f"must be true or false, not {value}",
        "list_type": f"must be a list, not {value}",
        "dict_type": f"must be a mapping, not {value}",
        "model_type": f"must be a mapping, not {value}",
        "too_short": "must have at least one entry",
        "greater_than_equal": f"must be at least {limits.get('ge')}, not {value}",
        "less_than_equal": f"must be at most {limits.get('le')}, not {value}",
        "literal_error": f"must be {limits.get('expected')}, not {value}",
        "string_pattern_mismatch": f"has a form that is not allowed: {value} ({form} allowed)",
    }
    return messages.get(kind, error["msg"].removeprefix("Value error, "))


def _unknown(loc: Sequence[int | str]) -> str:
    """What is said of a key that the schema does not have at its place."""
    owners = {"steps": Step, "loras": Lora, "save": Save, "checkpoints": Checkpoints, "preview": Preview, "ablate": Ablate}
    owner, key = next((owners[part] for part in reversed(loc[:-1]) if part in owners), Section), str(loc[-1])
    if owner is Section and key in Step.model_fields and key not in _RECIPE_KEYS:
        return "stands on a step, not on the section: move it into one"
    shown = [k for k in owner.model_fields if k not in (*_HOST_KEYS, *_RECIPE_KEYS)]
    return f"unknown key{nearest(key, shown)}; known here: {', '.join(shown)}"


def _path(loc: Sequence[int | str]) -> list[int | str]:
    """A location without the names that pydantic gives to alternatives of a union: `int`, `list[float]`, `constrained-str`."""
    alternative = r"float|int|str|constrained-\w+|(list|dict|function-\w+|union|nullable)\[.*\]"
    return [part for part in loc if not (isinstance(part, str) and re.fullmatch(alternative, part))]

"""The job section: its schema.

Every message names the place in the config. What selects modules (`blocks`, `layers`, `effects`, `overrides`) is only given its
form here; its meaning is checked in `weights`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .algebra.methods import METHODS
from .errors import ZitMergeError, nearest, not_available_yet
from .formats.scales import ALPHA_FORMS, TWINS, VECTORS, is_alpha
from .presets import expand
from .weights import Weights

PROCESS_TYPE = "zit_merge"
TRAINED = "trained"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")

# Settings of the interface that later versions bring: they are named, not mistaken for typing errors.
_LATER: Mapping[str, tuple[str, ...]] = {
    "section": ("preview", "sweep", "ablate", "bake"),
    "step": ("checkpoints", "preview", "sweep", "ablate", "bake"),
}
_LATER_METHODS = (
    *("average", "normalize", "slerp", "nuslerp", "karcher", "ties", "dare_linear", "dare_ties", "della"),
    *("tsv", "project", "shared_once"),
)
FORMATS = ("ai-toolkit", "diffusers", "kohya", "comfyui")


def _rank(value: object) -> object:
    if isinstance(value, Mapping):
        raise ValueError(str(not_available_yet("rank by energy or size", "give a number, exact or same")))
    whole = isinstance(value, int) and not isinstance(value, bool)
    if (whole and value >= 1) or value in ("exact", "same"):
        return value
    raise ValueError(f"must be exact, same or a whole number from 1, not {value!r}")


def _alpha(value: object) -> object:
    if not is_alpha(value):
        raise ValueError(f"must be {ALPHA_FORMS}, not {value!r}")
    return value


def _choice(known: Iterable[str], later: Iterable[str], what: str) -> BeforeValidator:
    known, later = tuple(known), tuple(later)

    def check(value: object) -> object:
        if value in known:
            return value
        if value in later:
            raise ValueError(str(not_available_yet(f"{what} {value}", f"use {' or '.join(known)}")))
        raise ValueError(f"no such {what}: {value!r}{nearest(str(value), (*known, *later))}; there are {', '.join(known)}")

    return BeforeValidator(check)


Dtype = Annotated[str, _choice(("bf16", "fp16", "fp32", "same"), (), "dtype")]
Format = Annotated[str, _choice(FORMATS, (), "format")]
Alpha = Annotated[str | float, BeforeValidator(_alpha)]
Qkv = Annotated[str, _choice(TWINS, (), "qkv")]
Vector = Annotated[str, _choice(VECTORS, (), "drop")]
Method = Annotated[str, _choice(METHODS, _LATER_METHODS, "method")]
Rank = Annotated[int | str, BeforeValidator(_rank)]
Table = dict[str, float]
Depths = dict[str, float | list[float]] | list[float]
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

    def tables(self, place: str) -> dict[str, Any]:
        """blocks, layers, effects and overrides, on top of those of the preset."""
        own = {key: getattr(self, key) for key in ("blocks", "layers", "effects", "overrides")}
        return expand(self.preset, own, place) if self.preset else own

    def weights(self, place: str) -> Weights:
        """The strength keys, with the place they stand at."""
        return Weights(self.ratio, **self.tables(place), place=place)


class _Settings(_Model):
    """What may stand on the section or on a step; the step wins."""

    save: Save = Save()
    method: Method = "sum"
    params: dict[str, Any] = {}
    rank: Rank = "exact"
    shapes: Literal["strict", "free"] = "strict"
    allow_unmatched: bool = False
    confirm_size: bool = False


class Step(_Settings):
    """One merge and the file it makes."""

    name: StepName
    loras: Annotated[list[Lora], Field(min_length=1)]
    keep: bool = True
    copy_to: str | None = None
    file: Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")] | None = None  # in recipes


class Section(_Settings):
    """A process of type zit_merge. The keys from `name` on are AI-Toolkit's and its UI's, accepted and left alone."""

    type: Literal["zit_merge"]
    steps: Annotated[list[Step], Field(min_length=1)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:(0|[1-9]\d{0,2})|mps)$")] = "auto"
    output_dir: str | None = None
    train_fixes: list[Annotated[str, _choice(("cosine_with_restarts",), (), "fix")]] = []
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


def parse_section(raw: object, place: str = "", *, first: bool = False) -> Section:
    """A validated section; what a step leaves open is filled in from the section.

    Args:
        raw: The mapping of the config, as parsed.
        place: Where it stands: `process[1]`; empty for a recipe.
        first: It is the job's first process, where the UI writes `device: cuda` and means `auto`.

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
    for at, settings in ((place, section), *((_join(place, f"steps[{i}]"), s) for i, s in enumerate(section.steps))):
        for key in settings.params:
            raise ZitMergeError(f"{_join(at, f'params.{key}')}: the method {settings.method} has no parameters")
    for i, step in enumerate(section.steps):
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
    if "save" in shared and "save" in step:
        merged["save"] = {**shared["save"], **step["save"]}
    return merged


def _refuse_later(raw: Mapping[str, Any], place: str) -> None:
    def refuse(value: object, kind: str, at: str) -> None:
        for key in value if isinstance(value, Mapping) else ():
            if key in _LATER[kind] and value[key] is not None:
                raise not_available_yet(_join(at, key))

    refuse(raw, "section", place)
    for i, step in enumerate(raw.get("steps") if isinstance(raw.get("steps"), list) else ()):
        refuse(step, "step", _join(place, f"steps[{i}]"))


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


def _sentence(error: ValidationError, place: str) -> str:
    """One of pydantic's errors in our words: an unknown key before a missing one, since it is often the same mistake; then the
    innermost, since a number or a list is tried as both."""
    first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", -len(_path(e["loc"]))))
    loc = _path(first["loc"])
    where = place
    for part in loc:
        where = f"{where}[{part}]" if isinstance(part, int) else _join(where, str(part))
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        owner = Section
        for part in loc[:-1]:
            owner = {"steps": Step, "loras": Lora, "save": Save}.get(part, owner)
        shown = [k for k in owner.model_fields if k not in (*_HOST_KEYS, *_RECIPE_KEYS)]
        return f"{where}: unknown key{nearest(str(loc[-1]), shown)}; known here: {', '.join(shown)}"
    form = _FORMS.get(str(loc[-1]) if loc else "", "another form is")
    messages = {
        "missing": "is missing",
        "float_type": f"must be a number, not {value!r}",
        "int_type": f"must be a whole number, not {value!r}",
        "finite_number": f"must be a finite number, not {value!r}",
        "string_type": f"must be text, not {value!r}",
        "bool_type": f"must be true or false, not {value!r}",
        "list_type": f"must be a list, not {value!r}",
        "dict_type": f"must be a mapping, not {value!r}",
        "model_type": f"must be a mapping, not {value!r}",
        "too_short": "must have at least one entry",
        "literal_error": f"must be {first.get('ctx', {}).get('expected')}, not {value!r}",
        "string_pattern_mismatch": f"has a form that is not allowed: {value!r} ({form} allowed)",
    }
    if loc[-1:] == ["layers"]:
        messages |= dict.fromkeys(
            ("dict_type", "list_type"), f"must be ranges, such as {{0-9: 0.5}}, or 30 numbers, not {value!r}"
        )
    text = messages.get(kind, first["msg"].removeprefix("Value error, "))
    hint = " (the strength of this LoRA, such as ratio: 1.0)" if kind == "missing" and loc[-1] == "ratio" else ""
    return f"{where}: {text}{hint}"


def _path(loc: Sequence[int | str]) -> list[int | str]:
    """A location without the names that pydantic gives to the alternatives of a union."""
    return [part for part in loc if not (isinstance(part, str) and re.search(r"[\[(]|^(float|int|str)$", part))]

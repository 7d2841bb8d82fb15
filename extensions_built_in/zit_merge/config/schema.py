"""The job section: its schema.

What selects modules (`blocks`, `layers`, `effects`, `overrides`) is only given its form here; its meaning is checked in
`model.strengths`, what settings mean together in `rules`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, PrivateAttr

from ..errors import nearest
from ..formats.forms import FORMS
from ..formats.reading import ALPHA_FORMS, TWINS, VECTORS, is_alpha
from ..formats.spec import CHECKPOINT_FORMATS, DTYPES, FP8
from ..model.strengths import TABLES, Weights, union

PROCESS_TYPE = "zit_merge"
TRAINED = "trained"
TRAINING_ADAPTER = "training_adapter"


@dataclass(frozen=True)
class RankRule:
    """A rank that follows from the numbers.

    Attributes:
        energy: The smallest rank that keeps this share of the squared norm of the whole file.
        max: With energy: no rank above it.
        size_mb: The largest rank whose file takes at most so many MB (10^6 bytes).
        weigh: `base`: each component counts by its share of the norm of the weight that it changes.
    """

    energy: float | None = None
    max: int | None = None
    size_mb: float | None = None
    weigh: str | None = None

    def record(self) -> dict[str, float | str]:
        """As it stands in a config."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def _rank(value: object) -> object:
    if isinstance(value, Mapping):
        return _rank_rule(value)
    if value in ("exact", "same") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"must be exact, same, a whole number from 1, {{energy: 0.99}} or {{size_mb: 150}}, not {value!r}")


def _rank_rule(value: Mapping[str, Any]) -> RankRule:
    keys = ("energy", "max", "size_mb", "weigh")
    for key in value:
        if key not in keys:
            raise ValueError(f"has no {key}{nearest(str(key), keys)}; there are {', '.join(keys)}")
    if value.get("weigh", "base") != "base":
        raise ValueError(f"takes weigh: base, not {value['weigh']!r}")
    if ("energy" in value) == ("size_mb" in value):
        raise ValueError("needs either energy, such as {energy: 0.99, max: 64}, or size_mb, such as {size_mb: 150}")
    for key, number in value.items():
        if key == "weigh":
            continue
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


Dtype = Annotated[str, _choice((*DTYPES, "same"), "dtype")]
Format = Annotated[str, _choice(FORMS, "format")]
Alpha = Annotated[str | float, BeforeValidator(_alpha)]
Qkv = Annotated[str, _choice(TWINS, "qkv")]
Vector = Annotated[str, _choice(VECTORS, "drop")]
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
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
StepName = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Save(_Model):
    """How a file is stored."""

    dtype: Dtype = "bf16"
    format: Format = "ai-toolkit"
    uniform: bool = True
    keep_lokr: bool = False


class Preset(_Model):
    """A named set of strength keys. A user's file holds one, under its name:

    my_layers:
      idea: whose idea it is, one line
      layers: {0-9: 0.5, 10-29: [1.0, 0.6]}
      overrides: {20-25.to_v: 1.3}
    """

    idea: str = ""
    blocks: Table = {}
    layers: Depths = {}
    effects: Table = {}
    overrides: Table = {}

    @property
    def weights(self) -> Weights:
        """The strength keys alone."""
        return Weights(self.blocks, self.layers, self.effects, self.overrides)


def union_of(preset: Preset, own: Mapping[str, Any]) -> dict[str, Any]:
    """All four strength tables of a preset with the user's own entries on top.

    Args:
        preset: What lies below.
        own: `blocks`, `layers`, `effects`, `overrides`, as far as they are there.
    """
    return {table: union(getattr(preset, table), own.get(table, {}), table) for table in TABLES}


class Base(_Model):
    """What a LoRA was trained on, by name."""

    model: str | None = None
    arch: str | None = None
    adapter: str | None = None


class Extract(_Model):
    """The difference of two models in the place of a LoRA: a folder or file each, or `trainer`."""

    extract: Text
    base: Text


class Lora(_Model):
    """One LoRA of a step, with its strength keys. `sha256` and what follows it stand in recipes."""

    lora: str | Extract
    ratio: float
    preset: str | None = None
    blocks: Table = {}
    layers: Depths = {}
    effects: Table = {}
    overrides: Table = {}
    alpha: Alpha | None = None
    qkv: Qkv | None = None
    drop: list[Vector] = []
    sha256: Hash | None = None
    base: Text | None = None
    base_sha256: Hash | None = None
    strengths: dict[str, list[float]] | None = None
    unmatched: list[str] | None = None
    adapter: dict[str, Any] | None = None
    trained_on: Base | None = None

    # The preset as it was when the section was read: its file may be gone when a training is done.
    _preset: Preset | None = PrivateAttr(None)

    @property
    def source(self) -> str:
        """Where it comes from, in one word: of a difference the model that was tuned."""
        return self.lora if isinstance(self.lora, str) else self.lora.extract

    @property
    def own(self) -> dict[str, Any]:
        """The strength tables beside the preset."""
        return {table: getattr(self, table) for table in TABLES}

    @property
    def tables(self) -> dict[str, Any]:
        """blocks, layers, effects and overrides, on top of those of the preset."""
        return union_of(self._preset, self.own) if self._preset else self.own

    @property
    def found_preset(self) -> Preset | None:
        """What `preset` names."""
        return self._preset

    def keep_preset(self, preset: Preset) -> None:
        """Holds what `preset` names."""
        self._preset = preset


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


class Bake(_Model):
    """A whole model with the merge in it. `sha256` and `file` stand in recipes.

    Attributes:
        base: `trainer`, the model of the training before us, or a folder or file; None takes the step's `base`.
        format: A diffusers folder, or ComfyUI's one file.
        dtype: Of the whole model; None leaves every tensor its own. fp8 is ComfyUI's scaled form, and stochastic.
        rounding: To the nearest number, or to one of the two neighbours, exact in the mean.
        seed: Of the draws.
    """

    base: Text | None = None
    format: Annotated[str, _choice(CHECKPOINT_FORMATS, "format")] = "diffusers"
    dtype: Annotated[str, _choice((*DTYPES, FP8), "dtype")] | None = None
    rounding: Annotated[str, _choice(("nearest", "stochastic"), "rounding")] = "nearest"
    seed: Seed = 0
    sha256: Hash | None = None
    file: Annotated[str, Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$")] | None = None  # neither . nor ..


class Studio(_Model):
    """The live studio, which opens when the merges of the section are done.

    Attributes:
        minutes: It closes when nobody has used it for so long.
    """

    minutes: Annotated[float, Field(gt=0, le=10_000)] = 30


class Settings(_Model):
    """What may stand on the section or on a step; the step wins."""

    save: Save = Save()
    method: str = "sum"  # one of algebra.methods.METHODS, which `rules` looks at
    params: dict[str, Any] = {}
    rank: Rank = "exact"
    shapes: Literal["strict", "free"] = "strict"
    allow_unmatched: bool = False
    confirm_size: bool = False
    base: Text | None = None
    preview: Annotated[Preview | None, BeforeValidator(_asked)] = None

    @property
    def rank_rule(self) -> RankRule | None:
        """The rank, where it follows from the numbers or from a size."""
        return self.rank if isinstance(self.rank, RankRule) else None


class Checkpoints(_Model):
    """An average over the checkpoints of the training before us, weighted by training step.

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


class Step(Settings):
    """One merge and the file it makes."""

    name: StepName
    loras: Annotated[list[Lora], Field(min_length=1)] = []
    checkpoints: Checkpoints | None = None
    keep: bool = True
    copy_to: str | None = None
    sweep: Annotated[dict[str, Axis], Field(min_length=1, max_length=2)] | None = None
    ablate: Ablate | None = None
    bake: Annotated[Bake | None, BeforeValidator(_asked)] = None
    base_sha256: Hash | None = None  # in recipes
    file: Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")] | None = None  # in recipes


class Section(Settings):
    """A process of type zit_merge. The keys from `name` on are AI-Toolkit's and its UI's, accepted and left alone."""

    type: Literal["zit_merge"]
    steps: Annotated[list[Step], Field(min_length=1)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:(0|[1-9]\d{0,2})|mps)$")] = "auto"
    output_dir: str | None = None
    train_fixes: list[Annotated[str, _choice(("cosine_with_restarts",), "fix")]] = []
    studio: Annotated[Studio | None, BeforeValidator(_asked)] = None
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

    @property
    def wants_pictures(self) -> bool:
        """Whether any step is to be shown."""
        return any(step.preview or step.sweep or step.ablate for step in self.steps)

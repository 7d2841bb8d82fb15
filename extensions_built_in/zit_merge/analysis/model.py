"""What is in a whole model: its form, what zit_merge says of it, and how strong LoRAs are in it beside the model it came from.

The last is an answer for a model of any tool. With g = model - base, of each module and of all: strengths are the least-squares
strengths of the sources in g, the rest is what they leave of it. Rounding of the model's numbers leaves a rest too: with u the
distance of a weight's neighbours in its dtype, u^2 / 12 in the mean (uniform in a cell), twice that if it was stochastic. A rest
beyond that is something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.delta import Delta, as_dense
from ..algebra.factors import Factors
from ..algebra.least_squares import groups, least_squares
from ..algebra.precision import full_precision
from ..algebra.products import gram, inner
from ..errors import ZitMergeError
from ..formats.checkpoint import Checkpoint, CheckpointReader
from ..formats.difference import Difference, DifferenceReader, difference
from ..formats.header import DTYPES
from ..formats.metadata import read_check, read_recipe
from ..formats.reader import LoraFile, TensorReader
from ..formats.safetensors_file import size_of
from ..progress import SILENT, Progress

_NUMBERS = 1 << 20  # that are looked at at a time
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A whole model. The attributes are the keys of the JSON, always all of them.

    Attributes:
        file: Name of the folder or file.
        form: `diffusers` or `comfyui`.
        files: How many.
        bytes: Of its tensors.
        tensors: Of the transformer.
        others: Other tensors in the same files: text encoders, VAE.
        dtypes: Dtype -> how many tensors of the transformer.
        sizes: `dim` and the number of layers.
        title: As its metadata say it.
        recipe: Of zit_merge, or None.
        check: What zit_merge found when it wrote it, or None.
    """

    file: str
    form: str
    files: int
    bytes: int
    tensors: int
    others: int
    dtypes: Mapping[str, int]
    sizes: Mapping[str, int]
    title: str | None
    recipe: Mapping[str, Any] | None
    check: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe_model(model: Checkpoint) -> ModelFacts:
    """A whole model by its headers."""
    dtypes: dict[str, int] = {}
    for place in model.places.values():
        name = DTYPES.get(place.dtype, place.dtype)
        dtypes[name] = dtypes.get(name, 0) + 1
    places = (*model.places.values(), *model.extras.values())
    layers = {name.split(".")[1] for name in model.places if name.startswith("layers.")}
    return ModelFacts(
        file=model.path.name,
        form="comfyui" if model.native else "diffusers",
        files=len(model.files),
        bytes=sum(size_of(p.dtype, p.shape) for p in places),
        tensors=len(model.places),
        others=len(model.extras),
        dtypes=dtypes,
        sizes={"dim": model.shapes["layers.0.attention.to_q"][0], "layers": len(layers)},
        title=model.metadata.get("modelspec.title"),
        recipe=read_recipe(model.metadata),
        check=read_check(model.metadata),
    )


@dataclass(frozen=True, kw_only=True)
class SourcesInModel:
    """How strong LoRAs are in a model. The attributes are the keys of the JSON, always all of them.

    Attributes:
        model: Name of the model.
        base: Name of what it is compared with.
        sources: Names of the LoRAs.
        strengths: Of each; None for one without any change.
        alike: Groups of sources, by their numbers, that are too alike for their strengths to be told apart.
        modules: Module -> strength of each source in this module alone; None where it does not change it.
        norm: |model - base| over the weights of linear layers.
        norms: Module -> the same.
        rest: |what the sources leave| / |model - base|.
        rounding: The same of what rounding to the model's dtype is expected to leave.
        equal: How many weights of linear layers are those of the base, bit for bit.
        vectors: Tensor that no LoRA can hold (norm, bias, token) -> norm of its difference.
    """

    model: str
    base: str
    sources: Sequence[str]
    strengths: Sequence[float | None]
    alike: Sequence[Sequence[int]]
    modules: Mapping[str, Sequence[float | None]]
    norm: float
    norms: Mapping[str, float]
    rest: float
    rounding: float
    equal: int
    vectors: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@full_precision()
def sources_in_model(
    model: Checkpoint, base: Checkpoint, sources: Sequence[LoraFile], progress: Progress = SILENT
) -> SourcesInModel:
    """Looks for LoRAs in a model.

    Args:
        model: Of any tool.
        base: What it came from.
        sources: What may have gone into it; none shows the difference alone.
        progress: Shows the modules, and may stop.

    Raises:
        ZitMergeError: The files are not of one model, or can't be read.
    """
    pair, found = difference(model, base), _Sums(len(sources))
    for source in sources:
        _check_shapes(source, pair)
    with ExitStack() as files:
        reader = files.enter_context(DifferenceReader(pair))
        weights = files.enter_context(CheckpointReader(base))
        tensors = [files.enter_context(TensorReader(s, weights if s.needs_base else None)) for s in sources]
        for module in progress.track(list(model.shapes), "sources"):
            _, whole = reader.delta(module)
            scaled = {n: t.delta(module) for n, (s, t) in enumerate(zip(sources, tensors, strict=True)) if module in s}
            dtype = _STORED[model.places[f"{module}.weight"].dtype]
            noise = rounding_noise(reader.tuned_weight(module), dtype) if whole.rank > 1 else 0.0
            found.add(
                module, whole, {n: delta.times(scale).map(lambda t: t.float()) for n, (scale, delta) in scaled.items()}, noise
            )
        vectors = {name: energy**0.5 for name, energy in reader.vectors().items()}
    return found.result(pair, sources, vectors)


def rounding_noise(weight: Tensor, dtype: torch.dtype) -> float:
    """Expected energy of rounding to nearest, summed over the numbers of a weight: u^2 / 12, u the distance of neighbours."""
    found = 0.0
    for rows in weight.split(max(1, _NUMBERS // weight.shape[1])):
        _, exponent = torch.frexp(rows.float())
        unit = torch.exp2(exponent.float() - 1) * torch.finfo(dtype).eps
        found += float(torch.where(rows != 0, unit, 0.0).square().sum(dtype=torch.float64)) / 12
    return found


class _Sums:
    """What is added up over the modules."""

    def __init__(self, count: int):
        self.gram, self.products = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        self.energy = self.noise = 0.0
        self.equal = 0
        self.modules: dict[str, Sequence[float | None]] = {}
        self.norms: dict[str, float] = {}

    def add(self, module: str, whole: Factors, sources: Mapping[int, Any], noise: float) -> None:
        """Adds a module: the difference, the sources there, what rounding may leave."""
        if whole.rank == 1:
            self.equal += 1
        self.norms[module] = gram([whole])[0, 0].clamp(min=0).sqrt().item()
        self.energy += self.norms[module] ** 2
        self.noise += noise
        if not sources:
            return
        at = torch.tensor(list(sources))
        here = gram(list(sources.values()))
        products = torch.tensor([_inner(whole, s) for s in sources.values()], dtype=torch.float64)
        self.gram[at[:, None], at] += here
        self.products[at] += products
        strengths = dict(zip(sources, least_squares(here, products), strict=True))
        self.modules[module] = [strengths.get(n) for n in range(len(self.products))]

    def result(self, pair: Difference, sources: Sequence[LoraFile], vectors: Mapping[str, float]) -> SourcesInModel:
        """Of all modules."""
        strengths = least_squares(self.gram, self.products)
        explained = sum((x or 0.0) * float(p) for x, p in zip(strengths, self.products, strict=True))
        return SourcesInModel(
            model=pair.tuned.path.name,
            base=pair.base.path.name,
            sources=[s.path.name for s in sources],
            strengths=strengths,
            alike=groups(self.gram),
            modules=self.modules,
            norm=self.energy**0.5,
            norms=self.norms,
            rest=(max(self.energy - explained, 0.0) / self.energy) ** 0.5 if self.energy else 0.0,
            rounding=min(self.noise / self.energy, 1.0) ** 0.5 if self.energy else 0.0,
            equal=self.equal,
            vectors=vectors,
        )


def _inner(whole: Factors, source: Delta) -> float:
    """<difference, change>, summed in float32 over a side."""
    dense = as_dense(whole)
    if dense is None or not isinstance(source, Factors):
        return inner(whole, source)
    return float(((dense @ source.down.T) * source.up).sum(dtype=torch.float64))


def _check_shapes(source: LoraFile, pair: Difference) -> None:
    for module, shape in source.shapes.items():
        if pair.base.shapes.get(module) != shape:
            raise ZitMergeError(
                f"{source.path}: changes {module} as a {shape[0]} x {shape[1]} matrix, which {pair.base.path.name} does not "
                "have: give a LoRA of this model"
            )

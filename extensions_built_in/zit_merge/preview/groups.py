"""How an ablation divides a LoRA: runs of layers, components, or both, as groups of modules."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..config.schema import DIVISIONS, MODES
from ..model.strengths import Weights, factors, row_name
from ..model.zimage import ALIASES, COMPONENTS, MODULES, N_LAYERS, REFINERS

BY_LAYERS, BY_COMPONENTS, BY_CELLS = DIVISIONS
LEAVE_OUT, ONLY = MODES
SHORT = {component: alias for alias, component in ALIASES.items()}  # adaLN_modulation -> adaLN


@dataclass(frozen=True)
class ModuleGroup:
    """A part of a LoRA.

    Attributes:
        name: A short label: `layers 0-2`, `noise_refiner`, `other`, `to_q`, `0-2.to_q`.
        modules: The LoRA's modules in it, in the order of zimage.MODULES.
        table: The strength table that selects it: `layers`, `blocks` or `overrides`.
        key: Its key in that table: `0-2`, `to_q`, `0-2.to_q`.
    """

    name: str
    modules: tuple[str, ...]
    table: str
    key: str


def module_groups(by: str, count: int, present: Collection[str]) -> tuple[ModuleGroup, ...]:
    """Divides a LoRA into groups; every module is in exactly one.

    Args:
        by: `layers`: runs of the 30 layers, then the refiners and `other`; `components`: the eight components over layers and
            refiners, then `other`; `cells`: runs of layers x components, then the refiners and `other` undivided.
        count: Runs that the 30 layers are divided into, as evenly as possible; not used by `components`.
        present: The modules of the LoRA.

    Returns:
        The groups that have modules, in the order of the model.

    Raises:
        ValueError: There is no such division, or not so many runs.
    """
    found = []
    for name, table, key in _keys(by, count):
        # the modules that a preset with only this key scales
        chosen = factors(Weights(**{table: {key: 0.0}}))
        if modules := tuple(m for m in MODULES if m in present and chosen[m] == 0):
            found.append(ModuleGroup(name, modules, table, key))
    return tuple(found)


def _keys(by: str, count: int) -> Iterator[tuple[str, str, str]]:
    """(name, table, key) of every group that a LoRA may have."""
    if by not in DIVISIONS or not 1 <= count <= N_LAYERS:
        raise ValueError(f"{by} in {count} runs: there are layers, components and cells, in 1 to {N_LAYERS} runs")
    if by == BY_COMPONENTS:
        yield from ((SHORT.get(c, c), "blocks", c) for c in COMPONENTS)
        yield "other", "layers", "other"
        return
    for k in range(count):
        first, last = k * N_LAYERS // count, (k + 1) * N_LAYERS // count - 1
        run = row_name("layers", first, last)
        if by == BY_LAYERS:
            yield f"layer{'s' * (last > first)} {run}", "layers", run
        else:
            yield from ((f"{run}.{SHORT.get(c, c)}", "overrides", f"{run}.{c}") for c in COMPONENTS)
    yield from ((section, "layers", section) for section in (*REFINERS, "other"))

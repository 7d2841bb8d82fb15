"""What the merge page is told: a step, or several files, as JSON of bounded size.

Lists that run over modules follow the order of `zimage.MODULES`; null stands for a module that is not there. Numbers have four or
five digits, texts of files are cut: the page is for looking, the exact numbers are in the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ...algebra.least_squares import cosines
from ...algebra.methods import METHODS
from ...analysis.advice import of_cosines
from ...analysis.compare import Watched, same_model
from ...config.presets import presets
from ...errors import ZitMergeError
from ...formats.metadata import trigger_words
from ...formats.reader import LoraFile
from ...formats.spec import DTYPE_NAMES
from ...formats.verdict import Verdict
from ...merging.made import Done
from ...merging.verify import PAIRS_UP_TO
from ...model.strengths import FactorTable, Weights, factor_table
from ...model.zimage import COMPONENTS, MODULES, N_LAYERS, REFINERS, SECTIONS
from ...planning.types import Input
from ...wording import ranks_text, span
from ..text.result import verdict_text
from .module_energies import Cell, survey_files, survey_step, written

TEXT, NAME = 600, 300  # letters of a sentence, and of a name
PAIRED = 24  # inputs, the strongest ones, whose overlap is there module by module: 276 pairs
_NOTES, _TRIGGERS = 30, 12
_NUMBER = {module: n for n, module in enumerate(MODULES)}


@cache
def anatomy() -> dict[str, Any]:
    """The model and the presets, which every page needs."""
    return {
        "modules": [[m.name, m.section, m.index, m.component] for m in MODULES.values()],
        "components": list(COMPONENTS),
        "blocks": dict(SECTIONS),
        "presets": {name: {"idea": p.idea, **_weights(factor_table(p.weights))} for name, p in presets().items()},
    }


def step_facts(done: Done, watched: Watched = iter) -> dict[str, Any]:
    """A step that is done.

    Args:
        done: The step, its inputs still there.
        watched: Passes the modules that are read again on one by one; may raise to stop.
    """
    plan, verdict = done.plan, done.verdict
    asked, got = (_told(verdict, key, len(plan.inputs)) for key in ("asked", "got"))
    facts = {
        "name": text(plan.name, NAME),
        "file": text(str(done.path), TEXT) if plan.spec.keep else None,
        "copy": text(str(plan.targets[1]), TEXT) if plan.spec.keep and plan.spec.copy_to else None,
        "made": done.made,
        "bytes": done.path.stat().st_size,
        "modules": len(plan.shapes),
        "rank": "a LoKr as before" if plan.spec.save.keep_lokr else span(plan.ranks.values()),
        "dtype": DTYPE_NAMES[plan.dtype],
        "format": plan.spec.save.format,
        "method": plan.spec.method,
        "linear": METHODS[plan.spec.method].is_linear,
        "rule": "spherical" if METHODS[plan.spec.method].is_spherical else "mean" if METHODS[plan.spec.method].is_mean else None,
        "cut": bool(plan.cut),
        "params": {key: text(value, NAME) for key, value in plan.spec.params.items()},
        "status": verdict.status if verdict else None,
        "judgement": verdict_text(plan, verdict) if verdict else None,
        "kept": verdict.kept if verdict and plan.cut else None,
        "notes": texts(plan.warnings, _NOTES),
        "triggers": texts(trigger_words(plan.draft), _TRIGGERS),
        "composable": not plan.spec.checkpoints,
        "inputs": [_input(i, a, g) for i, a, g in zip(plan.inputs, asked, got, strict=True)],
    }
    try:
        cells, result = survey_step(done, watched), written(done, watched)
    except (OSError, ZitMergeError):  # an input has been moved meanwhile; the merge itself is done
        return facts | {"details": None}
    errors = done.verdict.errors if done.verdict and plan.cut else {}
    return facts | {"details": _details(cells, [i.strengths for i in plan.inputs], result, errors)}


def files_facts(loras: Sequence[LoraFile], watched: Watched = iter) -> dict[str, Any]:
    """Several files at hand, as inputs of a merge that has not been made.

    Args:
        loras: The files.
        watched: Passes the modules on one by one, such as a progress bar.

    Raises:
        ZitMergeError: The files are not of one model, or can't be read.
    """
    same_model(loras)
    notes = [f"{lora.path.name}: {sentence}" for lora in loras for sentence in (*lora.questions, *lora.remarks)]
    ones = [dict.fromkeys(MODULES, 1.0)] * len(loras)
    return {
        "name": "merged",
        "file": None,
        "method": "sum",
        "linear": True,
        "rule": None,
        "cut": False,
        "notes": texts(notes, _NOTES),
        "triggers": [],
        "composable": True,
        "inputs": [
            {
                "label": text(lora.path.name, NAME),
                "ratio": 1,
                "modules": len(lora),
                "what": _what(lora.algorithms, lora.ranks, lora.dtype),
                "triggers": texts(trigger_words(lora.metadata), _TRIGGERS),
                "weights": _weights(factor_table(Weights())),
                "questions": texts(lora.questions, _NOTES),
            }
            for lora in loras
        ],
        "details": _details(survey_files(loras, watched), ones, {}, {}),
    }


def _told(verdict: Verdict | None, key: str, count: int) -> list[float | None]:
    """`asked` or `got`, of the inputs whose strengths can be told apart."""
    if verdict is None:
        return [None] * count
    alike = {n for group in verdict.alike for n in group}
    return [None if n in alike else value for n, value in enumerate(getattr(verdict, key))]


def _input(i: Input, asked: float | None, got: float | None) -> dict[str, Any]:
    return {
        "label": text(i.label, NAME),
        "ratio": i.spec.ratio,
        "preset": i.spec.preset,
        "modules": len(i.known.ranks),
        "what": _what(i.known.algorithms, i.known.ranks, i.known.dtype),
        "asked": number(asked),
        "got": number(got),
        "triggers": texts(trigger_words(i.metadata), _TRIGGERS),
        "weights": _weights(factor_table(Weights(**i.spec.tables))),
    }


def _what(algorithms: Iterable[str], ranks: Mapping[str, int], dtype: torch.dtype) -> str:
    return f"{' and '.join(algorithms)} of rank {ranks_text(ranks, algorithms)}, {DTYPE_NAMES.get(dtype, str(dtype))}"


def _weights(found: FactorTable) -> dict[str, Any]:
    """Factors in the form that the composer edits: a number for each component, layer and refiner, and the overrides."""
    return {
        "components": [found.components[c] for c in COMPONENTS],
        "layers": [found.layers.get(("layers", i), 1.0) for i in range(N_LAYERS)],
        **{section: found.layers.get((section, 0), 1.0) for section in (*REFINERS, "other")},
        "overrides": [[_NUMBER[m], factor] for m, factor in found.overrides.items()],
    }


def _details(
    cells: Mapping[str, Cell],
    strengths: Sequence[Mapping[str, float]],
    result: Mapping[str, float],
    errors: Mapping[str, float],
) -> dict[str, Any]:
    """What the maps show.

    Returns:
        energies: For each input its squared norms at strength 1, over modules.
        result: Squared norms of what was written; null for files that are only looked at.
        errors: |written - wanted| / |wanted| of modules that were cut.
        pairs: [i, j, cosines x 10^4 over modules] of the strongest inputs.
        unpaired: How many inputs are in no pair.
        cosines: Of the inputs as they went in, row by row below the diagonal; null for too many.
        advice: Sentences on them.
    """
    count = len(strengths)
    energies = [_over_modules({m: _of(c, n) for m, c in cells.items() if n in c.inputs}) for n in range(count)]
    total = _total(cells, strengths) if count <= PAIRS_UP_TO else None
    went_in = [
        sum(_of(c, n) * s[m] ** 2 for m, c in cells.items() if n in c.inputs and math.isfinite(_of(c, n)))
        for n, s in enumerate(strengths)
    ]
    strongest = sorted(sorted(range(count), key=lambda n: -went_in[n])[:PAIRED])
    return {
        "energies": energies,
        "result": _over_modules(result) if result else None,
        "errors": _over_modules(errors) if errors else None,
        "pairs": [[i, j, _pair(cells, i, j)] for i, j in combinations(strongest, 2)] if total is not None else [],
        "unpaired": count - len(strongest) if total is not None else count,
        "cosines": None if total is None else [[number(v) for v in row[:i]] for i, row in enumerate(cosines(total).tolist())],
        "advice": [] if total is None else _advice(total),
    }


def _total(cells: Mapping[str, Cell], strengths: Sequence[Mapping[str, float]]) -> Tensor:
    """(N, N) inner products of the inputs as they went in."""
    total = torch.zeros(len(strengths), len(strengths), dtype=torch.float64)
    for module, cell in cells.items():
        at = torch.tensor(cell.inputs)
        scales = torch.tensor([strengths[n][module] for n in cell.inputs], dtype=torch.float64)
        total[at[:, None], at] += torch.nan_to_num(cell.gram * torch.outer(scales, scales), 0.0, 0.0, 0.0)
    return total


def _advice(total: Tensor) -> list[str]:
    norms, found = total.diagonal().clamp(min=0).sqrt(), cosines(total)
    alive = [n for n, norm in enumerate(norms.tolist()) if norm > 0]
    if len(alive) < 2:
        return []
    growth = max(float(total.sum()), 0.0) ** 0.5 / float(norms.max())
    return texts((sentence for _, sentence in of_cosines({p: float(found[p]) for p in combinations(alive, 2)}, growth)), _NOTES)


def _of(cell: Cell, number_: int) -> float:
    return float(cell.energies[cell.inputs.index(number_)])


def _pair(cells: Mapping[str, Cell], i: int, j: int) -> list[float | None]:
    """Cosines x 10^4, whole numbers but near 1 and -1, where two that nearly cancel leave the last digits."""
    values = {}
    for module, cell in cells.items():
        if i in cell.inputs and j in cell.inputs:
            a, b = cell.inputs.index(i), cell.inputs.index(j)
            values[module] = float(cosines(cell.gram[[a, b]][:, [a, b]])[0, 1])
    found = [values.get(m, math.nan) for m in MODULES]
    return [None if not math.isfinite(c) else round(1e4 * c) if abs(c) < 0.99 else round(1e4 * c, 4) for c in found]


def _over_modules(values: Mapping[str, float]) -> list[float | None]:
    return [number(values[m]) if m in values else None for m in MODULES]


def number(value: float | None, digits: int = 5) -> float | None:
    """With a few digits; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def text(value: object, most: int = TEXT) -> str:
    """A text of a file or a config: its beginning and how long it is, without control characters."""
    whole = str(value)
    shown = "".join(c if c.isprintable() or c == " " else " " for c in whole[:most])
    return shown if len(whole) <= most else f"{shown}... ({len(whole):,} characters)"


def texts(values: Iterable[object], most: int) -> list[str]:
    """The first of several texts, and how many more there are."""
    whole = [text(v) for v in values]
    return whole if len(whole) <= most else [*whole[:most], f"... and {len(whole) - most:,} more"]

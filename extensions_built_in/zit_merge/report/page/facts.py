"""What the merge page is told: a step, or several files, as JSON of bounded size.

Lists that run over modules follow the order of `zimage.MODULES`; null means that a module is not there. Numbers have four or
five digits, texts of files are cut: the page is for looking, the exact numbers are in the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...algebra.least_squares import cosines
from ...algebra.methods import METHODS
from ...analysis.advice import of_cosines
from ...analysis.measure import Measurement, ModuleProducts
from ...errors import ZitMergeError
from ...files.hub import HUB_PREFIX
from ...formats.metadata import trigger_words
from ...formats.reader import dtype_name
from ...formats.verdict import PAIRS_UP_TO, Verdict
from ...merging.made import Done
from ...model.strengths import Weights, factor_table
from ...model.zimage import MODULES
from ...planning.types import Input, StepPlan
from ...progress import SILENT, Progress
from ...wording import ranks_text, span
from ..text.result import verdict_text
from .module_energies import of_inputs, of_result
from .values import NAME, TEXT, number, text, texts, weights

PAIRED = 24  # inputs, the strongest ones, whose overlap is there module by module: 276 pairs
_NOTES, _TRIGGERS = 30, 12


def step_facts(done: Done, progress: Progress = SILENT) -> dict[str, Any]:
    """A step that is done.

    Args:
        done: The step, its inputs still there.
        progress: Shows the modules that are read again, and may stop.
    """
    plan, verdict = done.plan, done.verdict
    asked, got = (_told(verdict, key, len(plan.inputs)) for key in ("asked", "got"))
    facts = {
        "name": text(plan.name, NAME),
        "file": text(done.path.name, TEXT) if plan.spec.keep else None,
        "path": _path(done.path) if plan.spec.keep else None,
        "copy": text(f"{plan.targets[1].parent.name}/{done.path.name}", TEXT) if plan.spec.keep and plan.spec.copy_to else None,
        "made": done.made,
        "bytes": done.path.stat().st_size,
        "modules": len(plan.shapes),
        "rank": _rank(plan),
        "dtype": plan.dtype_name,
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
        modules, result = of_inputs(done, progress), of_result(done, progress)
    except (OSError, ZitMergeError):  # an input has been moved meanwhile; the merge itself is done
        return facts | {"details": None}
    errors = done.verdict.errors if done.verdict and plan.cut else {}
    return facts | {"details": _details(modules, [i.strengths for i in plan.inputs], result, errors)}


def result_facts(plan: StepPlan, verdict: Verdict) -> dict[str, Any]:
    """What a step would make, from its check alone: there need not be a file.

    Args:
        plan: The step, its ranks known.
        verdict: Of its check, with what was measured in every module.
    """
    asked, got = (_told(verdict, key, len(plan.inputs)) for key in ("asked", "got"))
    written = {module: measured.written for module, measured in verdict.modules.items()}
    modules = {m: ModuleProducts(found.inputs, found.energies, found.gram) for m, found in verdict.modules.items()}
    pairs = cosines(_total(modules, [i.strengths for i in plan.inputs])).tolist() if len(plan.inputs) <= PAIRS_UP_TO else None
    return {
        "status": verdict.status,
        "judgement": verdict_text(plan, verdict),
        "asked": list(map(number, asked)),
        "got": list(map(number, got)),
        "kept": number(verdict.kept) if plan.cut else None,
        "error": number(verdict.error),
        "rank": _rank(plan),
        "bytes": plan.bytes,
        "norm": number(sum(written.values()) ** 0.5),
        "result": _over_modules(written),
        "warnings": texts(plan.warnings, _NOTES),
        "cosines": None if pairs is None else [[number(v) for v in row[:i]] for i, row in enumerate(pairs)],
    }


def _rank(plan: StepPlan) -> str:
    return "a LoKr as before" if plan.spec.save.keep_lokr else span(plan.ranks.values())


def files_facts(measured: Measurement) -> dict[str, Any]:
    """Files that were measured, as inputs of a merge that has not been made.

    Raises:
        ZitMergeError: One of them is broken.
    """
    if measured.broken:
        raise ZitMergeError(next(iter(measured.broken.values())))
    loras = measured.loras
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
                "path": _path(lora.path),
                "ratio": 1,
                "modules": len(lora),
                "what": _what(lora.algorithms, lora.ranks, dtype_name(lora)),
                "triggers": texts(trigger_words(lora.metadata), _TRIGGERS),
                "weights": weights(factor_table(Weights())),
                "questions": texts(lora.questions, _NOTES),
            }
            for lora in loras
        ],
        "details": _details(measured.modules, ones, {}, {}),
    }


def start_facts(plan: StepPlan, measured: Measurement) -> dict[str, Any]:
    """A step that is not written, only composed from.

    Args:
        plan: The step; its inputs are the files.
        measured: The files.

    Raises:
        ZitMergeError: One of them is broken.
    """
    facts = files_facts(measured)
    method = METHODS[plan.spec.method]
    return facts | {
        "name": text(plan.name, NAME),
        "method": plan.spec.method,
        "linear": method.is_linear,
        "cut": bool(plan.cut),
        "notes": texts(plan.warnings, _NOTES),
        "inputs": [_input(i, None, None) for i in plan.inputs],
        "details": _details(measured.modules, [i.strengths for i in plan.inputs], {}, {}),
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
        "path": None if i.step or i.spec.source.startswith(HUB_PREFIX) else _path(i.path),
        "ratio": i.spec.ratio,
        "preset": i.spec.preset,
        "modules": len(i.known.ranks),
        "what": _what(i.known.algorithms, i.known.ranks, i.known.dtype_name),
        "asked": number(asked),
        "got": number(got),
        "triggers": texts(trigger_words(i.metadata), _TRIGGERS),
        "weights": weights(factor_table(Weights(**i.spec.tables))),
    }


def _path(path: Path) -> str | None:
    """Where a file is, for a job elsewhere; None for what is too long to be shown."""
    whole = str(path.absolute())
    return whole if len(whole) <= TEXT else None


def _what(algorithms: Iterable[str], ranks: Mapping[str, int], dtype: str) -> str:
    return f"{' and '.join(algorithms)} of rank {ranks_text(ranks, algorithms)}, {dtype}"


def _details(
    modules: Mapping[str, ModuleProducts],
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
    energies = [{m: p.energy(n) for m, p in modules.items() if n in p.files} for n in range(count)]
    total = _total(modules, strengths) if count <= PAIRS_UP_TO else None
    went_in = [
        sum(energy * s[m] ** 2 for m, energy in own.items() if math.isfinite(energy))
        for own, s in zip(energies, strengths, strict=True)
    ]
    strongest = sorted(sorted(range(count), key=lambda n: -went_in[n])[:PAIRED])
    return {
        "energies": [_over_modules(own) for own in energies],
        "result": _over_modules(result) if result else None,
        "errors": _over_modules(errors) if errors else None,
        "pairs": [[i, j, _pair(modules, i, j)] for i, j in combinations(strongest, 2)] if total is not None else [],
        "unpaired": count - len(strongest) if total is not None else count,
        "cosines": None if total is None else [[number(v) for v in row[:i]] for i, row in enumerate(cosines(total).tolist())],
        "advice": [] if total is None else _advice(total),
    }


def _total(modules: Mapping[str, ModuleProducts], strengths: Sequence[Mapping[str, float]]) -> Tensor:
    """(N, N) inner products of the inputs as they went in."""
    total = torch.zeros(len(strengths), len(strengths), dtype=torch.float64)
    for module, found in modules.items():
        at = torch.tensor(found.files)
        scales = torch.tensor([strengths[n][module] for n in found.files], dtype=torch.float64)
        total[at[:, None], at] += torch.nan_to_num(found.gram * torch.outer(scales, scales), 0.0, 0.0, 0.0)
    return total


def _advice(total: Tensor) -> list[str]:
    norms, found = total.diagonal().clamp(min=0).sqrt(), cosines(total)
    alive = [n for n, norm in enumerate(norms.tolist()) if norm > 0]
    if len(alive) < 2:
        return []
    growth = max(float(total.sum()), 0.0) ** 0.5 / float(norms.max())
    pairs = {pair: float(found[pair]) for pair in combinations(alive, 2)}
    return texts((sentence for _, sentence in of_cosines(pairs, growth)), _NOTES)


def _pair(modules: Mapping[str, ModuleProducts], i: int, j: int) -> list[float | None]:
    """Cosines x 10^4 over modules."""
    return [_ten_thousandths(modules[m].cosine(i, j)) if m in modules else None for m in MODULES]


def _ten_thousandths(cosine: float | None) -> float | None:
    """A whole number but near 1 and -1, where two that nearly cancel leave the last digits."""
    if cosine is None or not math.isfinite(cosine):
        return None
    return round(1e4 * cosine, None if abs(cosine) < 0.99 else 4)


def _over_modules(values: Mapping[str, float]) -> list[float | None]:
    return [number(values[m]) if m in values else None for m in MODULES]

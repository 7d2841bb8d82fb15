"""How alike several LoRAs are, what they share, and what a plain sum of them would do.

Everything here is about the numbers in the files. What a merge looks like in pictures is not known from them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.least_squares import cosines
from ..algebra.overlap import Overlap, Side
from .advice import advice
from .measure import Measurement, outline

SIDES = ("columns", "rows", "both")


@dataclass(frozen=True)
class Comparison:
    """Several files that were measured, beside each other.

    Attributes:
        measured: The files.
        norms: Frobenius norms of the whole files.
        cosines: N lists of N: of the whole files.
        sum_norm: Norm of the plain sum at a ratio of 1 each.
        shared: {columns, rows}: k -> directions that about k LoRAs hold, a mean over the modules that several files change.
        energy: {columns, rows, both}: for each file the share of the energy of its whole change in common directions.
        advice: (kind, sentence) of what it means for a merge.
    """

    measured: Measurement
    norms: Sequence[float]
    cosines: Sequence[Sequence[float]]
    sum_norm: float
    shared: Mapping[str, Mapping[str, float]]
    energy: Mapping[str, Sequence[float]]
    advice: Sequence[tuple[str, str]]

    @property
    def unrelated_norm(self) -> float:
        """Norm that the sum would have if the files were unrelated."""
        return float(torch.tensor(self.norms, dtype=torch.float64).norm())

    def to_json(self) -> dict[str, Any]:
        """Everything that is known of the files together: the keys are these, always all of them.

        Files are meant by their position, from 0. Deltas have their alpha folded in. A direction is a singular vector of a
        change: a column for what it writes, a row for what it reads. It is common when at least about half of the other LoRAs
        that change the module hold it too, and when random LoRAs of these ranks would not (see `algebra.overlap`).

        Returns:
            files: For each {file, modules, algorithms, ranks, questions, unmatched, norm}: the name without its folder, how many
                modules it changes, algorithm -> how many modules, lowest and highest rank as text, what it leaves open (it is
                compared by what is known), how many keys no rule explains, Frobenius norm of the whole change.
            cosines: N lists of N: cosines of the whole files.
            modules: Module -> {files, norms, cosines, directions}: which files change it, and of these, in that order, the norms
                and the cosines as above. `directions` is null where fewer than two of them are not zero, else {columns, rows,
                energy}: `columns` and `rows` are {of, values, shared, common, chance, told}: how many directions all have
                together, by how many LoRAs each of these is held (the eigenvalues of the sum of the projections, the largest
                first), k -> how many of them about k LoRAs hold, k from 2, how many are common, how many LoRAs a direction is
                held by through chance alone, whether anything can be told beside chance. `energy` is {columns, rows, both}, for
                each file the share of its squared norm in common columns, in common rows, between both.
            sum: {norm, unrelated, strongest}: norm of the plain sum at a ratio of 1 each, the root of the sum of the squared
                norms, which it would have if they were unrelated, and the norm of the strongest file.
            shared: {columns, rows, energy}: means over the modules that several files change: k -> directions that about k LoRAs
                hold, and for each file the share of the energy of its whole change in common directions, {columns, rows, both}.
            leading: Modules with a change of so high a rank that only its 128 leading directions were looked at.
            advice: [{kind, text}]: what it means for a merge. `kind` is one of empty, apart, same, alike, related, opposed,
                unrelated, common, unequal; the text is for people, its wording may change.
        """
        measured = self.measured
        return {
            "files": [outline(lora, norm) for lora, norm in zip(measured.loras, self.norms, strict=True)],
            "cosines": self.cosines,
            "modules": {
                module: {
                    "files": list(found.files),
                    "norms": found.energies.sqrt().tolist(),
                    "cosines": cosines(found.gram).tolist(),
                    "directions": _directions(measured.common[module]) if module in measured.common else None,
                }
                for module, found in measured.modules.items()
            },
            "sum": {"norm": self.sum_norm, "unrelated": self.unrelated_norm, "strongest": max(self.norms)},
            "shared": {**self.shared, "energy": self.energy},
            "leading": measured.leading,
            "advice": [{"kind": kind, "text": text} for kind, text in self.advice],
        }


def compare(measured: Measurement) -> Comparison:
    """Compares two or more files that were measured."""
    total, common = measured.gram(), measured.common.values()
    norms, sum_norm = total.diagonal().sqrt().tolist(), max(float(total.sum()), 0.0) ** 0.5
    alike, energy = cosines(total).tolist(), _shares(measured.common_energy(), total.diagonal())
    return Comparison(
        measured=measured,
        norms=norms,
        cosines=alike,
        sum_norm=sum_norm,
        shared={"columns": _shared([c.columns for c in common]), "rows": _shared([c.rows for c in common])},
        energy=energy,
        advice=[*advice(norms, alike, sum_norm, [*common], energy)],
    )


def _directions(found: Overlap) -> dict[str, Any]:
    shares = _shares(found.energy[:, 1:], found.energy[:, 0])
    return {"columns": _side(found.columns), "rows": _side(found.rows), "energy": shares}


def _side(side: Side) -> dict[str, Any]:
    return {
        "of": side.of,
        "values": [round(value, 4) for value in side.values.tolist()[: side.of]],
        "shared": _held(side),
        "common": side.common,
        "chance": side.chance,
        "told": math.isfinite(side.bar),
    }


def _held(side: Side) -> dict[str, int]:
    """k -> how many directions about k LoRAs hold."""
    return dict(Counter(str(round(value)) for value in side.values.tolist() if value > side.bar and round(value) > 1))


def _shared(sides: Collection[Side]) -> dict[str, float]:
    """The same, a mean over modules."""
    sums = sum((Counter(_held(side)) for side in sides), Counter())
    return {k: sums[k] / len(sides) for k in sorted(sums, key=int)}


def _shares(energy: Tensor, whole: Tensor) -> dict[str, list[float]]:
    """{columns, rows, both}: for each file the share of its energy; 0 for one without any. (n, 3) of (n,)."""
    shares = torch.where(whole[:, None] > 0, energy / whole[:, None], 0.0)
    return dict(zip(SIDES, shares.T.tolist(), strict=True))

"""The figure of the evidence: how a sum's score and burn go with its strength, and every method beside the sum."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot

from tests.benchmarks.small_world import questions
from tests.benchmarks.small_world.compare import MEASURES, common, spread

COLOURS = ("#1f5fa8", "#c2571a", "#3d7a3d", "#8a4a9e")


def draw(asked: questions.Asked, path: Path) -> None:
    """Writes the figure; judgements that are there are not made again.

    Args:
        asked: What the questions are asked of.
        path: A picture; its ending says which kind.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1, 1.2))
    _over_strength(asked, left)
    _beside_the_sum(asked, right)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _over_strength(asked: questions.Asked, axes: pyplot.Axes) -> None:
    """Score with its interval over the common strength of a sum; burned dashed."""
    single = [[asked.path(what, seed)] for what in (*questions.SUBJECTS, *questions.STYLES) for seed in asked.seeds]
    kinds = {"one LoRA": single} | {kind: asked.sets(*sizes) for kind, sizes in questions.KINDS.items()}
    for (kind, sets), colour in zip(kinds.items(), ("0.35", *COLOURS), strict=True):
        curves = np.stack([asked.bench.curve(paths, questions.SUM, questions.STRENGTHS) for paths in sets])
        points = [spread(curves[:, n, :, MEASURES.index("score")]) for n in range(len(questions.STRENGTHS))]
        middle, low, high = np.array(points).T
        axes.plot(questions.STRENGTHS, middle, color=colour, label=kind, marker="o", markersize=4)
        axes.fill_between(questions.STRENGTHS, low, high, color=colour, alpha=0.15, linewidth=0)
        burned = curves[..., MEASURES.index("burned")].mean((0, 2))
        axes.plot(questions.STRENGTHS, burned, color=colour, linestyle="--", linewidth=1)
    axes.set(xlabel="strength of every LoRA in a plain sum", ylim=(0, 0.6), title="score (dashed: share of burned pictures)")
    axes.legend(frameon=False)


def _beside_the_sum(asked: questions.Asked, axes: pyplot.Axes) -> None:
    """Every method at its best common strength against the sum at its own: paired differences of the score."""
    score, names = MEASURES.index("score"), []
    kinds = list(questions.KINDS.items())
    for k, ((kind, sizes), colour) in enumerate(zip(kinds, COLOURS, strict=True)):
        sets = asked.sets(*sizes)
        base = common(np.stack([asked.bench.curve(paths, questions.SUM, questions.STRENGTHS) for paths in sets]))
        for merged in questions.methods_of(sum(sizes)):
            if merged.name in questions.SCALES:
                continue
            if merged.name not in names:
                names.append(merged.name)
            curves = np.stack([asked.bench.curve(paths, merged, questions.STRENGTHS) for paths in sets])
            middle, low, high = spread((common(curves) - base)[..., score])
            place = names.index(merged.name) + (k - 1.5) * 0.18
            axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, markersize=4)
        axes.plot([], [], "o", color=colour, label=kind)
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(title="score against the sum, each at its best strength", xlabel="difference (95 % intervals)")
    axes.legend(frameon=False, fontsize=8)

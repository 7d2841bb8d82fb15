"""The figure of growth.py: seconds and memory against the number of LoRAs and against the rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

GAP = 0.035  # between a point and its label, as a share of the width
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
APART = 0.062  # the least distance of two labels, as a share of the height
SHORT = {"exact": "exact", "cut": "cut to the rank", "kohya": "kohya's dense SVD", "qr": "QR way"}
COPIED = ("exact", "cut")  # whose bytes are shown copied; the others write as many as the cut


class Label(NamedTuple):
    """A text beside the last point of its line."""

    text: str
    colour: Any
    x: float
    y: float


def draw(results: Sequence[dict[str, Any]], rank: int, pair: int, path: Path) -> None:
    """Writes the figure.

    Args:
        results: As growth.py measured them.
        rank: Of the cases over the number of LoRAs.
        pair: How many LoRAs the cases over the rank have.
        path: A picture; its ending says which kind.
    """
    figure, rows = pyplot.subplots(2, 2, figsize=(13, 8.5), sharex="col", sharey="row")
    done = [r for r in results if "seconds" in r]
    colours = {line: f"C{i % 10}" for i, line in enumerate(dict.fromkeys(r["line"] for r in results))}
    over_count, over_rank = [r for r in done if r["rank"] == rank], [r for r in done if r["count"] == pair]
    labels = []
    for row, quantity in zip(rows, ("seconds", "memory"), strict=True):
        for axes, cases, along in zip(row, (over_count, over_rank), ("count", "rank"), strict=True):
            labels.append((axes, panel(axes, cases, along, quantity, colours)))
    rows[0][0].set_title(f"LoRAs of rank {rank}", loc="left")
    rows[0][1].set_title(f"{pair} LoRAs", loc="left")
    rows[0][0].set_ylabel("seconds")
    rows[1][0].set_ylabel("peak memory, MB")
    rows[1][0].set_xlabel("number of LoRAs")
    rows[1][1].set_xlabel("rank of each LoRA")
    figure.text(
        0.01,
        0.005,
        "dotted: the output's bytes copied and synced;  *: extrapolated from a few modules, memory in part computed",
        fontsize=9,
    )
    figure.align_ylabels()
    figure.tight_layout(rect=(0, 0.02, 1, 1), w_pad=11)
    figure.subplots_adjust(right=0.87)
    for axes, beside in labels:
        place(axes, beside)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def memory(result: dict[str, Any]) -> float:
    """Peak megabytes, with what is held besides.

    Args:
        result: Of one case.
    """
    return (result["peak"] + result.get("held", 0)) / 1e6


def panel(axes: Any, cases: Sequence[dict[str, Any]], along: str, quantity: str, colours: dict[str, str]) -> list[Label]:
    """Draws one of the four plots.

    Args:
        axes: Of the plot.
        cases: What is drawn.
        along: `count` or `rank`.
        quantity: `seconds` or `memory`.
        colours: By line.

    Returns:
        The labels of its lines, which wait until the axes are final.
    """
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    labels = []
    for line, colour in colours.items():
        found = sorted((r for r in cases if r["line"] == line), key=lambda r: r[along])
        if not found:
            continue
        xs, ys = [r[along] for r in found], [r["seconds"] if quantity == "seconds" else memory(r) for r in found]
        axes.plot(xs, ys, marker="o", markersize=5, linewidth=1.8, color=colour)
        copies = [(r[along], r["copy"]) for r in found if "copy" in r]
        if quantity == "seconds" and line in COPIED and copies:
            axes.plot(*zip(*copies, strict=True), linestyle=":", linewidth=1.3, color=colour)
        star = "*" if found[-1].get("modules", 0) < found[-1].get("of", 0) else ""
        labels.append(Label(SHORT.get(line, line.replace("peft-", "PEFT ")) + star, colour, xs[-1], ys[-1]))
    ticks = sorted({r[along] for r in cases})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.12)
    axes.grid(True, which="major", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    return labels


def place(axes: Any, labels: Sequence[Label]) -> None:
    """The labels right of their points, moved apart where they would touch, each joined to its point.

    Args:
        axes: Of the plot.
        labels: Of its lines.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    for x in sorted({label.x for label in labels}):
        group = sorted((label for label in labels if label.x == x), key=lambda label: label.y)
        points = [to_axes.transform((label.x, label.y)) for label in group]
        for label, (across, up), height in zip(group, points, spread([p[1] for p in points]), strict=True):
            joint = {"transform": axes.transAxes, "clip_on": False, "color": label.colour}
            axes.plot([across, across + GAP], [up, height], linewidth=0.6, **joint)
            axes.text(across + GAP, height, label.text, va="center", fontsize=9, bbox=PAPER, **joint)


def spread(heights: Sequence[float]) -> list[float]:
    """Ascending heights moved apart to at least APART, as little as possible, around the middle of what is crowded.

    Args:
        heights: Ascending.
    """
    groups: list[list[float]] = []  # each a run of labels that touch
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and bottom(groups[-1]) - top(groups[-2]) < APART:
            last = groups.pop()
            groups[-1] += last
    return [bottom(group) + i * APART for group in groups for i in range(len(group))]


def bottom(group: Sequence[float]) -> float:
    """Where the lowest label of a run stands.

    Args:
        group: The heights that its labels want.
    """
    return sum(group) / len(group) - (len(group) - 1) * APART / 2


def top(group: Sequence[float]) -> float:
    """Where the highest label of a run stands.

    Args:
        group: The heights that its labels want.
    """
    return bottom(group) + (len(group) - 1) * APART

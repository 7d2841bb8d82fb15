"""What the parts of a LoRA do, measured on pictures: each part was left out in turn, or was all there was.

Notation: d(a, b) is a metric's distance of picture a from picture b, `full` a picture of the whole LoRA, `base` one without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml
from PIL.Image import Image
from torch import Tensor

from ..errors import ZitMergeError, counted, nearest
from ..model.strengths import Weights, row_name, strengths
from ..model.zimage import ALIASES, COMPONENTS, MODULES, N_LAYERS, REFINERS
from ..wording import WIDTH, aligned, beside, plain, ranges, squeezed, wrapped
from .metrics import METRICS, Metric, described, distance, metric, pixels, tensor_of

LEAVE_OUT, ONLY = "leave_out", "only"
_UNCHANGED = 0.5 / 255  # root mean square below which two pictures are apart by no more than rounding to 8 bits
_FAINT = 0.01  # share of a metric's largest distance of full from base below which a picture has no ratio of its own
_NAME = 60  # letters of the LoRA's name
_FEW = 8  # pictures below which one or two of them decide the order
_SHORT = {component: alias for alias, component in ALIASES.items()}  # adaLN_modulation -> adaLN
_NAMED = 3  # groups in a sentence
_LABEL, _CELL, _ACROSS = 18, 14, 4  # letters of a group's name and of a cell; metrics beside each other
_COLUMN = 7  # letters of a component's column


@dataclass(frozen=True)
class Group:
    """A part of a LoRA.

    Attributes:
        name: A short label: `layers 0-2`, `noise_refiner`, `other`, `to_q`, `0-2.to_q`.
        modules: Those of the LoRA that belong to it, in the order of zimage.MODULES.
        table: The strength key that names it: `layers`, `blocks` or `overrides`.
        key: Its entry there: `0-2`, `to_q`, `0-2.to_q`.
    """

    name: str
    modules: tuple[str, ...]
    table: str
    key: str


def groups(by: str, count: int, present: Collection[str]) -> tuple[Group, ...]:
    """The parts that a LoRA is divided into; every module is in exactly one.

    Args:
        by: `layers`: runs of the 30 layers, then the refiners and `other`; `components`: the eight components over layers and
            refiners, then `other`; `cells`: runs of layers x components, then the refiners and `other` as wholes.
        count: Runs that the 30 layers are divided into, as evenly as it goes; `components` has none.
        present: The modules that the LoRA has.

    Returns:
        The groups that have modules, in the order of the model.

    Raises:
        ValueError: There is no such division, or not so many runs.
    """
    found = []
    for name, table, key in _divisions(by, count):
        # the modules are those that a preset with this key alone would weigh
        chosen = strengths(Weights(1.0, **{table: {key: 0.0}}))
        if modules := tuple(m for m in MODULES if m in present and chosen[m] == 0):
            found.append(Group(name, modules, table, key))
    return tuple(found)


def _divisions(by: str, count: int) -> Iterator[tuple[str, str, str]]:
    """(name, table, key) of every group that a LoRA may have."""
    if by not in ("layers", "components", "cells") or not 1 <= count <= N_LAYERS:
        raise ValueError(f"{by} in {count} runs: there are layers, components and cells, in 1 to {N_LAYERS} runs")
    if by == "components":
        yield from ((_SHORT.get(c, c), "blocks", c) for c in COMPONENTS)
        yield "other", "layers", "other"
        return
    for k in range(count):
        first, last = k * N_LAYERS // count, (k + 1) * N_LAYERS // count - 1
        run = row_name("layers", first, last)
        if by == "layers":
            yield f"layer{'s' * (last > first)} {run}", "layers", run
        else:
            yield from ((f"{run}.{_SHORT.get(c, c)}", "overrides", f"{run}.{c}") for c in COMPONENTS)
    yield from ((section, "layers", section) for section in (*REFINERS, "other"))


class Shot(NamedTuple):
    """What a picture is rendered with, beside the LoRA."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Distances:
    """What one metric measured, shot by shot.

    Attributes:
        full_to_base: d(full, base).
        base_to_full: d(base, full), the same unless the metric is of someone who sees it otherwise.
        to_full: Group -> d(picture, full).
        to_base: Group -> d(picture, base).
    """

    full_to_base: tuple[float, ...]
    base_to_full: tuple[float, ...]
    to_full: dict[str, tuple[float, ...]]
    to_base: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Ablation:
    """What was measured.

    Attributes:
        lora: Name of the LoRA.
        by: How it was divided: `layers`, `components` or `cells`.
        mode: `leave_out`: a picture has the whole LoRA without the group; `only`: nothing but the group.
        shots: What the pictures were rendered with.
        groups: The parts, in the order of the model.
        distances: Metric -> what it measured.
        about: Metric -> {what, formula, source}, a line each.
        is_changed: For each shot, whether the LoRA changes the picture by more than rounding.
    """

    lora: str
    by: str
    mode: str
    shots: tuple[Shot, ...]
    groups: tuple[Group, ...]
    distances: Mapping[str, Distances]
    about: Mapping[str, Mapping[str, str]]
    is_changed: tuple[bool, ...]

    def share(self, metric: str, group: str) -> float | None:
        """How much of the LoRA's change a group takes away with it, or brings alone.

        leave_out: sum of d(picture, full) over the shots / sum of d(base, full); only: sum of d(picture, base) / sum of
        d(full, base). A ratio of sums: shots count by how much the LoRA changes them. In a mean of ratios, one shot in which
        it changes next to nothing would decide. Shares of groups don't add up to 1, and one may be above 1.

        Returns:
            From 0; None where the LoRA changes nothing.
        """
        moved, whole = self._moved(metric)
        return sum(moved[group]) / sum(whole) if any(self.is_changed) and sum(whole) else None

    def shares(self, metric: str, group: str) -> tuple[float | None, ...]:
        """The same of each shot alone; None where the LoRA changes next to nothing, so that a ratio would say nothing."""
        moved, whole = self._moved(metric)
        least = _FAINT * max(whole)
        told = zip(moved[group], whole, self.is_changed, strict=True)
        return tuple(m / w if changed and w > least else None for m, w, changed in told)

    def whole(self, metric: str) -> float:
        """What a share of 1 is in the metric's own units: the mean over the shots of how far full and base are apart."""
        _, whole = self._moved(metric)
        return sum(whole) / len(whole)

    def ranked(self, metric: str) -> list[tuple[str, float]]:
        """(group, share), the largest share first; nothing where the LoRA changes nothing."""
        found = [(g.name, share) for g in self.groups if (share := self.share(metric, g.name)) is not None]
        return sorted(found, key=lambda item: -item[1])

    def _moved(self, metric: str) -> tuple[Mapping[str, tuple[float, ...]], tuple[float, ...]]:
        """What share and shares divide by what."""
        d = self.distances[metric]
        return (d.to_full, d.base_to_full) if self.mode == LEAVE_OUT else (d.to_base, d.full_to_base)

    @property
    def caveat(self) -> str:
        """What it describes, and that it describes nothing else."""
        what = f"This describes {squeezed(self.lora, _NAME)} with {self.rendered}, and nothing else"
        return f"{what}: another LoRA, other prompts or other seeds may give another order."

    @property
    def rendered(self) -> str:
        """`2 prompts and 3 seeds (6 pictures of each part)`."""
        prompts, seeds = (counted(len({shot[k] for shot in self.shots}), word) for k, word in enumerate(("prompt", "seed")))
        return f"{prompts} and {seeds} ({counted(len(self.shots), 'picture')} of each part)"

    @property
    def meaning(self) -> str:
        """What a share is, in words."""
        if self.mode == LEAVE_OUT:
            left_out = "how far a picture is from that of the whole LoRA when the part is left out"
            return f"Share: {left_out}; 100 % is as far as the base is."
        return "Share: how far the part alone moves a picture away from the base; 100 % is as far as the whole LoRA does."

    def notes(self) -> list[str]:
        """What there is to know beside the numbers, a sentence each."""
        found = ["The shares don't add up to 100 %: parts do the same work twice, or only work together."]
        if not any(self.is_changed):
            found.append("The LoRA changes none of the pictures, so there is no share to tell.")
        elif still := [n + 1 for n, changed in enumerate(self.is_changed) if not changed]:
            found.append(f"The LoRA changes nothing in picture{'s' * (len(still) > 1)} {ranges(still)} of {len(self.shots)}.")
        if len(self.shots) < _FEW:
            several = f"{len(self.shots)} pictures of each part are few"
            few = several if len(self.shots) > 1 else "One picture of each part says little"
            found.append(f"{few}: small differences mean nothing; more prompts and seeds show which ones last.")
        return found

    def facts(self) -> dict[str, Any]:
        """For JSON; every number is finite, or null where there is nothing to divide by.

        Returns:
            {caveat, meaning, notes, lora, by, mode, shots: [{prompt, seed, changed}], metrics: name -> {what, formula, source,
            full_to_base: [a number for each shot], base_to_full: [...]}, groups: [{name, table, key, modules: [...], metrics:
            name -> {share, shares: [...], to_full: [...], to_base: [...]}}]}
        """
        shots = zip(self.shots, self.is_changed, strict=True)
        return {
            "caveat": self.caveat,
            "meaning": self.meaning,
            "notes": self.notes(),
            "lora": self.lora,
            "by": self.by,
            "mode": self.mode,
            "shots": [{"prompt": shot.prompt, "seed": shot.seed, "changed": changed} for shot, changed in shots],
            "metrics": {
                m: {**self.about[m], "full_to_base": [*d.full_to_base], "base_to_full": [*d.base_to_full]}
                for m, d in self.distances.items()
            },
            "groups": [self._group_facts(group) for group in self.groups],
        }

    def _group_facts(self, group: Group) -> dict[str, Any]:
        measured = {
            m: {
                "share": self.share(m, group.name),
                "shares": [*self.shares(m, group.name)],
                "to_full": [*d.to_full[group.name]],
                "to_base": [*d.to_base[group.name]],
            }
            for m, d in self.distances.items()
        }
        return {"name": group.name, "table": group.table, "key": group.key, "modules": [*group.modules], "metrics": measured}

    def text(self) -> str:
        """The tables, in the order of the model so that neighbours stand together, what is strongest, and what it is worth."""
        what = "left out in turn" if self.mode == LEAVE_OUT else "alone"
        lines = wrapped(f"{squeezed(self.lora, _NAME)}, each part {what}: {self.rendered}", 0)
        lines += ["", *wrapped(self.meaning)]
        if self.groups:
            lines += _cell_tables(self) if self.by == "cells" else _group_tables(self)
        lines += ["", *_orders(self)]
        lines += ["", *(line for sentence in (*self.notes(), self.caveat) for line in wrapped(sentence))]
        return "\n".join(lines)

    def preset(self, metric: str) -> dict[str, dict[str, float]]:
        """Strength keys in proportion to the shares: 1 for the strongest group, two digits.

        Args:
            metric: Whose shares.

        Returns:
            `layers`, `blocks` and `overrides` as far as there are entries, for `weights.Weights` or a config.

        Raises:
            ZitMergeError: The metric was not measured, or saw no part do anything.
        """
        if metric not in self.distances:
            measured = ", ".join(self.distances)
            raise ZitMergeError(f"no ablation by {metric!r}{nearest(metric, self.distances)}; measured were {measured}")
        shares = dict(self.ranked(metric))
        if not any(shares.values()):
            raise ZitMergeError(
                f"by the metric {metric} no part of {self.lora} changes these pictures, so no preset follows from them: "
                "use other prompts, or a larger ratio"
            )
        found: dict[str, dict[str, float]] = {}
        for group in self.groups:
            found.setdefault(group.table, {})[group.key] = round(shares[group.name] / max(shares.values()), 2)
        return found

    def preset_yaml(self, name: str, metric: str) -> str:
        """The preset as a file that `preset: FILE` takes.

        Args:
            name: What it is called.
            metric: As for `preset`.
        """
        how = f"{self.mode}, {len(self.groups)} parts by {self.by}, metric {plain(metric)}"
        idea = (
            f"measured by an ablation of {plain(self.lora)} ({how}) on {self.rendered}; "
            "describes this LoRA with these prompts and seeds, and nothing else"
        )
        entry = {name: {"idea": idea, **self.preset(metric)}}
        return yaml.safe_dump(entry, sort_keys=False, default_flow_style=None, width=120)  # ASCII, a table in a line or two


def measure(
    pictures: Mapping[str, Sequence[Image]],
    full: Sequence[Image],
    base: Sequence[Image],
    *,
    groups: Sequence[Group],
    by: str,
    mode: str,
    lora: str,
    shots: Sequence[tuple[str, int]],
    metrics: Sequence[str] = tuple(METRICS),
    place: str = "metrics",
    watched: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Ablation:
    """Measures how far the pictures are from those of the whole LoRA and from those without it.

    Args:
        pictures: Group name -> one picture for each shot.
        full: One of the whole LoRA for each shot.
        base: One without it for each shot.
        groups: The parts, see `groups`; those without pictures are not measured.
        by: How they were divided.
        mode: `leave_out` or `only`.
        lora: Its name, for the reader.
        shots: (prompt, seed) of each.
        metrics: Built-in names, or `module:function`.
        place: Where the metrics stand, for messages.
        watched: Passes the names of the groups on one by one; may raise to stop.

    Raises:
        ZitMergeError: A metric is unknown or fails, or the pictures of a shot differ in size.
        ValueError: There is not one picture for each shot.
    """
    functions = {name: metric(name, place) for name in metrics}
    full, base = [*map(tensor_of, full)], [*map(tensor_of, base)]
    measured = [group for group in groups if group.name in pictures]
    _check_sizes("the base", base, full)
    distances = {m: Distances(_apart(m, f, full, base), _apart(m, f, base, full), {}, {}) for m, f in functions.items()}
    for group in watched([g.name for g in measured]):
        found = [*map(tensor_of, pictures[group])]  # of one group at a time
        _check_sizes(group, found, full)
        for m, function in functions.items():
            distances[m].to_full[group] = _apart(m, function, found, full)
            distances[m].to_base[group] = _apart(m, function, found, base)
    return Ablation(
        lora=lora,
        by=by,
        mode=mode,
        shots=tuple(Shot(*shot) for shot, _ in zip(shots, full, strict=True)),
        groups=tuple(measured),
        distances=distances,
        about={m: described(function) for m, function in functions.items()},
        is_changed=tuple(pixels(f, b) > _UNCHANGED for f, b in zip(full, base, strict=True)),
    )


def _apart(name: str, function: Metric, found: Sequence[Tensor], references: Sequence[Tensor]) -> tuple[float, ...]:
    """Distances shot by shot."""
    return tuple(distance(name, function, p, r) for p, r in zip(found, references, strict=True))


def _check_sizes(name: str, found: Sequence[Tensor], full: Sequence[Tensor]) -> None:
    for n, (picture, reference) in enumerate(zip(found, full, strict=True)):
        if picture.shape != reference.shape:
            one, other = (f"{p.shape[2]} x {p.shape[1]}" for p in (picture, reference))
            raise ZitMergeError(f"picture {n + 1} of {name} is {one}, that of the whole LoRA {other}: render them anew")


def _orders(ablation: Ablation) -> Iterator[str]:
    """For each metric what 100 % is, and which groups are strongest and weakest."""
    names = [squeezed(m, _LABEL) for m in ablation.distances]
    for name, m in zip(names, ablation.distances, strict=True):
        told = _order(ablation, m) if ablation.ranked(m) else ["nothing to tell"]
        yield from beside(f"  {name:<{max(map(len, names))}}  ", [f"100 % is {ablation.whole(m):.3g}", *told])


def _order(ablation: Ablation, metric: str) -> list[str]:
    """`strongest layers 3-5 (62 %; first in 3 of 4 pictures)`, `layers 0-2 (50 %)`, ..., `weakest other (2.0 %)`."""
    ranked = ablation.ranked(metric)
    named = [f"{name} ({number(share)} %)" for name, share in ranked]
    shots = [shot for shot in zip(*(ablation.shares(metric, name) for name, _ in ranked), strict=True) if None not in shot]
    if len(shots) > 1:
        first = sum(shot[0] == max(shot) for shot in shots)
        named[0] = f"{named[0][:-1]}; first in {first} of {len(shots)} pictures)"
    rest = [f"weakest {named[-1]}"] if len(named) > _NAMED else []
    return [f"strongest {named[0]}", *named[1:_NAMED], *rest]


def number(share: float | None) -> str:
    """A share in percent, without the sign: `62`, `4.1`, `>999`, `-` where there is none."""
    if share is None:
        return "-"
    if share >= 9.995:
        return ">999"
    return f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.1f}"


def _group_tables(ablation: Ablation) -> Iterator[str]:
    """A row for each group: share and, in brackets, the lowest and highest of the shots; a few metrics beside each other."""
    metrics = [*ablation.distances]
    for at in range(0, len(metrics), _ACROSS):
        columns = [_column(ablation, m) for m in metrics[at : at + _ACROSS]]
        names = [f"  {name:<{_LABEL - 2}}" for name in ("part", *(g.name for g in ablation.groups))]
        yield ""
        yield from ("".join(cells).rstrip() for cells in zip(names, *columns, strict=True))


def _column(ablation: Ablation, metric: str) -> list[str]:
    shares = aligned([number(ablation.share(metric, g.name)) for g in ablation.groups])
    spreads = [_spread(ablation.shares(metric, g.name)) for g in ablation.groups]
    cells = (f"{share} {spread}" for share, spread in zip(shares, spreads, strict=True))
    fitting = (cell if len(cell) <= _CELL else share for cell, share in zip(cells, shares, strict=True))
    return [f" {text:<{_CELL}}" for text in (squeezed(metric, _CELL), *fitting)]


def _spread(shares: Sequence[float | None]) -> str:
    told = [share for share in shares if share is not None]
    return f"({number(min(told))}-{number(max(told))})" if len(told) > 1 else ""


def _cell_tables(ablation: Ablation) -> Iterator[str]:
    """Runs of layers x components for each metric, and the parts that are no cells below."""
    heads = [_SHORT.get(c, c) for c in COMPONENTS]
    for m in ablation.distances:
        shares = {g.key: number(ablation.share(m, g.name)) for g in ablation.groups}
        runs = dict.fromkeys(g.key.partition(".")[0] for g in ablation.groups if g.table == "overrides")
        columns = [[heads[k], *aligned([shares.get(f"{run}.{c}", "") for run in runs])] for k, c in enumerate(COMPONENTS)]
        rows = zip(("layer", *runs), *columns, strict=True)
        yield ""
        yield f"  {squeezed(m, WIDTH - 20)}, share in %"
        yield from (f"    {run:<8}{''.join(f'{c:>{_COLUMN}}' for c in cells)}".rstrip() for run, *cells in rows)
        if rest := [f"{g.name} {shares[g.key]}" for g in ablation.groups if g.table != "overrides"]:
            yield f"    {', '.join(rest)}"

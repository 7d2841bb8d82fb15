"""The effect of each part of a LoRA, measured on pictures in which it is left out, or is the only one.

Notation: d(a, b) is a metric's distance of picture a from picture b, `full` a picture of the whole LoRA, `base` one without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from PIL.Image import Image
from torch import Tensor

from ..errors import ZitMergeError, counted, nearest
from ..progress import SILENT, Progress
from ..wording import plain, ranges, squeezed
from .groups import LEAVE_OUT, ModuleGroup
from .metrics import METRICS, Metric, described, distance, metric, pixels, tensor_of
from .settings import ImageSpec

_UNCHANGED = 0.5 / 255  # root mean square of a difference that is only rounding to 8 bits
_FAINT = 0.01  # share of a metric's largest distance of full from base below which a picture has no ratio of its own
NAME = 60  # letters of the LoRA's name
_ENOUGH = 16  # pictures from which on two maps of one LoRA mostly agreed: see docs/evidence.md


@dataclass(frozen=True)
class Distances:
    """What one metric measured, picture by picture.

    Attributes:
        full_to_base: d(full, base).
        base_to_full: d(base, full), the same for a symmetric metric.
        to_full: Group -> d(picture, full).
        to_base: Group -> d(picture, base).
    """

    full_to_base: tuple[float, ...]
    base_to_full: tuple[float, ...]
    to_full: dict[str, tuple[float, ...]]
    to_base: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Ablation:
    """The distances of an ablation and what follows from them.

    Attributes:
        lora: Name of the LoRA.
        by: How it was divided: `layers`, `components` or `cells`.
        mode: `leave_out`: a picture has the whole LoRA without the group; `only`: only the group.
        specs: Of the pictures of each group.
        groups: The parts, in the order of the model.
        distances: Metric -> what it measured.
        about: Metric -> {what, formula, source}, a line each.
        is_changed: For each spec, whether the LoRA changes the picture by more than rounding.
    """

    lora: str
    by: str
    mode: str
    specs: tuple[ImageSpec, ...]
    groups: tuple[ModuleGroup, ...]
    distances: Mapping[str, Distances]
    about: Mapping[str, Mapping[str, str]]
    is_changed: tuple[bool, ...]

    def share(self, metric: str, group: str) -> float | None:
        """How much of the LoRA's change a group takes away with it, or makes alone.

        leave_out: sum of d(picture, full) over the specs / sum of d(base, full); only: sum of d(picture, base) / sum of
        d(full, base). A ratio of sums, so that specs count by how much the LoRA changes their pictures: in a mean of ratios,
        one picture that it hardly changes would decide. Shares don't add up to 1, and one may be above 1.

        Args:
            metric: Its name.
            group: Its name.

        Returns:
            From 0; None where the LoRA changes nothing.
        """
        moved, whole = self._moved(metric)
        total = sum(whole)
        return sum(moved[group]) / total if any(self.is_changed) and total else None

    def shares(self, metric: str, group: str) -> tuple[float | None, ...]:
        """The share in the picture of each spec; None where the LoRA changes next to nothing, so that a ratio means nothing.

        Args:
            metric: Its name.
            group: Its name.
        """
        moved, whole = self._moved(metric)
        least = _FAINT * max(whole)
        pairs = zip(moved[group], whole, self.is_changed, strict=True)
        return tuple(m / w if changed and w > least else None for m, w, changed in pairs)

    def whole(self, metric: str) -> float:
        """A share of 1 in the metric's own units: the mean distance of full and base over the specs."""
        _, whole = self._moved(metric)
        return sum(whole) / len(whole)

    def ranked(self, metric: str) -> list[tuple[str, float]]:
        """(group, share), the largest share first; empty where the LoRA changes nothing."""
        found = [(g.name, share) for g in self.groups if (share := self.share(metric, g.name)) is not None]
        return sorted(found, key=lambda item: -item[1])

    def _moved(self, metric: str) -> tuple[Mapping[str, tuple[float, ...]], tuple[float, ...]]:
        """Numerators for each group, and denominators, of the shares."""
        d = self.distances[metric]
        return (d.to_full, d.base_to_full) if self.mode == LEAVE_OUT else (d.to_base, d.full_to_base)

    @property
    def caveat(self) -> str:
        """What the numbers describe, and nothing else."""
        what = f"This describes {squeezed(self.lora, NAME)} with {self.rendered}, and nothing else"
        return f"{what}: another LoRA, other prompts or other seeds may give another order."

    @property
    def rendered(self) -> str:
        """`2 prompts and 3 seeds (6 pictures of each part)`."""
        prompts, seeds = (counted(len({getattr(spec, key) for spec in self.specs}), key) for key in ("prompt", "seed"))
        return f"{prompts} and {seeds} ({counted(len(self.specs), 'picture')} of each part)"

    @property
    def meaning(self) -> str:
        """The definition of a share, in words."""
        if self.mode == LEAVE_OUT:
            left_out = "how far a picture is from that of the whole LoRA when the part is left out"
            return f"Share: {left_out}; 100 % is as far as the base is."
        return "Share: how far the part alone moves a picture away from the base; 100 % is as far as the whole LoRA does."

    def notes(self) -> list[str]:
        """What limits the numbers, a sentence each."""
        found = ["The shares don't add up to 100 %: parts do the same work twice, or only work together."]
        if not any(self.is_changed):
            found.append("The LoRA changes none of the pictures, so there is no share to tell.")
        elif still := [n + 1 for n, changed in enumerate(self.is_changed) if not changed]:
            found.append(f"The LoRA changes nothing in picture{'s' * (len(still) > 1)} {ranges(still)} of {len(self.specs)}.")
        if len(self.specs) < _ENOUGH:
            several = f"{len(self.specs)} pictures of each part are few"
            few = several if len(self.specs) > 1 else "One picture of each part says little"
            found.append(
                f"{few}: small differences mean nothing; take {_ENOUGH} or more, of several prompts and seeds (docs/evidence.md)."
            )
        return found

    def facts(self) -> dict[str, Any]:
        """For JSON; numbers are finite, or null where there is nothing to divide by.

        Returns:
            {caveat, meaning, notes, lora, by, mode, shots: [{prompt, seed, changed}], metrics: name -> {what, formula, source,
            full_to_base: [a number for each spec], base_to_full: [...]}, groups: [{name, table, key, modules: [...], metrics:
            name -> {share, shares: [...], to_full: [...], to_base: [...]}}]}
        """
        pairs = zip(self.specs, self.is_changed, strict=True)
        return {
            "caveat": self.caveat,
            "meaning": self.meaning,
            "notes": self.notes(),
            "lora": self.lora,
            "by": self.by,
            "mode": self.mode,
            "shots": [{"prompt": spec.prompt, "seed": spec.seed, "changed": changed} for spec, changed in pairs],
            "metrics": {
                m: {**self.about[m], "full_to_base": [*d.full_to_base], "base_to_full": [*d.base_to_full]}
                for m, d in self.distances.items()
            },
            "groups": [self._group_facts(group) for group in self.groups],
        }

    def _group_facts(self, group: ModuleGroup) -> dict[str, Any]:
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

    def preset(self, metric: str) -> dict[str, dict[str, float]]:
        """Strength keys in proportion to the shares: 1 for the strongest group, two digits.

        Args:
            metric: Whose shares.

        Returns:
            `layers`, `blocks` and `overrides`, those that have entries, for `strengths.Weights` or a config.

        Raises:
            ZitMergeError: The metric was not measured, or no part has an effect on it.
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
            name: Of the preset.
            metric: As for `preset`.

        Raises:
            ZitMergeError: As `preset`.
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
    groups: Sequence[ModuleGroup],
    by: str,
    mode: str,
    lora: str,
    specs: Sequence[ImageSpec],
    metrics: Sequence[str] = tuple(METRICS),
    progress: Progress = SILENT,
) -> Ablation:
    """Measures how far the pictures are from those of the whole LoRA and from those without it.

    Args:
        pictures: Group name -> one picture for each spec.
        full: Of the whole LoRA, one picture for each spec.
        base: Without the LoRA, one picture for each spec.
        groups: The parts, see `groups.module_groups`; those without pictures are not measured.
        by: How they were divided.
        mode: `leave_out` or `only`.
        lora: The LoRA's name, for the reader.
        specs: What the pictures were rendered with.
        metrics: Built-in names, or `module:function`.
        progress: Shows the groups, and may stop the work.

    Raises:
        ZitMergeError: A metric is unknown or fails, or the pictures of a spec differ in size.
        ValueError: The numbers of pictures and specs differ.
    """
    functions = {name: metric(name) for name in metrics}
    whole, without = [*map(tensor_of, full)], [*map(tensor_of, base)]
    measured = [group for group in groups if group.name in pictures]
    _check_sizes("the base", without, whole)
    distances = {m: Distances(_apart(m, f, whole, without), _apart(m, f, without, whole), {}, {}) for m, f in functions.items()}
    for group in progress.track([g.name for g in measured], "distances", "part", str):
        found = [*map(tensor_of, pictures[group])]  # of one group at a time
        _check_sizes(group, found, whole)
        for m, function in functions.items():
            distances[m].to_full[group] = _apart(m, function, found, whole)
            distances[m].to_base[group] = _apart(m, function, found, without)
    return Ablation(
        lora=lora,
        by=by,
        mode=mode,
        specs=tuple(spec for spec, _ in zip(specs, whole, strict=True)),
        groups=tuple(measured),
        distances=distances,
        about={m: described(function) for m, function in functions.items()},
        is_changed=tuple(pixels(f, b) > _UNCHANGED for f, b in zip(whole, without, strict=True)),
    )


def _apart(name: str, function: Metric, found: Sequence[Tensor], references: Sequence[Tensor]) -> tuple[float, ...]:
    """Distances picture by picture."""
    return tuple(distance(name, function, p, r) for p, r in zip(found, references, strict=True))


def _check_sizes(name: str, found: Sequence[Tensor], full: Sequence[Tensor]) -> None:
    for n, (picture, reference) in enumerate(zip(found, full, strict=True)):
        if picture.shape != reference.shape:
            one, other = (f"{p.shape[2]} x {p.shape[1]}" for p in (picture, reference))
            raise ZitMergeError(f"picture {n + 1} of {name} is {one}, that of the whole LoRA {other}: render them anew")


def number(share: float | None) -> str:
    """A share in percent, without the sign: `62`, `4.1`, `>999`, `-` where there is none."""
    if share is None:
        return "-"
    if share >= 9.995:
        return ">999"
    return f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.1f}"

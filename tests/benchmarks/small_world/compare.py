"""Merges on trial: pictures of a few-step student that wears a merge, judged one by one, and what chance leaves of differences.

A *set* of LoRAs is asked for all that it holds: each picture shows one of its subjects in one of its styles, or the base's where
it has none of a kind. All merges of a set are asked for the same scenes from the same noise. A merge is made once, as zit_merge
writes it, and worn at several strengths; as every method here is homogeneous (k times the inputs, k times the result), a common
factor on the ratios is the same as a strength of the result, and every method gets the strength at which it is best.

The best strength is chosen on one half of the sets and judged on the other, both ways: a choice by chance gains nothing.

Judgements are kept by names: after training LoRAs of a name again, or with another merge of a name, remove their folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from extensions_built_in.zit_merge import merge
from extensions_built_in.zit_merge.algebra.sparse import _disjoint_mean, _drop, _trim  # the rules, without the core space
from tests.benchmarks.small_world import loras, world
from tests.benchmarks.small_world.measures import BURNED, breakdown, judged
from tests.benchmarks.small_world.model import caption_features, pixels, sample

CHUNK = 32  # pictures sampled at once
STRENGTHS = (0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5)
MEASURES = ("subject", "style", "prompt", "burned", "excess", "score")


class Merge(Protocol):
    """A way to merge."""

    @property
    def name(self) -> str:
        """For tables; tells it from all others."""
        ...

    def factors(self, paths: Sequence[Path]) -> loras.Factors:
        """What the merge of LoRAs adds to the model.

        Args:
            paths: LoRAs.
        """
        ...


@dataclass(frozen=True)
class Merged:
    """A merge that zit_merge makes, or one on the whole matrices.

    Attributes:
        method: A method of zit_merge, `full_ties` or `full_dare` (the same rules on the whole matrices).
        params: Its parameters.
        rank: As in a section.
    """

    method: str = "sum"
    params: tuple[tuple[str, Any], ...] = ()
    rank: str | int = "exact"

    @property
    def name(self) -> str:
        """For tables."""
        params = ", ".join(f"{key} {value}" for key, value in self.params)
        return self.method + (f" ({params})" if params else "") + (f", rank {self.rank}" if self.rank != "exact" else "")

    def factors(self, paths: Sequence[Path], ratios: Sequence[Any] = ()) -> loras.Factors:
        """What the merge adds to the model.

        Args:
            paths: LoRAs.
            ratios: Of each, or all keys of a strength; 1 by default.
        """
        ratios = ratios or [1.0] * len(paths)
        if self.method in FULL:
            return _full(FULL[self.method], paths, ratios, dict(self.params))
        with tempfile.TemporaryDirectory() as folder:
            made = merge(
                list(zip(paths, ratios, strict=True)),
                method=self.method,
                params=dict(self.params),
                rank=self.rank,
                dtype="fp32",
                shapes="free",
                device="cpu",
            )
            return loras.load(made.save(Path(folder) / "merged.safetensors"))


def _full(rule: Callable[..., Tensor], paths: Sequence[Path], ratios: Sequence[float], params: dict[str, Any]) -> loras.Factors:
    """A rule on the whole matrices: (out, in) as up, the identity as down."""
    given = [loras.load(path) for path in paths]
    found = {}
    for module in given[0]:
        deltas = [ratio * (one[module][0] @ one[module][1]) for ratio, one in zip(ratios, given, strict=True)]
        found[module] = rule(torch.stack(deltas), **_seeded(params, module)), torch.eye(deltas[0].shape[1])
    return found


def _ties(deltas: Tensor, density: float) -> Tensor:
    return _disjoint_mean(_trim(deltas, density))


def _dare(deltas: Tensor, density: float, seed: int = 0) -> Tensor:
    return _drop(deltas, torch.full_like(deltas, density), seed).sum(0)


def _seeded(params: dict[str, Any], module: str) -> dict[str, Any]:
    """Other draws in every module, as in zit_merge."""
    return {**params, "seed": zlib.crc32(f"{params['seed']} {module}".encode())} if "seed" in params else params


FULL: Mapping[str, Callable[..., Tensor]] = {"full_ties": _ties, "full_dare": _dare}


@dataclass(frozen=True)
class Bench:
    """A student with the noise and scenes on which merges are judged.

    Attributes:
        model: The student.
        caption: `Size.caption`.
        steps: Of its sampler.
        folder: Where judgements are kept; a run goes on from them.
        count: Pictures of a condition.
        seed: Of scenes and noise.
    """

    model: Any
    caption: int
    steps: int
    folder: Path
    count: int = 32
    seed: int = 0

    def scenes(self, whats: Sequence[str]) -> list[world.Scene]:
        """What a set is asked for.

        Args:
            whats: What its LoRAs hold.
        """
        subjects = [what for what in whats if what in world.NEW_SUBJECTS] or list(world.BASE_SUBJECTS)
        styles = [what for what in whats if what in world.NEW_STYLES] or list(world.BASE_STYLES)
        return world.draw(self.count, (self.seed, 5), subjects, styles).scenes

    def drawn(
        self, whats: Sequence[str], what: str, worn: Callable[[], loras.Factors], strength: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The measures of each picture, (count, len(MEASURES)), and the pictures, (count, 16, 16, 3) in [0, 1] in 255 steps.

        Args:
            whats: What is asked for.
            what: A text that tells this model from any other.
            worn: Gives what is worn; not called where the judgement is there.
            strength: Of it.
        """
        asked = [self.count, self.seed, self.steps, sorted(whats), what, strength]
        path = self.folder / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]}.npz"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            scenes = self.scenes(whats)
            with loras.worn(self.model, (worn(), strength)):
                pictures = self.pictures(scenes)
            fresh = path.with_suffix(f".{os.getpid()}.npz")
            np.savez(fresh, found=followed(pictures, scenes), pictures=(pictures * 255).round().astype(np.uint8))
            fresh.replace(path)
        with np.load(path) as there:
            pictures = there["pictures"].astype(np.float32) / 255
            return measured(there["found"][:, :3], pictures), pictures

    def judged(self, whats: Sequence[str], what: str, worn: Callable[[], loras.Factors], strength: float = 1.0) -> np.ndarray:
        """The measures alone: see `drawn`."""
        return self.drawn(whats, what, worn, strength)[0]

    def pictures(self, scenes: Sequence[world.Scene]) -> np.ndarray:
        """Of the model as it is, (n, 16, 16, 3).

        Args:
            scenes: One each.
        """
        features = caption_features([scene.caption for scene in scenes], self.caption)
        chunks = range(0, len(scenes), CHUNK)
        return np.concatenate([pixels(sample(self.model, features[n : n + CHUNK], self.seed + n, self.steps)) for n in chunks])

    def curve(self, paths: Sequence[Path], merged: Merge, strengths: Sequence[float] = STRENGTHS) -> np.ndarray:
        """Judgements of a merge at several strengths, (strengths, count, len(MEASURES)).

        Args:
            paths: LoRAs of the set.
            merged: How they are merged.
            strengths: Of the merge.
        """
        whats = [what_of(path) for path in paths]
        factors: list[loras.Factors] = []

        def worn() -> loras.Factors:
            if not factors:
                factors.append(merged.factors(paths))
            return factors[0]

        name = f"{merged.name} of {' '.join(f'{path.parent.name}/{path.stem}' for path in paths)}"
        return np.stack([self.judged(whats, name, worn, strength) for strength in strengths])


def what_of(path: Path) -> str:
    """What a LoRA holds, by its file's name.

    Args:
        path: As `lora_path` names it.
    """
    return path.name.split("_r")[0]


def followed(pictures: np.ndarray, scenes: Sequence[world.Scene]) -> np.ndarray:
    """How well pictures follow what was asked for, (n, 3): subject, style, prompt (mean of layout, count and light), 0 to 1.

    Args:
        pictures: (n, 16, 16, 3).
        scenes: What was asked for.
    """
    rows = judged(pictures, scenes)
    prompt = [np.mean([row["layout"], row["count"], row["light"]]) for row in rows]
    return np.column_stack([[row["subject"] for row in rows], [row["style"] for row in rows], prompt])


def measured(found: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """(n, len(MEASURES)): subject, style, prompt, burned (0 or 1), excess of burn, score.

    The score is subject x style x prompt in a picture that has not burned, else 0: nothing makes up for what is missing.

    Args:
        found: Of `followed`.
        pictures: (n, 16, 16, 3).
    """
    excess = breakdown(pictures)
    burned = excess > BURNED
    return np.column_stack([found, burned, excess, found.prod(1) * ~burned])


def common(curves: np.ndarray) -> np.ndarray:
    """Judgements at one strength for all sets, chosen on the other half of the sets, (sets, count, len(MEASURES)).

    Args:
        curves: (sets, strengths, count, len(MEASURES)).
    """
    found = np.empty_like(curves[:, 0])
    halves = np.arange(len(curves)) % 2
    for half in (0, 1):
        choice = curves[halves != half][..., -1].mean((0, 2)).argmax()
        found[halves == half] = curves[halves == half, choice]
    return found


def spread(values: np.ndarray, seed: int = 0, draws: int = 4000) -> tuple[float, float, float]:
    """Mean over sets and pictures, with the 2.5th and 97.5th percentile of a bootstrap over sets and over pictures.

    All sets are asked for the same scenes from the same noise, so a picture is drawn for all sets at once. For a difference, give
    the differences: that makes it a paired one.

    Args:
        values: (sets, pictures).
        seed: Of the draws.
        draws: How many.
    """
    random = np.random.default_rng(seed)
    sets, pictures = values.shape
    of_sets = np.apply_along_axis(np.bincount, 1, random.integers(sets, size=(draws, sets)), minlength=sets) / sets
    of_pictures = np.apply_along_axis(np.bincount, 1, random.integers(pictures, size=(draws, pictures)), minlength=pictures)
    means = np.einsum("ds,sp,dp->d", of_sets, values, of_pictures / pictures, optimize=True)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)

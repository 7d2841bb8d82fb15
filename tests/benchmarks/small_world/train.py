"""Training of the base by flow matching, from a seed; it can be stopped and resumed at any step.

The loss is the mean square of the velocity's error at sigma = sigmoid(n), n normal, as in Stable Diffusion 3 (arXiv 2403.03206);
AdamW at a constant rate after a warm-up, and an exponential average of the weights, which is the base. Step n draws its pictures,
its times and its noise from (seed, n) alone, so that a resumed run takes the steps that an unbroken one takes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import world
from model import Size, caption_features, latents, transformer, velocity
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """All that the base's weights follow from, but for the number of steps.

    Attributes:
        size: Of the model.
        seed: Of weights, pictures and noise.
        batch: Pictures of a step.
        rate: Of AdamW.
        warmup: Steps over which the rate rises from 0.
        average: Decay of the weights' average a step; it rises to this as (1 + n) / (10 + n).
        dropped: Chance of a caption to lose a factor.
    """

    size: Size = field(default_factory=Size)
    seed: int = 0
    batch: int = 16
    rate: float = 2e-3
    warmup: int = 30
    average: float = 0.99
    dropped: float = 0.05

    @property
    def name(self) -> str:
        """A hash of the settings, 12 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def default_folder() -> Path:
    """Where weights go: $SMALL_WORLD, else `zit_merge/small_world` in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SMALL_WORLD") or cache / "zit_merge" / "small_world")


@dataclass
class Batch:
    """What the model is trained on in a step.

    Attributes:
        clean: Latents, (n, 3, 16, 16).
        noise: Likewise.
        sigma: (n,) in (0, 1).
        features: Of the captions.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    features: list[Tensor]

    @property
    def noisy(self) -> Tensor:
        """(1 - sigma) * clean + sigma * noise."""
        sigma = self.sigma[:, None, None, None]
        return (1 - sigma) * self.clean + sigma * self.noise

    def loss(self, model: Any) -> Tensor:
        """Mean square error of the velocity.

        Args:
            model: The transformer.
        """
        return (velocity(model, self.noisy, self.sigma, self.features) - (self.noise - self.clean)).square().mean()


def batch(pictures: world.Pictures, caption: int, seed: int) -> Batch:
    """Times and noise for pictures.

    Args:
        pictures: With their captions.
        caption: `Size.caption`.
        seed: Of times and noise.
    """
    random, clean = torch.Generator().manual_seed(seed), latents(pictures.pixels)
    sigma = torch.randn(len(clean), generator=random).sigmoid()
    return Batch(clean, torch.randn(clean.shape, generator=random), sigma, caption_features(pictures.captions, caption))


class Base:
    """The base in training: weights, their average, optimizer, losses so far.

    Args:
        settings: Of the training.
        folder: Where `<hash>/base.pt` is read from, if it is there, and saved.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.path = settings, folder / settings.name / "base.pt"
        self.model = transformer(settings.size, settings.seed)
        self.average = deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.rate, weight_decay=0.01)
        self.losses: list[float] = []
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.losses = state["losses"]

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def save(self) -> None:
        """Replaces the file at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = {"model": self.model, "average": self.average, "optimizer": self.optimizer}
        state = {name: part.state_dict() for name, part in parts.items()}
        fresh = self.path.with_suffix(".new")
        torch.save({**state, "losses": self.losses, "settings": asdict(self.settings)}, fresh)
        fresh.replace(self.path)
        (self.path.parent / "settings.json").write_text(json.dumps(asdict(self.settings), indent=1))

    def advance(self) -> float:
        """One step; returns its loss."""
        settings, step = self.settings, self.step
        pictures = world.draw(settings.batch, (settings.seed, 0, step), dropped=settings.dropped)
        data = batch(pictures, settings.size.caption, (settings.seed << 32) + step)
        self.optimizer.param_groups[0]["lr"] = settings.rate * min(1.0, (step + 1) / settings.warmup)
        loss = data.loss(self.model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        weight = 1 - min(settings.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), weight)
        self.losses.append(loss.item())
        return self.losses[-1]


def train(base: Base, steps: int, save_every: int, saved: Callable[[Base], None] = lambda base: None) -> Iterator[float]:
    """Trains until `steps` steps are done in all; yields the loss of each.

    Args:
        base: What is trained.
        steps: Of all runs together.
        save_every: Steps between two saves; the last step is saved too.
        saved: Called after each save.
    """
    while base.step < steps:
        yield base.advance()
        if base.step % save_every == 0 or base.step == steps:
            base.save()
            saved(base)

"""Training of the base by flow matching and of its few-step student, from a seed; both can be stopped and resumed.

The loss is the mean square of the velocity's error at sigma = sigmoid(n), n normal, as in Stable Diffusion 3 (arXiv 2403.03206).
AdamW at a constant rate after a warm-up, at half of it later; then Muon (https://kellerjordan.github.io/posts/muon) takes over
the matrices of the blocks, at a rate that falls to 0. The result is an exponential average of the weights. Step n draws its
pictures, its times and its noise from (seed, n) alone, so that a resumed run takes the steps that an unbroken one takes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.small_world import world
from tests.benchmarks.small_world.model import Size, caption_features, latents, shifted, sigmas, transformer, velocity


@dataclass(frozen=True)
class Schedule:
    """How the weights of a training change.

    Attributes:
        rate: Of AdamW.
        warmup: Steps over which the rate rises from 0.
        halved: The first step at half the rate.
        average: Decay of the weights' average a step; it rises to this as (1 + n) / (10 + n).
        muon: Rate of Muon.
        muon_from: Its first step.
        falls: Steps from and to which all rates fall linearly, to 0.
    """

    rate: float
    warmup: int
    halved: int
    average: float
    muon: float = 0.0
    muon_from: int = 1 << 30
    falls: tuple[int, int] = (1 << 30, 1 << 31)

    def rates(self, step: int) -> tuple[float, float]:
        """Of AdamW and Muon.

        Args:
            step: Steps done.
        """
        first, last = self.falls
        fall = min(1.0, max(0.0, (last - step) / (last - first)))
        phase = min(1.0, (step + 1) / self.warmup) if step < self.halved else 0.5
        return self.rate * phase * fall, self.muon * fall


@dataclass(frozen=True)
class Settings:
    """All that the base's weights follow from, but for the number of steps.

    Attributes:
        size: Of the model.
        schedule: Of the weights.
        seed: Of weights, pictures and noise.
        batch: Pictures of a step.
        dropped: Chance of a caption to lose a factor.
        shift: Of the sigmas, as the sampler's, so that more of them lie where subject and layout are decided.
        shifted_from: The step with the first shifted sigmas; colours and textures are learned before.
        world: Version of the world.
    """

    size: Size = field(default_factory=Size)
    schedule: Schedule = field(default_factory=lambda: Schedule(2e-3, 30, 1100, 0.99, 2e-3, 4450, (5500, 7000)))
    seed: int = 0
    batch: int = 16
    dropped: float = 0.05
    shift: float = 3.0
    shifted_from: int = 700
    world: int = world.VERSION

    @property
    def name(self) -> str:
        """A hash of the settings, 12 hexadecimal digits."""
        return _hash(self)


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


def batch(pictures: world.Pictures, caption: int, seed: int, shift: float = 1.0) -> Batch:
    """Times and noise for pictures.

    Args:
        pictures: With their captions.
        caption: `Size.caption`.
        seed: Of times and noise.
        shift: Of the times.
    """
    random, clean = torch.Generator().manual_seed(seed), latents(pictures.pixels)
    sigma = shifted(torch.randn(len(clean), generator=random).sigmoid(), shift)
    return Batch(clean, torch.randn(clean.shape, generator=random), sigma, caption_features(pictures.captions, caption))


class Training:
    """A model in training: weights, their average, optimizer, losses so far.

    Args:
        path: Of the checkpoint; read if it is there.
        model: In the state before the first step.
        loss: Of the model in a step, a function of (model, step).
        settings: Stored with the weights.
    """

    def __init__(self, path: Path, model: Any, loss: Callable[[Any, int], Tensor], settings: Settings | Distillation) -> None:
        self.path, self.model, self.loss, self.settings, self.schedule = path, model, loss, settings, settings.schedule
        self.average = deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        self.matrices = [
            p for name, p in model.named_parameters() if p.dim() == 2 and {"attention", "feed_forward"} & {*name.split(".")}
        ]
        self.muon = torch.optim.Muon(self.matrices, weight_decay=0.0)
        self.losses: list[float] = []
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, part in self._parts().items():
                part.load_state_dict(state.get(name) or part.state_dict())
            self.losses = state["losses"]

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "average": self.average, "optimizer": self.optimizer, "muon": self.muon}

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def save(self) -> None:
        """Replaces the checkpoint at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in self._parts().items()}
        fresh = self.path.with_suffix(".new")
        torch.save({**state, "losses": self.losses, "settings": asdict(self.settings)}, fresh)
        fresh.replace(self.path)
        self.path.with_suffix(".json").write_text(json.dumps(asdict(self.settings), indent=1))

    def advance(self) -> float:
        """One step; returns its loss."""
        schedule, step = self.schedule, self.step
        self.optimizer.param_groups[0]["lr"], self.muon.param_groups[0]["lr"] = schedule.rates(step)
        loss = self.loss(self.model, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if step >= schedule.muon_from:
            self.muon.step()
            self.muon.zero_grad()  # AdamW leaves alone what has no gradient
        self.optimizer.step()
        self.model.zero_grad()
        weight = 1 - min(schedule.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), weight)
        self.losses.append(loss.item())
        return self.losses[-1]

    def run(self, steps: int, save_every: int, saved: Callable[[Training], None] = lambda now: None) -> None:
        """Trains until `steps` steps are done in all.

        Args:
            steps: Of all runs together.
            save_every: Steps between two checkpoints; the last step has one too.
            saved: Called after each checkpoint.
        """
        while self.step < steps:
            self.advance()
            if self.step % save_every == 0 or self.step == steps:
                self.save()
                saved(self)


def base(settings: Settings, folder: Path) -> Training:
    """The base, from its last checkpoint if there is one.

    Args:
        settings: Of the training.
        folder: `<hash of the settings>/base.pt` is below it.
    """

    def loss(model: Any, step: int) -> Tensor:
        pictures = world.draw(settings.batch, (settings.seed, 0, step), dropped=settings.dropped)
        shift = settings.shift if step >= settings.shifted_from else 1.0
        return batch(pictures, settings.size.caption, (settings.seed << 32) + step, shift).loss(model)

    return Training(folder / settings.name / "base.pt", transformer(settings.size, settings.seed), loss, settings)


@dataclass(frozen=True)
class Distillation:
    """All that a few-step student follows from, but for its teacher and the number of steps.

    Attributes:
        student: Euler steps of the student.
        each: Steps of the teacher for each of them.
        seed: Of pictures and noise.
        batch: Pictures of a step.
        schedule: Of the weights.
    """

    student: int = 4
    each: int = 4
    seed: int = 0
    batch: int = 16
    schedule: Schedule = field(default_factory=lambda: Schedule(5e-4, 20, 300, 0.98))


def turbo(teacher: Training, of: Settings, settings: Distillation) -> Training:
    """A student that does in one Euler step what its teacher does in several, in the manner of progressive distillation.

    Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (arXiv 2202.00512), algorithm 2, with three
    changes: flow matching's velocity takes the place of their parametrization, deterministic Euler steps that of DDIM; one stage
    replaces `each` steps of the teacher at once where theirs halves them again and again.

    Args:
        teacher: The base, in its state of now; not changed. The checkpoint lies beside its own, under a name with its step.
        of: The base's settings.
        settings: Of the distillation.
    """
    grid = sigmas(settings.student * settings.each)

    def loss(model: Any, step: int) -> Tensor:
        pictures = world.draw(settings.batch, (settings.seed, 1, step), dropped=of.dropped)
        data = batch(pictures, of.size.caption, (settings.seed << 32) + step)
        random = torch.Generator().manual_seed((settings.seed << 32) + step)
        first = torch.randint(settings.student, (settings.batch,), generator=random) * settings.each
        data.sigma = grid[first]
        start = state = data.noisy
        with torch.no_grad():
            for offset in range(settings.each):
                now, following = grid[first + offset], grid[first + offset + 1]
                state = state + (following - now)[:, None, None, None] * velocity(teacher.average, state, now, data.features)
        target = (state - start) / (grid[first + settings.each] - data.sigma)[:, None, None, None]
        return (velocity(model, start, data.sigma, data.features) - target).square().mean()

    path = teacher.path.with_name(f"turbo_{settings.student}_{_hash(settings)}_base{teacher.step}.pt")
    return Training(path, deepcopy(teacher.average).train().requires_grad_(True), loss, settings)


def _hash(settings: Settings | Distillation) -> str:
    return hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:12]

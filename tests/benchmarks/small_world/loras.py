"""LoRAs of the small world: a new subject or a new style, trained by the base's loss on a few pictures, saved as AI-Toolkit does.

Each LoRA changes the eight linear layers of every block of the main stack, as AI-Toolkit's do by default, with alpha = rank. It
starts like those of PEFT and AI-Toolkit: down uniform (Kaiming, a = sqrt 5), up zero.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.benchmarks.small_world import world
from tests.benchmarks.small_world.model import SHIFT
from tests.benchmarks.small_world.train import batch

PREFIX = "diffusion_model."
MODULES = (
    *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
    "adaLN_modulation.0",
)
ADAPTER = "training_adapter"


@dataclass(frozen=True)
class Recipe:
    """How a LoRA is trained.

    Attributes:
        what: A key of `NEW_SUBJECTS` or `NEW_STYLES`; `ADAPTER` for a LoRA on base pictures, which undoes the distillation and
            is worn while others are trained.
        rank: Of every module.
        seed: Of pictures, weights and noise.
        steps: How many.
        pictures: How many there are to train on.
        batch: Pictures of a step.
        rate: Of AdamW.
    """

    what: str
    rank: int = 8
    seed: int = 0
    steps: int = 200
    pictures: int = 32
    batch: int = 8
    rate: float = 5e-3

    def draw(self) -> world.Pictures:
        """The pictures: the new subject in the base's styles, or the base's subjects in the new style."""
        subjects = (self.what,) if self.what in world.NEW_SUBJECTS else tuple(world.BASE_SUBJECTS)
        styles = (self.what,) if self.what in world.NEW_STYLES else tuple(world.BASE_STYLES)
        return world.draw(self.pictures, (self.seed, 2), subjects, styles)


Factors = Mapping[str, tuple[Tensor, Tensor]]  # module -> up (out, rank), down (rank, in); alpha = rank


def targets(model: Any) -> dict[str, nn.Linear]:
    """The linear layers that a LoRA changes, by name.

    Args:
        model: The transformer.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: linears[name] for name in (f"layers.{n}.{part}" for n in range(len(model.layers)) for part in MODULES)}


@contextmanager
def worn(model: Any, *loras: tuple[Factors, float]) -> Iterator[None]:
    """The model with LoRAs added, by hooks.

    Args:
        model: The transformer.
        loras: Each with its strength.
    """
    hooks = []
    for factors, strength in loras:
        for name, linear in targets(model).items():
            if name in factors:
                up, down = factors[name]

                def add(_, given, found, up=up, down=down, strength=strength):
                    return found + strength * (given[0] @ down.T) @ up.T

                hooks.append(linear.register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def train_lora(
    model: Any,
    recipe: Recipe,
    caption: int,
    adapter: Factors | None = None,
    stepped: Callable[[int, Factors], None] = lambda step, factors: None,
) -> tuple[dict, list[float]]:
    """Trains a LoRA on a model, whose own weights stay; returns its factors and the loss of each step.

    Args:
        model: What it is trained on.
        recipe: How.
        caption: `Size.caption`.
        adapter: Worn at strength 1 during the training, and not part of the result.
        stepped: Called after each step with the number of steps done and the factors, which go on changing.
    """
    random = torch.Generator().manual_seed(zlib.crc32(f"{recipe.what} {recipe.seed}".encode()))
    model.requires_grad_(False)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, linear in targets(model).items():
        bound = 1 / math.sqrt(linear.in_features)
        down = (torch.rand(recipe.rank, linear.in_features, generator=random) * 2 - 1) * bound
        factors[name] = torch.zeros(linear.out_features, recipe.rank).requires_grad_(), down.requires_grad_()
    weights = [part for pair in factors.values() for part in pair]
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=1e-4)
    pictures, losses = recipe.draw(), []
    others = [(adapter, 1.0)] if adapter else []
    with worn(model, (factors, 1.0), *others):
        for step in range(recipe.steps):
            chosen = torch.randperm(recipe.pictures, generator=random)[: recipe.batch].tolist()
            some = world.Pictures(
                pictures.pixels[chosen], [pictures.scenes[n] for n in chosen], [pictures.captions[n] for n in chosen]
            )
            loss = batch(some, caption, (recipe.seed << 32) + step, SHIFT).loss(model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            stepped(step + 1, {name: (up.detach(), down.detach()) for name, (up, down) in factors.items()})
    return {name: (up.detach(), down.detach()) for name, (up, down) in factors.items()}, losses


def save(path: Path, factors: Factors) -> None:
    """Writes a file with AI-Toolkit's names, in float32.

    Args:
        path: Replaced if it is there.
        factors: Of the LoRA.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (up, down) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = down.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up.contiguous()
    save_file(tensors, path, {"format": "pt"})


def load(path: Path) -> Factors:
    """Reads a file of `save`, or a merge in AI-Toolkit's names whose alpha is its rank.

    Args:
        path: The file.
    """
    tensors = load_file(path)
    downs = [key for key in tensors if key.endswith(".lora_A.weight")]
    stems = {key.removesuffix(".lora_A.weight") for key in downs}
    return {
        stem.removeprefix(PREFIX): (tensors[f"{stem}.lora_B.weight"].float(), tensors[f"{stem}.lora_A.weight"].float())
        for stem in stems
    }

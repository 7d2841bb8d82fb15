"""Z-Image's own transformer at a width for two cores, with fixed maps in place of the text encoder and the VAE.

`ZImageTransformer2DModel` of diffusers with all 30 layers and 2 + 2 refiner blocks. A caption becomes one fixed random vector per
word, in the form of Z-Image's caption features: a list of (words, cap_feat_dim). A picture becomes latents by a fixed linear
map of its three colours. Times and signs are those of diffusers' `ZImagePipeline`: the model gets 1 - sigma and returns the
clean latents minus the noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHANNELS = 3
SHIFT = 3.0  # scheduler_config.json of Tongyi-MAI/Z-Image-Turbo: shift
# Rows: brightness, red against blue, green against both; orthogonal, each scaled to about unit variance over the world
_ROWS = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]]) / torch.tensor([[3.0], [2.0], [6.0]]).sqrt()
_SCALE = torch.tensor([[3.0], [7.5], [12.0]])
COLOURS, BACK = _ROWS * _SCALE, (_ROWS / _SCALE).T
MIDDLE = 0.43  # mean of the world's pixels


@dataclass(frozen=True)
class Size:
    """Of the transformer.

    Attributes:
        width: Of the residual stream; heads of 24.
        layers: Of the main stack; Z-Image has 30.
        refiners: Blocks of each of the two refiners; Z-Image has 2.
        caption: Width of the caption features.
    """

    width: int = 48
    layers: int = 30
    refiners: int = 2
    caption: int = 32


def transformer(size: Size, seed: int) -> Any:
    """The untrained model in float32.

    Args:
        size: Of the model.
        seed: Of its weights.
    """
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(seed)
    return ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=CHANNELS,
        dim=size.width,
        n_layers=size.layers,
        n_refiner_layers=size.refiners,
        n_heads=size.width // 24,
        n_kv_heads=size.width // 24,
        cap_feat_dim=size.caption,
        axes_dims=[8, 8, 8],
        axes_lens=[128, 32, 32],
    )


def latents(pixels: np.ndarray) -> Tensor:
    """(n, 16, 16, 3) in [0, 1] -> (n, 3, 16, 16), about unit variance.

    Args:
        pixels: Of pictures.
    """
    return torch.einsum("cd,nhwd->nchw", COLOURS, torch.from_numpy(pixels).float() - MIDDLE)


def pixels(latents: Tensor) -> np.ndarray:
    """The inverse of `latents`, cut to [0, 1].

    Args:
        latents: (n, 3, 16, 16).
    """
    return (torch.einsum("dc,nchw->nhwd", BACK, latents) + MIDDLE).clamp(0, 1).numpy()


@cache
def _word(word: str, width: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(zlib.crc32(word.encode())).normal(size=width).astype(np.float32))


def caption_features(captions: Sequence[str], width: int) -> list[Tensor]:
    """One (words, width) tensor for each caption; an empty caption is one vector of its own.

    Args:
        captions: Words with spaces between them; each has a fixed vector, known or not.
        width: `Size.caption`.
    """
    return [torch.stack([_word(word, width) for word in caption.split() or [""]]) for caption in captions]


def velocity(model: Any, noisy: Tensor, sigma: Tensor, features: list[Tensor]) -> Tensor:
    """Noise minus clean latents as the model sees them, (n, 3, 16, 16).

    Args:
        model: The transformer.
        noisy: (1 - sigma) * clean + sigma * noise, (n, 3, 16, 16).
        sigma: (n,) in (0, 1].
        features: Of the captions.
    """
    found = model(list(noisy.unsqueeze(2).unbind(0)), 1 - sigma, features, return_dict=False)[0]
    return -torch.stack(found).squeeze(2)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Sigmas nearer to 1, by the rule of diffusers' `FlowMatchEulerDiscreteScheduler`.

    Args:
        sigma: In [0, 1].
        shift: 1 changes nothing.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas(steps: int) -> Tensor:
    """From 1 to 0 with Z-Image's shift of 3, (steps + 1,).

    Args:
        steps: Of Euler's method.
    """
    return shifted(torch.linspace(1, 0, steps + 1), SHIFT)


@torch.no_grad()
def sample(model: Any, features: list[Tensor], seed: int, steps: int = 16) -> Tensor:
    """Latents from noise by Euler's method, (n, 3, 16, 16).

    Args:
        model: The transformer.
        features: Of the captions, one picture each.
        seed: Of the noise.
        steps: How many calls of the model.
    """
    random = torch.Generator().manual_seed(seed)
    state = torch.randn(len(features), CHANNELS, 16, 16, generator=random)
    for now, following in pairwise(sigmas(steps)):
        state = state + (following - now) * velocity(model, state, now.expand(len(state)), features)
    return state

"""A model of the small world as a folder that diffusers' `ZImagePipeline` and AI-Toolkit load as a Z-Image.

- transformer: as it is.
- text encoder: a Qwen3 of one layer. Z-Image reads the last but one hidden state, which is then the embedding of the token: the
  fixed vector of a word. The tokenizer knows the world's words, and its chat template leaves nothing but them.
- VAE: an `AutoencoderKL` with Z-Image's reduction by 8, its scale and its shift. Its weights make it the linear map of
  `model.latents` for pictures enlarged by 8: see `vae`.
- scheduler: Z-Image-Turbo's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.small_world import world
from tests.benchmarks.small_world.model import BACK, CHANNELS, COLOURS, MIDDLE, SHIFT, caption_features

REDUCED = 8  # pixels of an enlarged picture for one of the world's: the VAE halves three times
SCALE, OFFSET = 0.3611, 0.1159  # vae/config.json of Tongyi-MAI/Z-Image-Turbo: scaling_factor, shift_factor
PINNED = 2.0**12  # of the constant channels of `vae`: the share of the values in the deviation falls with its square
SMALL = 2.0**8  # by which values are divided for the last activation: an error of the mean then cancels in the difference
EMPTY, PAD = "<empty>", "<pad>"
TEMPLATE = "{% for message in messages %}{{ message['content'] if message['content'].strip() else '" + EMPTY + "' }}{% endfor %}"
WORDS = [*world.COUNTS[1:], *world.SUBJECTS, *world.CELLS, *world.STYLES, *world.LIGHTS]


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Each pixel eight times in both directions: (n, 16, 16, 3) -> (n, 128, 128, 3).

    Args:
        pixels: Of pictures.
    """
    return pixels.repeat(REDUCED, axis=1).repeat(REDUCED, axis=2)


# --- VAE -----------------------------------------------------------------------------------------------------------------------


def _signed(matrix: Tensor) -> Tensor:
    """Eight channels of which the first six hold each output of a (3, n) map and its negative: (8, n).

    Args:
        matrix: The map.
    """
    return torch.cat([matrix, -matrix, torch.zeros(2, matrix.shape[1])])


def _point(conv: Any, weight: Tensor, bias: Tensor | None = None, tap: int = 1) -> None:
    """Makes a convolution look at one pixel only.

    Args:
        conv: Of 3 x 3.
        weight: (out, in).
        bias: (out,); 0 by default.
        tap: Row and column of that pixel; 1 is the middle.
    """
    conv.weight.zero_()
    conv.weight[:, :, tap, tap] = weight
    conv.bias.zero_()
    if bias is not None:
        conv.bias.copy_(bias)


def _linear(half: Any, enter: tuple[Tensor, Tensor], leave: tuple[Tensor, Tensor]) -> None:
    """Makes an encoder or a decoder a linear map of single pixels.

    The eight channels are three values, their negatives, and two constants, +PINNED and -PINNED. Residual branches are zero. The
    last group norm has one group: its mean is 0 by the signs, its deviation PINNED / 2 but for the values' own share, and its
    weight undoes it. Since silu(x) - silu(-x) = x, the difference of a value and its negative passes the last activation
    unchanged.

    Args:
        half: Encoder or decoder.
        enter: Weight (3, in) and bias (3,) from its input to the values.
        leave: Weight (out, 3) and bias (out,) from the values to its output.
    """
    for block in half.modules():
        if type(block).__name__ == "ResnetBlock2D":
            block.conv2.weight.zero_()
            block.conv2.bias.zero_()
        elif type(block).__name__ in ("Downsample2D", "Upsample2D"):
            # a down-sampling picks the upper left pixel of four: it pads on the other sides
            _point(block.conv, torch.eye(8), tap=0 if type(block).__name__ == "Downsample2D" else 1)
    weight, bias = (_signed(part.reshape(3, -1)) for part in enter)
    bias[6:, 0] = torch.tensor([PINNED, -PINNED])
    _point(half.conv_in, weight, bias[:, 0])
    half.conv_norm_out.weight.fill_(PINNED / 2 / SMALL)
    half.conv_norm_out.bias.zero_()
    _point(half.conv_out, _signed(leave[0].T).T * SMALL, leave[1])


@torch.no_grad()
def vae() -> Any:
    """An `AutoencoderKL` that is the world's map between enlarged pictures and latents, in float32.

    It takes pictures in [-1, 1], (n, 3, 8 h, 8 w), looks at the upper left pixel of each 8 x 8, and gives latents before scale
    and shift, (n, 3, h, w), with a deviation of exp(-15).
    """
    from diffusers import AutoencoderKL

    made: Any = AutoencoderKL(
        latent_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=1,
        scaling_factor=SCALE,
        shift_factor=OFFSET,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=world.SIZE * REDUCED,
    )
    # latents = COLOURS (picture / 2 + 1/2 - MIDDLE), and SCALE (encoded - OFFSET) = latents
    mean = COLOURS / (2 * SCALE), COLOURS.sum(1) * (0.5 - MIDDLE) / SCALE + OFFSET
    fixed = torch.zeros(CHANNELS, 3), torch.full((CHANNELS,), -30.0)  # logarithm of the variance
    _linear(made.encoder, (torch.eye(3), torch.zeros(3)), (torch.cat([mean[0], fixed[0]]), torch.cat([mean[1], fixed[1]])))
    back = BACK * (2 * SCALE)
    _linear(made.decoder, (back, -back.sum(1) * OFFSET + 2 * MIDDLE - 1), (torch.eye(3), torch.zeros(3)))
    return made.eval()


# --- captions ------------------------------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    """One token for each of the world's words, `EMPTY` for a caption without any.

    It raises for a word of no picture.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate([PAD, EMPTY, *WORDS])}))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, chat_template=TEMPLATE, padding_side="right")


@torch.no_grad()
def text_encoder(caption: int) -> Any:
    """A Qwen3 whose last but one hidden state is `caption_features`.

    Args:
        caption: `Size.caption`.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    vectors = torch.cat(caption_features(["", *WORDS], caption))
    config = Qwen3Config(
        vocab_size=1 + len(vectors),
        hidden_size=caption,
        intermediate_size=caption,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=caption,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    made = Qwen3ForCausalLM(config).eval()
    made.get_input_embeddings().weight[1:] = vectors
    return made


# --- the whole -----------------------------------------------------------------------------------------------------------------


def export(transformer: Any, folder: Path) -> None:
    """Writes the pipeline.

    Args:
        transformer: A model of the small world.
        folder: Made; files of the same names are replaced.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    whole: Any = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, use_dynamic_shifting=False, shift=SHIFT),
        vae=vae(),
        text_encoder=text_encoder(transformer.config.cap_feat_dim),
        tokenizer=tokenizer(),
        transformer=transformer,
    )
    whole.save_pretrained(folder)

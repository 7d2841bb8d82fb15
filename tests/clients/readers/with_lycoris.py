"""lycoris-lora reads LoRAs: `create_lycoris_from_weights`, `apply_to`, and what the modules answer to the unit vectors.

--flat first makes the keys flat, as LyCORIS spells them (`lycoris_layers_0_attention_to_q.lora_up.weight`); without it only its
prefix is set to the file's, which `LycorisNetwork.apply_preset` allows. Modules are asked, not merged: LyCORIS' own merging of
LoHa and LoKr applies alpha twice.
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path

import answers
import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from safetensors.torch import load_file

FLAT = "--flat" in sys.argv


def read(path: Path) -> answers.Deltas:
    """What every linear answers to the unit vectors; the base answers zero."""
    tensors = load_file(path)
    first = next(iter(tensors))
    prefix = "lora_unet" if first.startswith("lora_unet_") else "lycoris"
    if FLAT and not first.startswith(prefix):
        tensors = {_flat(key): tensor for key, tensor in tensors.items()}
    LycorisNetwork.apply_preset({"lora_prefix": prefix})
    model = answers.zero_model()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    network, _ = create_lycoris_from_weights(1.0, str(path), model, weights_sd=tensors)
    network.apply_to()
    network.eval()
    with torch.no_grad():
        return {name: module(torch.eye(module.in_features)).T.clone() for name, module in linears.items()}


def _flat(key: str) -> str:
    """`diffusion_model.layers.0.w.lora_A.weight` -> `lycoris_layers_0_w.lora_down.weight`."""
    module, suffix = re.match(r"(?:diffusion_model\.|transformer\.)?(.*?)\.((?:lora_|lokr_|alpha|diff).*)$", key).groups()
    suffix = suffix.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
    return f"lycoris_{module.replace('.', '_')}.{suffix}"


answers.main("lycoris-lora", version("lycoris-lora"), read, *(word for word in sys.argv[1:] if word != "--flat"))

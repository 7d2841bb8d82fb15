"""Run in AI-Toolkit's folder: its own DoRA module around a linear layer, its tensors and the weight that it amounts to.

usage: dora_in_toolkit.py OUTPUT
"""

import sys

import torch
from safetensors.torch import save_file
from toolkit.models.DoRA import DoRAModule

torch.manual_seed(0)
linear = torch.nn.Linear(24, 40, bias=False)


class Network:
    """As much of one as a module asks for."""

    is_lorm = is_merged_in = False
    is_active = True
    _multiplier, torch_multiplier = 1.0, torch.ones(1)
    peft_format, base_model_ref = True, None


network = Network()
module = DoRAModule("x", linear, lora_dim=4, alpha=4, network=network)
with torch.no_grad():
    for parameter in module.parameters():
        if parameter is not linear.weight:
            parameter += 0.3 * torch.randn(parameter.shape)
    module.apply_to()
    changed = linear(torch.eye(24)[None])[0].T
    tensors = {"lora_A.weight": module.lora_down.weight, "lora_B.weight": module.lora_up.weight, "magnitude": module.magnitude}
    save_file({k: t.detach().contiguous() for k, t in (tensors | {"W": linear.weight, "changed": changed}).items()}, sys.argv[1])

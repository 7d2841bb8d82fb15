"""Run in AI-Toolkit's folder: its own network loads a LoRA file, and holds the delta that is wanted in every module.

usage: load_in_toolkit.py MODEL LORA WANTED
"""

import sys

import torch
from toolkit_network import loaded

model, lora, wanted = sys.argv[1:]
_, network = loaded(model, lora)
wanted = torch.load(wanted)
for module in network.unet_loras:
    name = module.lora_name.replace("$$", ".").removeprefix("transformer.")
    got = module.lora_up.weight.double() @ module.lora_down.weight.double() * float(module.scale)
    assert (got - wanted.pop(name)).norm() <= 1e-6 * got.norm(), name
assert not wanted, list(wanted)[:5]
print(len(network.unet_loras), "modules agree")

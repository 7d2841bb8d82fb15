"""Run in AI-Toolkit's folder: its own network loads a LoRA file, and holds the delta that is wanted in every module.

usage: load_in_toolkit.py MODEL LORA WANTED
"""

import sys

import torch
from safetensors import safe_open
from toolkit.accelerator import get_accelerator
from toolkit.config_modules import ModelConfig, NetworkConfig
from toolkit.lora_special import LoRASpecialNetwork
from toolkit.util.get_model import get_model_class

model, lora, wanted = sys.argv[1:]
config = ModelConfig(name_or_path=model, arch="zimage:turbo", dtype="fp32")
Model = get_model_class(config)
sd = Model(device=get_accelerator().device, model_config=config, dtype="fp32", noise_scheduler=Model.get_train_scheduler())
sd.load_model()
with safe_open(lora, "pt") as file:
    rank = file.get_slice("diffusion_model.layers.0.attention.to_k.lora_A.weight").get_shape()[0]
network = LoRASpecialNetwork(
    text_encoder=sd.text_encoder,
    unet=sd.get_model_to_train(),
    lora_dim=rank,
    alpha=rank,
    train_unet=True,
    train_text_encoder=False,
    network_config=NetworkConfig(type="lora", linear=rank, linear_alpha=rank),
    network_type="lora",
    transformer_only=True,
    is_transformer=sd.is_transformer,
    target_lin_modules=sd.target_lora_modules,
    base_model=sd,
)
network.apply_to(sd.text_encoder, sd.unet, False, True)
unmatched = network.load_weights(lora)
assert unmatched is None, list(unmatched)[:5]
wanted = torch.load(wanted)
for module in network.unet_loras:
    name = module.lora_name.replace("$$", ".").removeprefix("transformer.")
    got = module.lora_up.weight.double() @ module.lora_down.weight.double() * float(module.scale)
    assert (got - wanted.pop(name)).norm() <= 1e-6 * got.norm(), name
assert not wanted, list(wanted)[:5]
print(len(network.unet_loras), "modules agree")

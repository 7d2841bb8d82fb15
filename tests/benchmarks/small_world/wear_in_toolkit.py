"""Run with AI-Toolkit: the prediction that its trainer asks for, while its own network wears a LoRA.

usage: wear_in_toolkit.py PIPELINE LORA GIVEN OUT [TRAINING_ADAPTER]

GIVEN holds noisy (n, 3, h, w), sigma (n,) and features, a list of (words, width); OUT gets the prediction, (n, 3, h, w).
"""

import sys

import torch
from safetensors import safe_open
from toolkit.accelerator import get_accelerator
from toolkit.config_modules import ModelConfig, NetworkConfig
from toolkit.lora_special import LoRASpecialNetwork
from toolkit.prompt_utils import PromptEmbeds
from toolkit.util.get_model import get_model_class

pipeline, lora, given, out, *adapter = sys.argv[1:]
config = ModelConfig(name_or_path=pipeline, arch="zimage:turbo", dtype="fp32", assistant_lora_path=next(iter(adapter), None))
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
sd.network = network
network.apply_to(sd.text_encoder, sd.unet, False, True)
network._update_torch_multiplier()
unmatched = network.load_weights(lora)
assert unmatched is None, list(unmatched)[:5]
data = torch.load(given)
with torch.no_grad(), network:
    embeds = PromptEmbeds([data["features"], None])
    torch.save(sd.get_noise_prediction(data["noisy"], data["sigma"] * 1000, embeds).cpu(), out)

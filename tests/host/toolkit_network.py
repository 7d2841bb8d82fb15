"""In AI-Toolkit: its own network with a LoRA file loaded, as a training has it."""

from typing import Any

from safetensors import safe_open
from toolkit.accelerator import get_accelerator
from toolkit.config_modules import ModelConfig, NetworkConfig
from toolkit.lora_special import LoRASpecialNetwork
from toolkit.util.get_model import get_model_class


def loaded(model: str, lora: str, adapter: str | None = None) -> tuple[Any, LoRASpecialNetwork]:
    """AI-Toolkit's model, and its network that has read the whole file.

    Args:
        model: A folder of Z-Image.
        lora: Of one rank in all modules.
        adapter: A training adapter, merged in while a LoRA is trained.
    """
    config = ModelConfig(name_or_path=model, arch="zimage:turbo", dtype="fp32", assistant_lora_path=adapter)
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
    return sd, network

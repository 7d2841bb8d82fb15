"""AI-Toolkit reads LoRAs. Run in its folder: its code reads git and relative paths there.

--assistant: as the assistant LoRA of a Z-Image model, which `load_training_adapter` merges into the transformer.
--training: as the file that a training goes on from (`pretrained_lora_path`, resume): a network of the file's largest rank, made
as the trainer makes it (only the layers), loads it and is merged in.
"""

import sys
import tempfile
from pathlib import Path

import answers
import torch
from host import tiny_zimage
from safetensors.torch import load_file
from toolkit.accelerator import get_accelerator
from toolkit.config_modules import ModelConfig, NetworkConfig
from toolkit.lora_special import LoRASpecialNetwork
from toolkit.util.get_model import get_model_class
from version import VERSION

ASSISTANT = "--assistant" in sys.argv
FOLDER = Path(tempfile.mkdtemp())


def _model(**config):
    config = ModelConfig(name_or_path=str(FOLDER), arch="zimage:turbo", dtype="fp32", **config)
    Model = get_model_class(config)
    model = Model(device=get_accelerator().device, model_config=config, dtype="fp32", noise_scheduler=Model.get_train_scheduler())
    model.load_model()
    return model


def _network(model, path: Path):
    tensors = load_file(path)
    lokr = any(".lokr_" in key for key in tensors)
    ranks = [t.shape[0] for key, t in tensors.items() if key.endswith(("lora_A.weight", "lora_down.weight"))]
    rank = max(ranks, default=1)
    config = NetworkConfig(type="lokr" if lokr else "lora", linear=rank, linear_alpha=rank)
    return LoRASpecialNetwork(
        text_encoder=model.text_encoder,
        unet=model.get_model_to_train(),
        lora_dim=config.linear,
        alpha=config.linear_alpha,
        train_unet=True,
        train_text_encoder=False,
        network_config=config,
        network_type=config.type,
        transformer_only=config.transformer_only,
        is_transformer=model.is_transformer,
        target_lin_modules=model.target_lora_modules,
        base_model=model,
    )


def read(path: Path) -> answers.Deltas:
    """The weights after the toolkit has merged the file in; the base is zero."""
    if ASSISTANT:
        return answers.weights(_model(assistant_lora_path=str(path)).get_model_to_train())
    model = _model()
    transformer = model.get_model_to_train()
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    network = _network(model, path)
    network.apply_to(model.text_encoder, model.unet, False, True)
    network.force_to(torch.device("cpu"), dtype=torch.float32)
    network._update_torch_multiplier()
    network.load_weights(str(path))
    network.merge_in(merge_weight=1.0)
    return {name: module.weight.detach().float().clone() for name, module in linears.items()}


tiny_zimage.make_model(FOLDER)
_transformer = tiny_zimage.transformer()
answers.zero_linears(_transformer)
_transformer.save_pretrained(FOLDER / "transformer")
answers.main("AI-Toolkit", VERSION, read, *(word for word in sys.argv[1:] if not word.startswith("--")))

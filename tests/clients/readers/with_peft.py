"""PEFT reads LoRAs: an adapter made for the file, and `set_peft_model_state_dict`.

A file holds no PEFT config, so one is made here: the prefix is taken off, the rank of every module is read from its shape, and
lora_alpha is the rank, or what `lora_adapter_metadata` says. PEFT knows no `.alpha` keys: they are left out.
"""

import json
import re
from pathlib import Path

import answers
import peft
from safetensors import safe_open
from safetensors.torch import load_file

PREFIXES = ("diffusion_model.", "transformer.", "base_model.model.")
WHOLE = 10**6  # a rank larger than any factor: so PEFT makes both of them whole


def read(path: Path) -> answers.Deltas:
    """The weights after `merge_and_unload`; the base is zero."""
    tensors = {_without_prefix(key): tensor for key, tensor in load_file(path).items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    config = _lokr(tensors) if any(".lokr_" in key for key in tensors) else _lora(tensors, path)
    model = peft.get_peft_model(answers.zero_model(), config)
    peft.set_peft_model_state_dict(model, {f"base_model.model.{key}": tensor for key, tensor in tensors.items()})
    return answers.weights(model.merge_and_unload())


def _without_prefix(key: str) -> str:
    return next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)


def _lora(tensors: dict, path: Path) -> peft.LoraConfig:
    ranks = {key.removesuffix(".lora_A.weight"): t.shape[0] for key, t in tensors.items() if key.endswith(".lora_A.weight")}
    if not ranks:  # nothing that PEFT calls LoRA
        return peft.LoraConfig(r=1, target_modules=["to_q"])
    with safe_open(path, "pt") as file:
        told = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    told = {key.removeprefix("transformer."): value for key, value in told.items()}
    if not told:
        patterns = {"^" + re.escape(module) + "$": rank for module, rank in ranks.items()}
        most = max(ranks.values())
        told = {"r": most, "lora_alpha": most, "rank_pattern": patterns, "alpha_pattern": patterns}
    return peft.LoraConfig(**told | {"target_modules": list(ranks)})


def _lokr(tensors: dict) -> peft.LoKrConfig:
    """PEFT tells from the rank which factors are whole; alpha is the rank, so that the scale is 1."""
    modules = dict.fromkeys(key.partition(".lokr_")[0] for key in tensors)
    ranks = {f"^{re.escape(m)}$": tensors[f"{m}.lokr_w2_b"].shape[0] for m in modules if f"{m}.lokr_w2_b" in tensors}
    settings = {"rank_pattern": ranks, "alpha_pattern": ranks, "init_weights": "lycoris"}
    return peft.LoKrConfig(r=WHOLE, alpha=WHOLE, target_modules=list(modules), **settings)


answers.main("PEFT", peft.__version__, read)

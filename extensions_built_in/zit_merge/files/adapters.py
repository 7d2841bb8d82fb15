"""LoRAs on the hub that many others stand on: short names of training adapters and distillation LoRAs of Z-Image."""

from __future__ import annotations

from collections.abc import Mapping

_OSTRIS = "hf:ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter"
_DISTILL = "hf:alibaba-pai/Z-Image-Fun-Lora-Distill/Z-Image-Fun-Lora-Distill"
ADAPTERS: Mapping[str, str] = {
    "ostris_v1": f"{_OSTRIS}_v1.safetensors",  # AI-Toolkit's: a training over it leaves the distillation to Turbo
    "ostris_v2": f"{_OSTRIS}_v2.safetensors",
    "fizgig": "hf:ShootTheSound/Fizgig-Z-Image-Turbo-Training-Adapter/fizgig_z_image_turbo_training_adapter.safetensors",
    "distill_patch": "hf:DiffSynth-Studio/Z-Image-Turbo-DistillPatch/model.safetensors",  # gives Turbo's few steps back
    "fun_distill_8": f"{_DISTILL}-8-Steps-2603-ComfyUI.safetensors",  # makes Base one of few steps
    "fun_distill_4": f"{_DISTILL}-4-Steps-2603-ComfyUI.safetensors",
}

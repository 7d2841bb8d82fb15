"""ComfyUI reads LoRAs: its own code from a checkout (clients/comfyui_source.py), on a Z-Image of zeros."""

from pathlib import Path

import answers
from clients import comfyui_source
from clients.table import SHAPES
from safetensors.torch import load_file


def read(path: Path) -> answers.Deltas:
    """What the file changes."""
    return comfyui_source.apply(load_file(path), SHAPES).deltas


answers.main("ComfyUI", comfyui_source.version(), read)

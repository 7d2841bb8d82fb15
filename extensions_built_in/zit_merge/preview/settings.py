"""What a picture is rendered with: the model, and everything else but the LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIDE, STEPS, GUIDANCE, SEED = 1024, 9, 1.0, 42  # AI-Toolkit's UI for zimage:turbo (ui/src/app/jobs/new/options.tsx)
MULTIPLE = 16  # pixels: 8 of the VAE times 2 of a patch (ZImageModel.get_bucket_divisibility)
SMALLEST = 64  # pixels: the shortest side of GenerateImageConfig

# Settings of a model that decide only where and when it is computed, or that are overridden for pictures. Layer offloading is
# not among them: it changes how weights are quantized.
_INDIFFERENT = ("low_vram", "assistant_lora_path", "inference_lora_path", "compile", "dtype")


@dataclass(frozen=True)
class ImageSpec:
    """Everything of a picture but the model and the LoRA.

    Attributes:
        prompt: With the trigger word in place.
        seed: Of the noise.
        width: Pixels.
        height: Pixels.
        steps: As AI-Toolkit counts them.
        guidance: As AI-Toolkit counts it: 1 is none.
        negative: The negative prompt.
    """

    prompt: str
    seed: int = SEED
    width: int = SIDE
    height: int = SIDE
    steps: int = STEPS
    guidance: float = GUIDANCE
    negative: str = ""

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class RenderSettings:
    """The model that renders, and the samples of its training.

    Attributes:
        model: `model:` of the training or the section, for AI-Toolkit's ModelConfig.
        dtype: Of the model.
        samples: `sample:` of the training or the section.
        trigger: The trigger word; None if there is none.
        loc: Of the model in the config.
        device: `device:` of the section.
        samples_loc: Of the samples in the config.
        row: How many samples a training makes at a time, which is the length of a row in AI-Toolkit's gallery.
    """

    model: Mapping[str, Any]
    dtype: str
    samples: Mapping[str, Any]
    trigger: str | None
    loc: str
    device: str = "auto"
    samples_loc: str = "sample"
    row: int = 1

    def record(self) -> dict[str, Any]:
        """What a picture depends on, for JSON: the model's settings, and name, size and time of its local files.

        Folders are left out: a model may be moved, and a picture be shared.
        """
        settings = {key: value for key, value in self.model.items() if key not in _INDIFFERENT}
        paths = {key: settings[key] for key in ("name_or_path", "extras_name_or_path") if isinstance(settings.get(key), str)}
        settings |= {key: _short(path) for key, path in paths.items()}
        return {"model": settings, "dtype": self.dtype, "files": [stat for path in paths.values() for stat in _stats(path)]}

    @property
    def name(self) -> str:
        """The model's name: its repository, or its folder or file without the path."""
        return _short(self.model["name_or_path"])


def _short(name: str) -> str:
    path = Path(name).expanduser()
    return path.absolute().name if path.exists() else name


def _stats(name: str) -> list[tuple[str, int, int]]:
    """(name, size, time) of the weights of a local model; empty for a repository."""
    path = Path(name).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.safetensors") if p.is_file())
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]

"""Pictures of Z-Image with a LoRA, the model loaded as AI-Toolkit loads it for a training.

The LoRA is no network of the toolkit's: that one cuts files whose rank is larger than its own, keeps what a file before left in
modules that the next one lacks, and by default is merged into the base weights and out again, which changes them in bf16. Here
every linear layer gets a hook that adds what the change makes of its input, in float32 as the toolkit's network does. Weights
are never touched, quantized or not; ranks, forms and modules may be any.
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..algebra.delta import Delta, applied
from ..algebra.factors import Factors
from ..errors import ZitMergeError
from ..execute import pick_device
from ..preview.scene import Scene, Shot
from . import toolkit

if TYPE_CHECKING:
    from PIL.Image import Image


class Renderer:
    """The base model of a scene, loaded once, and one LoRA at a time on it.

    Args:
        scene: The model.

    Raises:
        ZitMergeError: The model can't be loaded, or is no Z-Image; there is not enough memory; the toolkit lacks a part.
    """

    def __init__(self, scene: Scene):
        self._scene, self._hooks = scene, list[torch.utils.hooks.RemovableHandle]()
        self.device = toolkit.accelerator().device if scene.device == "auto" else pick_device(scene.device)
        with _memory(scene, "while the model was loaded"), _loading(scene):
            self._model = _load(scene, self.device)
        transformer = toolkit.unwrap(self._model.unet)
        self._linears = {name: m for name, m in transformer.named_modules() if hasattr(m, "in_features")}
        if "layers.0.attention.to_q" not in self._linears:
            self.close()
            raise ZitMergeError(f"{scene.place}.name_or_path: {scene.model['name_or_path']} is no Z-Image: give one")

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the model and of the memory that it took."""
        self.wear(())
        self._model, self._linears = None, {}
        gc.collect()
        toolkit.flush()

    def wear(self, deltas: Iterable[tuple[str, Delta]]) -> None:
        """Puts a LoRA on the model in the place of the one before.

        Args:
            deltas: (module, change); modules that are not named are those of the base model.

        Raises:
            ZitMergeError: A change that the model has no place for.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        with _memory(self._scene, "while a LoRA was put on the model"):
            for module, delta in deltas:
                if any(bool(factor.any()) for factor in _ups(delta)):
                    self._hooks.append(self._linear(module, delta).register_forward_hook(adding(delta, self.device)))

    def _linear(self, module: str, delta: Delta) -> nn.Module:
        linear = self._linears.get(module)
        have = (linear.out_features, linear.in_features) if linear else None
        if have != delta.shape:
            what = f"{have[0]} x {have[1]}" if have else "missing"
            raise ZitMergeError(
                f"{self._scene.place}.name_or_path: {module} is {what} in this model, {delta.shape[0]} x {delta.shape[1]} in the "
                "LoRA: give the model that it was trained on"
            )
        return linear

    def render(self, shot: Shot) -> Image:
        """One picture. The same shot and LoRA give the same picture, whatever was rendered before.

        Args:
            shot: What to render.

        Raises:
            ZitMergeError: There is not enough memory.
        """
        asked = _image_config()(shot)
        printed = io.StringIO()  # the toolkit draws a bar for each call
        with _memory(self._scene, f"for {shot.width} x {shot.height} pixels", shot), contextlib.redirect_stderr(printed):
            self._model.generate_images([asked], sampler="flowmatch")
        return asked.image


def _ups(delta: Delta) -> Iterator[Tensor]:
    """Factors that are zero where the change is."""
    if isinstance(delta, Factors):
        yield delta.up
    else:
        yield from (up for part in getattr(delta, "parts", ()) for up in _ups(part))
        yield from [delta.left.up] if hasattr(delta, "left") else []


def adding(delta: Delta, device: torch.device):
    """A forward hook that adds a change to the output of a linear layer; the change waits on the device as it is stored."""
    delta = delta.map(lambda t: t.to(device).contiguous())

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + applied(delta.map(torch.Tensor.float), args[0].float()).to(output.dtype)

    return hook


def _load(scene: Scene, device: torch.device) -> Any:
    """The toolkit's model of Z-Image, ready to render (the steps of BaseSDTrainProcess.run)."""
    settings = dict(scene.model) | {"dtype": scene.dtype, "assistant_lora_path": None, "inference_lora_path": None}
    config = toolkit.part("toolkit.config_modules", "ModelConfig")(**settings)
    with toolkit.silence():
        kind = toolkit.part("toolkit.util.get_model", "get_model_class")(config)
    model = kind(device=device, model_config=config, dtype=scene.dtype, noise_scheduler=kind.get_train_scheduler())
    model.load_model()
    for module in (model.unet, model.vae, *model.text_encoder):
        module.requires_grad_(False)
        module.eval()
    model.vae.to(device, dtype=toolkit.part("toolkit.train_tools", "get_torch_dtype")(scene.dtype))
    return model


def _image_config() -> type:
    """The toolkit's order for a picture, which keeps the picture instead of writing it: its own writing moves whatever else lies
    in its temporary folder, that of another process too."""
    base = toolkit.part("toolkit.config_modules", "GenerateImageConfig")

    class Asked(base):
        """One picture, in memory."""

        def __init__(self, shot: Shot):
            super().__init__(
                prompt="",
                negative_prompt=shot.negative,
                width=shot.width,
                height=shot.height,
                num_inference_steps=shot.steps,
                guidance_scale=shot.guidance,
                seed=shot.seed,
                output_path="picture.png",  # never written
            )
            self.prompt = self.prompt_2 = shot.prompt  # not through its parser: the options are out of it
            self.image: Image | None = None

        def save_image(self, image: Image, count: int = 0, max_count: int = 0) -> None:
            self.image = image

        save_image_atomic = save_image

    return Asked


@contextmanager
def _memory(scene: Scene, when: str, shot: Shot | None = None) -> Iterator[None]:
    """Says what to change where there is not enough memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not _is_out_of_memory(e):
            raise
        raise ZitMergeError(f"out of memory {when}: {_cure(scene, shot)}") from e


@contextmanager
def _loading(scene: Scene) -> Iterator[None]:
    """Says which model can't be loaded."""
    try:
        yield
    except (OSError, ValueError, KeyError) as e:  # what transformers, diffusers and huggingface_hub raise for broken folders
        reason = " ".join(str(e).split())[:300]
        raise ZitMergeError(
            f"{scene.place}.name_or_path: {scene.model['name_or_path']} can't be used ({reason}): check the path, or that it can "
            "be downloaded"
        ) from e


def _is_out_of_memory(e: BaseException) -> bool:
    """Of a GPU, or of the machine: torch has no class of its own for the latter, nor have the GPU's libraries."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(e, MemoryError | torch.cuda.OutOfMemoryError) or any(word in str(e) for word in words)


def _cure(scene: Scene, shot: Shot | None) -> str:
    """What can be changed, what helps most first."""
    model = scene.model
    cures = [f"set quantize: true in {scene.place}"] if not model.get("quantize") else []
    cures += [f"low_vram: true in {scene.place}"] if not model.get("low_vram") else []
    if shot and max(shot.width, shot.height) > 512:
        smaller = replace(shot, width=shot.width // 2, height=shot.height // 2)
        cures.insert(0, f"set size: [{smaller.width}, {smaller.height}] in preview")
    return " or ".join(cures) or "close what else uses the memory, or render on a larger machine with `preview`"

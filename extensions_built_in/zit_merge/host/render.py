"""Pictures of Z-Image with a LoRA, the model loaded as AI-Toolkit loads it for a training.

The toolkit's own LoRA network is not used: it truncates files whose rank is larger than its own, keeps the weights of a previous
file in modules that the next one lacks, and by default is merged into the base weights and out again, which changes them in bf16.
Here a hook on every linear layer adds the delta of its output, in float32 as the toolkit's network does. The weights are never
changed, quantized or not; ranks, forms and modules may be any.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..algebra.delta import Delta, Framed, Kron, applied
from ..algebra.factors import Factors
from ..errors import ZitMergeError
from ..preview.settings import MULTIPLE, SMALLEST, ImageSpec, RenderSettings
from . import toolkit

if TYPE_CHECKING:
    from PIL.Image import Image


class ToolkitRenderer:
    """A `Renderer`: the base model, loaded once, and one LoRA at a time on it.

    Attributes:
        on_step: Called before each denoising step; may raise to stop the picture.

    Args:
        settings: The model.

    Raises:
        ZitMergeError: The model can't be loaded, or is not Z-Image; there is not enough memory; the toolkit lacks a part.
    """

    def __init__(self, settings: RenderSettings):
        self._settings, self._hooks = settings, list[torch.utils.hooks.RemovableHandle]()
        self.device = toolkit.device_of(settings.device)
        with _memory(settings, "while the model was loaded"), _loading(settings):
            self._model = _load(settings, self.device)
        self.on_step: Callable[[], None] = lambda: None
        transformer = toolkit.unwrap(self._model.unet)
        transformer.register_forward_pre_hook(lambda *_: self.on_step())
        self._linears = {name: m for name, m in transformer.named_modules() if hasattr(m, "in_features")}
        if "layers.0.attention.to_q" not in self._linears:
            self.close()
            raise ZitMergeError(
                f"{settings.loc}.name_or_path: {settings.model['name_or_path']} is not Z-Image: give a Z-Image model"
            )

    def __enter__(self) -> ToolkitRenderer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the model and its memory."""
        self.set_adapter(())
        self._model, self._linears = None, {}
        gc.collect()
        toolkit.flush()

    def set_adapter(self, deltas: Iterable[tuple[str, Delta]]) -> None:
        """Replaces the LoRA on the model.

        Args:
            deltas: (module, delta); other modules are those of the base model.

        Raises:
            ZitMergeError: The model lacks a module, or it has another shape.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        with _memory(self._settings, "while a LoRA was put on the model"):
            for module, delta in deltas:
                if any(bool(factor.any()) for factor in _ups(delta)):
                    self._hooks.append(self._linear(module, delta.shape).register_forward_hook(adding(delta, self.device)))

    @contextmanager
    def watching(self, see: Mapping[str, Callable[[Tensor], None]], shapes: Mapping[str, tuple[int, int]]) -> Iterator[None]:
        """Shows what enters linear layers while pictures are rendered.

        Args:
            see: Module -> called with each of its inputs, (tokens, in), in the dtype of the model.
            shapes: Module -> (out, in).

        Raises:
            ZitMergeError: The model lacks a module, or it has another shape.
        """
        hooks = []
        try:
            for module, call in see.items():
                linear = self._linear(module, shapes[module])
                hooks.append(linear.register_forward_pre_hook(lambda _, args, call=call: call(args[0].flatten(0, -2))))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _linear(self, module: str, shape: tuple[int, int]) -> nn.Module:
        linear = self._linears.get(module)
        have = (linear.out_features, linear.in_features) if linear else None
        if linear is None or have != shape:
            what = f"{have[0]} x {have[1]}" if have else "missing"
            raise ZitMergeError(
                f"{self._settings.loc}.name_or_path: {module} is {what} in this model, {shape[0]} x {shape[1]} in "
                "the LoRA: give the model that it was trained on"
            )
        return linear

    def render(self, spec: ImageSpec) -> Image:
        """Renders one picture. The same spec and LoRA give the same picture, whatever was rendered before.

        Args:
            spec: What to render.

        Raises:
            ZitMergeError: There is not enough memory.
        """
        asked = _image_config()(spec)
        printed = io.StringIO()  # the toolkit draws a bar for each call
        with _memory(self._settings, f"for {spec.width} x {spec.height} pixels", spec), contextlib.redirect_stderr(printed):
            self._model.generate_images([asked], sampler="flowmatch")
        return asked.image


def _ups(delta: Delta) -> Iterator[Tensor]:
    """Factors that are zero if the delta is."""
    if isinstance(delta, Factors):
        yield delta.up
    elif isinstance(delta, Kron):
        yield delta.left.up
    elif isinstance(delta, Framed):
        yield delta.core
    else:
        yield from (up for part in delta.parts for up in _ups(part))


def adding(delta: Delta, device: torch.device) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook that adds a delta to the output of a linear layer.

    Args:
        delta: (out, in) of the layer; kept on the device in its own dtype.
        device: Of the layer.
    """
    delta = delta.map(lambda t: (t.float() if t.dtype == torch.float64 else t).to(device).contiguous())  # MPS has no float64

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + applied(delta.map(torch.Tensor.float), args[0].float()).to(output.dtype)

    return hook


def _load(settings: RenderSettings, device: torch.device) -> Any:
    """The toolkit's model of Z-Image, ready to render (the steps of BaseSDTrainProcess.run)."""
    path = os.path.expanduser(settings.model["name_or_path"])  # as it was checked; the toolkit itself does not expand ~
    changed = {"name_or_path": path, "dtype": settings.dtype, "assistant_lora_path": None, "inference_lora_path": None}
    config = toolkit.part("toolkit.config_modules", "ModelConfig")(**{**settings.model, **changed})
    with toolkit.silence():
        kind = toolkit.part("toolkit.util.get_model", "get_model_class")(config)
    model = kind(device=device, model_config=config, dtype=settings.dtype, noise_scheduler=kind.get_train_scheduler())
    model.load_model()
    for module in (model.unet, model.vae, *model.text_encoder):
        module.requires_grad_(False)
        module.eval()
    model.vae.to(device, dtype=toolkit.part("toolkit.train_tools", "get_torch_dtype")(settings.dtype))
    return model


def _image_config() -> type:
    """The toolkit's class for a picture to render, which keeps the picture instead of writing it: the toolkit's own writing moves
    everything in its temporary folder, files of other processes too."""
    base = toolkit.part("toolkit.config_modules", "GenerateImageConfig")

    class Asked(base):  # type: ignore[valid-type,misc]  # known only at run time
        """One picture, in memory."""

        def __init__(self, spec: ImageSpec):
            super().__init__(
                prompt="",
                negative_prompt=spec.negative,
                width=spec.width,
                height=spec.height,
                num_inference_steps=spec.steps,
                guidance_scale=spec.guidance,
                seed=spec.seed,
                output_path="picture.png",  # never written
            )
            self.prompt = self.prompt_2 = spec.prompt  # not through its parser: the options are removed already
            self.image: Image | None = None

        def save_image(self, image: Image, count: int = 0, max_count: int = 0) -> None:
            self.image = image

        save_image_atomic = save_image

    return Asked


@contextmanager
def _memory(settings: RenderSettings, when: str, spec: ImageSpec | None = None) -> Iterator[None]:
    """Tells what to change if there is not enough memory."""
    try:
        yield
    except Exception as e:
        if isinstance(e, ZitMergeError) or not _is_out_of_memory(e):
            raise
        raise ZitMergeError(f"out of memory {when}: {_advice(settings, spec)}") from e


@contextmanager
def _loading(settings: RenderSettings) -> Iterator[None]:
    """Tells which model can't be loaded. Restores torch's default dtype, which diffusers leaves changed when it fails."""
    dtype = torch.get_default_dtype()
    try:
        yield
    except Exception as e:  # diffusers, transformers, safetensors and torch share no error class for incomplete folders
        if isinstance(e, ZitMergeError) or _is_out_of_memory(e):
            raise
        kind = [] if isinstance(e, OSError | ValueError) else [type(e).__name__]
        reason = ": ".join([*kind, *filter(None, [" ".join(str(e).split())[:300]])])
        raise ZitMergeError(
            f"{settings.loc}.name_or_path: {settings.model['name_or_path']} can't be used ({reason}): check the path and the "
            "settings beside it, or that it can be downloaded"
        ) from e
    finally:
        torch.set_default_dtype(dtype)


# In messages of torch, on Windows too, of GPU libraries, of oneDNN (without a reason), of a system that can't hold a file.
_OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "cannot allocate memory"),
    *("could not create a primitive", "could not create a memory object"),
    *("(os error 12)", "(os error 1455)", "[winerror 1455]"),
)


def _is_out_of_memory(e: BaseException | None) -> bool:
    """Whether a GPU or the machine is out of memory: torch has no class for the latter, and diffusers wraps both in its own."""
    while e is not None:
        text = str(e).lower()
        if isinstance(e, MemoryError | torch.cuda.OutOfMemoryError) or any(phrase in text for phrase in _OUT_OF_MEMORY):
            return True
        e = e.__cause__ or e.__context__
    return False


def _advice(settings: RenderSettings, spec: ImageSpec | None) -> str:
    """What to change, the most effective first."""
    model = settings.model
    changes = [f"set quantize: true in {settings.loc}"] if not model.get("quantize") else []
    changes += [f"low_vram: true in {settings.loc}"] if not model.get("low_vram") else []
    if spec and max(spec.width, spec.height) > 512:
        width, height = (max(SMALLEST, side // 2 // MULTIPLE * MULTIPLE) for side in (spec.width, spec.height))
        changes.insert(0, f"set size: [{width}, {height}] in preview")
    return " or ".join(changes) or "close what else uses the memory, or render on a larger machine with `preview`"

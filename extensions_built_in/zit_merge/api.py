"""Merging from Python."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from .config.parse import parse_section
from .config.schema import TRAINED
from .errors import SettingError, located
from .files.hub import HUB_PREFIX
from .files.paths import user_path
from .formats.reader import LoraFile
from .merging.runner import run_plans
from .planning.build import plan_section
from .planning.context import RunContext
from .planning.device import pick_device
from .planning.planned import Planned
from .planning.types import StepPlan
from .progress import Progress

Weighed = tuple["LoraFile | str | Path | Mapping[str, str]", "float | Mapping[str, Any]"]
T = TypeVar("T")
OUTPUT = "the output"  # its location in messages


@dataclass(frozen=True)
class Merge:
    """A merge that is described but not written yet."""

    section: Mapping[str, Any]

    def plan(self, path: str | Path, *, may_download: bool = False) -> StepPlan:
        """What `save` would do: strengths, rank, shapes, size.

        Args:
            path: The output.
            may_download: Fetch what is not in the local cache of the hub.

        Raises:
            ZitMergeError: The merge can't be done; the message says why.
        """
        return self.planned(path, may_download=may_download).plans[0]

    def planned(self, path: str | Path, *, may_download: bool = False) -> Planned:
        """The same as a section with its one step.

        Args:
            path: The output.
            may_download: Fetch what is not in the local cache of the hub.

        Raises:
            ZitMergeError: As `plan`.
        """
        with located(OUTPUT):
            path = user_path(path)
            if path.suffix != ".safetensors":
                raise SettingError(f"{path} is not a .safetensors file: give it that ending")
        context = RunContext(job="merge", loc="", output_dir=path.parent, file=path, may_download=may_download)
        return self._planned(context, {"name": step_name(path)})

    def planned_model(self, path: str | Path, bake: Mapping[str, Any], *, may_download: bool = False) -> Planned:
        """What writes a whole model with the merge in it, and no LoRA, as a section with one step.

        Args:
            path: A folder for `format: diffusers`, a `.safetensors` file for `format: comfyui`.
            bake: The keys of `bake:` in a step.
            may_download: Fetch what is not in the local cache of the hub.

        Raises:
            ZitMergeError: The model can't be written; the message says why.
        """
        with located(OUTPUT):
            path = user_path(path)
        context = RunContext(job="bake", loc="", output_dir=path.parent, baked=path, may_download=may_download)
        return self._planned(context, {"name": step_name(path), "keep": False, "bake": dict(bake)})

    def _planned(self, context: RunContext, keys: Mapping[str, Any]) -> Planned:
        with _one_step():
            section = parse_section({**self.section, "steps": [{**self.section["steps"][0], **keys}]})
            plans = [replace(plan, loc="") for plan in plan_section(section, context)]
            return Planned(0, section, context, plans, pick_device(section.device))

    def bake(
        self,
        base: str | Path,
        path: str | Path,
        *,
        format: str = "diffusers",  # noqa: A002 - as in the config
        dtype: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> Path:
        """Writes the whole model with the merge in it.

        Args:
            base: The model: a diffusers folder, ComfyUI's file, or user/repo of the hub.
            path: A folder for diffusers, a `.safetensors` file for comfyui.
            format: `diffusers` or `comfyui`.
            dtype: `bf16`, `fp16` or `fp32`; None leaves every tensor its own.
            rounding: `nearest`, or `stochastic`, exact in the mean.
            seed: Of its draws.

        Returns:
            The path.

        Raises:
            ZitMergeError: Nothing was written; the message says why.
        """
        asked = {"base": str(base), "format": format, "dtype": dtype, "rounding": rounding, "seed": seed}
        planned = self.planned_model(path, asked, may_download=True)
        (done,) = run_plans(planned.plans, planned.device)
        return done.path

    def save(self, path: str | Path, tick: Callable[[StepPlan, int], None] = lambda plan, done: None) -> Path:
        """Writes the merged LoRA; a file that another merge of this name wrote is replaced, any other is refused.

        Args:
            path: A `.safetensors` file.
            tick: Called with the plan and the number of modules done; may raise to stop.

        Returns:
            The path. `load_lora(path).verdict` says whether the file is right.

        Raises:
            ZitMergeError: Nothing was written; the message says why.
        """
        planned = self.planned(path, may_download=True)
        (done,) = run_plans(planned.plans, planned.device, _Ticking(planned.plans[0], tick))
        return done.path


class _Ticking(Progress):
    """Calls a function after every module: with 0 in the passes before the merge."""

    def __init__(self, plan: StepPlan, tick: Callable[[StepPlan, int], None]):
        self._plan, self._tick = plan, tick

    def track(
        self, items: Collection[T], label: str, unit: str = "module", describe: Callable[[T], str] | None = None
    ) -> Iterator[T]:
        """See `Progress`."""
        for done, item in enumerate(items, 1):
            yield item
            self._tick(self._plan, done if label == self._plan.name else 0)


@contextmanager
def _one_step() -> Iterator[None]:
    """Locations without the one step: `rank`, `loras[1].blocks.to_w`; what the path gave is the output."""
    try:
        yield
    except SettingError as e:
        loc = e.loc.removeprefix("steps[0]").lstrip(".")
        e.loc = OUTPUT if loc in ("output_dir", "name") else loc
        raise


def merge(
    loras: Sequence[Weighed],
    *,
    rank: int | str | Mapping[str, float] = "exact",
    dtype: str = "bf16",
    format: str = "ai-toolkit",  # noqa: A002 - as in the config
    uniform: bool = True,
    keep_lokr: bool = False,
    device: str = "auto",
    method: str = "sum",
    params: Mapping[str, Any] | None = None,
    shapes: str = "strict",
    allow_unmatched: bool = False,
    confirm_size: bool = False,
    base: str | Path | None = None,
) -> Merge:
    """Several LoRAs as one, each with its strengths; by default sum_i strength_i * (alpha_i / rank_i) * up_i @ down_i per module.

    Args:
        loras: (LoRA, ratio) or (LoRA, {"ratio": ..., "preset": ..., "blocks": ..., "layers": ..., "effects": ...,
            "overrides": ...}); the LoRA is what `load_lora` gave, a path, hf:user/repo/file.safetensors, or
            {"extract": MODEL, "base": MODEL}, the difference of two models.
        rank: `exact` (ranks add up, nothing is lost), a number (the closest approximation of that rank), `same` (the largest
            rank among LoRAs), `{"energy": 0.99, "max": 64}` (the smallest rank that keeps this share of the squared norm) or
            `{"size_mb": 150}` (the largest rank that the file has room for).
        dtype: `bf16`, `fp16`, `fp32` or `same` (as the inputs).
        format: `ai-toolkit` (every program reads it), `diffusers`, `kohya` or `comfyui`.
        uniform: One rank in every module; False keeps each module's own.
        keep_lokr: A single LoKr stays a LoKr.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        method: `sum`, `average`, `normalize`, `slerp`, `nuslerp`, `karcher`, `ties`, `dare_linear`, `dare_ties`, `della`, `tsv`,
            `project` or `shared_once`; their docstrings in `algebra` give formulas and sources.
        params: The method's parameters, such as `{"density": 0.2}`.
        shapes: `strict` (the real Z-Image) or `free` (any one consistent set of sizes).
        allow_unmatched: Merge although a file holds keys that no rule explains.
        confirm_size: Write a file of over 2 GB.
        base: The model whose weights DoRA, OFT, BOFT, IA3 and GLoRA need: a diffusers folder, ComfyUI's file, or user/repo.

    Returns:
        A merge with `plan(path)` and `save(path)`.

    Raises:
        ZitMergeError: From `plan` and `save`, with what is wrong and where.
    """
    entries = [{**_source(lora), **(weight if isinstance(weight, Mapping) else {"ratio": weight})} for lora, weight in loras]
    save = {"dtype": dtype, "format": format, "uniform": uniform, "keep_lokr": keep_lokr}
    step = {"rank": rank, "method": method, "params": dict(params or {}), "save": save, "loras": entries, "shapes": shapes}
    step |= {"allow_unmatched": allow_unmatched, "confirm_size": confirm_size} | ({"base": str(base)} if base else {})
    return Merge({"type": "zit_merge", "device": device, "steps": [step]})


def _source(lora: LoraFile | str | Path | Mapping[str, str]) -> dict[str, Any]:
    """A LoRA as a config names it, with the answers that it was opened with."""
    if isinstance(lora, Mapping):
        return {"lora": dict(lora)}
    if str(lora).startswith(HUB_PREFIX):
        return {"lora": str(lora)}
    if not isinstance(lora, LoraFile):
        return {"lora": str(Path(lora).absolute())}
    answers = {key: value for key in ("alpha", "qkv") if (value := getattr(lora.reading, key)) is not None}
    return {"lora": str(lora.path.absolute()), **answers, "drop": list(lora.reading.drop)}


def step_name(path: Path) -> str:
    """The name of the step that makes a file: its stem, in letters that a step may have."""
    name = "".join(c if c.isalpha() or c.isdecimal() or c in "_.-" else "_" for c in path.stem)
    return f"{name}_" if name.lower() == TRAINED or name.lower().endswith(".safetensors") else name

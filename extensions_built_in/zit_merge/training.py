"""The training process before us, as the config describes it: what it will save, and where."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import PROCESS_TYPE
from .errors import ZitMergeError, not_available_yet
from .zimage import MODULES

# toolkit/train_tools.py get_torch_dtype; SaveConfig's default is float16 (toolkit/config_modules.py)
_DTYPES: Mapping[str, torch.dtype] = {
    **dict.fromkeys(("float", "fp32", "single", "float32"), torch.float32),
    **dict.fromkeys(("fp16", "half", "float16"), torch.float16),
    **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
}


@dataclass(frozen=True)
class Outline:
    """What is known of a LoRA without its numbers.

    Attributes:
        ranks: Module -> rank.
        shapes: Module -> (out, in); empty while only the rank is known.
        dtype: Of the factors.
    """

    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]
    dtype: torch.dtype


@dataclass(frozen=True)
class Training:
    """A training process of a job.

    Attributes:
        place: `process[0]`.
        job: `config.name`, which the files are named after.
        config: The raw process section.
    """

    place: str
    job: str
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The toolkit's save_root (BaseTrainProcess.__init__), relative to the working directory as there."""
        return Path(self.config["training_folder"]) / (self.config.get("name") or self.job)

    @property
    def steps(self) -> int:
        """Training steps (TrainConfig's default is 1000)."""
        return int(_table(self.config, "train").get("steps") or 1000)

    def file(self, step: int | None = None) -> Path:
        """The LoRA that it saves at the end, or the checkpoint of a step."""
        if step is None or step == self.steps:
            return self.folder / f"{self.job}.safetensors"
        return self.folder / f"{self.job}_{step:09d}.safetensors"

    def check_step(self, step: int, place: str) -> None:
        """Raises unless the training will have kept a checkpoint of this step."""
        save = _table(self.config, "save")
        every, keep = int(save.get("save_every") or 1000), int(save.get("max_step_saves_to_keep") or 5)
        saved = list(range(every, self.steps, every))[-keep:]  # no step file for the last step; clean_up_saves keeps the newest
        if step != self.steps and step not in saved:
            kept = ", ".join(map(str, (*saved, self.steps)))
            raise ZitMergeError(
                f"{place}: {self.place} will not keep a checkpoint of step {step}: steps {self.steps}, save_every {every} and "
                f"max_step_saves_to_keep {keep} leave {kept}"
            )

    def outline(self, shapes: str) -> Outline:
        """What it will save, as far as the config tells.

        Args:
            shapes: `strict`: the model is the real Z-Image; `free`: its sizes are not known before.

        Raises:
            ZitMergeError: It saves no LoRA, or one that can't be read yet.
        """
        network = self.config.get("network")
        if not isinstance(network, Mapping):
            raise ZitMergeError(f"{self.place}: trains no LoRA (it has no network:), so there is no `trained` to merge")
        kind = str(network.get("type") or "lora").lower()
        if kind != "lora":
            raise not_available_yet(f"{self.place}.network.type: merging a trained {kind}", "train with type: lora")
        rank = int(network.get("rank") or network.get("linear") or 4)  # NetworkConfig.__init__
        names = [m.name for m in MODULES.values() if m.section == "layers"]  # Z-Image's trainer targets `layers` alone
        dtype = _DTYPES.get(str(_table(self.config, "save").get("dtype") or "float16"), torch.float16)
        real = {name: MODULES[name].shape() for name in names}
        return Outline(dict.fromkeys(names, rank), real if shapes == "strict" else {}, dtype)

    def claims(self, name: str) -> bool:
        """Whether the toolkit would take a file of this name in its folder for a checkpoint to resume from or to delete.

        Evaluates the globs of BaseSDTrainProcess.get_latest_save_path and clean_up_saves with the job's own name, glob characters
        in it included, as a file system that ignores case would.
        """
        trigger = _table(self.config, "embedding").get("trigger")
        globs = [f"{self.job}*", f"CRITIC_{self.job}_*", *([f"{trigger}_*"] if trigger else [])]
        return any(fnmatch.fnmatchcase(name.lower(), glob.lower()) for glob in globs)

    def files(self) -> list[str]:
        """Names of the LoRA files in its folder."""
        return sorted(p.name for p in self.folder.glob("*.safetensors")) if self.folder.is_dir() else []


def training_before(job: str, processes: Sequence[Any], index: int) -> Training | None:
    """The nearest training process before process `index`: one of another type that has a training_folder."""
    for i in reversed(range(index)):
        process = processes[i]
        if isinstance(process, Mapping) and process.get("type") != PROCESS_TYPE and process.get("training_folder"):
            return Training(f"process[{i}]", job, process)
    return None


def _table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}

"""The training process before us, as the config describes it: what it will save, and where."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from ..config.schema import PROCESS_TYPE
from ..errors import SettingError, joined, not_available_yet
from ..files.paths import system_path
from ..formats.algorithms import DORA, FULL
from ..formats.metadata import base_of
from ..formats.spec import LoraSpec
from ..model.zimage import MODULES, Module

# toolkit/train_tools.py get_torch_dtype; SaveConfig's default is float16 (toolkit/config_modules.py)
_DTYPES: Mapping[str, str] = {
    **dict.fromkeys(("float", "fp32", "single", "float32"), "fp32"),
    **dict.fromkeys(("fp16", "half", "float16"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
}


# The families of model.arch that are Z-Image: zimage, zimage:turbo, zimage:deturbo (extensions_built_in/diffusion_models/z_image)
ARCHS = ("zimage", "zimage_l2p")
LEFT_ALONE = ("_LoRA", "_refiner", "_t2i", "_cn")  # what has these in its path is resumed from by no job without them


@dataclass(frozen=True)
class Training:
    """A training process of a job.

    Attributes:
        loc: `process[0]`.
        job: `config.name`, which the files are named after.
        config: The raw process section.
        index: Which process it is.
    """

    loc: str
    job: str
    config: Mapping[str, Any]
    index: int = 0

    def _error(self, message: str, key: str = "") -> SettingError:
        """A setting of the training is wrong, whichever section asks."""
        return SettingError(message, joined(self.loc, key), is_complete=True)

    @property
    def folder(self) -> Path:
        """The toolkit's save_root (BaseTrainProcess.__init__), relative to the working directory as there."""
        folder, name = self.config["training_folder"], self.config.get("name") or self.job
        for key, value in (("training_folder", folder), ("name", name)):
            if not isinstance(value, str):
                raise self._error(f"must be text, not {value!r}", key)
            if "\0" in value:
                raise self._error(f"holds a null byte, which no path can have: {value[:80]!r}", key)
        try:
            system_path(folder)
        except SettingError as e:
            raise self._error(e.message, "training_folder") from e
        return Path(folder) / name

    @property
    def steps(self) -> int:
        """Training steps (TrainConfig's default is 1000)."""
        return self._whole("train.steps", 1000)

    def _whole(self, key: str, default: int, least: int = 1) -> int:
        """A whole number of the section, at table.key."""
        part, _, name = key.partition(".")
        value = table(self.config, part).get(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._error(f"must be a whole number from {least}, not {value!r}", key)
        return value

    def file(self, step: int | None = None) -> Path:
        """The LoRA that it saves at the end, or the checkpoint of a step."""
        if step is None or step == self.steps:
            return self.folder / f"{self.job}.safetensors"
        return self.folder / f"{self.job}_{step:09d}.safetensors"

    @property
    def base(self) -> dict[str, str]:
        """What it trains on, by name. AI-Toolkit's metadata say zimage for every arch of the family."""
        model = table(self.config, "model")
        names = [model.get(key) for key in ("name_or_path", "assistant_lora_path")]
        path, adapter = (Path(n).name if isinstance(n, str) and os.path.exists(n) else n for n in names)
        return base_of(path, model.get("arch"), adapter)

    def kept(self) -> list[int]:
        """The steps whose checkpoints it will have kept, the final file's as the last."""
        every, keep = self._whole("save.save_every", 1000, 0), self._whole("save.max_step_saves_to_keep", 5, 0)  # SaveConfig
        # No step file for the last step, none at all for 0; clean_up_saves keeps the newest, all of them for 0.
        return [*(list(range(every, self.steps, every))[-keep:] if every else []), self.steps]

    def how_kept(self) -> str:
        """What leads to `kept`, in words."""
        every, keep = self._whole("save.save_every", 1000, 0), self._whole("save.max_step_saves_to_keep", 5, 0)
        kept = ", ".join(map(str, self.kept()))
        return f"steps {self.steps}, save_every {every} and max_step_saves_to_keep {keep} leave {kept}"

    def saved(self) -> list[int]:
        """The steps of the checkpoints that lie in its folder, by their names; the final file is the last."""
        pattern = re.compile(re.escape(self.job) + r"_(\d{9})\.safetensors")
        found = {int(match[1]) for name in self.files() if (match := pattern.fullmatch(name))}
        return [*sorted(step for step in found if step < self.steps), *([self.steps] if os.path.isfile(self.file()) else [])]

    def check_step(self, step: int) -> None:
        """Raises unless the training will have kept a checkpoint of this step."""
        if step not in self.kept():
            raise SettingError(f"{self.loc} will not keep a checkpoint of step {step}: {self.how_kept()}")

    def check_arch(self, archs: Collection[str] | None = None) -> None:
        """Raises unless it trains Z-Image.

        Args:
            archs: The families of model.arch that are Z-Image, a variant follows after a colon; None takes any that begins so.
        """
        arch = table(self.config, "model").get("arch")
        family = str(arch).split(":")[0]
        if arch is not None and (not family.startswith("zimage") if archs is None else family not in archs):
            raise self._error(f"{arch} is not Z-Image: only LoRAs of Z-Image (zimage, zimage:turbo, ...) merge", "model.arch")

    def spec(self, shapes: str, drop: Collection[str] = (), *, has_base: bool = False) -> LoraSpec:
        """What it will save, as far as the config tells.

        Args:
            shapes: `strict`: the model is the real Z-Image; `free`: its sizes are not known before.
            drop: What the merge will leave out: `norm`, `bias`.
            has_base: The model is named whose weights some changes need.

        Raises:
            ZitMergeError: It saves no LoRA, or one that can't be merged.
        """
        network = self.config.get("network")
        if not isinstance(network, Mapping):
            raise self._error("trains no LoRA (it has no network:), so there is no `trained` to merge")
        self.check_arch()
        if table(self.config, "train").get("merge_network_on_save"):
            raise self._error(
                "saves whole models, so there is no `trained` LoRA to merge: drop it", "train.merge_network_on_save"
            )
        kind = str(network.get("type") or "lora").lower()
        extras = {**network, **table(network, "network_kwargs")}
        kind = "dora" if extras.get("dora") else kind
        if kind == "dora" and not has_base:
            raise self._error(
                "a DoRA's change depends on the base model's weights: set base: trainer on the step that merges it, or train "
                "with type: lora or lokr",
                "network",
            )
        names = [m for m in MODULES.values() if m.section == "layers"]  # Z-Image's trainer targets `layers` alone
        whole = extras.get("full_if_contains") or []  # toolkit/lora_special.py: these become .diff and .diff_b
        whole = [whole] if isinstance(whole, str) else [str(word) for word in whole]
        lost = [v for v in ("norm", "bias") if v not in drop] if extras.get("all_layers") or whole else []
        if lost:
            key = "all_layers" if extras.get("all_layers") else "full_if_contains"
            raise self._error(
                f"trains norms or biases too, for which a LoRA file has no place: set drop: [{', '.join(lost)}] beside "
                "lora: trained to merge the rest, or train without it",
                f"network.{key}",
            )
        ranks = {m.name: self._rank(m, kind, network, any(word in m.name for word in whole)) for m in names}
        algorithms = [{"lokr": "LoKr", "lora": "LoRA", "dora": DORA}.get(kind, FULL), *([FULL] if whole else [])]
        dtype = _DTYPES.get(str(table(self.config, "save").get("dtype") or "float16"), "fp16")
        return LoraSpec(ranks, {m.name: m.shape() for m in names} if shapes == "strict" else {}, dtype, algorithms)

    def _rank(self, module: Module, kind: str, network: Mapping[str, Any], whole: bool) -> int:
        """The rank that the change of a module will have at most, in the real model's sizes."""
        out, into = module.shape()
        rank = self._whole("network.rank", self._whole("network.linear", 4))  # NetworkConfig.__init__
        if whole or kind in ("fullrank", "dora"):
            return min(out, into)
        if kind == "lora":
            return rank
        if kind != "lokr":
            later = not_available_yet(f"merging a trained {kind}", "train with type: lora or lokr")
            raise self._error(later.message, "network.type")
        factor = network.get("lokr_factor", -1)
        if not isinstance(factor, int) or isinstance(factor, bool):
            raise self._error(f"must be a whole number, not {factor!r}", "network.lokr_factor")
        (p, s), (q, t) = _factorization(out, factor), _factorization(into, factor)
        # toolkit/models/lokr.py: w2 is a product where the rank is under half of its longer side; lokr_full_rank never is
        if network.get("lokr_full_rank", True) or rank >= max(s, t) / 2:
            rank = min(s, t)
        return min(p, q) * rank

    def claims(self, path: Path) -> bool:
        """Whether the toolkit would take a file or folder for a checkpoint of the job, to resume from or to delete.

        Only what lies in its own folder counts; deeper down, the name of the first folder does. Evaluates the globs of
        BaseSDTrainProcess.get_latest_save_path and clean_up_saves with the job's own name, glob characters in it included, as
        file systems that mind case and such that do not would.
        """
        folder, path = self.folder.resolve(), path.parent.resolve() / path.name
        if not path.is_relative_to(folder) or path == folder:
            return False
        name = path.relative_to(folder).parts[0]
        trigger = table(self.config, "embedding").get("trigger")
        globs = [f"{self.job}*", f"CRITIC_{self.job}_*", *([f"{trigger}_*"] if trigger else [])]
        names = {n for whole in (name, f"{name}.part") for n in (whole, whole.lower())}
        return any(fnmatch.fnmatchcase(n, g) for glob in globs for g in (glob, glob.lower()) for n in names)

    def resumes_from(self) -> Path | None:
        """What its start loads (BaseSDTrainProcess.get_latest_save_path): the newest of its name, else a pretrained LoRA.

        Not known where an embedding or an adapter is trained too: other names are looked for then.
        """
        if self.config.get("embedding") or self.config.get("adapter"):
            return None
        name = self.config.get("name") or self.job
        patterns = (f"{name}*.safetensors", f"{name}*.pt", f"{name}*")
        found = [path for pattern in patterns for path in glob.glob(os.path.join(self.folder, pattern)) if os.path.exists(path)]
        found = [path for path in found if not any(word in path and word not in name for word in LEFT_ALONE)]
        if found:
            return Path(max(found, key=os.path.getctime))
        pretrained = table(self.config, "network").get("pretrained_lora_path")
        return Path(pretrained) if isinstance(pretrained, str) and os.path.exists(pretrained) else None

    def files(self) -> list[str]:
        """Names of the LoRA files in its folder."""
        return sorted(p.name for p in self.folder.glob("*.safetensors")) if os.path.isdir(self.folder) else []


def training_before(job: str, processes: Sequence[Any], index: int) -> Training | None:
    """The nearest training process before a process: one of another type that has a training_folder.

    Args:
        job: The job's name.
        processes: The raw process sections.
        index: Which process.
    """
    for i in reversed(range(index)):
        process = processes[i]
        if isinstance(process, Mapping) and process.get("type") != PROCESS_TYPE and process.get("training_folder"):
            return Training(f"process[{i}]", job, process, i)
    return None


def _factorization(size: int, factor: int) -> tuple[int, int]:
    """How AI-Toolkit's LoKr splits a side (toolkit/models/lokr.py factorization): the divisors nearest to its root, the smaller
    one first and not above `factor`; a factor that divides comes first as it is."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max((d for d in range(1, isqrt(size) + 1) if size % d == 0 and d <= limit), default=1)
    return small, size // small


def table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a config that is a mapping; empty where it is none.

    Args:
        config: The mapping around it.
        key: Of the part.
    """
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}

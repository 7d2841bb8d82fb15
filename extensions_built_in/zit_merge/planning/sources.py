"""Where the files are that a section names."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..algebra.ema import gamma_of, profile
from ..config.schema import TRAINED, TRAINING_ADAPTER, Checkpoints, Lora
from ..errors import SettingError, ZitMergeError, nearest, other_tensors
from ..files import hub
from ..files.paths import NO_PICKLES, PICKLES, system_path, user_path
from ..formats.reader import tensor_hash
from .context import RunContext
from .training import Training, table

SIGMA_REL = 0.1  # of a checkpoints step that says nothing: the paper's wider example, about the last third of the training


def checkpoint_loras(asked: Checkpoints, context: RunContext, before_training: bool) -> list[Lora]:
    """The checkpoints of an average as LoRAs whose ratios sum to 1, by training step, the oldest first.

    Args:
        asked: Which ones and their weights.
        context: Where the section runs.
        before_training: Those that the training will leave, as its config says; else those that are there.

    Raises:
        SettingError: There are fewer than asked for.
    """
    training = context.training
    if training is None:
        raise SettingError("needs a training process before this section in the job, whose saves can be averaged")
    steps = training.kept() if before_training else training.saved()
    if training.steps not in steps:
        raise SettingError(f"{training.file()} is missing, the folder holds {_there(training)}: finish the training first")
    count = asked.last or (len(asked.weights) if asked.weights else len(steps))
    if count > len(steps):
        reason = training.how_kept() if before_training else f"{training.folder} holds those of {', '.join(map(str, steps))}"
        there = "will be" if before_training else "are"
        raise SettingError(
            f"{count} checkpoints are asked for, {len(steps)} {there} there ({reason}; the last one is the final file): "
            f"set last: {len(steps)}, or let the training keep more"
        )
    steps = steps[-count:]
    if asked.weights:
        shares = [w / sum(asked.weights) for w in asked.weights]
    else:
        shares = profile(steps, gamma_of(asked.sigma_rel or SIGMA_REL) if asked.gamma is None else asked.gamma)
    return [
        Lora(lora=f"{TRAINED}@{step}", ratio=share, alpha=asked.alpha, qkv=asked.qkv, drop=asked.drop)
        for step, share in zip(steps, shares, strict=True)
    ]


def trained_step(source: str) -> int | None:
    """The training step of `trained@2500`; None for `trained`."""
    return int(source.partition("@")[2]) if "@" in source else None


def is_trained(spec: Lora) -> bool:
    """Whether it is what the training before the section saves."""
    return bool(re.fullmatch(rf"{TRAINED}(@\d+)?", spec.source)) and not spec.sha256


def resolve(spec: Lora, context: RunContext, steps: Sequence[str], before_training: bool) -> Path | None:
    """The file of a source.

    Args:
        spec: The LoRA that names it.
        context: Where the section runs.
        steps: Names of the section's steps, for a typing error in one.
        before_training: What the training saves need not be there yet.

    Returns:
        None for a training still to come, and for a file on the hub that may not be fetched now.

    Raises:
        SettingError: There is no such file.
    """
    source = spec.source
    if is_trained(spec):
        return _resolve_trained(source, context, before_training)
    if source.startswith(hub.HUB_PREFIX):
        return _resolve_hub(spec, context)
    if source.lower().endswith(PICKLES):
        raise SettingError(f"{source} {NO_PICKLES}")
    if not source.lower().endswith(".safetensors"):
        raise SettingError(
            f"{source} is neither {TRAINED}, nor {TRAINING_ADAPTER}, nor an earlier step"
            f"{nearest(source, (TRAINED, TRAINING_ADAPTER, *steps))}, nor a .safetensors file, "
            "nor hf:user/repo/file.safetensors"
        )
    wanted = system_path(source)
    candidates = list(dict.fromkeys(system_path(folder / wanted) for folder in context.folders))
    candidates += [system_path(folder / wanted.name) for folder in context.lora_folders]
    if spec.sha256:
        return _resolve_hash(spec.sha256, wanted.name, candidates, context)
    for path in candidates:
        if path.exists():
            return path
    user_path(source)  # it may tell why
    looked = ", ".join(str(p.parent) for p in candidates)
    raise SettingError(f"{source} is not there (looked in {looked}): give the path of the file")


def adapter_of_training(context: RunContext) -> str:
    """The LoRA that the training is done over: a path, or a file on the hub with hf: before it, as AI-Toolkit reads it.

    Raises:
        SettingError: There is no training, or it has none.
    """
    if context.training is None:
        raise SettingError(
            f"{TRAINING_ADAPTER} needs a training process before this section in the job: give the path of the file"
        )
    name = table(context.training.config, "model").get("assistant_lora_path")
    if not isinstance(name, str) or not name.strip():
        raise SettingError(
            f"{TRAINING_ADAPTER}: {context.training.loc}.model.assistant_lora_path names no adapter, the training is done "
            "without one: drop this LoRA"
        )
    return name if os.path.exists(name) or name.count("/") < 2 else hub.HUB_PREFIX + name.removeprefix(hub.HUB_PREFIX)


def _there(training: Training) -> str:
    return ", ".join(training.files()) or "no .safetensors file"


def _resolve_trained(source: str, context: RunContext, before_training: bool) -> Path | None:
    if context.training is None:
        raise SettingError(f"{source} needs a training process before this section in the job: give the path of a LoRA file")
    step = trained_step(source)
    if before_training:
        if step is not None:
            context.training.check_step(step)
        return None
    path = context.training.file(step)
    if not os.path.exists(path):
        raise SettingError(
            f"{path} is not there, the folder holds {_there(context.training)}: finish the training, or name one of these"
        )
    return path


def _resolve_hub(spec: Lora, context: RunContext) -> Path | None:
    """A file of the hub; one that a recipe names by its hash may also be in a folder of --loras."""
    file = hub.parse(spec.source)
    if spec.sha256 and context.lora_folders:
        with contextlib.suppress(ZitMergeError):
            return _resolve_hash(spec.sha256, file.name, [folder / file.name for folder in context.lora_folders], context)
    path = hub.download(file) if context.may_download else hub.cached(file)
    if path and spec.sha256 and tensor_hash(path) != spec.sha256:
        raise other_tensors(spec.source, spec.sha256)
    return path


def _resolve_hash(sha256: str, name: str, candidates: Sequence[Path], context: RunContext) -> Path:
    for path in _hash_candidates(name, candidates, context):
        with contextlib.suppress(ZitMergeError):  # what else is in the folder may be broken
            if tensor_hash(path) == sha256:
                return path
    raise SettingError(f"no file with the tensors of {name} (sha256 {sha256[:12]}...) was found: name its folder with --loras")


def _hash_candidates(name: str, candidates: Sequence[Path], context: RunContext) -> Iterator[Path]:
    """Files by that name first, then every other .safetensors of the --loras folders."""
    named = [p for p in candidates if p.is_file()]
    everything = [
        p
        for folder in context.lora_folders
        for p in sorted(Path(folder).rglob("*.safetensors"))
        if p.is_file() and p not in named
    ]
    yield from named
    yield from sorted(everything, key=lambda p: p.name != name)

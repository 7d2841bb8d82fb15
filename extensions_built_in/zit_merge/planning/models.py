"""Where the models are that a section names: `trainer`, a folder or file, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from ..config.schema import Bake, Extract, Lora, Step
from ..errors import SettingError, located, other_tensors
from ..files import hub
from ..files.paths import file_name, system_path, unquoted, user_path
from ..formats.checkpoint import Checkpoint, open_checkpoint
from ..formats.difference import DIFFERENCE, difference
from ..formats.spec import LoraSpec
from .context import RunContext
from .factors import lora_factors
from .training import table
from .types import BakeTarget, Input

TRAINER = "trainer"


def find_model(source: str, context: RunContext) -> Path | None:
    """The folder or file of a model.

    Args:
        source: `trainer`, a path, or user/repo[@revision] or user/repo/file.safetensors of the hub, hf: before it or not.
        context: Where the section runs.

    Returns:
        None for one on the hub that is not in the local cache and may not be fetched now.

    Raises:
        SettingError: There is no such model.
    """
    source = _of_training(context) if source == TRAINER else source
    if path := _on_disk(source, context):
        return path
    name = source.removeprefix(hub.HUB_PREFIX)
    looked = ", ".join(dict.fromkeys(str(path.parent) for path in _candidates(source, context)))
    if name == source and not _ON_HUB.fullmatch(source):
        user_path(source)  # it may tell why
        raise SettingError(f"{source} is not there (looked in {looked}): give the folder or the file of a model")
    try:
        if name.lower().split("@")[0].endswith(".safetensors"):
            file = hub.parse(hub.HUB_PREFIX + name)
            return hub.download(file) if context.may_download else hub.cached(file)
        return hub.model_folder(name, may_download=context.may_download)
    except SettingError as e:
        if name == source:
            e.message = f"{source} is not there (looked in {looked}), nor on the hub: {e.message}"
        raise


_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[^@]+)?|[\w.-]+/[\w.-]+/.+\.safetensors(@[^@]+)?")


def _candidates(source: str, context: RunContext) -> list[Path]:
    """Where a path may be."""
    wanted = system_path(unquoted(source))
    folders = [*context.folders, *context.lora_folders]
    return list(
        map(system_path, dict.fromkeys((*(f / wanted for f in folders), *(f / wanted.name for f in context.lora_folders))))
    )


def _on_disk(source: str, context: RunContext) -> Path | None:
    """The folder or file of that path; None where there is none, and for a name on the hub."""
    if source.startswith(hub.HUB_PREFIX):
        return None
    return next((path for path in _candidates(source, context) if path.exists()), None)


def model_label(source: str, context: RunContext) -> str:
    """What a recipe calls a model: its name on the hub, or that of its folder or file."""
    source = _of_training(context) if source == TRAINER else source
    path = _on_disk(source, context)
    if path is None:
        return source
    return path.parent.name if path.name == "transformer" else path.name


def _of_training(context: RunContext) -> str:
    if context.training is None:
        raise SettingError(f"{TRAINER} needs a training process before this section in the job: give the path of the model")
    name = table(context.training.config, "model").get("name_or_path")
    if not isinstance(name, str) or not name.strip():
        raise SettingError(f"{TRAINER}: {context.training.loc}.model.name_or_path names no model: give the path of the model")
    return name


def open_model(source: str, context: RunContext, shapes: str) -> Checkpoint | None:
    """A model, described; None for one that is still on the hub.

    Raises:
        SettingError, ZitMergeError: There is no such model, or it is no Z-Image.
    """
    path = find_model(source, context)
    return open_checkpoint(path, shapes=shapes) if path else None


def difference_input(spec: Lora, asked: Extract, context: RunContext, shapes: str) -> Input:
    """The difference of two models as an input.

    Args:
        spec: The LoRA that it stands for.
        asked: The two models.
        context: Where the section runs.
        shapes: Of the step.

    Raises:
        SettingError, ZitMergeError: There are no such models, or they don't belong together; located from `lora` on.
    """
    models, labels = [], []
    for key in ("extract", "base"):
        with located(key):
            source = getattr(asked, key)
            models.append(open_model(source, context, shapes))
            labels.append(model_label(source, context))
    tuned, base = models
    if tuned is None or base is None:
        known = LoraSpec({}, {}, "bf16", (DIFFERENCE,))
        return Input(spec, labels[0], known, lora_factors(spec), Path(labels[0]), source=labels[1])
    pair = difference(tuned, base)
    for model, wanted in ((tuned, spec.sha256), (base, spec.base_sha256)):
        if wanted and model.sha256() != wanted:
            raise other_tensors(model.path, wanted)
    return Input(spec, labels[0], pair.known, lora_factors(spec), tuned.path, pair=pair, source=labels[1])


def bake_target(step: Step, context: RunContext) -> BakeTarget | None:
    """The model that a step writes; None where it writes none.

    Raises:
        SettingError, ZitMergeError: There is no such base, or it is no Z-Image; located from the step on.
    """
    asked = step.bake
    if asked is None:
        return None
    source = asked.base or step.base
    if source is None:
        raise SettingError("is missing: name the model that the merge goes into, base: trainer or a path", "bake.base")
    with located("bake.base" if asked.base else "base"):
        base = open_model(source, context, step.shapes)
    return BakeTarget(asked, base, model_label(source, context), baked_path(step, context))


def baked_path(step: Step, context: RunContext) -> Path:
    """The file or folder of the whole model that a step writes."""
    asked = step.bake or Bake()
    if context.baked:
        return context.baked
    ending = ".safetensors" if asked.format == "comfyui" else ""
    return context.output_dir / (asked.file or f"{context.prefix}{file_name(context.job)}_{step.name}_baked{ending}")

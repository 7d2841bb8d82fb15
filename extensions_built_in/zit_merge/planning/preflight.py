"""The training before us, looked at before it starts: what can't work or would not do what its config says, and what is worth
knowing.

Errors stop the job while nothing is lost yet; advice is only printed. What the toolkit itself can try, its schedulers and whether
an optimizer's package is there, is handed in as a `Toolkit`; without one the tables here stand for it, measured with AI-Toolkit
0.12.26.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import TYPE_CHECKING, Any

from ..config.job import Job
from ..config.schema import PROCESS_TYPE, Section
from ..errors import SettingError, ZitMergeError, located, nearest
from ..formats.safetensors_file import SafetensorsFile
from .context import RunContext
from .training import ARCHS, LEFT_ALONE, Training, table, training_before

if TYPE_CHECKING:
    import torch

RESTARTS = "cosine_with_restarts"
Scheduler = Callable[..., Any]  # (name, **parameters): what toolkit.scheduler.get_lr_scheduler does with `one_number()`

# name -> (torch's class, what total_iters is called there); toolkit/scheduler.py
_SCHEDULERS: Mapping[str, tuple[str, str]] = {
    "cosine": ("CosineAnnealingLR", "T_max"),
    RESTARTS: ("CosineAnnealingWarmRestarts", "T_0"),
    "constant": ("ConstantLR", "total_iters"),
    "linear": ("LinearLR", "total_iters"),
}
_WARMUP = "constant_with_warmup"

# toolkit/optimizer.py: name -> the package that it needs beside the toolkit's own
OPTIMIZERS: Mapping[str, str | None] = {
    **dict.fromkeys(("adam", "adamw", "adagrad", "adafactor", "adam8", "adamw8", "prodigy8bit"), None),
    **dict.fromkeys(("automagic", "automagic2", "automagic3", "automagicexperiment"), None),
    **dict.fromkeys(("adam8bit", "adamw8bit", "ademamix8bit", "lion8bit"), "bitsandbytes"),
    **dict.fromkeys(("dadaptation", "dadaptationadam", "dadaptationlion"), "dadaptation"),
    "prodigy": "prodigyopt",
    "lion": "lion_pytorch",
}
# What toolkit/extension.py finds in extensions_built_in, AceStepCaptioner and other captioners aside.
PROCESS_TYPES = (
    *("diffusion_trainer", "sd_trainer", "ui_trainer", "concept_slider", "ultimate_slider_trainer"),
    *("image_reference_slider_trainer", "concept_replacer", "textual_inversion_trainer", "pure_lora_generator"),
    *("reference_generator", "batch_img2img", "dataset_tools", "super_tagger", "sync_from_collection", PROCESS_TYPE),
)
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")


def one_number() -> torch.optim.Optimizer:
    """An optimizer for a scheduler to be tried with."""
    import torch

    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)


def known_scheduler(name: str, **parameters: Any) -> Any:
    """What AI-Toolkit's get_lr_scheduler does with these parameters, without the toolkit.

    Args:
        name: As `lr_scheduler` has it.
        **parameters: Of the scheduler, as `lr_scheduler_params` has them.

    Raises:
        Exception: As it would.
    """
    if name == _WARMUP:
        parameters.pop("total_iters")
        unknown = set(parameters) - {"num_warmup_steps", "last_epoch"}
        if unknown:
            raise TypeError(f"unexpected {', '.join(sorted(unknown))}")
        return None
    if name not in _SCHEDULERS:
        raise ValueError(f"{name} is none of {', '.join((*_SCHEDULERS, _WARMUP))}")
    kind, length = _SCHEDULERS[name]
    if "total_iters" in parameters:
        parameters[length] = parameters.pop("total_iters")
    if parameters.keys() == {length} and isinstance(steps := parameters[length], int) and steps > 0:
        return None  # nothing that torch could refuse
    import torch

    return getattr(torch.optim.lr_scheduler, kind)(one_number(), **parameters)


def known_trouble(optimizer: str) -> str:
    """Why AI-Toolkit can't make an optimizer, by its name; empty if it can."""
    if optimizer in OPTIMIZERS:
        return ""
    return f"AI-Toolkit knows no {optimizer}{nearest(optimizer, OPTIMIZERS)}; it has {', '.join(OPTIMIZERS)}"


@dataclass(frozen=True)
class Toolkit:
    """What tells of a training: the parts of an AI-Toolkit, each asked only where it is needed; else what is known of them here.

    Attributes:
        scheduler: Its maker of schedulers.
        optimizer_trouble: Why it can't make an optimizer, by its name; empty if it can.
        archs: Its families of Z-Image.
        process_types: What `type` can be in its jobs; None where its extensions can't be asked.
        old_ema: Whether it is older than its fix of EMA.
    """

    scheduler: Scheduler = known_scheduler
    optimizer_trouble: Callable[[str], str] = known_trouble
    archs: Callable[[], Collection[str]] = lambda: ARCHS
    process_types: Callable[[], Collection[str] | None] = lambda: None
    old_ema: Callable[[], bool] = lambda: False


NO_TOOLKIT = Toolkit()


def check_types(job: Job, toolkit: Toolkit = NO_TOOLKIT) -> None:
    """Checks the type of every process: AI-Toolkit's UI tells of a wrong one by an exit code only.

    Args:
        job: The whole config.
        toolkit: Whose processes they are.

    Raises:
        SettingError: It is missing, or is none that there is.
    """
    if job.recipe:
        return
    for index, raw in enumerate(job.processes):
        with located(job.loc(index)):
            if not isinstance(raw, Mapping):
                raise SettingError(f"must be a mapping with a type, not {str(raw)[:60]!r}")
            kind = raw.get("type")
            if not isinstance(kind, str) or not kind:
                hint = f"write type: {PROCESS_TYPE}" if "steps" in raw else "AI-Toolkit starts no job with a process without one"
                raise SettingError(f"is missing: {hint}", "type")
            if kind in PROCESS_TYPES:
                continue
            known = toolkit.process_types()
            if known is None and not get_close_matches(kind.lower(), PROCESS_TYPES, cutoff=0.9):
                continue  # one of the user's own extensions may have it
            if kind not in (known or ()):
                there = sorted({*PROCESS_TYPES, *(known or ())})
                raise SettingError(f"AI-Toolkit has no process {kind}{nearest(kind, there)}; it has {', '.join(there)}", "type")


def preflight(job: Job, context: RunContext, section: Section, toolkit: Toolkit = NO_TOOLKIT) -> list[str]:
    """Checks the training before a section and gives advice on it; nothing where there is none.

    Sections that share a training share their train_fixes, and only the first one gives the advice.

    Args:
        job: The whole config.
        context: Where the section runs.
        section: The section.
        toolkit: What tells of the training.

    Raises:
        ZitMergeError: The training can't work, or would not do what its config says.
    """
    training = context.training
    if training is None:
        if section.train_fixes:
            raise SettingError("there is no training before this section: drop it", context.at("train_fixes"))
        return []
    sharing = [
        (i, s) for i, s in job.sections() if (t := training_before(job.name, job.processes, i)) and t.index == training.index
    ]
    fixes = {fix: f"{job.loc(i)}.train_fixes" for i, s in reversed(sharing) for fix in s.train_fixes}
    if str(table(training.config, "model").get("arch", ARCHS[0])).split(":")[0] != ARCHS[0]:  # that one every toolkit has
        training.check_arch(toolkit.archs())
    train = table(training.config, "train")
    _check_resumed(training)
    _check_scheduler(training, train, fixes, toolkit.scheduler)
    name = str(train.get("optimizer") or "adamw").lower()  # TrainConfig
    if trouble := toolkit.optimizer_trouble(name):
        raise SettingError(trouble, f"{training.loc}.train.optimizer")
    if context.loc != job.loc(sharing[0][0]):  # another section gives the advice
        return []
    return advice(training, toolkit.old_ema())


def restart_period(training: Training, loc: str) -> tuple[int, dict[str, Any]]:
    """(steps of the first cosine, the other parameters) for `train_fixes: [cosine_with_restarts]`.

    Args:
        training: The process before us.
        loc: Of train_fixes.

    Raises:
        ZitMergeError: The training has another scheduler, or no period.
    """
    train = table(training.config, "train")
    if train.get("lr_scheduler") != RESTARTS:
        raise SettingError(
            f"{training.loc}.train.lr_scheduler is {train.get('lr_scheduler') or 'constant'}: set it to {RESTARTS}, "
            "or drop the fix",
            loc,
        )
    parameters = dict(table(train, "lr_scheduler_params"))
    parameters.pop("max_iterations", None)  # not torch's; in the toolkit it only keeps total_iters from being overwritten
    periods = {key: parameters.pop(key) for key in ("total_iters", "T_0") if key in parameters}
    at = f"{training.loc}.train.lr_scheduler_params"
    if len(set(periods.values())) != 1:
        raise SettingError("give the steps until the first restart, once: total_iters: 500", at)
    period = next(iter(periods.values()))
    if not isinstance(period, int) or isinstance(period, bool) or period < 1:
        raise SettingError(f"total_iters must be a whole number of steps, not {period!r}", at)
    return period, parameters


def _check_resumed(training: Training) -> None:
    """Raises if the file that its start will load, after the model, can't be loaded."""
    path = training.resumes_from()
    if path is None or path.suffix != ".safetensors":
        return
    try:
        SafetensorsFile(path).close()
    except ZitMergeError as e:
        what = str(e).rpartition(": ")[0]
        is_own = path.parent == training.folder
        how = "resume from it and fail: move it away" if is_own else "start from it and fail: copy it again"
        loc = training.loc if is_own else f"{training.loc}.network.pretrained_lora_path"
        raise SettingError(f"{what}, and the training would {how}", loc, is_complete=True) from None


def _check_scheduler(training: Training, train: Mapping[str, Any], fixes: Mapping[str, str], scheduler: Scheduler) -> None:
    """Raises unless it can be made and does what it says.

    Args:
        training: The process before us.
        train: Its `train`.
        fixes: Each fix that is asked for -> the location of the train_fixes that asks.
        scheduler: The toolkit's maker of schedulers.
    """
    name, given = train.get("lr_scheduler") or "constant", dict(table(train, "lr_scheduler_params"))
    loc = f"{training.loc}.train.lr_scheduler"
    if RESTARTS in fixes:
        period, given = restart_period(training, fixes[RESTARTS])
        given["T_0"] = period
    elif name == RESTARTS:
        raise SettingError(
            f"{RESTARTS} never restarts in AI-Toolkit, which replaces its period by the number of steps: write cosine, "
            f"or add train_fixes: [{RESTARTS}] to the zit_merge section and total_iters to lr_scheduler_params",
            loc,
        )
    elif "max_iterations" not in given:
        for key in ("total_iters", "T_max"):
            if given.get(key, training.steps) != training.steps:
                raise SettingError(
                    f"AI-Toolkit replaces {given[key]} by the number of steps, {training.steps}: drop {key}",
                    f"{loc}_params.{key}",
                )
        given["total_iters"] = training.steps  # as BaseSDTrainProcess does
    try:
        scheduler(name, **given)
    except Exception as e:
        shown = ", ".join(f"{k}: {v}" for k, v in table(train, "lr_scheduler_params").items()) or "none"
        reason = " ".join(str(e).split())
        raise SettingError(
            f"AI-Toolkit can't make {name} with the parameters {shown} ({reason}): use constant, cosine or linear, with torch's "
            "parameters",
            loc,
        ) from e


def advice(training: Training, old_ema: bool = False) -> list[str]:
    """What is worth knowing of a training, a sentence each.

    Args:
        training: The process before us.
        old_ema: The toolkit is older than its fix of EMA.
    """
    train, network, sample = (table(training.config, key) for key in ("train", "network", "sample"))
    datasets = [d for d in _list(training.config.get("datasets")) if isinstance(d, Mapping)]
    found = [*_of_rate(train, training.steps), *_of_data(train, datasets, training.steps)]
    scale = train.get("differential_guidance_scale", 3)
    if not train.get("do_differential_guidance") or scale != 3:
        found.append("do_differential_guidance with differential_guidance_scale: 3 is what Z-Image Turbo LoRAs are trained with")
    prompts = len(_list(sample.get("samples")) or _list(sample.get("prompts")))
    if prompts > 1 and not train.get("disable_sampling"):
        found.append(f"{prompts} sample prompts: each one pauses the training at every sampling, one will do")
    rank, alpha = network.get("rank", network.get("linear")), network.get("linear_alpha", network.get("alpha"))
    if alpha is not None and rank is not None and alpha != rank and network.get("type", "lora") == "lora":
        found.append(f"linear_alpha {alpha} is ignored by AI-Toolkit: it trains with alpha = linear = {rank}")
    if old_ema and table(train, "ema_config").get("use_ema"):
        found.append("ema_config has no effect in this AI-Toolkit, which is older than 0.10.5 (2026-06-07): update it")
    for name in strangers(training):
        path = training.folder / name
        if name.startswith(f"{training.job}_merged"):  # ui/src/components/FilesWidget.tsx
            found.append(
                f"{path} is named as what AI-Toolkit's MERGE button writes, which applies each strength twice; it would be taken "
                "for a checkpoint and resumed from: move it away"
            )
        else:
            found.append(f"{path} would be taken for a checkpoint and resumed from: move it away")
    return [f"{training.loc}: {text}" for text in found]


def _of_rate(train: Mapping[str, Any], steps: int) -> list[str]:
    name, parameters = train.get("lr_scheduler") or "constant", table(train, "lr_scheduler_params")
    found = []
    if name == "linear" and "start_factor" not in parameters:
        found.append("lr_scheduler linear rises from a third of lr; to fall: {start_factor: 1.0, end_factor: 0.0}")
    warmup = parameters.get("num_warmup_steps", 1000)
    if name == _WARMUP and isinstance(warmup, int) and warmup >= steps:
        found.append(f"the warm-up takes {warmup} of {steps} steps: lr never arrives; set num_warmup_steps")
    lr = train.get("lr", 1e-6)
    if (
        str(train.get("optimizer") or "").lower().startswith(("prodigy", "dadaptation"))
        and isinstance(lr, int | float)
        and lr < 0.1
    ):
        found.append(f"{train['optimizer']} prints lr 1.0 but trains with lr {lr:g}: write lr: 1.0")
    return found


def _of_data(train: Mapping[str, Any], datasets: Sequence[Mapping[str, Any]], steps: int) -> list[str]:
    found = []
    if not train.get("cache_text_embeddings") and not any(d.get("cache_text_embeddings") for d in datasets):
        found.append("cache_text_embeddings: true encodes each caption once and frees the text encoder's memory")
    if any(not (d.get("cache_latents") or d.get("cache_latents_to_disk")) for d in datasets):
        found.append("cache_latents_to_disk: true encodes each image once instead of at every step")
    sizes = [size for d in datasets if isinstance(size := d.get("resolution"), list)]
    if any(len(set(map(str, size))) > 1 for size in sizes):
        found.append("several resolutions train every image at every size: one, 1024, serves")
    seen = steps * prod(n for key in ("batch_size", "gradient_accumulation") if isinstance(n := train.get(key, 1), int))
    images = sum(_images(d) for d in datasets)
    if images > seen:
        found.append(f"{steps} steps see {seen} images, the datasets hold {images} with their repeats: some are never seen")
    return found


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _images(dataset: Mapping[str, Any]) -> int:
    """Pictures of a dataset's folder, its repeats counted; 0 where it can't be looked at."""
    folder, repeats = str(dataset.get("folder_path") or dataset.get("dataset_path") or ""), dataset.get("num_repeats", 1)
    # os.walk passes over what vanishes or can't be read: somebody may be copying images there now
    images = sum(name.lower().endswith(_IMAGES) for _, _, names in os.walk(folder) for name in names) if folder else 0
    return images * (repeats if isinstance(repeats, int) else 1)


def strangers(training: Training) -> list[str]:
    """Files in the save folder that are no saves of the trainer, but that its next start would resume from."""
    if not os.path.isdir(training.folder):
        return []
    own = re.compile(re.escape(training.job) + r"(_\d{9})?\.(safetensors|pt)")
    return sorted(
        p.name
        for p in training.folder.iterdir()
        if training.claims(p) and not own.fullmatch(p.name) and not any(word in p.name for word in LEFT_ALONE)
    )

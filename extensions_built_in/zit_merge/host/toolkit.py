"""Every part of AI-Toolkit that zit_merge uses, in one place.

Works from the toolkit of 2025-11-28 (0.7.6, the first with Z-Image) on; tried with 0.12.26. Where a newer toolkit lacks a part
that a merge can do without, such as its schedulers to try, what `check` does without a toolkit is done; where it lacks one that
is needed, a sentence names that part before the training starts.

The base class (`jobs.process.BaseExtensionProcess`) and the registration (`toolkit.extension.Extension`) stand in process.py and
extension.py; the trainer's hooks, each asked for before it is used, in status.py and memory.py.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ZitMergeError

if TYPE_CHECKING:  # what is needed is imported where it is: a missing package must not stop other jobs of the toolkit
    import torch

    from ..planning.preflight import Toolkit

SINCE = "0.7.6 (2025-11-28)"
_ITS_READER = "oyaml"  # reads every config there (toolkit/config.py); few other environments have it


@contextmanager
def silence() -> Iterator[None]:
    """What the toolkit prints when it is only asked something is no output of ours."""
    with redirect_stdout(io.StringIO()):
        yield


@silence()
def _find(module: str, name: str) -> Any:
    """A part of the toolkit; None if this toolkit does not have it."""
    try:
        return getattr(import_module(module), name)
    except Exception:  # the import runs much of the toolkit and its packages: whatever breaks there, the part can't be had
        return None


def part(module: str, name: str) -> Any:
    """A part of the toolkit that is needed.

    Args:
        module: Such as `toolkit.config_modules`.
        name: Of something in it.

    Raises:
        ZitMergeError: There is no toolkit, or it lacks the part.
    """
    if find_spec("toolkit") is None:
        raise ZitMergeError(
            "there is no AI-Toolkit here, whose model loading is needed: run this in AI-Toolkit's folder, where the "
            "extension is installed, with the Python that it runs with"
        )
    if (found := _find(module, name)) is None:
        raise ZitMergeError(
            f"this AI-Toolkit ({version()}) has no {module}.{name}: zit_merge was made for {SINCE} and newer; update both"
        )
    return found


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """A model without what accelerate and torch.compile wrap around it (toolkit/accelerator.py)."""
    return part("toolkit.accelerator", "unwrap_model")(model)


def found() -> Toolkit:
    """What tells of a training: this toolkit's parts, or what is known of them without a toolkit.

    The same without its packages: another Python than AI-Toolkit's own does not know what a training can use.
    """
    from ..planning.preflight import NO_TOOLKIT, Toolkit

    if find_spec("toolkit") is None or find_spec(_ITS_READER) is None:
        return NO_TOOLKIT
    return Toolkit(make_scheduler, optimizer_trouble, zimage_archs, process_types, has_broken_ema)


def version() -> str:
    """The toolkit's version, as far as it says one."""
    return str(_find("version", "VERSION") or "of unknown version")


def has_broken_ema() -> bool:
    """Whether it is older than the fix of EMA, which was never set up before 0.10.5 (2026-06-07)."""
    numbers = version().split(".")
    return all(n.isdecimal() for n in numbers) and [int(n) for n in numbers] < [0, 10, 5]


def accelerator() -> Any:
    """The job's accelerator (toolkit/accelerator.py).

    Raises:
        ZitMergeError: The toolkit has none, or it does not see the processes that were started: each would take itself for the
            main one.
    """
    found = part("toolkit.accelerator", "get_accelerator")()
    started = os.environ.get("WORLD_SIZE", "")  # of torchrun
    if started.isdecimal() and int(started) > found.num_processes:
        raise ZitMergeError(
            f"{started} processes were started (WORLD_SIZE), accelerate sees {found.num_processes}, so that each would do "
            "everything: without a GPU set ACCELERATE_USE_CPU=true, else start one process, or several with accelerate launch"
        )
    return found


def device_of(name: str) -> torch.device:
    """The device of `device:` in the toolkit: `auto` is its accelerator's, as is any where several processes have one each.

    Raises:
        ZitMergeError: torch does not see the device that was named.
    """
    from ..planning.device import pick_device

    found = accelerator()
    return found.device if name == "auto" or found.num_processes > 1 else pick_device(name)


def flush() -> None:
    """Empties the caches of the GPU."""
    import torch

    if found := _find("toolkit.basic", "flush"):
        found()
    elif torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_config(path: Path, name: str) -> dict[str, Any]:
    """A config file as the toolkit reads it.

    Args:
        path: The file.
        name: What replaces [name].

    Raises:
        ValueError: This toolkit reads configs in another way.
    """
    get_config = _find("toolkit.config", "get_config")
    if get_config is None:
        raise ValueError("no toolkit.config.get_config")
    return get_config(str(path.absolute()), name)


def config_root() -> Path:
    """Where the toolkit looks for configs by name."""
    return Path(_find("toolkit.paths", "CONFIG_ROOT") or "config")


@silence()
def optimizer_trouble(name: str) -> str:
    """Why the toolkit can't make an optimizer here; empty if it can (toolkit/optimizer.py)."""
    import torch

    from ..planning.preflight import known_trouble

    get_optimizer = _find("toolkit.optimizer", "get_optimizer")
    if get_optimizer is None:
        return known_trouble(name)
    try:
        get_optimizer([torch.nn.Parameter(torch.zeros(1))], name, 1e-4, {})
    except ImportError as e:
        return f"{name} needs a package that is not installed ({' '.join(str(e).split())}): install it"
    except Exception as e:  # what else goes wrong with a single number to train, a GPU is missing, says nothing of the training
        return f"AI-Toolkit knows no {name} ({e}): use adamw8bit, adamw or prodigy" if "nknown optimizer" in str(e) else ""
    return ""


@silence()
def zimage_archs() -> set[str]:
    """The families of model.arch that are Z-Image here (toolkit/util/get_model.py)."""
    from ..planning.training import ARCHS

    get_all_models = _find("toolkit.util.get_model", "get_all_models")
    try:
        found = {str(getattr(model, "arch", "")) for model in get_all_models()} if get_all_models else set()
    except Exception:  # it imports every extension, broken ones too
        found = set()
    return {arch for arch in found if arch.startswith("zimage")} or set(ARCHS)


@silence()
def process_types() -> set[str] | None:
    """What `type` can be in a job here, extensions included; None if it can't be told (toolkit/extension.py)."""
    get_dict = _find("toolkit.extension", "get_all_extensions_process_dict")
    try:
        return set(get_dict()) if get_dict else None
    except Exception:  # it imports every extension, broken ones too
        return None


@silence()
def make_scheduler(name: str, **parameters: Any) -> Any:
    """What the toolkit makes of a learning-rate scheduler's name and parameters (toolkit/scheduler.py).

    Args:
        name: As `lr_scheduler` has it.
        **parameters: Of the scheduler, as `lr_scheduler_params` has them.

    Raises:
        Exception: It can't make one.
    """
    from ..planning.preflight import known_scheduler, one_number

    get_lr_scheduler = _find("toolkit.scheduler", "get_lr_scheduler")
    return get_lr_scheduler(name, one_number(), **parameters) if get_lr_scheduler else known_scheduler(name, **parameters)

"""Every part of AI-Toolkit that zit_merge uses, in one place.

Works from the toolkit of 2025-11-28 (0.7.6, the first with Z-Image) on; tried with 0.12.26. A part that a future toolkit has
moved gives a sentence with its name, and only where it is needed.

The base class (`jobs.process.BaseExtensionProcess`) and the registration (`toolkit.extension.Extension`) stand in process.py and
extension.py; the trainer's hooks in status.py and memory.py.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ZitMergeError

SINCE = "0.7.6 (2025-11-28)"


def _part(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise ZitMergeError(
            f"this AI-Toolkit ({version()}) has no {module}.{name}: zit_merge was made for {SINCE} and newer; update both"
        ) from e


def version() -> str:
    """The toolkit's version, as far as it says one."""
    try:
        return str(import_module("version").VERSION)
    except (ImportError, AttributeError):
        return "of unknown version"


def has_broken_ema() -> bool:
    """Whether it is older than the fix of EMA, which was never set up before 0.10.5 (2026-06-07)."""
    numbers = version().split(".")
    return all(n.isdecimal() for n in numbers) and [int(n) for n in numbers] < [0, 10, 5]


def accelerator() -> Any:
    """The job's accelerator (toolkit/accelerator.py)."""
    return _part("toolkit.accelerator", "get_accelerator")()


def flush() -> None:
    """Empties the caches of the GPU."""
    _part("toolkit.basic", "flush")()


def read_config(path: Path, name: str) -> dict[str, Any]:
    """A config file as the toolkit reads it.

    Args:
        path: The file.
        name: What replaces [name].
    """
    return _part("toolkit.config", "get_config")(str(path.absolute()), name)


def config_root() -> Path:
    """Where the toolkit looks for configs by name."""
    return Path(_part("toolkit.paths", "CONFIG_ROOT"))


def optimizer_trouble(name: str) -> str:
    """Why the toolkit can't make an optimizer here; empty if it can (toolkit/optimizer.py).

    What else goes wrong with a single number to train (a GPU is missing) says nothing of the training.
    """
    import torch

    make = _part("toolkit.optimizer", "get_optimizer")
    try:
        make([torch.nn.Parameter(torch.zeros(1))], name, 1e-4, {})
    except ImportError as e:
        return f"{name} needs a package that is not installed ({' '.join(str(e).split())}): install it"
    except ValueError as e:
        return f"AI-Toolkit knows no {name} ({e}): use adamw8bit, adamw or prodigy" if "nknown optimizer" in str(e) else ""
    except Exception:  # noqa: BLE001
        return ""
    return ""


def get_lr_scheduler() -> Callable[..., Any]:
    """The maker of learning-rate schedulers (toolkit/scheduler.py)."""
    return _part("toolkit.scheduler", "get_lr_scheduler")

"""ComfyUI's own code on a Z-Image of zeros: its key map, loader, patcher and arithmetic, from a checkout of its source.

    git clone https://github.com/Comfy-Org/ComfyUI ~/ComfyUI    (or set COMFYUI_ROOT)

The package `comfy` is imported as it is; a checkout is enough. Of what it imports, only the packages in STUBS may be missing: no
line of them runs here. As a script it is a process that answers requests, so that none of this is in the process of the tests.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS)]

from clients.comfyui import NORMS, QKV, Applied, Shapes, Target, Tensors, native  # noqa: E402

STUBS = ("comfy_aimdo", "scipy", "torchvision")
PREFIX, SUFFIX = "diffusion_model.", ".weight"


def root() -> Path | None:
    """The checkout, where there is one."""
    folder = Path(os.environ.get("COMFYUI_ROOT") or Path.home() / "ComfyUI")
    return folder if (folder / "comfy" / "lora.py").is_file() else None


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of STUBS that are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in STUBS else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module: Any = mock.MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@cache
def comfy() -> Any:
    """ComfyUI's package, on the CPU."""
    import host.shim  # noqa: F401 - CUDA builds of torchvision beside a CPU-only torch

    folder = root()
    assert folder is not None, "look with root() first"
    sys.path.insert(0, str(folder))
    sys.meta_path.append(_Stubs())  # after all that are installed
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_patcher

    return comfy


def version() -> str:
    """Of the checkout."""
    folder = root()
    assert folder is not None, "look with root() first"
    found = re.search(r'__version__ = "(.+)"', (folder / "comfyui_version.py").read_text(encoding="utf-8"))
    return found[1] if found else "of an unknown version"


def model(shapes: Shapes) -> Any:
    """A model that ComfyUI takes for Z-Image, all zeros, with these linears under their native names and the blocks' norms."""
    base = comfy().model_base.Lumina2
    dim = shapes["layers.0.attention.to_q"][0]
    sizes: dict[str, tuple[int, ...]] = {}
    for module, (out, into) in shapes.items():
        sizes[native(module)] = (3 * out if module.endswith(QKV) else out, into)
    for block in dict.fromkeys(name.rpartition(".attention.")[0] for name in shapes if ".attention." in name):
        sizes |= {native(f"{block}.{norm}"): (dim,) for norm in NORMS}
    sizes["cap_embedder.0"] = (dim,)

    class Tiny(base):  # its own __init__ builds the real network
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.model_config = SimpleNamespace(unet_config={"n_layers": 30, "n_refiner_layers": 2, "dim": dim})
            for name, size in sizes.items():
                self._place(PREFIX + name, size)

        def _place(self, path: str, size: tuple[int, ...]) -> None:
            at: torch.nn.Module = self
            for part in path.split("."):
                if part not in at._modules:
                    at.add_module(part, torch.nn.Module())
                at = at._modules[part]
            at.register_parameter("weight", torch.nn.Parameter(torch.zeros(size), requires_grad=False))

    return Tiny()


def key_map(shapes: Shapes) -> dict[str, Target]:
    """The names under which ComfyUI looks for a LoRA of the linears and norms, as `clients.comfyui.key_map` has them."""
    tiny, found = model(shapes), dict[str, Target]()
    weights, dim = tiny.state_dict(), shapes["layers.0.attention.to_q"][0]
    for name, to in comfy().lora.model_lora_keys_unet(tiny, {}).items():
        key, third = (to, None) if isinstance(to, str) else (to[0], to[1][1] // dim)
        if key in weights and key.endswith(SUFFIX):
            found[name] = Target(key.removeprefix(PREFIX).removesuffix(SUFFIX), third)
    return found


def apply(tensors: Tensors, shapes: Shapes) -> Applied:
    """What a file changes, as `clients.comfyui.apply` says it: the steps of comfy.sd.load_lora_for_models, in float64."""
    code, tiny, out = comfy(), model(shapes), Applied()
    with _logged() as lines:
        names = code.lora.model_lora_keys_unet(tiny, {})
        loaded = code.lora.load_lora(code.lora_convert.convert_lora(dict(tensors)), names)
        patcher = code.model_patcher.ModelPatcher(tiny, torch.device("cpu"), torch.device("cpu"))
        patcher.add_patches(loaded, 1.0)
        weights = tiny.state_dict()
        changed = {
            key: code.lora.calculate_weight(patches, weights[key].double(), key, intermediate_dtype=torch.float64)
            for key, patches in patcher.patches.items()
        }
    out.ignored = [line.removeprefix("lora key not loaded: ") for line in lines if line.startswith("lora key not loaded: ")]
    out.failed = [m[1] for line in lines if (m := re.match(rf"ERROR \w+ {re.escape(PREFIX)}(\S+){re.escape(SUFFIX)} ", line))]
    for module in shapes:
        weight = changed.get(f"{PREFIX}{native(module)}{SUFFIX}")
        if weight is not None and weight.any():
            rows = weight.chunk(3)[QKV.index(module[-4:])] if module.endswith(QKV) else weight
            if rows.any():
                out.deltas[module] = rows.clone()
    linears = {f"{PREFIX}{native(module)}{SUFFIX}" for module in shapes}
    out.elsewhere = sorted(changed.keys() - linears)
    return out


@contextmanager
def _logged() -> Iterator[list[str]]:
    """The lines that ComfyUI logs meanwhile."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler()
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)


class Process:
    """ComfyUI in a process of its own; the same functions, with the exceptions that they raise there."""

    def __init__(self) -> None:
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
        self._folder = tempfile.TemporaryDirectory()
        self._log = (Path(self._folder.name) / "log").open("w+")
        command = [sys.executable, str(Path(__file__).resolve())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, env=env, text=True)

    def key_map(self, shapes: Shapes) -> Mapping[str, Target]:
        """See the function."""
        return self._ask("key_map", shapes)

    def apply(self, tensors: Tensors, shapes: Shapes) -> Applied:
        """See the function."""
        return self._ask("apply", tensors, shapes)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._log.close()
        self._folder.cleanup()

    def _ask(self, *request: Any) -> Any:
        path = Path(self._folder.name) / "request.pt"
        torch.save(request, path)
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            self._log.seek(0)
            raise AssertionError(f"ComfyUI at {root()} can't be run here: {self._log.read()[-2000:]}")
        answer = torch.load(path, weights_only=False)
        if isinstance(answer, Exception):
            raise answer
        return answer


def serve(requests: Iterable[str]) -> None:
    """Answers the files that the lines name, each in its own place."""
    said, sys.stdout = sys.stdout, sys.stderr  # ComfyUI may print
    comfy()
    for line in requests:
        name, *arguments = torch.load(line.strip(), weights_only=False)
        try:
            answer: Any = {"apply": apply, "key_map": key_map}[name](*arguments)
        except Exception as e:  # whatever ComfyUI raises on a file
            answer = type(e)(*map(str, e.args))
        torch.save(answer, line.strip())
        print("done", file=said, flush=True)


if __name__ == "__main__":
    serve(sys.stdin)

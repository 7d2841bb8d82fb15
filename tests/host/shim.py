"""Importing this makes CUDA builds of torchvision importable beside a CPU-only torch."""

import importlib.util
import sys
from pathlib import Path

import torch

SHIM = Path(__file__).parent / "cpu_shim"
if not torch.version.cuda and "cpu_shim" not in sys.modules:
    sys.path.append(str(SHIM))
    spec = importlib.util.spec_from_file_location("cpu_shim", SHIM / "sitecustomize.py")
    sys.modules["cpu_shim"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["cpu_shim"])

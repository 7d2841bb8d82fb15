"""AI-Toolkit's own DoRA against our reading of its file."""

from pathlib import Path

import pytest
from oracles.dense import product, relative
from safetensors.torch import load_file, save_file

from extensions_built_in.zit_merge import load_lora
from extensions_built_in.zit_merge.formats.reader import TensorReader

pytestmark = pytest.mark.toolkit
MODULE = "layers.3.feed_forward.w1"


class Weights(dict):
    def weight(self, module):
        return self[module]


def test_a_module_of_ai_toolkit_amounts_to_the_delta_that_is_read(run_python, tmp_path):
    made = run_python(Path(__file__).with_name("dora_in_toolkit.py"), tmp_path / "made.safetensors")
    assert made.returncode == 0, made.stderr
    tensors = load_file(tmp_path / "made.safetensors")
    weight, changed = tensors.pop("W"), tensors.pop("changed")
    path = tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.{MODULE}.{key}": tensor for key, tensor in tensors.items()}, path)
    with TensorReader(load_lora(path), Weights({MODULE: weight})) as reader:
        scale, delta = reader.delta(MODULE)
    assert scale == 1.0 and relative(product(*delta), changed.double() - weight.double()) < 1e-5

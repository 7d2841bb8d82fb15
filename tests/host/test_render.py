"""Pictures of the tiny Z-Image in the real AI-Toolkit."""

from pathlib import Path

import numpy
import pytest
import torch
from host import tiny_zimage
from oracles import producers

SCRIPT = Path(__file__).with_name("render_in_toolkit.py")
pytestmark = pytest.mark.toolkit


@pytest.fixture(scope="module", params=["bf16", "quantize"])
def pictures(request, place, run_python, tmp_path_factory):
    """Name -> (h, w, 3) picture: base, LoRAs A (rank 4) and B (rank 12) and what the toolkit's own network makes of them."""
    folder = tmp_path_factory.mktemp("pictures")
    shapes = tiny_zimage.linear_shapes(tiny_zimage.transformer())
    for name, rank in (("A", 4), ("B", 12)):
        made = producers.PRODUCERS["ai-toolkit"].make(shapes, rank, rank, torch.bfloat16)
        producers.save(made, folder / f"{name}.safetensors")
    words = [] if request.param == "bf16" else ["quantize"]
    done = run_python(SCRIPT, place / "model", folder / "out.npz", folder / "A.safetensors", folder / "B.safetensors", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return dict(numpy.load(folder / "out.npz"))


def same(a, b) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def test_swapping_is_exact_and_the_base_model_untouched(pictures):
    assert same(pictures["A again"], pictures["A"]) and same(pictures["base again"], pictures["base"])
    assert same(pictures["A at 0"], pictures["base"])
    assert not same(pictures["A"], pictures["base"]) and not same(pictures["B"], pictures["A"])
    assert not same(pictures["A at 0.5"], pictures["A"]) and not same(pictures["A at 0.5"], pictures["base"])
    assert pictures["untouched"].all() and len(pictures["untouched"]) > 100


def test_pictures_are_those_of_the_toolkits_own_network(pictures):
    assert same(pictures["A"], pictures["A of the toolkit"])
    assert same(pictures["B"], pictures["B of the toolkit"]), "a rank above that of the first LoRA is not cut"


def test_a_lokr_is_applied_through_its_factors(pictures):
    def apart(a, b):
        return numpy.abs(pictures[a].astype(int) - pictures[b].astype(int)).mean()

    # in bf16 other orders of the same sum round differently
    assert apart("LoKr", "LoKr multiplied out") < 0.1 * apart("LoKr", "base")


def test_shots(pictures):
    assert pictures["wide"].shape == (64, 96, 3)
    assert not same(pictures["another seed"], pictures["base"])
    assert pictures["options are text"].shape == (64, 64, 3)
    assert not same(pictures["options are text"], pictures["base"])

"""Merges on a device that is not the CPU: no tensor of one meets one of the other, and memory may run out. See `apart`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from apart import APART, Apart
from checkpoints import SHAPES, WRITERS, model
from pairs import lora, write
from safetensors.torch import load_file
from workspace import FEW, Workspace, write_lora

from extensions_built_in.zit_merge import api, load_lora, merge
from extensions_built_in.zit_merge.algebra.methods import METHODS
from extensions_built_in.zit_merge.host.render import adding
from extensions_built_in.zit_merge.merging.made import Done
from extensions_built_in.zit_merge.merging.runner import run_plans
from extensions_built_in.zit_merge.planning import planned

WAYS = {"exact": {}, "cut": {"rank": 2}, "by energy": {"rank": {"energy": 0.9}}}


def same(one: Path, other: Path) -> bool:
    """Equal tensors, bit for bit: the device has the CPU's own kernels."""
    x, y = load_file(one), load_file(other)
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def merged(folder: Path, device: torch.device, *loras: tuple[Path, float], **how: object) -> Done:
    """A merge in a file of its own."""
    (done,) = run_plans([merge(loras, shapes="free", **how).plan(folder / f"{device.type}.safetensors")], device)
    return done


def compared(folder: Path, *loras: tuple[Path, float], limit: float = float("inf"), **how: object) -> tuple[Done, Apart]:
    """The merge there, the same as on the CPU."""
    (folder / f"{APART.type}.safetensors").unlink(missing_ok=True)
    right = merged(folder, torch.device("cpu"), *loras, **how)
    with Apart(limit) as device:
        found = merged(folder, APART, *loras, **how)
    assert same(found.path, right.path) and found.verdict.status == right.verdict.status
    return found, device


def test_the_device_is_none_of_the_cpus():
    with Apart() as device:
        here, there = torch.ones(3), torch.ones(3).to(APART)
        for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: torch.outer(there, here)):
            with pytest.raises(RuntimeError, match="on the same device"):
                mixed()
        with pytest.raises(RuntimeError):
            there.numpy()
        assert (2.0 * there + torch.tensor(1.0)).cpu().tolist() == [3.0] * 3 and float(there @ there) == 3
        assert device.memory.peak >= 12 and there[torch.tensor([0, 2])].device == APART


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(tmp_path, method, way):
    count = 2 if METHODS[method].takes == 2 else 3
    loras = [(write_lora(tmp_path, "ai-toolkit", 4, n, shapes=FEW, stem=f"{n}")[0], 0.8 - 0.1 * n) for n in range(count)]
    found, device = compared(tmp_path, *loras, method=method, **WAYS[way])
    assert device.memory.peak > 0 and not found.remarks


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["onetrainer-kohya", "ai-toolkit-lokr", "musubi-lokr", "lycoris-loha", "ai-toolkit-fullrank"])
def test_every_form(tmp_path, form, way):
    one, _ = write_lora(tmp_path, form, 2, 0, shapes=FEW)
    other, _ = write_lora(tmp_path, "ai-toolkit", 3, 1, shapes=FEW, stem="other")
    compared(tmp_path, (one, 0.7), (other, 0.5), **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_without_memory_the_step_is_made_on_the_cpu(tmp_path, way):
    loras = [(write_lora(tmp_path, "ai-toolkit", 4, n, shapes=FEW, stem=f"{n}")[0], 0.8) for n in range(2)]
    _, device = compared(tmp_path, *loras, **WAYS[way])
    found, _ = compared(tmp_path, *loras, limit=device.memory.peak / 4, **WAYS[way])
    assert found.remarks == ("lazy:0 ran out of memory, it was merged on the CPU",)


@pytest.mark.parametrize("words", [(), ("--rounding", "stochastic", "--dtype", "bf16")], ids=["nearest", "stochastic"])
def test_a_baked_model_and_a_lora_out_of_it(work: Workspace, monkeypatch, words):
    write(work.folder / "me.safetensors", lora(4, 1, 2.0, SHAPES))
    base = WRITERS["flat"](work.folder / "base", model())
    made = []
    for place in ("here", "there"):
        with contextlib.ExitStack() as device:
            if place == "there":
                for module in (api, planned):
                    monkeypatch.setattr(module, "pick_device", lambda name: APART)
                memory = device.enter_context(Apart()).memory
            baked, out = f"{place}.safetensors", f"{place}_lora.safetensors"
            work.zit("bake", "me.safetensors", "--base", base, "-o", baked, "--ratio", 1, "--shapes", "free", *words).ok()
            work.zit("extract", baked, "--base", base, "-o", out, "--shapes", "free", "--rank", 3).ok()
        made.append((work.folder / baked, work.folder / out))
    assert all(same(*pair) for pair in zip(*made, strict=True)) and memory.peak > 0


@pytest.mark.parametrize("form", ["ai-toolkit", "ai-toolkit-lokr"])
def test_a_hook_of_the_previews(tmp_path, form):
    path, _ = write_lora(tmp_path, form, 2, 0, shapes=FEW)
    delta = load_lora(path)["layers.0.attention.to_q"]
    layer, x = torch.nn.Linear(*reversed(delta.shape), bias=False), torch.randn(5, delta.shape[1])
    right = adding(delta, x.device)(layer, (x,), layer(x))
    with Apart():
        found = adding(delta, APART)(layer, (x.to(APART),), layer(x).to(APART)).cpu()
    assert torch.equal(found, right) and not torch.equal(right, layer(x))

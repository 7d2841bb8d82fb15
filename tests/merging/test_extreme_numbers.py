"""Numbers at the ends of float32: the right file where it can hold the change, else a sentence with file and module."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sweep import sweep
from workspace import merge_into

from extensions_built_in.zit_merge import ZitMergeError, load_lora
from extensions_built_in.zit_merge.algebra.methods import METHODS

STEM, MODULE, SIDE, RANK = "diffusion_model.layers.0.attention.to_q", "layers.0.attention.to_q", 24, 4
LARGEST = torch.finfo(torch.float32).max
EPS = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 3e-3}
RANKS = {"exact": "exact", "cut": 2, "energy": {"energy": 0.9}, "size": {"size_mb": 0.01}}

# up, down and alpha of a LoRA: what its numbers are multiplied with; whether float16 holds the change
PRODUCTS: Mapping[str, tuple[float, float, float, bool]] = {
    "1e25 x 1e-25": (1e25, 1e-25, RANK, True),
    "1e-25 x 1e25": (1e-25, 1e25, RANK, True),
    "1e-38 x 1e37": (1e-38, 1e37, RANK, True),
    "alpha 1e30 x 1e-30": (1e-30, 1, 1e30, True),
    "alpha 1e30": (1, 1, 1e30, False),
    "alpha 1e38": (1, 1, 1e38, False),
    "alpha 1e30 of 1e25 x 1e-25": (1e25, 1e-25, 1e30, False),
    "alpha 1e-40": (1, 1, 1e-40, False),
    "1e-15 x 1e-15": (1e-15, 1e-15, RANK, False),
    "1e-30 x 1e-30": (1e-30, 1e-30, RANK, False),
    "subnormal": (1e-40, 1, RANK, False),
    "1e20 x 1e20": (1e20, 1e20, RANK, False),
    "1e30 x 1e30": (1e30, 1e30, RANK, False),
}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(folder: Path, name: str, up: float = 1, down: float = 1, alpha: float = RANK, *, element: float | None = None):
    """A file, and its change in float64."""
    tensors = {
        f"{STEM}.lora_A.weight": normal(RANK, SIDE, seed=1) * down,
        f"{STEM}.lora_B.weight": normal(SIDE, RANK, seed=2) * up,
    }
    if element is not None:
        tensors[f"{STEM}.lora_B.weight"][5, 1] = element
    tensors[f"{STEM}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, folder / f"{name}.safetensors")
    a, b = tensors[f"{STEM}.lora_A.weight"].double(), tensors[f"{STEM}.lora_B.weight"].double()
    return folder / f"{name}.safetensors", b @ a * (float(tensors[f"{STEM}.alpha"]) / RANK)


def written(path: Path) -> torch.Tensor:
    factors = load_lora(path)[MODULE].map(torch.Tensor.double).expand()
    return factors.up @ factors.down


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of the norm; the sizes may be such that their squares are no numbers."""
    size = want.abs().max()
    return float((got / size - want / size).norm() / (want / size).norm())


def best(want: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(want / want.abs().max())
    return (u[:, :rank] * s[:rank]) @ v[:rank] * want.abs().max()


@sweep("name, dtype, rank, beside", PRODUCTS, EPS, RANKS, ["alone", "with another"])
def test_a_sum_is_right_or_refused(tmp_path, name, dtype, rank, beside):
    up, down, alpha, fits_half = PRODUCTS[name]
    path, delta = lora(tmp_path, "extreme", up, down, alpha)
    weighed, want = [(path, 0.5)], 0.5 * delta
    if beside == "with another":
        other, more = lora(tmp_path, "other")
        weighed, want = [*weighed, (other, 0.7)], want + 0.7 * more
    if dtype == "fp16" and not (fits_half or 1e-4 < want.abs().max() < 1e4):
        what = (
            "is too large for fp16" if want.abs().max() > 1 else r"what was written differs from what was wanted by 100\.0% of it"
        )
        with pytest.raises(ZitMergeError, match=rf"^out\.safetensors: {re.escape(MODULE)}:? {what}: save it as bf16 or fp32$"):
            merge_into(tmp_path, weighed, dtype=dtype, rank=RANKS[rank])
        assert not list(tmp_path.glob("out*"))
        return
    if want.norm() > LARGEST:
        with pytest.raises(ZitMergeError, match=rf"^out\.safetensors: {MODULE} is too large for {dtype}: use smaller strengths$"):
            merge_into(tmp_path, weighed, dtype=dtype, rank=RANKS[rank])
        return
    out = merge_into(tmp_path, weighed, dtype=dtype, rank=RANKS[rank])
    got, file = written(out), load_lora(out)
    kept = file.rank if rank in ("cut", "energy") else 2 * RANK
    assert error(got, best(want, kept)) < EPS[dtype] * (1 if rank == "exact" else 10)
    assert file.verdict and file.verdict.status == "right"


@pytest.mark.parametrize("rank", ["exact", 2])
@pytest.mark.parametrize("beside", [False, True])
def test_a_change_whose_square_is_no_number_is_named(tmp_path, rank, beside):
    """In float64, where the file could hold it times its ratio."""
    path, _ = lora(tmp_path, "vast")
    save_file({key: t.double() * (1e160 if "lora_B" in key else 1) for key, t in load_file(path).items()}, path)
    weighed = [(lora(tmp_path, "other")[0], 1.0)] * beside + [(path, 1e-160)]
    cure = "the norm of its change is too large for a number: the LoRA is broken, leave it out"
    with pytest.raises(ZitMergeError, match=rf"^vast\.safetensors: {re.escape(MODULE)}: {cure}$"):
        merge_into(tmp_path, weighed, dtype="fp32", rank=rank)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("rank", ["exact", 2])
def test_a_strength_whose_square_is_no_number_is_refused(tmp_path, rank):
    path, _ = lora(tmp_path, "faint")
    save_file({key: t.double() * (1e-200 if "lora_B" in key else 1) for key, t in load_file(path).items()}, path)
    cure = "the norm of its change is too large for a number: use smaller strengths"
    with pytest.raises(ZitMergeError, match=rf"^out\.safetensors: {re.escape(MODULE)}: {cure}$"):
        merge_into(tmp_path, [(path, 1e200)], dtype="fp32", rank=rank)


@sweep("name, method, dtype, rank", PRODUCTS, [m for m in METHODS if m != "sum"], ["fp32", "bf16"], ["exact", "cut"])
def test_no_method_fails_at_them(tmp_path, name, method, dtype, rank):
    """What is scaled by powers of two comes out scaled by them, whatever the method: it looks at shapes and proportions."""
    (path, _), (other, _) = lora(tmp_path, "extreme", *PRODUCTS[name][:3]), lora(tmp_path, "other")
    try:
        got = written(merge_into(tmp_path, [(path, 0.5), (other, 0.7)], dtype=dtype, rank=RANKS[rank], method=method))
        assert got.isfinite().all() and got.any()
    except ZitMergeError as e:
        assert name in ("alpha 1e38", "1e20 x 1e20", "1e30 x 1e30")
        assert str(e) == f"out.safetensors: {MODULE} is too large for {dtype}: use smaller strengths"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e25, 1e37])
@pytest.mark.parametrize("dtype", EPS)
def test_a_single_huge_element(tmp_path, method, size, dtype):
    (path, delta), (other, _) = lora(tmp_path, "extreme", element=size), lora(tmp_path, "other")
    if dtype == "fp16":
        with pytest.raises(ZitMergeError, match=rf"^out\.safetensors: {re.escape(MODULE)} is too large for fp16"):
            merge_into(tmp_path, [(path, 0.5), (other, 0.7)], dtype=dtype, rank=2, method=method)
    else:
        got = written(merge_into(tmp_path, [(path, 0.5), (other, 0.7)], dtype=dtype, rank=2, method=method))
        assert got.isfinite().all() and got.any()
        if method == "sum":
            assert error(got, best(0.5 * delta, 2)) < EPS[dtype]


@pytest.mark.parametrize("rank", ["exact", 2])
@pytest.mark.parametrize("kind", ["LoKr", "LoHa", "full"])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_other_algorithms(tmp_path, kind, size, rank):
    one, half, four = torch.tensor(size), SIDE // 4, 4
    if kind == "LoKr":
        w1, w2 = normal(four, four, seed=1) * size, normal(half, half, seed=2)
        tensors, want = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1.0)}, torch.kron(w1.double(), w2.double())
    elif kind == "LoHa":
        parts = {f"hada_w{i}_{f}": normal(*s, seed=i) for i in (1, 2) for f, s in (("a", (SIDE, RANK)), ("b", (RANK, SIDE)))}
        tensors = parts | {"alpha": one * RANK}
        a, b = (parts[f"hada_w{i}_a"].double() @ parts[f"hada_w{i}_b"].double() for i in (1, 2))
        want = a * b * float(one)
    else:
        tensors = {"diff": normal(SIDE, SIDE, seed=1) * size}
        want = tensors["diff"].double()
    path = tmp_path / "extreme.safetensors"
    save_file({f"{STEM}.{key}": tensor for key, tensor in tensors.items()}, path)
    got = written(merge_into(tmp_path, [(path, 0.5)], rank=rank))
    assert error(got, 0.5 * want if rank == "exact" else best(0.5 * want, 2)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", RANKS)
def test_strengths_that_no_number_holds(tmp_path, method, rank):
    (path, _), (other, _) = lora(tmp_path, "extreme", alpha=1e38), lora(tmp_path, "other")
    with contextlib.suppress(ZitMergeError):  # a mean takes their proportions alone
        out = merge_into(tmp_path, [(path, 1e300), (other, 1e300)], rank=RANKS[rank], method=method)
        assert METHODS[method].is_mean and written(out).isfinite().all()
    with pytest.raises(ZitMergeError, match=rf"^out2?\.safetensors: {MODULE} is too large "):
        merge_into(tmp_path, [(path, 1e300)], name="out2", rank=RANKS[rank])
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "out2.safetensors").exists()


def test_a_change_below_all_numbers_of_its_dtype(tmp_path):
    path, _ = lora(tmp_path, "extreme", 1e-40, 1e-40)
    with pytest.raises(ZitMergeError, match=r"^out\.safetensors: layers\.0.*it is too small for bf16, use larger strengths$"):
        merge_into(tmp_path, [(path, 0.5)], dtype="bf16")

"""What depends on the device and on torch's settings. No GPU is needed: one that has no memory is stood in for."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workspace import FEW, Workspace

from extensions_built_in.zit_merge import merge
from extensions_built_in.zit_merge.algebra import probes, truncate
from extensions_built_in.zit_merge.algebra.components import Components
from extensions_built_in.zit_merge.api import Weighed
from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.formats.safetensors_file import SafetensorsFile
from extensions_built_in.zit_merge.merging import verify
from extensions_built_in.zit_merge.merging.merger import Made, Merged, Merger, Parts
from extensions_built_in.zit_merge.merging.runner import run_plans
from extensions_built_in.zit_merge.report.text.result import done_text

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WAYS = {"exact": {}, "cut": {"rank": 2}, "in the core space": {"rank": 2, "method": "ties"}}


@pytest.fixture
def two(work: Workspace) -> list[Weighed]:
    work.shapes = FEW
    return [(work.lora("a.safetensors"), 0.7), (work.lora("b.safetensors", seed=1), 0.4)]


def same(one: Path, other: Path) -> bool:
    """Equal tensors, bit for bit."""
    x, y = load_file(one), load_file(other)
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


FULL = {
    "torch": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("where", ["merge", "check", "ranks"])
@pytest.mark.parametrize("full", FULL)
@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_without_memory_hands_over_to_the_cpu_and_says_so(work, two, monkeypatch, way, full, where):
    """Wherever it happens; the file is the one that the CPU makes."""
    how = WAYS[way] | ({"rank": {"energy": 0.9}} if where == "ranks" else {})
    settled, seen = merge(two, shapes="free", **how), list[str]()
    right = settled.save(work.folder / "right.safetensors")
    parts_of, check = Merger._parts, verify.Verifier.check

    def parts(self: Merger, module: str) -> Parts:
        device, self._device = self._device, CPU
        seen.append(device.type)
        if device == CUDA and (where == "ranks" or (where == "merge" and len(seen) > 5)):
            raise FULL[full]()
        try:
            return parts_of(self, module)
        finally:
            self._device = device

    def checked(self: verify.Verifier, made: Made) -> None:
        if where == "check" and seen[-1] == "cuda":
            raise FULL[full]()
        check(self, made)

    monkeypatch.setattr(Merger, "_parts", parts)
    monkeypatch.setattr(verify.Verifier, "check", checked)
    (done,) = run_plans([settled.plan(work.folder / "out.safetensors")], CUDA)
    assert same(done.path, right) and done.verdict.status == "right"
    assert {"cuda", "cpu"} == set(seen) and seen == sorted(seen, reverse=True)
    assert done.remarks == ("cuda ran out of memory, it was merged on the CPU",)
    assert "note: cuda ran out of memory, it was merged on the CPU" in " ".join(done_text(done).split())


def test_any_other_error_of_a_gpu_is_raised(work, two, monkeypatch):
    def broken(self: Merger, module: str) -> Parts:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    plan = merge(two, shapes="free").plan(work.folder / "out.safetensors")
    monkeypatch.setattr(Merger, "_parts", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(run_plans([plan], CUDA))
    assert not list(work.folder.glob("out*"))


@pytest.mark.parametrize("placed", [torch.device("mps"), torch.device("cpu"), CUDA])
def test_mps_has_no_float64(work, two, placed):
    planned = replace(merge(two, shapes="free").planned(work.folder / "out.safetensors"), placed=placed)
    assert planned.device == (CPU if placed.type == "mps" else placed)


@pytest.mark.parametrize("way", WAYS)
def test_float32_is_float32_whatever_the_program_around_us_has_set(work, two, way):
    """TF32 on a GPU, bfloat16 on CPUs that have it: neither touches a merge, and the setting is what it was afterwards."""
    right = merge(two, shapes="free", **WAYS[way]).save(work.folder / "right.safetensors")
    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    try:
        again = merge(two, shapes="free", **WAYS[way]).save(work.folder / "again.safetensors")
        assert torch.get_float32_matmul_precision() == "medium" and torch.get_num_threads() == threads
    finally:
        torch.set_float32_matmul_precision(before)
    assert same(right, again)


@pytest.mark.parametrize("method", ["sum", "average", "slerp", "ties", "tsv"])
def test_a_cut_merge_reads_every_tensor_once_and_decomposes_every_module_once(work, two, monkeypatch, method):
    reads, decomposed = list[tuple[Path, str]](), list[str]()
    read = SafetensorsFile.tensor

    def counted(self: SafetensorsFile, key: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        reads.append((self.path, key))
        return read(self, key, rows)

    def counting(name: str) -> None:
        function = getattr(truncate, name)
        monkeypatch.setattr(truncate, name, lambda *args: decomposed.append(name) or function(*args))

    monkeypatch.setattr(SafetensorsFile, "tensor", counted)
    for name in ("_cholesky_core", "_core_svd", "_small_svd", "leading"):
        counting(name)
    plan = merge(two, shapes="free", rank=3, method=method).plan(work.folder / "out.safetensors")
    (done,) = run_plans([plan], CPU)
    changed = [m for m in plan.shapes if any(i.counts(m) for i in plan.inputs)]
    factors = [key for key in reads if not key[1].endswith("alpha")]
    passes = 2 if method == "slerp" else 1  # its angles need one of their own
    assert factors and len(factors) == passes * len(set(factors))
    each = {"ties": ["_small_svd"], "tsv": ["_cholesky_core"] * 2 + ["_small_svd"]}.get(method, ["_cholesky_core"])
    assert sorted(decomposed) == sorted(each * len(changed)) and done.verdict.cut


def test_a_check_casts_and_multiplies_each_input_once(work, two, monkeypatch):
    """All inputs side by side, and one image of what was written."""
    images, image, stacks, of_stack = list[object](), probes.image, list[object](), Components.of_stack
    monkeypatch.setattr(probes, "image", lambda x, block: images.append(x) or image(x, block))
    monkeypatch.setattr(Components, "of_stack", lambda whole, ranks: stacks.append(whole) or of_stack(whole, ranks))
    path = merge(two, shapes="free").save(work.folder / "out.safetensors")
    changed = [m for m in FEW if any(m in key for key in load_file(two[0][0]))]
    assert path.exists() and len(images) == len(stacks) == len(changed)


@pytest.mark.parametrize("way", WAYS)
def test_modules_merged_side_by_side_are_those_merged_in_turn(work, two, way):
    """With one, two and many threads of torch: the same bytes, and its setting is what it was."""
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            made.append(merge(two, shapes="free", **WAYS[way]).save(work.folder / "out.safetensors").read_bytes())
            (work.folder / "out.safetensors").unlink()
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1] == made[2]


def test_a_module_that_fails_beside_others_leaves_nothing(work, two, monkeypatch):
    of = Merger.of

    def broken(self: Merger, module: str) -> Merged:
        if module == last:
            raise ZitMergeError("this one fails")
        return of(self, module)

    plan = merge(two, shapes="free", rank=2).plan(work.folder / "out.safetensors")
    *_, last = plan.shapes
    monkeypatch.setattr(Merger, "of", broken)
    before, threads = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(4)
    try:
        with pytest.raises(ZitMergeError, match="this one fails"):
            list(run_plans([plan], CPU))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert not list(work.folder.glob("out*")) and threading.active_count() == threads

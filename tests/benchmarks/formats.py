"""How long it takes to bring what is not low-rank to a rank: LoKr, LoKr with a LoRA, LoHa, whole differences. One run, one table.

    python tests/benchmarks/formats.py [--rank 64] [--device cpu] [--layers 30] [--slow-layers 3] [--dense] [--folder DIR]

Random files of Z-Image's real shapes (eight modules a layer, bf16) are merged to the rank. A LoKr alone runs over --layers; the
cases that need the iteration run over --slow-layers, and the table says what the 30 layers would take at that pace. Memory as in
merge.py. The excess is |error / smallest possible error - 1|: for a LoKr the smallest error is known from the singular values of
its factors, on every module; with --dense it is taken from a dense float64 SVD of layers.0.attention.to_q for every case.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from shared import measure  # noqa: E402

from extensions_built_in.zit_merge import load_lora, merge  # noqa: E402
from extensions_built_in.zit_merge.model.zimage import MODULES  # noqa: E402

SAMPLE = "layers.0.attention.to_q"


def modules(layers: int) -> Iterator[tuple[str, int, int]]:
    """(key stem, out, in) of every module of the first layers."""
    for module in MODULES.values():
        if module.section == "layers" and module.index < layers:
            yield f"diffusion_model.{module.name}", *module.shape()


def normal(random: torch.Generator, *shape: int, std: float = 0.02) -> torch.Tensor:
    """Random numbers as stored."""
    return (torch.randn(shape, generator=random) * std).bfloat16()


def split(size: int, factor: int) -> tuple[int, int]:
    """The two divisors of a side, as AI-Toolkit's LoKr chooses them."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    small = max(d for d in range(1, int(size**0.5) + 1) if size % d == 0)
    return small, size // small


def make_lokr(path: Path, layers: int, factor: int) -> None:
    """As AI-Toolkit writes it by default: two whole factors, an alpha without meaning."""
    random, tensors = torch.Generator().manual_seed(1), {}
    for stem, out, into in modules(layers):
        (p, s), (q, t) = split(out, factor), split(into, factor)
        tensors[f"{stem}.lokr_w1"], tensors[f"{stem}.lokr_w2"] = normal(random, p, q, std=0.3), normal(random, s, t)
        tensors[f"{stem}.alpha"] = torch.tensor(9999999999.0)
    save_file(tensors, path)


def make_lora(path: Path, layers: int, rank: int) -> None:
    """Pairs."""
    random, tensors = torch.Generator().manual_seed(2), {}
    for stem, out, into in modules(layers):
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = normal(random, rank, into), normal(random, out, rank)
    save_file(tensors, path)


def make_loha(path: Path, layers: int, rank: int) -> None:
    """Two pairs each."""
    random, tensors = torch.Generator().manual_seed(3), {}
    for stem, out, into in modules(layers):
        for i in (1, 2):
            tensors[f"{stem}.hada_w{i}_a"], tensors[f"{stem}.hada_w{i}_b"] = normal(random, out, rank), normal(random, rank, into)
    save_file(tensors, path)


def make_full(path: Path, layers: int) -> None:
    """Whole differences: noise over something of rank 50."""
    random, tensors = torch.Generator().manual_seed(4), {}
    for stem, out, into in modules(layers):
        low = normal(random, out, 50).float() @ normal(random, 50, into).float()
        tensors[f"{stem}.diff"] = (low + torch.randn(out, into, generator=random) * 0.01).bfloat16()
    save_file(tensors, path)


def lokr_excess(source: Path, out: Path, rank: int) -> float:
    """Worst over modules, from the singular values of the two factors and inner products in float64."""
    stored, merged, worst = load_file(source), load_lora(out), 0.0
    for module in merged:
        w1, w2 = (stored[f"diffusion_model.{module}.lokr_{w}"].double() for w in ("w1", "w2"))
        sigma = torch.outer(torch.linalg.svdvals(w1), torch.linalg.svdvals(w2)).flatten().sort(descending=True).values
        up, down = (f.double() for f in merged[module])
        (p, q), (s, t) = w1.shape, w2.shape
        image = torch.einsum("pq,st,qtr->psr", w1, w2, down.T.reshape(q, t, -1)).reshape(p * s, -1)  # kron(w1, w2) @ down'
        square = (sigma**2).sum() - 2 * (up * image).sum() + ((up.T @ up) * (down @ down.T)).sum()
        best = (sigma[rank:] ** 2).sum()
        worst = max(worst, float((square.clamp(min=0).sqrt() - best.sqrt()).abs() / sigma.norm()))
    return worst


def dense_excess(paths: list[Path], out: Path, rank: int) -> float:
    """For one module, everything multiplied out."""
    want = sum(product(load_lora(path)) for path in paths)
    best = torch.linalg.svdvals(want)[rank:].norm()
    return float((product(load_lora(out)) - want).norm() / best - 1)


def product(lora) -> torch.Tensor:
    """The dense change of the sampled module in float64."""
    factors = lora[SAMPLE].map(torch.Tensor.double).expand()
    return factors.up @ factors.down


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--slow-layers", type=int, default=3)
    parser.add_argument("--dense", action="store_true", help="check one module of every case by a dense float64 SVD")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary folder")
    args = parser.parse_args()
    print(
        f"to rank {args.rank}, fp32 files; torch {torch.__version__}, {torch.get_num_threads()} threads, device {args.device}\n"
    )
    print(f"{'':<38}{'layers':>7}{'seconds':>9}{'30 layers':>11}{'peak MB':>9}{'excess':>10}{'dense':>10}")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, few = Path(name), args.slow_layers
        lokr, lokr8, short = folder / "lokr.safetensors", folder / "lokr8.safetensors", folder / "short.safetensors"
        lora, loha, full = folder / "lora.safetensors", folder / "loha.safetensors", folder / "full.safetensors"
        make_lokr(lokr, args.layers, -1)
        make_lokr(lokr8, few, 8)
        make_lokr(short, few, -1)
        make_lora(lora, few, 32)
        make_loha(loha, few, 32)
        make_full(full, few)
        cases = {
            "LoKr, default factors": ([lokr], args.layers),
            "LoKr, factor 8": ([lokr8], few),
            "LoKr and a LoRA of rank 32": ([short, lora], few),
            "two LoKrs": ([short, lokr8], few),
            "LoHa of rank 32 (32 x 32 components)": ([loha], few),
            "whole differences": ([full], few),
        }
        for what, (paths, layers) in cases.items():
            out = folder / f"{len(what)}.safetensors"
            seconds, peak = measure(
                lambda paths=paths, out=out: merge(
                    [(p, 1.0) for p in paths], rank=args.rank, dtype="fp32", device=args.device
                ).save(out)
            )
            known = f"{lokr_excess(paths[0], out, args.rank):.1e}" if paths in ([lokr], [lokr8]) else ""
            dense = f"{dense_excess(paths, out, args.rank):.1e}" if args.dense else ""
            whole = seconds * 30 / layers
            print(f"{what:<38}{layers:>7}{seconds:>9.1f}{whole:>11.0f}{peak / 1e6:>9.0f}{known:>10}{dense:>10}", flush=True)


if __name__ == "__main__":
    main()

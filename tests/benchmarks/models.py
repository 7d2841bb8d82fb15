"""How long whole models take, and how much memory: bake, extract, inspect. One run, one table.

    python tests/benchmarks/models.py [--layers 2] [--rank 32] [--runs 2] [--folder DIR]

A random model of Z-Image's real sizes but of few layers (ComfyUI's form, bf16; embedders and the four refiner blocks are there)
and two random LoRAs that change every block weight of it, as small beside the weights as trained ones are. Beside each bake the
same bytes are copied and synced. Times start after the imports; the best of the runs is shown. Memory as in `merge.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from safetensors.torch import save_file
from shared import measure, synced_copy

from extensions_built_in.zit_merge import load_lora, merge
from extensions_built_in.zit_merge.analysis.model import sources_in_model
from extensions_built_in.zit_merge.formats.checkpoint import open_checkpoint
from extensions_built_in.zit_merge.model.tensors import TENSORS, block_of
from extensions_built_in.zit_merge.model.zimage import MODULES

HEAD, DIM, CAPTION = 128, 3840, 2560


def in_model(name: str, layers: int) -> bool:
    section, _, rest = name.partition(".")
    return section != "layers" or int(rest.partition(".")[0]) < layers


def make_model(path: Path, layers: int) -> None:
    """Weights of standard deviation 0.02, cut out of one block of random numbers."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 26, generator=random).mul_(0.02).bfloat16()

    def draw(*shape: int) -> torch.Tensor:
        first = int(torch.randint(1 << 24, (), generator=random))
        return noise[first : first + torch.Size(shape).numel()].view(shape)

    found: dict[str, list[torch.Tensor]] = {}
    for tensor in TENSORS.values():
        if not in_model(tensor.name, layers):
            continue
        if tensor.module:
            shape = MODULES[tensor.module].shape()
        elif tensor.name.endswith(".bias"):
            shape = MODULES[tensor.name.removesuffix(".bias")].shape()[:1]
        else:
            others = {"cap_embedder.0.weight": (CAPTION,), "x_pad_token": (1, DIM), "cap_pad_token": (1, DIM)}
            shape = others.get(tensor.name, (HEAD if "attention.norm" in tensor.name else DIM,))
        found.setdefault(tensor.native, []).append(draw(*shape))
    save_file({key: torch.cat(parts) for key, parts in found.items()}, path, {"format": "pt"})


def make_lora(path: Path, rank: int, seed: int, layers: int) -> None:
    """Changes of standard deviation 0.003 / rank^0.5 times rank^0.5, in every weight of a block."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    for module in MODULES.values():
        if block_of(module.name) and in_model(module.name, layers):
            out, into = module.shape()
            stem = f"diffusion_model.{module.name}"
            tensors[f"{stem}.lora_A.weight"] = (torch.randn(rank, into, generator=random) / into**0.5).bfloat16()
            tensors[f"{stem}.lora_B.weight"] = (torch.randn(out, rank, generator=random) * 0.003).bfloat16()
    save_file(tensors, path)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the files go: the disk that is measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        base, out, extracted = (folder / f"{name}.safetensors" for name in ("base", "out", "extracted"))
        loras = [folder / f"{n}.safetensors" for n in (0, 1)]
        make_model(base, args.layers)
        for n, path in enumerate(loras):
            make_lora(path, args.rank, n, args.layers)
        print(f"{base.stat().st_size / 1e9:.2f} GB, {args.layers} layers and 4 refiner blocks, rank {args.rank}")

        def bake(count: int, rounding: str = "nearest") -> Callable[[], object]:
            step = merge([(path, 1.0) for path in loras[:count]], shapes="free")
            return lambda: step.bake(base, out, format="comfyui", rounding=rounding)

        def extract() -> object:
            pair = {"extract": str(out), "base": str(base)}
            return merge([(pair, 1.0)], shapes="free", rank=2 * args.rank).save(extracted)

        def inspect() -> object:
            models = (open_checkpoint(path, shapes="free") for path in (out, base))
            return sources_in_model(*models, [load_lora(path) for path in loras])

        work: dict[str, Callable[[], object]] = {
            "its bytes copied and synced": lambda: synced_copy(base, folder / "copy"),
            "bake one LoRA": bake(1),
            "bake two, stochastic": bake(2, "stochastic"),
            "bake two": bake(2),
            f"extract, rank {2 * args.rank}": extract,
            "inspect with base and two sources": inspect,
        }
        for title, run in work.items():
            fresh = {"bake": [out], "extr": [extracted]}.get(title[:4], [])
            best = min(_measured(run, fresh) for _ in range(args.runs))
            print(f"{title:36} {best[0]:7.2f} s {best[1] / 1e6:6.0f} MB", flush=True)


def _measured(run: Callable[[], object], fresh: list[Path]) -> tuple[float, float]:
    for path in fresh:
        path.unlink(missing_ok=True)
    return measure(run)


if __name__ == "__main__":
    main()

"""One case of growth.py, in a process of its own: a merge of ours or a peer's. Prints what it measured as JSON.

    python tests/benchmarks/growth_cases.py '{"line": "exact", "paths": [...], "folder": "...", "rank": 32, ...}'

Peers. None of their code is here; a Python for them needs torch, safetensors and, for PEFT, peft:

- kohya: the arithmetic of sd-scripts' networks/svd_merge_lora.py, written anew: the dense sum of ratio * scale * up @ down in
  float32, torch.linalg.svd of it at its defaults, the first `rank` directions, both factors clamped at the 0.99 quantile.
- qr: the arithmetic of elias-gaeros' resize_lora, for stacked LoRAs, written anew: QR of the stacked ups and of the stacked downs
  in float32, SVD of the small R_up R_down', the first `rank` directions. It runs on all modules.
- peft-cat, peft-svd, peft-ties_svd: the real `add_weighted_adapter` of the installed peft, on a model of one linear layer.

All of them read and write with safetensors: bf16 in, bf16 out, not synced, nothing checked. All but qr run on one module of each
shape and are multiplied by their number; what the script or the PEFT model holds of the other modules is computed (of PEFT only
the adapters, not the weights of the model). A model is made, and files are opened, before the time starts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from shared import layer_modules, measure, synced_copy

RATIO = 0.8  # of every LoRA
DENSITY = 0.2  # of ties
QUANTILE = 0.99  # where kohya's script clamps
SUMS = {"exact": "sum, exact", "cut": "sum, cut to the rank"}
PREFIX = "diffusion_model."
REPEATS, ENOUGH = 5, 3.0  # runs of one module, until so many seconds are spent


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        line: `exact`, `cut`, a method of ours, or one of PEERS.
        paths: The LoRAs.
        folder: For what is written.
        rank: Of every LoRA, and of the result unless that is exact.
        layers: How many layers of the model the LoRAs have.
        modules: On how many modules a peer runs that is extrapolated: 3 (w2, the transposed shape, counts as w1) or 4.
        device: Where ours merges.
    """

    line: str
    paths: Sequence[str]
    folder: str
    rank: int
    layers: int
    modules: int
    device: str

    @property
    def out(self) -> Path:
        """The merged file."""
        return Path(self.folder) / "merged.safetensors"


class Pair(NamedTuple):
    """A low-rank change: up @ down."""

    up: Tensor
    down: Tensor


Merging = Callable[[Sequence[Pair]], Pair]


class Peer(NamedTuple):
    """Somebody else's way.

    Attributes:
        title: In the table.
        prepare: (out and in, number of LoRAs, rank) -> what merges one module.
        holds: (out and in, number of LoRAs, rank) -> bytes of one module that stay while the others are merged; nothing for what
            runs on all modules.
    """

    title: str
    prepare: Callable[[tuple[int, int], int, int], Merging]
    holds: Callable[[tuple[int, int], int, int], int] | None = None

    @property
    def whole(self) -> bool:
        """It runs on all modules."""
        return self.holds is None


# --- the peers -----------------------------------------------------------------------------------------------------------------


def kohya(shape: tuple[int, int], count: int, rank: int) -> Merging:
    """The dense sum, its whole SVD, a clamp.

    Args:
        shape: Of the weight.
        count: Of the LoRAs.
        rank: Of the result.
    """

    def merging(pairs: Sequence[Pair]) -> Pair:
        total = torch.zeros(shape)
        for pair in pairs:
            total = total + RATIO * (pair.up @ pair.down)
        left, sigma, right = torch.linalg.svd(total)
        up, down = left[:, :rank] * sigma[:rank], right[:rank]
        limit = float(torch.quantile(torch.cat([up.flatten(), down.flatten()]), QUANTILE))
        return Pair(up.clamp(-limit, limit), down.clamp(-limit, limit))

    return merging


def qr(shape: tuple[int, int], count: int, rank: int) -> Merging:
    """QR of the stacked factors, SVD of the small core.

    Args:
        shape: Of the weight.
        count: Of the LoRAs.
        rank: Of the result.
    """

    def merging(pairs: Sequence[Pair]) -> Pair:
        up = torch.linalg.qr(torch.cat([RATIO * pair.up for pair in pairs], 1))
        down = torch.linalg.qr(torch.cat([pair.down for pair in pairs]).T)
        left, sigma, right = torch.linalg.svd(up.R @ down.R.T)
        return Pair(up.Q @ (left[:, :rank] * sigma[:rank]), right[:rank] @ down.Q.T)

    return merging


def peft(combination: str, shape: tuple[int, int], count: int, rank: int) -> Merging:
    """PEFT's own functions, on a model of one linear layer whose weight is never touched.

    Args:
        combination: As `add_weighted_adapter` calls it.
        shape: Of the weight.
        count: Of the LoRAs.
        rank: Of every LoRA and of the result.
    """
    from peft import LoraConfig, get_peft_model

    out, into = shape
    names = [f"lora{i}" for i in range(count)]
    linear = torch.nn.utils.skip_init(torch.nn.Linear, into, out, bias=False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
    model: Any = get_peft_model(torch.nn.Sequential(linear), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.requires_grad_(False)  # as adapters that are loaded to be used
    layer = model.base_model.model[0]
    density = DENSITY if combination.startswith("ties") else None

    def merging(pairs: Sequence[Pair]) -> Pair:
        for name, pair in zip(names, pairs, strict=True):
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = pair.down, pair.up
        model.add_weighted_adapter(names, [RATIO] * count, "merged", combination, svd_rank=rank, density=density)
        return Pair(layer.lora_B["merged"].weight.data, layer.lora_A["merged"].weight.data)

    return merging


def dense(shape: tuple[int, int], count: int, rank: int) -> int:
    """Bytes of a dense change in float32.

    Args:
        shape: Of the weight.
        count: Of the LoRAs.
        rank: Of each.
    """
    return 4 * shape[0] * shape[1]


def adapters(results: int, shape: tuple[int, int], count: int, rank: int) -> int:
    """Bytes of the LoRAs and of the result in float32, as PEFT's model has them beside its own weights.

    Args:
        results: The rank of the result, in those of a LoRA; 0: as all of them.
        shape: Of the weight.
        count: Of the LoRAs.
        rank: Of each.
    """
    return 4 * sum(shape) * rank * (count + (results or count))


PEERS = {
    "kohya": Peer("dense SVD, clamped (arithmetic of kohya's svd_merge_lora.py)", kohya, dense),
    "qr": Peer("QR of the stacked factors (arithmetic of elias' resize_lora)", qr),
    "peft-cat": Peer("PEFT cat (exact)", partial(peft, "cat"), partial(adapters, 0)),
    "peft-svd": Peer("PEFT svd", partial(peft, "svd"), partial(adapters, 1)),
    "peft-ties_svd": Peer(f"PEFT ties_svd, density {DENSITY}", partial(peft, "ties_svd"), partial(adapters, 1)),
}


# --- what is measured ----------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> dict[str, Any]:
    """Seconds, seconds of all cores, and peak bytes of a piece of work.

    Args:
        work: Called once.
    """
    start = time.process_time()
    seconds, peak = measure(work)
    return {"seconds": seconds, "cpu": time.process_time() - start, "peak": peak}


def copied(job: Job) -> dict[str, Any]:
    """The size of the merged file, and the seconds that a synced copy of it takes.

    Args:
        job: Whose merge is done.
    """
    seconds, _ = measure(lambda: synced_copy(job.out, job.out.with_name("copy.safetensors")))
    return {"output": job.out.stat().st_size, "copy": seconds}


def ours(job: Job) -> dict[str, Any]:
    """A merge as users have it: files read, merged, written, synced and checked.

    Args:
        job: With a line of ours.
    """
    from extensions_built_in.zit_merge import merge

    described = merge(
        [(path, RATIO) for path in job.paths],
        method="sum" if job.line in SUMS else job.line,
        rank="exact" if job.line == "exact" else job.rank,
        device=job.device,
        confirm_size=True,
    )
    return timed(lambda: described.save(job.out)) | copied(job)


def parts(job: Job) -> Iterator[tuple[list[str], int]]:
    """(names of modules, how many times they count): all at once, or one of each shape.

    Args:
        job: Of a peer.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for module in layer_modules(job.layers):
        shape = module.shape()
        key = () if PEERS[job.line].whole else tuple(sorted(shape)) if job.modules == 3 else shape
        groups.setdefault(key, []).append(module.name)
    for names in groups.values():
        yield (names, 1) if PEERS[job.line].whole else (names[:1], len(names))


def theirs(job: Job) -> dict[str, Any]:
    """A peer's merge from file to file; on a part of the modules, multiplied up.

    Args:
        job: With a line of PEERS.
    """
    peer, files = PEERS[job.line], [safe_open(path, framework="pt") for path in job.paths]
    shapes = {m.name: m.shape() for m in layer_modules(job.layers)}
    found: dict[str, Any] = {"seconds": 0.0, "cpu": 0.0, "peak": 0, "modules": 0, "of": len(shapes)}
    for names, number in parts(job):
        part = typical(job, files, {n: shapes[n] for n in names})
        found["seconds"] += number * part["seconds"]
        found["cpu"] += number * part["cpu"]
        found["peak"] = max(found["peak"], part["peak"])
        found["modules"] += len(names)
    if peer.holds:
        held = [peer.holds(shape, len(files), job.rank) for shape in shapes.values()]
        found["held"] = sum(held) - max(held)  # that of one module is in the peak
    return found | (copied(job) if peer.whole else {})


def typical(job: Job, files: Sequence[Any], shapes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """What some modules cost; of what is multiplied up and short, the run of median seconds and the largest peak.

    Args:
        job: Of a peer.
        files: The LoRAs, opened.
        shapes: Out and in of the modules, by name.
    """
    found: list[dict[str, Any]] = []
    repeats = 1 if PEERS[job.line].whole else REPEATS
    while len(found) < repeats and sum(f["seconds"] for f in found) < ENOUGH:
        ready = {shape: PEERS[job.line].prepare(shape, len(files), job.rank) for shape in set(shapes.values())}
        found.append(timed(partial(merge_part, job, files, {name: ready[shape] for name, shape in shapes.items()})))
    median = sorted(found, key=lambda f: f["seconds"])[len(found) // 2]
    return median | {"peak": max(f["peak"] for f in found)}


def merge_part(job: Job, files: Sequence[Any], mergings: dict[str, Merging]) -> None:
    """Reads, merges and writes some modules.

    Args:
        job: Of a peer.
        files: The LoRAs, opened.
        mergings: What merges a module, by its name.
    """
    save(job, {name: merging(read(files, name)) for name, merging in mergings.items()})


def read(files: Sequence[Any], name: str) -> list[Pair]:
    """The factors of one module of every LoRA, in float32.

    Args:
        files: Opened.
        name: Of the module.
    """
    keys = [f"{PREFIX}{name}.lora_{side}.weight" for side in "BA"]
    return [Pair(*(file.get_tensor(key).float() for key in keys)) for file in files]


def save(job: Job, answers: dict[str, Pair]) -> None:
    """The merged factors in bf16.

    Args:
        job: Where to.
        answers: By module.
    """
    tensors = {}
    for name, pair in answers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.down.bfloat16().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.up.bfloat16().contiguous()
    save_file(tensors, job.out)


def result(job: Job) -> dict[str, Any]:
    """What the case has cost; {"missing": a package} where a peer is not installed.

    Args:
        job: What to do.
    """
    if job.line not in PEERS:
        return ours(job)
    if not job.line.startswith("peft"):
        return theirs(job)
    try:
        return theirs(job) | {"version": f"peft {metadata.version('peft')}"}
    except ModuleNotFoundError as e:
        return {"missing": e.name}


if __name__ == "__main__":
    print(json.dumps(result(Job(**json.loads(sys.argv[1])))))

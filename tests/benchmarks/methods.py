"""Our methods against PEFT, the dense SVD of kohya's scripts and torch.svd_lowrank, on the real shapes. One run, one table.

    python tests/benchmarks/methods.py [--device cpu] [--runs 3] [--slow-modules 4] [--quick]
    python tests/benchmarks/methods.py --thin [--device cpu] [--quick]

Two random LoRAs of rank 32 with a falling spectrum are merged to rank 32, module by module; 240 modules are the whole model. The
algebra alone: the factors lie in memory in float32, no file is read or written. Ours runs over all modules, with the Gram pass of
the methods that have one; what takes seconds or minutes for one module runs once on one module of each shape and is multiplied by
their number. Every row has a process of its own; memory as in merge.py (on CUDA what torch has allocated), without the inputs.

The excess is sqrt(error^2 - smallest possible error^2) / |target|: 0 is the optimum, 1e-7 the rounding of float32 factors, 1e-8
what the measure itself can tell. The target is the method's own answer before the truncation, in float64: for ours that of
tests/oracles on one layer's modules, for PEFT's ties and dare_ties its dense matrix (where that has no more than 3840 x 3840
entries). A second table holds the entry-by-entry methods in the space of the weight, as PEFT has them, against our core space.

--thin is another measurement: the two roads of algebra/truncate.py for factors of many components, where they cross.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import shared  # noqa: E402
from oracles import methods as oracle  # noqa: E402

from extensions_built_in.zit_merge.algebra import krylov, truncate  # noqa: E402
from extensions_built_in.zit_merge.algebra.factors import Factors, fold, stack, wide  # noqa: E402
from extensions_built_in.zit_merge.algebra.linear import add  # noqa: E402
from extensions_built_in.zit_merge.algebra.methods import METHODS  # noqa: E402
from extensions_built_in.zit_merge.algebra.products import gram, inner, norm  # noqa: E402
from extensions_built_in.zit_merge.model.zimage import MODULES, N_LAYERS  # noqa: E402

RANK, RATIOS = 32, (0.9, 0.6)
LAYER = [m.shape() for m in MODULES.values() if m.section == "layers" and m.index == 0]
SHAPES = [shape for shape, _ in Counter(LAYER).most_common()]  # q, k, v, out; w1, w3; adaLN and w2
SQUARE = SHAPES[0]
FALL = 0.1  # the last singular value of a LoRA, of its first
DENSITY = {"ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5, "della": 0.5}  # of methods that draw or trim
EPSILON = 0.15  # della

Pair = Sequence[Factors]


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: Who and what.
        modules: On how many modules it was measured.
        seconds: For the whole model, of each run.
        peak: In bytes.
        excess: The worst of the modules that were checked.
    """

    name: str
    modules: int
    seconds: list[float]
    peak: int
    excess: float


# --- operands and measures -----------------------------------------------------------------------------------------------------


def lora(shape: tuple[int, int], seed: int, rank: int = RANK) -> Factors:
    """A random change of this rank, its singular values falling from 1 to FALL, in a gauge that does not show them."""
    random = torch.Generator().manual_seed(seed)
    (out, into), root = shape, FALL ** (torch.arange(rank) / (rank - 1) / 2)
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=random)).Q
    up = torch.randn(out, rank, generator=random) * (root / out**0.5)
    down = torch.randn(rank, into, generator=random) * (root / into**0.5)[:, None]
    return Factors(up @ turn, turn.T @ down)


def pair(shape: tuple[int, int], number: int, device: str) -> Pair:
    """The two LoRAs of one module, the ratios not in them."""
    return [lora(shape, 2 * number + i).map(lambda t: t.to(device)) for i in range(len(RATIOS))]


def strong(deltas: Pair) -> Pair:
    """With their ratios."""
    return [d.times(r) for d, r in zip(deltas, RATIOS, strict=True)]


def product(x: Factors) -> Tensor:
    """The dense change."""
    return x.up @ x.down


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(work: Callable[[], object], device: str) -> tuple[float, int]:
    """(seconds, peak bytes above the start)."""
    if not device.startswith("cuda"):
        return shared.measure(work)
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, start = torch.cuda.memory_allocated(device), time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) - before


def cores(changes: Sequence[Factors]) -> list[Tensor]:
    """Small dense float64 matrices with the same inner products and singular values, through QR of the factors side by side."""
    everything = stack([c.map(lambda t: t.cpu().double()) for c in changes])
    ups, downs = torch.linalg.qr(everything.up).R, torch.linalg.qr(everything.down.T).R
    ranks = [c.rank for c in changes]
    return [up @ down.T for up, down in zip(ups.split(ranks, 1), downs.split(ranks, 1), strict=True)]


def off(found: Tensor, target: Tensor) -> float:
    """The excess of an approximation of rank RANK, both of them dense."""
    best = (target * target).sum() - torch.linalg.eigvalsh(shorter(target))[-RANK:].sum()
    return float((((found - target) ** 2).sum() - best).abs().sqrt() / target.norm())


def shorter(x: Tensor) -> Tensor:
    """x' x or x x', the smaller one."""
    return x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T


# --- ours ----------------------------------------------------------------------------------------------------------------------


def merged(name: str, modules: Sequence[Pair]) -> Iterator[Factors]:
    """Our method and the truncation, as `merging.Merger` has them."""
    method = METHODS[name]
    parameters = {key: p.default for key, p in method.parameters.items()}
    per, grams = parameters.pop("per", "file"), []
    ratios = torch.tensor(RATIOS, dtype=torch.float64)
    if method.per:
        grams = [gram(strong(deltas)) / torch.outer(ratios, ratios) for deltas in modules]
    whole = sum(grams, torch.zeros(len(ratios), len(ratios), dtype=torch.float64))
    for i, deltas in enumerate(modules):
        if method.is_linear:
            coefficients = method.function(grams[i] if per == "module" else whole, ratios, **parameters) / ratios
            change = add([d.times(float(c)) for d, c in zip(strong(deltas), coefficients, strict=True)])
        else:
            change = method.function(strong(deltas), **parameters)
        yield truncate.truncate(change, RANK)


def draws(deltas: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """The uniform numbers of a seed: those of the LoRA with more energy along the early axes come first."""
    found = oracle.cores(deltas)
    p, q = found[0].shape
    numbers = torch.rand((len(found), p, q), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    places = 1 + torch.arange(p)[:, None] + 2**0.5 * torch.arange(q)
    order = sorted(range(len(found)), key=lambda i: -float((found[i] ** 2 / places).sum()))
    return [numbers[order.index(i)] for i in range(len(found))]


def plain(deltas: Sequence[Tensor]) -> list[Tensor]:
    """Without their ratios."""
    return [d / r for d, r in zip(deltas, RATIOS, strict=True)]


SHARE = RATIOS[1] / sum(RATIOS)
ORACLES: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {  # at the methods' defaults, of deltas with their ratios
    "sum": oracle.plain_sum,
    "average": lambda x: oracle.average(plain(x), RATIOS),
    "normalize": oracle.plain_sum,  # at its own strength: one factor for the file
    "slerp": lambda x: oracle.slerp(*plain(x), SHARE),
    "nuslerp": lambda x: oracle.nuslerp(*plain(x), SHARE),
    "karcher": lambda x: oracle.nuslerp(*plain(x), SHARE),  # which it is for two
    "ties": lambda x: oracle.ties(x, DENSITY["ties"]),
    "dare_linear": lambda x: oracle.dare_linear(x, DENSITY["dare_linear"], draws(x)),
    "dare_ties": lambda x: oracle.dare_ties(x, DENSITY["dare_ties"], draws(x)),
    "della": lambda x: oracle.della(x, DENSITY["della"], EPSILON, draws(x)),
    "tsv": oracle.tsv,
    "project": lambda x: oracle.gives_way(x[0], x[1], 0.5) + x[1],
    "shared_once": lambda x: oracle.shared_once(x, 0.5),
}


def file_factor(modules: Sequence[Pair]) -> float:
    """What `normalize` multiplies the sum with."""
    energies = torch.zeros(len(RATIOS) + 1, dtype=torch.float64)
    for deltas in modules:
        x = stack([d.map(lambda t: t.cpu().double()) for d in strong(deltas)])
        products = (x.up.T @ x.up) * (x.down @ x.down.T)
        blocks = [products[i : i + RANK, i : i + RANK].sum() for i in range(0, len(products), RANK)]
        energies += torch.stack([*blocks, products.sum()])
    return float((energies[:-1].max() / energies[-1]).sqrt())


def ours(name: str, args: argparse.Namespace) -> Row:
    """One of METHODS over the whole model."""
    modules = [pair(shape, i, args.device) for i, shape in enumerate(LAYER * args.layers)]
    for _ in merged(name, [pair((512, 256), 0, args.device)]):
        wait(args.device)  # the libraries have made themselves ready
    answers: list[Factors] = []

    def work() -> None:
        answers.clear()
        for answer in merged(name, modules):
            if len(answers) < len(LAYER):
                answers.append(answer)  # the others are dropped as they come

    figures = [measure(work, args.device) for _ in range(args.runs)]
    factor, excess = file_factor(modules) if name == "normalize" else 1.0, 0.0
    for deltas, answer in zip(modules[: len(LAYER)], answers, strict=True):
        *small, found = cores([*strong(deltas), answer])
        excess = max(excess, off(found, factor * ORACLES[name](small)))
    seconds = [t * N_LAYERS / args.layers for t, _ in figures]
    return Row(f"ours: {name}", len(modules), seconds, max(m for _, m in figures), excess)


# --- the others ----------------------------------------------------------------------------------------------------------------


def kohya(deltas: Pair) -> Factors:
    """As the scripts svd_merge_lora.py and resize_lora.py: the dense sum, its whole SVD, a clamp at the 0.99 quantile."""
    left, sigma, right = torch.linalg.svd(sum(product(d) for d in strong(deltas)))
    up, down = left[:, :RANK] @ torch.diag(sigma[:RANK]), right[:RANK]
    high = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.99)
    return Factors(up.clamp(-high, high), down.clamp(-high, high))


def reduced(deltas: Pair) -> Factors:
    """The same in its best form: no columns that nobody needs, no clamp."""
    left, sigma, right = torch.linalg.svd(sum(product(d) for d in strong(deltas)), full_matrices=False)
    return Factors(left[:, :RANK] * sigma[:RANK], right[:RANK])


def sketch(deltas: Pair, columns: int) -> Factors:
    """torch.svd_lowrank on the dense sum."""
    torch.manual_seed(0)
    left, sigma, right = torch.svd_lowrank(sum(product(d) for d in strong(deltas)), q=columns)
    return Factors(left[:, :RANK] * sigma[:RANK], right[:, :RANK].T)


def peft(deltas: Pair, combination: str) -> tuple[Callable[[], Factors], Callable[[], Tensor]]:
    """(what is timed, the dense matrix that it has decomposed): PEFT with a model of one linear layer and two adapters."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import model as module

    out, into = deltas[0].shape
    linear = torch.nn.utils.skip_init(torch.nn.Linear, into, out, bias=False, device=deltas[0].up.device)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(linear), config, adapter_name="one")
    model.add_adapter("two", config)
    layer = model.base_model.model[0]
    for name, delta in zip(("one", "two"), deltas, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = delta.down, delta.up
    model.requires_grad_(False)  # as adapters that are loaded to be used
    function = {"svd": "task_arithmetic"}.get(combination, combination.removesuffix("_svd"))
    original, targets = getattr(module, function), []
    density = DENSITY.get(function)

    def recorded(*arguments) -> Tensor:
        targets.append(original(*arguments))  # alive in PEFT until the end anyway
        return targets[-1]

    def work() -> Factors:
        torch.manual_seed(0)  # PEFT takes no seed
        with mock.patch.object(module, function, recorded):
            model.add_weighted_adapter(
                ["one", "two"], list(RATIOS), "merged", combination_type=combination, svd_rank=RANK, density=density
            )
        return Factors(layer.lora_B["merged"].weight.data, layer.lora_A["merged"].weight.data)

    return work, lambda: targets[-1]


OTHERS: dict[str, Callable[[Pair], Factors] | str] = {
    "dense torch.linalg.svd, clamped (kohya's scripts)": kohya,
    "dense torch.linalg.svd, full_matrices=False": reduced,
    f"dense torch.svd_lowrank, q = {RANK}": partial(sketch, columns=RANK),
    f"dense torch.svd_lowrank, q = {2 * RANK} (all there is)": partial(sketch, columns=2 * RANK),
    "PEFT svd": "svd",
    f"PEFT ties_svd, density {DENSITY['ties']}": "ties_svd",
    f"PEFT dare_ties_svd, density {DENSITY['dare_ties']}": "dare_ties_svd",
}


def others(name: str, args: argparse.Namespace) -> Row:
    """Dense ways on one module of each shape, times their number."""
    way, shapes = OTHERS[name], SHAPES[: args.slow_modules]
    runs = args.runs if isinstance(way, partial) else 1
    seconds, peak, excess = [{} for _ in range(runs)], 0, 0.0
    for number, shape in enumerate([(512, 256), *shapes]):  # a small one first: the libraries make themselves ready
        deltas = pair(shape, number, args.device)
        answers: list[Factors] = []
        for run in range(runs):
            work, target = peft(deltas, way) if isinstance(way, str) else (partial(way, deltas), None)
            spent, used = measure(lambda work=work, answers=answers: answers.append(work()), args.device)
            if number:
                seconds[run][shape], peak = spent, max(peak, used)
        if not number:
            continue
        if name.startswith("PEFT") and way != "svd":
            if shape[0] * shape[1] <= SQUARE[0] * SQUARE[1]:
                excess = max(excess, off(product(answers[-1]).cpu().double(), target().cpu().double()))
        else:
            *small, found = cores([*strong(deltas), answers[-1]])
            excess = max(excess, off(found, oracle.plain_sum(small)))
    return Row(name, len(shapes), [whole_model(s) for s in seconds], peak, excess)


def whole_model(seconds: dict[tuple[int, int], float]) -> float:
    """From one module of each shape; a shape that was left out counts by the operations of an SVD."""
    pace = sum(seconds.values()) / sum(cost(s) for s in seconds)
    return N_LAYERS * sum(seconds.get(shape, pace * cost(shape)) for shape in LAYER)


def cost(shape: tuple[int, int]) -> float:
    """Of a dense SVD, in proportion."""
    return shape[0] * shape[1] * min(shape)


# --- the space of the weight against the core space ----------------------------------------------------------------------------


def full_space(name: str, deltas: Sequence[Tensor], density: float) -> Tensor:
    """Entry by entry in the axes of the weight, by PEFT's functions; della, which PEFT has not, with its election."""
    from peft.utils import merge_utils

    torch.manual_seed(0)
    if name == "della":
        places = [d.abs().argsort(-1).argsort(-1) / (d.shape[-1] - 1) for d in deltas]
        keeps = [density + EPSILON * (p - 0.5) for p in places]
        dropped = torch.stack([d * torch.bernoulli(k) / k for d, k in zip(deltas, keeps, strict=True)])
        return merge_utils.disjoint_merge(dropped, merge_utils.calculate_majority_sign_mask(dropped))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a density of 1 trims nothing
        return getattr(merge_utils, name)(list(deltas), torch.ones(len(deltas), device=deltas[0].device), density)


def spaces(shape: tuple[int, int], device: str) -> list[tuple[str, list[float]]]:
    """(method, [energy kept in full space, cosine with the plain sum, strength along it, the same three in core space])."""
    deltas = strong(pair(shape, 1, device))
    dense, total = [product(d) for d in deltas], stack(deltas)
    rows = []
    for name, density in [("sum", 1.0), ("ties", 0.2), ("ties", 1.0), *list(DENSITY.items())[1:]]:
        change = sum(dense) if name == "sum" else full_space(name, dense, density)
        torch.manual_seed(0)
        left, sigma, right = torch.svd_lowrank(change, q=4 * RANK, niter=8)
        cut = Factors(left[:, :RANK] * sigma[:RANK], right[:, :RANK].T)
        full = [norm(cut) ** 2 / float(change.double().square().sum()), *along(cut, total)]
        core = total if name == "sum" else METHODS[name].function(deltas, density=density)
        short = truncate.truncate(core, RANK)
        kept = [norm(short) ** 2 / norm(core) ** 2, *along(short, total)]
        rows.append((name if name == "sum" else f"{name}, density {density}", full + kept))
    return rows


def along(x: Factors, total: Factors) -> tuple[float, float]:
    """(cosine, strength) of a change with the plain sum."""
    common = inner(x, total)
    return common / norm(x) / norm(total), common / norm(total) ** 2


# --- the two roads of the truncation -------------------------------------------------------------------------------------------


def operands(kind: str, shape: tuple[int, int], components: int) -> Factors:
    """Many components: LoRAs of rank RANK stacked, or noise, whose spectrum hardly falls."""
    if kind == "stacked":
        return stack([lora(shape, seed) for seed in range(components // RANK)])
    random = torch.Generator().manual_seed(0)
    return Factors(torch.randn(shape[0], components, generator=random), torch.randn(components, shape[1], generator=random))


def thin(args: argparse.Namespace) -> None:
    """Prints seconds through the core, which hardly depend on the rank kept and are taken at the largest, and by Krylov."""
    ranks = (16, 32, 64, 128, 256)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {device_name(args.device)}, the best of the runs\n"
    )
    print("| out x in | components | spectrum | rank kept | components / rank | core s | Krylov s | Krylov / core | differ by |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES[:1] if args.quick else SHAPES[:2]:
        for components in (256, 512) if args.quick else (256, 512, 768, 1024, 1536, 2048):
            for kind in ("stacked", "noise"):
                x = operands(kind, shape, components).map(lambda t: wide(t.to(args.device)))
                core, (_, want, _) = fastest(lambda x=x: truncate._core_svd(fold(x), ranks[-1]), args)
                for rank in (k for k in ranks if k < components):
                    krylovs, (_, sigma, _) = fastest(lambda x=x, k=rank: krylov.leading(x, k), args)
                    difference = abs(float(sigma.square().sum() / want[:rank].square().sum()) - 1)
                    print(
                        f"| {shape[0]} x {shape[1]} | {components} | {kind} | {rank} | {components / rank:g} | {core:.2f} "
                        f"| {krylovs:.2f} | {krylovs / core:.2f} | {difference:.0e} |",
                        flush=True,
                    )


def fastest(work: Callable[[], tuple], args: argparse.Namespace) -> tuple[float, tuple]:
    """(seconds, result): the best of the runs, or of one that takes long."""
    spent = []
    while len(spent) < args.runs and sum(spent) < 3:
        wait(args.device)
        start = time.perf_counter()
        result = work()
        wait(args.device)
        spent.append(time.perf_counter() - start)
    return min(spent), result


# --- the tables ----------------------------------------------------------------------------------------------------------------


def line(row: Row, base: float) -> str:
    """A row in Markdown; `base` are the seconds of our sum."""
    times, digits = sorted(row.seconds), 2 if row.seconds[0] < 100 else 0
    shown = f"{times[0]:.{digits}f} {statistics.median(times):.{digits}f} {times[-1]:.{digits}f}"
    shown = shown if len(times) > 1 else f"{times[0]:.{digits}f}"
    ratio = statistics.median(times) / base
    times_sum = f"{ratio:.{1 if ratio < 100 else 0}f}"
    return f"| {row.name} | {row.modules} | {shown} | {times_sum} | {row.peak / 1e6:.0f} | {row.excess:.0e} |"


def alone(work: Callable, *arguments):
    """The result of a function that ran in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def table(args: argparse.Namespace) -> None:
    """Prints both tables and what they say of the aims."""
    sampled = ", ".join(f"{out} x {into}" for out, into in SHAPES[: args.slow_modules])
    print(
        f"two LoRAs of rank {RANK} to rank {RANK}, factors in memory in float32; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, device {device_name(args.device)}, {args.runs} runs.\n"
        f"Dense ways: one module of {sampled}, multiplied up to {N_LAYERS * len(LAYER)} modules; those through torch.linalg.svd "
        f"run once.\n"
    )
    print("| | modules measured | seconds for 240 modules (min median max) | x sum | peak MB | excess |")
    print("|---|---|---|---|---|---|")
    rows: dict[str, Row] = {}
    for work, name in [*((ours, n) for n in METHODS), *((others, n) for n in OTHERS)]:
        rows[name] = alone(work, name, args)
        print(line(rows[name], statistics.median(rows["sum"].seconds)), flush=True)
    base = statistics.median(rows["sum"].seconds)
    times = {name: statistics.median(row.seconds) / base for name, row in rows.items()}
    slowest = max(METHODS, key=times.__getitem__)
    dense = min((n for n, way in OTHERS.items() if way in (kohya, reduced)), key=times.__getitem__)
    worst = max(METHODS, key=lambda n: rows[n].excess)
    print(f"\n- the sum is {times[dense]:.0f} times as fast as {dense} (aim: 1000)")
    print(f"- slowest of our methods: {slowest}, {times[slowest]:.1f} times the sum (aim: 3)")
    print(f"- largest excess of our methods: {worst}, {rows[worst].excess:.0e} (aim: rounding, 1e-7)\n")
    print(
        f"One module, {SQUARE[0]} x {SQUARE[1]}, cut back to rank {RANK}, entry by entry in the axes of the weight (full) and\n"
        f"in our core space: the share of the method's energy that the cut leaves; the cosine of what is left with the plain sum;"
    )
    print("its part along the plain sum, 1 being the sum's own strength.\n")
    print("| | full: energy kept | cosine | strength | core: energy kept | cosine | strength |")
    print("|---|---|---|---|---|---|---|")
    for name, figures in alone(spaces, SQUARE, args.device):
        print(f"| {name} | " + " | ".join(f"{f:.3f}" for f in figures) + " |")


def device_name(device: str) -> str:
    """With the model of a GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--slow-modules", type=int, default=len(SHAPES), help="shapes on which the dense ways are measured")
    parser.add_argument("--quick", action="store_true", help="three layers, one run, one shape for the dense ways")
    parser.add_argument("--thin", action="store_true", help="the two roads of the truncation instead")
    args = parser.parse_args()
    args.layers = 3 if args.quick else N_LAYERS
    if args.quick:
        args.runs, args.slow_modules = 1, 1
    (thin if args.thin else table)(args)


if __name__ == "__main__":
    main()

"""The questions that are asked of the small world, each answered by tables in Markdown: what they hold stands beside them.

Differences are paired: same sets, scenes and noise. `[a, b]` is the 95 % interval of a bootstrap over sets and pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch

from extensions_built_in.zit_merge.algebra.ema import gamma_of, profile
from extensions_built_in.zit_merge.config import presets as shipped
from extensions_built_in.zit_merge.preview.metrics import colour, detail, pixels, structure
from tests.benchmarks.small_world import loras, world
from tests.benchmarks.small_world.compare import MEASURES, Bench, Merge, Merged, common, spread, what_of
from tests.benchmarks.small_world.ssr import Ssr

SUM = Merged()
SUBJECTS, STYLES = tuple(world.NEW_SUBJECTS), tuple(world.NEW_STYLES)
STRENGTHS = (0.3, 0.45, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0)
BANDS = 6  # of layers, in the maps
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, header, rows


@dataclass(frozen=True)
class Asked:
    """What the questions are asked of.

    Attributes:
        bench: The student.
        folder: Of the LoRAs.
        ending: Of their names, between the seed and the file's ending, such as `_n200`.
        rank: Of the LoRAs.
        seeds: Of the LoRAs.
    """

    bench: Bench
    folder: Path
    ending: str
    rank: int = 8
    seeds: tuple[int, ...] = (0, 1)

    def path(self, what: str, seed: int, ending: str = "") -> Path:
        """Of a LoRA.

        Args:
            what: A new subject or style.
            seed: Of its training.
            ending: Another one.
        """
        return self.folder / f"{what}_r{self.rank}_s{seed}{ending or self.ending}.safetensors"

    def sets(self, subjects: int, styles: int, ending: str = "") -> list[list[Path]]:
        """LoRAs that are merged: every choice of subjects with one of styles in turn, seeds in turn.

        Args:
            subjects: In each set.
            styles: In each set.
            ending: Of the files' names.
        """
        chosen = list(product(combinations(SUBJECTS, subjects), combinations(STYLES, styles)))
        if subjects + styles > 2:  # as many as there are choices of subjects
            chosen = [one for n, one in enumerate(chosen) if n % len(STYLES) == n // len(STYLES) % len(STYLES)]
        turns = [[self.seeds[(n + k) % len(self.seeds)] for k in range(subjects + styles)] for n in range(len(chosen))]
        if subjects and styles:
            turns = [[*turn[:-1], self.seeds[n // 2 % len(self.seeds)]] for n, turn in enumerate(turns)]
        return [
            [self.path(what, seed, ending) for what, seed in zip((*some, *others), turn, strict=True)]
            for (some, others), turn in zip(chosen, turns, strict=True)
        ]


KINDS = {"subject + style": (1, 1), "two subjects": (2, 0), "two subjects + style": (2, 1), "two subjects + two styles": (2, 2)}


# --- words for tables ----------------------------------------------------------------------------------------------------------


def _of(curves: np.ndarray, measure: str) -> np.ndarray:
    return curves[..., MEASURES.index(measure)]


def _plain(values: np.ndarray) -> str:
    return f"{values.mean():.2f}"


def _spread(values: np.ndarray) -> str:
    mean, low, high = spread(values)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _change(values: np.ndarray) -> str:
    mean, low, high = spread(values)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _saves(path: Path) -> list[Path]:
    """The saves of a LoRA's training but the last, in order."""
    return sorted((path.parent / "saves").glob(f"{path.stem}_{'[0-9]' * 9}.safetensors"))


def _curves(asked: Asked, sets: Sequence[Sequence[Path]], merged: Merge, strengths: Sequence[float] = STRENGTHS) -> np.ndarray:
    """(sets, strengths, pictures, measures)."""
    return np.stack([asked.bench.curve(paths, merged, strengths) for paths in sets])


def _best_common(curves: np.ndarray, strengths: Sequence[float] = STRENGTHS) -> str:
    """The strengths that are best for one half of the sets and for the other: see `common`."""
    halves = np.arange(len(curves)) % 2
    found = [strengths[_of(curves[halves == half], "score").mean((0, 2)).argmax()] for half in (0, 1)]
    return " and ".join(f"{strength:g}" for strength in dict.fromkeys(found))


# --- 0: what the LoRAs do alone ------------------------------------------------------------------------------------------------


def alone(asked: Asked) -> Iterator[Table]:
    """Each LoRA by itself, and the student without one."""
    rows = []
    for name, whats in (("subjects", SUBJECTS), ("styles", STYLES)):
        sets = [[asked.path(what, seed)] for what in whats for seed in asked.seeds]
        curves = _curves(asked, sets, SUM)
        for n, strength in enumerate(STRENGTHS):
            found = curves[:, n]
            rows.append([name, f"{strength:g}", *(_spread(_of(found, measure)) for measure in MEASURES if measure != "excess")])
    bare = np.stack([asked.bench.judged([], f"the student, {n}", dict) for n in range(1)])
    rows.append(["none, the base's words", "", *(_spread(_of(bare, measure)) for measure in MEASURES if measure != "excess")])
    yield "One LoRA", ["LoRAs", "strength", *(measure for measure in MEASURES if measure != "excess")], rows


# --- 1: shared directions ------------------------------------------------------------------------------------------------------


def _cosine(one: loras.Factors, other: loras.Factors) -> float:
    products, norms = 0.0, [0.0, 0.0]
    for module in one:
        a, b = (up @ down for up, down in (one[module], other[module]))
        products += float((a * b).sum())
        norms = [norms[0] + float(a.square().sum()), norms[1] + float(b.square().sum())]
    return products / (norms[0] * norms[1]) ** 0.5


def _turned(one: loras.Factors, seed: int) -> loras.Factors:
    """Of the same spectrum in other directions: both sides of every module turned at random."""
    random, found = torch.Generator().manual_seed(seed), {}
    for module, (up, down) in one.items():
        left, right = (torch.linalg.qr(torch.randn(n, n, generator=random))[0] for n in (len(up), down.shape[1]))
        found[module] = left @ up, down @ right
    return found


def _overlap(one: loras.Factors, other: loras.Factors) -> tuple[float, float]:
    """Mean over modules of the share of a LoRA's column and row space that lies in the other's."""
    found = []
    for module in one:
        bases = [
            [torch.linalg.svd(of, full_matrices=False)[0] for of in (up, down.T)] for up, down in (one[module], other[module])
        ]
        found.append([float((a.T @ b).square().sum()) / a.shape[1] for a, b in zip(*bases, strict=True)])
    columns, rows = np.mean(found, 0)
    return float(columns), float(rows)


def shared(asked: Asked) -> Iterator[Table]:
    """Question 1: do LoRAs share directions beyond chance, and does the training adapter lessen it?"""
    rows = []
    for name, ending in (
        ("on the student", asked.ending),
        (
            "wearing the training adapter",
            asked.ending.replace("_toolkit", "") + "_adapter" + "_toolkit" * ("_toolkit" in asked.ending),
        ),
    ):
        paths = [asked.path(what, seed, ending) for what in (*SUBJECTS, *STYLES) for seed in asked.seeds]
        if not all(path.exists() for path in paths):
            continue
        given = {path: loras.load(path) for path in paths}
        turned: dict[Path, loras.Factors] = {}
        for path in paths:
            saves = _saves(path)
            given |= {save: loras.load(save) for save in saves[-2:-1]}
            turned[path] = _turned(given[path], len(turned))
        pairs = list(combinations(given, 2))
        kinds: dict[str, Callable[[Path, Path], bool]] = {
            "two saves of one training": lambda a, b: b.stem.startswith(a.stem) and a != b,
            "one subject or style, two seeds": lambda a, b: what_of(a) == what_of(b),
            "two subjects": lambda a, b: what_of(a) != what_of(b) and {what_of(a), what_of(b)} <= {*SUBJECTS},
            "two styles": lambda a, b: what_of(a) != what_of(b) and {what_of(a), what_of(b)} <= {*STYLES},
            "subject and style": lambda a, b: (what_of(a) in SUBJECTS) != (what_of(b) in SUBJECTS),
        }
        for kind, fits in kinds.items():
            some = [(a, b) for a, b in pairs if fits(a, b) and (b in turned or kind.startswith("two saves"))]
            if not some:
                continue
            cosines = np.array([[_cosine(given[a], given[b])] for a, b in some])
            chance = np.array([_cosine(given[b], turned[a]) for a, b in some])
            spaces = np.array([_overlap(given[a], given[b]) for a, b in some])
            by_chance = np.array([_overlap(given[b], turned[a]) for a, b in some])
            rows.append(
                [
                    name,
                    kind,
                    str(len(some)),
                    _change(cosines),
                    f"{chance.mean():+.3f} ± {chance.std():.3f}",
                    f"{spaces[:, 0].mean():.2f} ({by_chance[:, 0].mean():.2f})",
                    f"{spaces[:, 1].mean():.2f} ({by_chance[:, 1].mean():.2f})",
                ]
            )
    header = ["trained", "pair", "pairs", "cosine", "after a random turn", "column space (by chance)", "row space (by chance)"]
    yield "Shared directions", header, rows


# --- 2: where a sum burns, and what keeps more ---------------------------------------------------------------------------------


def methods_of(size: int) -> list[Merged]:
    """Those that are compared beside the sum.

    Args:
        size: LoRAs in a set.
    """
    found = [
        Merged("normalize"),
        Merged("normalize", (("per", "layer"),)),
        Merged("average"),
        Merged("tsv"),
        Merged("shared_once"),
        Merged("ties", (("density", 0.2),)),
        Merged("ties", (("density", 0.5),)),
    ]
    if size == 2:
        found += [Merged("project", (("yields", side),)) for side in ("first", "second", "both")]
    return found


METHOD_HEADER = ["method", "score as it is", "against the best sum", "best strengths", "score there", "burned there"]
METHOD_HEADER += [f"{measure}, against the best sum" for measure in ("score", "subject", "style", "prompt")]
SCALES = ("normalize", "average")  # the sum times one number: of the same curve, as far as strengths are chosen freely


def stacked(asked: Asked) -> Iterator[Table]:
    """Question 2: where sums of 2, 3, 4 LoRAs burn, and which method keeps more at its best strength."""
    burning = []
    for kind, (subjects, styles) in KINDS.items():
        curves = _curves(asked, asked.sets(subjects, styles), SUM)
        for measure in ("score", "burned"):
            burning.append([kind, measure, *(_spread(_of(curves[:, n], measure)) for n in range(len(STRENGTHS)))])
    yield "The sum over its common strength", ["set", "measure", *(f"{strength:g}" for strength in STRENGTHS)], burning
    for kind, sizes in KINDS.items():
        yield _beside_the_sum(asked, kind, methods_of(sum(sizes)))


def _beside_the_sum(asked: Asked, kind: str, ways: Sequence[Merge]) -> Table:
    """Ways to merge sets of a kind, as they are and at their best common strength, beside the sum."""
    sets, at_one = asked.sets(*KINDS[kind]), STRENGTHS.index(1.0)
    of_sum = _curves(asked, sets, SUM)
    base = common(of_sum)
    rows = [_method_row("sum", of_sum[:, at_one], of_sum, base)]
    for way in ways:
        if way.name in SCALES:
            rows.append(_method_row(way.name, _curves(asked, sets, way, (1.0,))[:, 0], None, base))
        else:
            curves = _curves(asked, sets, way)
            rows.append(_method_row(way.name, curves[:, at_one], curves, base))
    return f"{kind}: {len(sets)} sets", METHOD_HEADER, rows


def again(asked: Asked) -> Iterator[Table]:
    """The main comparison in short, for LoRAs of another training."""
    for kind in ("subject + style", "two subjects"):
        yield _beside_the_sum(asked, kind, [Merged("normalize"), Merged("tsv")])


def _method_row(name: str, at_one: np.ndarray, curves: np.ndarray | None, base: np.ndarray) -> list[str]:
    """A method as it is, and at its best common strength, beside the sum at its own."""
    row = [name, _spread(_of(at_one, "score")), _change(_of(at_one, "score") - _of(base, "score"))]
    if curves is None:
        return [*row, *["as the sum"] * 7]
    found = common(curves)
    row += [_best_common(curves), _spread(_of(found, "score")), _plain(_of(found, "burned"))]
    if name == "sum":
        return [*row, "–", *(f"({_plain(_of(found, measure))})" for measure in ("subject", "style", "prompt"))]
    return [*row, *(_change(_of(found, measure) - _of(base, measure)) for measure in ("score", "subject", "style", "prompt"))]


def seeds(asked: Asked) -> Iterator[Table]:
    """Two LoRAs of one subject or style from two seeds, and the last two saves of one training, beside the better one alone."""
    whats = (*SUBJECTS, *STYLES)
    pairs = {"two seeds": [[asked.path(what, seed) for seed in asked.seeds[:2]] for what in whats]}
    finals = [asked.path(what, seed) for what in whats for seed in asked.seeds]
    saves = [[*_saves(path)[-1:], path] for path in finals]
    pairs["two saves"] = [pair for pair in saves if len(pair) == 2]
    at_one = STRENGTHS.index(1.0)
    for kind, sets in pairs.items():
        if not sets:
            continue
        single = [_curves(asked, [[paths[k]] for paths in sets], SUM) for k in (0, 1)]
        alone_ = np.stack([common(curves) for curves in single]).mean(0)
        as_is = np.stack([curves[:, at_one] for curves in single])
        rows = [["one of them, mean of both", _plain(_of(as_is, "score")), "", _spread(_of(alone_, "score")), "–"]]
        for merged in (SUM, Merged("average"), Merged("slerp"), Merged("ties"))[: 4 if kind == "two seeds" else 3]:
            if merged.method == "average":  # of the sum's curve, at half of its strengths
                found = _curves(asked, sets, merged, (1.0,))
                rows.append(["average", _plain(_of(found[:, 0], "score")), "", "as the sum", "as the sum"])
                continue
            curves = _curves(asked, sets, merged)
            found = common(curves)
            change = _change(_of(found, "score") - _of(alone_, "score"))
            row = [_plain(_of(curves[:, at_one], "score")), _best_common(curves), _spread(_of(found, "score")), change]
            rows.append([merged.name, *row])
        header = ["method", "score as it is", "best strength", "score there", "against one of them at its best"]
        yield f"One subject or style, {kind}: {len(sets)} sets", header, rows


# --- 3: core space and full space ----------------------------------------------------------------------------------------------


def spaces(asked: Asked) -> Iterator[Table]:
    """Question 3: TIES and DARE in the core space and on the whole matrices."""
    sets, rows = asked.sets(1, 1), []
    base = common(_curves(asked, sets, SUM))
    for density in (0.2, 0.5):
        for rule, core in (("ties", "ties"), ("dare", "dare_linear")):
            found = {}
            for where, method in (("core", core), ("full", f"full_{rule}")):
                draw = (("seed", 0),) if method == "full_dare" else ()
                curves = _curves(asked, sets, Merged(method, (("density", density), *draw)))
                found[where] = common(curves)
                scores = [_best_common(curves), _spread(_of(found[where], "score")), _plain(_of(found[where], "burned"))]
                rows.append([rule, f"{density:g}", where, *scores, _change(_of(found[where], "score") - _of(base, "score"))])
            rows.append([rule, f"{density:g}", "core − full", "", "", "", _change(_of(found["core"] - found["full"], "score"))])
    header = ["rule", "density", "space", "best strength", "score there", "burned there", "against the sum at its best"]
    yield f"TIES and DARE, subject + style: {len(sets)} sets", header, rows


# --- 4: rank -------------------------------------------------------------------------------------------------------------------


def _norm(factors: loras.Factors) -> float:
    return sum(float((up @ down).square().sum()) for up, down in factors.values())


def ranks(asked: Asked) -> Iterator[Table]:
    """Question 4: how much rank a merge needs."""
    sets, rows = asked.sets(1, 1), []
    exact = _curves(asked, sets, SUM)
    strength = int(_of(exact, "score").mean((0, 2)).argmax())
    whole = [_norm(SUM.factors(paths)) for paths in sets]
    for rank in (1, 2, 3, 4, 6, 8, 12):
        merged = replace(SUM, rank=rank)
        kept = np.array([_norm(merged.factors(paths)) / energy for paths, energy in zip(sets, whole, strict=True)])
        found = _curves(asked, sets, merged, (STRENGTHS[strength],))[:, 0]
        change = [_change(_of(found - exact[:, strength], measure)) for measure in ("subject", "style", "score")]
        rows.append(
            [str(rank), f"{kept.mean():.3f} ({kept.min():.3f} to {kept.max():.3f})", _spread(_of(found, "score")), *change]
        )
    header = ["rank", "energy kept (range over sets)", "score", "subject, against exact", "style", "score"]
    title = f"Two LoRAs of rank {asked.rank} at strength {STRENGTHS[strength]:g}, cut: {len(sets)} sets"
    yield title, header, rows


# --- 5: maps -------------------------------------------------------------------------------------------------------------------


def groups() -> Mapping[str, Callable[[str], bool]]:
    """Name -> whether a module belongs to it: bands of layers, and components."""

    def band(first: int, last: int) -> Callable[[str], bool]:
        return lambda module: first <= int(module.split(".")[1]) <= last

    width = 30 // BANDS
    found = {f"layers {n * width} to {n * width + width - 1}": band(n * width, n * width + width - 1) for n in range(BANDS)}
    for part in loras.MODULES:
        found[part.removesuffix(".0")] = lambda module, part=part: module.endswith(part)
    return found


def _without(path: Path, dropped: Sequence[str]) -> loras.Factors:
    tests = groups()
    return {module: pair for module, pair in loras.load(path).items() if not any(tests[name](module) for name in dropped)}


def _loss(asked: Asked, path: Path, dropped: Sequence[str], bench: Bench | None = None) -> np.ndarray:
    """What a LoRA's own measure loses picture by picture without some groups, (pictures,)."""
    bench, what = bench or asked.bench, what_of(path)
    measure = MEASURES.index("subject" if what in SUBJECTS else "style")
    whole = bench.judged([what], f"alone {path.parent.name}/{path.stem}", lambda: loras.load(path))
    name = f"{path.parent.name}/{path.stem} without {', '.join(dropped)}"
    return (whole - bench.judged([what], name, lambda: _without(path, dropped)))[:, measure]


def _maps(asked: Asked) -> dict[Path, np.ndarray]:
    """LoRA -> (groups, pictures)."""
    paths = [asked.path(what, seed) for what in (*SUBJECTS, *STYLES) for seed in asked.seeds]
    return {path: np.stack([_loss(asked, path, [name]) for name in groups()]) for path in paths}


def _distances(asked: Asked, path: Path, metric: Callable[[torch.Tensor, torch.Tensor], float]) -> np.ndarray:
    """How far the pictures without a group are from the whole LoRA's, as `ablate` measures it, (groups, pictures)."""
    what, name = what_of(path), f"{path.parent.name}/{path.stem}"
    whole = asked.bench.drawn([what], f"alone {name}", lambda: loras.load(path))[1]
    found = []
    for group in groups():
        others = asked.bench.drawn([what], f"{name} without {group}", lambda group=group: _without(path, [group]))[1]
        pairs = zip(torch.from_numpy(others).movedim(-1, 1), torch.from_numpy(whole).movedim(-1, 1), strict=True)
        found.append([metric(other, one) for other, one in pairs])
    return np.array(found)


def maps(asked: Asked) -> Iterator[Table]:
    """Question 5: ablation by layers and components, and how far it can be trusted."""
    found, names = _maps(asked), list(groups())
    rows = []
    for n, name in enumerate(names):
        rows.append(
            [
                name,
                *(
                    _change(np.stack([loss[n] for path, loss in found.items() if what_of(path) in whats]))
                    for whats in (SUBJECTS, STYLES)
                ),
            ]
        )
    yield "What is lost without a group", ["group", "subject LoRAs: subject", "style LoRAs: style"], rows

    def correlation(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.corrcoef(one, other)[0, 1]) if one.std() > 0 and other.std() > 0 else 0.0

    metrics = (pixels, structure, colour, detail)
    told = {metric.__name__: {path: _distances(asked, path, metric) for path in found} for metric in metrics}
    sizes = [pictures for pictures in (1, 2, 4, 8, 16) if 2 * pictures <= asked.bench.count]
    random, rows = np.random.default_rng(0), []
    for kind, whats in (("subjects", SUBJECTS), ("styles", STYLES)):
        for measure, of in {"what is asked for": found, **told}.items():
            some = [loss for path, loss in of.items() if what_of(path) in whats]
            row = [kind, measure]
            for pictures in sizes:
                agreed = []
                for loss in some:
                    for _ in range(100):
                        chosen = random.permutation(loss.shape[1])
                        one, other = (loss[:, half].mean(1) for half in (chosen[:pictures], chosen[pictures : 2 * pictures]))
                        agreed.append(correlation(one, other))
                row.append(f"{np.mean(agreed):.2f} ({np.percentile(agreed, 5):.2f})")
            rows.append(row)
    header = ["LoRAs", "measure", *(f"{pictures} each" for pictures in sizes)]
    yield "Correlation of two maps of one LoRA from different pictures: mean (5th percentile of draws)", header, rows

    rows = []
    for metric, of in told.items():
        for kind, whats in (("subjects", SUBJECTS), ("styles", STYLES)):
            values = [[correlation(of[path].mean(1), found[path].mean(1))] for path in found if what_of(path) in whats]
            rows.append([metric, kind, _change(np.array(values))])
    header = ["metric of `ablate`", "LoRAs", "correlation with the loss of what is asked for"]
    yield "Does a map by distances show what carries the subject or the style?", header, rows

    rows = []
    relations: dict[str, Callable[[Path, Path], bool]] = {
        "one subject, two seeds": lambda a, b: what_of(a) == what_of(b) and what_of(a) in SUBJECTS,
        "one style, two seeds": lambda a, b: what_of(a) == what_of(b) and what_of(a) in STYLES,
        "two subjects": lambda a, b: what_of(a) != what_of(b) and {what_of(a), what_of(b)} <= {*SUBJECTS},
        "two styles": lambda a, b: what_of(a) != what_of(b) and {what_of(a), what_of(b)} <= {*STYLES},
        "subject and style": lambda a, b: (what_of(a) in SUBJECTS) != (what_of(b) in SUBJECTS),
    }
    for relation, fits in relations.items():
        values = np.array([[correlation(found[a].mean(1), found[b].mean(1))] for a, b in combinations(found, 2) if fits(a, b)])
        rows.append([relation, str(len(values)), _change(values)])
    yield "Correlation of the maps of two LoRAs", ["LoRAs", "pairs", "correlation"], rows

    rows = []
    fresh = replace(asked.bench, seed=asked.bench.seed + 1)
    for kind, whats in (("subjects", SUBJECTS), ("styles", STYLES)):
        kept: dict[str, list[np.ndarray]] = {"least": [], "most": [], "at random": []}
        for n, what in enumerate(whats):
            for seed, other in ((0, 1), (1, 0)):
                bands = names[:BANDS]
                order = list(np.argsort(found[asked.path(what, seed)][:BANDS].mean(1)))
                drawn = list(np.random.default_rng(10 * n + seed).permutation(BANDS))
                for choice, chosen in (
                    ("least", order[: BANDS // 2]),
                    ("most", order[BANDS // 2 :]),
                    ("at random", drawn[: BANDS // 2]),
                ):
                    dropped = [bands[k] for k in sorted(chosen)]
                    kept[choice].append(_loss(asked, asked.path(what, other), dropped, fresh))
        for choice, losses in kept.items():
            rows.append([kind, choice, _change(-np.stack(losses))])
    title = "Half of the layers dropped by the map of another seed's LoRA, on other pictures"
    yield title, ["LoRAs", "dropped bands: those that matter", "change of subject or style"], rows


@dataclass(frozen=True)
class Preset:
    """A LoRA with a preset, to be compared as a merge is."""

    preset: str

    @property
    def name(self) -> str:
        """For tables."""
        return f"preset {self.preset}"

    def factors(self, paths: Sequence[Path]) -> loras.Factors:
        """What it adds to the model.

        Args:
            paths: One LoRA.
        """
        return SUM.factors(paths, [{"ratio": 1.0, "preset": self.preset}])


def presets(asked: Asked) -> Iterator[Table]:
    """What the shipped presets leave of a LoRA, at ratio 1 and at the ratio that is best."""
    ratios, measures = STRENGTHS[STRENGTHS.index(0.8) :], ("subject", "style", "prompt")
    at = ratios.index(1.0)
    at_one, at_best = [], []
    for name in shipped.presets():
        first, second = [name], [name]
        for whats, own in ((SUBJECTS, "subject"), (STYLES, "style")):
            sets = [[asked.path(what, seed)] for what in whats for seed in asked.seeds]
            whole, kept = (_curves(asked, sets, way, ratios) for way in (SUM, Preset(name)))
            first += [_plain(_of(kept[:, at], measure)) for measure in measures]
            first.append(_change(_of(kept[:, at] - whole[:, at], own)))
            second += [_best_common(kept, ratios), _spread(_of(common(kept), "score"))]
            second.append(_change(_of(common(kept) - common(whole), "score")))
        at_one.append(first)
        at_best.append(second)
    header = ["preset", *(f"subject LoRAs: {measure}" for measure in measures), "subject, against no preset"]
    header += [*(f"style LoRAs: {measure}" for measure in measures), "style, against no preset"]
    yield "Shipped presets at ratio 1", header, at_one
    header = [
        f"{kind}: {value}" for kind in ("subject LoRAs", "style LoRAs") for value in ("best ratio", "score", "against no preset")
    ]
    yield "Shipped presets at their best ratio from 0.8, against the whole LoRA at its own", ["preset", *header], at_best


@dataclass(frozen=True)
class Divided:
    """A subject and a style that share the layers by maps of other seeds' LoRAs.

    Attributes:
        asked: For the maps.
        name: For tables.
        leaves: How many of the bands that matter most to the style the subject's LoRA leaves to it.
        keeps: In how many of the bands that matter most to it the style's LoRA stays.
    """

    asked: Asked
    name: str
    leaves: int = 0
    keeps: int = BANDS

    def factors(self, paths: Sequence[Path]) -> loras.Factors:
        """What the sum adds to the model.

        Args:
            paths: A subject and a style.
        """
        subject, style = paths
        (other,) = {self.asked.path(what_of(style), seed) for seed in self.asked.seeds} - {style}
        bands = list(groups())[:BANDS]
        order = np.argsort([-_loss(self.asked, other, [band]).mean() for band in bands], kind="stable")
        without = [{bands[n] for n in order[: self.leaves]}, {bands[n] for n in order[self.keeps :]}]
        ratios = []
        for dropped in without:
            layers = {band.removeprefix("layers ").replace(" to ", "-"): 0.0 for band in sorted(dropped)}
            ratios.append({"ratio": 1.0, "layers": layers})
        return SUM.factors([subject, style], ratios)


def divided(asked: Asked) -> Iterator[Table]:
    """Does a map help a merge: the style alone in the layers that carry it, the subject in the others?"""
    ways = [
        Divided(asked, "style in its best half of the layers", keeps=BANDS // 2),
        Divided(asked, "subject without the style's best sixth", leaves=1),
        Divided(asked, "subject without the style's best third", leaves=2),
        Divided(asked, "style in its best half, subject without the best sixth", leaves=1, keeps=BANDS // 2),
    ]
    yield _beside_the_sum(asked, "subject + style", ways)


# --- 6: averages over checkpoints ----------------------------------------------------------------------------------------------


def averages(asked: Asked) -> Iterator[Table]:
    """Question 6: averages over the last saves of a training."""
    rows = []
    for kind, whats in (("subjects", SUBJECTS), ("styles", STYLES)):
        finals = [asked.path(what, seed) for what in whats for seed in asked.seeds]
        strengths = STRENGTHS[2:5]
        base, at_one = _curves(asked, [[path] for path in finals], SUM, strengths), strengths.index(1.0)
        for sigma in (0.05, 0.1, 0.2, 0.2887):
            curves = []
            for path in finals:
                saves = [*_saves(path), path]
                if len(saves) < 4:
                    raise SystemExit(f"{path.name} has no saves: remove it, and train it with loras --save-every")
                steps = [int(save.stem.rsplit("_", 1)[1]) for save in saves[:-1]]
                saves, steps = saves[-4:], [*steps, int(path.stem.split("_n")[1].split("_")[0])][-4:]
                weights = profile(steps, gamma_of(sigma))
                what, merged = what_of(path), Merged("sum", rank=asked.rank)
                made: list[loras.Factors] = []

                def worn(made=made, merged=merged, saves=saves, weights=weights) -> loras.Factors:
                    if not made:
                        made.append(merged.factors(saves, weights))
                    return made[0]

                name = f"average of {path.parent.name}/{path.stem} {sigma}"
                curves.append(np.stack([asked.bench.judged([what], name, worn, strength) for strength in strengths]))
            found = np.stack(curves)
            rows.append(
                [
                    kind,
                    f"{sigma:g}",
                    _change(_of(found[:, at_one] - base[:, at_one], "score")),
                    _change(_of(common(found) - common(base), "score")),
                    _change(_of(common(found) - common(base), "burned")),
                ]
            )
    header = [
        "LoRAs",
        "sigma_rel",
        "score at strength 1, against the last save",
        "score, each at its best strength",
        "burned there",
    ]
    yield "Averages over the last four saves", header, rows


# --- 7: what foretells burn ----------------------------------------------------------------------------------------------------


def _largest(matrix: torch.Tensor) -> float:
    """Its largest singular value."""
    side = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    return max(0.0, float(torch.linalg.eigvalsh(side @ side.T)[-1])) ** 0.5


def _predictors(weights: Mapping[str, torch.Tensor], paths: Sequence[Path]) -> list[dict[str, float]]:
    """Numbers of a sum that need no picture, at every strength."""
    given, factors = [loras.load(path) for path in paths], SUM.factors(paths)
    deltas = {module: up @ down for module, (up, down) in factors.items()}
    of_base, tops = (np.array([_largest(of[module]) for module in deltas]) for of in (weights, deltas))
    change, size = (sum(float(of[module].square().sum()) for module in deltas) for of in (deltas, weights))
    apart = sum(float((up @ down).square().sum()) for one in given for up, down in one.values())
    found = []
    for strength in STRENGTHS:
        grown = np.array([_largest(weights[module] + strength * delta) for module, delta in deltas.items()]) / of_base
        found.append(
            {
                "sum of strengths": strength * len(paths),
                "norm of the change / norm of the base": strength * (change / size) ** 0.5,
                "largest singular value of the change / the base's, mean": float(np.mean(strength * tops / of_base)),
                "largest singular value of the change / the base's, largest": float(np.max(strength * tops / of_base)),
                "growth of the base's largest singular value, mean": float(np.mean(grown)),
                "growth of the base's largest singular value, largest": float(np.max(grown)),
                "norm of the sum / root of the sum of squared norms": (change / apart) ** 0.5,
            }
        )
    return found


def _ranks_of(values: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[at]


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation.

    Args:
        one: Values.
        other: As many.
    """
    a, b = _ranks_of(one), _ranks_of(other)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def predictors(asked: Asked) -> Iterator[Table]:
    """Question 7: is there a predictor of burn that needs no picture?"""
    weights = {name: module.weight.detach() for name, module in loras.targets(asked.bench.model).items()}
    singles = [[asked.path(what, seed)] for what in (*SUBJECTS, *STYLES) for seed in asked.seeds]
    sets = singles + [paths for subjects, styles in KINDS.values() for paths in asked.sets(subjects, styles)]
    kinds = np.repeat(range(1 + len(KINDS)), [len(singles), *(len(asked.sets(*sizes)) for sizes in KINDS.values())])
    curves, at_one = _curves(asked, sets, SUM), STRENGTHS.index(1.0)
    burned, scores = _of(curves, "excess").mean(2), _of(curves, "score").mean(2)
    lost = scores.max(1) - scores[:, at_one]  # at strength 1, of what the set can reach
    table = [_predictors(weights, paths) for paths in sets]
    random, rows = np.random.default_rng(0), []

    def within(values: np.ndarray, chosen: np.ndarray) -> float:
        """The mean over kinds of the rank correlation among sets of one kind."""
        of = [chosen[kinds[chosen] == kind] for kind in set(kinds)]
        return float(np.mean([spearman(values[some], lost[some]) for some in of if len(some) > 2]))

    def told(value: Callable[[np.ndarray], float]) -> str:
        drawn = [value(chosen) for chosen in random.integers(len(sets), size=(500, len(sets)))]
        low, high = np.percentile(drawn, [2.5, 97.5])
        return f"{value(np.arange(len(sets))):+.2f} [{low:+.2f}, {high:+.2f}]"

    for name in table[0][0]:
        values = np.array([[cell[name] for cell in row] for row in table])
        one = values[:, at_one]
        rows.append(
            [
                name,
                told(lambda chosen, values=values: spearman(values[chosen].ravel(), burned[chosen].ravel())),
                told(lambda chosen, one=one: spearman(one[chosen], lost[chosen])),
                told(lambda chosen, one=one: within(one, chosen)),
            ]
        )
    header = ["number", "burn, all strengths", "lost at strength 1, all sets", "lost at strength 1, within a kind"]
    yield f"Rank correlation over {len(sets)} sums of one to four LoRAs", header, rows


# --- SSR -----------------------------------------------------------------------------------------------------------------------


def calibrated(asked: Asked) -> Iterator[Table]:
    """SSR beside the methods that need no model."""
    bench, rows = asked.bench, []
    ways = [Merged("tsv"), Ssr(bench, 1), Ssr(bench, 8), Ssr(bench, 8, worn=False), Ssr(bench, 8, whole=True)]
    for kind in ("subject + style", "two subjects"):
        yield _beside_the_sum(asked, kind, ways)
        found = np.stack([Ssr(bench, 8).strengths(paths).numpy() for paths in asked.sets(*KINDS[kind])])
        for name, j, k in (("first on its own", 0, 0), ("first on the second's", 0, 1), ("second on the first's", 1, 0)):
            rows.append([kind, name, _spread(found[:, [j], k])])
        rows.append([kind, "second on its own", _spread(found[:, [1], 1])])
    header = ["set", "LoRA on activations", "strength"]
    yield "How strong the LoRAs are in SSR's merge (8 pictures), as it is", header, rows


QUESTIONS: Mapping[str, Callable[[Asked], Iterator[Table]]] = {
    "alone": alone,
    "shared": shared,
    "stacked": stacked,
    "again": again,
    "seeds": seeds,
    "spaces": spaces,
    "ranks": ranks,
    "maps": maps,
    "presets": presets,
    "divided": divided,
    "averages": averages,
    "predictors": predictors,
    "ssr": calibrated,
}


def text(tables: Sequence[Table]) -> str:
    """Markdown.

    Args:
        tables: One after another.
    """
    parts = []
    for title, header, rows in tables:
        lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
        parts.append("\n".join([f"### {title}", "", *lines]))
    return "\n\n".join(parts) + "\n"

"""Every merge method from files to a file: against its definition on dense float64 matrices, and what is refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from oracles import methods as oracle
from oracles.dense import Deltas, read_deltas, read_metadata, weighted_sum
from oracles.producers import small_shapes
from safetensors.torch import load_file, save_file
from torch import Tensor
from workspace import Workspace, write_lora

from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.errors import ZitMergeError

_ALL = small_shapes(dim=12, ffn=20, temb=8, cap=12, n_layers=2, n_refiners=1)
_PARTS = ("layers.0.", "layers.1.attention", "context_refiner.0.attention", "all_x_embedder")
SHAPES = {name: shape for name, shape in _ALL.items() if name.startswith(_PARTS)}
F64 = torch.float64
# (trainer, rank, ratio, blocks): `layers` alone without alpha; all modules with alpha = rank / 2; fused attention
ME = ("ai-toolkit", 3, 0.8, {"to_q": 0.5})
STYLE = ("onetrainer-kohya", 2, 0.5, {"feed_forward": 1.5, "attention": 0.7})
FUSED = ("diffusion-pipe", 4, 0.4, {"adaLN": 1.2})
LOKR = ("ai-toolkit-lokr", 2, 0.6, {"w2": 0.25})
PRODUCT_LOKR = ("musubi-lokr", 2, 0.3, {"to_v": 2.0})


class Given(NamedTuple):
    """A LoRA of a step: its entry in the config, its dense deltas with blocks and without its ratio, its ratio."""

    entry: dict[str, Any]
    deltas: Deltas
    ratio: float


def block(blocks: Mapping[str, float], module: str) -> float:
    """The weight of a module by hand: the component, else its group."""
    names = {"to_q": ".to_q", "to_v": ".to_v", "w2": ".w2", "adaLN": "adaLN_modulation.0"}
    groups = {"attention": ".attention.", "feed_forward": ".feed_forward."}
    found = [w for key, w in blocks.items() if key in names and module.endswith(names[key])]
    found += [w for key, w in blocks.items() if key in groups and groups[key] in module]
    return found[0] if found else 1.0


def give(folder: Path, *loras: tuple, ratios: Sequence[float] | None = None, shapes: Any = SHAPES) -> list[Given]:
    """Writes LoRAs in fp32."""
    found = []
    for n, (producer, rank, ratio, blocks) in enumerate(loras):
        path, made = write_lora(folder, producer, rank, n, shapes=shapes, stem=f"{n}_{producer}")
        ratio = ratio if ratios is None else ratios[n]
        deltas = {module: block(blocks, module) * delta for module, delta in made.deltas.items()}
        found.append(Given({"lora": path.name, "ratio": ratio, "blocks": blocks}, deltas, ratio))
    return found


def pairs(path: Path, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Path:
    """A file in AI-Toolkit's form: module -> (up, down)."""
    tensors = {}
    for module, (up, down) in factors.items():
        tensors[f"diffusion_model.{module}.lora_B.weight"] = up.float().contiguous()
        tensors[f"diffusion_model.{module}.lora_A.weight"] = down.float().contiguous()
    save_file(tensors, path)
    return path


def factors(seed: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    """Of a module 12 x 12."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(12, rank, generator=random), torch.randn(rank, 12, generator=random)


def step(given: Sequence[Given], method: str, params: Mapping[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {"name": "a", "loras": [g.entry for g in given], "method": method, "params": dict(params or {})} | keys


def run(work: Workspace, *steps: Mapping[str, Any], **keys: Any) -> Path:
    """Runs a section in fp32. Returns the last step's file."""
    work.zit("run", work.job(*steps, **{"save": {"dtype": "fp32"}} | keys)).ok()
    return work.out / f"merged_cat_{steps[-1]['name']}.safetensors"


def merged(work: Workspace, given: Sequence[Given], method: str, params: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    return read_deltas(run(work, step(given, method, params)))


# --- the definitions -----------------------------------------------------------------------------------------------------------


def draws(deltas: Sequence[Tensor], seed: int, module: str) -> list[Tensor]:
    """The uniform numbers of a seed in a module: first those of the delta with the most energy, early axes counting more."""
    left, right = oracle.axes(deltas)
    shape = len(deltas), left.shape[1], right.shape[1]
    random = torch.Generator().manual_seed(zlib.crc32(f"{seed} {module}".encode()))
    numbers = list(torch.rand(shape, generator=random, dtype=F64))
    places = 1 + torch.arange(shape[1])[:, None] + 2**0.5 * torch.arange(shape[2])
    energies = [float((core**2 / places).sum()) for core in oracle.cores(deltas)]
    order = sorted(range(len(deltas)), key=lambda i: -energies[i])
    return [numbers[order.index(i)] for i in range(len(deltas))]


Weighed = Sequence[Tensor]  # deltas of a module, strength included, of the LoRAs that change it
# (deltas, module, parameters) -> delta
ENTRIES: dict[str, Callable[..., Tensor]] = {
    "ties": lambda d, module, density=0.2: oracle.ties(d, density),
    "dare_linear": lambda d, module, density=0.5, seed=0: oracle.dare_linear(d, density, draws(d, seed, module)),
    "dare_ties": lambda d, module, density=0.5, seed=0: oracle.dare_ties(d, density, draws(d, seed, module)),
    "della": lambda d, module, density=0.5, epsilon=0.15, seed=0: oracle.della(d, density, epsilon, draws(d, seed, module)),
    "tsv": lambda d, module: oracle.tsv(d),
    "shared_once": lambda d, module, tau=0.5: oracle.shared_once(d, tau),
    "project": lambda d, module, mu=0.5, yields="first", components=0: project(d, mu, yields, components),
}


def project(deltas: Weighed, mu: float, yields: str, components: int) -> Tensor:
    first, second = deltas
    yielded = oracle.gives_way(first, second, mu, components), oracle.gives_way(second, first, mu, components)
    return {"first": yielded[0] + second, "second": first + yielded[1], "both": yielded[0] + yielded[1]}[yields]


def of_vectors(method: str, vectors: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    """A method that looks at lengths and angles, on whole vectors; what is zero has no direction and takes its share."""
    if not any(ratios):
        return torch.zeros_like(vectors[0])
    vectors, ratios = zip(*[(v, r) for v, r in zip(vectors, ratios, strict=True) if r], strict=True)
    if method == "normalize":
        weighed = [r * v for v, r in zip(vectors, ratios, strict=True)]
        return oracle.normalize(weighed) if any(float(v.norm()) for v in vectors) else weighed[0]
    alive = [i for i, v in enumerate(vectors) if float(v.norm())]
    if len(alive) < 2:
        return oracle.average(vectors, ratios)
    if method == "karcher":
        total = sum(ratios)
        mean = mean_direction([vectors[i] / vectors[i].norm() for i in alive], [ratios[i] for i in alive])
        return mean * sum(r / total * float(v.norm()) for v, r in zip(vectors, ratios, strict=True))
    return getattr(oracle, method)(*vectors, ratios[1] / sum(ratios))


def mean_direction(units: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    """Karcher's, by steps along the mean tangent until it vanishes."""
    shares = [r / sum(ratios) for r in ratios]
    mean = oracle.average(units, shares)
    mean = mean / mean.norm()
    for _ in range(200):
        tangent = oracle.plain_sum([w * oracle.log(mean, u) for w, u in zip(shares, units, strict=True)])
        length = float(tangent.norm())
        if length < 1e-12:
            return mean
        mean = torch.cos(tangent.norm()) * mean + torch.sin(tangent.norm()) * tangent / length
    raise AssertionError("no mean direction found")


def scopes(per: str) -> list[list[str]]:
    """The modules over which lengths and angles are taken together."""
    if per == "file":
        return [list(SHAPES)]
    groups: dict[str, list[str]] = {}
    for module in SHAPES:
        section, _, rest = module.partition(".")
        is_block = section in ("layers", "noise_refiner", "context_refiner")
        groups.setdefault(f"{section}.{rest.partition('.')[0]}" if is_block else module, []).append(module)
    return list(groups.values()) if per == "layer" else [[m] for m in SHAPES]


def by_angles(given: Sequence[Given], method: str, per: str) -> dict[str, Tensor]:
    """slerp, nuslerp, karcher, normalize: the modules of a scope laid side by side in one long vector."""
    found: dict[str, Tensor] = {}
    for modules in scopes(per):
        zeros = {m: torch.zeros(SHAPES[m], dtype=F64) for m in modules}
        whole = [torch.cat([g.deltas.get(m, zeros[m]).flatten() for m in modules]) for g in given]
        parts = of_vectors(method, whole, [g.ratio for g in given]).split([zeros[m].numel() for m in modules])
        found |= {m: part.view(SHAPES[m]) for m, part in zip(modules, parts, strict=True)}
    return found


def wanted(given: Sequence[Given], method: str, params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Module -> what the method makes by its definition."""
    weighed = [(g.deltas, g.ratio) for g in given]
    if method in ("sum", "average"):
        return {m: d / (sum(g.ratio for g in given) if method == "average" else 1) for m, d in weighted_sum(weighed).items()}
    if method in ("normalize", "slerp", "nuslerp", "karcher"):
        return by_angles(given, method, params.get("per", "file" if method == "normalize" else "module"))
    found = {}
    for module in weighted_sum(weighed):
        here = [g.ratio * g.deltas[module] for g in given if g.ratio and module in g.deltas]
        found[module] = ENTRIES[method](here, module, **params) if len(here) > 1 else here[0] if here else torch.zeros(1)
    return found


def check(found: Deltas, want: Deltas, given: Sequence[Given], tolerance: float) -> None:
    """Every module, as a share of the sizes that went in."""
    for module, delta in found.items():
        if module in want:
            size = sum(max(1.0, abs(g.ratio)) * float(g.deltas[module].norm()) for g in given if module in g.deltas)
            assert float((delta - want[module]).norm()) <= tolerance * (size or 1), module
        else:
            assert not delta.any(), module  # what clients want beside the merged modules
    assert {m for m, d in want.items() if d.any()} <= set(found)


ANY = {  # methods that take any number of LoRAs, with parameters
    "sum": {},
    "average": {},
    "normalize": {},
    "karcher": {},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.6, "seed": 3},
    "dare_ties": {"density": 0.7, "seed": 4},
    "della": {"density": 0.6, "epsilon": 0.3, "seed": 5},
    "tsv": {},
    "shared_once": {"tau": 0.4},
}
PAIRS = {"slerp": {}, "nuslerp": {}, "project": {"mu": 2.0}}
MEANS = ("average", "slerp", "nuslerp", "karcher")
SPHERICAL = ("slerp", "nuslerp", "karcher")
RANDOM = ("dare_linear", "dare_ties", "della")
# float32 factors; cores tell close axes apart less exactly
TOLERANCE = dict.fromkeys((*RANDOM, "ties", "shared_once", "karcher"), 2e-5) | dict.fromkeys(("tsv",), 1e-5)


@pytest.mark.parametrize("method", [*ANY, *PAIRS])
@pytest.mark.parametrize("ratios", [(0.8, 0.5), (1.0, 0.0), (-0.7, 1.2)], ids=str)
def test_two_loras(work, method, ratios):
    if method in SPHERICAL and min(ratios) < 0:
        pytest.skip("refused")
    given, params = give(work.folder, ME, STYLE, ratios=ratios), (ANY | PAIRS)[method]
    check(merged(work, given, method, params), wanted(given, method, params), given, TOLERANCE.get(method, 2e-6))


@pytest.mark.parametrize("method", ANY)
@pytest.mark.parametrize("ratios", [(0.8, 0.5, 0.4), (0.0, -1.2, 0.4)], ids=str)
def test_three_loras(work, method, ratios):
    if method in SPHERICAL and min(ratios) < 0:
        pytest.skip("refused")
    given = give(work.folder, ME, STYLE, FUSED, ratios=ratios)
    check(merged(work, given, method, ANY[method]), wanted(given, method, ANY[method]), given, TOLERANCE.get(method, 2e-6))


@pytest.mark.parametrize("method", ["ties", *RANDOM, "shared_once", "project"])
def test_the_defaults_of_the_parameters(work, method):
    given = give(work.folder, ME, STYLE)
    check(merged(work, given, method), wanted(given, method, {}), given, 2e-5)


@pytest.mark.parametrize("yields", ["first", "second", "both"])
@pytest.mark.parametrize("components", [0, 1])
def test_project_in_each_direction(work, yields, components):
    given, params = give(work.folder, ME, STYLE), {"mu": 5.0, "yields": yields, "components": components}
    check(merged(work, given, "project", params), wanted(given, "project", params), given, 1e-5)


@pytest.mark.parametrize("method", [*ANY, *PAIRS])
def test_a_lokr_among_them(work, method):
    given, params = give(work.folder, PRODUCT_LOKR if method in PAIRS else LOKR, STYLE), (ANY | PAIRS)[method]
    check(merged(work, given, method, params), wanted(given, method, params), given, TOLERANCE.get(method, 1e-5))


@pytest.mark.parametrize("method", ["normalize", *SPHERICAL])
@pytest.mark.parametrize("per", ["file", "layer", "module"])
def test_lengths_and_angles_of_the_file_the_layer_or_the_module(work, method, per):
    given = give(work.folder, ME, FUSED, ratios=(0.8, 1.3))
    found = merged(work, given, method, {"per": per})
    check(found, wanted(given, method, {"per": per}), given, 2e-5 if method == "karcher" else 2e-6)
    other = {"file": "layer", "layer": "module", "module": "file"}[per]
    with pytest.raises(AssertionError):  # the three are told apart
        check(found, wanted(given, method, {"per": other}), given, 2e-5)


@pytest.mark.parametrize("per", ["file", "layer", "module"])
def test_normalize_reaches_the_norm_of_the_strongest(work, per):
    given = give(work.folder, ME, STYLE, FUSED)
    found = merged(work, given, "normalize", {"per": per})
    for modules in scopes(per):
        norms = [sum(float((g.ratio * g.deltas[m]).norm()) ** 2 for m in modules if m in g.deltas) ** 0.5 for g in given]
        size = sum(float(found[m].norm()) ** 2 for m in modules if m in found) ** 0.5
        assert size == pytest.approx(max(norms), rel=1e-5)


def every(work: Workspace, given: Sequence[Given], methods: Mapping[str, Mapping[str, Any]], **keys: Any) -> dict[str, Path]:
    """Method -> the file of a step of its own."""
    run(work, *(step(given, method, params, name=method, **keys) for method, params in methods.items()))
    return {method: work.out / f"merged_cat_{method}.safetensors" for method in methods}


def test_a_module_that_only_one_lora_has(work):
    """It is left as it is, but for a mean, where the LoRA without it counts as no change, and for one factor over the file."""
    given, module = give(work.folder, ME, STYLE), "context_refiner.0.attention.to_k"
    for method, path in every(work, given, ANY | PAIRS).items():
        found = read_deltas(path)[module]
        want = given[1].ratio / (sum(g.ratio for g in given) if method in MEANS else 1) * given[1].deltas[module]
        if method == "normalize":
            want = want * float(found.norm() / want.norm())
        assert float((found - want).norm()) <= 1e-6 * float(want.norm()), method


@pytest.mark.parametrize("producer", ["musubi", "diffusion-pipe-lokr"])
def test_one_lora_alone_is_left_as_it_is(work, producer):
    given = give(work.folder, (producer, 3, 1.0, {"to_q": -0.5}))
    plain, *others = map(load_file, every(work, given, ANY).values())
    for alone in others:
        assert plain.keys() == alone.keys()
        assert all(torch.equal(alone[key], tensor) for key, tensor in plain.items())


@pytest.mark.parametrize("method", ["average", "karcher"])
def test_the_ratio_of_a_single_lora_in_a_mean_has_no_effect(work, method):
    whole, half = (merged(work, give(work.folder, ME, ratios=[r]), method) for r in (1.0, 0.5))
    assert all(float((half[m] - d).norm()) <= 1e-6 * float(d.norm()) for m, d in whole.items())


@pytest.mark.parametrize("method", MEANS)
def test_only_the_proportions_of_the_ratios_of_a_mean_count(work, method):
    def tensors(ratios: tuple[float, float]) -> dict[str, Tensor]:
        return load_file(run(work, step(give(work.folder, ME, STYLE, ratios=ratios), method)))

    whole, half = tensors((1.0, 1.0)), tensors((0.5, 0.5))
    assert all(torch.equal(half[key], tensor) for key, tensor in whole.items())
    one, seven = tensors((0.4, 0.3)), tensors((2.8, 2.1))
    assert all(torch.allclose(seven[key], tensor, rtol=1e-5, atol=1e-9) for key, tensor in one.items())


def test_a_mean_says_so(work):
    given = give(work.folder, ME, STYLE)
    text = work.zit("run", work.job(step(given, "slerp")), "--dry-run").ok()
    assert "note: slerp is a mean: only the proportions of the ratios count, 0.8 : 0.5" in " ".join(text.split())


TWENTY = [m for m in SHAPES if m.startswith("layers.0.attention.to_")]


@pytest.mark.parametrize("method", [*ANY])
def test_twenty_loras(work, method):
    given = []
    for n in range(20):
        parts = {m: factors(100 * n + i, 1) for i, m in enumerate(TWENTY)}
        path = pairs(work.folder / f"{n}.safetensors", parts)
        deltas = {m: up.double() @ down.double() for m, (up, down) in parts.items()}
        ratio = 0.1 + 0.05 * n
        given.append(Given({"lora": path.name, "ratio": ratio}, deltas, ratio))
    check(merged(work, given, method, ANY[method]), wanted(given, method, ANY[method]), given, TOLERANCE.get(method, 1e-5))


def test_where_every_strength_is_zero_zeros_are_written_and_said(work):
    given, methods = give(work.folder, ME, STYLE), ANY | PAIRS
    loras = [g.entry | {"overrides": {"*.to_v": 0.0}} for g in given]
    steps = [step(given, method, params, name=method, loras=loras) for method, params in methods.items()]
    text = " ".join(work.zit("run", work.job(*steps, save={"dtype": "fp32"})).ok().split())
    assert text.count(f"note: 3 of {len(SHAPES)} modules have strength 0 throughout and are written as zeros") == len(methods)
    for method in methods:
        found = read_deltas(work.out / f"merged_cat_{method}.safetensors")
        silent = [m for m in found if m.endswith(".to_v")]
        assert len(silent) == 3 and not any(found[m].any() for m in silent)
        assert all(found[m].any() for m in found if m not in silent)


@pytest.mark.parametrize("method", [m for m in [*ANY, *PAIRS] if m not in MEANS])
def test_all_ratios_zero(work, method):
    given = give(work.folder, ME, STYLE, ratios=(0.0, 0.0))
    assert not any(d.any() for d in merged(work, given, method, (ANY | PAIRS)[method]).values())


@pytest.mark.parametrize("blank", ["up", "both"])
def test_a_lora_that_was_never_trained_among_them(work, blank):
    """B is zero before the first step: a change of nothing, without direction."""
    module = "layers.0.attention.to_k"
    parts = factors(0), (torch.zeros(12, 2), torch.zeros(2, 12) if blank == "both" else factors(1)[1])
    given = []
    for n, (up, down) in enumerate(parts):
        path = pairs(work.folder / f"{n}.safetensors", {module: (up, down)})
        given.append(Given({"lora": path.name, "ratio": 0.5}, {module: up.double() @ down.double()}, 0.5))
    for method, path in every(work, given, ANY | PAIRS).items():
        found = read_deltas(path)[module]
        assert torch.isfinite(found).all()
        if method not in ("ties", *RANDOM):
            assert float((found - 0.5 * given[0].deltas[module]).norm()) <= 1e-5 * float(found.norm()), method


# --- the random ones -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RANDOM)
def test_a_seed_makes_the_same_bytes_and_another_seed_others(work, method):
    given = give(work.folder, ME, STYLE)
    bare, zero, again, one = (
        run(work, step(given, method, params), output_dir=str(work.folder / f"out{n}")) and
        load_file(work.folder / f"out{n}" / "merged_cat_a.safetensors")
        for n, params in enumerate(({}, {"seed": 0}, {"seed": 0}, {"seed": 1}))
    )  # fmt: skip
    assert all(torch.equal(bare[key], tensor) and torch.equal(again[key], tensor) for key, tensor in zero.items())
    assert (work.folder / "out1/merged_cat_a.safetensors").read_bytes() == (
        work.folder / "out2/merged_cat_a.safetensors"
    ).read_bytes()
    both = [key for key in zero if ".layers.0." in key and "lora_A" in key]
    assert not any(torch.equal(one[key], zero[key]) for key in both)


@pytest.mark.parametrize("method", ANY)
def test_the_order_of_the_loras_does_not_matter(work, method):
    given, orders = give(work.folder, ME, STYLE, FUSED), ((0, 1, 2), (2, 0, 1))
    first, *others = (merged(work, [given[i] for i in order], method, ANY[method]) for order in orders)
    for other in others:
        check(other, first, given, 2e-5)


@pytest.mark.parametrize("method", RANDOM)
def test_every_module_has_draws_of_its_own(work, method):
    modules = ["layers.0.attention.to_q", "layers.0.attention.to_k", "layers.1.attention.to_k"]
    paths = [pairs(work.folder / f"{n}.safetensors", {m: factors(n) for m in modules}) for n in range(2)]
    given = [Given({"lora": p.name, "ratio": 1.0}, {}, 1.0) for p in paths]
    equal = merged(work, given, "ties")
    apart = merged(work, given, method)
    for one, other in zip(modules, modules[1:], strict=False):
        assert torch.equal(equal[one], equal[other])
        assert float((apart[one] - apart[other]).norm()) > 0.1 * float(apart[one].norm())


@pytest.mark.parametrize("method", RANDOM)
def test_a_module_s_draws_do_not_depend_on_the_other_modules(work, method):
    modules = ["layers.0.attention.to_q", "layers.0.attention.to_k", "layers.1.attention.to_k"]
    found = []
    for chosen in (modules, modules[1:]):
        paths = [pairs(work.folder / f"{n}.safetensors", {m: factors(n) for m in chosen}) for n in range(2)]
        found.append(merged(work, [Given({"lora": p.name, "ratio": 1.0}, {}, 1.0) for p in paths], method))
    assert torch.equal(found[0][modules[1]], found[1][modules[1]])


# --- the command line ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["slerp", "ties", "della", "tsv", "project"])
def test_merge_makes_what_run_makes(work, method):
    given, params = give(work.folder, ME, STYLE), (ANY | PAIRS)[method]
    ran = load_file(run(work, step([g._replace(entry=g.entry | {"blocks": {"to_q": 0.5}}) for g in given], method, params)))
    words = ["--params", *(f"{key}={value}" for key, value in params.items())] if params else []
    weights = ["--ratio", 0.8, 0.5, "--to_q", 0.5, "--shapes", "free", "--dtype", "fp32", "--device", "cpu"]
    files = [g.entry["lora"] for g in given]
    text = work.zit("merge", *files, "-o", "both.safetensors", *weights, "--method", method, *words).ok()
    merged = load_file(work.folder / "both.safetensors")
    assert merged.keys() == ran.keys() and all(torch.equal(merged[key], tensor) for key, tensor in ran.items())
    assert "wrote " in text


def test_a_word_as_a_parameter(work):
    given = give(work.folder, ME, STYLE)
    files = [g.entry["lora"] for g in given]
    for name, words in {"slerp": ["per=layer"], "project": ["yields=both", "mu=1e1"]}.items():
        common = ["--ratio", 1, "--shapes", "free", "--device", "cpu", "--method", name, "--params", *words]
        work.zit("merge", *files, "-o", f"{name}.safetensors", *common).ok()
        (recipe,) = json.loads(read_metadata(work.folder / f"{name}.safetensors")["zit_merge.recipe"])["steps"]
        assert recipe["params"] == {"slerp": {"per": "layer"}, "project": {"mu": 10.0, "yields": "both", "components": 0}}[name]


# --- recipes and inheritance ---------------------------------------------------------------------------------------------------

DEFAULTS = {
    "sum": None,
    "average": None,
    "normalize": {"per": "file"},
    "slerp": {"per": "module"},
    "nuslerp": {"per": "module"},
    "karcher": {"per": "module", "max_iter": 100, "tol": 1e-10},
    "ties": {"density": 0.2},
    "dare_linear": {"density": 0.5, "seed": 0},
    "dare_ties": {"density": 0.5, "seed": 0},
    "della": {"density": 0.5, "epsilon": 0.15, "seed": 0},
    "tsv": None,
    "project": {"mu": 0.5, "yields": "first", "components": 0},
    "shared_once": {"tau": 0.5},
}


def test_every_method_is_tested_here():
    from extensions_built_in.zit_merge.algebra.methods import METHODS

    assert set(METHODS) == set(DEFAULTS) == {*ANY, *PAIRS}


@pytest.mark.parametrize(
    ("method", "params"),
    [*((method, {}) for method in DEFAULTS), ("della", {"epsilon": 0.3, "seed": 2**32 - 1}), ("slerp", {"per": "layer"})],
)
def test_the_recipe_of_a_method_makes_the_same_bytes(work, method, params):
    given = give(work.folder, ME, STYLE)
    made = run(work, step(given, method, params), save={"dtype": "bf16"}, rank=4)
    recipe = work.recipe(made, "elsewhere/recipe.yaml")
    (found,) = yaml.safe_load(recipe.read_text())["steps"]
    assert found["method"] == method
    assert found.get("params") == (DEFAULTS[method] and DEFAULTS[method] | params)
    for g in given:
        (work.folder / "attic").mkdir(exist_ok=True)
        (work.folder / g.entry["lora"]).rename(work.folder / "attic" / f"x{g.entry['lora']}")
    again = work.again(recipe, "--loras", work.folder / "attic")
    assert again.read_bytes() == made.read_bytes()


def test_another_parameter_makes_the_file_again(work):
    given = give(work.folder, ME, STYLE)
    for params, said in (({}, "wrote "), ({"density": 0.2}, "kept "), ({"density": 0.3}, "wrote ")):
        text = work.zit("run", work.job(step(given, "ties", params))).ok()
        assert said in text and ("kept " in text) == (said == "kept ")


def test_a_later_step_uses_what_a_method_made(work):
    given = give(work.folder, ME, STYLE)
    first = step(given, "ties", {"density": 0.4}, name="first", keep=False)
    second = {"name": "b", "loras": [{"lora": "first", "ratio": -0.5}, given[0].entry], "method": "average"}
    found = read_deltas(run(work, first, second))
    ties = wanted(given, "ties", {"density": 0.4})
    want = {m: (-0.5 * d + given[0].ratio * given[0].deltas.get(m, torch.zeros_like(d))) / 0.3 for m, d in ties.items()}
    big = [g._replace(ratio=10.0) for g in given]
    check(found, want, big, 2e-5)
    made = work.out / "merged_cat_b.safetensors"
    steps = yaml.safe_load(work.recipe(made).read_text())["steps"]
    assert [s["method"] for s in steps] == ["ties", "average"]
    assert work.again(work.folder / "recipe.yaml").read_bytes() == made.read_bytes()


def test_steps_inherit_method_and_parameters_of_the_section(work):
    given = give(work.folder, ME, STYLE)
    loras = [g.entry for g in given]
    steps = [
        {"name": "inherits", "loras": loras},
        {"name": "other", "loras": loras, "method": "ties"},
        {"name": "same", "loras": loras, "method": "dare_linear"},
        {"name": "own", "loras": loras, "params": {"density": 0.9}},
        {"name": "both", "loras": loras, "method": "ties", "params": {"density": 0.9}},
    ]
    run(work, *steps, method="dare_linear", params={"density": 0.7, "seed": 6})
    found = {}
    for name in ("inherits", "other", "same", "own", "both"):
        recipe = json.loads(read_metadata(work.out / f"merged_cat_{name}.safetensors")["zit_merge.recipe"])["steps"][-1]
        found[name] = recipe["method"], recipe["params"]
    assert found == {
        "inherits": ("dare_linear", {"density": 0.7, "seed": 6}),
        "other": ("ties", {"density": 0.2}),
        "same": ("dare_linear", {"density": 0.7, "seed": 6}),
        "own": ("dare_linear", {"density": 0.9, "seed": 0}),
        "both": ("ties", {"density": 0.9}),
    }


# --- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "params", "key", "says"),
    [
        ("ties", {"densty": 0.5}, ".densty", "the method ties has no such parameter (did you mean density?); there are density"),
        ("ties", {"seed": 1}, ".seed", "the method ties has no such parameter; there are density"),
        ("della", {"epsilom": 0.1}, ".epsilom", "(did you mean epsilon?); there are density, epsilon, seed"),
        ("sum", {"density": 0.5}, ".density", "the method sum has no such parameter, it takes none"),
        ("tsv", {"k": 1}, ".k", "it takes none"),
        ("average", {"per": "file"}, ".per", "it takes none"),
        ("project", {"yield": "both"}, ".yield", "(did you mean yields?)"),
        ("ties", {"density": 0}, ".density", "must be above 0 and at most 1, not 0"),
        ("ties", {"density": 1.01}, ".density", "must be above 0 and at most 1, not 1.01"),
        ("ties", {"density": -0.1}, ".density", "must be above 0 and at most 1"),
        ("ties", {"density": "half"}, ".density", "must be a finite number, not 'half'"),
        ("ties", {"density": True}, ".density", "must be a finite number, not True"),
        ("ties", {"density": [0.5, 0.5]}, ".density", "must be a finite number"),
        ("ties", {"density": float("inf")}, ".density", "must be a finite number"),
        ("ties", {"density": float("nan")}, ".density", "must be a finite number"),
        ("dare_linear", {"seed": -1}, ".seed", "must be from 0 to 4294967295, not -1"),
        ("dare_linear", {"seed": 2**32}, ".seed", "must be from 0 to 4294967295"),
        ("dare_linear", {"seed": 1.5}, ".seed", "must be a whole number, not 1.5"),
        ("dare_ties", {"seed": "one"}, ".seed", "must be a whole number, not 'one'"),
        ("della", {"epsilon": 1.5}, ".epsilon", "must be from 0 to 1, not 1.5"),
        ("della", {"density": 0.05}, "", "density 0.05 with epsilon 0.15 keeps entries with probabilities outside of 0 to 1"),
        ("della", {"density": 0.95, "epsilon": 0.2}, "", "density 0.95 with epsilon 0.2 keeps entries"),
        ("slerp", {"per": "block"}, ".per", "must be one of module, layer, file, not 'block'"),
        ("project", {"yields": "none"}, ".yields", "must be one of first, second, both, not 'none'"),
        ("project", {"mu": -1}, ".mu", "must be from 0, not -1"),
        ("project", {"components": 1.0}, ".components", "must be a whole number, not 1.0"),
        ("shared_once", {"tau": 2}, ".tau", "must be from 0 to 1, not 2"),
        ("karcher", {"max_iter": 0}, ".max_iter", "must be from 1 to 10000, not 0"),
        ("karcher", {"tol": 0}, ".tol", "must be above 0 and at most 1, not 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("level", ["step", "section"])
def test_parameters_that_no_method_has(method, params, key, says, level):
    entry, keys = {"lora": "me.safetensors", "ratio": 1}, {"method": method, "params": params}
    inner = {"name": "a", "loras": [entry, entry]}
    raw = {"type": "zit_merge", "steps": [inner | (keys if level == "step" else {})]} | (keys if level == "section" else {})
    with pytest.raises(ZitMergeError) as error:
        parse_section(raw)
    place = "steps[0].params" if level == "step" else "params"
    assert str(error.value).startswith(f"{place}{key}: ") and says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_wrong_parameter_is_one_sentence(work, loras, command):
    step = {"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1}], "method": "ties", "params": {"density": 2}}
    assert work.zit(command, work.job(step)).refused() == (
        "process[0].steps[0].params.density: must be above 0 and at most 1, not 2"
    )
    assert work.files() == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["density"], "--params: 'density' is not NAME=VALUE"),
        (["density="], "--params: 'density=' is not NAME=VALUE"),
        (["density=0.5", "density=0.6"], "--params: duplicate density: keep one of them"),
        (["densty=0.5"], "--params densty: the method ties has no such parameter (did you mean density?)"),
        (["density=half"], "--params density: must be a finite number, not 'half'"),
        (["density=nan"], "--params density: must be a finite number"),
    ],
)
def test_a_wrong_parameter_on_the_command_line(work, loras, words, says):
    common = ["--ratio", 1, "--shapes", "free", "--method", "ties", "--params", *words]
    assert work.zit("merge", "me.safetensors", "-o", "x.safetensors", *common).refused().startswith(says)


@pytest.mark.parametrize("params", ["density", 0.5, [0.5]])
def test_parameters_are_a_mapping(work, loras, params):
    config = work.job({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1}], "method": "ties", "params": params})
    assert work.zit("check", config).refused().startswith("process[0].steps[0].params: must be a mapping")


def test_an_unknown_method(work, loras):
    config = work.job({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1}], "method": "tie"})
    message = work.zit("check", config).refused()
    assert message.startswith("process[0].steps[0].method: no such method: 'tie' (did you mean ties?); there are sum, average")


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("count", [1, 3])
def test_methods_for_two_loras(work, loras, method, count):
    config = work.job({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1}] * count, "method": method})
    message = work.zit("check", config).refused()
    assert message.startswith(f"process[0].steps[0].method: {method} takes exactly two LoRAs, the step has {count}")
    assert ("karcher takes any number" in message) == (method in SPHERICAL)


def test_the_count_of_a_method_on_the_command_line(work, loras):
    ran = work.zit("merge", "me.safetensors", "-o", "x.safetensors", "--ratio", 1, "--method", "slerp", "--shapes", "free")
    assert "slerp takes exactly two LoRAs, the step has 1" in ran.refused()


@pytest.mark.parametrize("method", SPHERICAL)
def test_no_negative_ratios_between_directions(work, loras, method):
    both = [{"lora": "me.safetensors", "ratio": 1}, {"lora": "style.safetensors", "ratio": -0.5}]
    message = work.zit("check", work.job({"name": "a", "loras": both, "method": method})).refused()
    assert message.startswith(f"process[0].steps[0].loras[1].ratio: {method} goes between directions, where -0.5 has no meaning")


@pytest.mark.parametrize("method", SPHERICAL)
def test_a_negative_weight_turns_a_lora_around_there(work, method):
    given = give(work.folder, ME, ("onetrainer-kohya", 2, 0.5, {"attention": -0.7}))
    check(merged(work, given, method), wanted(given, method, {}), given, 2e-5)


@pytest.mark.parametrize(
    ("method", "ratios"),
    [("average", (0.5, -0.5)), ("average", (0, 0)), ("average", (0.1, -0.3)), ("slerp", (0, 0)), ("nuslerp", (0.0, 0.0)),
     ("karcher", (0, 0))],
)  # fmt: skip
def test_ratios_that_sum_to_zero(work, loras, method, ratios):
    entries = [{"lora": "me.safetensors", "ratio": ratios[0]}, {"lora": "style.safetensors", "ratio": ratios[1]}]
    if sum(ratios):
        entries.append({"lora": "me.safetensors", "ratio": -sum(ratios)})
    message = work.zit("check", work.job({"name": "a", "loras": entries, "method": method})).refused()
    assert message.startswith(f"process[0].steps[0]: the ratios sum to 0, {method} divides by their sum")


@pytest.mark.parametrize("per", ["file", "layer", "module"])
def test_loras_that_cancel_can_not_be_normalized(work, per):
    given = give(work.folder, ME, ME, ratios=(0.5, -0.5))  # other seeds
    same = [given[0].entry, given[0].entry | {"ratio": -0.5}]
    config = work.job({"name": "a", "loras": same, "method": "normalize", "params": {"per": per}})
    message = work.zit("run", config).refused()
    where = {"file": "the whole", "layer": "layers/0", "module": "layers.0"}[per]
    assert message.startswith(f"process[0].steps[0]: normalize, {where}") and "cancel each other" in message
    assert work.files() == []
    work.zit("run", work.job({"name": "a", "loras": [g.entry for g in given], "method": "normalize"})).ok()


@pytest.mark.parametrize("method", ["karcher", "nuslerp"])
def test_opposite_loras_have_no_mean_direction(work, method):
    ok = {"layers.0.attention.to_q": factors(0), "layers.1.attention.to_k": factors(1)}
    up, down = ok["layers.1.attention.to_k"]
    turned = {"layers.0.attention.to_q": factors(2), "layers.1.attention.to_k": (-up, down)}
    for n, parts in enumerate((ok, turned)):
        pairs(work.folder / f"{n}.safetensors", parts)
    entries = [{"lora": f"{n}.safetensors", "ratio": 1.0} for n in range(2)]
    config = work.job({"name": "b", "loras": entries}, {"name": "a", "loras": entries, "method": method})
    message = work.zit("run", config).refused()
    assert message.startswith(f"process[0].steps[1]: {method}, layers.1.attention.to_k: the LoRAs point in opposite directions")
    assert work.files() == ["merged_cat_b.safetensors"]  # of the step before; nothing half-written


def test_a_refused_method_leaves_the_old_file(work):
    given = give(work.folder, ME, ME)
    made = run(work, step(given, "normalize"))
    before = made.read_bytes()
    same = [given[0].entry, given[0].entry | {"ratio": -0.8}]
    assert "cancel" in work.zit("run", work.job(step(given, "normalize", loras=same), save={"dtype": "fp32"})).refused()
    assert made.read_bytes() == before and work.files() == [made.name]

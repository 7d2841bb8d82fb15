"""The comparison: choices and spreads on numbers with known answers, SSR against least squares, the questions at a tiny size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import methods

from tests.benchmarks.small_world import compare, loras, measures, model, questions, ssr, train, world

SIZE = model.Size(24, 30, 1)  # all 30 layers: the questions take them in bands
BASE = train.Settings(model.Size(24, 2, 1))


def curves(scores: np.ndarray) -> np.ndarray:
    """Judgements with these scores."""
    found = np.zeros((*scores.shape, len(compare.MEASURES)))
    found[..., -1] = scores
    return found


def test_a_choice_by_chance_gains_nothing():
    """Scores of pure noise: the best of many strengths is no better than any of them."""
    noise = curves(np.random.default_rng(0).normal(size=(200, 10, 40)))
    mean, low, high = compare.spread(compare.common(noise)[..., -1])
    assert low < 0 < high
    assert abs(mean) < 0.05


def test_the_best_strength_is_found():
    scores = np.random.default_rng(1).normal(size=(6, 3, 8), scale=0.1)
    scores[:, 1] += 1
    assert np.array_equal(compare.common(curves(scores))[..., -1], scores[:, 1])


def test_the_interval_holds_the_mean_as_often_as_it_says():
    """Sets that differ, pictures that differ for all sets alike, and the rest: about 95 % of the intervals hold 0."""
    random, held = np.random.default_rng(2), 0
    for n in range(300):
        values = random.normal(size=(12, 1)) + random.normal(size=(1, 32)) + random.normal(size=(12, 32))
        _, low, high = compare.spread(values, n, 400)
        held += low <= 0 <= high
    assert 0.88 <= held / 300 <= 0.99


def test_nothing_makes_up_for_what_is_missing():
    pictures = world.draw(3, 0, ("zib",), ("gleb",)).pixels
    found = compare.measured(np.array([[1, 1, 0.5], [0, 1, 1], [1, 0, 1]]), pictures)
    assert found[:, compare.MEASURES.index("score")].tolist() == [0.5, 0, 0]
    assert found[:, compare.MEASURES.index("burned")].tolist() == [0, 0, 0]


def test_another_style_is_no_breakdown_and_damage_is():
    """Whatever style was asked for: pictures of the world are within a range of it; noise is in none."""
    pictures = world.draw(200, 1, tuple(world.SUBJECTS), tuple(world.STYLES)).pixels
    assert (measures.breakdown(pictures) > measures.BURNED).mean() <= 0.01
    assert (measures.breakdown(measures.DAMAGE["detail"](pictures, 16.0)) > measures.BURNED).mean() >= 0.9


def test_rank_correlation():
    assert questions.spearman(np.array([1, 2, 3, 9]), np.array([0, 5, 6, 7])) == pytest.approx(1)
    assert questions.spearman(np.array([1, 1, 2, 2]), np.array([4, 4, 3, 3])) == pytest.approx(-1)
    assert questions.spearman(np.ones(4), np.arange(4)) == 0


def factors(seed: int, rank: int = 2) -> loras.Factors:
    """A random LoRA of one layer."""
    random = torch.Generator().manual_seed(seed)
    made = model.transformer(BASE.size, 0)
    return {
        name: (torch.randn(one.out_features, rank, generator=random), torch.randn(rank, one.in_features, generator=random))
        for name, one in loras.targets(made).items()
    }


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two LoRAs with names of the small world."""
    paths = [tmp_path / f"{what}_r2_s0_n1.safetensors" for what in ("zib", "gleb")]
    for n, path in enumerate(paths):
        loras.save(path, factors(n))
    return paths


@pytest.fixture
def bench(tmp_path: Path) -> compare.Bench:
    """An untrained student."""
    made = model.transformer(BASE.size, 0).eval().requires_grad_(False)
    return compare.Bench(made, BASE.size.caption, 2, tmp_path / "judged", 4)


@pytest.mark.parametrize(("method", "rule"), [("full_ties", lambda d: methods.elect([methods.trim(x, 0.5) for x in d]))])
def test_rules_on_whole_matrices(files, method, rule):
    found = compare.Merged(method, (("density", 0.5),)).factors(files)
    given = [loras.load(path) for path in files]
    for module in list(found)[:3]:
        wanted = rule([(one[module][0] @ one[module][1]).double() for one in given])
        assert torch.allclose((found[module][0] @ found[module][1]).double(), wanted, atol=1e-5)


def test_dare_on_whole_matrices_draws_anew_in_every_module(tmp_path):
    """Two modules with the same change keep other entries; what is kept is divided by the density."""
    one, (a, b) = factors(0), [f"layers.{n}.attention.to_q" for n in (0, 1)]
    path = tmp_path / "zib_r2_s0_n1.safetensors"
    loras.save(path, {**one, b: tuple(part.clone() for part in one[a])})
    found = compare.Merged("full_dare", (("density", 0.5), ("seed", 0))).factors([path])
    whole, kept = one[a][0] @ one[a][1], [found[module][0] for module in (a, b)]
    assert not torch.equal(*((part != 0) for part in kept))
    for part in kept:
        assert torch.allclose(part[part != 0], 2 * whole[part != 0], rtol=1e-5)
        assert 0.4 < (part != 0).float().mean() < 0.6


def test_a_judgement_is_made_once(bench, files):
    first = bench.curve(files, compare.Merged(), (0.5, 1.0))
    assert first.shape == (2, 4, len(compare.MEASURES))
    again = replace(bench, model=None)  # which could draw nothing
    assert np.array_equal(again.curve(files, compare.Merged(), (0.5, 1.0)), first)
    with pytest.raises(AttributeError):
        again.curve(files, compare.Merged(), (0.7,))


def activations(bench: compare.Bench, files: list[Path], pictures: int) -> list[dict[str, torch.Tensor]]:
    """All inputs of every module for each LoRA, (n, in)."""
    calm, found = replace(bench, count=pictures, seed=bench.seed + 1000), []
    for path in files:
        seen: dict[str, list[torch.Tensor]] = {}
        hooks = [
            linear.register_forward_pre_hook(
                lambda _, x, name=name, seen=seen: seen.setdefault(name, []).append(x[0].flatten(0, -2).double())
            )
            for name, linear in loras.targets(bench.model).items()
        ]
        with loras.worn(bench.model, (loras.load(path), 1.0)):
            calm.pictures(calm.scenes([compare.what_of(path)]))
        for hook in hooks:
            hook.remove()
        found.append({name: torch.cat(parts) for name, parts in seen.items()})
    return found


def test_regmean_is_the_least_squares_fit(bench, files):
    """Against a dense least-squares solver on all activations, ridge and all; SSR has tests/algebra/test_activations.py."""
    found = ssr.Ssr(bench, 3, 1e-2, whole=True).factors(files)
    seen, given = activations(bench, files, 3), [loras.load(path) for path in files]
    for module in [name for name in found if "adaLN" not in name][:8]:
        inputs = [one[module] for one in seen]
        deltas = [up.double() @ down.double() for up, down in (one[module] for one in given)]
        rows = torch.cat(inputs)
        targets = torch.cat([x @ delta.T for x, delta in zip(inputs, deltas, strict=True)])
        ridge = (1e-2 * rows.square().sum() / rows.shape[1]) ** 0.5 * torch.eye(rows.shape[1]).double()
        zeros = torch.zeros(rows.shape[1], targets.shape[1]).double()
        expected = torch.linalg.lstsq(torch.cat([rows, ridge]), torch.cat([targets, zeros]), driver="gelsd").solution.T
        error = ((found[module][0] @ found[module][1]).double() - expected).norm() / expected.norm()
        assert error < 1e-4, module


def test_ssr_fits_what_each_lora_does_on_its_own_activations(bench, files):
    """Nearer to it than the sum, on the very activations that it was fitted to, and as strong there as it says."""
    way = ssr.Ssr(bench, 3, 1e-6)
    found, seen, given = way.factors(files), activations(bench, files, 3), [loras.load(path) for path in files]
    misses, strengths = torch.zeros(2), way.strengths(files)
    for module, (up, down) in found.items():
        deltas = [(one[module][0] @ one[module][1]).double() for one in given]
        if "adaLN" in module:
            assert torch.allclose((up @ down).double(), sum(deltas), atol=1e-5), "what sees the time alone is summed"
            continue
        for merged, n in (((up @ down).double(), 0), (sum(deltas), 1)):
            misses[n] += sum(float((x[module] @ (merged - d).T).square().sum()) for x, d in zip(seen, deltas, strict=True))
    assert misses[0] < misses[1]
    assert strengths.diagonal().sum() > strengths.fliplr().diagonal().sum(), "more on its own activations than on the other's"


def test_questions_can_be_asked(tmp_path: Path):
    """Those that take seconds, of an untrained student with random LoRAs: tables with as many cells as headers."""
    made = model.transformer(SIZE, 0).eval().requires_grad_(False)
    bench = compare.Bench(made, SIZE.caption, 1, tmp_path / "judged", 2)
    random = torch.Generator().manual_seed(0)
    for what in (*questions.SUBJECTS, *questions.STYLES):
        one = {
            name: (
                torch.randn(linear.out_features, 1, generator=random) * 0.01,
                torch.randn(1, linear.in_features, generator=random),
            )
            for name, linear in loras.targets(made).items()
        }
        for seed in (0, 1):
            loras.save(tmp_path / f"{what}_r1_s{seed}_n1.safetensors", one)
    asked = questions.Asked(bench, tmp_path, "_n1", 1)
    for name in ("alone", "shared"):
        for title, header, rows in questions.QUESTIONS[name](asked):
            assert title
            assert rows
            assert all(len(row) == len(header) for row in rows)
    for subjects, styles in questions.KINDS.values():
        for paths in asked.sets(subjects, styles):
            assert len(set(paths)) == subjects + styles

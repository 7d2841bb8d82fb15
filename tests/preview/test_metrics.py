"""Distances of pictures against slow, obvious formulas, known colours, and what each metric must not see."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from extensions_built_in.zit_merge import ZitMergeError
from extensions_built_in.zit_merge.config import schema
from extensions_built_in.zit_merge.preview import metrics
from extensions_built_in.zit_merge.preview.metrics import (
    METRICS,
    colour,
    described,
    detail,
    distance,
    pixels,
    structure,
    tensor_of,
)


def noise(seed: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def scene(seed: int, side: int = 96, cells: int = 6) -> Tensor:
    """Smooth masses of colour."""
    low = torch.rand(1, 3, cells, cells, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(low, (side, side), mode="bicubic").clamp(0, 1)[0]


def grainy(picture: Tensor, strength: float, seed: int = 9) -> Tensor:
    grain = torch.randn(1, *picture.shape[1:], generator=torch.Generator().manual_seed(seed))
    return (picture + strength * grain).clamp(0, 1)


def plain(*colour: float, side: int = 16) -> Tensor:
    return torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, side, side).contiguous()


# --- what every metric is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_equal_pictures_have_no_distance_others_have_one_either_way(name):
    metric = METRICS[name]
    for picture, other in ((noise(0), noise(1)), (scene(0), scene(1)), (noise(0, 33, 57), scene(2)[:, :33, :57])):
        assert metric(picture, picture.clone()) == 0
        assert metric(picture, other) > 1e-4
        assert metric(picture, other) == pytest.approx(metric(other, picture), rel=1e-9)
        assert isinstance(metric(picture, other), float)


@pytest.mark.parametrize("name", ["pixels", "structure"])
def test_pictures_between_two_are_between_them_in_distance(name):
    start, end = scene(0), grainy(scene(1), 0.05)
    steps = [METRICS[name](start + share * (end - start), start) for share in (0.25, 0.5, 0.75, 1.0)]
    assert steps == sorted(steps) and steps[0] > 0


@pytest.mark.parametrize("name", METRICS)
def test_pictures_are_left_as_they_are(name):
    picture, reference = noise(0), noise(1)
    METRICS[name](picture, reference)
    assert picture.equal(noise(0)) and reference.equal(noise(1))


# --- pixels --------------------------------------------------------------------------------------------------------------------


def test_pixels_by_hand():
    assert pixels(plain(0, 0, 0), plain(1, 1, 1)) == 1
    assert pixels(plain(1, 0, 0), plain(0, 0, 0)) == pytest.approx(math.sqrt(1 / 3))
    half = plain(0, 0, 0)
    half[:, :8] = 0.5
    assert pixels(half, plain(0, 0, 0)) == pytest.approx(math.sqrt(0.5 * 0.25))  # the mean of absolute values would be 0.25


# --- structure -----------------------------------------------------------------------------------------------------------------


def slow_luma(picture: Tensor) -> list[list[float]]:
    red, green, blue = picture.double().tolist()
    height, width = picture.shape[1:]
    return [[0.299 * red[y][x] + 0.587 * green[y][x] + 0.114 * blue[y][x] for x in range(width)] for y in range(height)]


def slow_halves(luma: list[list[float]]) -> list[list[float]]:
    height, width = len(luma) // 2, len(luma[0]) // 2
    return [[sum(luma[2 * y + j][2 * x + i] for j in (0, 1) for i in (0, 1)) / 4 for x in range(width)] for y in range(height)]


def window() -> list[list[float]]:
    raw = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for i in range(11)] for j in range(11)]
    total = sum(map(sum, raw))
    return [[value / total for value in row] for row in raw]


def slow_ssim(p: list[list[float]], r: list[list[float]]) -> float:
    """Equation 13 of Wang et al. 2004 with weighted moments, one window after the other."""
    weights, found = [w for row in window() for w in row], []
    for y in range(len(p) - 10):
        for x in range(len(p[0]) - 10):
            a = [p[y + j][x + i] for j in range(11) for i in range(11)]
            b = [r[y + j][x + i] for j in range(11) for i in range(11)]
            mean_a = sum(w * v for w, v in zip(weights, a, strict=True))
            mean_b = sum(w * v for w, v in zip(weights, b, strict=True))
            var_a = sum(w * (v - mean_a) ** 2 for w, v in zip(weights, a, strict=True))
            var_b = sum(w * (v - mean_b) ** 2 for w, v in zip(weights, b, strict=True))
            both = sum(w * (u - mean_a) * (v - mean_b) for w, u, v in zip(weights, a, b, strict=True))
            light = (2 * mean_a * mean_b + 0.0001) / (mean_a**2 + mean_b**2 + 0.0001)
            found.append(light * (2 * both + 0.0009) / (var_a + var_b + 0.0009))
    return sum(found) / len(found)


@pytest.mark.parametrize("other", [noise(1, 64, 70), scene(1)[:, :64, :70]], ids=["noise", "scene"])
def test_structure_is_one_minus_ssim_over_ever_coarser_views(other):
    picture = grainy(scene(0)[:, :64, :70], 0.05)
    p, r = slow_luma(picture), slow_luma(other)
    wanted = [1 - slow_ssim(p, r), 1 - slow_ssim(slow_halves(p), slow_halves(r))]  # 64 and 32 pixels
    assert structure(picture, other) == pytest.approx(sum(wanted) / 2, abs=1e-7)
    assert abs(wanted[0] - wanted[1]) > 0.02  # so a view that is left out would be seen


def test_structure_of_a_picture_that_has_no_coarser_view():
    picture, other = noise(0, 20, 63), scene(1)[:, :20, :63]
    assert structure(picture, other) == pytest.approx(1 - slow_ssim(slow_luma(picture), slow_luma(other)), abs=1e-7)


@pytest.mark.parametrize("times", [2, 4])
def test_large_pictures_are_reduced_to_256_first(times):
    picture, other = grainy(scene(0, 256), 0.1), scene(1, 256)
    large = [p.repeat_interleave(times, 1).repeat_interleave(times, 2) for p in (picture, other)]
    assert structure(*large) == pytest.approx(structure(picture, other), abs=1e-6)
    wide = [torch.cat([p] * 2, 2) for p in large]
    assert structure(*wide) == pytest.approx(structure(*(torch.cat([p] * 2, 2) for p in (picture, other))), abs=1e-6)


def test_structure_sees_composition_before_grain():
    picture = scene(0, 256)
    noisy, others = grainy(picture, 0.1), (picture.roll(40, 2), scene(1, 256))
    assert min(structure(other, picture) for other in others) > 1.4 * structure(noisy, picture)

    def at_one_size(one: Tensor) -> float:
        return 1 - metrics._ssim(metrics._luma(one), metrics._luma(picture))

    assert max(map(at_one_size, others)) < 0.5 < 0.8 < at_one_size(noisy)  # why one view does not do


def test_structure_and_detail_are_blind_to_hue():
    picture = 0.3 + 0.4 * scene(0)
    shift = torch.tensor([0.587, -0.299, 0.0])[:, None, None] * 0.25  # of no luma
    assert structure(picture + shift, picture) < 1e-6 and detail(picture + shift, picture) < 1e-6
    assert colour(picture + shift, picture) > 10 and pixels(picture + shift, picture) > 0.05


# --- colour --------------------------------------------------------------------------------------------------------------------

KNOWN = {  # sRGB -> CIELAB under D65, 2 degrees
    (1.0, 0.0, 0.0): (53.24, 80.09, 67.20),
    (0.0, 1.0, 0.0): (87.73, -86.18, 83.18),
    (0.0, 0.0, 1.0): (32.30, 79.19, -107.86),
    (1.0, 1.0, 0.0): (97.14, -21.55, 94.48),
    (1.0, 1.0, 1.0): (100.0, 0.0, 0.0),
    (0.5, 0.5, 0.5): (53.39, 0.0, 0.0),
    (0.25, 0.25, 0.25): (26.98, 0.0, 0.0),
    (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
    (0.02, 0.02, 0.02): (1.40, 0.0, 0.0),  # on the straight parts of both curves: 903.3 * 0.02 / 12.92
}


@pytest.mark.parametrize("rgb", KNOWN)
def test_known_colours(rgb):
    assert metrics.lab(plain(*rgb, side=1)).flatten().tolist() == pytest.approx(KNOWN[rgb], abs=0.02)


def delta_e(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    return math.dist(KNOWN[one], KNOWN[other])


def test_pictures_of_one_colour_are_their_delta_e_apart():
    for one in KNOWN:
        for other in KNOWN:
            assert colour(plain(*one), plain(*other)) == pytest.approx(delta_e(one, other), abs=0.03)


def slow_wasserstein(x: list[float], y: list[float]) -> float:
    """The cheapest way to carry one heap of values to the other."""
    return min(sum(abs(a - b) for a, b in zip(x, order, strict=True)) for order in permutations(y)) / len(x)


@pytest.mark.parametrize("seed", range(4))
def test_colour_is_the_cheapest_way_from_one_set_of_values_to_the_other(seed):
    picture, reference = noise(seed, 2, 3), noise(seed + 10, 2, 3)
    channels = zip(metrics.lab(picture).flatten(1).tolist(), metrics.lab(reference).flatten(1).tolist(), strict=True)
    wanted = math.hypot(*(slow_wasserstein(x, y) for x, y in channels))
    assert colour(picture, reference) == pytest.approx(wanted, rel=1e-5)


def test_colour_does_not_ask_where():
    picture, order = noise(0), torch.randperm(64 * 64, generator=torch.Generator().manual_seed(1))
    shuffled = picture.flatten(1)[:, order].view_as(picture)
    assert colour(shuffled, picture) == pytest.approx(0, abs=1e-9)
    assert pixels(shuffled, picture) > 0.3 and structure(shuffled, picture) > 0.5


def test_colour_sees_a_wider_spread_around_the_same_mean():
    narrow, wide = plain(0.5, 0.5, 0.5), plain(0.5, 0.5, 0.5)
    wide[:, ::2], wide[:, 1::2] = 0.4, 0.6
    assert colour(wide, narrow) > 5


# --- detail --------------------------------------------------------------------------------------------------------------------


def slow_detail(picture: Tensor) -> list[float]:
    luma, weights = slow_luma(picture), window()
    found = []
    for y in range(5, len(luma) - 5):
        for x in range(5, len(luma[0]) - 5):
            blurred = sum(weights[j][i] * luma[y + j - 5][x + i - 5] for j in range(11) for i in range(11))
            found.append(abs(luma[y][x] - blurred))
    return sorted(found)


def test_detail_compares_what_a_blur_takes_away():
    picture, other = grainy(scene(0)[:, :24, :31], 0.1), noise(1, 24, 31)
    p, r = slow_detail(picture), slow_detail(other)
    wanted = sum(abs(a - b) for a, b in zip(p, r, strict=True)) / len(p)
    assert detail(picture, other) == pytest.approx(wanted, rel=1e-6)


def test_detail_does_not_ask_where_nor_how_light_it_is():
    picture = 0.2 + 0.6 * grainy(scene(0), 0.05).clamp(0, 1)
    assert detail(picture.flip(2), picture) < 1e-6 and detail(picture.flip(1), picture) < 1e-6
    assert detail(picture + 0.1, picture) < 1e-6
    assert structure(picture.flip(2), picture) > 0.1 and colour(picture + 0.1, picture) > 5


def test_more_grain_is_more_detail():
    grey = plain(0.5, 0.5, 0.5, side=64)
    found = [detail(grainy(grey, strength), grey) for strength in (0.01, 0.02)]
    assert found[0] == pytest.approx(0.01 * math.sqrt(2 / math.pi), rel=0.1)  # the mean size of the grain, a little of it blurred
    assert found[1] == pytest.approx(2 * found[0], rel=1e-3)


@pytest.mark.parametrize("name", ["structure", "detail"])
def test_pictures_smaller_than_the_window_are_refused(name):
    with pytest.raises(ZitMergeError, match=f"the metric {name} needs 11 pixels each way, a picture has 64 x 10"):
        METRICS[name](noise(0, 10, 64), noise(1, 10, 64))
    assert METRICS[name](noise(0, 11, 11), noise(1, 11, 11)) > 0


# --- pictures ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_pictures_of_all_kinds_become_three_channels_from_0_to_1(mode):
    raw = Image.fromarray(
        np.array([[[0, 0, 0], [255, 255, 255]], [[255, 255, 255], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]], np.uint8)
    )
    found = tensor_of(raw.convert(mode))
    assert found.dtype == torch.float32 and found.shape == (3, 3, 2) and found.is_contiguous()
    assert found[1].tolist() == [[0, 1], [1, 0], [0, 0]]


def test_red_green_and_blue_keep_their_places():
    found = tensor_of(Image.new("RGB", (2, 1), (51, 102, 255)))
    assert found[:, 0, 0].tolist() == pytest.approx([0.2, 0.4, 1.0])


# --- one's own metrics ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of one's own; returns its name, a new one each time."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(content: str) -> str:
        name = f"own_metric_{tmp_path.name}_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(content, encoding="utf-8")
        return name

    return write


def refused(name: str) -> str:
    with pytest.raises(ZitMergeError) as e:
        metrics.metric(name)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_built_in_metrics_are_those_of_the_schema_by_name():
    assert tuple(METRICS) == schema.METRICS == ("pixels", "structure", "colour", "detail")
    assert all(metrics.metric(name) is METRICS[name] for name in METRICS)


def test_a_metric_of_ones_own(own):
    text = "'''How green.\n\n    More.\n\n    Formula: |p -\n        r|\n    '''"
    module = own(f"def green(p, r):\n    {text}\n    return (p - r)[1].abs().mean()\n")
    found = metrics.metric(f"{module}:green")
    assert distance("green", found, plain(0, 0.25, 0), plain(0, 1, 0)) == 0.75
    assert described(found) == {"what": "How green.", "formula": "|p - r|", "source": ""}


def test_built_in_metrics_describe_themselves_in_ascii():
    for function in METRICS.values():
        assert all(described(function).values()) and all(text.isascii() for text in described(function).values())
    assert described(lambda p, r: 0.0) == {"what": "", "formula": "", "source": ""}


def test_names_that_are_no_metric(own):
    assert refused("structur").startswith("no such metric: 'structur' (did you mean structure?); there are pixels, structure, ")
    for form in ("a:", ":b", "a:b:c", ".a:b", "a b:c", "/x/y.py:f", ""):
        assert refused(form).startswith(f"no such metric: {form!r}")
    assert "Python finds no no_such_module: correct the name" in refused("no_such_module:f")
    assert "Python finds no no_such_package" in refused("no_such_package.module:f")
    assert "Python can't import json.no_such_module (ModuleNotFoundError: " in refused("json.no_such_module:f")
    module = own("def distance(p, r): return 0\nLIMIT = 3\n")
    assert refused(f"{module}:distanse") == f"'{module}:distanse': {module} has no distanse (did you mean distance?)"
    assert "is of type int, not a function" in refused(f"{module}:LIMIT")


@pytest.mark.parametrize("content", ["def f(:\n", "1 / 0\n", "raise RuntimeError('two\\nlines')\n"])
def test_modules_that_break_when_imported(own, content):
    module = own(content)
    assert f"Python can't import {module} (" in refused(f"{module}:f")


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
def test_what_is_no_distance_is_refused(value):
    with pytest.raises(ZitMergeError, match="the metric mine gives .* a distance is a finite number from 0"):
        distance("mine", lambda p, r: value, noise(0), noise(1))


@pytest.mark.parametrize("value", [None, "far", torch.zeros(2), [0.1]])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ZitMergeError, match=r"the metric mine fails on two pictures of 80 x 64 \((Type|Value|Runtime)Error: "):
        distance("mine", lambda p, r: value, noise(0, 64, 80), noise(1, 64, 80))


def test_a_metric_that_fails_is_named_and_ours_speak_for_themselves():
    with pytest.raises(ZitMergeError, match="the metric mine fails .*ZeroDivisionError: division by zero"):
        distance("mine", lambda p, r: 1 / 0, noise(0), noise(1))
    with pytest.raises(ZitMergeError, match="^the metric detail needs 11 pixels"):
        distance("detail", detail, noise(0, 8, 8), noise(1, 8, 8))


def test_a_network_needs_no_gradients():
    weight = torch.ones(3, requires_grad=True)
    seen: list[bool] = []
    distance("mine", lambda p, r: seen.append((weight[:, None, None] * p).requires_grad) or 0, noise(0), noise(1))
    assert seen == [False]

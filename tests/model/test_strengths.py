"""strengths() against a second reading of the interface's table, module by module and with sets spelled out."""

import itertools
import math
import re

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from oracles.inventory import EFFECTS, GROUPS, NAMES
from sweep import examples

from extensions_built_in.zit_merge import ZitMergeError
from extensions_built_in.zit_merge.errors import located
from extensions_built_in.zit_merge.model.strengths import Weights, canonical_key, compact, factors, strengths, union

# Written out again on purpose: the oracle shares no table with the package.
PATHS = {
    "adaLN_modulation": "adaLN_modulation.0",
    "to_q": "attention.to_q",
    "to_k": "attention.to_k",
    "to_v": "attention.to_v",
    "to_out": "attention.to_out.0",
    "w1": "feed_forward.w1",
    "w2": "feed_forward.w2",
    "w3": "feed_forward.w3",
}
SETS = {component: {component} for component in PATHS} | {"adaLN": {"adaLN_modulation"}} | GROUPS
OTHER = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation": "all_final_layer.2-1.adaLN_modulation.1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
    "cap_embedder": "cap_embedder.1",
}


class Ambiguous(Exception):
    """Two keys claim one place and neither is smaller."""


def block_of(name):
    """`layers.3` and `to_q` of `layers.3.attention.to_q`; None, None outside of the blocks."""
    match = re.match(r"(layers|noise_refiner|context_refiner)\.(\d+)\.(.+)", name)
    if not match:
        return None, None
    return f"{match[1]}.{match[2]}", next(c for c, path in PATHS.items() if path == match[3])


def blocks_of(key):
    """The blocks that a layer key covers."""
    if key in ("noise_refiner", "context_refiner"):
        return [f"{key}.0", f"{key}.1"]
    if key == "other":
        return ["other"]
    first, _, last = key.partition("-")
    return [f"layers.{i}" for i in range(int(first), int(last or first) + 1)]


def modules_of(override):
    """The modules that an override covers, found by trying every module."""
    where, _, what = override.partition(".")
    if where == "other":
        return {name for short, name in OTHER.items() if short == what or short.startswith(f"{what}.")}
    if where in ("noise_refiner", "context_refiner") and re.match(r"[01]\.", what):
        where, what = f"{where}.{what[0]}", what[2:]
        covered = [where]
    elif where == "*":
        covered = [f"layers.{i}" for i in range(30)] + [f"{r}_refiner.{i}" for r in ("noise", "context") for i in (0, 1)]
    else:
        covered = blocks_of(where)
    return {name for name in NAMES if block_of(name)[0] in covered and block_of(name)[1] in SETS[what]}


def smallest(claims, spot):
    """The value of the smallest set with the spot in it, None where there is none."""
    mine = sorted((len(spots), spots[spot]) for spots in claims if spot in spots)
    return mine[0][1] if mine else None


def check_overlaps(claims):
    """Raises if two sets of one size share a spot: nothing would say which is meant."""
    for one, two in itertools.combinations(claims, 2):
        if len(one) == len(two) and set(one) & set(two):
            raise Ambiguous


def interpolate(value, count):
    """A number `count` times, or the polyline through the list's points at `count` even steps."""
    if isinstance(value, int | float):
        return [value] * count
    points = [i * (len(value) - 1) / (count - 1) for i in range(count)]
    spread = []
    for x in points:
        k = min(int(x), len(value) - 2)
        spread.append(value[k] * (1 - (x - k)) + value[k + 1] * (x - k))
    return spread


def oracle(ratio, blocks, layers, effects, overrides):
    by_component = [dict.fromkeys(SETS[key], value) for key, value in blocks.items()]
    if isinstance(layers, list):
        by_block = [{f"layers.{i}": value for i, value in enumerate(layers)}]
    else:
        by_block = [dict(zip(blocks_of(k), interpolate(v, len(blocks_of(k))), strict=True)) for k, v in layers.items()]
    by_module = [dict.fromkeys(modules_of(key), value) for key, value in overrides.items()]
    for claims in (by_component, by_block, by_module):
        check_overlaps(claims)
    table = {}
    for name in NAMES:
        block, component = block_of(name)
        override = smallest(by_module, name)
        if override is not None:
            table[name] = ratio * override
            continue
        strength = ratio
        layer = smallest(by_block, block or "other")
        if layer is not None:
            strength *= layer
        if component is not None:
            own = smallest(by_component, component)
            strength *= 1 if own is None else own
            for effect, value in effects.items():
                strength *= value if component in EFFECTS[effect] else 1
        table[name] = strength
    return table


def table(ratio=1.0, blocks=None, layers=None, effects=None, overrides=None):
    with located("loras[0]"):
        return strengths(ratio, factors(Weights(blocks or {}, layers or {}, effects or {}, overrides or {})))


def at(spec, name):
    return spec[name if "." in name else f"layers.0.{PATHS[name]}"]


# --- generated specs -----------------------------------------------------------------------------------------------------------

numbers = st.floats(-4, 4, allow_nan=False).map(lambda x: round(x, 3))
layer_number = st.integers(0, 29)
ranges = st.tuples(layer_number, layer_number).map(
    lambda pair: f"{min(pair)}-{max(pair)}" if pair[0] != pair[1] else str(pair[0])
)


@st.composite
def layer_tables(draw):
    if draw(st.integers(0, 9)) == 0:
        return draw(st.lists(numbers, min_size=30, max_size=30))
    keys = draw(
        st.lists(st.one_of(ranges, st.sampled_from(["noise_refiner", "context_refiner", "other"])), max_size=4, unique=True)
    )
    gradients = st.lists(numbers, min_size=2, max_size=40)
    return {k: draw(st.one_of(numbers, gradients) if len(blocks_of(k)) > 1 else numbers) for k in keys}


override_keys = st.one_of(
    st.tuples(
        st.one_of(ranges, st.sampled_from(["*", "noise_refiner", "noise_refiner.1", "context_refiner", "context_refiner.0"])),
        st.sampled_from(list(SETS)),
    )
    .map(".".join)
    .filter(modules_of),
    st.sampled_from([f"other.{part}" for part in (*OTHER, "final_layer", "t_embedder", "t_embedder.mlp")]),
)
specs = st.fixed_dictionaries(
    {
        "ratio": numbers,
        "blocks": st.dictionaries(st.sampled_from(list(SETS)), numbers, max_size=5),
        "layers": layer_tables(),
        "effects": st.dictionaries(st.sampled_from(list(EFFECTS)), numbers, max_size=4),
        "overrides": st.dictionaries(override_keys, numbers, max_size=4),
    }
)


@examples(150)
@given(specs)
def test_strengths_agree_with_the_table_of_the_interface(spec):
    try:
        wanted = oracle(**spec)
    except Ambiguous:
        event("ambiguous")
        with pytest.raises(ZitMergeError, match="overlap"):
            table(**spec)
        return
    event("clear")
    found = table(**spec)
    assert found.keys() == wanted.keys()
    wrong = {n: (found[n], wanted[n]) for n in NAMES if not math.isclose(found[n], wanted[n], rel_tol=1e-9, abs_tol=1e-9)}
    assert wrong == {}


@examples(50)
@given(specs, st.randoms(use_true_random=False))
def test_order_has_no_meaning(spec, random):
    shuffled = {}
    for key, value in spec.items():
        if isinstance(value, dict):
            entries = list(value.items())
            random.shuffle(entries)
            value = dict(entries)
        shuffled[key] = value
    try:
        found = table(**spec)
    except ZitMergeError:
        with pytest.raises(ZitMergeError):
            table(**shuffled)
        return
    # the product of effects may be rounded in another order
    assert table(**shuffled) == pytest.approx(found, rel=1e-12)


# --- by hand -------------------------------------------------------------------------------------------------------------------


def test_nothing_named_is_the_ratio_everywhere():
    found = table(ratio=-0.75)
    assert set(found.values()) == {-0.75}
    assert found.keys() == set(NAMES)


def test_the_smallest_set_wins_and_replaces():
    found = table(0.5, blocks={"attention": 0.9, "qk": 0.6, "to_q": 2.0})
    # 2.0, not 0.9 x 0.6 x 2.0
    assert [at(found, c) for c in ("to_q", "to_k", "to_v", "to_out", "w1", "adaLN_modulation")] == [
        1.0,
        0.3,
        0.45,
        0.45,
        0.5,
        0.5,
    ]


def test_blocks_reach_the_refiners_but_not_the_rest():
    found = table(blocks=dict.fromkeys(PATHS, 0.5), effects=dict.fromkeys(EFFECTS, 0.5))
    assert found["noise_refiner.1.attention.to_q"] == 0.5**4  # block, prompt, composition, background
    assert found["context_refiner.0.feed_forward.w2"] == 0.5**3  # block, subject, detail
    assert {found[name] for name in OTHER.values()} == {1.0}  # not even the final layer's adaLN


def test_layers_do_not_touch_what_they_do_not_name():
    found = table(layers={"0-29": 0.25})
    assert {n for n, s in found.items() if s == 0.25} == {n for n in NAMES if n.startswith("layers.")}


@pytest.mark.parametrize("section", ["noise_refiner", "context_refiner"])
def test_the_refiners_are_layers_of_their_own(section):
    found = table(layers={section: 0.25})
    assert {n for n, s in found.items() if s == 0.25} == {n for n in NAMES if n.startswith(section)}
    found = table(layers={section: [0.25, 0.75]})
    assert [found[f"{section}.{i}.attention.to_q"] for i in (0, 1)] == [0.25, 0.75]


def test_other_is_the_embedders_and_the_final_layer():
    found = table(layers={"other": 0.25})
    assert {n for n, s in found.items() if s == 0.25} == set(OTHER.values())


def test_the_narrower_range_wins():
    found = table(layers={"0-29": 0.1, "10-19": 0.2, "15": 0.3})
    assert [found[f"layers.{i}.attention.to_q"] for i in (9, 10, 14, 15, 16, 19, 20)] == [0.1, 0.2, 0.2, 0.3, 0.2, 0.2, 0.1]


def test_a_gradient_reaches_both_ends_and_is_linear_between():
    found = table(layers={"10-14": [1.0, 0.6]})
    assert [found[f"layers.{i}.attention.to_q"] for i in range(9, 16)] == pytest.approx([1, 1, 0.9, 0.8, 0.7, 0.6, 1])


def test_a_gradient_of_three_points_turns_in_the_middle():
    found = table(layers={"20-24": [1.0, 2.0, 0.0]})
    assert [found[f"layers.{i}.attention.to_q"] for i in range(20, 25)] == pytest.approx([1, 1.5, 2, 1, 0])


def test_a_gradient_with_more_points_than_layers_keeps_its_ends():
    found = table(layers={"4-6": [1.0, 5.0, 2.0, 7.0, 3.0]})
    assert [found[f"layers.{i}.attention.to_q"] for i in (4, 5, 6)] == pytest.approx([1, 2, 3])
    found = table(layers={"4-5": [1.0, 5.0, 3.0]})
    assert [found[f"layers.{i}.attention.to_q"] for i in (4, 5)] == pytest.approx([1, 3])


def test_a_gradient_as_long_as_its_range_is_taken_as_it_stands():
    points = [0.3, -0.1, 1 / 3, 2.0]
    found = table(layers={"7-10": points})
    assert [found[f"layers.{i}.attention.to_q"] for i in range(7, 11)] == points  # exactly: no interpolation takes place


def test_a_plain_list_is_one_number_for_each_layer():
    found = table(2.0, layers=[i / 30 for i in range(30)])
    assert [found[f"layers.{i}.feed_forward.w1"] for i in range(30)] == [2.0 * (i / 30) for i in range(30)]
    assert found["noise_refiner.0.attention.to_q"] == found["cap_embedder.1"] == 2.0


def test_effects_multiply_where_they_share_a_component():
    found = table(0.5, effects={"prompt": 2.0, "composition": 3.0, "background": 5.0, "color_light": 7.0})
    assert [at(found, c) for c in PATHS] == pytest.approx([0.5 * 2 * 7, 0.5 * 30, 0.5 * 30, 0.5 * 7, 0.5 * 5, 0.5, 0.5, 0.5])


def test_an_override_is_ratio_times_override():
    everything = {"blocks": {"to_q": 3.0}, "layers": {"3": 5.0}, "effects": {"prompt": 7.0}}
    found = table(0.5, **everything, overrides={"3.to_q": 1.3})
    assert found["layers.3.attention.to_q"] == 0.5 * 1.3
    assert found["layers.3.attention.to_k"] == pytest.approx(0.5 * 5 * 7)
    assert found["layers.4.attention.to_q"] == pytest.approx(0.5 * 3 * 7)


def test_an_override_of_0_is_an_override():
    assert table(overrides={"3.to_q": 0.0})["layers.3.attention.to_q"] == 0.0


def test_the_star_is_every_layer_and_refiner():
    found = table(overrides={"*.w2": 0.25})
    assert {n for n, s in found.items() if s == 0.25} == {n for n in NAMES if n.endswith(".w2")}
    assert len([n for n in NAMES if n.endswith(".w2")]) == 34


def test_the_smaller_override_wins():
    found = table(overrides={"*.attention": 0.1, "0-9.attention": 0.2, "0-9.to_q": 0.3, "5.to_q": 0.4})
    wanted = {"layers.5.attention.to_q": 0.4, "layers.6.attention.to_q": 0.3, "layers.6.attention.to_k": 0.2}
    wanted |= {"layers.10.attention.to_q": 0.1, "layers.5.feed_forward.w1": 1.0}
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("noise_refiner.to_k", ["noise_refiner.0.attention.to_k", "noise_refiner.1.attention.to_k"]),
        ("noise_refiner.0.to_k", ["noise_refiner.0.attention.to_k"]),
        ("context_refiner.1.feed_forward", [f"context_refiner.1.feed_forward.w{i}" for i in (1, 2, 3)]),
        ("other.x_embedder", ["all_x_embedder.2-1"]),
        ("other.final_layer", ["all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"]),
        ("other.t_embedder.mlp.2", ["t_embedder.mlp.2"]),
        ("20-21.to_v", ["layers.20.attention.to_v", "layers.21.attention.to_v"]),
        ("3.adaLN", ["layers.3.adaLN_modulation.0"]),
    ],
)
def test_what_an_override_names(key, names):
    assert {n for n, s in table(overrides={key: 0.25}).items() if s == 0.25} == set(names)


@pytest.mark.parametrize(
    ("key", "one", "two"),
    [
        ("layers", {"0-9": 1.0}, {"5-14": 2.0}),
        ("layers", {"3": 1.0}, {"3-3": 2.0}),
        ("overrides", {"3.attention": 1.0}, {"3-6.to_q": 2.0}),
        ("overrides", {"3.to_q": 1.0}, {"3-3.to_q": 2.0}),
        ("overrides", {"3.adaLN": 1.0}, {"3.adaLN_modulation": 1.0}),
        ("blocks", {"adaLN": 1.0}, {"adaLN_modulation": 1.0}),  # equal values too: it is a key written twice
    ],
)
def test_an_equal_overlap_is_an_error_in_either_order(key, one, two):
    for first, second in ((one, two), (two, one)):
        with pytest.raises(ZitMergeError) as error:
            table(**{key: {**first, **second}})
        message = str(error.value)
        assert message.startswith(f"loras[0].{key}")
        assert [k for k in (*one, *two) if k not in message] == []


def test_an_equal_overlap_is_an_error_even_under_a_narrower_key():
    with pytest.raises(ZitMergeError, match="0-9 and 5-14"):
        table(layers={"0-9": 1.0, "5-9": 3.0, "5-14": 2.0})


@pytest.mark.parametrize("keys", [{"0-9": 1.0, "10-19": 2.0}, {"noise_refiner": 1.0, "context_refiner": 2.0, "3-4": 1.0}])
def test_equally_wide_ranges_that_do_not_touch_are_fine(keys):
    table(layers=keys)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("blocks", {"to_w": 1.0}, ["loras[0].blocks.to_w", "to_"]),
        ("blocks", {"atention": 1.0}, ["loras[0].blocks.atention", "did you mean attention"]),
        ("blocks", {"adaln_modulation": 1.0}, ["loras[0].blocks.adaln_modulation", "did you mean adaLN_modulation"]),
        ("effects", {"prompts": 1.0}, ["loras[0].effects.prompts", "did you mean prompt"]),
        ("layers", {"noise_refinr": 1.0}, ["loras[0].layers.noise_refinr", "did you mean noise_refiner"]),
        ("layers", {"30": 1.0}, ["loras[0].layers.30", "0 to 29"]),
        ("layers", {"9-3": 1.0}, ["loras[0].layers.9-3", "lower to the higher"]),
        ("layers", {"-1": 1.0}, ["loras[0].layers.-1", "not a layer"]),
        ("layers", {"3": [1.0, 2.0]}, ["loras[0].layers.3", "gradient"]),
        ("layers", {"other": [1.0, 2.0]}, ["loras[0].layers.other", "gradient"]),
        ("layers", {"0-9": [1.0]}, ["loras[0].layers.0-9", "gradient"]),
        ("layers", {"0-9": []}, ["loras[0].layers.0-9", "gradient"]),
        ("layers", [1.0] * 29, ["loras[0].layers", "30", "29"]),
        ("overrides", {"3.to_w": 1.0}, ["loras[0].overrides.3", "to_w", "to_"]),
        ("overrides", {"to_q": 1.0}, ["loras[0].overrides.to_q", "LAYERS.COMPONENT"]),
        ("overrides", {"31.to_q": 1.0}, ["loras[0].overrides.31", "0 to 29"]),
        ("overrides", {"noise_refiner.2.to_q": 1.0}, ["loras[0].overrides.noise_refiner.2.to_q", "0 and 1"]),
        ("overrides", {"context_refiner.adaLN": 1.0}, ["loras[0].overrides.context_refiner.adaLN", "has no adaLN"]),
        ("overrides", {"other.x_embeder": 1.0}, ["loras[0].overrides.other.x_embeder", "did you mean x_embedder"]),
        ("overrides", {"other.attention": 1.0}, ["loras[0].overrides.other.attention", "no such part"]),
    ],
)
def test_a_wrong_key_names_its_place_and_the_nearest_right_one(key, value, words):
    with pytest.raises(ZitMergeError) as error:
        table(**{key: value})
    assert [word for word in words if word not in str(error.value)] == []


# --- one spelling, and one table above another ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table_", "key", "one"),
    [
        ("blocks", "adaLN", "adaLN_modulation"),
        ("blocks", "to_q", "to_q"),
        ("effects", "prompt", "prompt"),
        ("layers", "0 - 9", "0-9"),
        ("layers", "03", "3"),
        ("layers", "3-3", "3"),
        ("layers", "noise_refiner", "noise_refiner"),
        ("overrides", "3-3.adaLN", "3.adaLN_modulation"),
        ("overrides", "0 - 9.w2", "0-9.w2"),
        ("overrides", "*.adaLN", "*.adaLN_modulation"),
        ("overrides", "noise_refiner.0.to_k", "noise_refiner.0.to_k"),
        ("overrides", "other.final_layer.adaLN_modulation", "other.final_layer.adaLN_modulation"),
    ],
)
def test_a_key_has_one_spelling(table_, key, one):
    assert canonical_key(table_, key) == canonical_key(table_, one) == one
    assert table(**{table_: {key: 0.25}}) == table(**{table_: {one: 0.25}})


@pytest.mark.parametrize(("table_", "key"), [("blocks", "to_w"), ("layers", "x-3"), ("layers", ""), ("overrides", "to_q")])
def test_a_key_that_selects_nothing_stays_as_it_is(table_, key):
    assert canonical_key(table_, key) == key


@pytest.mark.parametrize(
    ("table_", "below", "above", "both"),
    [
        ("layers", {"0-9": 1.0, "15": 2.0}, {"0 - 9": 3.0}, {"15": 2.0, "0 - 9": 3.0}),
        ("layers", {"3": 1.0}, {"3-3": 2.0}, {"3-3": 2.0}),
        ("layers", {"0-9": 1.0}, {"0-8": 2.0}, {"0-9": 1.0, "0-8": 2.0}),
        ("blocks", {"adaLN_modulation": 1.0, "qk": 2.0}, {"adaLN": 3.0}, {"qk": 2.0, "adaLN": 3.0}),
        ("overrides", {"3.adaLN_modulation": 1.0, "3.to_q": 2.0}, {"3-3.adaLN": 3.0}, {"3.to_q": 2.0, "3-3.adaLN": 3.0}),
        ("effects", {"prompt": 1.0}, {"detail": 2.0}, {"prompt": 1.0, "detail": 2.0}),
        ("layers", {"3-3": 1.0, "3-4": 2.0}, [0.5] * 30, {"3-4": 2.0} | {str(i): 0.5 for i in range(30)}),
        ("layers", {"3": 1.0}, [0.5] * 29, [0.5] * 29),
    ],
)
def test_an_entry_above_replaces_the_one_below_that_names_the_same_set(table_, below, above, both):
    before = dict(below)
    assert union(below, above, table_) == both
    assert below == before


# --- compact -------------------------------------------------------------------------------------------------------------------


def expand(rows):
    """The 276 strengths of a compact table, by the reading of its docstring."""
    found = {}
    for key, row in rows.items():
        if key == "other":
            found |= dict(zip(OTHER.values(), row, strict=True))
            continue
        section, _, index = key.partition(".")
        blocks = [key] if index else blocks_of(key)
        components = [c for c in PATHS if not (section == "context_refiner" and c == "adaLN_modulation")]
        for block in blocks:
            found |= {f"{block}.{PATHS[c]}": value for c, value in zip(components, row, strict=True)}
    return found


@examples(50)
@given(specs)
def test_compact_says_every_strength(spec):
    try:
        found = table(**spec)
    except ZitMergeError:
        return
    assert expand(compact(found)) == found


def test_compact_joins_equal_layers():
    rows = compact(table(0.5, layers={"0-9": 2.0, "15": 0.0}, overrides={"noise_refiner.1.to_q": 3.0}))
    assert list(rows) == ["0-9", "10-14", "15", "16-29", "noise_refiner.0", "noise_refiner.1", "context_refiner", "other"]
    assert rows["0-9"] == [1.0] * 8
    assert rows["15"] == [0.0] * 8
    assert rows["noise_refiner.1"] == [0.5, 1.5, *[0.5] * 6]
    assert (rows["context_refiner"], rows["other"]) == ([0.5] * 7, [0.5] * 6)


def test_compact_of_one_strength_is_four_rows():
    assert list(compact(table())) == ["0-29", "noise_refiner", "context_refiner", "other"]

"""Shipped presets against what their names say, and the union with the user's own entries against a slow, obvious reading."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, event, given
from hypothesis import strategies as st
from oracles.inventory import NAMES
from screen import columns
from sweep import examples

from extensions_built_in.zit_merge import ZitMergeError
from extensions_built_in.zit_merge.config import presets
from extensions_built_in.zit_merge.config.job import load_job
from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.config.presets import find_preset, is_file, origin_of
from extensions_built_in.zit_merge.config.schema import Lora, Preset, union_of
from extensions_built_in.zit_merge.errors import located
from extensions_built_in.zit_merge.model.strengths import Weights, factors, strengths

PLACE = "process[1].steps[0].loras[0]"


def layer(name: str) -> int:
    """Which of the 30 layers a module is in; -1 for refiners and the rest."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def is_refiner(name: str) -> bool:
    return name.startswith(("noise_refiner.", "context_refiner."))


# Written out on purpose: what each name says, for one module.
MEANING: dict[str, Callable[[str], float]] = {
    "early_0_9": lambda n: layer(n) in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    "mid_10_19": lambda n: layer(n) in (10, 11, 12, 13, 14, 15, 16, 17, 18, 19),
    "late_20_29": lambda n: layer(n) in (20, 21, 22, 23, 24, 25, 26, 27, 28, 29),
    "skip_early_10_29": lambda n: layer(n) >= 10,
    "layers_15_29": lambda n: layer(n) >= 15,
    "layers_16_24": lambda n: layer(n) in (16, 17, 18, 19, 20, 21, 22, 23, 24),
    "layers_18_25": lambda n: layer(n) in (18, 19, 20, 21, 22, 23, 24, 25),
    "even_layers": lambda n: layer(n) in (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28),
    "odd_layers": lambda n: layer(n) in (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29),
    "fade_in": lambda n: layer(n) / 29 if layer(n) >= 0 else 1,
    "fade_out": lambda n: 1 - layer(n) / 29 if layer(n) >= 0 else 1,
    "no_adaln": lambda n: "adaLN" not in n,
    "adaln_only": lambda n: "adaLN" in n,
    "attention_only": lambda n: ".attention." in n,
    "feed_forward_only": lambda n: ".feed_forward." in n,
    "no_refiners": lambda n: not is_refiner(n),
}


def find(preset: str) -> Preset:
    with located(f"{PLACE}.preset"):
        return find_preset(preset)


def expand(preset: str, own: dict | None = None) -> dict:
    return union_of(find(preset), own or {})


def table(preset: str, own: dict | None = None, ratio: float = 1.0) -> dict[str, float]:
    weights = Weights(**expand(preset, own))
    with located(PLACE):
        return strengths(ratio, factors(weights))


def origins(preset: str, own: dict) -> dict[str, str]:
    with located(PLACE):
        return origin_of(find_preset(preset), own)


def read(lora: dict) -> Lora:
    """The LoRA of a config."""
    return parse_section({"type": "zit_merge", "steps": [{"name": "a", "loras": [lora]}]}).steps[0].loras[0]


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Callable[[Preset], None]:
    """Ships one preset of the test's own, called `mine`."""
    return lambda preset: monkeypatch.setattr(presets, "presets", lambda: {"mine": preset})


def test_every_preset_has_its_meaning_written_here():
    assert list(presets.presets()) == list(MEANING)


@pytest.mark.parametrize("preset", MEANING)
def test_a_preset_selects_what_its_name_says(preset: str):
    found = table(preset, ratio=-0.5)
    assert len(found) == 276 and set(found) == set(NAMES)
    for name in NAMES:
        assert math.isclose(found[name], -0.5 * MEANING[preset](name), abs_tol=1e-12), name


@pytest.mark.parametrize("preset", [name for name in MEANING if re.search(r"\d", name)])
def test_the_numbers_of_a_name_are_the_first_and_the_last_layer(preset: str):
    selected = {layer(name) for name, strength in table(preset).items() if strength}
    first, last = map(int, re.findall(r"\d+", preset))
    assert selected == set(range(first, last + 1))


@pytest.mark.parametrize("preset", MEANING)
def test_a_preset_says_whose_idea_it_is_and_claims_nothing(preset: str):
    idea = presets.presets()[preset].idea
    assert re.search(r"LoraStudio|Realtime-Lora|modify_zlora|Fizgig|mergekit", idea)
    told = "no published measurements" if preset == "no_refiners" else "measured in a small world only (docs/evidence.md)"
    assert idea.endswith(f"; {told}") and "\n" not in idea and idea.isascii()
    claims = "face|style|likeness|detail|composition|structure|texture|concept|anatomy|impact|quality|identity"
    assert not re.search(claims, f"{preset} {idea}", re.IGNORECASE)


def test_keys_are_text_as_in_a_config():
    for preset in presets.presets().values():
        for entries in (preset.blocks, preset.layers, preset.effects, preset.overrides):
            assert all(isinstance(key, str) for key in entries)


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    with pytest.raises(ZitMergeError) as e:
        expand("late_20-29")
    assert str(e.value) == (
        f"{PLACE}.preset: no such preset: 'late_20-29' (did you mean late_20_29?); there are {', '.join(MEANING)}, "
        "and .yaml files of your own"
    )
    with pytest.raises(ZitMergeError, match=r"no such preset: 'face'; there are early_0_9"):
        expand("face")


def test_without_entries_of_ones_own_the_preset_stands():
    assert expand("no_adaln") == {
        "blocks": {"adaLN_modulation": 0},
        "layers": {},
        "effects": {},
        "overrides": {"other.final_layer.adaLN_modulation": 0},
    }


def test_entries_are_united_table_by_table(shipped):
    shipped(Preset(blocks={"qk": 0.5, "w1": 2}, layers={"0-9": 0}, effects={"prompt": 0.9}, overrides={"3.to_q": 1}))
    own = {
        "blocks": {"w1": 3, "vo": 4},
        "layers": {"0-9": [1, 2], "other": 0},
        "effects": {"detail": 5},
        "overrides": {"3.to_q": 7, "*.w2": 8},
    }
    assert expand("mine", own) == {
        "blocks": {"qk": 0.5, "w1": 3, "vo": 4},
        "layers": {"0-9": [1, 2], "other": 0},
        "effects": {"prompt": 0.9, "detail": 5},
        "overrides": {"3.to_q": 7, "*.w2": 8},
    }


@pytest.mark.parametrize(("theirs", "mine"), [("adaLN_modulation", "adaLN"), ("adaLN", "adaLN_modulation")])
def test_an_alias_names_the_same_entry(shipped, theirs: str, mine: str):
    shipped(Preset(blocks={theirs: 0}, overrides={f"3.{theirs}": 0, f"noise_refiner.{theirs}": 0}))
    own = {"blocks": {mine: 0.5}, "overrides": {f"3.{mine}": 2, f"noise_refiner.{mine}": 3}}
    assert expand("mine", own) == {"layers": {}, "effects": {}, **own}
    found = table("mine", own)
    assert found["layers.0.adaLN_modulation.0"] == 0.5
    assert found["layers.3.adaLN_modulation.0"] == 2
    assert found["noise_refiner.1.adaLN_modulation.0"] == 3


def test_two_aliases_of_ones_own_stay_an_error():
    with pytest.raises(ZitMergeError, match=r"loras\[0\]\.blocks: adaLN and adaLN_modulation overlap"):
        table("no_adaln", {"blocks": {"adaLN": 1, "adaLN_modulation": 1}})


def test_a_smaller_set_of_ones_own_wins_over_the_presets():
    found = table("late_20_29", {"layers": {"5": 0.5, "noise_refiner": 0.25}})
    for name in NAMES:
        expected = 0.5 if layer(name) == 5 else 0.25 if name.startswith("noise_refiner.") else float(layer(name) >= 20)
        assert found[name] == expected, name


def test_a_smaller_set_of_the_preset_wins_over_ones_own():
    found = table("no_adaln", {"layers": {"0-29": 0.5}, "overrides": {"other.final_layer": 3}})
    assert found["all_final_layer.2-1.adaLN_modulation.1"] == 0
    assert found["all_final_layer.2-1.linear"] == 3
    assert found["layers.7.adaLN_modulation.0"] == 0
    assert found["layers.7.attention.to_q"] == 0.5


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        ({"layers": {"0-9": 0}}, {"layers": {"0 - 9": 0.5}}),
        ({"layers": {"3": 0}}, {"layers": {"3-3": 0.5}}),
        ({"layers": {"3-3": 0}}, {"layers": {"3": 0.5}}),
        ({"overrides": {"3.adaLN_modulation": 0}}, {"overrides": {"3-3.adaLN": 0.5}}),
        ({"overrides": {"0-9.to_q": 0}}, {"overrides": {"0 - 9.to_q": 0.5}}),
    ],
    ids=str,
)
def test_an_entry_of_ones_own_replaces_the_presets_in_whichever_spelling(shipped, theirs: dict, mine: dict):
    shipped(Preset(**theirs))
    assert expand("mine", mine) == {"blocks": {}, "layers": {}, "effects": {}, "overrides": {}} | mine
    assert table("mine", mine) == strengths(1.0, factors(Weights(**mine)))
    assert set(origins("mine", mine).values()) == {"own", "-"}


def test_equally_wide_ranges_overlap_as_they_do_without_a_preset():
    with pytest.raises(ZitMergeError, match=r"layers: 0-19 and 10-29 overlap and are equally wide"):
        table("late_20_29", {"layers": {"10-29": 0.5}})


@pytest.mark.parametrize("preset", ["late_20_29", "even_layers", "fade_in", "attention_only"])
def test_a_list_of_30_is_one_entry_for_each_layer(preset: str):
    depths = [i / 10 for i in range(30)]
    found, before = table(preset, {"layers": depths}), table(preset)
    for name in NAMES:
        if layer(name) < 0:
            assert found[name] == before[name], name
        elif preset == "attention_only":
            assert found[name] == (depths[layer(name)] if ".attention." in name else 0), name
        else:
            assert found[name] == depths[layer(name)], name


@pytest.mark.parametrize("count", [0, 1, 29, 31])
@pytest.mark.parametrize("act", [table, origins])
def test_a_list_of_another_length_is_refused(act: Callable, count: int):
    with pytest.raises(
        ZitMergeError, match=f"layers: a plain list has one number for each of the 30 layers, this one has {count}"
    ):
        act("late_20_29", {"layers": [1.0] * count})


def test_a_preset_is_not_changed_by_its_use():
    before = expand("mid_10_19")
    for entries in expand("mid_10_19", {"blocks": {"to_q": 0}}).values():
        entries["3"] = 0
    assert expand("mid_10_19") == before


def test_ones_own_entries_are_not_changed():
    own = {"blocks": {"adaLN": 1}, "layers": [1.0] * 30}
    expand("no_adaln", own)
    assert own == {"blocks": {"adaLN": 1}, "layers": [1.0] * 30}


def test_origins_of_a_preset_alone():
    for name, origin in origins("late_20_29", {}).items():
        assert origin == ("-" if layer(name) >= 20 else "preset"), name
    for name, origin in origins("no_refiners", {}).items():
        assert origin == ("preset" if is_refiner(name) else "-"), name


def test_origins_of_a_mixture():
    own = {"blocks": {"to_q": 0.5}, "layers": {"0-4": 1, "25": 1}, "overrides": {"2.to_q": 1, "28.w2": 1}}
    found = origins("late_20_29", own)
    assert set(found) == set(NAMES)
    assert found["layers.0.attention.to_k"] == "own"  # 0-4 of one's own replaces 0-19 of the preset
    assert found["layers.10.attention.to_k"] == "preset"
    assert found["layers.10.attention.to_q"] == "both"  # a block of one's own times a range of the preset
    assert found["layers.2.attention.to_q"] == "own"
    assert found["layers.25.feed_forward.w1"] == "own"
    assert found["layers.28.feed_forward.w2"] == "own"
    assert found["layers.28.feed_forward.w1"] == "-"
    assert found["noise_refiner.0.attention.to_q"] == "both"
    assert found["all_x_embedder.2-1"] == "preset"


def test_an_override_of_the_preset_decides_alone():
    found = origins("no_adaln", {"layers": {"other": 0.5}})
    assert found["all_final_layer.2-1.adaLN_modulation.1"] == "preset"
    assert found["all_final_layer.2-1.linear"] == "own"


def test_the_value_of_an_entry_has_no_part_in_its_origin():
    own = {"blocks": {"to_q": 1.0, "to_k": 0.0}, "layers": {"0": 1.0}}  # factors that change nothing, or everything
    found = origins("late_20_29", own)
    assert found["layers.22.attention.to_q"] == "own"
    assert found["layers.5.attention.to_k"] == "both"
    assert found["layers.0.attention.to_v"] == "own"


def test_origins_know_aliases_lists_and_several_effects(shipped):
    shipped(Preset(blocks={"adaLN_modulation": 0}, layers={"other": 0}, effects={"prompt": 2, "composition": 3}))
    own = {"blocks": {"adaLN": 1}, "effects": {"background": 5, "composition": 1}}
    found = origins("mine", own)
    assert found["layers.0.adaLN_modulation.0"] == "both"  # the block is one's own, the effect `prompt` is not
    assert found["layers.0.attention.to_q"] == "both"
    assert found["layers.0.attention.to_out.0"] == "own"
    assert found["layers.0.feed_forward.w1"] == "-"
    found = origins("mine", {"layers": [1.0] * 30})
    assert found["layers.0.feed_forward.w1"] == "own"
    assert found["noise_refiner.0.feed_forward.w1"] == "-"


# A slow reading of the rules for origins. Sets of modules are spelled by substrings of their names.
BLOCKS = {
    "adaLN": ["adaLN_modulation.0"],
    "adaLN_modulation": ["adaLN_modulation.0"],
    "to_q": ["to_q"],
    "to_k": ["to_k"],
    "to_v": ["to_v"],
    "to_out": ["to_out"],
    "w1": ["w1"],
    "w2": ["w2"],
    "w3": ["w3"],
    "attention": ["to_q", "to_k", "to_v", "to_out"],
    "feed_forward": ["w1", "w2", "w3"],
    "qk": ["to_q", "to_k"],
    "vo": ["to_v", "to_out"],
}
EFFECTS = {
    "prompt": ["adaLN_modulation.0", "to_q", "to_k"],
    "composition": ["to_q", "to_k"],
    "subject": ["to_v", "w1", "w2", "w3"],
    "detail": ["w1", "w2", "w3"],
    "background": ["to_q", "to_k", "to_out"],
    "color_light": ["adaLN_modulation.0", "to_v"],
}
IN_BLOCKS = [name for name in NAMES if layer(name) >= 0 or is_refiner(name)]


@cache
def of_block(key: str) -> set[str]:
    return {name for name in IN_BLOCKS if any(part in name for part in BLOCKS[key])}


@cache
def of_effect(key: str) -> set[str]:
    return {name for name in IN_BLOCKS if any(part in name for part in EFFECTS[key])}


@cache
def of_layers(key: str) -> set[str]:
    if key == "other":
        return set(NAMES) - set(IN_BLOCKS)
    if not key[0].isdigit():
        return {name for name in NAMES if name.startswith(f"{key}.")}
    first, _, last = key.partition("-")
    return {name for name in NAMES if int(first) <= layer(name) <= int(last or first)}


@cache
def of_override(key: str) -> set[str]:
    where, _, component = key.partition(".")
    if where == "other":
        return (
            {"all_final_layer.2-1.adaLN_modulation.1"} if component == "final_layer.adaLN_modulation" else {"all_x_embedder.2-1"}
        )
    return of_block(component) & (set(NAMES) if where == "*" else of_layers(where))


def same(left: str, right: str) -> bool:
    return plain(left) == plain(right)


def plain(key: str) -> str:
    key = re.sub(r"^(\d+)-\1(?!\d)", r"\1", key.replace(" ", ""))
    return key.replace("adaLN_modulation", "adaLN")


def slow_origin(name: str, preset: Preset, own: dict) -> str:
    def deciding(table: str, claims: Callable[[str], set[str]]) -> list[tuple[int, str]]:
        """(size, whose) of the entries that name the module, smallest first."""
        mine = own.get(table, {})
        theirs = [key for key in getattr(preset, table) if not any(same(key, other) for other in mine)]
        entries = [(key, "own") for key in mine] + [(key, "preset") for key in theirs]
        return sorted((len(claims(key)), whose) for key, whose in entries if name in claims(key))

    deciders = {whose for _, whose in deciding("overrides", of_override)[:1]}
    if not deciders:
        deciders |= {whose for _, whose in deciding("blocks", of_block)[:1]}
        deciders |= {whose for _, whose in deciding("layers", of_layers)[:1]}
        deciders |= {whose for _, whose in deciding("effects", of_effect)}
    return "both" if len(deciders) == 2 else next(iter(deciders), "-")


def some(keys: list[str]) -> st.SearchStrategy[dict[str, float]]:
    return st.dictionaries(st.sampled_from(keys), st.sampled_from([0.0, 0.5, 1.0, -2.0, 6.0]), max_size=3)


OWN = st.fixed_dictionaries(
    {},
    optional={
        "blocks": some(list(BLOCKS)),
        "layers": some(["0", "3", "4-4", "7-8", "0 - 9", "5-15", "0-29", "20-29", "noise_refiner", "context_refiner", "other"]),
        "effects": some(list(EFFECTS)),
        "overrides": some(["3.to_q", "*.adaLN", "0-9.feed_forward", "noise_refiner.w2", "other.final_layer.adaLN_modulation"]),
    },
)


@examples(150)
@given(preset=st.sampled_from(list(MEANING)), own=OWN)
def test_origins_agree_with_a_slow_reading(preset: str, own: dict):
    try:
        table(preset, own)
    except ZitMergeError:  # equally wide
        assume(False)
    found = origins(preset, own)
    for name in NAMES:
        assert found[name] == slow_origin(name, presets.presets()[preset], own), name
    event(" ".join(sorted(set(found.values()))))


# --- presets of one's own, in files --------------------------------------------------------------------------------------------

OWN_FILE = """
# what I like
mine:
  idea: my own
  blocks: {adaLN: 0.5, to_q: 1e-1}
  layers:
    0-9: 0
    10: 2
    20-29: [1, 0.5]
    "other": -1
  effects: {detail: 1.5}
  overrides: {3.to_k: 0.25}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a preset file; returns its path."""

    def write_(content: str | bytes, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return write_


def refused(preset: str) -> str:
    with pytest.raises(ZitMergeError) as e:
        expand(preset)
    message = str(e.value)
    assert message.startswith(f"{PLACE}.preset: ") and "\n" not in message
    return message.removeprefix(f"{PLACE}.preset: ")


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "A.YAML", "/x/a.yaml", "~/a.yml", "..\\a.yaml"])
def test_a_preset_that_ends_like_a_file_is_one(name):
    assert is_file(name)
    assert not any(map(is_file, [*MEANING, "a.json", "yaml", "a.yaml.txt", "a.safetensors"]))


def test_a_file_holds_a_preset_as_the_shipped_ones_are(write):
    found = find(write(OWN_FILE))
    assert found == Preset(
        idea="my own",
        blocks={"adaLN": 0.5, "to_q": 0.1},
        layers={"0-9": 0.0, "10": 2.0, "20-29": [1.0, 0.5], "other": -1.0},
        effects={"detail": 1.5},
        overrides={"3.to_k": 0.25},
    )
    assert all(type(number) is float for number in (*found.blocks.values(), found.layers["0-9"], *found.layers["20-29"]))


def test_a_file_gives_the_strengths_of_its_entries_written_out(write):
    own = {"blocks": {"adaLN_modulation": 1}, "layers": {"10": 0.5}, "overrides": {"3.to_k": 3, "4.to_k": 4}}
    found = table(write(OWN_FILE), own, 0.5)
    entries = {
        "blocks": {"adaLN": 1, "to_q": 0.1},
        "layers": {"0-9": 0, "10": 0.5, "20-29": [1, 0.5], "other": -1},
        "effects": {"detail": 1.5},
        "overrides": {"3.to_k": 3, "4.to_k": 4},
    }
    assert found == strengths(0.5, factors(Weights(**entries)))
    assert found["layers.10.feed_forward.w1"] == 0.5 * 0.5 * 1.5 and found["layers.0.feed_forward.w1"] == 0


def test_origins_of_a_file(write):
    found = origins(write(OWN_FILE), {"layers": {"10": 0.5}})
    assert found["layers.10.attention.to_v"] == "own" and found["layers.10.attention.to_q"] == "both"
    assert found["layers.5.attention.to_v"] == "preset" and found["layers.15.attention.to_v"] == "-"


def test_every_shipped_preset_works_as_a_file(write):
    shipped = (Path(presets.__file__).with_name("presets.yaml")).read_text(encoding="utf-8")
    for entry in re.split(r"(?m)^(?=\w)", shipped)[1:]:
        name = entry.partition(":")[0]
        assert find(write(entry)) == presets.presets()[name]
        assert expand(write(entry)) == expand(name)
        assert origins(write(entry), {}) == origins(name, {})


def test_thirty_numbers_are_thirty_layers(write):
    path = write(f"mine: {{layers: {[k / 10 for k in range(30)]}}}")
    assert expand(path, {"layers": {"4": 7}})["layers"] == {str(k): 7 if k == 4 else k / 10 for k in range(30)}


@pytest.mark.parametrize("name", ["layers", "idea", "3", "1e3", "no", "né #1"])
def test_a_preset_may_have_any_name(write, name):
    content = yaml.safe_dump({name: {"idea": "", "layers": {"0-9": 0.5}, "blocks": {"to_q": 2}}})
    assert find(write(content)) == Preset(blocks={"to_q": 2.0}, layers={"0-9": 0.5})


def test_a_file_is_read_again_each_time(write):
    assert table(write("mine: {blocks: {to_q: 0.5}}"))["layers.0.attention.to_q"] == 0.5
    assert table(write("mine: {blocks: {to_q: 0.25}}"))["layers.0.attention.to_q"] == 0.25


@pytest.mark.parametrize("name", ["mine.yml", "Mine.YAML", "a preset.yaml", "né.yaml"])
def test_files_by_other_names_from_the_working_directory_and_at_home(write, tmp_path, monkeypatch, name):
    write("mine: {idea: '', blocks: {to_q: 0.5}}", name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for path in (name, f"./{name}", f"~/{name}"):
        assert find(path).blocks == {"to_q": 0.5}


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_files_as_editors_on_windows_store_them(write, codec):
    assert find(write("mine:\r\n  blocks: {to_q: 0.5}\r\n".encode(codec))).blocks == {"to_q": 0.5}


def test_a_config_with_a_file(write):
    lora = read({"lora": "x.safetensors", "ratio": 2.0, "preset": write(OWN_FILE), "effects": {"detail": 1.0}})
    assert strengths(lora.ratio, factors(Weights(**lora.tables)))["layers.15.feed_forward.w1"] == 2.0
    assert lora.tables["layers"]["20-29"] == [1.0, 0.5]


def test_a_merge_with_a_file_keeps_its_entries_in_the_recipe(work, loras):
    work.write({"mine": {"layers": {"0-9": 0.5}}}, "mine.yaml")
    with_file = {"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1.0, "preset": str(work.folder / "mine.yaml")}]}
    written_out = {"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1.0, "layers": {"0-9": 0.5}}]}
    made = []
    for step in (with_file, written_out):
        work.zit("run", work.job(step)).ok()
        (path,) = work.out.glob("*.safetensors")
        made.append(path.read_bytes())
        path.unlink()
    assert made[0] == made[1]


WRONG = {
    "": "has no preset under a name",
    "3": "has no preset under a name",
    "[1, 2]": "has no preset under a name",
    "blocks: {to_q: 1}": "has no preset under a name",
    "{idea: x, layers: {0-9: 1}}": "has no preset under a name",
    "{a: {blocks: {to_q: 1}}, b: {blocks: {to_q: 1}}}": "holds 2 presets (a, b): keep one in each file",
    "mine: 3": "mine: must have tables below it, not 3",
    "mine:": "mine: must have tables below it, not None",
    "mine: {}": "mine: sets nothing",
    "mine: {idea: only}": "mine: sets nothing",
    "mine: {layer: {0-9: 1}}": "mine.layer: unknown key (did you mean layers?); known here: idea, blocks, layers, effects",
    "mine: {ratio: 1, blocks: {to_q: 1}}": "mine.ratio: unknown key; known here",
    "mine: {idea: 3, blocks: {to_q: 1}}": "mine.idea: must be text, not 3",
    "mine: {blocks: [1, 2]}": "mine.blocks: must be a mapping, not [1, 2]",
    "mine: {layers: [1, 2]}": "mine.layers: a plain list has one number for each of the 30 layers, this one has 2",
    "mine: {layers: 0.5}": "mine.layers: must be ranges, such as {0-9: 0.5}, or 30 numbers, not 0.5",
    "mine: {blocks: {to_q: .nan}}": "mine.blocks.to_q: must be a finite number, not nan",
    "mine: {blocks: {to_q: -.inf}}": "mine.blocks.to_q: must be a finite number, not -inf",
    "mine: {blocks: {to_q: '1'}}": "mine.blocks.to_q: must be a number, not '1'",
    "mine: {blocks: {to_q: yes}}": "mine.blocks.to_q: must be a number, not True",
    "mine: {blocks: {to_q: [1, 2]}}": "mine.blocks.to_q: must be a number, not [1, 2]",
    "mine: {blocks: {to_q: }}": "mine: sets nothing",
    f"mine: {{blocks: {{to_q: {10**400}}}}}": "mine.blocks.to_q: must be a number, not 1000",
    "mine: {layers: {0-9: [1, .nan]}}": "mine.layers.0-9[1]: must be a finite number, not nan",
    "mine: {layers: {0-9: [1]}}": "mine.layers.0-9: a gradient is a list of two or more numbers",
    "mine: {layers: {0-30: 1}}": "mine.layers.0-30: Z-Image's layers are 0 to 29",
    "mine: {layers: {1.5: 1}}": "mine.layers.1.5: a key must be text",
    "mine: {blocks: {yes: 1}}": "mine.blocks.True: a key must be text",
    "mine: {layers: {'3': 1, 3: 2}}": "mine.layers: duplicate key 3: keep one of them",
    "mine: {layers: {0-9: 1, 5-14: 2}}": "mine.layers: 0-9 and 5-14 overlap and are equally wide",
    "mine: {blocks: {adaLN: 1, adaLN_modulation: 2}}": "mine.blocks: adaLN and adaLN_modulation overlap",
    "mine: {blocks: {to_w: 1}}": "mine.blocks.to_w: Z-Image has no such component (did you mean to_v?)",
    "mine: {effects: {detial: 1}}": "mine.effects.detial: no such effect group (did you mean detail?)",
    "mine: {overrides: {to_q: 1}}": "mine.overrides.to_q: an override is LAYERS.COMPONENT",
}


@pytest.mark.parametrize("content", WRONG)
def test_wrong_files(write, content):
    path = write(content)
    assert refused(path).startswith(f"{path}: {WRONG[content]}")


def test_files_that_can_not_be_read(write, tmp_path):
    assert "there is no such file: correct the path" in refused(str(tmp_path / "gone.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "there is no such file" in refused(str(tmp_path / "folder.yaml"))
    assert "there is no such file" in refused("a\0b.yaml")
    assert "there is no such file" in refused("n" * 5000 + ".yaml")
    assert "mine.yaml: is not a text file" in refused(write(b"\x89PNG\r\n\x1a\n\xff"))
    assert re.match(
        r".*mine.yaml: line 2: duplicate key to_q: keep one of them", refused(write("mine: {blocks: {to_q: 1,\n to_q: 2}}"))
    )
    assert "mine.yaml: line 1: " in refused(write("mine: {blocks: {to_q: 1}"))
    assert "mine.yaml: line 1: could not determine a constructor" in refused(write("mine: !!python/name:os.system x"))
    assert "nested too deeply" in refused(write("mine: " + "[" * 5000 + "]" * 5000))


def test_the_command_line_names_place_and_file(work, loras):
    step = {"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1.0, "preset": str(work.folder / "gone.yaml")}]}
    message = work.zit("run", work.job(step)).refused()
    assert message.startswith(f"process[0].steps[0].loras[0].preset: {work.folder / 'gone.yaml'}: there is no such file")


def test_a_file_is_found_beside_the_config_and_read_once(work, loras):
    """A training may take hours between the reading of a section and its run."""
    work.write({"late": {"idea": "mine", "layers": {"0-9": 0.5}, "blocks": {"to_q": 2}}}, "configs/late.yaml")
    lora = {"lora": str(loras[0]), "ratio": 0.5, "preset": "late.yaml", "blocks": {"w1": 3}}
    config = work.job({"name": "a", "loras": [lora]}, name="configs/job.yaml")
    ((_, section),) = load_job(config).sections()
    (work.folder / "configs" / "late.yaml").unlink()
    tables = section.steps[0].loras[0].tables
    assert (tables["blocks"], tables["layers"]) == ({"to_q": 2, "w1": 3}, {"0-9": 0.5})
    work.write({"late": {"idea": "mine", "layers": {"0-9": 0.25}}}, "late.yaml")
    ((_, section),) = load_job(config).sections()
    assert section.steps[0].loras[0].tables["layers"] == {"0-9": 0.25}, "else from the working directory"
    out = work.zit("run", config).ok()
    assert "preset late.yaml, your own" in out


def test_a_long_name_of_a_file_is_cut_in_the_plan(work, loras):
    work.write({"x": {"layers": {"0-9": 0.5}}}, f"{'n' * 100}\u00e9.yaml")
    lora = {"lora": str(loras[0]), "ratio": 0.5, "preset": f"{'n' * 100}\u00e9.yaml"}
    out = work.zit("run", work.job({"name": "a", "loras": [lora]}), "--dry-run").ok()
    (line,) = (line for line in out.splitlines() if "where it comes from" in line)
    assert columns(line) <= 80 and "preset nnn" in line and "nn\u00e9.yaml" in line

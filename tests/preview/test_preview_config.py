"""`preview`, `sweep` and `ablate` in a config: what is accepted, what steps inherit, and the sentence for everything else."""

from __future__ import annotations

import math
from typing import Any

import pytest

from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.config.schema import Ablate, Preview, Section, Step
from extensions_built_in.zit_merge.errors import ZitMergeError, located

LORA = {"lora": "me.safetensors", "ratio": 1.0}
STEP = {"name": "a", "loras": [LORA]}
EVERYTHING = {
    "prompts": ["a cat", "a dog"],
    "seed": [1, 2],
    "size": [512, 768],
    "steps": 12,
    "guidance": 1.5,
    "compare": ["base", "result"],
    "confirm": True,
}
KNOWN = "known here: prompts, seed, size, steps, guidance, compare, confirm"
NOT_PROMPTS = "must be a list of prompts, or a text file with one on each line, not"
NOT_SEED = "must be a whole number from 0 to 2^63 - 1, or a list of them, not"
NOT_SIZE = "must be a side in pixels, or [width, height], not"


def section(step: dict | None = None, **keys: Any) -> dict:
    return {"type": "zit_merge", "steps": [STEP | (step or {})]} | keys


def settled(raw: dict) -> Section:
    with located("process[1]"):
        return parse_section(raw)


def only(raw: dict) -> Step:
    return settled(raw).steps[0]


def refusal(raw: dict) -> str:
    with pytest.raises(ZitMergeError) as caught:
        settled(raw)
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message and "constrained" not in message and "Input" not in message
    return message


# --- what is accepted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        EVERYTHING,
        {},
        {"prompts": "prompts.txt"},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"size": 1024},
        {"steps": 1},
        {"steps": 200},
        {"guidance": 0},
        {"guidance": 100},
        {"compare": ["inputs", "inputs"]},
        {"prompts": ["--seed 3"], "confirm": False},
    ],
    ids=str,
)
def test_previews(asked):
    found = only(section({"preview": asked})).preview
    assert {key: getattr(found, key) for key in asked} == asked
    assert only(section(preview=asked)).preview == found


def test_defaults_are_those_of_the_training():
    assert Preview().model_dump() == dict.fromkeys(("prompts", "seed", "size", "steps", "guidance")) | {
        "compare": ["base", "inputs", "result"],
        "confirm": False,
    }
    assert Ablate(by="layers").model_dump() == {
        **{"by": "layers", "groups": None, "mode": "leave_out", "prompts": None, "preset": None, "confirm": False},
        "metrics": ["pixels", "structure", "colour", "detail"],
    }


@pytest.mark.parametrize(
    ("own", "of_section", "asks"),
    [
        ({}, {}, False),
        ({"preview": True}, {}, True),
        ({"preview": False}, {}, False),
        ({"preview": {}}, {}, True),
        ({"preview": None}, {}, False),
        ({}, {"preview": True}, True),
        ({}, {"preview": {}}, True),
        ({}, {"preview": False}, False),
        ({"preview": False}, {"preview": True}, False),
        ({"preview": True}, {"preview": False}, True),
        ({"preview": {}}, {"preview": False}, True),
        ({"preview": None}, {"preview": True}, True),
        ({"keep": False}, {"preview": True}, False),
        ({"keep": False, "preview": True}, {"preview": True}, True),
        ({"keep": False, "preview": {"seed": 1}}, {"preview": True}, True),
        ({"keep": True}, {"preview": True}, True),
    ],
    ids=str,
)
def test_true_false_and_nothing(own, of_section, asks):
    assert (only(section(own, **of_section)).preview is not None) == asks


def test_a_step_wins_key_by_key():
    shared = {"prompts": ["a"], "size": 512, "compare": ["base"]}
    found = only(section({"preview": {"size": [64, 128], "seed": 3}}, preview=shared)).preview
    assert (found.prompts, found.size, found.seed, found.compare) == (["a"], [64, 128], 3, ["base"])
    assert only(section({"preview": True}, preview=shared)).preview == Preview(**shared)
    assert only(section({"preview": {"size": None}}, preview=shared)).preview.size == 512, "a null is absent"
    assert settled(section({"preview": {"seed": 1}}, preview=shared)).preview == Preview(**shared), "the section's own stays"


@pytest.mark.parametrize(
    "sweep",
    [
        {"ratio": [0.4, 1]},
        {"ratio": [0.4], "blocks.to_v": [0.5, 1, -1.5]},
        {"layers.0-9": [[1, 0.5], 0.3]},
        {"loras[1].ratio": [0]},
        {"layers": [[1.0] * 30]},
    ],
    ids=str,
)
def test_sweeps(sweep):
    assert only(section({"sweep": sweep})).sweep == sweep


def test_a_key_that_yaml_reads_as_a_number_is_text():
    assert list(only(section({"sweep": {5: [1]}})).sweep) == ["5"]


@pytest.mark.parametrize("by", ["layers", "components", "cells"])
@pytest.mark.parametrize("mode", ["leave_out", "only"])
def test_ablations(by, mode):
    asked = {"by": by, "mode": mode, "groups": 30, "prompts": "p.txt", "metrics": ["a:b"], "preset": "mine-1.0", "confirm": True}
    assert only(section({"ablate": asked})).ablate.model_dump() == asked


# --- what is not ---------------------------------------------------------------------------------------------------------------

WRONG = [
    ({"seeds": 1}, ".seeds", f"unknown key (did you mean seed?); {KNOWN}"),
    ({"prompt": ["a"]}, ".prompt", f"unknown key (did you mean prompts?); {KNOWN}"),
    ({"promts": ["a"]}, ".promts", f"unknown key (did you mean prompts?); {KNOWN}"),
    ({"trigger": "x"}, ".trigger", f"unknown key; {KNOWN}"),
    ({"save": {}}, ".save", f"unknown key; {KNOWN}"),
    ({"prompts": 5}, ".prompts", f"{NOT_PROMPTS} 5"),
    ({"prompts": []}, ".prompts", f"{NOT_PROMPTS} []"),
    ({"prompts": " "}, ".prompts", f"{NOT_PROMPTS} ' '"),
    ({"prompts": {"a": "b"}}, ".prompts", f"{NOT_PROMPTS} {{'a': 'b'}}"),
    ({"prompts": ["a", 5]}, ".prompts[1]", "must be text, not 5: YAML reads this as the number 5, put it in quotes"),
    ({"prompts": ["a", ["b"]]}, ".prompts[1]", "must be text, not ['b']"),
    ({"prompts": ["a", ""]}, ".prompts[1]", "has a form that is not allowed: '' (any text but an empty one is allowed)"),
    ({"seed": "x"}, ".seed", f"{NOT_SEED} 'x'"),
    ({"seed": -1}, ".seed", f"{NOT_SEED} -1"),
    ({"seed": 1.5}, ".seed", f"{NOT_SEED} 1.5"),
    ({"seed": True}, ".seed", f"{NOT_SEED} True"),
    ({"seed": []}, ".seed", f"{NOT_SEED} []"),
    ({"seed": 2**63}, ".seed", f"{NOT_SEED} {2**63}"),
    ({"seed": [1, "x"]}, ".seed[1]", "must be a whole number, not 'x'"),
    ({"seed": [1, -1]}, ".seed[1]", "must be at least 0, not -1"),
    ({"seed": [2**63]}, ".seed[0]", f"must be at most {2**63 - 1}, not {2**63}"),
    ({"size": "big"}, ".size", f"{NOT_SIZE} 'big'"),
    ({"size": 1.5}, ".size", f"{NOT_SIZE} 1.5"),
    ({"size": [1]}, ".size", f"{NOT_SIZE} [1]"),
    ({"size": [1, 2, 3]}, ".size", f"{NOT_SIZE} [1, 2, 3]"),
    ({"size": {"width": 1}}, ".size", f"{NOT_SIZE} {{'width': 1}}"),
    ({"size": [64, "x"]}, ".size[1]", "must be a whole number, not 'x'"),
    ({"steps": 0}, ".steps", "must be at least 1, not 0"),
    ({"steps": 201}, ".steps", "must be at most 200, not 201"),
    ({"steps": 2.5}, ".steps", "must be a whole number, not 2.5"),
    ({"steps": "x"}, ".steps", "must be a whole number, not 'x'"),
    ({"guidance": -1}, ".guidance", "must be at least 0.0, not -1"),
    ({"guidance": 101}, ".guidance", "must be at most 100.0, not 101"),
    ({"guidance": math.nan}, ".guidance", "must be a finite number, not nan"),
    ({"guidance": "x"}, ".guidance", "must be a number, not 'x'"),
    ({"compare": ["bse"]}, ".compare[0]", "no such thing to compare: 'bse' (did you mean base?); there are base, inputs, result"),
    ({"compare": ["base", 1]}, ".compare[1]", "no such thing to compare: 1; there are base, inputs, result"),
    ({"compare": [{"a": 1}]}, ".compare[0]", "no such thing to compare: {'a': 1}; there are base, inputs, result"),
    ({"compare": []}, ".compare", "must have at least one entry"),
    ({"compare": "base"}, ".compare", "must be a list, not 'base'"),
    ({"confirm": "yes"}, ".confirm", "must be true or false, not 'yes'"),
    ({"confirm": 1}, ".confirm", "must be true or false, not 1"),
    ("yes", "", "must be true, false or a mapping, such as {size: 768}, not 'yes'"),
    (1, "", "must be true, false or a mapping, such as {size: 768}, not 1"),
    (["a"], "", "must be true, false or a mapping, such as {size: 768}, not ['a']"),
]


@pytest.mark.parametrize("level", ["section", "step"])
@pytest.mark.parametrize(("asked", "key", "says"), WRONG, ids=str)
def test_what_is_wrong_with_a_preview(asked, key, says, level):
    """Where it was written, not in the steps that inherit it."""
    if level == "section":
        assert refusal(section(preview=asked)) == f"process[1].preview{key}: {says}"
    else:
        assert refusal(section({"preview": asked}, preview=True)) == f"process[1].steps[0].preview{key}: {says}"


@pytest.mark.parametrize(
    ("asked", "key", "says"),
    [
        ({}, ".by", "is missing"),
        ({"by": "x"}, ".by", "no such way to divide: 'x'; there are layers, components, cells"),
        ({"by": "layer"}, ".by", "no such way to divide: 'layer' (did you mean layers?); there are layers, components, cells"),
        ({"by": "layers", "groups": 0}, ".groups", "must be at least 1, not 0"),
        ({"by": "layers", "groups": 31}, ".groups", "must be at most 30, not 31"),
        (
            {"by": "layers", "mode": "leave"},
            ".mode",
            "no such mode: 'leave' (did you mean leave_out?); there are leave_out, only",
        ),
        ({"by": "layers", "prompts": 5}, ".prompts", f"{NOT_PROMPTS} 5"),
        ({"by": "layers", "metrics": []}, ".metrics", "must have at least one entry"),
        ({"by": "layers", "metrics": "pixels"}, ".metrics", "must be a list, not 'pixels'"),
        (
            {"by": "layers", "metrics": [5]},
            ".metrics[0]",
            "must be text, not 5: YAML reads this as the number 5, put it in quotes",
        ),
        (
            {"by": "layers", "preset": "a/b"},
            ".preset",
            "has a form that is not allowed: 'a/b' (letters, digits, _ . and - are allowed)",
        ),
        ({"by": "layers", "confirm": 5}, ".confirm", "must be true or false, not 5"),
        ({"by": "layers", "seed": 5}, ".seed", "unknown key; known here: by, groups, mode, prompts, metrics, preset, confirm"),
        (True, "", "must be a mapping, such as {by: layers}, not True"),
        ("layers", "", "must be a mapping, such as {by: layers}, not 'layers'"),
    ],
    ids=str,
)
def test_what_is_wrong_with_an_ablation(asked, key, says):
    assert refusal(section({"ablate": asked})) == f"process[1].steps[0].ablate{key}: {says}"


A_SWEEP = "must be a mapping of one key or two, such as {ratio: [0.5, 1.0]}, not"


@pytest.mark.parametrize(
    ("asked", "key", "says"),
    [
        (True, "", f"{A_SWEEP} True"),
        ("ratio", "", f"{A_SWEEP} 'ratio'"),
        ([], "", f"{A_SWEEP} []"),
        ({}, "", f"{A_SWEEP} {{}}"),
        ({"a": [1], "b": [1], "c": [1]}, "", f"{A_SWEEP} {{'a': [1], 'b': [1], 'c': [1]}}"),
        ({"ratio": 0.5}, ".ratio", "must be a list, not 0.5"),
        ({"ratio": []}, ".ratio", "must have at least one entry"),
        ({"ratio": {"a": 1}}, ".ratio", "must be a list, not {'a': 1}"),
        ({"ratio": [0.5, "x"]}, ".ratio[1]", "must be a number, not 'x'"),
        ({"ratio": [True]}, ".ratio[0]", "must be a number, not True"),
        ({"ratio": [None]}, ".ratio[0]", "must be a number, not None"),
        ({"ratio": [math.inf]}, ".ratio[0]", "must be a finite number, not inf"),
        ({"layers.0-9": [[1, "x"]]}, ".layers.0-9[0][1]", "must be a number, not 'x'"),
        ({"layers.0-9": [[1]]}, ".layers.0-9[0]", "must be a number, not [1]"),
        ({"loras[1].ratio": ["x"]}, ".loras[1].ratio[0]", "must be a number, not 'x'"),
        ({"loras[0].blocks.to_v": 1}, ".loras[0].blocks.to_v", "must be a list, not 1"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_sweep(asked, key, says):
    assert refusal(section({"sweep": asked})) == f"process[1].steps[0].sweep{key}: {says}"


def test_a_long_value_is_not_repeated_to_its_end():
    message = refusal(section({"preview": {"size": "big " * 1000}}))
    assert message.startswith(f"process[1].steps[0].preview.size: {NOT_SIZE} 'big big") and message.endswith("...")
    assert len(message) < 500


@pytest.mark.parametrize("key", ["sweep", "ablate", "loras", "keep"])
def test_what_stands_on_a_step_is_sent_there(key):
    assert refusal(section(**{key: {}})) == f"process[1].{key}: belongs to a step, not to the section: move it into one"

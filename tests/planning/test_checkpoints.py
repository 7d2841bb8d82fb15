"""Averages over the checkpoints of a training that is finished, or still to come, without a toolkit."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from oracles.dense import Deltas, best_error, read_deltas, read_metadata, relative, weighted_sum
from oracles.producers import small_shapes
from safetensors.torch import load_file
from workspace import Workspace, write_lora

from extensions_built_in.zit_merge.algebra.ema import gamma_of, profile
from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.errors import ZitMergeError, located

SHAPES = {
    name: shape
    for name, shape in small_shapes(dim=12, ffn=20, temb=8, cap=12, n_layers=2, n_refiners=1).items()
    if name.startswith(("layers.0.", "layers.1.attention"))
}
PLACE = "process[1].steps[0].checkpoints"
KEPT = [2000, 2250, 2500, 2750, 3000]  # what work.training's settings leave


def exponent(sigma_rel: float) -> float:
    """The largest root of sigma^2 (g + 2)^2 (g + 3) = g + 1."""
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def powers(steps: Sequence[int], gamma: float) -> list[float]:
    weights = (np.array(steps, dtype=float) / max(steps)) ** gamma
    return (weights / weights.sum()).tolist()


def name_of(step: int, job: str = "cat") -> str:
    return f"{job}.safetensors" if step == 3000 else f"{job}_{step:09d}.safetensors"


def train(work: Workspace, steps: Sequence[int] = KEPT, job: str = "cat", producer: str = "ai-toolkit") -> dict[int, Deltas]:
    """Saves of a training of 3000 steps, the last one first: by the time of the files it is the oldest."""
    folder = work.folder / "output" / job
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for n, step in enumerate(sorted(steps, reverse=True)):
        name = name_of(step, job)
        path, made = write_lora(folder, producer, 2, step, shapes=SHAPES, stem=name.removesuffix(".safetensors"))
        os.utime(path, (1_700_000_000 + n, 1_700_000_000 + n))
        found[step] = made.deltas
    return found


def config(
    work: Workspace, checkpoints: Mapping[str, Any], job: str = "cat", training: Mapping[str, Any] | None = None, **keys: Any
):
    """A job that trains and then averages."""
    step = {"name": "ema", "checkpoints": dict(checkpoints)} | keys
    section = work.section(step, save={"dtype": "fp32"})
    return work.config(work.training(**(training or {})), section, job=job)


def averaged(work: Workspace, checkpoints: Mapping[str, Any], job: str = "cat", **keys: Any) -> dict[str, torch.Tensor]:
    work.zit("run", config(work, checkpoints, job, **{"rank": "exact"} | keys)).ok()
    return read_deltas(work.out / f"merged_{job}_ema.safetensors")


def check(found: Deltas, saves: Mapping[int, Deltas], weights: Mapping[int, float]) -> None:
    want = weighted_sum([(saves[step], weight) for step, weight in weights.items()])
    assert found.keys() == want.keys()
    for module, delta in want.items():
        assert relative(found[module], delta) < 2e-6, module


def refused(work: Workspace, command: str, *args: Any, **keys: Any) -> str:
    message = work.zit(command, config(work, *args, **keys)).refused()
    assert work.files() == []
    return message


# --- the weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"sigma_rel": 0.1}, {"sigma_rel": 0.05}, {"sigma_rel": 0.25, "last": 3}], ids=str)
def test_a_power_of_the_training_step_is_the_weight(work, asked):
    saves = train(work)
    steps = KEPT[-asked.get("last", 5) :]
    weights = powers(steps, exponent(asked.get("sigma_rel", 0.1)))
    assert weights == pytest.approx(profile(steps, gamma_of(asked.get("sigma_rel", 0.1))), rel=1e-6)
    check(averaged(work, asked), saves, dict(zip(steps, weights, strict=True)))


@pytest.mark.parametrize("gamma", [0, 1, 2.5, 6.94])
def test_the_exponent_itself(work, gamma):
    saves = train(work)
    weights = dict(zip(KEPT, powers(KEPT, gamma), strict=True))
    if gamma == 0:
        assert set(weights.values()) == {0.2}
    check(averaged(work, {"gamma": gamma}), saves, weights)


@pytest.mark.parametrize("weights", [[1, 2, 5], [0.2, 0.2, 0.2], [-1, 1, 2.5], [0, 0, 4]], ids=str)
def test_weights_of_their_own_are_for_the_last_ones_oldest_first(work, weights):
    saves = train(work)
    shares = {step: w / sum(weights) for step, w in zip(KEPT[-3:], weights, strict=True)}
    for asked in ({"weights": weights}, {"weights": weights, "last": 3}):
        check(averaged(work, asked), saves, shares)


@pytest.mark.parametrize("last", [1, 2, 4])
def test_last_counts_the_final_file(work, last):
    saves = train(work)
    check(averaged(work, {"last": last, "gamma": 0}), saves, dict.fromkeys(KEPT[-last:], 1 / last))


def test_what_lies_there_counts_when_the_training_is_over(work):
    """The folder of a run whose settings were changed later: what is there is averaged, not what the config would leave."""
    steps = [100, 1700, 2999, 3000]
    saves = train(work, steps)
    check(averaged(work, {"gamma": 3}), saves, dict(zip(steps, powers(steps, 3), strict=True)))


def test_a_training_that_left_its_final_file_alone(work):
    saves = train(work, [3000])
    check(averaged(work, {}), saves, {3000: 1.0})


def test_files_that_are_no_checkpoints_of_this_training_are_left_alone(work):
    saves = train(work)
    folder = work.folder / "output" / "cat"
    stale = [
        *("cat_000003000", "cat_000003250", "cat_000010000"),  # of a longer run before this one
        *("cat_2500", "cat_000002600_old", "cats_000002600", "cat2_000002600", "CRITIC_cat_000002600", "other"),
        *("cat_000002600.safetensors.part", "merged_cat_000002600"),
    ]
    for n, name in enumerate(stale):
        write_lora(folder, "ai-toolkit", 2, 10_000 + n, shapes=SHAPES, stem=name)
        if name.endswith(".part"):
            (folder / f"{name}.safetensors").rename(folder / name)
    (folder / "cat_000002600").mkdir()
    check(averaged(work, {"gamma": 0}), saves, dict.fromkeys(KEPT, 0.2))


@pytest.mark.parametrize("job", ["cat (v1.0)+[x]", "a.b", "c*t", "cat_000000250"])
def test_a_name_that_is_also_a_pattern(work, job):
    if os.name == "nt" and "*" in job:
        pytest.skip("no such name on Windows")
    saves = train(work, job=job)
    folder = work.folder / "output" / job
    for name in ("aXb_000002600", "caat_000002600", "cat_000002600"):
        write_lora(folder, "ai-toolkit", 2, 77, shapes=SHAPES, stem=name)
    work.zit("run", config(work, {"gamma": 0}, job, rank="exact")).ok()
    (made,) = work.out.glob("*.safetensors")
    check(read_deltas(made), saves, dict.fromkeys(KEPT, 0.2))


def test_the_rank_is_that_of_the_checkpoints_unless_another_is_asked_for(work):
    saves = train(work)
    want = weighted_sum([(saves[step], w) for step, w in zip(KEPT, powers(KEPT, exponent(0.1)), strict=True)])
    for keys, rank in (({}, 2), ({"rank": 3}, 3), ({"rank": "exact"}, 10), ({"rank": {"energy": 1e-6}}, 2)):
        work.zit("run", config(work, {}, **keys)).ok()
        made = work.out / "merged_cat_ema.safetensors"
        assert load_file(made)["diffusion_model.layers.0.attention.to_k.lora_A.weight"].shape[0] == rank
        for module, delta in read_deltas(made).items():
            error = float((delta - want[module]).norm())
            assert error == pytest.approx(best_error(want[module], rank), rel=1e-4, abs=1e-6 * float(want[module].norm()))


def test_a_rank_of_the_section_holds_for_checkpoints_too(work):
    train(work)
    section = work.section({"name": "ema", "checkpoints": {}}, rank=5)
    work.zit("run", work.config(work.training(), section)).ok()
    made = load_file(work.out / "merged_cat_ema.safetensors")
    assert made["diffusion_model.layers.0.attention.to_k.lora_A.weight"].shape[0] == 5


def test_later_steps_use_the_average(work):
    saves = train(work)
    section = work.section(
        {"name": "ema", "checkpoints": {"gamma": 0}, "rank": "exact", "keep": False},
        {"name": "half", "loras": [{"lora": "ema", "ratio": 0.5}, {"lora": "trained@2250", "ratio": 0.25}]},
        save={"dtype": "fp32"},
    )
    work.zit("run", work.config(work.training(), section)).ok()
    assert work.files() == ["merged_cat_half.safetensors"]
    check(read_deltas(work.out / "merged_cat_half.safetensors"), saves, dict.fromkeys(KEPT, 0.1) | {2250: 0.35})


def test_the_recipe_names_every_checkpoint_and_makes_the_same_bytes(work):
    train(work)
    work.zit("run", config(work, {"last": 3, "sigma_rel": 0.2})).ok()
    made = work.out / "merged_cat_ema.safetensors"
    (step,) = json.loads(read_metadata(made)["zit_merge.recipe"])["steps"]
    assert [lora["lora"] for lora in step["loras"]] == [name_of(s) for s in KEPT[-3:]]
    assert [lora["ratio"] for lora in step["loras"]] == pytest.approx(powers(KEPT[-3:], exponent(0.2)))
    assert "checkpoints" not in step and step["rank"] == "same"
    recipe = work.recipe(made, "elsewhere/recipe.yaml")
    (work.folder / "output").rename(work.folder / "attic")
    assert work.again(recipe, "--loras", work.folder / "attic").read_bytes() == made.read_bytes()


def test_a_second_run_keeps_the_file_until_a_checkpoint_changes(work):
    train(work)
    for said in ("wrote ", "kept "):
        assert said in work.zit("run", config(work, {})).ok()
    write_lora(work.folder / "output" / "cat", "ai-toolkit", 2, 99, shapes=SHAPES, stem="cat_000002500")
    assert "wrote " in work.zit("run", config(work, {})).ok()
    assert "wrote " in work.zit("run", config(work, {"sigma_rel": 0.11})).ok()


# --- before and after the training ---------------------------------------------------------------------------------------------


def test_check_forecasts_the_checkpoints_before_the_training(work):
    text = work.zit("check", config(work, {"last": 4, "gamma": 1})).ok()
    flat = " ".join(text.split())
    for step, weight in zip(KEPT[-4:], powers(KEPT[-4:], 1), strict=True):
        assert f" {name_of(step)} ratio {weight:g} 240 modules, rank 2, bf16, still to be trained" in flat
    assert name_of(2000) not in text
    assert "step ema: 4 checkpoints, averaged\n" in text and "writes 240 modules, rank 2, fp32" in text and "no errors" in text
    note = "note: rank 8 holds everything, the best approximation of rank 2 is written"
    assert note in flat


def test_check_forecasts_the_size_of_the_real_model(work):
    section = work.section({"name": "ema", "checkpoints": {"last": 2}}, shapes="strict")
    assert ", size not known" not in work.zit("check", work.config(work.training(), section)).ok()


def test_the_dry_run_shows_what_is_there(work):
    train(work, [2600, 3000])
    text = work.zit("run", config(work, {"gamma": 0}), "--dry-run").ok()
    for step in (2600, 3000):
        assert re.search(rf"  {name_of(step)} +ratio 0\.5  12 modules, rank 2, fp32\n", text)
    assert work.files() == []


def test_the_check_of_an_average_says_how_much_is_kept(work):
    train(work)
    text = " ".join(work.zit("run", config(work, {})).ok().split())
    assert "of the energy kept, least in " in text and "too alike" not in text
    assert "ema is right: as asked, as far as rank 2 holds it" in text


@pytest.mark.parametrize("command", ["check", "run"])
def test_it_needs_a_training_before_it(work, command):
    step = {"name": "ema", "checkpoints": {"last": 2}}
    for made in (work.job(step), work.config(work.section(step), work.training())):
        message = work.zit(command, made).refused()
        assert message == (
            "process[0].steps[0].checkpoints: needs a training process before this section in the job, "
            "whose saves can be averaged"
        )


def test_fewer_than_asked_for_before_the_training(work):
    for asked in ({"last": 6}, {"weights": [1] * 6}):
        message = refused(work, "check", asked)
        assert message == (
            f"{PLACE}: 6 checkpoints are asked for, 5 will be there (steps 3000, save_every 250 and max_step_saves_to_keep 4 "
            "leave 2000, 2250, 2500, 2750, 3000; the last one is the final file): set last: 5, or let the training keep more"
        )
    work.zit("check", config(work, {"last": 5})).ok()


@pytest.mark.parametrize(
    ("save", "left"),
    [
        ({"save_every": 0}, "3000"),
        ({"save_every": 5000}, "3000"),
        ({"save_every": 1000, "max_step_saves_to_keep": 1}, "2000, 3000"),
        ({"save_every": 1000, "max_step_saves_to_keep": 0}, "1000, 2000, 3000"),
        ({}, "1000, 2000, 3000"),
    ],
)
def test_what_the_settings_of_a_training_leave(work, save, left):
    count = len(left.split(", "))
    work.zit("check", config(work, {"last": count}, training={"save": save})).ok()
    message = refused(work, "check", {"last": count + 1}, training={"save": save})
    assert f"leave {left}; the last one is the final file): set last: {count}" in message


def test_fewer_than_asked_for_after_the_training(work):
    train(work, [2500, 3000])
    message = refused(work, "run", {"last": 4})
    folder = work.folder / "output" / "cat"
    assert message == (
        f"{PLACE}: 4 checkpoints are asked for, 2 are there ({folder} holds those of 2500, 3000; the last one is the final "
        "file): set last: 2, or let the training keep more"
    )


@pytest.mark.parametrize("steps", [[], [2500, 2750]])
def test_a_training_without_its_final_file_is_not_finished(work, steps):
    train(work, steps)
    folder = work.folder / "output" / "cat"
    there = ", ".join(map(name_of, steps)) or "no .safetensors file"
    for asked in ({}, {"last": 1}, {"weights": [1]}):
        assert refused(work, "run", asked) == (
            f"{PLACE}: {folder / 'cat.safetensors'} is missing, the folder holds {there}: finish the training first"
        )


def test_a_training_whose_folder_is_missing(work):
    assert "finish the training first" in refused(work, "run", {})


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_lokr_needs_a_number(work, moment):
    network = {"network": {"type": "lokr", "linear": 2, "linear_alpha": 2}}
    if moment == "after":
        train(work, producer="ai-toolkit-lokr")
    command = "check" if moment == "before" else "run"
    message = refused(work, command, {"last": 2}, training=network)
    assert message.startswith("process[1].steps[0].rank: same is the rank of LoRAs, ") and "is a LoKr: give a number" in message
    if moment == "after":
        work.zit("run", config(work, {"last": 2}, training=network, rank=4)).ok()


def test_a_broken_checkpoint_is_named(work):
    train(work)
    (work.folder / "output" / "cat" / "cat_000002500.safetensors").write_bytes(b"0" * 100)
    message = refused(work, "run", {"last": 4})
    assert "cat_000002500.safetensors" in message
    work.zit("run", config(work, {"last": 2})).ok()  # it is not among these


# --- the section ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"checkpoints": {"sigma_rel": 1e-200}}, ".checkpoints.sigma_rel: sigma_rel must be from 0.001 to 0.2887"),
        ({"checkpoints": {"sigma_rel": 0}}, ".checkpoints.sigma_rel: sigma_rel must be from 0.001 to 0.2887"),
        ({"checkpoints": {"sigma_rel": -0.1}}, ".checkpoints.sigma_rel: sigma_rel must be from 0.001 to 0.2887"),
        ({"checkpoints": {"sigma_rel": 0.3}}, ".checkpoints.sigma_rel: sigma_rel must be from 0.001 to 0.2887"),
        ({"checkpoints": {"sigma_rel": float("nan")}}, ".checkpoints.sigma_rel: must be a finite number"),
        ({"checkpoints": {"sigma_rel": "wide"}}, ".checkpoints.sigma_rel: must be a number, not 'wide'"),
        ({"checkpoints": {"gamma": -1}}, ".checkpoints.gamma: must be at least 0"),
        ({"checkpoints": {"gamma": float("inf")}}, ".checkpoints.gamma: must be a finite number"),
        ({"checkpoints": {"last": 0}}, ".checkpoints.last: must be at least 1, not 0"),
        ({"checkpoints": {"last": 2.5}}, ".checkpoints.last: must be a whole number, not 2.5"),
        ({"checkpoints": {"last": "all"}}, ".checkpoints.last: must be a whole number, not 'all'"),
        ({"checkpoints": {"sigma_rel": 0.1, "gamma": 2}}, ".checkpoints: sigma_rel and gamma both set the weights: keep one"),
        ({"checkpoints": {"gamma": 2, "weights": [1]}}, ".checkpoints: gamma and weights both set the weights: keep one"),
        ({"checkpoints": {"weights": [1, 2], "last": 3}}, ".checkpoints.weights: 2 weights for last: 3: give one for each"),
        ({"checkpoints": {"weights": []}}, ".checkpoints.weights: must have at least one entry"),
        ({"checkpoints": {"weights": [1, -1]}}, ".checkpoints.weights: sum to 0"),
        ({"checkpoints": {"weights": [0.1, 0.2, -0.3]}}, ".checkpoints.weights: sum to 0"),
        ({"checkpoints": {"weights": [0, 0]}}, ".checkpoints.weights: sum to 0"),
        ({"checkpoints": {"weights": 1}}, ".checkpoints.weights: must be a list, not 1"),
        ({"checkpoints": {"weights": ["1"]}}, ".checkpoints.weights[0]: must be a number, not '1'"),
        ({"checkpoints": {"sigma": 0.1}}, ".checkpoints.sigma: unknown key"),
        (
            {"checkpoints": {"sigma_rell": 0.1}},
            ".checkpoints.sigma_rell: unknown key (did you mean sigma_rel?); known here: last",
        ),
        ({"checkpoints": 4}, ".checkpoints: must be a mapping, not 4"),
        ({"checkpoints": [1]}, ".checkpoints: must be a mapping, not [1]"),
        ({"checkpoints": {}, "loras": [{"lora": "x", "ratio": 1}]}, ": has loras and checkpoints: make two steps"),
        ({}, ".loras: is missing: list the LoRAs to merge (or give checkpoints)"),
        ({"checkpoints": None}, ".loras: is missing: list the LoRAs to merge (or give checkpoints)"),
        ({"checkpoints": {}, "method": "ties"}, ".method: an average over checkpoints is a weighted sum: set method: sum"),
        ({"checkpoints": {}, "method": "average"}, ".method: an average over checkpoints is a weighted sum"),
        ({"checkpoints": {}, "params": {"density": 1}}, ".params.density: the method sum has no such parameter"),
    ],
)
def test_what_makes_no_average(step, says):
    with pytest.raises(ZitMergeError) as error, located("process[1]"):
        parse_section({"type": "zit_merge", "steps": [{"name": "ema"} | step]})
    assert str(error.value).startswith(f"process[1].steps[0]{says}") and "\n" not in str(error.value)


def test_a_method_of_the_section_is_refused_on_a_step_of_checkpoints():
    steps = [{"name": "ema", "checkpoints": {}}]
    raw = {"type": "zit_merge", "method": "ties", "params": {"density": 0.3}, "steps": steps}
    with pytest.raises(ZitMergeError, match=r"^steps\[0\]\.method: .* set method: sum on this step"):
        parse_section(raw)
    steps[0]["method"] = "sum"
    (step,) = parse_section(raw).steps
    assert (step.method, step.params, step.rank) == ("sum", {}, "same")


def test_checkpoints_with_nothing_to_say(work):
    """`checkpoints:` alone in YAML is null, which AI-Toolkit treats as absent; {} is all of them with the usual profile."""
    train(work)
    text = yaml.safe_dump({"job": "extension", "config": {"name": "cat", "process": [work.training(), work.section()]}})
    text = text.replace("steps: []", "steps: [{name: ema, checkpoints: {}}]")
    work.zit("run", work.write(text)).ok()

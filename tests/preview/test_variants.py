"""What pictures show: changes that are those of the files, bit for bit, and records that know what they follow from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import producers
from preview.helpers import CPU, ME, STYLE, Planned, Told, changes, name_of, planned, run, same, step
from workspace import SMALL, Workspace

from extensions_built_in.zit_merge.algebra.methods import METHODS
from extensions_built_in.zit_merge.formats.reader import TensorReader, load_lora
from extensions_built_in.zit_merge.merging.made import Hashes
from extensions_built_in.zit_merge.merging.readers import StepReaders
from extensions_built_in.zit_merge.merging.results import Result
from extensions_built_in.zit_merge.preview.groups import module_groups
from extensions_built_in.zit_merge.preview.variants import AdapterVariant, InputVariant, MaskedVariant, StepVariant, digest

PAIR = (ME, STYLE)
ENERGY, SIZE = {"energy": 0.9}, {"size_mb": 0.2}


def written(path: Path) -> dict:
    """Module -> change of a file, alpha included."""
    lora, found = load_lora(path), {}
    with TensorReader(lora) as reader:
        for module in lora:
            scale, delta = reader.delta(module)
            found[module] = delta.times(scale).map(torch.clone)
    return found


def check(found: Planned, name: str = "soft") -> None:
    """A step's variant is its file, bit for bit: computed before there is one, and read when there is."""
    plan = next(p for p in found.plans if p.name == name)
    computed = changes(StepVariant(name, plan))
    files = {done.plan.name: written(done.path) for done in run(found) if done.path.exists()}
    read = changes(StepVariant(name, plan))
    assert list(computed) == list(read) == list(files[name])
    for module, theirs in files[name].items():
        assert same(computed[module], theirs), module
        assert same(read[module], theirs), module
    assert any(delta.expand().up.any() for delta in computed.values())


# --- steps ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_its_file_with_every_method(work, loras, method):
    check(planned(work, step(*PAIR, method=method, rank=3)))


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("rank", ["exact", 2, 4, "same", ENERGY, {"energy": 0.9, "max": 2}, SIZE], ids=str)
def test_a_step_is_its_file_at_every_rank(work, loras, rank, uniform):
    check(planned(work, step(*PAIR, rank=rank, save={"dtype": "bf16", "uniform": uniform})))


@pytest.mark.parametrize("kind", ["ai-toolkit", "diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "same"])
def test_a_step_is_its_file_in_every_form(work, loras, dtype, kind):
    check(planned(work, step(*PAIR, save={"dtype": dtype, "format": kind})))


@pytest.mark.parametrize("keep_lokr", [True, False])
@pytest.mark.parametrize("producer", ["ai-toolkit-lokr", "lycoris-lokr-both"])
def test_a_lokr_is_its_file(work, producer, keep_lokr):
    work.lora("lokr.safetensors", producer)
    lora = {"lora": "lokr.safetensors", "ratio": 0.7, "blocks": {"to_q": -1.5, "w2": 0.0}}
    check(planned(work, step(lora, save={"dtype": "bf16", "keep_lokr": keep_lokr})))


def test_inputs_that_change_nothing(work, loras):
    found = planned(work, step(ME | {"ratio": 0.0}))
    computed = changes(StepVariant("soft", found.plans[0]))
    (done,) = run(found)
    assert list(computed) == list(written(done.path))
    assert not any(delta.expand().up.any() for delta in computed.values())


SOFT = {"lora": "soft", "ratio": 0.6}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("rank", ["exact", 3, ENERGY], ids=str)
def test_a_step_of_a_step_is_its_file(work, loras, rank, there, keep):
    """Whether the earlier one was kept or not, and whether its file is there or not."""
    found = planned(work, step(*PAIR, rank=rank, keep=keep), step(SOFT, STYLE, name="both", rank=2))
    done = run(found)
    assert [d.path.exists() for d in done] == [keep, True]
    theirs = written(done[-1].path)
    for d in done if not there else done[1:]:
        d.path.unlink(missing_ok=True)
    plan = found.plans[1]
    ours = changes(StepVariant("both", plan))
    assert list(ours) == list(theirs) and all(same(ours[m], theirs[m]) for m in theirs)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rank", ["same", "exact", 4, ENERGY], ids=str)
@pytest.mark.parametrize("rule", [ENERGY, SIZE], ids=str)
def test_a_step_over_one_whose_rank_followed_from_numbers(work, loras, rule, rank, keep):
    """Its ranks are those of the run, in which the earlier one's were known."""
    found = planned(work, step(*PAIR, rank=rule, keep=keep), step(SOFT, STYLE, name="both", rank=rank))
    check(found, "both")
    plan = found.plans[1]
    theirs = written(plan.path)
    plan.path.unlink()
    ours = changes(StepVariant("both", plan))  # over the earlier one's file, where there is one
    assert all(same(ours[m], theirs[m]) for m in theirs)


def test_a_file_of_another_recipe_is_not_read(work, loras):
    run(planned(work, step(*PAIR)))
    plan = planned(work, step(ME | {"ratio": 0.3}, STYLE)).plans[0]
    assert plan.path.is_file()
    ours = changes(StepVariant("soft", plan))
    theirs = written(run(planned(work, step(ME | {"ratio": 0.3}, STYLE)))[0].path)
    assert all(same(ours[m], theirs[m]) for m in theirs)


def test_a_file_that_is_broken_is_not_read(work, loras):
    found = planned(work, step(*PAIR))
    (done,) = run(found)
    theirs = written(done.path)
    done.path.write_bytes(done.path.read_bytes()[:-100])
    ours = changes(StepVariant("soft", found.plans[0]))
    assert all(same(ours[m], theirs[m]) for m in theirs)


def test_a_file_that_is_there_is_read_and_not_computed(work, loras):
    found = planned(work, step(*PAIR, rank=2))
    plan, (done,) = found.plans[0], run(found)
    with Hashes(plan.hashed) as hashes, StepReaders(hashes, CPU) as readers:
        assert isinstance(readers.of_step(plan), TensorReader)
        done.path.unlink()
        assert isinstance(readers.of_step(plan), Result)


def test_passes_over_all_modules_may_be_watched_and_stopped(work, loras):
    class Stop(Exception):
        pass

    def stop(label: str, done: int) -> None:
        if done == 5:
            raise Stop

    for keys in ({"rank": ENERGY}, {"method": "normalize"}):
        plan = planned(work, step(*PAIR, **keys)).plans[0]
        with pytest.raises(Stop):
            changes(StepVariant("soft", plan), Told(stop))


# --- inputs ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("producer", ["ai-toolkit", "musubi", "onetrainer-kohya", "ai-toolkit-lokr", "lycoris-loha", "peft"])
def test_an_input_is_its_file_at_strength_1(work, producer):
    made = producers.PRODUCERS[producer].make(SMALL, 3, 5, torch.float32)
    producers.save(made, work.folder / "x.safetensors")
    producers.save_sidecars(made, work.folder)
    plan = planned(work, step({"lora": "x.safetensors", "ratio": 0.3, "blocks": {"to_q": 0.0}})).plans[0]
    found = changes(InputVariant("x", plan.inputs[0]))
    assert set(found) == set(made.deltas)
    for module, delta in made.deltas.items():
        factors = found[module].expand()
        assert torch.allclose(factors.up.double() @ factors.down.double(), delta.double(), rtol=1e-4, atol=1e-6), module


def test_what_a_file_leaves_open_is_read_as_it_was_answered(work, loras):
    one, two = (planned(work, step(STYLE | {"alpha": alpha})).plans[0] for alpha in ("key", "none"))
    by_key, by_none = (changes(InputVariant("x", plan.inputs[0])) for plan in (one, two))
    module = "layers.0.attention.to_q"
    assert same(by_none[module].times(1 / 3), by_key[module]), "its alpha is 1, its rank 3"
    assert name_of(InputVariant("x", one.inputs[0])) != name_of(InputVariant("x", two.inputs[0]))


def test_an_input_that_is_a_step_is_what_that_makes(work, loras):
    plans = planned(work, step(*PAIR, keep=False), step(SOFT, name="both")).plans
    variant = InputVariant("soft", plans[1].inputs[0])
    ours, theirs = changes(variant), changes(StepVariant("soft", plans[0]))
    assert list(ours) == list(theirs) and all(same(ours[m], theirs[m]) for m in theirs)
    assert name_of(variant) == name_of(StepVariant("another label", plans[0]))


def test_the_base_changes_nothing():
    assert changes(AdapterVariant("base")) == {} and AdapterVariant("base").files() == {}


# --- parts of a variant ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["layers", "components", "cells"])
def test_without_and_only_are_the_two_halves(work, loras, by):
    plan = planned(work, step(*PAIR)).plans[0]
    whole = StepVariant("soft", plan)
    everything, seen = changes(whole), []
    for group in module_groups(by, 3, list(everything)):
        without, only = (changes(MaskedVariant("x", whole, group, half)) for half in (False, True))
        assert set(only) == set(group.modules) and set(without) == set(everything) - set(group.modules)
        assert all(same(delta, everything[m]) for m, delta in (without | only).items())
        assert list(without) == [m for m in everything if m not in only], "in the order of the model"
        seen += only
    assert sorted(seen) == sorted(everything)


def test_parts_have_names_of_their_own(work, loras):
    plan = planned(work, step(*PAIR)).plans[0]
    whole, base = StepVariant("soft", plan), AdapterVariant("base")
    parts = module_groups("layers", 3, plan.ranks)
    variants = [whole, base, *(MaskedVariant("x", whole, part, only) for part in parts for only in (True, False))]
    variants += [MaskedVariant("x", InputVariant("me", plan.inputs[0]), parts[0], False)]
    assert len(set(map(name_of, variants))) == len(variants)


# --- records --------------------------------------------------------------------------------------------------------------------


def names(work: Workspace, *steps, **keys) -> list[str]:
    """The digests of the last step, and of its inputs."""
    plan = planned(work, *steps, **keys).plans[-1]
    return [name_of(StepVariant("x", plan)), *(name_of(InputVariant("x", i)) for i in plan.inputs)]


def test_a_variant_has_the_same_name_whatever_files_steps_and_jobs_are_called(work, loras):
    before = names(work, step(*PAIR, name="a"), step({"lora": "a", "ratio": 1.0}, STYLE))
    (work.folder / "me.safetensors").rename(work.folder / "you.safetensors")
    (work.folder / "deep").mkdir()
    (work.folder / "style.safetensors").rename(work.folder / "deep" / "other.safetensors")
    you, other = ME | {"lora": "you.safetensors"}, STYLE | {"lora": str(work.folder / "deep" / "other.safetensors")}
    after = names(
        work,
        step(you, other, name="b", keep=False),
        step(you, name="unused"),
        step({"lora": "b", "ratio": 1.0}, other, name="c", copy_to=str(work.folder), confirm_size=True, allow_unmatched=True),
        job="another",
        output_dir=str(work.folder / "elsewhere"),
    )
    assert after == before


def test_a_variant_has_the_same_name_however_its_strengths_are_spelled(work, loras):
    plain = names(work, step(ME))
    everything = {"noise_refiner": 1.0, "context_refiner": 1.0, "0-29": 1}
    for spelled in (
        {"blocks": {"to_v": 1}},
        {"blocks": {"adaLN": 1.0, "attention": 1.0}, "layers": everything},
        {"layers": [1.0] * 30},
        {"effects": {"detail": 1.0}},
        {"overrides": {"*.to_q": 1.0}},
    ):
        assert names(work, step(ME | spelled)) == plain
    assert names(work, step(ME | {"blocks": {"adaLN": 0.5}})) == names(work, step(ME | {"blocks": {"adaLN_modulation": 0.5}}))


@pytest.mark.parametrize(
    "changed",
    [
        step(ME | {"ratio": 0.81}, STYLE),
        step(ME, STYLE | {"blocks": {"to_q": 0.5}}),
        step(ME, STYLE | {"layers": {"3": 0.5}}),
        step(ME, STYLE | {"alpha": 2}),
        step(STYLE, ME),
        step(ME),
        step(ME, STYLE, STYLE),
        step(ME, ME | {"ratio": 0.5}),
        step(*PAIR, rank=2),
        step(*PAIR, rank=ENERGY),
        step(*PAIR, method="average"),
        step(*PAIR, method="normalize", params={"per": "layer"}),
        step(*PAIR, save={"dtype": "bf16"}),
        step(*PAIR, save={"dtype": "fp32", "uniform": False}),
    ],
    ids=str,
)
def test_whatever_changes_a_variant_changes_its_name(work, loras, changed):
    assert names(work, changed)[0] != names(work, step(*PAIR))[0]


def test_ratios_count_beside_the_strengths_that_they_lead_to(work, loras):
    """An average divides by them."""
    everywhere = dict.fromkeys(("0-29", "noise_refiner", "context_refiner", "other"), 0.5)
    one, other = ME | {"ratio": 0.5}, ME | {"ratio": 1.0, "layers": everywhere}
    plans = [planned(work, step(lora, STYLE, method="average")).plans[0] for lora in (one, other)]
    assert plans[0].inputs[0].strengths == plans[1].inputs[0].strengths
    assert name_of(StepVariant("x", plans[0])) != name_of(StepVariant("x", plans[1]))


def test_a_name_does_not_depend_on_the_order_of_a_record():
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1}) != digest({"a": 1, "b": {"c": 2}})


def test_seeds_and_parameters_change_names(work, loras):
    found = {
        names(work, step(*PAIR, method="dare_linear", params=p))[0] for p in ({}, {"seed": 1}, {"density": 0.3}, {"seed": 0})
    }
    assert len(found) == 3, "a default that is written out is the same"


def test_other_numbers_in_a_file_change_names(work, loras):
    before = names(work, step(*PAIR))
    work.lora("me.safetensors", seed=9)
    after = names(work, step(*PAIR))
    assert after[0] != before[0] and after[1] != before[1] and after[2] == before[2]
    work.lora("me.safetensors", metadata={"a": "word"})
    assert names(work, step(*PAIR)) == before, "what is said of a file is none of its numbers"


def test_a_step_in_between_changes_names(work, loras):
    one, half = {"lora": "a", "ratio": 1.0}, {"lora": "a", "ratio": 0.5}
    found = [
        names(work, step(*PAIR, name="a", **keys), step(lora, STYLE))[0]
        for keys, lora in (({}, one), ({}, half), ({"rank": 2}, one), ({"method": "average"}, one))
    ]
    assert len(set(found)) == 4


def test_two_steps_are_told_apart_by_what_they_are_not_by_their_names(work, loras):
    """a and b swap their names: the result over both stays the same where their places do."""

    def over(first: str, second: str) -> str:
        made = [step(ME, name=first), step(STYLE, name=second)]
        return names(work, *made, step({"lora": first, "ratio": 1.0}, {"lora": second, "ratio": 0.5}))[0]

    assert over("a", "b") == over("b", "a")
    made = [step(ME, name="a"), step(STYLE, name="b")]
    swapped = names(work, *made, step({"lora": "b", "ratio": 1.0}, {"lora": "a", "ratio": 0.5}))[0]
    assert swapped != over("a", "b")

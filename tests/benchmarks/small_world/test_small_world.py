"""The measures against the world's own pictures, and the whole chain at a tiny size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from extensions_built_in.zit_merge import load_lora, merge
from tests.benchmarks.small_world import loras, measures, model, train, world
from tests.benchmarks.small_world.__main__ import main

TINY = train.Settings(model.Size(24, 2, 1), batch=2)
SMALLER = ["--width", "24", "--layers", "2", "--refiners", "1"]
RUN = ["--save-every", "1", "--judge-every", "2", "--count", "2"]


def test_pictures_follow_from_the_seed_and_hold_their_caption():
    one, same, other = (world.draw(50, seed) for seed in (3, 3, 4))
    assert np.array_equal(one.pixels, same.pixels)
    assert one.captions == [scene.caption for scene in one.scenes]
    assert not np.array_equal(one.pixels, other.pixels)
    assert one.pixels.min() >= 0
    assert one.pixels.max() <= 1


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.06])
def test_rules_read_the_world(noise):
    found = measures.accuracy(300, 5, noise)
    for name in ("subject", "layout", "count", "style", "texture"):
        assert found[name] >= 0.995, name
    assert found["light"] >= 0.97
    assert found["burned"] <= 0.02


def test_rules_see_nothing_in_noise():
    grey = np.random.default_rng(0).normal(0.5, 0.25, (100, 16, 16, 3)).clip(0, 1)
    assert np.mean([len(measures.read(picture).cells) for picture in grey]) <= 0.05


@pytest.mark.parametrize(("damage", "by", "share"), [("saturation", 1.5, 0.5), ("contrast", 1.5, 0.65), ("detail", 11, 0.85)])
def test_burn_is_found(damage, by, share):
    assert measures.burn_found(200, 6, damage, by) >= share
    assert measures.burn_found(200, 6, damage, 1.0) <= 0.02


def test_another_subject_or_style_is_not_taken_for_the_asked_one():
    shown = world.draw(100, 8, ("zib",), ("gleb",))
    asked = [world.Scene("fland", "torv", scene.light, scene.cells) for scene in shown.scenes]
    found = measures.judge(shown.pixels, asked)
    assert (found["subject"], found["style"]) == (0, 0)
    assert found["layout"] >= 0.99


def test_the_map_to_latents_is_undone():
    pictures = world.draw(8, 0).pixels
    assert np.abs(model.pixels(model.latents(pictures)) - pictures).max() < 1e-6


def test_a_stopped_run_goes_on_as_an_unbroken_one(tmp_path: Path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train.base(TINY, unbroken).run(4, 4)
    train.base(TINY, broken).run(2, 2)
    resumed = train.base(TINY, broken)
    assert resumed.step == 2
    resumed.run(4, 4)
    whole = train.base(TINY, unbroken)
    assert resumed.losses == whole.losses
    for one, other in zip(resumed.average.parameters(), whole.average.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Base, student, two LoRAs and an adapter; our reader takes them, and their merge does what both do together."""
    where = ["--folder", str(tmp_path), *SMALLER]
    main(["base", *where, *RUN, "--steps", "2"])
    main(["distill", *where, *RUN, "--steps", "2"])
    main(["loras", *where, *["--what", "zib", "gleb", "--seeds", "0", "--rank", "4", "--steps", "2", "--adapter"]])
    files = sorted(tmp_path.glob("*/turbo*/step2/*.safetensors"))
    assert len(files) == 3
    zib, gleb = (next(path for path in files if path.name.startswith(what)) for what in ("zib", "gleb"))
    assert len(load_lora(zib).changes) == 2 * len(loras.MODULES)
    merged = tmp_path / "merged.safetensors"
    merge([(zib, 0.7), (gleb, 0.5)], shapes="free", dtype="fp32").save(merged)
    settings = train.Settings(TINY.size)
    student = train.turbo(train.base(settings, tmp_path), settings, train.Distillation())
    assert student.step == 2
    features = model.caption_features(["two zib northwest southeast gleb even"], TINY.size.caption)
    with loras.worn(student.average, (loras.load(zib), 0.7), (loras.load(gleb), 0.5)):
        both = model.sample(student.average, features, 0, 4)
    with loras.worn(student.average, (loras.load(merged), 1.0)):
        one = model.sample(student.average, features, 0, 4)
    without = model.sample(student.average, features, 0, 4)
    assert torch.allclose(both, one, atol=1e-4)
    assert not torch.allclose(without, one, atol=1e-4)
    capsys.readouterr()
    main(["judge", "turbo", *where, "--lora", f"{merged}:0.5", "--what", "zib", "gleb", "--count", "2"])
    assert set(json.loads(capsys.readouterr().out)) >= {"subject", "style", "layout", "burned"}

"""What LoRAs were trained on: from the job's training and from files' metadata, carried through merges by name alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from oracles.dense import read_metadata
from workspace import Workspace

from extensions_built_in.zit_merge.formats.metadata import bases, bases_differ

TURBO = {
    "name_or_path": "Tongyi-MAI/Z-Image-Turbo",
    "arch": "zimage:turbo",
    "assistant_lora_path": "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors",
}
BASE = {
    "model": "Tongyi-MAI/Z-Image-Turbo",
    "arch": "zimage:turbo",
    "adapter": "zimage_turbo_training_adapter_v2.safetensors",
}
STYLE = {"lora": "style.safetensors", "ratio": 0.5}


def run(work: Workspace, model: dict[str, Any], *steps: dict[str, Any]) -> str:
    """A training that is done, and a section behind it; what the run says."""
    work.lora("output/cat/cat.safetensors")
    work.lora("style.safetensors", "musubi", seed=1)
    return work.zit("run", work.config(work.training(model=model), work.section(*steps))).ok()


def base_of_file(work: Workspace, name: str) -> object:
    text = read_metadata(work.out / f"merged_cat_{name}.safetensors").get("zit_merge.base")
    return text and json.loads(text)


def test_the_base_of_the_jobs_training(work):
    trained = {"lora": "trained", "ratio": 1.0}
    steps = [
        {"name": "a", "loras": [trained, STYLE]},
        {"name": "b", "loras": [{"lora": "a", "ratio": 1.0}, trained]},
        {"name": "none", "loras": [STYLE, trained | {"ratio": 0}]},
    ]
    assert "different bases" not in run(work, TURBO, *steps)
    assert base_of_file(work, "a") == base_of_file(work, "b") == [BASE]
    assert base_of_file(work, "none") is None  # it is not in there
    work.zit(
        "merge", work.out / "merged_cat_a.safetensors", STYLE["lora"], "-o", "more.safetensors", "--ratio", 1, "--shapes", "free"
    ).ok()
    assert json.loads(read_metadata(work.folder / "more.safetensors")["zit_merge.base"]) == [BASE]
    assert json.loads(work.zit("inspect", "more.safetensors", "--json").ok())["base"] == [BASE]
    text = " ".join(work.zit("inspect", "more.safetensors").ok().split())
    assert "trained on Tongyi-MAI/Z-Image-Turbo, zimage:turbo, adapter zimage_turbo_training_adapter_v2.safetensors" in text


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image-Turbo"),
        ("/home/alice/models/Z-Image-Turbo/", "Z-Image-Turbo"),
        (r"C:\Users\alice\models\zit", "zit"),
        ("alice/zit.safetensors", "zit.safetensors"),
        ("./alice/zit", "zit"),
        ("~/alice/zit", "zit"),
        ("alice/here", "here"),  # as AI-Toolkit, which takes a folder that is there for one
        ("https://example.org/alice/zit.safetensors", "zit.safetensors"),
    ],
)
def test_only_names(work, model, name):
    (work.folder / "alice" / "here").mkdir(parents=True)
    run(
        work,
        {"name_or_path": model, "assistant_lora_path": "/home/alice/v2.safetensors"},
        {"name": "a", "loras": [{"lora": "trained", "ratio": 1}]},
    )
    assert base_of_file(work, "a") == [{"model": name, "adapter": "v2.safetensors"}]
    assert "alice" not in "".join(read_metadata(work.out / "merged_cat_a.safetensors").values())


@pytest.mark.parametrize("model", [{}, {"name_or_path": 3, "arch": None}, {"name_or_path": " "}], ids=str)
def test_what_a_job_does_not_say_is_not_written(work, model):
    work.lora("output/cat/cat.safetensors")
    section = work.section({"name": "a", "checkpoints": {"last": 1}})
    work.zit("run", work.config(work.training(model=model), section)).ok()
    assert base_of_file(work, "a") is None


def test_a_recipe_makes_the_same_bytes_without_the_job(work):
    run(work, TURBO, {"name": "a", "loras": [{"lora": "trained", "ratio": 1.0}, STYLE]})
    made = work.out / "merged_cat_a.safetensors"
    recipe = work.recipe(made)
    (work.folder / "output" / "cat").rename(work.folder / "attic")
    assert work.again(recipe, "--loras", work.folder / "attic").read_bytes() == made.read_bytes()
    loras = json.loads(read_metadata(made)["zit_merge.recipe"])["steps"][0]["loras"]
    assert [lora.get("trained_on") for lora in loras] == [BASE, None]


def test_the_dry_run_before_the_training_and_different_bases(work):
    work.lora("style.safetensors", "musubi", seed=1, metadata={"ss_sd_model_name": "z_image_de_turbo_v1_bf16.safetensors"})
    section = work.section({"name": "a", "loras": [{"lora": "trained", "ratio": 1.0}, STYLE]})
    text = " ".join(work.zit("check", work.config(work.training(model=TURBO), section)).out.split())
    said = "style.safetensors: z_image_de_turbo_v1_bf16.safetensors"
    assert (
        "note: LoRAs of different bases" in text
        and said in text
        and "cat.safetensors: Tongyi-MAI/Z-Image-Turbo, zimage:turbo" in text
    )
    section = work.section({"name": "a", "loras": [{"lora": "trained", "ratio": 1.0}, STYLE | {"ratio": 0}]})
    assert "different bases" not in work.zit("check", work.config(work.training(model=TURBO), section)).out


SAYS = {  # metadata -> what is certain
    "AI-Toolkit, musubi": ({"ss_base_model_version": "zimage", "training_info": '{"step": 3}'}, []),
    "modelspec": ({"ss_base_model_version": "z_image", "modelspec.architecture": "Z-Image/lora"}, []),
    "SimpleTuner": ({"modelspec.architecture": "z-image-turbo/lora"}, [{"arch": "z-image-turbo"}]),
    "musubi": ({"ss_sd_model_name": "/home/alice/z_image_turbo_bf16.safetensors"}, [{"model": "z_image_turbo_bf16.safetensors"}]),
    "OneTrainer": ({"ot_config": '{"base_model_name": "Tongyi-MAI/Z-Image-Turbo"}'}, [{"model": "Tongyi-MAI/Z-Image-Turbo"}]),
    "broken": ({"ot_config": "[1]", "zit_merge.base": '{"model": 1}', "ss_sd_model_name": ""}, []),
    "broken list": ({"zit_merge.base": '[1, {"model": 1}, {"arch": "zimage"}, {"arch": "zimage"}]'}, [{"arch": "zimage"}]),
}


@pytest.mark.parametrize("case", SAYS)
def test_what_files_say(case):
    metadata, wanted = SAYS[case]
    assert bases(metadata) == wanted


@pytest.mark.parametrize(
    ("one", "two", "differ"),
    [
        ({"model": "Tongyi-MAI/Z-Image-Turbo"}, {"model": "z_image_turbo_bf16.safetensors"}, False),
        ({"model": "z_image_turbo-fp8_e4m3fn.safetensors"}, {"model": "z_image_turbo-Q8_0.gguf"}, False),
        ({"model": "Z-Image-Turbo"}, {"model": "Z-Image"}, True),
        ({"arch": "zimage:turbo"}, {"arch": "z-image-turbo"}, False),
        ({"arch": "zimage:turbo"}, {"arch": "zimage:deturbo"}, True),
        ({"arch": "zimage:turbo"}, {"model": "Z-Image"}, False),
        ({"adapter": "v1.safetensors"}, {"adapter": "v2.safetensors"}, True),
    ],
)
def test_which_names_are_of_different_bases(one, two, differ):
    assert bases_differ([one, two]) is bases_differ([two, one]) is differ

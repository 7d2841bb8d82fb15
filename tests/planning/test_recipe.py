"""A recipe makes the same file again, wherever its inputs lie by then."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from oracles import producers
from oracles.dense import read_metadata
from safetensors.torch import load_file, save_file
from workspace import FEW, Workspace, empty_hub_cache, put_into_hub_cache

from extensions_built_in.zit_merge.config import presets
from extensions_built_in.zit_merge.files import hub

ME = {
    "lora": "me.safetensors",
    "ratio": 0.9,
    "blocks": {"adaLN": 0.7, "attention": 0.9, "to_q": 1.1},
    "layers": {3: 0.25, "0-9": 0.5, "10-29": [1.0, 0.6]},
    "overrides": {"20-25.to_v": 1.3},
}
STYLE = {"lora": "style.safetensors", "ratio": 1, "effects": {"composition": 1e-5, "color_light": 1.3}}
ONE_STEP = {"name": "a", "loras": [ME, STYLE]}
K = "diffusion_model.layers.0.attention.to_k"
ELSEWHERE = "elsewhere/recipe.yaml"  # a folder in which none of the inputs lies
pytestmark = pytest.mark.usefixtures("few")


def move_and_rename(work: Workspace, *paths: Path) -> Path:
    """The folder where the inputs lie from now on, under other names and among other files."""
    folder = work.folder / "attic"
    work.lora("attic/deep/another.safetensors", seed=99)
    for i, path in enumerate(paths):
        path.rename(folder / "deep" / f"{len(paths) - i}_renamed.safetensors")
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 3},
        {"rank": "same", "save": {"dtype": "fp32"}},
        {"save": {"dtype": "same"}},
        {"rank": 2, "save": {"dtype": "fp16"}, "confirm_size": True},
    ],
    ids=str,
)
def test_a_recipe_makes_the_same_bytes_from_inputs_renamed_and_moved(work, loras, settings):
    work.zit("run", work.job(ONE_STEP | settings)).ok()
    made = work.out / "merged_cat_a.safetensors"
    recipe = work.recipe(made, ELSEWHERE)
    attic = move_and_rename(work, *loras)
    remade = work.again(recipe, "--loras", attic)
    assert remade.name == made.name and remade.read_bytes() == made.read_bytes()


def test_inputs_beside_the_recipe_need_no_flag(work, loras):
    work.zit("run", work.job(ONE_STEP)).ok()
    made = work.out / "merged_cat_a.safetensors"
    assert work.again(work.recipe(made)).read_bytes() == made.read_bytes()


@pytest.mark.parametrize("keep", [True, False])
def test_a_recipe_carries_the_steps_that_it_uses(work, loras, keep):
    steps = [
        {"name": "a", "rank": 3, "keep": keep, "loras": [ME, STYLE]},
        {"name": "b", "loras": [{"lora": "a", "ratio": 0.5}], "save": {"dtype": "fp32"}, "keep": keep},
        {"name": "unused", "loras": [STYLE]},
        {"name": "c", "rank": "same", "loras": [{"lora": "b", "ratio": 1.0}, {"lora": "a", "ratio": -0.5}, STYLE]},
    ]
    work.zit("run", work.job(*steps)).ok()
    made = work.out / "merged_cat_c.safetensors"
    recipe = work.recipe(made, ELSEWHERE)
    assert [s["name"] for s in yaml.safe_load(recipe.read_text())["steps"]] == ["a", "b", "c"]
    remade = work.again(recipe, "--loras", move_and_rename(work, *loras))
    assert remade.read_bytes() == made.read_bytes()


def test_a_recipe_remembers_what_was_left_out(work):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["diffusion_model.layers.0.attention.to_x.lora_A.weight"] = torch.ones(2, 8)

    source = work.lora("me.safetensors", change=spoil)
    config = work.job({"name": "a", "loras": [ME], "allow_unmatched": True})
    work.zit("run", config).ok()
    made = work.out / "merged_cat_a.safetensors"
    recipe = work.recipe(made, ELSEWHERE)
    (step,) = yaml.safe_load(recipe.read_text())["steps"]
    assert step["allow_unmatched"] is True
    assert step["loras"][0]["unmatched"] == ["diffusion_model.layers.0.attention.to_x.lora_A.weight"]
    remade = work.again(recipe, "--loras", move_and_rename(work, source))
    assert remade.read_bytes() == made.read_bytes()


@pytest.mark.parametrize("source", ["trained", "trained@2500"])
def test_a_recipe_of_a_trained_file(work, source):
    trained = [work.lora(f"output/cat/{name}.safetensors") for name in ("cat", "cat_000002500")]
    section = work.section({"name": "a", "loras": [{"lora": source, "ratio": 0.9}]})
    work.zit("run", work.config(work.training(), section)).ok()
    made = work.out / "merged_cat_a.safetensors"
    recipe = work.recipe(made, ELSEWHERE)
    remade = work.again(recipe, "--loras", move_and_rename(work, *trained))
    assert remade.read_bytes() == made.read_bytes()


def test_a_recipe_of_a_file_that_got_another_prefix(work, loras):
    section = work.section({"name": "a", "loras": [ME]}, output_dir=str(work.folder / "output" / "m"))
    work.zit("run", work.config(work.training(), section, job="m")).ok()
    (made,) = (work.folder / "output" / "m").glob("*.safetensors")
    remade = work.again(work.recipe(made, ELSEWHERE), "--loras", work.folder)
    assert remade.read_bytes() == made.read_bytes()


def test_a_recipe_of_a_merge_from_the_command_line(work, real_loras):
    work.zit("merge", *real_loras, "-o", "both.safetensors", "--ratio", 1, 0.5, "--to_q", 0.5, "--device", "cpu").ok()
    made = work.folder / "both.safetensors"
    recipe = work.recipe(made, ELSEWHERE)
    remade = work.again(recipe, "--loras", move_and_rename(work, *real_loras))
    assert remade.read_bytes() == made.read_bytes()


def test_a_recipe_of_a_remade_file_is_the_same_recipe(work, loras):
    work.zit("run", work.job(ONE_STEP)).ok()
    made = work.out / "merged_cat_a.safetensors"
    remade = work.again(work.recipe(made, ELSEWHERE), "--loras", work.folder)
    assert work.zit("recipe", remade).ok() == work.zit("recipe", made).ok()


def test_two_runs_make_the_same_bytes(work, loras):
    made = []
    for _ in range(2):
        work.zit("run", work.job(ONE_STEP | {"rank": 2})).ok()
        made.append((work.out / "merged_cat_a.safetensors").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("key", ["layers", "blocks", "keys"])
def test_the_order_of_keys_has_no_influence_on_the_tensors(work, loras, key):
    turned = dict(reversed(ME.items())) if key == "keys" else ME | {key: dict(reversed(ME[key].items()))}
    contents = []
    for lora in (ME, turned):
        work.zit("run", work.job({"name": "a", "loras": [lora]})).ok()
        with (work.out / "merged_cat_a.safetensors").open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            contents.append(file.read())
    assert contents[0] == contents[1]


def test_no_folders_dates_or_hashes_of_inputs_stand_in_the_metadata(work, monkeypatch):
    work.lora("secret_folder/me.safetensors")
    work.lora("secret_folder/style.safetensors", "onetrainer-legacy", seed=1)
    work.zit("run", work.job(ONE_STEP), "--loras", work.folder / "secret_folder").ok()
    values = read_metadata(work.out / "merged_cat_a.safetensors")
    text = json.dumps(values)
    for forbidden in ("secret_folder", str(work.folder), work.folder.name, str(Path.home()), "2026", "ffffffff", "date", "time"):
        assert forbidden not in text
    assert not any(k.startswith(("sshs_", "ss_network", "ss_training", "ot_")) for k in values)
    assert not {"training_info", "modelspec.hash_sha256", "modelspec.date"} & set(values)


def test_what_stands_in_the_metadata(work, loras):
    work.zit("run", work.job(ONE_STEP)).ok()
    values = read_metadata(work.out / "merged_cat_a.safetensors")
    assert values["modelspec.architecture"] == "Z-Image/lora"
    assert values["ss_output_name"] == "merged_cat_a"
    assert values["modelspec.merged_from"] == "me, musubi"  # musubi's file has a modelspec.title
    assert values["modelspec.trigger_phrase"] == "trg_ai_toolkit"
    tags = {"trg_musubi": 40, "portrait": 7, "trg_ai_toolkit": 1}
    assert json.loads(values["ss_tag_frequency"]) == {"1_merged_cat_a": tags}
    assert "ss_base_model_version" in values


def test_the_recipe_names_files_by_name_and_hash_and_holds_the_whole_table(work, loras):
    work.zit("run", work.job(ONE_STEP)).ok()
    (recipe,) = (json.loads(v) for k, v in read_metadata(work.out / "merged_cat_a.safetensors").items() if "recipe" in k)
    (step,) = recipe["steps"]
    raw = loras[0].read_bytes()
    wanted = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert (step["loras"][0]["lora"], step["loras"][0]["sha256"]) == ("me.safetensors", wanted)
    table = step["loras"][0]["strengths"]
    assert table["3"] == pytest.approx([0.9 * 0.25 * w for w in (0.7, 1.1, 0.9, 0.9, 0.9, 1, 1, 1)])
    assert table["29"] == pytest.approx([0.9 * 0.6 * w for w in (0.7, 1.1, 0.9, 0.9, 0.9, 1, 1, 1)])
    assert table["noise_refiner"] == pytest.approx([0.9 * w for w in (0.7, 1.1, 0.9, 0.9, 0.9, 1, 1, 1)])
    assert table["other"] == [0.9] * 6


def edited(work: Workspace, change: Callable[[dict], object]) -> Path:
    """The recipe of a merge of both LoRAs, after a change of its data."""
    work.zit("run", work.job(ONE_STEP)).ok()
    recipe = yaml.safe_load(work.zit("recipe", work.out / "merged_cat_a.safetensors").ok())
    change(recipe["steps"][0]["loras"][0])
    return work.write(recipe, "recipe.yaml")


def test_a_changed_strength_table_is_refused(work, loras):
    recipe = edited(work, lambda lora: lora["strengths"]["3"].__setitem__(0, 0.5))
    message = work.zit("run", recipe, "--output-dir", "again").refused()
    assert message.startswith("steps[0].loras[0].strengths: the table does not follow from ratio")
    assert not Path("again").exists()


def test_changed_weights_without_their_table_are_fine(work, loras):
    def change(lora: dict) -> None:
        lora["ratio"] = 0.5
        del lora["strengths"]

    assert work.again(edited(work, change)).is_file()


def test_a_changed_input_is_not_found(work, loras):
    recipe = edited(work, lambda lora: None)
    work.lora("me.safetensors", seed=7)
    message = work.zit("run", recipe, "--output-dir", "again", "--loras", work.folder).refused()
    assert message.startswith("steps[0].loras[0].lora: no file with the tensors of me.safetensors (sha256 ")
    assert "--loras" in message and not Path("again").exists()


def test_a_broken_hash_is_refused(work, loras):
    recipe = edited(work, lambda lora: lora.__setitem__("sha256", "abc"))
    assert work.zit("run", recipe, "--output-dir", "again").refused().startswith("steps[0].loras[0].sha256: ")


def test_a_recipe_needs_an_output_dir(work, loras):
    assert "--output-dir" in work.zit("run", edited(work, lambda lora: None)).refused()


def test_what_else_lies_in_the_folders_does_not_disturb_the_search(work, loras):
    work.zit("run", work.job(ONE_STEP)).ok()
    made = work.out / "merged_cat_a.safetensors"
    recipe = work.recipe(made, ELSEWHERE)
    attic = move_and_rename(work, *loras)
    (attic / "00_empty.safetensors").touch()
    (attic / "00_short.safetensors").write_bytes(b"abc")
    (attic / "00_text.safetensors").write_text("a download that failed")
    (attic / "00_folder.safetensors").mkdir()
    with contextlib.suppress(OSError):  # Windows without the right to make links
        (attic / "00_dangling.safetensors").symlink_to(attic / "gone")
    assert work.again(recipe, "--loras", attic).read_bytes() == made.read_bytes()


def test_odd_names_survive_the_recipe(work, real_loras):
    name = "50% ${off} [name] 'x' #1: é.safetensors"
    real_loras[0].rename(work.folder / name)
    work.zit("merge", name, "-o", "out.safetensors", "--ratio", 1).ok()
    recipe = work.recipe(work.folder / "out.safetensors", ELSEWHERE)
    assert yaml.safe_load(recipe.read_text(encoding="utf-8"))["steps"][0]["loras"][0]["lora"] == name
    assert work.again(recipe, "--loras", work.folder).is_file()


# --- presets -------------------------------------------------------------------------------------------------------------------

PRESET = {"lora": "me.safetensors", "ratio": 0.9, "preset": "late_20_29", "layers": {"0-19": 0.25}, "blocks": {"to_q": 0.5}}


def test_a_recipe_holds_the_expansion_of_a_preset(work, loras):
    work.zit("run", work.job({"name": "a", "loras": [PRESET, STYLE]})).ok()
    entry = yaml.safe_load(work.zit("recipe", work.out / "merged_cat_a.safetensors").ok())["steps"][0]["loras"][0]
    assert "preset" not in entry
    assert entry["layers"] == {"0-19": 0.25, "noise_refiner": 0, "context_refiner": 0, "other": 0}
    assert entry["blocks"] == {"to_q": 0.5}


@pytest.mark.parametrize(
    "keys",
    [
        {"preset": "late_20_29", "layers": {"0-19": 0.25}, "blocks": {"to_q": 0.5}},
        {"preset": "fade_in"},
        {"preset": "fade_in", "layers": [0.5] * 29 + [1]},
        {"preset": "adaln_only", "blocks": {"adaLN": -1}, "overrides": {"3.to_q": 2}},
        {"preset": "even_layers", "effects": {"detail": 2}},
    ],
    ids=str,
)
def test_a_recipe_of_a_preset_runs_without_it(work, loras, monkeypatch, keys):
    work.zit("run", work.job({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 0.9} | keys, STYLE]})).ok()
    made = work.out / "merged_cat_a.safetensors"
    recipe = work.recipe(made, ELSEWHERE)
    monkeypatch.setattr(presets, "presets", lambda: {})  # a later version may have dropped or changed it
    remade = work.again(recipe, "--loras", move_and_rename(work, *loras))
    assert remade.read_bytes() == made.read_bytes()


# --- alpha beside the tensors --------------------------------------------------------------------------------------------------


def peft_adapter(work: Workspace, name: str = "peft/adapter_model.safetensors") -> Path:
    """PEFT's adapter, whose alpha of 3/2 r stands in adapter_config.json alone."""
    path = work.lora(name, "peft")
    producers.save_sidecars(producers.PRODUCERS["peft"].make(FEW, 2, 0, torch.bfloat16), path.parent)
    return path


def scale_of(path: Path, source: Path, module: str = "layers.3.attention.to_v") -> float:
    """How many times the product of the stored factors of the source is in a merged file."""
    stored, made = load_file(source), load_file(path)
    a, b = next(
        (stored[f"{p}{module}.lora_A.weight"], stored[f"{p}{module}.lora_B.weight"])
        for p in ("base_model.model.", "transformer.")
        if f"{p}{module}.lora_A.weight" in stored
    )
    delta = b.double() @ a.double()
    got = made[f"diffusion_model.{module}.lora_B.weight"].double() @ made[f"diffusion_model.{module}.lora_A.weight"].double()
    return float((got * delta).sum() / delta.square().sum())


@pytest.mark.parametrize("gone", ["deleted", "changed"])
def test_a_recipe_carries_the_adapter_config(work, gone):
    source = peft_adapter(work)
    work.zit("run", work.job({"name": "a", "loras": [{"lora": str(source), "ratio": 1.0}], "save": {"dtype": "fp32"}})).ok()
    made = work.out / "merged_cat_a.safetensors"
    assert scale_of(made, source) == pytest.approx(1.5, rel=1e-6)
    recipe = work.recipe(made, ELSEWHERE)
    assert yaml.safe_load(recipe.read_text())["steps"][0]["loras"][0]["adapter"]["lora_alpha"] == 3
    config = source.parent / "adapter_config.json"
    if gone == "deleted":
        config.unlink()
        assert (
            "adapter_config.json"
            in work.zit("run", work.job({"name": "b", "loras": [{"lora": str(source), "ratio": 1}]})).refused()
        )
    else:
        config.write_text(json.dumps({"lora_alpha": 77, "r": 2}))
    remade = work.again(recipe, "--loras", move_and_rename(work, source) if gone == "deleted" else source.parent)
    assert remade.read_bytes() == made.read_bytes()


@pytest.mark.parametrize("name", ["simpletuner-peft", "diffusers-alpha", "diffusers-rslora", "diffusers-patterns"])
@pytest.mark.parametrize("how", ["stripped", "as it is"])
def test_a_recipe_carries_what_the_metadata_said_of_alpha(work, name, how):
    """The hash covers the tensors alone: a program that strips or rewrites metadata must not change the merge."""
    source = work.lora("me.safetensors", name, rank=4)
    work.zit("run", work.job({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 0.9}]})).ok()
    made = work.out / "merged_cat_a.safetensors"
    recipe = work.recipe(made, ELSEWHERE)
    if how == "stripped":
        save_file(load_file(source), source)
        assert "lora_adapter_metadata" not in read_metadata(source)
        other = work.folder / "other"
        work.zit("run", work.job({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 0.9}]}, output_dir=str(other))).ok()
        assert (other / made.name).read_bytes() != made.read_bytes()  # without the recipe it is another strength
    assert work.again(recipe, "--loras", work.folder).read_bytes() == made.read_bytes()


@pytest.mark.parametrize("adapter", [{}, {"lora_alpha": "x"}, {"lora_alpha": 1, "alpha_pattern": {"(": 2}}], ids=str)
def test_a_broken_adapter_of_a_recipe_is_refused(work, adapter):
    source = peft_adapter(work)
    work.zit("run", work.job({"name": "a", "loras": [{"lora": str(source), "ratio": 1.0}]})).ok()
    recipe = yaml.safe_load(work.zit("recipe", work.out / "merged_cat_a.safetensors").ok())
    recipe["steps"][0]["loras"][0]["adapter"] = adapter
    message = work.zit("run", work.write(recipe, "peft/r.yaml"), "--output-dir", "again").refused()
    assert message.startswith("steps[0].loras[0].adapter: ")


@pytest.mark.parametrize("alpha", ["none", 5, "metadata"])
def test_a_recipe_remembers_the_answer_about_alpha(work, alpha):
    source = peft_adapter(work)
    lora = {"lora": str(source), "ratio": 1.0, "alpha": alpha}
    work.zit("run", work.job({"name": "a", "loras": [lora], "save": {"dtype": "fp32"}})).ok()
    made = work.out / "merged_cat_a.safetensors"
    assert scale_of(made, source) == pytest.approx({"none": 1.0, 5: 2.5, "metadata": 1.5}[alpha], rel=1e-6)
    recipe = work.recipe(made, ELSEWHERE)
    assert yaml.safe_load(recipe.read_text())["steps"][0]["loras"][0]["alpha"] == alpha
    (source.parent / "adapter_config.json").unlink()
    assert work.again(recipe, "--loras", source.parent).read_bytes() == made.read_bytes()


@pytest.mark.parametrize("qkv", ["split", "fused", "sum"])
def test_a_recipe_remembers_the_answer_about_qkv(work, qkv):
    pair = {f"layers.0.attention.to_{c}": torch.eye(8)[i : i + 1] for i, c in enumerate("qkv")}
    tensors = {f"diffusion_model.{m}.lora_A.weight": row.clone() for m, row in pair.items()}
    tensors |= {f"diffusion_model.{m}.lora_B.weight": torch.ones(8, 1) for m in pair}
    tensors["diffusion_model.layers.0.attention.qkv.lora_A.weight"] = torch.ones(1, 8)
    tensors["diffusion_model.layers.0.attention.qkv.lora_B.weight"] = torch.full((24, 1), 10.0)
    save_file(tensors, "twice.safetensors")
    lora = {"lora": "twice.safetensors", "ratio": 1.0}
    message = work.zit("run", work.job({"name": "a", "loras": [lora]})).refused()
    assert "set qkv: split, fused or sum" in message
    work.zit("run", work.job({"name": "a", "loras": [lora | {"qkv": qkv}]})).ok()
    made = work.out / "merged_cat_a.safetensors"
    split, fused = torch.ones(8, 1) @ pair["layers.0.attention.to_k"], torch.full((8, 8), 10.0)
    out = load_file(made)
    found = out[f"{K}.lora_B.weight"].float() @ out[f"{K}.lora_A.weight"].float()
    assert torch.equal(found, {"split": split, "fused": fused, "sum": split + fused}[qkv])
    assert work.again(work.recipe(made, ELSEWHERE), "--loras", work.folder).read_bytes() == made.read_bytes()


def test_a_recipe_remembers_what_was_dropped(work):
    work.lora("me.safetensors", "comfyui-train-all")
    lora = {"lora": "me.safetensors", "ratio": 1.0}
    assert "drop: [norm]" in work.zit("run", work.job({"name": "a", "loras": [lora]})).refused()
    assert "drop: [bias]" in work.zit("run", work.job({"name": "a", "loras": [lora | {"drop": ["norm"]}]})).refused()
    work.zit("run", work.job({"name": "a", "loras": [lora | {"drop": ["norm", "bias"]}]})).ok()
    made = work.out / "merged_cat_a.safetensors"
    recipe = work.recipe(made, ELSEWHERE)
    assert yaml.safe_load(recipe.read_text())["steps"][0]["loras"][0]["drop"] == ["norm", "bias"]
    assert work.again(recipe, "--loras", work.folder).read_bytes() == made.read_bytes()


# --- sources on the hub --------------------------------------------------------------------------------------------------------

COMMIT, NEWER = "0123456789" * 4, "b" * 40
HUB = "hf:user/repo/sub/style.safetensors"


@pytest.fixture
def hub_cache(tmp_path_factory, monkeypatch) -> Path:
    """An empty cache of the hub, and no network at all."""

    def nobody(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, nobody)
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    return empty_hub_cache(tmp_path_factory.mktemp("hub"), monkeypatch)


def cache(folder: Path, source: Path, commit: str = COMMIT) -> Path:
    """Puts a file into the cache under the name of HUB, as what main is now."""
    return put_into_hub_cache(folder, commit, "sub/style.safetensors", source.read_bytes(), "main")


FROM_HUB = {"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 0.9}, {"lora": HUB, "ratio": 0.5}]}


@pytest.mark.parametrize("command", [("check",), ("run", "--dry-run")], ids=str)
@pytest.mark.parametrize("offline", [True, False])
def test_a_source_that_nobody_has_fetched_is_a_note_and_no_download(work, loras, hub_cache, monkeypatch, command, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    text = " ".join(work.zit(command[0], work.job(FROM_HUB), *command[1:]).ok().split())
    assert "style.safetensors is not in the local cache: it is fetched from the hub when the merge runs" in text
    assert "still on the hub" in text and "size not known yet" in text
    assert list(hub_cache.iterdir()) == [] and work.files() == []


def test_what_else_is_wrong_is_found_without_the_file(work, loras, hub_cache):
    step = FROM_HUB | {"loras": [{"lora": HUB, "ratio": 0.5, "blocks": {"to_w": 1}}]}
    assert work.zit("check", work.job(step)).refused().startswith("process[0].steps[0].loras[0].blocks.to_w: ")
    step = FROM_HUB | {"loras": [{"lora": "hf:user/style.safetensors", "ratio": 0.5}]}
    assert (
        work.zit("check", work.job(step)).refused().startswith("process[0].steps[0].loras[0].lora: 'hf:user/style.safetensors'")
    )


def test_a_run_without_the_file_and_without_the_network_is_refused(work, loras, hub_cache):
    message = work.zit("run", work.job(FROM_HUB)).refused()
    assert message.startswith("process[0].steps[0].loras[1].lora: ") and "HF_HUB_OFFLINE" in message
    assert work.files() == []


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_file_of_the_cache_is_merged_offline_and_pinned(work, loras, hub_cache, revision):
    cache(hub_cache, loras[1])
    step = FROM_HUB | {"loras": [FROM_HUB["loras"][0], {"lora": HUB + revision, "ratio": 0.5}]}
    local = FROM_HUB | {"name": "local", "loras": [FROM_HUB["loras"][0], {"lora": "style.safetensors", "ratio": 0.5}]}
    work.zit("run", work.job(step, local)).ok()
    made = work.out / "merged_cat_a.safetensors"
    one, two = load_file(made), load_file(work.out / "merged_cat_local.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    entry = yaml.safe_load(work.zit("recipe", made).ok())["steps"][0]["loras"][1]
    raw = loras[1].read_bytes()
    assert entry["lora"] == f"{HUB}@{COMMIT}"
    assert entry["sha256"] == hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert str(hub_cache) not in json.dumps(read_metadata(made))
    assert "style" in read_metadata(made)["modelspec.merged_from"] or "musubi" in read_metadata(made)["modelspec.merged_from"]


def test_a_repository_of_one_file_is_pinned_to_the_file_and_its_commit(work, loras, hub_cache):
    step = FROM_HUB | {"loras": [FROM_HUB["loras"][0], {"lora": "hf:user/repo", "ratio": 0.5}]}
    text = " ".join(work.zit("check", work.job(step)).ok().split())
    assert "repo is not in the local cache: it is fetched from the hub when the merge runs" in text
    path = put_into_hub_cache(hub_cache, COMMIT, "style.safetensors", loras[1].read_bytes(), "main")
    work.zit("run", work.job(step)).ok()
    made = work.out / "merged_cat_a.safetensors"
    entry = yaml.safe_load(work.zit("recipe", made).ok())["steps"][0]["loras"][1]
    raw = path.read_bytes()
    assert entry["lora"] == f"hf:user/repo/style.safetensors@{COMMIT}"
    assert entry["sha256"] == hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    put_into_hub_cache(hub_cache, COMMIT, "other.safetensors", b"another", "main")
    message = work.zit("check", work.job(step)).refused()
    assert message.startswith("process[0].steps[0].loras[1].lora: hf:user/repo names no .safetensors file")
    assert "holds 2 at its top in the local cache (other.safetensors, style.safetensors)" in message
    remade = work.again(work.recipe(made, ELSEWHERE), "--loras", work.folder)
    assert remade.read_bytes() == made.read_bytes()


@pytest.mark.parametrize("where", ["cache", "--loras", "moved branch"])
def test_a_recipe_of_a_hub_source_runs_offline(work, loras, hub_cache, where):
    path = cache(hub_cache, loras[1])
    work.zit("run", work.job(FROM_HUB)).ok()
    made = work.out / "merged_cat_a.safetensors"
    recipe = work.recipe(made, ELSEWHERE)
    loras[1].unlink()
    hub._pins.clear()
    folder = work.folder / "attic"
    folder.mkdir()
    loras[0].rename(folder / "renamed.safetensors")
    if where == "--loras":
        (folder / "another name.safetensors").write_bytes(path.read_bytes())
        shutil.rmtree(hub_cache / "models--user--repo")
    if where == "moved branch":
        work.lora("newer.safetensors", seed=7)
        cache(hub_cache, work.folder / "newer.safetensors", NEWER)
    remade = work.again(recipe, "--loras", folder)
    assert remade.read_bytes() == made.read_bytes()
    assert work.zit("recipe", remade).ok() == work.zit("recipe", made).ok()


@pytest.mark.parametrize("command", ["run", "check"])
def test_other_bytes_than_the_recipes_are_refused(work, loras, hub_cache, command):
    path = cache(hub_cache, loras[1])
    work.zit("run", work.job(FROM_HUB)).ok()
    recipe = work.recipe(work.out / "merged_cat_a.safetensors")
    path.resolve().write_bytes(work.lora("other.safetensors", "musubi", rank=3, seed=9).read_bytes())
    message = work.zit(command, recipe, "--output-dir", "again").refused()
    assert message.startswith("steps[0].loras[1].lora: ") and "does not hold the tensors of the recipe" in message
    assert not Path("again").exists()


def test_a_name_on_the_hub_is_no_name_of_a_step_or_file(work, loras, hub_cache):
    """The file name alone is no source: what lies in the working directory by that name is another file."""
    cache(hub_cache, work.lora("elsewhere.safetensors", "musubi", rank=3, seed=5))
    work.zit("run", work.job({"name": "a", "loras": [{"lora": HUB, "ratio": 1.0}], "save": {"dtype": "same"}})).ok()
    found = load_file(work.out / "merged_cat_a.safetensors")
    stored = load_file("elsewhere.safetensors")
    assert torch.equal(found[f"{K}.lora_A.weight"], stored["lora_unet_layers_0_attention_to_k.lora_down.weight"])


def test_merge_of_the_command_line_takes_a_hub_source(work, real_loras, hub_cache):
    cache(hub_cache, real_loras[1])
    work.zit("merge", real_loras[0], HUB, "-o", "o.safetensors", "--ratio", 1, 0.5, "--device", "cpu").ok()
    entry = yaml.safe_load(work.zit("recipe", "o.safetensors").ok())["steps"][0]["loras"][1]
    assert entry["lora"] == f"{HUB}@{COMMIT}"

"""A recipe makes the same file again, wherever its inputs lie by then."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from desk import Desk
from safetensors import safe_open

ME = {
    "lora": "me.safetensors",
    "ratio": 0.9,
    "blocks": {"adaLN": 0.7, "attention": 0.9, "to_q": 1.1},
    "layers": {3: 0.25, "0-9": 0.5, "10-29": [1.0, 0.6]},
    "overrides": {"20-25.to_v": 1.3},
}
STYLE = {"lora": "style.safetensors", "ratio": 1, "effects": {"composition": 1e-5, "color_light": 1.3}}
ONE_STEP = {"name": "a", "loras": [ME, STYLE]}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def printed_recipe(desk: Desk, path: Path, name: str = "elsewhere/recipe.yaml") -> Path:
    """What `recipe FILE` prints, as a file in a folder of its own."""
    (desk.folder / name).parent.mkdir(parents=True, exist_ok=True)
    return desk.write(desk.zit("recipe", path).ok(), name)


def move_and_rename(desk: Desk, *paths: Path) -> Path:
    """The folder where the inputs lie from now on, under other names and among other files."""
    folder = desk.folder / "attic"
    desk.lora("attic/deep/another.safetensors", seed=99)
    for i, path in enumerate(paths):
        path.rename(folder / "deep" / f"{len(paths) - i}_renamed.safetensors")
    return folder


def again(desk: Desk, recipe: Path, *words: object) -> Path:
    """The one file that a recipe makes."""
    folder = desk.folder / "again"
    shutil.rmtree(folder, ignore_errors=True)
    desk.zit("run", recipe, "--output-dir", folder, *words).ok()
    (path,) = folder.iterdir()
    return path


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
def test_a_recipe_makes_the_same_bytes_from_inputs_renamed_and_moved(desk, loras, settings):
    desk.zit("run", desk.job(ONE_STEP | settings)).ok()
    made = desk.out / "merged_cat_a.safetensors"
    recipe = printed_recipe(desk, made)
    attic = move_and_rename(desk, *loras)
    remade = again(desk, recipe, "--loras", attic)
    assert remade.name == made.name and remade.read_bytes() == made.read_bytes()


def test_inputs_beside_the_recipe_need_no_flag(desk, loras):
    desk.zit("run", desk.job(ONE_STEP)).ok()
    made = desk.out / "merged_cat_a.safetensors"
    assert again(desk, printed_recipe(desk, made, "recipe.yaml")).read_bytes() == made.read_bytes()


@pytest.mark.parametrize("keep", [True, False])
def test_a_recipe_carries_the_steps_that_it_uses(desk, loras, keep):
    steps = [
        {"name": "a", "rank": 3, "keep": keep, "loras": [ME, STYLE]},
        {"name": "b", "loras": [{"lora": "a", "ratio": 0.5}], "save": {"dtype": "fp32"}, "keep": keep},
        {"name": "unused", "loras": [STYLE]},
        {"name": "c", "rank": "same", "loras": [{"lora": "b", "ratio": 1.0}, {"lora": "a", "ratio": -0.5}, STYLE]},
    ]
    desk.zit("run", desk.job(*steps)).ok()
    made = desk.out / "merged_cat_c.safetensors"
    recipe = printed_recipe(desk, made)
    assert [s["name"] for s in yaml.safe_load(recipe.read_text())["steps"]] == ["a", "b", "c"]
    remade = again(desk, recipe, "--loras", move_and_rename(desk, *loras))
    assert remade.read_bytes() == made.read_bytes()


def test_a_recipe_remembers_what_was_left_out(desk):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["diffusion_model.layers.0.attention.to_x.lora_A.weight"] = torch.ones(2, 8)

    source = desk.lora("me.safetensors", change=spoil)
    config = desk.job({"name": "a", "loras": [ME], "allow_unmatched": True})
    desk.zit("run", config).ok()
    made = desk.out / "merged_cat_a.safetensors"
    recipe = printed_recipe(desk, made)
    (step,) = yaml.safe_load(recipe.read_text())["steps"]
    assert step["allow_unmatched"] is True
    assert step["loras"][0]["unmatched"] == ["diffusion_model.layers.0.attention.to_x.lora_A.weight"]
    remade = again(desk, recipe, "--loras", move_and_rename(desk, source))
    assert remade.read_bytes() == made.read_bytes()


@pytest.mark.parametrize("source", ["trained", "trained@2500"])
def test_a_recipe_of_a_trained_file(desk, source):
    trained = [desk.lora(f"output/cat/{name}.safetensors") for name in ("cat", "cat_000002500")]
    section = desk.section({"name": "a", "loras": [{"lora": source, "ratio": 0.9}]})
    desk.zit("run", desk.config(desk.training(), section)).ok()
    made = desk.out / "merged_cat_a.safetensors"
    recipe = printed_recipe(desk, made)
    remade = again(desk, recipe, "--loras", move_and_rename(desk, *trained))
    assert remade.read_bytes() == made.read_bytes()


def test_a_recipe_of_a_file_that_got_another_prefix(desk, loras):
    section = desk.section({"name": "a", "loras": [ME]}, output_dir=str(desk.folder / "output" / "m"))
    desk.zit("run", desk.config(desk.training(), section, job="m")).ok()
    (made,) = (desk.folder / "output" / "m").iterdir()
    remade = again(desk, printed_recipe(desk, made), "--loras", desk.folder)
    assert remade.read_bytes() == made.read_bytes()


def test_a_recipe_of_a_merge_from_the_command_line(desk, real_loras):
    desk.zit("merge", *real_loras, "-o", "both.safetensors", "--ratio", 1, 0.5, "--to_q", 0.5, "--device", "cpu").ok()
    made = desk.folder / "both.safetensors"
    recipe = printed_recipe(desk, made)
    remade = again(desk, recipe, "--loras", move_and_rename(desk, *real_loras))
    assert remade.read_bytes() == made.read_bytes()


def test_a_recipe_of_a_remade_file_is_the_same_recipe(desk, loras):
    desk.zit("run", desk.job(ONE_STEP)).ok()
    made = desk.out / "merged_cat_a.safetensors"
    remade = again(desk, printed_recipe(desk, made), "--loras", desk.folder)
    assert desk.zit("recipe", remade).ok() == desk.zit("recipe", made).ok()


def test_two_runs_make_the_same_bytes(desk, loras):
    made = []
    for _ in range(2):
        desk.zit("run", desk.job(ONE_STEP | {"rank": 2})).ok()
        made.append((desk.out / "merged_cat_a.safetensors").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("key", ["layers", "blocks", "keys"])
def test_the_order_of_keys_has_no_influence_on_the_tensors(desk, loras, key):
    turned = dict(reversed(ME.items())) if key == "keys" else ME | {key: dict(reversed(ME[key].items()))}
    contents = []
    for lora in (ME, turned):
        desk.zit("run", desk.job({"name": "a", "loras": [lora]})).ok()
        with (desk.out / "merged_cat_a.safetensors").open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            contents.append(file.read())
    assert contents[0] == contents[1]


def test_no_folders_dates_or_hashes_of_inputs_stand_in_the_metadata(desk, monkeypatch):
    desk.lora("secret_folder/me.safetensors")
    desk.lora("secret_folder/style.safetensors", "onetrainer-legacy", seed=1)
    desk.zit("run", desk.job(ONE_STEP), "--loras", desk.folder / "secret_folder").ok()
    values = metadata(desk.out / "merged_cat_a.safetensors")
    text = json.dumps(values)
    for forbidden in ("secret_folder", str(desk.folder), desk.folder.name, str(Path.home()), "2026", "ffffffff", "date", "time"):
        assert forbidden not in text
    assert not any(k.startswith(("sshs_", "ss_network", "ss_training", "ot_")) for k in values)
    assert not {"training_info", "modelspec.hash_sha256", "modelspec.date"} & set(values)


def test_what_stands_in_the_metadata(desk, loras):
    desk.zit("run", desk.job(ONE_STEP)).ok()
    values = metadata(desk.out / "merged_cat_a.safetensors")
    assert values["modelspec.architecture"] == "Z-Image/lora"
    assert values["ss_output_name"] == "merged_cat_a"
    assert values["modelspec.merged_from"] == "me, musubi"  # musubi's file has a modelspec.title
    assert values["modelspec.trigger_phrase"] == "trg_ai_toolkit"
    assert json.loads(values["ss_tag_frequency"])["1_trg_ai_toolkit"] == {"trg_ai_toolkit": 1}
    assert "ss_base_model_version" in values


def test_the_recipe_names_files_by_name_and_hash_and_holds_the_whole_table(desk, loras):
    desk.zit("run", desk.job(ONE_STEP)).ok()
    (recipe,) = (json.loads(v) for k, v in metadata(desk.out / "merged_cat_a.safetensors").items() if "recipe" in k)
    (step,) = recipe["steps"]
    raw = loras[0].read_bytes()
    wanted = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert (step["loras"][0]["lora"], step["loras"][0]["sha256"]) == ("me.safetensors", wanted)
    table = step["loras"][0]["strengths"]
    assert table["3"] == pytest.approx([0.9 * 0.25 * w for w in (0.7, 1.1, 0.9, 0.9, 0.9, 1, 1, 1)])
    assert table["29"] == pytest.approx([0.9 * 0.6 * w for w in (0.7, 1.1, 0.9, 0.9, 0.9, 1, 1, 1)])
    assert table["noise_refiner"] == pytest.approx([0.9 * w for w in (0.7, 1.1, 0.9, 0.9, 0.9, 1, 1, 1)])
    assert table["other"] == [0.9] * 6


def edited(desk: Desk, change: Callable[[dict], object]) -> Path:
    """The recipe of a merge of both LoRAs, after a change of its data."""
    desk.zit("run", desk.job(ONE_STEP)).ok()
    recipe = yaml.safe_load(desk.zit("recipe", desk.out / "merged_cat_a.safetensors").ok())
    change(recipe["steps"][0]["loras"][0])
    return desk.write(recipe, "recipe.yaml")


def test_a_changed_strength_table_is_refused(desk, loras):
    recipe = edited(desk, lambda lora: lora["strengths"]["3"].__setitem__(0, 0.5))
    message = desk.zit("run", recipe, "--output-dir", "again").refused()
    assert message.startswith("steps[0].loras[0].strengths: the table does not follow from ratio")
    assert not Path("again").exists()


def test_changed_weights_without_their_table_are_fine(desk, loras):
    def change(lora: dict) -> None:
        lora["ratio"] = 0.5
        del lora["strengths"]

    assert again(desk, edited(desk, change)).is_file()


def test_a_changed_input_is_not_found(desk, loras):
    recipe = edited(desk, lambda lora: None)
    desk.lora("me.safetensors", seed=7)
    message = desk.zit("run", recipe, "--output-dir", "again", "--loras", desk.folder).refused()
    assert message.startswith("steps[0].loras[0].lora: no file with the tensors of me.safetensors (sha256 ")
    assert "--loras" in message and not Path("again").exists()


def test_a_broken_hash_is_refused(desk, loras):
    recipe = edited(desk, lambda lora: lora.__setitem__("sha256", "abc"))
    assert desk.zit("run", recipe, "--output-dir", "again").refused().startswith("steps[0].loras[0].sha256: ")


def test_a_recipe_needs_an_output_dir(desk, loras):
    assert "--output-dir" in desk.zit("run", edited(desk, lambda lora: None)).refused()


def test_what_else_lies_in_the_folders_does_not_disturb_the_search(desk, loras):
    desk.zit("run", desk.job(ONE_STEP)).ok()
    made = desk.out / "merged_cat_a.safetensors"
    recipe = printed_recipe(desk, made)
    attic = move_and_rename(desk, *loras)
    (attic / "00_empty.safetensors").touch()
    (attic / "00_short.safetensors").write_bytes(b"abc")
    (attic / "00_text.safetensors").write_text("a download that failed")
    (attic / "00_folder.safetensors").mkdir()
    with contextlib.suppress(OSError):  # Windows without the right to make links
        (attic / "00_dangling.safetensors").symlink_to(attic / "gone")
    assert again(desk, recipe, "--loras", attic).read_bytes() == made.read_bytes()


def test_odd_names_survive_the_recipe(desk, real_loras):
    name = "50% ${off} [name] 'x' #1: é.safetensors"
    real_loras[0].rename(desk.folder / name)
    desk.zit("merge", name, "-o", "out.safetensors", "--ratio", 1).ok()
    recipe = printed_recipe(desk, desk.folder / "out.safetensors")
    assert yaml.safe_load(recipe.read_text(encoding="utf-8"))["steps"][0]["loras"][0]["lora"] == name
    assert again(desk, recipe, "--loras", desk.folder).is_file()

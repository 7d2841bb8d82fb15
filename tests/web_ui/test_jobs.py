"""Jobs with our sections, made, started, stopped and looked at in AI-Toolkit's real web UI."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from web_ui.material import SAMPLES

pytestmark = pytest.mark.web_ui

MINUTES = 60.0
ENOUGH = 5 * MINUTES  # a job imports AI-Toolkit first: half a minute on two cores


def start_and_wait(user, name: str, status: str = "completed") -> dict:
    """Presses play on the job's page and waits for the end."""
    user.start(name)
    user.wait(lambda: user.ui.is_over(name), ENOUGH)
    row = user.ui.row(name)
    assert row["status"] == status, f"{row['info']}\n{user.ui.job_log(name)[-3000:]}"
    user.wait(lambda: user.status() == status)
    return row


@pytest.fixture(scope="module")
def trained(chromium, ui, material) -> str:
    """The name of a job that trained, merged and made pictures; made the way the README tells it."""
    from web_ui.browser import User

    user, name = User(chromium, ui), "my_char_v1"
    try:
        user.new_job()
        user.import_config(material.training(name))
        user.to_meta()
        user.paste(material.section())
        assert not user.is_red(), user.screen()
        user.create()
        assert user.heading() == "", user.screen()
        start_and_wait(user, name)
    finally:
        user.close()
    return name


def test_a_section_pasted_at_meta_is_in_the_job(user, trained):
    first, second = user.ui.config(trained)["config"]["process"]
    assert first["type"] == "diffusion_trainer" and second["type"] == "zit_merge"
    assert [step["name"] for step in second["steps"]] == ["soft", "with_style"]
    assert user.ui.config(trained)["meta"]["name"] == "[name]", "what stood below is still there"
    user.open(trained)
    user.tab("Config File")
    user.wait(lambda: "zit_merge" in user.yaml())
    assert '- name: "with_style"' in user.yaml(), user.screen()


def test_the_row_tells_of_training_merge_and_pictures_in_one_run(user, trained):
    infos = user.ui.infos(trained)
    kinds = [next((kind for kind in ("Training", "Merging", "Picture") if info.startswith(kind)), "") for info in infos]
    order = [kinds.index(kind) for kind in ("Training", "Merging", "Picture")]
    assert order == sorted(order), infos
    row = user.ui.row(trained)
    assert row["step"] == 3, "the training's own count stays"
    assert row["info"].startswith("Training completed") and "2 merged" in row["info"], row["info"]
    user.open(trained)
    assert user.status() == "completed" and user.progress() == "Step 3 of 3", user.screen()
    shown, is_cut = user.queue_info(trained)
    assert shown == row["info"] and not is_cut, (shown, is_cut)


def test_the_merged_files_stand_in_the_card(user, trained):
    user.open(trained)
    ours = {f"merged_{trained}_soft", f"merged_{trained}_with_style"}
    user.wait(lambda: {trained} | ours <= set(user.checkpoints()))


def test_the_page_is_the_plugin_tab(user, trained):
    user.open(trained)
    frame = user.plugin()
    text = frame.locator("body").inner_text()
    for word in ("soft", "with_style", "style.safetensors"):
        assert word in text, user.screen()
    assert frame.locator("img").count() > 0, "pictures"
    assert frame.locator("body").evaluate("b => getComputedStyle(b).backgroundColor") == "rgb(20, 23, 28)", "as dark as the UI"


def test_the_composer_copies_out_of_the_sandbox(user, trained):
    user.open(trained)
    frame = user.plugin()
    text = frame.locator(".yaml textarea").first.input_value()
    assert "zit_merge" in text
    user.page.evaluate("navigator.clipboard.writeText('nothing')")
    frame.locator(".yaml").first.get_by_role("button", name="Copy", exact=True).click()
    user.wait(lambda: frame.get_by_text("Copied.").count() > 0)
    assert user.page.evaluate("navigator.clipboard.readText()") == text


def test_the_pictures_stand_in_the_gallery_in_full_rows(user, trained):
    user.open(trained)
    user.tab("Samples")
    pictures = user.page.locator("img[alt='Sample Image']")
    names = sorted(p.name for p in (user.ui.output / trained / "samples").iterdir() if p.is_file())
    # two prompts: the trainer's rows before and after its training, ours of the base, the LoRAs alone and the results
    assert len(names) == 2 * (2 + 5), names
    # the UI loads what is in sight, and opens the gallery at its end: the last result for both prompts
    user.wait(lambda: pictures.count() >= 2 and pictures.evaluate_all("all => all.every((i) => i.naturalWidth > 0)"))
    rows = user.page.locator("div.grid.gap-1")
    assert {rows.nth(n).locator("> div:not(.invisible)").count() for n in range(rows.count())} == {2}, user.screen()
    pictures.last.click()
    user.page.get_by_text(SAMPLES[1]["prompt"], exact=True).wait_for()


def test_a_merge_alone_by_import_config(user, material):
    user.new_job()
    user.import_config(material.merge("merge_alone"))
    user.create()
    assert user.ui.config("merge_alone")["config"]["process"][0]["type"] == "zit_merge"
    assert user.progress() == "Step 0 of 1", user.screen()
    row = start_and_wait(user, "merge_alone")
    assert row["info"] == "2 merged", row
    assert user.progress() == "", "no bar that would promise more"
    user.wait(lambda: {"merged_merge_alone_exact", "merged_merge_alone_small"} <= set(user.checkpoints()))
    assert user.icon("play").count() == 1, "it can be started again with other weights"
    user.wait(lambda: user.page.get_by_role("button", name="Plugin").count() == 1)
    row = start_and_wait(user, "merge_alone")
    assert row["info"] == "2 up to date" and set(user.ui.counts("merge_alone")[-4:]) == {(0, 0)}, "no bar of the run before"


def test_a_whole_job_from_the_plugin_tab_is_imported_and_merges_alone(user, trained):
    user.open(trained)
    frame = user.plugin()
    frame.get_by_role("radio", name="a whole job").check()
    ratio = frame.get_by_label(f"1. {trained}.safetensors", exact=True)
    ratio.fill("0.25")
    ratio.press("Tab")
    text, name = frame.locator(".yaml textarea").first.input_value(), f"{trained}_merge"
    user.new_job()
    user.import_config(user.ui.save(f"{name}.yaml", text))
    user.create()
    (process,) = user.ui.config(name)["config"]["process"]
    lora = process["steps"][0]["loras"][0]
    assert lora["lora"] == str(user.ui.output / trained / f"{trained}.safetensors") and lora["ratio"] == 0.25
    row = start_and_wait(user, name)
    assert row["info"] == "2 merged", row
    user.wait(lambda: {f"merged_{name}_soft", f"merged_{name}_with_style"} <= set(user.checkpoints()))
    user.tab("Samples")  # the model and the samples of the training came along
    pictures = user.page.locator("img[alt='Sample Image']")
    user.wait(lambda: pictures.count() >= 2 and pictures.evaluate_all("all => all.every((i) => i.naturalWidth > 0)"))


def stop_among_pictures(user, name: str) -> dict[Path, int]:
    """Starts a job, stops it at the second picture or later, and waits until all has ended: the times of its files then."""
    user.start(name)
    user.wait(lambda: any(re.match(r"Picture [2-9]/", info) for info in user.ui.infos(name)), ENOUGH)
    user.wait(lambda: user.icon("pause").count() == 1)
    user.stop()
    user.wait(lambda: user.ui.row(name)["status"] == "stopped")
    user.wait(lambda: user.ui.is_over(name), 30)  # the picture at hand is made first, a tiny one here
    row = user.ui.row(name)
    assert (row["status"], row["info"]) == ("stopped", "Job stopped"), row
    user.wait(lambda: user.status() == "stopped" and user.icon("play").count() == 1)
    folder = user.ui.output / name
    return {path: path.stat().st_mtime_ns for path in folder.glob("merged_*") if path.suffix == ".safetensors"} | {
        path: path.stat().st_mtime_ns for path in folder.glob("merged_*_previews/pictures/*")
    }


def assert_kept(before: dict[Path, int]) -> None:
    """Both merges and a picture were there, and are the same files."""
    kinds = Counter(path.suffix for path in before)
    assert kinds.pop(".safetensors") == 2 and kinds.total() >= 1, before
    again = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert not again, f"made again: {again}"


def test_a_stop_among_the_pictures_and_a_second_start(user, material):
    name = "stopped_merge"
    user.new_job()
    user.import_config(material.merge_with_pictures(name, prompts=2, steps=8))
    user.create()
    before = stop_among_pictures(user, name)
    start_and_wait(user, name)
    assert_kept(before)


@pytest.mark.thorough
def test_a_stop_after_a_training_and_a_second_start(user, material):
    """The training is resumed at its end, without a step; its LoRA is the same, so nothing that rests on it is made again."""
    name = "stopped_training"
    user.new_job()
    user.import_config(material.training(name))
    user.to_meta()
    user.paste(material.section())
    user.create()
    before = stop_among_pictures(user, name)
    assert user.ui.row(name)["step"] == 3
    row = start_and_wait(user, name)
    assert row["step"] == 3 and row["info"].startswith("Training completed"), row
    assert_kept(before)


def test_a_typing_error_is_said_before_the_training(user, material):
    name = "typo"
    user.new_job()
    user.import_config(material.training(name))
    user.to_meta()
    user.paste(material.section(typo=True))
    user.create()
    row = start_and_wait(user, name, "error")
    assert row["step"] == 0 and not list((user.ui.output / name).glob("*.safetensors"))
    assert row["info"].startswith("with_style: "), "the column of the queue shows the beginning"
    assert "lorras" in row["info"], row
    assert user.heading() == row["info"].strip(), user.screen()
    assert "loras" in user.heading().replace("lorras", ""), "what was meant"

"""Our section in the UI's Advanced editor: where it may be pasted, and what is saved."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.web_ui


@pytest.mark.parametrize("place", ["after Enter above meta", "at the end"])
def test_a_paste_elsewhere_is_red_and_not_saved(user, material, place):
    """Known behaviour of the editor, which README warns of: after Enter it indents the first pasted line once more."""
    name = "broken_" + place.replace(" ", "_")
    user.new_job()
    user.import_config(material.training(name))
    user.to_end() if place == "at the end" else user.to_new_line_above_meta()
    user.paste(material.section())
    user.wait(user.is_red)
    user.create()
    assert [p["type"] for p in user.ui.config(name)["config"]["process"]] == ["diffusion_trainer"]


def test_simple_and_back_keeps_the_section(user, material):
    user.new_job()
    user.import_config(material.training("there_and_back"))
    user.to_meta()
    user.paste(material.section())
    assert not user.is_red(), user.screen()
    user.press("Show Simple")
    user.page.get_by_role("button", name="Show Advanced").wait_for()
    user.press("Show Advanced")
    user.wait(lambda: "with_style" in user.yaml())
    user.create()
    assert [p["type"] for p in user.ui.config("there_and_back")["config"]["process"]] == ["diffusion_trainer", "zit_merge"]


def test_a_clone_has_the_section(user, material):
    user.new_job()
    user.import_config(material.merge("to_clone"))
    user.create()
    job = user.ui.row("to_clone")["id"]
    user.page.goto(f"{user.ui.url}/jobs/new?cloneId={job}")
    # the editor shows for good what the page has when it is opened: before the answer has come that is the UI's own default
    user.page.get_by_text("Advanced job detected").wait_for()
    user.press("Show Advanced")
    user.wait(lambda: "to_clone_copy" in user.yaml())
    user.create()
    copied, original = (user.ui.config(name)["config"]["process"][0] for name in ("to_clone_copy", "to_clone"))
    assert copied == original

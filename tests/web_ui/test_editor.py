"""Our section in the UI's Advanced editor: where it may be pasted, and what is saved."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.web_ui


def test_a_paste_after_enter_at_the_end_is_red_and_not_saved(user, material):
    """Known behaviour of the editor, which README warns of: it indents the first pasted line once more."""
    user.new_job()
    user.import_config(material.training("broken_paste"))
    user.to_end()
    user.page.keyboard.press("Enter")
    user.paste(material.section())
    user.wait(user.is_red)
    user.create()
    assert [p["type"] for p in user.ui.config("broken_paste")["config"]["process"]] == ["diffusion_trainer"]


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


def test_edit_and_clone_keep_the_section(user, material):
    user.new_job()
    user.import_config(material.merge("to_clone"))
    user.create()
    job = user.ui.row("to_clone")["id"]
    user.page.goto(f"{user.ui.url}/jobs/new?cloneId={job}")
    user.press("Show Advanced")
    user.wait(lambda: "to_clone_copy" in user.yaml())
    user.create()
    copied, original = (user.ui.config(name)["config"]["process"][0] for name in ("to_clone_copy", "to_clone"))
    assert copied == original

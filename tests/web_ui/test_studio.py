"""The studio in AI-Toolkit's real web UI: opened, used by hand, and closed, while another job waits in the queue."""

from __future__ import annotations

import pytest
from web_ui.test_jobs import ENOUGH

from extensions_built_in.zit_merge.formats.reader import load_lora

pytestmark = pytest.mark.web_ui
NAME, OTHER = "in_studio", "after_it"


def opened(user, name: str):
    """Starts a job and opens its studio: the frame."""
    user.start(name)
    user.wait(lambda: user.ui.row(name)["info"].startswith("Studio open"), ENOUGH)
    user.open(name)
    user.wait(lambda: user.heading() == "Studio open: see the Plugin tab")
    frame = user.plugin()
    doing = frame.locator(".doing")
    user.wait(lambda: "Ready" in doing.inner_text(), ENOUGH)
    return frame


def test_a_job_serves_its_studio_until_it_is_stopped(user, material):
    user.new_job()
    user.import_config(material.studio(NAME))
    user.create()
    frame = opened(user, NAME)
    ratio = frame.get_by_label("1. me.safetensors", exact=True)
    ratio.fill("0.4")
    ratio.press("Tab")
    user.wait(lambda: "Measured" in frame.locator(".source").inner_text(), ENOUGH)
    frame.get_by_role("button", name="Look", exact=True).click()
    user.wait(lambda: frame.locator(".strip thead th").count() >= 4, ENOUGH)
    pictures = frame.locator(".strip tbody img")
    user.wait(lambda: pictures.count() == 2 * 4 and "Ready" in frame.locator(".doing").inner_text(), ENOUGH)
    assert pictures.evaluate_all("all => all.every((i) => i.naturalWidth > 0)"), user.screen()
    frame.get_by_label("Name", exact=True).fill("by_hand")
    frame.get_by_role("button", name="Keep as a LoRA", exact=True).click()
    user.wait(lambda: frame.get_by_text("merged_in_studio_by_hand.safetensors").count() > 0, ENOUGH)
    made = load_lora(user.ui.output / NAME / f"merged_{NAME}_by_hand.safetensors")
    assert made.verdict and made.verdict.status == "right" and made.verdict.asked[0] == pytest.approx(0.4, abs=1e-3)
    text = frame.locator(".yaml textarea").first.input_value()
    assert "ratio: 0.4" in text, text

    user.new_job()
    user.import_config(material.merge(OTHER))
    user.create()
    user.start(OTHER)
    user.page.wait_for_timeout(3000)  # the worker looks at the queue every second
    assert (user.ui.row(OTHER)["status"], user.ui.row(NAME)["status"]) == ("queued", "running"), "one GPU, and it is taken"

    user.open(NAME)
    user.stop()
    user.wait(lambda: user.ui.row(NAME)["status"] == "stopped", 60)
    user.wait(lambda: user.ui.is_over(NAME), 60)
    user.wait(lambda: user.ui.row(OTHER)["status"] == "completed", ENOUGH)


def test_a_second_studio_of_the_job_has_the_strip_and_is_closed_on_its_page(user):
    user.open(NAME)
    frame = opened(user, NAME)
    pictures = frame.locator(".strip tbody img")
    user.wait(lambda: pictures.count() == 2 * 4, ENOUGH)
    frame.get_by_role("button", name="Close the studio", exact=True).click()
    frame.get_by_role("button", name="Close it", exact=True).click()
    user.wait(lambda: user.ui.row(NAME)["status"] == "completed", ENOUGH)
    assert user.ui.row(NAME)["info"] == "1 up to date", user.ui.row(NAME)


def test_the_page_of_a_closed_studio_is_the_page_as_before(user):
    user.open(NAME)
    frame = user.plugin()
    assert frame.locator(".doing").count() == 0 and frame.locator(".yaml textarea").count() >= 1
    assert "start" in frame.locator("body").inner_text()
    user.open(NAME)
    user.wait(lambda: f"merged_{NAME}_by_hand" in user.checkpoints())

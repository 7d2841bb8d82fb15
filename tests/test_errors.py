"""Errors: what is wrong, and where, completed on the way up."""

from __future__ import annotations

import pytest

from extensions_built_in.zit_merge import wording
from extensions_built_in.zit_merge.errors import SettingError, ZitMergeError, joined, located, not_available_yet, of_step


def test_a_location_is_completed_on_the_way_up():
    with pytest.raises(ZitMergeError) as caught, located("process[1]"), located(""), located("steps[0]"), located("loras[2]"):
        raise SettingError("must be a number", "blocks.to_q")
    assert str(caught.value) == "process[1].steps[0].loras[2].blocks.to_q: must be a number"
    assert (caught.value.message, caught.value.loc) == ("must be a number", "process[1].steps[0].loras[2].blocks.to_q")


def test_without_a_location_an_error_is_its_message():
    assert str(SettingError("the ratios sum to 0")) == "the ratios sum to 0"


@pytest.mark.parametrize("error", [ZitMergeError("x.safetensors: is torn"), KeyError("a bug")])
def test_only_settings_have_locations(error: Exception):
    text = str(error)
    with pytest.raises(type(error)) as caught, located("process[1]"):
        raise error
    assert caught.value is error and str(error) == text


@pytest.mark.parametrize(
    ("locs", "path"),
    [((), ""), (("", ""), ""), (("steps[0]", "loras[1]"), "steps[0].loras[1]"), (("", "steps[0]", "", "rank"), "steps[0].rank")],
)
def test_locations_are_joined_to_a_path(locs: tuple[str, ...], path: str):
    assert joined(*locs) == path


def test_what_a_later_version_brings():
    assert str(not_available_yet("")) == "is not available yet in this version of zit_merge"
    with pytest.raises(SettingError) as caught, located("process[0].network.type"):
        raise not_available_yet("merging a trained loha", "train with type: lora")
    where, _, message = str(caught.value).partition(": ")
    assert where == "process[0].network.type"
    assert message == "merging a trained loha is not available yet in this version of zit_merge; train with type: lora"


PLACE = "process[1].steps[0].loras[0]"


@pytest.mark.parametrize(
    ("error", "usual", "first"),
    [
        (
            SettingError("must be a number, not 'much'", f"{PLACE}.ratio"),
            f"{PLACE}.ratio: must be a number, not 'much'",
            f"soft: must be a number, not 'much' ({PLACE}.ratio)",
        ),
        (
            SettingError("/data/my loras/a.safetensors does not exist (looked in /data)", f"{PLACE}.lora"),
            f"{PLACE}.lora: /data/my loras/a.safetensors does not exist (looked in /data)",
            f"soft: a.safetensors does not exist (looked in /data) ({PLACE}.lora, /data/my loras/a.safetensors)",
        ),
        (
            ZitMergeError("/data/b.safetensors: is not a whole .safetensors file (x): copy it again"),
            "/data/b.safetensors: is not a whole .safetensors file (x): copy it again",
            "soft: b.safetensors: is not a whole .safetensors file (x): copy it again (/data/b.safetensors)",
        ),
        (
            ZitMergeError("C:\\data\\c.safetensors: there is no such file"),
            "C:\\data\\c.safetensors: there is no such file",
            "soft: c.safetensors: there is no such file (C:\\data\\c.safetensors)",
        ),
        (ZitMergeError("no space left: free some"), "no space left: free some", "soft: no space left: free some"),
        (SettingError("/ is no folder"), "/ is no folder", "soft: / is no folder"),
    ],
)
def test_a_narrow_column_shows_the_step_and_the_sentence_first(error, usual, first):
    with pytest.raises(ZitMergeError) as caught, of_step("outer"), of_step("soft"):
        raise error
    assert str(caught.value) == usual
    caught.value.sentence_first = True
    assert str(caught.value) == first


def test_no_part_of_a_variable_is_told():
    wording.hide("/data/s3cr3t.safetensors", "MY_LORA")
    try:
        error = ZitMergeError("/data/s3cr3t.safetensors: there is no such file")
        error.sentence_first = True
        assert str(error) == "${MY_LORA}: there is no such file"
    finally:
        wording.forget()

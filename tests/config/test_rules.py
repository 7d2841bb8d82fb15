"""What settings mean together, each rule with the location that it names and beside its limit."""

from __future__ import annotations

from typing import Any

import pytest

from extensions_built_in.zit_merge.config.rules import check_method, check_names, check_step
from extensions_built_in.zit_merge.config.schema import Settings, Step
from extensions_built_in.zit_merge.errors import SettingError


def step(*ratios: float, name: str = "a", **keys: Any) -> Step:
    loras = [{"lora": f"{n}.safetensors", "ratio": ratio} for n, ratio in enumerate(ratios)]
    return Step(name=name, **({"loras": loras} if loras else {}), **keys)


@pytest.mark.parametrize(
    ("checked", "loc", "says"),
    [
        (step(1.0, method="tie"), "method", "no such method: 'tie' (did you mean ties?); there are "),
        (step(1.0, params={"density": 0.5}), "params.density", "the method sum has no such parameter, it takes none"),
        (
            step(1.0, method="ties", params={"densty": 0.5}),
            "params.densty",
            "the method ties has no such parameter (did",
        ),
        (step(1.0, method="ties", params={"density": 2}), "params.density", "must be above 0 and at most 1, not 2"),
        (step(), "loras", "is missing: list the LoRAs to merge (or give checkpoints)"),
        (step(1.0, checkpoints={}), "", "has loras and checkpoints: make two steps"),
        (step(checkpoints={}, method="ties"), "method", "an average over checkpoints is a weighted sum"),
        (step(1.0, method="slerp"), "method", "slerp takes exactly two LoRAs, the step has 1"),
        (step(1.0, 1.0, 1.0, method="slerp"), "method", "slerp takes exactly two LoRAs, the step has 3"),
        (step(1.0, -0.5, method="slerp"), "loras[1].ratio", "slerp goes between directions, where -0.5 has no meaning"),
        (step(1.0, -1.0, method="average"), "", "the ratios sum to 0, average divides by their sum"),
        (step(0.1, 0.2, -0.3, method="average"), "", "the ratios sum to 0"),  # but for rounding
        (step(checkpoints={"gamma": 2.0, "sigma_rel": 0.1}), "checkpoints", "sigma_rel and gamma both set the weights"),
        (step(checkpoints={"sigma_rel": 0.5}), "checkpoints.sigma_rel", "sigma_rel must be from "),
        (step(checkpoints={"weights": [1.0, 2.0], "last": 3}), "checkpoints.weights", "2 weights for last: 3"),
        (step(checkpoints={"weights": [1.0, -1.0]}), "checkpoints.weights", "sum to 0"),
    ],
)
def test_what_does_not_fit_together(checked: Step, loc: str, says: str):
    with pytest.raises(SettingError) as caught:
        check_step(checked)
    assert caught.value.loc == loc and caught.value.message.startswith(says)


@pytest.mark.parametrize(
    "checked",
    [
        step(1.0, -1.0),  # a sum may cancel out
        step(1.0, -0.999, method="average"),
        step(1.0, 0.0, method="slerp"),
        step(1.0, 1.0, method="ties", params={"density": 0.5}),
        step(checkpoints={}),
        step(checkpoints={"weights": [1.0, 2.0], "last": 2}),
        step(checkpoints={"gamma": 0.0}),
    ],
)
def test_what_fits_together(checked: Step):
    check_step(checked)


def test_the_method_of_a_section_needs_no_loras():
    check_method(Settings(method="slerp"))
    with pytest.raises(SettingError, match="^params.density: "):
        check_method(Settings(params={"density": 0.5}))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a", "b.Safetensors"), "steps[1].name: b.Safetensors looks like a file"),
        (("Trained",), "steps[0].name: Trained is the name of what the training saved"),
        (("a", "b", "A"), "steps[2].name: A is also the name of steps[0]: two steps can't write one file"),
    ],
)
def test_names_that_can_be_mistaken(names: tuple[str, ...], says: str):
    with pytest.raises(SettingError) as caught:
        check_names([step(1.0, name=name) for name in names])
    assert str(caught.value).startswith(says)
    check_names([step(1.0, name=name) for name in ("a", "b", "trained_2")])

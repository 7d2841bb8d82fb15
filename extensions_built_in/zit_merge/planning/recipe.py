"""The recipe: a step, resolved, as data that makes the same file again.

It is a section in its own right, `type: zit_merge`, with file names and SHA-256 in the place of paths. A step that uses earlier
ones carries them before itself, as steps that are not kept.
"""

from __future__ import annotations

from typing import Any

from .. import __version__
from ..algebra.methods import METHODS
from ..config.schema import PROCESS_TYPE, Save, Step
from ..wording import public_name
from .types import Input, StepBasis, StepPlan


def recipe_of(step: StepBasis) -> dict[str, Any]:
    """The recipe of a step, with the paths of files in place of their hashes: `with_hashes` fills them in."""
    steps: dict[str, dict[str, Any]] = {}
    for i in step.inputs:
        for entry in i.step.recipe["steps"] if i.step else ():
            steps.setdefault(entry["name"], _feeding(entry))
    steps[public_name(step.name)] = _entry(step)
    return {
        "type": PROCESS_TYPE,
        "made_by": f"zit_merge {__version__}",
        "job": public_name(step.job),
        "steps": list(steps.values()),
    }


def bake_recipe(plan: StepPlan) -> dict[str, Any]:
    """The recipe of the whole model that a step writes, with paths in place of hashes: the step writes no LoRA then.

    Args:
        plan: A step that bakes.
    """
    bake = plan.bake
    assert bake and bake.base, "a model that is written has a base that is there"
    *earlier, own = plan.recipe["steps"]
    asked = bake.spec.model_dump(include={"format", "dtype", "rounding", "seed"}, exclude_none=True)
    entry = {"base": public_name(bake.label), "sha256": bake.base.path, **asked, "file": public_name(bake.path.name)}
    return {**plan.recipe, "steps": [*earlier, _feeding(own) | {"bake": entry}]}


def _feeding(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of a step that only feeds later ones."""
    if "file" not in entry:
        return entry
    return {"name": entry["name"], "keep": False} | {key: value for key, value in entry.items() if key not in ("name", "file")}


def _entry(step: StepBasis) -> dict[str, Any]:
    spec = step.spec
    entry: dict[str, Any] = {"name": public_name(spec.name), "file": public_name(step.path.name)}
    entry |= {"method": spec.method, **_params(spec)}
    entry |= {"rank": spec.rank_rule.record() if spec.rank_rule else spec.rank, "save": _save(spec.save)}
    if step.weights:
        entry |= {"base": public_name(step.weights_label), "base_sha256": step.weights.path}
    if spec.shapes != "strict":
        entry["shapes"] = spec.shapes
    if spec.allow_unmatched:
        entry["allow_unmatched"] = True
    if spec.confirm_size:
        entry["confirm_size"] = True
    entry["loras"] = [_input(i) for i in step.inputs]
    return entry


def _params(spec: Step) -> dict[str, Any]:
    """Every parameter of the method, those left at their defaults too: seeds above all."""
    defaults = {name: p.default for name, p in METHODS[spec.method].parameters.items()}
    return {"params": defaults | spec.params} if defaults else {}


def _save(save: Save) -> dict[str, Any]:
    """dtype and format always, the rest where it was asked for."""
    return {"dtype": save.dtype, "format": save.format} | save.model_dump(exclude_defaults=True)


def _input(i: Input) -> dict[str, Any]:
    entry: dict[str, Any] = {"lora": public_name(i.source or i.label)}
    if i.lora:
        entry["sha256"] = i.lora.path
    if i.pair:
        entry["lora"] = {"extract": public_name(i.label), "base": public_name(i.source)}
        entry |= {"sha256": i.pair.tuned.path, "base_sha256": i.pair.base.path}
    if i.model:
        entry |= {"base": public_name(i.model_label), "base_sha256": i.model.path}
    entry["ratio"] = i.spec.ratio
    entry |= {key: value for key, value in i.spec.tables.items() if value}  # a preset's entries are written out
    entry |= {key: value for key in ("alpha", "qkv", "drop") if (value := getattr(i.spec, key))}
    if i.lora and i.lora.adapter:
        entry["adapter"] = i.lora.adapter.record()
    if i.base:
        entry["trained_on"] = dict(i.base)
    entry["strengths"] = i.rows
    if i.lora and i.lora.unmatched:
        entry["unmatched"] = list(i.lora.unmatched)
    return entry

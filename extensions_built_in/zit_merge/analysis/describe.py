"""What is known of one file: who wrote it, what it changes and how strongly, what is missing and what is odd."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..formats.forms import why_padded
from ..formats.header import DTYPES
from ..formats.metadata import bases, read_check, read_recipe, trigger_words
from ..formats.reader import LoraFile
from ..formats.safetensors_file import SafetensorsFile
from ..formats.trainers import Trainer, recognise
from .measure import Measurement
from .oddities import missing, odd, padding


@dataclass(frozen=True)
class Description:
    """One file. The attributes are the keys of `inspect FILE --json`, always all of them.

    A module is a canonical name, `layers.0.attention.to_q`. A sentence is for people, its wording may change.

    Attributes:
        file: The file's name, without its folder.
        trainer: {name, version, by}: the program that wrote the file, where it is known; its version or None; `metadata` or
            `keys`, by which it was recognised. Where several programs write the same, `name` joins them by `or`. Else None.
        format: The key styles, the commonest first: `diffusion_model.* .lora_A.weight`.
        algorithms: Algorithm -> how many modules, as in `Change`.
        modules: How many of Z-Image's 276 linear layers the file changes.
        ranks: Module -> rank; of a LoKr, LoHa or full difference the highest that its change can have.
        alphas: Module -> alpha as stored, None where that is infinite; modules without one are not listed.
        scales: Module -> alpha / rank as it is applied, 1 where alpha has no meaning; None for changes of several scales.
        dtype: Of the tensors as stored: `bf16`, `fp16`, `fp32`, `float8_e4m3fn`; several are joined by `and`.
        norms: Module -> Frobenius norm of its change, alpha folded in, and of its first change while a question asks which
            of two counts; None where a tensor is not finite.
        norm: Of the whole change, None if one of `norms` is.
        missing: Sentences: layers, components and sections that the file changes nothing in, compared with its other layers
            and with what its trainer trains by default.
        odd: Sentences: what programs are known to stumble over, and what is probably not meant.
        skipped: Keys that are known and no part of a merge.
        unmatched: Keys that no rule explains.
        questions: Sentences: what has to be answered before a merge.
        remarks: Sentences: what was decided for the user.
        trigger_words: As the metadata name them.
        base_model: As the metadata name it, or None.
        base: What the LoRA, or those that were merged into it, was trained on, by name: {model, arch, adapter}, what is known.
        recipe: The recipe of a file that zit_merge wrote, else None.
        check: What zit_merge found when it wrote the file, {error, kept, asked, got, cut}, else None.
    """

    file: str
    trainer: Trainer | None
    format: Sequence[str]
    algorithms: Mapping[str, int]
    modules: int
    ranks: Mapping[str, int]
    alphas: Mapping[str, float | None]
    scales: Mapping[str, float | None]
    dtype: str
    norms: Mapping[str, float | None]
    norm: float | None
    missing: Sequence[str]
    odd: Sequence[str]
    skipped: Sequence[str]
    unmatched: Sequence[str]
    questions: Sequence[str]
    remarks: Sequence[str]
    trigger_words: Sequence[str]
    base_model: str | None
    base: Sequence[Mapping[str, str]]
    recipe: Mapping[str, Any] | None
    check: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe(measured: Measurement) -> Description:
    """Describes a single file that was measured.

    Raises:
        ZitMergeError: The file can't be read any more.
    """
    (lora,), norms = measured.loras, measured.norms(0)
    trainer, stored, recipe = recognise(lora), _stored_dtypes(lora), read_recipe(lora.metadata)
    known = [norm for norm in norms.values() if norm is not None]
    padded = padding(lora, norms)
    return Description(
        file=lora.path.name,
        trainer=trainer,
        format=list(lora.styles),
        algorithms=lora.algorithms,
        modules=len(lora),
        ranks=lora.ranks,
        alphas={m: _finite(a) for m, (change, *_) in lora.changes.items() if (a := change.alpha) is not None},
        scales={m: changes[0].scale if len({c.scale for c in changes}) == 1 else None for m, changes in lora.changes.items()},
        dtype=" and ".join(stored),
        norms=norms,
        norm=None if len(known) < len(norms) else _finite(math.hypot(*known)),
        missing=[*missing(lora.changes.keys() - padded, trainer)],
        odd=[*odd(lora, trainer, norms, stored, padded)],
        skipped=list(lora.skipped),
        unmatched=list(lora.unmatched),
        questions=[*lora.questions, *filter(None, [lora.base_question])],
        remarks=[*lora.remarks, *([why_padded(padded)] if padded else [])],
        trigger_words=trigger_words(lora.metadata),
        base_model=lora.metadata.get("ss_base_model_version") or lora.metadata.get("modelspec.architecture"),
        base=bases(lora.metadata),
        recipe=_kept(recipe),
        check=read_check(lora.metadata),
    )


def _kept(recipe: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What of it is a recipe; most files have none, and need no schema of one."""
    if not recipe:
        return recipe
    from ..config.recipe import only_recipe

    return only_recipe(recipe)[0]


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None


def _stored_dtypes(lora: LoraFile) -> dict[str, int]:
    """Dtype as stored -> how many tensors have it, the commonest first, alphas left out."""
    keys = {key for changes in lora.changes.values() for change in changes for key in change.keys.values()}
    with SafetensorsFile(lora.path, lora.stamp) as file:
        names = [DTYPES[file.entries[key].dtype] for key in sorted(keys)]
    return dict(Counter(names).most_common())

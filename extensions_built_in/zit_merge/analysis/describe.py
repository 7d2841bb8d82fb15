"""What `inspect` tells of a file: who wrote it, what it changes and how strongly, what is missing and what is odd."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open

from ..algebra.delta import norm
from ..errors import ZitMergeError
from ..formats.changes import FULL, Change
from ..formats.header import DTYPES
from ..formats.metadata import read_check, read_recipe, trigger_words
from ..formats.reader import LoraFile, TensorReader
from ..formats.scales import ADAPTER_KEY
from ..formats.spec import DTYPE_NAMES
from ..formats.trainers import TOOLKIT_SCRIPT, Trainer, recognise, usual_modules
from ..formats.verdict import LARGE
from ..model import zimage
from ..model.strengths import row_name
from ..model.zimage import MODULES, SECTIONS, section_components
from ..report.text.table import norm_table, value_table
from ..wording import TITLE, listed, middle, neighbours, percent, ranks_text, row, shorten, some, span, squeezed

_SCALED_BY_ONE_MODULE = {"diffusion_model.", "transformer.", "lora_unet_", ""}  # prefixes that diffusers reads


def describe(lora: LoraFile, watched: Callable[[LoraFile], Iterable[str]] = iter) -> dict[str, Any]:
    """Everything `inspect` knows of a file, ready for JSON: the keys are these, always all of them.

    A module is a canonical name, `layers.0.attention.to_q`. A sentence is for people, its wording may change.

    Args:
        lora: The file.
        watched: Passes the modules on one by one, such as a progress bar.

    Returns:
        file: The file's name, without its folder.
        trainer: {name, version, by}: the program that wrote the file, where it is known; its version or null; `metadata` or
            `keys`, by which it was recognised. Where several programs write the same, `name` joins them by `or`. Else null.
        format: The key styles, the commonest first: `diffusion_model.* .lora_A.weight`.
        algorithms: Algorithm -> how many modules: LoRA, LoKr, LoHa, full difference.
        modules: How many of Z-Image's 276 linear layers the file changes.
        ranks: Module -> rank; of a LoKr, LoHa or full difference the highest that its change can have.
        alphas: Module -> alpha as stored, null where that is infinite; modules without one are not listed.
        scales: Module -> alpha / rank as it is applied, 1 where alpha has no meaning; null for changes of several scales.
        dtype: Of the tensors as stored: `bf16`, `fp16`, `fp32`, `float8_e4m3fn`; several are joined by `and`.
        norms: Module -> Frobenius norm of its change, alpha folded in, and of its first change while a question asks which
            of two counts; null where a tensor is not finite.
        norm: Of the whole change, null if one of `norms` is.
        missing: Sentences: layers, components and sections that the file changes nothing in, compared with its other layers
            and with what its trainer trains by default.
        odd: Sentences: what programs are known to stumble over, and what is probably not meant.
        skipped: Keys that are known and no part of a merge.
        unmatched: Keys that no rule explains.
        questions: Sentences: what a merge wants to be told first.
        remarks: Sentences: what was decided for the user.
        trigger_words: As the metadata name them.
        base_model: As the metadata name it, or null.
        recipe: The recipe of a file that zit_merge wrote, else null.
        check: What zit_merge found when it wrote the file, {error, kept, asked, got, cut}, else null.

    Raises:
        ZitMergeError: The file can't be read any more.
    """
    trainer = recognise(lora)
    norms, bare = _norms(lora, watched)
    stored = _stored_dtypes(lora)
    return {
        "file": lora.path.name,
        "trainer": trainer and {"name": trainer.name, "version": trainer.version, "by": trainer.by},
        "format": list(lora.styles),
        "algorithms": lora.algorithms,
        "modules": len(lora),
        "ranks": lora.ranks,
        "alphas": {m: _finite(a) for m, (change, *_) in lora.changes.items() if (a := change.alpha) is not None},
        "scales": {m: changes[0].scale if len({c.scale for c in changes}) == 1 else None for m, changes in lora.changes.items()},
        "dtype": " and ".join(stored),
        "norms": norms,
        "norm": None if None in norms.values() else _finite(math.hypot(*norms.values())),
        "missing": [*_missing(lora, trainer)],
        "odd": [*_odd_numbers(norms, bare), *_odd_factors(lora, trainer), *_odd_for_clients(lora, stored)],
        "skipped": list(lora.skipped),
        "unmatched": list(lora.unmatched),
        "questions": list(lora.questions),
        "remarks": list(lora.remarks),
        "trigger_words": trigger_words(lora.metadata),
        "base_model": lora.metadata.get("ss_base_model_version") or lora.metadata.get("modelspec.architecture"),
        "recipe": read_recipe(lora.metadata),
        "check": read_check(lora.metadata),
    }


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None


def _norms(
    lora: LoraFile, watched: Callable[[LoraFile], Iterable[str]]
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Module -> norm, with alpha and without, one module in memory at a time; None where that is no number."""
    scaled, bare = {}, {}
    with TensorReader(lora) as tensors:
        for module in watched(lora):
            try:
                scale, length = _norm(tensors, module, lora.changes[module])
            except ZitMergeError:  # a tensor is not finite: the rest of the file can be shown all the same
                scale, length = 1.0, math.nan
            bare[module], scaled[module] = _finite(length), _finite(abs(scale) * length)
    return scaled, bare


def _norm(tensors: TensorReader, module: str, changes: Sequence[Change]) -> tuple[float, float]:
    """(scale, norm of what is scaled) of one module."""
    if len(changes) == 1 and changes[0].algorithm == FULL:
        change, (out, _) = changes[0], changes[0].shape
        rows = None if change.third is None else (change.third * out, (change.third + 1) * out)
        difference = tensors.tensor(change.keys["diff"], rows)  # Gram matrices of 3840 x 10240 would take seconds each
        return change.scale, float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    scale, delta = tensors.delta(module)
    return scale, norm(delta)


def _stored_dtypes(lora: LoraFile) -> dict[str, int]:
    """Dtype as stored -> how many tensors have it, the commonest first, alphas left out."""
    keys = {key for changes in lora.changes.values() for change in changes for key in change.keys.values()}
    with safe_open(lora.path, framework="pt") as file:
        dtypes = [DTYPES[file.get_slice(key).get_dtype()] for key in sorted(keys)]
    names = (DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch.")) for dtype in dtypes)
    return dict(Counter(names).most_common())


def _missing(lora: LoraFile, trainer: Trainer | None) -> Iterator[str]:
    """What the file changes nothing in: single layers, single components, whole sections."""
    usual, program = usual_modules(trainer), trainer.name.split(" (")[0] if trainer else ""
    never: dict[str, list[str]] = defaultdict(list)  # component -> sections that it is missing from
    without: list[str] = []
    for section, count in SECTIONS.items():
        has = {c: {i for i in range(count) if _name(section, i, c) in lora} for c in section_components(section)}
        changed = set().union(*has.values())
        if not changed:
            without.append(section)
            continue
        if len(changed) < count:
            yield f"nothing in {_places(section, set(range(count)) - changed)}"
        yield from _holes(section, has, changed)
        for component in (c for c, layers in has.items() if not layers):
            never[component].append(section)
    others = [c for c in zimage.OTHER if _name("other", 0, c) not in lora]
    if others and len(others) < len(zimage.OTHER):
        yield f"no {listed(others)}"
    elif others:
        without.append("other")
    for sections in dict.fromkeys(map(tuple, never.values())):
        components = [c for c, where in never.items() if tuple(where) == sections]
        names = [m.name for m in MODULES.values() if m.section in sections and m.component in components]
        yield f"no {listed(components)} in {listed(sections)}" + _as_usual(names, usual, program)
    if without:
        names = [m.name for m in MODULES.values() if m.section in without]
        embedders = " (embedders and final layer)" if "other" in without else ""
        yield f"nothing in {listed(without)}{embedders}" + _as_usual(names, usual, program)
    if lacks := [name for name in usual if name not in lora]:
        yield f"{len(lacks)} of the {len(usual)} modules that {program} trains by default"


def _holes(section: str, has: Mapping[str, set[int]], changed: set[int]) -> Iterator[str]:
    """Components that some of the changed layers of a section lack.

    Args:
        section: Of the layers.
        has: Component -> layers that have it.
        changed: The layers that have any.
    """
    holes: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for component, layers in has.items():
        if layers and layers != changed:
            holes[tuple(sorted(changed - layers))].append(component)
    for layers, components in holes.items():
        rest = len(changed) - len(layers)
        yield f"no {listed(components)} in {_places(section, layers)}, though in {rest} other{'s' * (rest > 1)}"


def _as_usual(names: Sequence[str], usual: Collection[str], program: str) -> str:
    """Says so where these modules are none of those that the program trains by default."""
    return f", as usual for {program}" if usual and not set(names) & set(usual) else ""


def _odd_numbers(norms: Mapping[str, float | None], bare: Mapping[str, float | None]) -> Iterator[str]:
    """Of the norms."""
    if broken := [m for m, length in norms.items() if length is None]:
        yield f"{some(broken)} {_hold(broken)} NaN or infinity: the LoRA is broken, use an earlier checkpoint of it"
    if zero := [m for m, length in bare.items() if length == 0]:
        yield f"{some(zero)} {'changes' if len(zero) == 1 else 'change'} nothing, all zeros"


def _odd_factors(lora: LoraFile, trainer: Trainer | None) -> Iterator[str]:
    """Of shapes, and of what was probably not meant."""
    if wrong := next((m for m, shape in lora.shapes.items() if shape != MODULES[m].shape()), None):
        (out, into), (real_out, real_in) = lora.shapes[wrong], MODULES[wrong].shape()
        yield f"sizes of another or a pruned model: {wrong} is {out}x{into}, Z-Image's is {real_out}x{real_in}"
        try:
            zimage.infer_sizes(lora.shapes)
        except ValueError as e:
            yield f"sizes that do not agree with each other: {e}"
    if _forgot_alpha(lora):
        yield (
            "q, k and v are fused at three times the rank of the rest and a third of its alpha / rank, as converters that forgot "
            "to triple alpha wrote it: if the LoRA is too weak, merge it with blocks: {qk: 3, to_v: 3}"
        )
    if trainer and trainer.name == TOOLKIT_SCRIPT:
        yield "a merge that added A to A and B to B: its change is not the sum of the changes of its LoRAs"


def _forgot_alpha(lora: LoraFile) -> bool:
    """Whether every fused q, k, v is of 3 r and a third of the scale, r and scale being those of all other modules."""
    pairs = [changes[0] for changes in lora.changes.values() if changes[0].algorithm == "LoRA"]
    fused, rest = ({(c.rank, c.scale) for c in pairs if (c.third is not None) is is_fused} for is_fused in (True, False))
    if not fused or len(rest) != 1:
        return False
    [(rank, scale)] = rest
    return scale != 0 and all(r == 3 * rank and math.isclose(3 * s, scale, rel_tol=1e-2) for r, s in fused)  # bf16 alphas


def _odd_for_clients(lora: LoraFile, stored: Mapping[str, int]) -> Iterator[str]:
    """What programs are known to read wrongly or to refuse (facts: who reads what)."""
    changes = [change for several in lora.changes.values() for change in several]
    prefixes = {style.split("* ", 1)[0] for style in lora.styles}
    ranks = set(lora.ranks.values())
    # diffusers get_peft_kwargs took the first module's alpha for all; a fused file it refuses as a whole
    is_plain = set(lora.algorithms) == {"LoRA"} and prefixes <= _SCALED_BY_ONE_MODULE and not any(c.native for c in changes)
    if len(ranks) > 1 and is_plain and ADAPTER_KEY not in lora.metadata:
        yield (
            f"rank varies ({span(ranks)}) and there is no {ADAPTER_KEY}: diffusers before 0.40 and AI-Toolkit apply a wrong "
            "strength to some modules"
        )
    named = [c for c in changes if c.algorithm == "LoRA" and "lora_B" in c.keys["up"] and c.alpha is not None]
    if other := sorted({round(c.alpha / c.rank, 6) for c in named if not math.isclose(c.alpha, c.rank, rel_tol=1e-2)}):
        values = f"{other[0]:g}" if len(other) == 1 else f"{other[0]:g} to {other[-1]:g}"
        yield (
            f"alpha is not the rank (alpha / rank {values}) under lora_A / lora_B names: AI-Toolkit, InvokeAI and diffusers 0.36 "
            "ignore it and apply 1"
        )
    yield from _half_blocks(
        lora, ("to_q", "to_k", "to_v"), "stable-diffusion.cpp drops what follows the gap, Nunchaku refuses the file"
    )
    yield from _half_blocks(lora, ("w1", "w3"), "Nunchaku refuses the file")
    if narrow := [f"{n} tensors are {name}" for name, n in stored.items() if name.startswith("float8")]:
        yield f"{listed(narrow)}: diffusers since 0.38 refuses the file"


def _half_blocks(lora: LoraFile, components: Sequence[str], consequence: str) -> Iterator[str]:
    """Blocks that have some of what belongs together."""
    blocks = []
    for section, count in SECTIONS.items():
        for i in range(count):
            has = [_name(section, i, c) in lora for c in components]
            if any(has) and not all(has):
                blocks.append(f"{section}.{i}")
    if blocks:
        yield f"{listed(components)} are not complete in {some(blocks, 'blocks')}: {consequence}"


def _name(section: str, index: int, component: str) -> str:
    return zimage.at(section, index, component).name


def _places(section: str, layers: Iterable[int]) -> str:
    """`layers 3, 7-9`, `noise_refiner.0`."""
    names = ", ".join(row_name(section, first, last) for first, last in neighbours(sorted(layers)))
    return f"layers {names}" if section == "layers" else names


def _hold(names: Sequence[str]) -> str:
    return "holds" if len(names) == 1 else "hold"


_WORDS = 300  # of trigger words and of the numbers of a check, five lines
_NAMED = 6  # LoRAs of a merge
_SENTENCE = 500
_KEY = 60
_BY = {"metadata": "by its metadata", "keys": "by its key style"}


def inspect_text(facts: Mapping[str, Any]) -> str:
    """`describe` for people: 80 columns at most, ASCII."""
    lines = [line for label, text in _head(facts).items() if text for line in row(label, text)]
    for label, key in (("missing", "missing"), ("odd", "odd"), ("open", "questions"), ("noted", "remarks")):
        if facts[key]:
            lines.append("")
        for i, sentence in enumerate(facts[key]):
            lines += row("" if i else label, f"- {shorten(sentence, _SENTENCE)}")
    norms = {m: "broken" if n is None else n for m, n in facts["norms"].items()}
    lines += ["", "norm of the change, per layer and component", *norm_table(norms)]
    if len(set(facts["ranks"].values())) > 1 and "LoRA" in facts["algorithms"]:
        lines += ["", "rank", *value_table({m: str(r) if r < 10**6 else f"{r:.0e}" for m, r in facts["ranks"].items()})]
    if len(set(facts["scales"].values())) > 1:
        scales = {m: "mixed" if s is None else _number(s) for m, s in facts["scales"].items()}
        lines += ["", "alpha / rank, as it is applied", *value_table(scales)]
    return "\n".join(lines)


def _head(facts: Mapping[str, Any]) -> dict[str, str]:
    """Label -> text of the lines that every file has, and of some that it may have."""
    trainer, algorithms, norm_ = facts["trainer"], facts["algorithms"], facts["norm"]
    version = f" {shorten(trainer['version'], 40)}" if trainer and trainer["version"] else ""
    counts = Counter(MODULES[m].section for m in facts["ranks"])
    sections = ", ".join(f"{counts[s]} in {s}" for s in (*SECTIONS, "other") if counts[s])
    several = len(algorithms) > 1
    return {
        "file": middle(facts["file"]),
        "made by": f"{trainer['name']}{version}, {_BY[trainer['by']]}" if trainer else "not recognised",
        "merged from": _merged_from(facts["recipe"] or {}),
        "check": _check(facts["check"]) if facts["check"] else "",
        "format": _styles(facts["format"]),
        "algorithm": ", ".join(f"{name} in {n} modules" if several else name for name, n in algorithms.items()),
        "modules": f"{facts['modules']} of {len(MODULES)} ({sections})",
        "rank": ranks_text(facts["ranks"], algorithms),
        "alpha": _alpha(facts),
        "alpha/rank": _scales(facts["scales"].values()),
        "dtype": facts["dtype"],
        "norm": "unknown, some of it is broken" if norm_ is None else f"{norm_:.4g}",
        "base model": shorten(facts["base_model"] or "not named", TITLE),
        "trigger words": _words(facts["trigger_words"]),
        "recipe": f"recipe {middle(facts['file'])} prints it" if facts["recipe"] else "",
        "left out": f"{len(facts['skipped'])} keys that no merge takes, {_examples(facts['skipped'])}"
        if facts["skipped"]
        else "",
        "unknown": f"{len(facts['unmatched'])} keys, {_examples(facts['unmatched'])}" if facts["unmatched"] else "",
    }


def _words(words: Sequence[str]) -> str:
    """As many trigger words as fit, and how many there are."""
    shown: list[str] = []
    for word in words:
        if shown and len(", ".join([*shown, word])) > _WORDS:
            return f"{', '.join(shown)}, ... ({len(words):,} in all)"
        shown.append(shorten(word, _WORDS))
    return ", ".join(shown) or "none named"


def _examples(keys: Sequence[str]) -> str:
    return f"e.g. {', '.join(shorten(key, _KEY) for key in keys[:3])}"


def _styles(styles: Sequence[str]) -> str:
    """Each prefix once, with the endings of its keys."""
    endings: dict[str, list[str]] = defaultdict(list)
    for prefix, _, ending in (style.partition("* ") for style in styles):
        endings[prefix].append(ending)
    return ", ".join(f"{prefix}* {' '.join(own)}" for prefix, own in endings.items())


def _merged_from(recipe: Mapping[str, Any]) -> str:
    """`0.9 of me.safetensors and 0.6 of style.safetensors`, as far as a recipe has the form of ours."""
    steps = recipe.get("steps")
    last = steps[-1] if isinstance(steps, list) and steps else None
    loras = last.get("loras") if isinstance(last, Mapping) else None
    pairs = [(x.get("ratio"), x.get("lora")) for x in loras if isinstance(x, Mapping)] if isinstance(loras, list) else []
    named = [f"{float(r):g} of {squeezed(n, 40)}" for r, n in pairs if isinstance(r, int | float) and isinstance(n, str)]
    return listed(named if len(named) <= _NAMED else [*named[: _NAMED - 1], f"{len(named) - _NAMED + 1} more"])


def _check(found: Mapping[str, Any]) -> str:
    """What the check found when the file was written."""
    asked, got = (shorten(", ".join("-" if v is None else f"{v:g}" for v in found[key]), _WORDS) for key in ("asked", "got"))
    is_cut = found.get("cut", found["error"] > LARGE)
    left = f"{percent(found['kept'])} of the energy kept" if is_cut else f"rounding changed {percent(found['error'])}"
    return f"asked {asked}, got {got} of them; {left}"


def _alpha(facts: Mapping[str, Any]) -> str:
    """The alphas as stored; beside whole factors and differences they are only said to have no meaning."""
    if not facts["alphas"]:
        return "not in the keys"
    idle = not {"LoRA", "LoHa"} & set(facts["algorithms"]) and set(facts["scales"].values()) == {1.0}
    return _numbers(facts["alphas"].values()) + (", without a meaning here" if idle else "")


def _scales(scales: Collection[float | None]) -> str:
    """Their span, and that there are modules whose changes have several."""
    known = [s for s in scales if s is not None]
    mixed = ["differs in changes that add up"] if None in scales else []
    return ", ".join([*([_numbers(known)] if known else []), *mixed])


def _number(value: float) -> str:
    """In six letters at most: 0.125, 1e-05, 1e+10."""
    text = f"{value:.3g}"
    return text if len(text) <= 6 else f"{value:.0e}"


def _numbers(values: Iterable[float | None]) -> str:
    """`0.5`, or `0.25 to 2`."""
    distinct = {math.inf if v is None else v for v in values}
    low, high = f"{min(distinct):.6g}", f"{max(distinct):.6g}"
    return low if low == high else f"{low} to {high}"

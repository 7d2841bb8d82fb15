"""What a file lacks and what is odd about it, in sentences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from ..formats.changes import Change
from ..formats.forms import complete
from ..formats.metadata import VERSION_KEY
from ..formats.reader import LoraFile
from ..formats.scales import ADAPTER_KEY
from ..formats.trainers import TOOLKIT_SCRIPT, Trainer, usual_modules
from ..model import zimage
from ..model.strengths import row_name
from ..model.zimage import MODULES, SECTIONS, section_components
from ..wording import listed, neighbours, some, span

_SCALED_BY_ONE_MODULE = {"diffusion_model.", "transformer.", "lora_unet_", ""}  # prefixes that diffusers reads


def padding(lora: LoraFile, norms: Mapping[str, float | None]) -> frozenset[str]:
    """The modules of zeros that zit_merge added to a file of its own for the programs that count modules.

    Args:
        lora: The file.
        norms: Module -> norm of its change, None where it is broken.
    """
    if VERSION_KEY not in lora.metadata:
        return frozenset()
    changed = {m for m in lora if norms[m] != 0}
    return frozenset(m for m in complete(changed, zimage.REAL_SIZES) if m in lora and m not in changed)


def missing(lora: Collection[str], trainer: Trainer | None) -> Iterator[str]:
    """What the file changes nothing in: single layers, single components, whole sections.

    Args:
        lora: The modules that the file changes.
        trainer: The program that wrote it, where it is known.
    """
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
    for lacking, components in holes.items():
        rest = len(changed) - len(lacking)
        yield f"no {listed(components)} in {_places(section, lacking)}, though in {rest} other{'s' * (rest > 1)}"


def _as_usual(names: Sequence[str], usual: Collection[str], program: str) -> str:
    """Says so where these modules are none of those that the program trains by default."""
    return f", as usual for {program}" if usual and not set(names) & set(usual) else ""


def odd(
    lora: LoraFile,
    trainer: Trainer | None,
    norms: Mapping[str, float | None],
    stored: Mapping[str, int],
    padded: Collection[str] = (),
) -> Iterator[str]:
    """What programs are known to stumble over, and what is probably not meant.

    Args:
        lora: The file.
        trainer: The program that wrote it, where it is known.
        norms: Module -> norm of its change, None where it is broken.
        stored: Dtype as stored -> how many tensors have it.
        padded: Modules that are meant to be zeros.
    """
    yield from _odd_norms(lora, {m: length for m, length in norms.items() if m not in padded})
    yield from _odd_changes(lora, trainer)
    yield from _odd_for_clients(lora, stored)


def _odd_norms(lora: LoraFile, norms: Mapping[str, float | None]) -> Iterator[str]:
    """Of the norms; what needs the base model has none here."""
    norms = {m: length for m, length in norms.items() if length is not None or not lora.changes[m][0].needs_base}
    if broken := [m for m, length in norms.items() if length is None]:
        yield f"{some(broken)} {_hold(broken)} NaN or infinity: the LoRA is broken, use an earlier checkpoint of it"
    if zero := [m for m, length in norms.items() if length == 0 and any(c.scale for c in lora.changes[m])]:
        yield f"{some(zero)} {'changes' if len(zero) == 1 else 'change'} nothing, all zeros"


def _odd_changes(lora: LoraFile, trainer: Trainer | None) -> Iterator[str]:
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
    named = [c for c in changes if c.algorithm == "LoRA" and "lora_B" in c.keys["up"]]
    alphas = [(c.alpha, c.rank) for c in named if c.alpha is not None]
    if other := sorted({round(alpha / rank, 6) for alpha, rank in alphas if not math.isclose(alpha, rank, rel_tol=1e-2)}):
        values = f"{other[0]:g}" if len(other) == 1 else f"{other[0]:g} to {other[-1]:g}"
        yield (
            f"alpha is not the rank (alpha / rank {values}) under lora_A / lora_B names: AI-Toolkit, InvokeAI and diffusers 0.36 "
            "ignore it and apply 1"
        )
    if single := [m for m, several in lora.changes.items() if any(c.alpha is not None and _has_single(c) for c in several)]:
        yield f"rank 1 beside an alpha key in {some(single)}: stable-diffusion.cpp divides alpha by the width of the input"
    yield from _half_blocks(
        lora, ("to_q", "to_k", "to_v"), "stable-diffusion.cpp drops what follows the gap, Nunchaku refuses the file"
    )
    yield from _half_blocks(lora, ("w1", "w3"), "Nunchaku refuses the file")
    if narrow := [f"{n} tensors are {name}" for name, n in stored.items() if name.startswith("float8")]:
        yield f"{listed(narrow)}: diffusers since 0.38 refuses the file"


def _has_single(change: Change) -> bool:
    """Whether a pair of its factors has one component."""
    return any(change.sizes[part][0] == 1 for part in ("down", "w1_b", "w2_b") if part in change.sizes)


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

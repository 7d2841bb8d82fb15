"""What a person should know of a plan before it runs, a sentence each."""

from __future__ import annotations

from collections.abc import Mapping

from ..algebra.methods import METHODS
from ..errors import counted
from ..files.paths import USUAL_PREFIX
from ..formats.checkpoint_writer import left_out
from ..formats.forms import ALWAYS, why_padded
from ..formats.metadata import base_text, bases, bases_differ
from ..formats.names import parse_key
from ..model.zimage import GROUPS, MODULES, canonical_component
from .types import Input, StepBasis


def warnings_of(step: StepBasis, stacked: Mapping[str, int], ranks: Mapping[str, int], is_open: bool) -> tuple[str, ...]:
    """What a person should know of a step, a sentence each.

    Args:
        step: The step.
        stacked: Module -> components before truncation.
        ranks: Module -> rank, of every module written.
        is_open: The ranks are only bounds.
    """
    found = [sentence for i in step.inputs for sentence in _of_input(i)]
    if step.prefix != USUAL_PREFIX:
        found.append(
            f"the file is called {step.prefix}..., since AI-Toolkit would take merged_... for a checkpoint of {step.job}"
        )
    found += _of_bases(step)
    found += _of_bake(step)
    found += _of_method(step)
    if all(i.known.ranks for i in step.inputs):  # else a file on the hub may hold more
        found += _of_rank(step, max([1, *stacked.values()]), max(ranks.values(), default=0), is_open)
    silent = sum(1 for n in stacked.values() if n == 0)
    if silent:
        found.append(f"{silent} of {len(stacked)} modules have strength 0 throughout and are written as zeros")
    if added := ranks.keys() - stacked.keys():
        found.append(why_padded(added))
    return tuple(found)


def _of_bases(step: StepBasis) -> list[str]:
    named = {i.label: bases(i.metadata) for i in step.inputs if any(map(i.counts, i.known.ranks))}
    if not bases_differ(base for found in named.values() for base in found):
        return []
    each = "; ".join(f"{label}: {' and '.join(map(base_text, found))}" for label, found in named.items() if found)
    return [f"LoRAs of different bases, which may do less on another than on their own: {each}"]


def _of_bake(step: StepBasis) -> list[str]:
    """Of the whole model that is written."""
    bake = step.bake
    if bake is None:
        return []
    if bake.base is None:
        return [f"{bake.label} is not in the local cache: it is fetched from the hub when the merge runs, and checked then"]
    found, lost = [], left_out(bake.base, bake.spec.format)
    if lost:
        found.append(
            f"{counted(len(lost), 'tensor')} of {bake.label} that format {bake.spec.format} has no place for "
            f"{'is' if len(lost) == 1 else 'are'} left out: {lost[0]} ..."
        )
    if bake.spec.format == "comfyui":
        folder = "checkpoints" if bake.base.native and bake.base.extras else "diffusion_models"
        gguf = f"{bake.path.stem}-BF16.gguf"
        found.append(f"ComfyUI looks for it in models/{folder}")
        if bake.spec.dtype in (None, "bf16"):
            found.append(
                f"for GGUF, with ComfyUI-GGUF's tools: python convert.py --src {bake.path.name} --dst {gguf}, then "
                f"llama-quantize {gguf} {bake.path.stem}-Q8_0.gguf Q8_0"
            )
    else:
        found.append(
            "AI-Toolkit trains on it with name_or_path: this folder and extras_name_or_path: the model that it came from"
        )
    return found


def _of_method(step: StepBasis) -> list[str]:
    method, name = METHODS[step.spec.method], step.spec.method
    found = []
    if method.is_mean and len(step.inputs) > 1:
        shares = " : ".join(f"{i.spec.ratio:g}" for i in step.inputs)
        found.append(f"{name} is a mean: only the proportions of the ratios count, {shares}")
    wide = next((i for i in step.inputs if not i.known.is_lora), None)
    if wide and not method.is_linear:
        found.append(f"{wide.label} is no LoRA of low rank: {name} works on whole matrices then, minutes for each module")
    return found


def _of_rank(step: StepBasis, exact: int, rank: int, is_open: bool) -> list[str]:
    """Of a rank where `exact` would hold everything."""
    save, asked, rule = step.spec.save, step.spec.rank, step.spec.rank_rule
    if save.keep_lokr:
        return [
            "it stays a LoKr: ComfyUI, SD.Next, OneTrainer and diffusers from 0.42 read it; InvokeAI, DiffSynth, LightX2V, mflux "
            "and musubi do not"
        ]
    found = []
    if is_open and rule:
        limit = f"{rule.energy:.6g} of the energy" if rule.energy else f"{rule.size_mb:g} MB"
        limit += f", each component weighed by the weight of {step.weights_label} that it changes" * bool(rule.weigh)
        found.append(f"the rank follows from the singular values, for {limit}: {rank} at most")
    elif rule and rule.size_mb and rank < exact:
        found.append(f"rank {rank} is what {rule.size_mb:g} MB hold, rank {exact} would hold everything")
    elif asked != "exact" and rank < exact:
        found.append(f"rank {exact} holds everything, the best approximation of rank {rank} is written")
    elif isinstance(asked, int) and asked > exact:
        found.append(f"rank {asked} was asked for, {exact} holds everything: nothing is cut")
    needed = min(exact, step.rank_limit or exact)
    if rank > needed:
        found.append(
            f"rank {rank} is written where {needed} would do: beside an alpha key stable-diffusion.cpp takes rank 1 for the "
            "width of the input"
        )
    if not save.uniform:
        found.append(
            "each module has its own rank: diffusers before 0.40 needs the metadata that is written with it, AI-Toolkit the full "
            f"rank in {ALWAYS}, and PEFT's hot swap into an adapter of one rank refuses it"
        )
    if save.format in _READERS:
        found.append(f"format {save.format} is read by {_READERS[save.format]}")
    return found


# As measured: the table in docs/readers.md, and the sources of Forge Neo and Nunchaku.
_READERS: Mapping[str, str] = {
    "diffusers": "diffusers, ComfyUI, SD.Next, InvokeAI, OneTrainer, mflux and stable-diffusion.cpp; DiffSynth, LightX2V and "
    "Forge Neo load nothing of it. ai-toolkit is read by all of them",
    "kohya": "musubi, SD.Next, OneTrainer and diffusers from 0.39; ComfyUI drops q, k, v and out of it, DiffSynth and LightX2V "
    "load nothing. ai-toolkit is read by all of them but musubi, which converts it",
    "comfyui": "ComfyUI, SD.Next, stable-diffusion.cpp and Forge Neo, not by AI-Toolkit or Nunchaku; others, such as diffusers, "
    "InvokeAI and DiffSynth, load a part of it without a word. ai-toolkit is read by all of them",
}


def _of_input(i: Input) -> list[str]:
    if not i.known.ranks:
        return [f"{i.label} is not in the local cache: it is fetched from the hub when the merge runs, and checked then"]
    found = []
    if i.lora:
        found += [f"{i.label}: {remark}" for remark in i.lora.remarks]
        if i.lora.skipped:
            parts = map(parse_key, i.lora.skipped)
            kinds = ", ".join(dict.fromkeys(part.note or f"changes of a {part.part}" for part in parts))
            found.append(f"{i.label}: {counted(len(i.lora.skipped), 'key')} left out: {kinds} ({i.lora.skipped[0]} ...)")
        if i.lora.unmatched:
            found.append(f"{i.label}: {len(i.lora.unmatched)} unknown keys are left out: {', '.join(i.lora.unmatched[:3])}")
    if not any(map(i.counts, i.known.ranks)):
        found.append(f"{i.label}: every strength is 0, it has no effect")
    present = {MODULES[m].component for m in i.known.ranks}
    for key in i.spec.blocks:
        if not present & {canonical_component(key), *GROUPS.get(key, ())}:
            found.append(f"{i.label}: has no {key}, so its weight there has no effect")
    return found

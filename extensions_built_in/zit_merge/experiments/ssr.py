"""SSR, an experiment: merges a step's LoRAs by what their modules see while the model draws a prompt for each.

    cd ai-toolkit
    python -m extensions_built_in.zit_merge.experiments.ssr CONFIG.yaml --step both -o both_ssr.safetensors \\
        --prompts "portrait of zoe" "a street in the style of gleb"

The step says which LoRAs at which strengths, `rank` (a number, same or exact), `save`, and in `preview` seed, size and steps of
the pictures, which are drawn without guidance. The model is that of the section or of the training before it, loaded as for
previews, quantized or not. Formula: `algebra.activations`. Modules that one LoRA changes, or that see the time alone whatever the
prompt (adaLN, the time's embedder), are summed. In the small world this did not beat the plain sum (docs/evidence.md).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.activations import effects, mixing, orthonormal, truncate_seen
from ..algebra.delta import Delta
from ..algebra.factors import Factors, stack, wide
from ..cli.main import ended
from ..config.job import load_job
from ..config.schema import Preview
from ..errors import SettingError, ZitMergeError, counted, located
from ..formats.metadata import CHECK_KEY, EXPERIMENT_KEY, RECIPE_KEY, dumps
from ..formats.reading import Reader
from ..formats.safetensors_writer import SafetensorsWriter
from ..host.render import ToolkitRenderer
from ..host.status import Status
from ..host.watch import JobProgress
from ..merging.made import Hashes
from ..merging.merger import Merged, Merger
from ..merging.readers import StepReaders
from ..merging.results import Result
from ..merging.write import write_lora
from ..model.zimage import MODULES
from ..planning.job import plan_job
from ..planning.outputs import NAME_LIMIT, check_output, check_room
from ..planning.planned import Planned
from ..planning.types import StepPlan, with_hashes
from ..preview.samples import settings_of, specs_of
from ..preview.settings import ImageSpec, RenderSettings
from ..progress import Progress
from ..report.progress import Bar
from ..wording import public_name, size_text

RIDGE = 1e-3
MEMORY = 4e9  # bytes that what is kept of the activations may take
_SAME_INPUT = {"to_q": "to_q", "to_k": "to_q", "to_v": "to_q", "w1": "w1", "w3": "w1"}  # component -> whose input it shares
_OF_TIME = ("adaLN", "t_embedder")  # in the names of modules that see the time alone
_AVERAGE = 0.2  # own strength less the others': below it the result is close to an average
_CPU = torch.device("cpu")  # where the algebra runs: the model has the GPU's memory

Loads = Callable[[RenderSettings], AbstractContextManager[ToolkitRenderer]]


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        prompts: One for each LoRA of the step.
        seeds: Each prompt is drawn with all of them; none are those of the preview or the training's samples.
        ridge: See `mixing`.
        out: The file.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    ridge: float
    out: Path


class Judged(NamedTuple):
    """How strong LoRAs are in the modules that they share.

    Attributes:
        inner: (N, N), see `effects`, summed over modules.
        sizes: (N, N), likewise; 0 for a pair that shares no module.
    """

    inner: Tensor
    sizes: Tensor

    @property
    def text(self) -> str:
        """For people."""
        strengths = torch.where(self.sizes > 0, self.inner / self.sizes, torch.nan)
        own, lines = strengths.diagonal(), []
        others = strengths.masked_fill(torch.eye(len(own), dtype=torch.bool), torch.nan).nanmean(1)
        for n, (mine, foreign) in enumerate(zip(own.tolist(), others.tolist(), strict=True)):
            told = f"at {mine:.2f} of its strength on its own prompt, at {foreign:.2f} on the others'"
            lines.append(f"LoRA {n + 1}: {'as in a sum' if math.isnan(mine) else told}")
        if float((own - others).nanmean()) < _AVERAGE:
            lines.append(
                "This is close to an average of the LoRAs: prompts that differ more, each with its LoRA's trigger word, may help"
            )
        return "\n".join(lines)


def merge(planned: Planned, asked: Asked, load: Loads, progress: Progress) -> Judged:
    """Draws, solves, writes.

    Args:
        planned: The section; its last step is the one that is merged.
        asked: The rest.
        load: Loads the model.
        progress: Shows how far it is.

    Raises:
        ZitMergeError: Settings don't fit, a file can't be read or written, or the model can't be loaded.
    """
    plan = _checked(planned, asked)
    settings, specs = settings_of(planned.section, planned.context), _specs(planned, plan, asked)
    with Hashes(plan.hashed) as hashes, contextlib.ExitStack() as files:
        readers = files.enter_context(StepReaders(hashes, _CPU, progress))
        inputs = [readers.of_input(i) for i in plan.inputs]
        merger = _Merger(plan, inputs, asked.ridge)
        with load(settings) as model:
            merger.products = _gathered(model, plan, merger, specs, progress)
        metadata = {key: text for key, text in plan.draft.items() if key not in (RECIPE_KEY, CHECK_KEY)}
        record = {
            "method": "ssr",
            "ridge": asked.ridge,
            "pictures": [[_public(spec) for spec in of_lora] for of_lora in specs],
            "model": {
                "name": public_name(settings.name),
                "dtype": settings.dtype,
                "quantize": bool(settings.model.get("quantize")),
            },
            "of": with_hashes(plan.recipe, hashes.of(plan.hashed)),
        }
        metadata |= {EXPERIMENT_KEY: dumps(record)}
        with SafetensorsWriter(plan.path, plan.layout, metadata) as file:
            write_lora(Result(plan, inputs, _CPU, progress, merger), file, lambda made: None, progress)
            files.close()  # raises if an input was changed
            if os.path.lexists(plan.path):
                raise SettingError(f"{plan.path} was written by somebody else meanwhile: give another name", "--out")
            file.finish(metadata)
    return merger.judged


def _public(spec: ImageSpec) -> dict[str, Any]:
    return spec.record() | {"prompt": public_name(spec.prompt)}


def _checked(planned: Planned, asked: Asked) -> StepPlan:
    """The step with the file that is asked for in the place of its own.

    Raises:
        SettingError: Something does not fit, or the file can't be written.
    """
    plan, context = planned.plans[-1], planned.context
    with located(plan.loc):
        if plan.spec.method != "sum":
            raise SettingError(f"is {plan.spec.method}, and SSR a method of its own: set method: sum", "method")
        if plan.is_open or not plan.layout:
            raise SettingError("follows from numbers that SSR does not have: set a number, same or exact", "rank")
        if plan.kept_lokr:
            raise SettingError("a merge of several LoRAs is no LoKr: drop it", "save.keep_lokr")
        if not _shared(plan):
            raise SettingError("no two of its LoRAs change one module that sees the prompt: run the step as it is", "loras")
        if (taken := sum(_kept(plan, module) for module in _shared(plan))) > MEMORY:
            told = f"would take {size_text(round(taken))} of memory, at most {size_text(int(MEMORY))} are used"
            raise SettingError(f"{told}: merge fewer LoRAs, or LoRAs of lower rank", "loras")
    if len(asked.prompts) != len(plan.inputs):
        told = f"got {counted(len(asked.prompts), 'prompt')} for {counted(len(plan.inputs), 'LoRA')}: give one for each"
        raise SettingError(told, "--prompts")
    with located("--out"):
        if asked.out.suffix != ".safetensors":
            raise SettingError(f"{asked.out.name} is no name of a LoRA: end it with .safetensors")
        if context.claims(asked.out):
            raise SettingError(f"AI-Toolkit would take {asked.out} for a checkpoint of {plan.job}: give another folder or name")
        spec = plan.spec.model_copy(update={"copy_to": None, "bake": None, "keep": True})
        plan = plan.revised(spec=spec, bake=None, path=asked.out, loc="")
        if len(os.fsencode(f"{asked.out.name}.part")) > NAME_LIMIT:
            raise SettingError(f"{asked.out.name[:60]}... is too long for a file name: shorten it")
        if os.path.lexists(asked.out):
            raise SettingError(f"{asked.out} exists: move it away, or give another name")
        check_output(plan, context)
        check_room([plan], replace(context, output_dir=asked.out.absolute().parent), ())
    return plan


def _shared(plan: StepPlan) -> list[str]:
    """The modules that SSR decides on."""
    return [m for m in plan.shapes if sum(i.counts(m) for i in plan.inputs) > 1 and not any(word in m for word in _OF_TIME)]


def _kept(plan: StepPlan, module: str) -> int:
    """Bytes of D in float32 and of S_k in float64."""
    ranks = [i.known.ranks[module] for i in plan.inputs if i.counts(module)]
    return 4 * sum(ranks) * plan.shapes[module][1] + 8 * len(ranks) * sum(ranks) ** 2


def _specs(planned: Planned, plan: StepPlan, asked: Asked) -> list[tuple[ImageSpec, ...]]:
    """The pictures of each LoRA; none of one that shares no module."""
    settings, own = settings_of(planned.section, planned.context), plan.spec.preview or Preview()
    found = []
    for text, i in zip(asked.prompts, plan.inputs, strict=True):
        wanted = own.model_copy(
            update={"prompts": [text], "guidance": 1.0} | ({"seed": list(asked.seeds)} if asked.seeds else {})
        )
        specs = specs_of(wanted, settings, planned.context, "--prompts", "--prompts")
        is_seen = any(i.counts(module) for module in _shared(plan))
        found.append(tuple(replace(spec, guidance=1.0, negative="") for spec in specs) if is_seen else ())
    return found


class _Merger(Merger):
    """Merges as SSR does where it has seen activations, else as the step's method.

    Args:
        plan: The step.
        readers: Of its inputs, opened.
        ridge: See `mixing`.

    Attributes:
        downs: Module -> number of a LoRA -> D_k of `algebra.activations`, in float32.
        products: Module -> number of a LoRA -> S_k.
        judged: The strengths in the modules that were merged so far.
    """

    def __init__(self, plan: StepPlan, readers: Sequence[Reader], ridge: float):
        super().__init__(plan, readers, _CPU)
        self._ridge = ridge
        self.downs, self.products = dict[str, dict[int, Tensor]](), dict[str, dict[int, Tensor]]()
        self.judged = Judged(*torch.zeros(2, len(plan.inputs), len(plan.inputs), dtype=torch.float64))

    def changes(self, n: int) -> Iterator[tuple[str, Delta]]:
        """(module, delta) of LoRA n at its strength."""
        for module in self._plan.shapes:
            if part := self._parts(module).get(n):
                yield module, part.weighted(part.ratio)

    def look(self, module: str) -> None:
        """Chooses the D_k of a module."""
        with self._plan.computing(module):
            parts = self._parts(module).items()
            self.downs[module] = {n: orthonormal(part.weighted(part.ratio)).down.float() for n, part in parts}

    def of(self, module: str) -> Merged:
        if module not in self.products:
            return super().of(module)
        found, rank = self.downs[module], self._plan.ranks[module]
        changes = {n: part.weighted(part.ratio).map(wide) for n, part in self._parts(module).items()}
        whole = stack([Factors(changes[n] @ wide(down.T), wide(down)) for n, down in found.items()])
        ranks, grams = [len(down) for down in found.values()], [self.products[module][n] for n in found]
        mixed = mixing(grams, ranks, self._ridge)
        merged, is_cut = Factors(whole.up @ mixed, whole.down), whole.rank > rank
        if is_cut:
            merged = truncate_seen(merged, torch.stack(grams).sum(0), rank)
        at = torch.tensor(list(found))
        more = effects(whole.up, mixed, grams, ranks, merged.up if is_cut else None)
        for total, part in zip(self.judged, more, strict=True):
            total[at[:, None], at] += part
        return Merged(module, {}, None, merged)


def _gathered(
    model: ToolkitRenderer, plan: StepPlan, merger: _Merger, specs: Sequence[Sequence[ImageSpec]], progress: Progress
) -> dict[str, dict[int, Tensor]]:
    """What the modules that SSR decides on see, each LoRA by itself on the model at its strengths."""
    shared = _shared(plan)
    for module in progress.track(shared, f"reading {plan.name}"):
        merger.look(module)
    downs = {module: torch.cat(list(found.values())) for module, found in merger.downs.items()}
    products: dict[str, dict[int, Tensor]] = {module: {} for module in shared}
    worn, pictures = -1, [(n, spec) for n, of_lora in enumerate(specs) for spec in of_lora]
    for n, spec in progress.track(pictures, "pictures", "picture", describe=lambda p: f"LoRA {p[0] + 1}"):
        if n != worn:
            model.set_adapter(merger.changes(n))
            worn = n
        own = _by_input([module for module in shared if plan.inputs[n].counts(module)])
        see = {first: partial(_add, products, {m: downs[m] for m in together}, n) for first, together in own.items()}
        with model.watching(see, plan.shapes):
            model.render(spec)
    for module, seen in products.items():
        for n, product in seen.items():
            if not bool(torch.isfinite(product).all()):
                raise ZitMergeError(
                    f"{module} sees numbers that are not finite while LoRA {n + 1} is drawn: use a smaller strength, or another "
                    "dtype of the model"
                )
    return products


def _by_input(modules: Sequence[str]) -> dict[str, list[str]]:
    """First of those that share an input -> all of them."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in modules:
        m = MODULES[name]
        groups.setdefault((m.section, m.index, _SAME_INPUT.get(m.component, m.component)), []).append(name)
    return {together[0]: together for together in groups.values()}


def _add(products: Mapping[str, dict[int, Tensor]], downs: Mapping[str, Tensor], n: int, inputs: Tensor) -> None:
    inputs = inputs.float()
    for module, down in downs.items():
        seen = inputs @ down.to(inputs.device).T
        gram = (seen.T @ seen).cpu().double()
        products[module][n] = products[module][n] + gram if n in products[module] else gram


def _ridge(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no finite number above 0")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no seed: give a whole number from 0")
    return value


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the process where it is wrong, as argparse does.

    Args:
        words: See `main`.
    """
    prog, form = "python -m extensions_built_in.zit_merge.experiments.ssr", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=form)
    parser.add_argument("config", type=Path, help="a job with a section of zit_merge")
    parser.add_argument("--step", required=True, help="whose LoRAs are merged")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="TEXT", help="one for each LoRA, in the step's order")
    parser.add_argument(
        "--seeds", nargs="+", type=_seed, default=[], help="of the pictures (default: those of the step's preview)"
    )
    parser.add_argument(
        "--ridge", type=_ridge, default=RIDGE, help="relative to the mean square of the activations (%(default)s)"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="a new .safetensors")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        words: Of the command line; None takes the process's own.

    Returns:
        0 done, 1 the input or the config is wrong, 2 usage, 130 interrupted.
    """

    def run() -> int:
        args = arguments(words)
        planned = next(plan_job(load_job(args.config), only=args.step, may_download=True))
        with JobProgress(Status(), Bar()) as progress:
            asked = Asked(args.prompts, args.seeds, args.ridge, args.out)
            print(merge(planned, asked, progress.loading(ToolkitRenderer), progress).text)
        print(f"written {args.out}")
        return 0

    return ended(run)


if __name__ == "__main__":
    raise SystemExit(main())

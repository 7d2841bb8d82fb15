"""SSR, an experiment: merges a step's LoRAs by what their modules see while the model draws a prompt for each.

    cd ai-toolkit
    python -m extensions_built_in.zit_merge.experiments.ssr CONFIG.yaml --step both -o both_ssr.safetensors \\
        --prompts "portrait of zoe" "a street in the style of gleb"

The step says which LoRAs at which strengths, `rank` (a number, same or exact), `save`, and in `preview` size, steps and guidance
of the pictures; the model is that of the section or of the training before it, loaded as for previews, quantized or not. Formula:
`algebra.activations`. In the small world this lost to the plain sum (docs/evidence.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.activations import effects, mixing, orthonormal, truncate_seen
from ..algebra.delta import Delta
from ..algebra.factors import Factors, pad, stack
from ..algebra.precision import full_precision
from ..algebra.rounding import to_dtype
from ..config.job import load_job
from ..config.schema import Preview
from ..errors import SettingError, ZitMergeError, counted, located
from ..formats.forms import fuse
from ..formats.metadata import CHECK_KEY, RECIPE_KEY, dumps
from ..formats.reading import Reader
from ..formats.safetensors_writer import SafetensorsWriter
from ..host.render import ToolkitRenderer
from ..host.status import Status
from ..host.watch import JobProgress
from ..merging.made import Hashes
from ..merging.readers import StepReaders
from ..model.zimage import MODULES
from ..planning.job import plan_job
from ..planning.planned import Planned
from ..planning.types import StepPlan, with_hashes
from ..preview.samples import settings_of, specs_of
from ..preview.settings import ImageSpec, RenderSettings
from ..progress import Progress
from ..report.progress import Bar

EXPERIMENT_KEY = "zit_merge.experiment"
RIDGE = 1e-3
_SAME_INPUT = {"to_q": "to_q", "to_k": "to_q", "to_v": "to_q", "w1": "w1", "w3": "w1"}  # component -> whose input it shares
_AVERAGE = 0.2  # own strength less the others': below it the result is close to an average

Parts = Mapping[int, Factors]  # number of a LoRA -> its change of one module, strength included, orthonormal rows
Products = Mapping[int, Tensor]  # number of a LoRA -> S_k of `algebra.activations`, of one module
Load = Callable[[RenderSettings], AbstractContextManager[ToolkitRenderer]]


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
    """What came out.

    Attributes:
        strengths: (N, N), at [j, k] of LoRA j on the activations of LoRA k: see `effects`.
        shared: How many modules are changed by more than one LoRA, which the activations decide.
    """

    strengths: Tensor
    shared: int

    @property
    def text(self) -> str:
        """For people."""
        count, own = len(self.strengths), self.strengths.diagonal()
        if not self.shared:
            return "the LoRAs change different modules: this is their sum"
        others = (self.strengths.sum(1) - own) / (count - 1)
        lines = [
            f"LoRA {n + 1}: at {mine:.2f} of its strength on its own prompt, at {foreign:.2f} on the others'"
            for n, (mine, foreign) in enumerate(zip(own.tolist(), others.tolist(), strict=True))
        ]
        if float(own.mean() - others.mean()) < _AVERAGE:
            lines.append(
                "The model sees nearly the same with all prompts, so that this is close to an average: give prompts that differ "
                "more, each with its LoRA's trigger word"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Inputs:
    """The LoRAs of a step.

    Attributes:
        plan: The step.
        readers: Of its inputs, opened.
        device: Where the algebra runs.
    """

    plan: StepPlan
    readers: Sequence[Reader]
    device: torch.device

    def change(self, n: int, module: str) -> Delta:
        """What LoRA n adds to a module at its strength."""
        scale, stored = self.readers[n].delta(module)
        return stored.map(lambda t: t.to(self.device)).times(scale * self.plan.inputs[n].strengths[module])

    def changes(self, n: int) -> Iterator[tuple[str, Delta]]:
        """(module, delta) of LoRA n."""
        yield from ((module, self.change(n, module)) for module in self.plan.shapes if self.plan.inputs[n].counts(module))

    def parts(self, module: str) -> Parts:
        """What all of them add to a module, ready for `mixing`."""
        return {n: orthonormal(self.change(n, module)) for n, i in enumerate(self.plan.inputs) if i.counts(module)}


def merge(planned: Planned, asked: Asked, load: Load, progress: Progress) -> Judged:
    """Draws, solves, writes.

    Args:
        planned: The section; its last step is the one that is merged.
        asked: The rest.
        load: Loads the model.
        progress: Shows how far it is.

    Raises:
        ZitMergeError: Settings don't fit, a file can't be read or written, or the model can't be loaded.
    """
    plan = planned.plans[-1]
    settings, specs = _settings(planned, plan, asked)
    with Hashes(plan.hashed) as hashes, StepReaders(hashes, planned.device, progress) as readers, full_precision():
        inputs = _Inputs(plan, [readers.of_input(i) for i in plan.inputs], planned.device)
        with load(settings) as model:
            products = _gathered(model, inputs, specs, progress)
        record = {
            "method": "ssr",
            "ridge": asked.ridge,
            "pictures": [[spec.record() for spec in of_lora] for of_lora in specs],
            "model": settings.record(),
            "of": with_hashes(plan.recipe, hashes.of(plan.hashed)),
        }
        return _write(inputs, asked, products, record, progress)


def _settings(planned: Planned, plan: StepPlan, asked: Asked) -> tuple[RenderSettings, list[tuple[ImageSpec, ...]]]:
    """The model, and the pictures of each LoRA."""
    if len(asked.prompts) != len(plan.inputs):
        told = f"got {counted(len(asked.prompts), 'prompt')} for {counted(len(plan.inputs), 'LoRA')}: give one for each"
        raise SettingError(told, "--prompts")
    if asked.out.suffix != ".safetensors" or asked.out.exists():
        raise SettingError(f"{asked.out} exists or is no .safetensors: give a new name", "--out")
    with located(plan.loc):
        if plan.is_open or plan.spec.save.keep_lokr or not plan.layout:
            raise SettingError("must be a number, same or exact here, of a step that keeps no LoKr", "rank")
    settings = settings_of(planned.section, planned.context)
    wanted = {"seed": list(asked.seeds)} if asked.seeds else {}
    own = plan.spec.preview or Preview()
    return settings, [
        specs_of(
            own.model_copy(update={"prompts": [text], **wanted}), settings, planned.context, f"{plan.loc}.preview", "--prompts"
        )
        for text in asked.prompts
    ]


def _gathered(
    model: ToolkitRenderer, inputs: _Inputs, specs: Sequence[Sequence[ImageSpec]], progress: Progress
) -> Mapping[str, Products]:
    """The statistics of the modules that several LoRAs change, each LoRA by itself on the model."""
    downs: dict[str, dict[str, Tensor]] = {}  # first module of those that share an input -> module -> D
    for module in progress.track(list(inputs.plan.shapes), f"reading {inputs.plan.name}"):
        found = inputs.parts(module)
        if len(found) > 1:
            first = next((m for m in downs if _see_the_same(m, module)), module)
            downs.setdefault(first, {})[module] = torch.cat([f.down for f in found.values()]).float().to(model.device)
    products: dict[str, dict[int, Tensor]] = {module: {} for together in downs.values() for module in together}
    worn, pictures = -1, [(n, spec) for n, of_lora in enumerate(specs) for spec in of_lora]
    for n, spec in progress.track(pictures, "pictures", "picture", describe=lambda p: f"LoRA {p[0] + 1}"):
        if n != worn:
            model.set_adapter(inputs.changes(n))
            worn = n
        with model.watching({first: partial(_add, products, together, n) for first, together in downs.items()}):
            model.render(spec)
    return products


def _see_the_same(one: str, other: str) -> bool:
    a, b = MODULES[one], MODULES[other]
    same = _SAME_INPUT.get(a.component) == _SAME_INPUT.get(b.component) is not None
    return same and (a.section, a.index) == (b.section, b.index)


def _add(products: Mapping[str, dict[int, Tensor]], downs: Mapping[str, Tensor], n: int, inputs: Tensor) -> None:
    inputs = inputs.float()
    for module, down in downs.items():
        seen = inputs @ down.T
        gram = (seen.T @ seen).cpu().double()
        products[module][n] = products[module][n] + gram if n in products[module] else gram


def _merged(found: Parts, seen: Products, ridge: float, rank: int) -> tuple[Factors, tuple[Tensor, Tensor]]:
    """A module that several LoRAs change, and its `effects`."""
    ranks, whole = [f.rank for f in found.values()], stack(list(found.values())).map(Tensor.cpu)
    grams = [seen[n] for n in found]
    mixed = mixing(grams, ranks, ridge)
    merged = Factors(whole.up @ mixed, whole.down)
    if merged.rank > rank:
        merged = truncate_seen(merged, torch.stack(grams).sum(0), rank)
    return merged, effects(whole.up, mixed, grams, ranks)


def _write(
    inputs: _Inputs, asked: Asked, products: Mapping[str, Products], record: Mapping[str, Any], progress: Progress
) -> Judged:
    plan, count = inputs.plan, len(inputs.plan.inputs)
    inner, sizes = torch.zeros(2, count, count, dtype=torch.float64)

    def made(module: str) -> Factors:
        rank, found = plan.ranks[module], inputs.parts(module)
        merged = Factors(torch.zeros(plan.shapes[module][0], 1), torch.zeros(1, plan.shapes[module][1]))
        if len(found) > 1:
            merged, more = _merged(found, products[module], asked.ridge, rank)
            at = torch.tensor(list(found))
            inner[at[:, None], at] += more[0]
            sizes[at[:, None], at] += more[1]
        elif found:
            (alone,) = found.values()  # the largest singular values first
            merged = Factors(alone.up[:, :rank], alone.down[:rank])
        return pad(to_dtype(merged.map(lambda t: t.float().cpu()), plan.dtype), rank)

    metadata = {key: text for key, text in plan.draft.items() if key not in (RECIPE_KEY, CHECK_KEY)}
    metadata |= {"ss_output_name": asked.out.stem, "modelspec.title": asked.out.stem, EXPERIMENT_KEY: dumps(record)}
    units = plan.form.units(plan.ranks)
    with SafetensorsWriter(asked.out, plan.layout, metadata) as file:
        if plan.form.alpha:
            for stem, modules in units.items():
                file.write(f"{stem}.alpha", torch.tensor(float(sum(plan.ranks[m] for m in modules))))
        for stem, modules in progress.track(list(units.items()), plan.name):
            whole = fuse([made(module) for module in modules])
            file.write(stem + plan.form.down, whole.down)
            file.write(stem + plan.form.up, whole.up)
        file.finish(metadata)
    return Judged(torch.where(sizes > 0, inner / sizes, 0.0), len(products))


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
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="of the pictures, for each prompt")
    parser.add_argument(
        "--ridge", type=float, default=RIDGE, help=f"relative to the mean of the activations' squares ({RIDGE:g})"
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
    args = arguments(words)
    try:
        planned = next(plan_job(load_job(args.config), only=args.step, may_download=True))
        with JobProgress(Status(), Bar()) as progress:
            asked = Asked(args.prompts, args.seeds, args.ridge, args.out)
            print(merge(planned, asked, progress.loading(ToolkitRenderer), progress).text)
    except ZitMergeError as e:
        print(f"zit_merge: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("zit_merge: interrupted, nothing half-written is left", file=sys.stderr)
        return 130
    print(f"written {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

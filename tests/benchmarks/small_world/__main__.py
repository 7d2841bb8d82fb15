"""A small world in which merges can be judged: pictures, measures, a base, its few-step student, LoRAs. See README.md.

    python tests/benchmarks/small_world everything --out FOLDER    all that follows, in hours
    python tests/benchmarks/small_world world [--count 40] [--seed 0] --out FILE.png
    python tests/benchmarks/small_world measures [--count 1000] [--seed 1]
    python tests/benchmarks/small_world base [--steps 7000]
    python tests/benchmarks/small_world distill [--steps 400]
    python tests/benchmarks/small_world loras [--what zib fland ... ] [--seeds 0 1] [--rank 8] [--steps 200] [--adapter]
    python tests/benchmarks/small_world toolkit-loras ...          the same in the real AI-Toolkit
    python tests/benchmarks/small_world export base|turbo --out FOLDER
    python tests/benchmarks/small_world judge base|turbo [--lora FILE[:STRENGTH] ...] [--what zib gleb] [--out FILE.png]
    python tests/benchmarks/small_world ask alone shared stacked ... [--out FILE.md]
    python tests/benchmarks/small_world figure --out FILE.png

`base` and `distill` go on from their last checkpoint until --steps steps are done in all; each checkpoint is followed by a line
with the mean loss since the last one, every --judge-every steps also by the measures of sampled pictures; `<name>.log` beside the
weights keeps the lines. Weights go to --folder, by default $SMALL_WORLD or the user's cache, into a folder named by a hash of the
base's settings. --layers and --width make a smaller one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.benchmarks.small_world import ai_toolkit, compare, loras, pipeline, questions, train, world
from tests.benchmarks.small_world.measures import DAMAGE, accuracy, burn_found, judge
from tests.benchmarks.small_world.model import Size

BASE_STEPS = 16  # Euler steps of the base
ENLARGED = 6  # pixels of a sheet for each of a picture's


# --- pictures ------------------------------------------------------------------------------------------------------------------


def sheet(pictures: np.ndarray, columns: int = 8) -> Image.Image:
    """Pictures in rows, enlarged.

    Args:
        pictures: (n, 16, 16, 3) in [0, 1].
        columns: Of the sheet.
    """
    cells = np.pad(pictures, ((0, -len(pictures) % columns), (1, 1), (1, 1), (0, 0)), constant_values=1)
    rows = cells.reshape(-1, columns, *cells.shape[1:]).transpose(0, 2, 1, 3, 4)
    whole = rows.reshape(rows.shape[0] * rows.shape[1], -1, 3)
    image = Image.fromarray((whole * 255).round().astype(np.uint8))
    return image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)


def sampled(model: Any, scenes: Sequence[world.Scene], caption: int, steps: int, seed: int) -> np.ndarray:
    """Pictures of scenes by their captions, (n, 16, 16, 3).

    Args:
        model: The transformer.
        scenes: One picture each.
        caption: `Size.caption`.
        steps: Of Euler's method.
        seed: Of the noise.
    """
    return compare.Bench(model, caption, steps, Path(), len(scenes), seed).pictures(scenes)


def rounded(values: dict[str, float]) -> dict[str, float]:
    """To four places.

    Args:
        values: Measures.
    """
    return {name: round(value, 4) for name, value in values.items()}


# --- commands ------------------------------------------------------------------------------------------------------------------


def draw_world(args: argparse.Namespace) -> None:
    """Draws pictures of all subjects and styles, and prints their captions."""
    drawn = world.draw(args.count, args.seed, tuple(world.SUBJECTS), tuple(world.STYLES))
    sheet(drawn.pixels).save(args.out)
    print("\n".join(drawn.captions))


def check_measures(args: argparse.Namespace) -> None:
    """Prints how the measures read the world's own pictures."""
    for noise in (0.0, 0.03, 0.06, 0.1):
        print(json.dumps({"noise": noise, **rounded(accuracy(args.count, args.seed, noise))}), flush=True)
    for damage in DAMAGE:
        strengths = (4.0, 7.0, 11.0) if damage == "detail" else (1.2, 1.35, 1.5)
        found = {strength: burn_found(args.count, args.seed, damage, strength) for strength in strengths}
        print(json.dumps({"damage": damage, **rounded({str(key): value for key, value in found.items()})}), flush=True)


def settings_of(args: argparse.Namespace) -> train.Settings:
    """The base's.

    Args:
        args: The command line.
    """
    return train.Settings(Size(args.width, args.layers, args.refiners), seed=args.seed)


def student_of(args: argparse.Namespace, base: train.Training) -> train.Training:
    """The few-step student of a base.

    Args:
        args: The command line.
        base: In its state of now.
    """
    return train.turbo(base, settings_of(args), train.Distillation(seed=args.seed))


def run_training(trained: train.Training, sampler_steps: int, args: argparse.Namespace) -> None:
    """Trains, logs, judges.

    Args:
        trained: Base or student.
        sampler_steps: Of Euler's method, for the pictures that are judged.
        args: The command line.
    """
    print(f"{trained.path}: {trained.step} steps done", flush=True)
    scenes = world.draw(args.count, (args.seed, 3)).scenes

    def saved(now: train.Training) -> None:
        recent = now.losses[-args.save_every :]
        line: dict[str, float] = {"step": now.step, "loss": round(sum(recent) / len(recent), 4)}
        if now.step % args.judge_every == 0 or now.step == args.steps:
            pictures = sampled(now.average, scenes, args.caption, sampler_steps, args.seed)
            line |= rounded(judge(pictures, scenes))
            sheet(pictures).save(now.path.with_suffix(".png"))
        with now.path.with_suffix(".log").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    trained.run(args.steps, args.save_every, saved)


def train_base(args: argparse.Namespace) -> None:
    """Trains the base."""
    run_training(train.base(settings_of(args), args.folder), BASE_STEPS, args)


def distill(args: argparse.Namespace) -> None:
    """Trains the student; on an untrained base it stops."""
    base = train.base(settings_of(args), args.folder)
    if not base.step:
        raise SystemExit(f"no base at {base.path}: train it first")
    run_training(student_of(args, base), train.Distillation().student, args)


def lora_path(model: train.Training, recipe: loras.Recipe, adapter: bool, suffix: str = "") -> Path:
    """In a folder of the model's state.

    Args:
        model: What the LoRA is trained on.
        recipe: Of the LoRA.
        adapter: Whether the adapter is worn.
        suffix: Of the name.
    """
    name = f"{recipe.what}_r{recipe.rank}_s{recipe.seed}_n{recipe.steps}{'_adapter' * adapter}{suffix}.safetensors"
    return model.path.with_suffix("") / f"step{model.step}" / name


def note_lora(path: Path, recipe: loras.Recipe, losses: Sequence[float]) -> None:
    """Writes down how a LoRA was trained, beside it, and prints it.

    Args:
        path: Of the LoRA.
        recipe: Its.
        losses: Of its steps.
    """
    tenth = max(1, len(losses) // 10)
    line = {"lora": path.name, "first": np.mean(losses[:tenth]), "last": np.mean(losses[-tenth:]), **asdict(recipe)}
    path.with_suffix(".json").write_text(json.dumps(line))
    print(json.dumps(line), flush=True)


def made_lora(model: train.Training, recipe: loras.Recipe, adapter: Path | None, args: argparse.Namespace) -> Path:
    """A LoRA of our own training; one that is there stays.

    Args:
        model: What it is trained on.
        recipe: How.
        adapter: Worn.
        args: The command line.
    """
    path = lora_path(model, recipe, adapter is not None)
    if not path.exists():
        worn = loras.load(adapter) if adapter else None

        def stepped(step: int, factors: loras.Factors) -> None:
            if args.save_every and step % args.save_every == 0 and step < recipe.steps:
                loras.save(path.with_name("saves") / f"{path.stem}_{step:09d}.safetensors", factors)

        factors, losses = loras.train_lora(model.average, recipe, args.caption, worn, stepped)
        loras.save(path, factors)
        note_lora(path, recipe, losses)
    return path


def adapter_of(model: train.Training, args: argparse.Namespace) -> Path | None:
    """The training adapter, trained if it is not there; None unless it is asked for.

    Args:
        model: What it is trained on.
        args: The command line.
    """
    if not args.adapter:
        return None
    return made_lora(model, loras.Recipe(loras.ADAPTER, 16, args.seed, args.steps, pictures=1024), None, args)


def trained_model(args: argparse.Namespace) -> train.Training:
    """Base or student by `args.model`.

    Args:
        args: The command line.

    Raises:
        SystemExit: It is not trained.
    """
    base = train.base(settings_of(args), args.folder)
    found = base if args.model == "base" else student_of(args, base)
    if not found.step:
        raise SystemExit(f"nothing at {found.path}: run {'base' if args.model == 'base' else 'distill'} first")
    return found


def train_loras(args: argparse.Namespace) -> None:
    """Trains LoRAs on the student, or on the base; those that are there stay."""
    model = trained_model(args)
    adapter = adapter_of(model, args)
    for seed in args.seeds:
        for what in args.what:
            made_lora(model, loras.Recipe(what, args.rank, seed, args.steps), adapter, args)


def train_toolkit_loras(args: argparse.Namespace) -> None:
    """Trains LoRAs in the real AI-Toolkit; those that are there stay."""
    if lacking := ai_toolkit.missing():
        raise SystemExit(lacking)
    model = trained_model(args)
    adapter = adapter_of(model, args)
    with TemporaryDirectory() as folder:
        pipeline.export(model.average, Path(folder) / "pipeline")
        for seed in args.seeds:
            for what in args.what:
                recipe = loras.Recipe(what, args.rank, seed, args.steps)
                path = lora_path(model, recipe, args.adapter, "_toolkit" + "_weighted" * (args.times == "weighted"))
                if not path.exists():
                    work = Path(folder) / path.stem
                    losses = ai_toolkit.train_lora(recipe, Path(folder) / "pipeline", path, work, adapter, args.times)
                    note_lora(path, recipe, losses)


def export_pipeline(args: argparse.Namespace) -> None:
    """Writes base or student as a folder that diffusers and AI-Toolkit load as a Z-Image."""
    pipeline.export(trained_model(args).average, args.out)


def draw_figure(args: argparse.Namespace) -> None:
    """Draws the figure of the evidence."""
    from tests.benchmarks.small_world import figure  # matplotlib

    figure.draw(asked_of(args), args.out)


def judge_model(args: argparse.Namespace) -> None:
    """Samples from the base or the student, with LoRAs or without, and prints the measures."""
    base = train.base(settings_of(args), args.folder)
    student = args.model == "turbo"
    model = (student_of(args, base) if student else base).average
    given = []
    for text in args.lora:
        path, _, strength = text.partition(":")
        given.append((loras.load(Path(path)), float(strength or 1)))
    subjects = [name for name in args.what if name in world.SUBJECTS] or list(world.BASE_SUBJECTS)
    styles = [name for name in args.what if name in world.STYLES] or list(world.BASE_STYLES)
    scenes = world.draw(args.count, (args.seed, 3), subjects, styles).scenes
    with loras.worn(model, *given):
        steps = args.sampler_steps or (train.Distillation().student if student else BASE_STEPS)
        pictures = sampled(model, scenes, args.caption, steps, args.seed)
    if args.out:
        sheet(pictures).save(args.out)
    print(json.dumps({"model": args.model, "loras": args.lora, "what": args.what, **rounded(judge(pictures, scenes))}))


def asked_of(args: argparse.Namespace) -> questions.Asked:
    """The student with the LoRAs that are there.

    Args:
        args: The command line.
    """
    student = student_of(args, train.base(settings_of(args), args.folder))
    bench = compare.Bench(
        student.average, args.caption, student.settings.student, student.path.with_suffix("") / "judged", args.count
    )
    folder = lora_path(student, loras.Recipe("", args.rank, 0, args.lora_steps), False).parent
    return questions.Asked(bench, folder, f"_n{args.lora_steps}{args.ending}", args.rank, tuple(args.seeds))


def ask(args: argparse.Namespace) -> None:
    """Answers questions about merges of the LoRAs that are there; judgements that are there are not made again."""
    asked = asked_of(args)
    for name in args.questions:
        found = questions.text(list(questions.QUESTIONS[name](asked)))
        print(found, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(found + "\n")


def everything(args: argparse.Namespace) -> None:
    """Makes all of it from seeds, in hours: base, student, LoRAs, answers in answers.md, figure.png."""
    where = ["--folder", str(args.folder), "--threads", str(args.threads), "--seed", str(args.seed)]
    where += [text for name in ("width", "layers", "refiners") for text in (f"--{name}", str(getattr(args, name)))]
    main(["base", *where, "--steps", str(args.base_steps)])
    main(["distill", *where, "--steps", str(args.student_steps)])
    of = ["--steps", str(args.lora_steps)]
    main(["loras", *where, *of, "--save-every", str(max(1, args.lora_steps // 8))])
    main(["loras", *where, *of, "--adapter"])
    args.out.mkdir(parents=True, exist_ok=True)
    of = ["--lora-steps", str(args.lora_steps), "--count", str(args.count)]
    main(["ask", *where, *of, *(args.questions or questions.QUESTIONS), "--out", str(args.out / "answers.md")])
    main(["figure", *where, *of, "--out", str(args.out / "figure.png")])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: Of the command line; those of this process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Any, count: int, trains: int = 0) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=run.__doc__)
        found.add_argument("--count", type=int, default=count, help="pictures")
        found.add_argument("--seed", type=int, default=0)
        found.set_defaults(run=run, caption=Size().caption)
        if trains >= 0:
            found.add_argument("--folder", type=Path, default=train.default_folder())
            found.add_argument("--threads", type=int, default=1)
            for name_, value in (("width", Size().width), ("layers", Size().layers), ("refiners", Size().refiners)):
                found.add_argument(f"--{name_}", type=int, default=value)
        if trains > 0:
            found.add_argument("--steps", type=int, default=trains)
            found.add_argument("--save-every", type=int, default=50, metavar="STEPS")
            found.add_argument("--judge-every", type=int, default=500, metavar="STEPS")
        return found

    command("world", draw_world, 40, -1).add_argument("--out", type=Path, required=True)
    command("measures", check_measures, 1000, -1)
    command("base", train_base, 64, 7000)
    command("distill", distill, 64, 400)
    for name, run in (("loras", train_loras), ("toolkit-loras", train_toolkit_loras)):
        of = command(name, run, 64, 200)
        of.add_argument("--what", nargs="+", default=[*world.NEW_SUBJECTS, *world.NEW_STYLES])
        of.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
        of.add_argument("--rank", type=int, default=8)
        of.add_argument("--adapter", action="store_true", help="train a training adapter first, and wear it")
        of.add_argument("--model", choices=["base", "turbo"], default="turbo", help="what they are trained on")
        of.set_defaults(save_every=0)
    of.add_argument("--times", choices=["sigmoid", "weighted"], default="sigmoid", help="AI-Toolkit's timestep_type")
    of = command("export", export_pipeline, 0)
    of.add_argument("model", choices=["base", "turbo"])
    of.add_argument("--out", type=Path, required=True)
    of = command("everything", everything, 32)
    of.add_argument("--base-steps", type=int, default=7000)
    of.add_argument("--student-steps", type=int, default=400)
    of.add_argument("--lora-steps", type=int, default=200)
    of.add_argument("--questions", nargs="+", choices=list(questions.QUESTIONS), help="all by default")
    of.add_argument("--out", type=Path, required=True, help="a folder")
    for name, run in (("ask", ask), ("figure", draw_figure)):
        of = command(name, run, 32)
        of.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the LoRAs")
        of.add_argument("--rank", type=int, default=8, help="of the LoRAs")
        of.add_argument("--lora-steps", type=int, default=200, help="of the LoRAs")
        of.add_argument("--ending", default="", help="of the LoRAs' names, such as _toolkit")
        of.add_argument("--out", type=Path, required=name == "figure", help="tables are added to this file; the picture")
        if name == "ask":
            of.add_argument("questions", nargs="+", choices=list(questions.QUESTIONS))
    of = command("judge", judge_model, 96)
    of.add_argument("model", choices=["base", "turbo"])
    of.add_argument("--lora", nargs="+", default=[], metavar="FILE[:STRENGTH]")
    of.add_argument("--what", nargs="+", default=[], help="new subjects and styles of the captions")
    of.add_argument("--sampler-steps", type=int)
    of.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if hasattr(args, "threads"):
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()

"""What pictures are made with: the model and the shots that the training job names, and what `preview` says instead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Preview, Section
from ..errors import ZitMergeError
from ..jobfile import TextFile
from ..sources import Site, user_path
from ..training import ARCHS, table

SIDE, STEPS, GUIDANCE, SEED = 1024, 9, 1.0, 42  # AI-Toolkit's UI for zimage:turbo (ui/src/app/jobs/new/options.tsx)
MULTIPLE = 16  # pixels: 8 of the VAE times 2 of a patch (ZImageModel.get_bucket_divisibility)
SMALLEST = 64  # pixels: GenerateImageConfig makes every side at least so long
LARGEST = 4096

# What AI-Toolkit reads out of a prompt after two dashes (GenerateImageConfig._process_prompt_string); multipliers and what
# Z-Image has no use for stay where they are.
_OPTIONS: Mapping[str, tuple[str, type]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "seed": ("seed", int),
    "l": ("guidance", float),
    "cfg": ("guidance", float),
    "s": ("steps", int),
    "steps": ("steps", int),
}
# Of a model's settings, those that change where and when it is computed; the toolkit itself puts the dtype there.
_INDIFFERENT = ("low_vram", "layer_offloading", "assistant_lora_path", "inference_lora_path", "compile", "dtype")


@dataclass(frozen=True)
class Shot:
    """Everything of a picture but the LoRA.

    Attributes:
        prompt: With the trigger word in it.
        seed: Of the noise.
        width: Pixels.
        height: Pixels.
        steps: As AI-Toolkit counts them.
        guidance: As AI-Toolkit counts it: 1 is none.
        negative: What guidance leads away from.
    """

    prompt: str
    seed: int = SEED
    width: int = SIDE
    height: int = SIDE
    steps: int = STEPS
    guidance: float = GUIDANCE
    negative: str = ""

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Scene:
    """The model that renders.

    Attributes:
        model: `model:` of the training, or of the section, as AI-Toolkit's ModelConfig takes it.
        dtype: Of the model, as the training has it.
        samples: `sample:` likewise.
        trigger: The trigger word; None if there is none.
        place: Where the model is named.
        device: `device:` of the section.
    """

    model: Mapping[str, Any]
    dtype: str
    samples: Mapping[str, Any]
    trigger: str | None
    place: str
    device: str = "auto"

    def record(self) -> dict[str, Any]:
        """What of the model a picture depends on, for JSON: its settings, and its files where they lie on this machine.

        Folders are no part of it: a model may be moved, and a picture shown to others.
        """
        settings = {key: value for key, value in self.model.items() if key not in _INDIFFERENT} | {"name_or_path": self.name}
        path = Path(self.model["name_or_path"]).expanduser()
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*.safetensors") if p.is_file())
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return {"model": settings, "dtype": self.dtype, "files": stats}

    @property
    def name(self) -> str:
        """The model's name: its repository, or its folder or file without where that lies."""
        name = self.model["name_or_path"]
        return Path(name).name if Path(name).expanduser().exists() else name

    @property
    def row(self) -> int:
        """How many samples a training makes at a time, which is how many AI-Toolkit's gallery puts into a row."""
        return max(1, len(_samples(self.samples)))


def scene_of(section: Section, site: Site) -> Scene:
    """The model of the section, else of the training before it.

    Raises:
        ZitMergeError: There is none, or it is not Z-Image.
    """
    own = section.model if isinstance(section.model, Mapping) else {}
    training = site.training.config if site.training else {}
    model, place = (own, site.at("model")) if own.get("name_or_path") or not site.training else (table(training, "model"), "")
    place = place or f"{site.training.place}.model"
    samples = section.sample if _samples(section.sample) else table(training, "sample")
    dtype = model.get("dtype") or table(training, "train").get("dtype") or ("fp32" if site.training else "bf16")
    trigger = section.trigger_word or training.get("trigger_word")
    _check_model(model, place)
    return Scene(model, str(dtype), samples or {}, str(trigger) if trigger else None, place, section.device)


def _samples(sample: object) -> list[Mapping[str, Any]]:
    """`samples`, or the older `prompts`, of a `sample:` (toolkit/config_modules.py SampleConfig)."""
    if not isinstance(sample, Mapping):
        return []
    found = sample.get("samples") or [{"prompt": p} for p in sample.get("prompts") or []]
    return [entry for entry in found if isinstance(entry, Mapping) and isinstance(entry.get("prompt"), str)]


def _check_model(model: Mapping[str, Any], place: str) -> None:
    """Raises unless it is named and, as far as can be seen from here, Z-Image."""
    name = model.get("name_or_path")
    if not isinstance(name, str) or not name.strip():
        raise ZitMergeError(
            f"{place}.name_or_path: is missing, pictures need the base model: write name_or_path: Tongyi-MAI/Z-Image-Turbo and "
            "arch: zimage:turbo there, as a training has them"
        )
    arch = str(model.get("arch") or "")
    if not arch.startswith(ARCHS):
        raise ZitMergeError(
            f"{place}.arch: {arch or 'is missing, which'} is not Z-Image, so it renders nothing here: set arch: zimage:turbo"
        )
    path = user_path(name, f"{place}.name_or_path")
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # a repository of the hub may be anywhere
            raise ZitMergeError(f"{place}.name_or_path: {name} is not there: give a folder, a file or a repository of the hub")
    elif kind := _other_kind(path):
        raise ZitMergeError(f"{place}.name_or_path: {name} is a {kind}, not Z-Image: give the folder of a Z-Image model")


def _other_kind(path: Path) -> str:
    """What kind of model a folder says it is, where it is not Z-Image."""
    for name in ("model_index.json", "transformer/config.json", "config.json"):
        try:
            kind = json.loads((path / name).read_text(encoding="utf-8")).get("_class_name")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(kind, str):
            return "" if kind.startswith("ZImage") else kind
    return ""


def shots_of(asked: Preview, scene: Scene, site: Site, place: str) -> tuple[Shot, ...]:
    """The shots of a preview, each once.

    Args:
        asked: What is not None takes the place of the samples' own.
        scene: Has the training's samples.
        site: Where relative files start.
        place: Of the preview.

    Raises:
        ZitMergeError: There is no prompt, or a size that Z-Image can't have.
    """
    if asked.prompts is None:
        found = list(_sampled(scene))
        if not found:
            raise ZitMergeError(f"{place}.prompts: is missing, and the job has no samples whose prompts could be used: list some")
    else:
        usual = next(_sampled(scene), _usual(scene))
        found = [replace(usual, prompt=_with_trigger(p, scene)) for p in _prompts(asked.prompts, site, f"{place}.prompts")]
        found = [_with_options(shot, place) for shot in found]
    found = [shot for one in found for shot in _as_asked(one, asked)]
    for shot in found:
        _check_size(shot, place)
    return tuple(dict.fromkeys(found))


def _as_asked(shot: Shot, asked: Preview) -> Iterator[Shot]:
    """The shot with the settings of the preview, once for each of its seeds."""
    width, height = asked.size if isinstance(asked.size, list) else (asked.size, asked.size)
    settings = {"width": width, "height": height, "steps": asked.steps, "guidance": asked.guidance}
    shot = replace(shot, **{key: value for key, value in settings.items() if value is not None})
    for seed in asked.seed if isinstance(asked.seed, list) else [asked.seed]:
        yield shot if seed is None else replace(shot, seed=seed)


def _prompts(asked: Sequence[str] | str, site: Site, place: str) -> list[str]:
    if not isinstance(asked, str):
        return list(asked)
    for folder in site.folders:
        path = user_path(folder / Path(asked).expanduser(), place)
        if path.is_file():
            found = [line.strip() for line in TextFile.read(path).text.splitlines() if line.strip()]
            if not found:
                raise ZitMergeError(f"{place}: {path} has no line with a prompt: write one on each line")
            return found
    looked = ", ".join(dict.fromkeys(str(folder.absolute()) for folder in site.folders))
    raise ZitMergeError(
        f"{place}: {asked} is not there (looked in {looked}): give a text file with a prompt on each line, or a list"
    )


def _usual(scene: Scene) -> Shot:
    """What a sample that says nothing has: the settings that stand on `sample:` itself, else those of Turbo."""
    keys = {"seed": "seed", "width": "width", "height": "height", "sample_steps": "steps", "guidance_scale": "guidance"}
    found = {ours: scene.samples[key] for key, ours in keys.items() if _is_number(scene.samples.get(key))}
    return replace(Shot("", **found), negative=scene.samples.get("neg") or "")


def _sampled(scene: Scene) -> Iterator[Shot]:
    """The shots of the training's own samples, as BaseSDTrainProcess.sample makes them, but for the defaults."""
    usual = _usual(scene)
    seed = usual.seed
    keys = {"width": "width", "height": "height", "sample_steps": "steps", "guidance_scale": "guidance"}
    for i, entry in enumerate(_samples(scene.samples)):
        seed = usual.seed + i if scene.samples.get("walk_seed") else seed
        seed = entry["seed"] if _is_number(entry.get("seed")) else seed
        own = {ours: entry[key] for key, ours in keys.items() if _is_number(entry.get(key))}
        negative = entry.get("neg") or usual.negative
        shot = replace(usual, prompt=_with_trigger(entry["prompt"], scene), seed=seed, negative=negative, **own)
        yield _rounded(_with_options(shot, scene.place))


def _rounded(shot: Shot) -> Shot:
    """In the size that the toolkit makes of any other (ZImageModel.generate_single_image)."""
    width, height = (max(SMALLEST, int(side) // MULTIPLE * MULTIPLE) for side in (shot.width, shot.height))
    return replace(shot, width=width, height=height)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _with_trigger(prompt: str, scene: Scene) -> str:
    """As the toolkit puts it in (toolkit/prompt_utils.py inject_trigger_into_prompt): in its places, and nowhere else."""
    return re.sub(r"\[(name|trigger)\]", lambda _: scene.trigger, prompt) if scene.trigger else prompt


def _with_options(shot: Shot, place: str) -> Shot:
    """The shot that a prompt with `--seed 3` or `--w 512` means; words after dashes that are no option stay in the prompt."""
    text, *parts = shot.prompt.strip().split("--")
    settings: dict[str, Any] = {}
    for part in parts:
        flag, _, value = part.partition(" ")
        if flag not in _OPTIONS:
            text += f"--{part}"
            continue
        name, kind = _OPTIONS[flag]
        try:
            settings[name] = kind(value.strip())
        except ValueError:
            raise ZitMergeError(
                f"{place}: --{flag} {value.strip()} in the prompt {shot.prompt[:60]!r} is no number: mend it"
            ) from None
    return replace(shot, prompt=text.strip(), **settings)


def _check_size(shot: Shot, place: str) -> None:
    for side in (shot.width, shot.height):
        if side % MULTIPLE or not SMALLEST <= side <= LARGEST:
            near = min(max(round(side / MULTIPLE) * MULTIPLE, SMALLEST), LARGEST)
            raise ZitMergeError(
                f"{place}.size: {shot.width} x {shot.height} pixels can't be rendered, a side is {SMALLEST} to {LARGEST} and a "
                f"multiple of {MULTIPLE}: write {near} for {side}"
            )

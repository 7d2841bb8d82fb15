"""What pictures are made with: the model and the specs that the training job names, and what `preview` says instead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config.schema import Preview, Section
from ..errors import ZitMergeError
from ..files.paths import user_path
from ..files.text import TextFile
from ..planning.context import RunContext
from ..planning.training import ARCHS, table

SIDE, STEPS, GUIDANCE, SEED = 1024, 9, 1.0, 42  # AI-Toolkit's UI for zimage:turbo (ui/src/app/jobs/new/options.tsx)
MULTIPLE = 16  # pixels: 8 of the VAE times 2 of a patch (ZImageModel.get_bucket_divisibility)
SMALLEST = 64  # pixels: GenerateImageConfig makes every side at least so long
LARGEST = 4096
MOST_STEPS, MOST_GUIDANCE = 200, 100

# What AI-Toolkit reads out of a prompt after two dashes (GenerateImageConfig._process_prompt_string).
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
# What it reads there too, and Z-Image or a picture at full strength has no use for.
_UNUSED = (
    *("p2", "n2", "m", "network_multiplier", "gr", "a", "ref", "ev", "extra_values", "frames", "num_frames", "fps"),
    *("ctrl_img", "ctrl_idx"),
)
# Of a model's settings, those that change where and when it is computed, and what is set otherwise for pictures. Offloaded
# layers are none of them: they change the way in which weights are quantized.
_INDIFFERENT = ("low_vram", "assistant_lora_path", "inference_lora_path", "compile", "dtype")


@dataclass(frozen=True)
class ImageSpec:
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
class RenderSettings:
    """The model that renders.

    Attributes:
        model: `model:` of the training, or of the section, as AI-Toolkit's ModelConfig takes it.
        dtype: Of the model, as the training has it.
        samples: `sample:` likewise.
        trigger: The trigger word; None if there is none.
        place: Where the model is named.
        device: `device:` of the section.
        sampled: Where the samples are listed.
        row: How many samples a training makes at a time, which is how many AI-Toolkit's gallery puts into a row.
    """

    model: Mapping[str, Any]
    dtype: str
    samples: Mapping[str, Any]
    trigger: str | None
    place: str
    device: str = "auto"
    sampled: str = "sample"
    row: int = 1

    def record(self) -> dict[str, Any]:
        """What of the model a picture depends on, for JSON: its settings, and its files where they lie on this machine.

        Folders are no part of it: a model may be moved, and a picture shown to others.
        """
        settings = {key: value for key, value in self.model.items() if key not in _INDIFFERENT}
        paths = {key: settings[key] for key in ("name_or_path", "extras_name_or_path") if isinstance(settings.get(key), str)}
        settings |= {key: _short(path) for key, path in paths.items()}
        return {"model": settings, "dtype": self.dtype, "files": [stat for path in paths.values() for stat in _stats(path)]}

    @property
    def name(self) -> str:
        """The model's name: its repository, or its folder or file without where that lies."""
        return _short(self.model["name_or_path"])


def _short(name: str) -> str:
    path = Path(name).expanduser()
    return path.absolute().name if path.exists() else name


def _stats(name: str) -> list[tuple[str, int, int]]:
    """(name, size, time) of the weights of a model that lies on this machine."""
    path = Path(name).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.safetensors") if p.is_file())
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def settings_of(section: Section, context: RunContext) -> RenderSettings:
    """The model of the section, else of the training before it, with the settings that the section gives instead.

    Raises:
        ZitMergeError: There is none, or it is not Z-Image.
    """
    own = section.model if isinstance(section.model, Mapping) else {}
    training = context.training.config if context.training else {}
    is_own = bool(own.get("name_or_path")) or not context.training
    model = own if is_own else {**table(training, "model"), **own}
    place = context.at("model") if is_own else f"{context.training.place}.model"
    has_own = bool(_samples(section.sample)) or not context.training
    samples = section.sample if has_own else table(training, "sample")
    _check_model(model, place)
    return RenderSettings(
        model,
        _dtype(section, training, is_own),
        samples if isinstance(samples, Mapping) else {},
        _trigger(section.trigger_word, training.get("trigger_word")),
        place,
        section.device,
        context.at("sample") if has_own else f"{context.training.place}.sample",
        _row(training.get("sample") if context.training else section.sample),
    )


def _dtype(section: Section, training: Mapping[str, Any], is_own: bool) -> str:
    """Of the model: a training has that of its `train` (BaseSDTrainProcess.__init__, TrainConfig)."""
    if not is_own:
        return str(table(training, "train").get("dtype") or "fp32")
    own = section.train if isinstance(section.train, Mapping) else {}
    return str(section.model.get("dtype") or own.get("dtype") or table(training, "train").get("dtype") or "bf16")


def _trigger(own: object, trained: object) -> str | None:
    """The section's trigger word, else the training's. An empty one has its places emptied, as in the toolkit."""
    found = own or (own if trained is None else trained)
    return None if found is None else str(found)


def _row(sample: object) -> int:
    """How many samples AI-Toolkit's UI counts (ui/src/components/SampleImages.tsx)."""
    lists = [sample.get(key) for key in ("samples", "prompts")] if isinstance(sample, Mapping) else []
    return max([1, *(len(found) for found in lists if isinstance(found, list))])


def _samples(sample: object) -> list[Mapping[str, Any]]:
    """`samples`, or the older `prompts`, of a `sample:` (toolkit/config_modules.py SampleConfig)."""
    if not isinstance(sample, Mapping):
        return []
    samples, prompts = (found if isinstance(found := sample.get(key), list) else [] for key in ("samples", "prompts"))
    found = samples or [{"prompt": p} for p in prompts]
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
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):  # a repository of the hub may be anywhere
            raise ZitMergeError(f"{place}.name_or_path: {name} is not there: give a folder, a file or a repository of the hub")
    elif kind := _other_kind(path):
        raise ZitMergeError(f"{place}.name_or_path: {name} is a {kind}, not Z-Image: give the folder of a Z-Image model")
    if isinstance(extras := model.get("extras_name_or_path"), str):
        user_path(extras, f"{place}.extras_name_or_path")


def _other_kind(path: Path) -> str:
    """What kind of model a folder says it is, where it is not Z-Image."""
    for name in ("model_index.json", "transformer/config.json", "config.json"):
        try:
            kind = json.loads((path / name).read_text(encoding="utf-8")).get("_class_name")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(kind, str):
            return "" if kind.startswith("ZImage") else kind
    return ""


def specs_of(
    asked: Preview, settings: RenderSettings, context: RunContext, place: str, listed: str = ""
) -> tuple[ImageSpec, ...]:
    """The specs of a preview, each once.

    Args:
        asked: What is not None takes the place of the samples' own.
        settings: Has the training's samples.
        context: Where relative files start.
        place: Of the preview.
        listed: Of the prompts, where they don't stand there.

    Raises:
        ZitMergeError: There is no prompt, or a size that Z-Image can't have.
    """
    listed = listed or f"{place}.prompts"
    if asked.prompts is None:
        found = [spec for sample in _sampled(settings) for spec in _as_asked(sample, asked)]
        if not found:
            raise ZitMergeError(f"{listed}: is missing, and the job has no samples whose prompts could be used: list some")
    else:
        usual = next(_sampled(settings), _rounded(_usual(settings)))
        found = [
            _with_options(spec, listed, keep=True)  # an option of a prompt is nearer to it than those of all
            for prompt in _prompts(asked.prompts, context, listed)
            for spec in _as_asked(replace(usual, prompt=_with_trigger(prompt, settings)), asked)
        ]
    for spec in found:
        _check(spec, place)
    return tuple(dict.fromkeys(found))


def _as_asked(spec: ImageSpec, asked: Preview) -> Iterator[ImageSpec]:
    """The spec with the settings of the preview, once for each of its seeds."""
    width, height = asked.size if isinstance(asked.size, list) else (asked.size, asked.size)
    settings = {"width": width, "height": height, "steps": asked.steps, "guidance": asked.guidance}
    spec = replace(spec, **{key: value for key, value in settings.items() if value is not None})
    for seed in asked.seed if isinstance(asked.seed, list) else [asked.seed]:
        yield spec if seed is None else replace(spec, seed=seed)


def _prompts(asked: Sequence[str] | str, context: RunContext, place: str) -> list[str]:
    if not isinstance(asked, str):
        return list(asked)
    wanted = user_path(asked, place)
    candidates = list(dict.fromkeys((folder / wanted).absolute() for folder in context.folders))
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        looked = ", ".join(str(path.parent) for path in candidates)
        raise ZitMergeError(
            f"{place}: {asked} is not there (looked in {looked}): give a text file with a prompt on each line, or a list"
        )
    try:
        text = TextFile.read(path).text
    except ZitMergeError as e:
        raise ZitMergeError(f"{place}: {path} is no text that can be read: give a text file with a prompt on each line") from e
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise ZitMergeError(f"{place}: {path} has no line with a prompt: write one on each line")
    return found


def _usual(settings: RenderSettings) -> ImageSpec:
    """What a sample that says nothing has: the settings that stand on `sample:` itself, else those of Turbo."""
    return replace(ImageSpec(""), **_settings(settings.samples))


def _settings(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What a `sample:`, or an entry of it, says of a spec."""
    wholes = {"seed": "seed", "width": "width", "height": "height", "sample_steps": "steps"}
    found: dict[str, Any] = {ours: int(sample[key]) for key, ours in wholes.items() if _is_number(sample.get(key))}
    if found.get("seed") == -1:
        del found["seed"]  # any: the toolkit draws one
    if _is_number(sample.get("guidance_scale")):
        found["guidance"] = float(sample["guidance_scale"])
    if "neg" in sample:
        found["negative"] = sample["neg"] if isinstance(sample["neg"], str) else ""
    return found


def _is_number(value: object) -> bool:
    """Of a size that torch can count with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _sampled(settings: RenderSettings) -> Iterator[ImageSpec]:
    """The specs of the training's own samples, as BaseSDTrainProcess.sample makes them, but for the defaults."""
    usual = _usual(settings)
    seed = usual.seed
    for i, entry in enumerate(_samples(settings.samples)):
        own = _settings(entry)
        seed = own.get("seed", usual.seed + i if settings.samples.get("walk_seed") else seed)  # it stays for those that follow
        spec = replace(usual, prompt=_with_trigger(entry["prompt"], settings), **own | {"seed": seed})
        yield _rounded(_with_options(spec, settings.sampled))


def _rounded(spec: ImageSpec) -> ImageSpec:
    """In the size that the toolkit makes of any other (ZImageModel.generate_single_image)."""
    width, height = (max(SMALLEST, side // MULTIPLE * MULTIPLE) for side in (spec.width, spec.height))
    return replace(spec, width=width, height=height)


def _with_trigger(prompt: str, settings: RenderSettings) -> str:
    """As the toolkit puts it in (toolkit/prompt_utils.py inject_trigger_into_prompt): in its places, and nowhere else."""
    return prompt if settings.trigger is None else re.sub(r"\[(name|trigger)\]", lambda _: settings.trigger, prompt)


def _with_options(spec: ImageSpec, place: str, *, keep: bool = False) -> ImageSpec:
    """The spec that a prompt with `--seed 3` or `--w 512` means.

    Args:
        spec: With the prompt as it was written.
        place: Of the prompt, for messages.
        keep: Words after dashes that are no option stay in the prompt; the toolkit drops them from a sample's.
    """
    text, *parts = spec.prompt.strip().split("--")
    settings: dict[str, Any] = {}
    for part in parts:
        flag = part.split(" ")[0].strip()
        value = part.removeprefix(flag).strip()
        if flag in _OPTIONS:
            name, kind = _OPTIONS[flag]
            try:
                settings[name] = kind(value)
            except ValueError:
                raise ZitMergeError(
                    f"{place}: --{flag} in the prompt {spec.prompt[:60]!r} needs a number, not {value!r}: mend it"
                ) from None
        elif keep and flag not in _UNUSED:
            text += f"--{part}"
    return replace(spec, prompt=text.strip(), **settings)


def _check(spec: ImageSpec, place: str) -> None:
    """Raises unless Z-Image can render it."""
    for side in (spec.width, spec.height):
        if side % MULTIPLE or not SMALLEST <= side <= LARGEST:
            near = min(max(round(side / MULTIPLE) * MULTIPLE, SMALLEST), LARGEST)
            raise ZitMergeError(
                f"{place}.size: {spec.width} x {spec.height} pixels can't be rendered, a side is {SMALLEST} to {LARGEST} and a "
                f"multiple of {MULTIPLE}: write {near} for {side}"
            )
    if not 1 <= spec.steps <= MOST_STEPS:
        raise ZitMergeError(f"{place}.steps: {spec.steps} steps can't be rendered: write a whole number from 1 to {MOST_STEPS}")
    if not 0 <= spec.guidance <= MOST_GUIDANCE:
        raise ZitMergeError(f"{place}.guidance: {spec.guidance:g} can't be rendered: write a number from 0 to {MOST_GUIDANCE}")
    if not 0 <= spec.seed < 2**63:
        raise ZitMergeError(f"{place}.seed: {spec.seed} is no seed that gives the same noise twice: write a number from 0")

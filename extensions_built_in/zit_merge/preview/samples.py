"""From a config to settings and image specs: the training's model and samples, and what the section and `preview` change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.schema import Preview, Section
from ..errors import SettingError, ZitMergeError, joined, located
from ..files.extent import read_json
from ..files.inputs import read_limited
from ..files.paths import system_path, unquoted, user_path
from ..files.text import TextFile
from ..planning.context import RunContext
from ..planning.training import ARCHS, table
from .settings import MULTIPLE, SMALLEST, ImageSpec, RenderSettings

LARGEST = 4096  # pixels
MOST_STEPS, MOST_GUIDANCE = 200, 100

# What AI-Toolkit reads from a prompt after two dashes (GenerateImageConfig._process_prompt_string).
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
# What it reads as well, but has no meaning for Z-Image or for a picture at full strength.
_UNUSED = (
    *("p2", "n2", "m", "network_multiplier", "gr", "a", "ref", "ev", "extra_values", "frames", "num_frames", "fps"),
    *("ctrl_img", "ctrl_idx"),
)


def settings_of(section: Section, context: RunContext) -> RenderSettings:
    """The model of the section, or that of the training before it with the section's settings on top.

    Args:
        section: Validated.
        context: Where it runs.

    Raises:
        ZitMergeError: There is no model, or it is not Z-Image.
    """
    own = section.model if isinstance(section.model, Mapping) else {}
    training, loc = (context.training.config, context.training.loc) if context.training else ({}, "")
    is_own = bool(own.get("name_or_path")) or not context.training
    model = own if is_own else {**table(training, "model"), **own}
    model_loc = context.at("model") if is_own else joined(loc, "model")
    has_own = bool(_samples(section.sample)) or not context.training
    samples = section.sample if has_own else table(training, "sample")
    with located(model_loc):
        _check_model(model)
    return RenderSettings(
        model,
        _dtype(section, training, is_own),
        samples if isinstance(samples, Mapping) else {},
        _trigger(section.trigger_word, training.get("trigger_word")),
        model_loc,
        section.device,
        context.at("sample") if has_own else joined(loc, "sample"),
        _row(training.get("sample") if context.training else section.sample),
    )


def _dtype(section: Section, training: Mapping[str, Any], is_own: bool) -> str:
    """Of the model: a training uses that of its `train` (BaseSDTrainProcess.__init__, TrainConfig)."""
    if not is_own:
        return str(table(training, "train").get("dtype") or "fp32")
    own = section.train if isinstance(section.train, Mapping) else {}
    return str(section.model.get("dtype") or own.get("dtype") or table(training, "train").get("dtype") or "bf16")


def _trigger(own: object, trained: object) -> str | None:
    """The section's trigger word, else the training's. An empty one is replaced by nothing, as in the toolkit."""
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


def _check_model(model: Mapping[str, Any]) -> None:
    """Raises unless a model is named that is, as far as its files tell, Z-Image."""
    name = model.get("name_or_path")
    if not isinstance(name, str) or not name.strip():
        raise SettingError(
            "is missing, pictures need the base model: write name_or_path: Tongyi-MAI/Z-Image-Turbo and arch: zimage:turbo "
            "there, as in a training",
            "name_or_path",
        )
    arch = str(model.get("arch") or "")
    if not arch.startswith(ARCHS):
        raise SettingError(
            f"{arch or 'is missing, which'} is not Z-Image and can't be rendered here: set arch: zimage:turbo", "arch"
        )
    with located("name_or_path"):
        path = user_path(name)
        if not path.exists():
            if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):  # a repository need not be on this machine
                raise SettingError(f"{name} does not exist: give a folder, a file or a Hugging Face repository")
        elif kind := _other_kind(path):
            raise SettingError(f"{name} is a {kind}, not Z-Image: give the folder of a Z-Image model")
    if isinstance(extras := model.get("extras_name_or_path"), str):
        with located("extras_name_or_path"):
            user_path(extras)


def _other_kind(path: Path) -> str:
    """The class name in a model's folder, unless it is Z-Image's; empty where there is none."""
    for name in ("model_index.json", "transformer/config.json", "config.json"):
        try:
            kind = read_json(read_limited(path / name).decode()).get("_class_name")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(kind, str):
            return "" if kind.startswith("ZImage") else kind
    return ""


def specs_of(
    asked: Preview, settings: RenderSettings, context: RunContext, loc: str, prompts_loc: str = ""
) -> tuple[ImageSpec, ...]:
    """The image specs of a preview, without duplicates.

    Args:
        asked: What is not None replaces the samples' own settings.
        settings: With the training's samples.
        context: Where relative files start.
        loc: Of the preview.
        prompts_loc: Of the prompts, if it is not `prompts` of the preview.

    Raises:
        SettingError: There is no prompt, or Z-Image can't render a spec.
    """
    prompts_loc = prompts_loc or joined(loc, "prompts")
    if asked.prompts is None:
        found = [spec for sample in _sample_specs(settings) for spec in _as_asked(sample, asked)]
        if not found:
            raise SettingError("is missing, and the job has no samples with prompts: list some", prompts_loc)
    else:
        first = next(_sample_specs(settings), _rounded(_defaults(settings)))
        with located(prompts_loc):
            found = [
                _with_options(spec, keep=True)  # last: an option of a prompt overrides the settings of all
                for prompt in _prompts(asked.prompts, context)
                for spec in _as_asked(replace(first, prompt=_with_trigger(prompt, settings)), asked)
            ]
    with located(loc):
        for spec in found:
            _check(spec)
    return tuple(dict.fromkeys(found))


def _as_asked(spec: ImageSpec, asked: Preview) -> Iterator[ImageSpec]:
    """The spec with the settings of the preview, once for each of its seeds."""
    width, height = asked.size if isinstance(asked.size, list) else (asked.size, asked.size)
    changes: dict[str, Any] = {"width": width, "height": height, "steps": asked.steps, "guidance": asked.guidance}
    spec = replace(spec, **{key: value for key, value in changes.items() if value is not None})
    for seed in asked.seed if isinstance(asked.seed, list) else [asked.seed]:
        yield spec if seed is None else replace(spec, seed=seed)


def _prompts(asked: Sequence[str] | str, context: RunContext) -> list[str]:
    """The prompts, read from the file that a string names."""
    if not isinstance(asked, str):
        return list(asked)
    wanted = system_path(unquoted(asked))
    candidates = list(dict.fromkeys((folder / wanted).absolute() for folder in context.folders))
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        folders = ", ".join(str(path.parent) for path in candidates)
        raise SettingError(f"{asked} does not exist (looked in {folders}): give a text file with one prompt per line, or a list")
    try:
        text = TextFile.read(path).text
    except ZitMergeError as e:
        raise SettingError(f"{path} can't be read as text: give a text file with one prompt per line") from e
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise SettingError(f"{path} has no prompts: write one per line")
    return found


def _defaults(settings: RenderSettings) -> ImageSpec:
    """What a sample without settings has: those of `sample:` itself, else those of Turbo."""
    return replace(ImageSpec(""), **_sample_settings(settings.samples))


def _sample_settings(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec that a `sample:`, or one of its entries, sets."""
    wholes = {"seed": "seed", "width": "width", "height": "height", "sample_steps": "steps"}
    found: dict[str, Any] = {ours: int(sample[key]) for key, ours in wholes.items() if _is_number(sample.get(key))}
    if found.get("seed") == -1:
        del found["seed"]  # random: the toolkit draws one
    if _is_number(sample.get("guidance_scale")):
        found["guidance"] = float(sample["guidance_scale"])
    if "neg" in sample:
        found["negative"] = sample["neg"] if isinstance(sample["neg"], str) else ""
    return found


def _is_number(value: object) -> bool:
    """Whether it is a number that fits into torch's integers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _sample_specs(settings: RenderSettings) -> Iterator[ImageSpec]:
    """The training's own samples as BaseSDTrainProcess.sample makes them, except for the defaults."""
    defaults = _defaults(settings)
    seed = defaults.seed
    for i, entry in enumerate(_samples(settings.samples)):
        own = _sample_settings(entry)
        walked = defaults.seed + i if settings.samples.get("walk_seed") else seed
        seed = own.get("seed", walked)  # it stays for the samples that follow
        spec = replace(defaults, prompt=_with_trigger(entry["prompt"], settings), **own | {"seed": seed})
        with located(settings.samples_loc):
            yield _rounded(_with_options(spec))


def _rounded(spec: ImageSpec) -> ImageSpec:
    """With the size that the toolkit rounds it to (ZImageModel.generate_single_image)."""
    width, height = (max(SMALLEST, side // MULTIPLE * MULTIPLE) for side in (spec.width, spec.height))
    return replace(spec, width=width, height=height)


def _with_trigger(prompt: str, settings: RenderSettings) -> str:
    """With the trigger word in its placeholders only (toolkit/prompt_utils.py inject_trigger_into_prompt)."""
    trigger = settings.trigger
    return prompt if trigger is None else re.sub(r"\[(name|trigger)\]", lambda _: trigger, prompt)


def _with_options(spec: ImageSpec, *, keep: bool = False) -> ImageSpec:
    """The spec with the options of its prompt, such as `--seed 3` or `--w 512`, applied and removed from the text.

    Args:
        spec: With the prompt as it was written.
        keep: Unknown words after dashes stay in the prompt; the toolkit drops them from a sample's.
    """
    text, *parts = spec.prompt.strip().split("--")
    options: dict[str, Any] = {}
    for part in parts:
        flag = part.split(" ")[0].strip()
        value = part.removeprefix(flag).strip()
        if flag in _OPTIONS:
            name, kind = _OPTIONS[flag]
            try:
                options[name] = kind(value)
            except ValueError:
                raise SettingError(
                    f"--{flag} in the prompt {spec.prompt[:60]!r} needs a number, not {value!r}: correct it"
                ) from None
        elif keep and flag not in _UNUSED:
            text += f"--{part}"
    return replace(spec, prompt=text.strip(), **options)


def _check(spec: ImageSpec) -> None:
    """Raises unless Z-Image can render it."""
    for side in (spec.width, spec.height):
        if side % MULTIPLE or not SMALLEST <= side <= LARGEST:
            near = min(max(round(side / MULTIPLE) * MULTIPLE, SMALLEST), LARGEST)
            raise SettingError(
                f"{spec.width} x {spec.height} pixels can't be rendered, a side is {SMALLEST} to {LARGEST} and a multiple of "
                f"{MULTIPLE}: write {near} for {side}",
                "size",
            )
    if not 1 <= spec.steps <= MOST_STEPS:
        raise SettingError(f"{spec.steps} steps can't be rendered: write a whole number from 1 to {MOST_STEPS}", "steps")
    if not 0 <= spec.guidance <= MOST_GUIDANCE:
        raise SettingError(f"{spec.guidance:g} can't be rendered: write a number from 0 to {MOST_GUIDANCE}", "guidance")
    if not 0 <= spec.seed < 2**63:
        raise SettingError(f"{spec.seed} is not a fixed seed: write a number from 0", "seed")

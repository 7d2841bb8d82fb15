"""Which program wrote a LoRA file: by its metadata, else by how it names its keys.

Two tables, each from the surest mark to the weakest; the first that fits wins. Metadata name a program. Key styles are shared:
where several programs write the same, all of them are named, and where no rule fits, nobody is.

A mark's `signs` are words that must hold of the keys, or must not if they begin with `-`:

    a prefix as in `names.PREFIXES`, `bare` for none           A/B, down/up, default, dot, diff: endings of keys
    LoRA, LoKr, LoHa, whole: algorithms                        alpha: there are alpha keys; endless: one of 1e9 and more
    native: names of the original checkpoint (fused qkv)       adaLN: adaLN modules are changed
    garbled: separators exchanged (`noise.refiner`)            to.q: `attention.to.q` in the place of `attention.to_q`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..files.extent import read_json
from ..model.zimage import COMPONENTS, MODULES
from .algorithms import FULL
from .metadata import EXPERIMENT_KEY, RECIPE_KEY, VERSION_KEY
from .reader import LoraFile
from .scales import ENDLESS


@dataclass(frozen=True)
class Trainer:
    """The program that wrote a file.

    Attributes:
        name: `AI-Toolkit`; several joined by `or` where they write the same; a form or a converter in parentheses.
        version: As the metadata say it, or None.
        by: `metadata`, or `keys` where only the key style speaks for it.
    """

    name: str
    version: str | None
    by: str


@dataclass(frozen=True)
class _Mark:
    """What a program leaves in the metadata.

    Attributes:
        name: Of the program.
        key: A metadata key that must be there.
        value: A regular expression that must be found in its value.
        signs: Of the keys.
        version: The metadata key of the version, `key/inner` where it stands inside a JSON text.
        lacks: A metadata key that must not be there.
    """

    name: str
    key: str
    value: str = ""
    signs: str = ""
    version: str = ""
    lacks: str = ""


TOOLKIT_SCRIPT = "AI-Toolkit (its merging script)"
_SOFTWARE, _AI_TOOLKIT = "software/version", r'"name":\s*"ai-toolkit"'
_MUSUBI = r"^networks\.(lora_zimage|lokr|loha)$"
_TO_OTHER = "musubi-tuner (convert_lora.py)"
_TO_COMFY = "musubi-tuner (convert_z_image_lora_to_comfy.py)"
_DIFFUSERS = "diffusers' training script or SimpleTuner"
_DIFFSYNTH = "DiffSynth-Studio, ModelScope or Z-Image-i2L"

_MARKS: tuple[_Mark, ...] = (
    _Mark("zit_merge (the experiment ssr)", EXPERIMENT_KEY, '"method":"ssr"', version=VERSION_KEY),
    _Mark("zit_merge", RECIPE_KEY, version=VERSION_KEY),  # ours: metadata.merged_metadata
    _Mark("zit_merge", VERSION_KEY, version=VERSION_KEY),
    # ui_scripts/merge_loras.py keeps `software` of its first input and drops training_info, which every save of a training has
    _Mark(TOOLKIT_SCRIPT, "software", _AI_TOOLKIT, lacks="training_info", version=_SOFTWARE),
    _Mark("AI-Toolkit (old LoKr keys)", "software", _AI_TOOLKIT, "lycoris_", version=_SOFTWARE),  # old_lokr_format: true
    _Mark("AI-Toolkit", "software", _AI_TOOLKIT, version=_SOFTWARE),  # toolkit/metadata.py, info.py
    # modelSaver/mixin/DtypeModelSaverMixin.py; the forms by their keys, LEGACY being the only one before 2026-07-03
    _Mark("OneTrainer (LEGACY form)", "ot_revision", signs="transformer. down/up", version="ot_revision"),
    _Mark("OneTrainer (DIFFUSERS form)", "ot_revision", signs="transformer. A/B", version="ot_revision"),
    _Mark("OneTrainer (KOHYA form)", "ot_revision", signs="lora_unet_", version="ot_revision"),
    _Mark("OneTrainer (ORIGINAL form)", "ot_revision", signs="bare", version="ot_revision"),
    _Mark("OneTrainer (COMFY form)", "ot_revision", signs="diffusion_model.", version="ot_revision"),
    _Mark("OneTrainer", "ot_revision", version="ot_revision"),  # LoHa and LoKr are alike in LEGACY and DIFFUSERS
    _Mark("OneTrainer", "ot_branch"),
    _Mark("SimpleTuner (LyCORIS)", "lycoris_config"),  # save_weights of its LyCORIS network
    _Mark(
        "SimpleTuner", "modelspec.architecture", r"^z-?image-[\w-]+/lora$"
    ),  # <family>-<flavour>/lora; others write Z-Image/lora
    _Mark("a resizing or merging tool of kohya's family", "ss_network_dim", "^Dynamic$"),  # networks/resize_lora.py
    _Mark("a resizing tool of kohya's family", "ss_training_comment", r"^(dimension is resized from|Dynamic resize with) "),
    _Mark(_TO_COMFY, "ss_network_module", _MUSUBI, "lora_unet_ native"),  # both converters keep the metadata
    _Mark(_TO_OTHER, "ss_network_module", _MUSUBI, "diffusion_model."),
    _Mark("musubi-tuner", "ss_network_module", _MUSUBI),  # training/trainer_base.py
    _Mark("LyCORIS in a trainer of kohya's family", "ss_network_module", r"^lycoris\."),
    _Mark("a trainer of kohya's family", "ss_network_module"),
    _Mark("None_Z-image-Turbo_trainer", "num_modules", signs="down/up"),  # networks/lora.py: lora_dim, alpha, num_modules
    _Mark("SimpleTuner", "lora_adapter_metadata", signs="diffusion_model. alpha"),  # lora_format=comfyui writes both
    _Mark(_DIFFUSERS, "lora_adapter_metadata"),  # save_lora_weights of diffusers
    _Mark("ComfyUI-LoRA-Optimizer", "source_loras"),
    _Mark("Realtime-Lora", "refined_by"),
    _Mark("supermerger", "sshs_cp0"),
    _Mark("a merging tool", "modelspec.merged_from"),  # sd-scripts library/sai_model_spec.py
)

# (signs, name). A file that mixes prefixes has no key style.
_STYLES: tuple[tuple[str, str], ...] = (
    ("lora_unet__", "VideoX-Fun"),  # nobody else has the second underscore
    ("base_model.model.", "PEFT (save_pretrained)"),
    ("base_model.model.transformer.", "PEFT (save_pretrained)"),
    ("bare default", _DIFFSYNTH),  # the state dict of a PEFT model as it is
    ("bare dot to.q", "Anime-Z"),  # diffusers lora_conversion_utils.py has a comment on it
    ("diffusion_model. whole A/B -LoRA", "AI-Toolkit (fullrank)"),  # lora_A alone, (out, in)
    ("diffusion_model. LoKr endless", "AI-Toolkit"),  # lokr_full_rank: linear_alpha = 9999999999
    ("lycoris_ LoKr endless", "AI-Toolkit (old LoKr keys)"),
    ("lycoris_ LoKr", "SimpleTuner, LyCORIS or AI-Toolkit (old LoKr keys)"),
    ("lycoris_", "SimpleTuner or LyCORIS"),
    ("diffusion_model. native A/B -alpha", "diffusion-pipe"),  # PEFT on the model under its original names
    ("diffusion_model. native LoKr -alpha", "diffusion-pipe"),
    ("diffusion_model. native down/up alpha", "ComfyUI (Train LoRA)"),
    ("diffusion_model. native LoHa alpha", "ComfyUI (Train LoRA)"),
    ("diffusion_model. native LoKr alpha", "ComfyUI (Train LoRA)"),
    ("diffusion_model. native down/up -alpha", "ComfyUI (Extract and Save Lora)"),
    ("diffusion_model. native diff", "ComfyUI (Extract and Save Lora)"),  # lora_type full_diff
    ("lora_unet_ native alpha", f"{_TO_COMFY} or None_Z-image-Turbo_trainer (convert_lora_comfyui.py)"),
    ("diffusion_model. to.q down/up alpha", "None_Z-image-Turbo_trainer (old)"),
    ("diffusion_model. down/up alpha", "None_Z-image-Turbo_trainer"),  # its extract_lora_svd.py too
    ("diffusion_model. garbled", _TO_OTHER),
    ("diffusion_model. A/B -alpha adaLN", "AI-Toolkit"),
    ("diffusion_model. A/B -alpha", f"AI-Toolkit or {_TO_OTHER}"),  # which garbles only what it does not train by default
    ("diffusion_model. A/B alpha", "OneTrainer (COMFY form), SimpleTuner or zit_merge"),
    ("diffusion_model. LoKr alpha", f"AI-Toolkit, OneTrainer (COMFY form) or {_TO_OTHER}"),
    ("diffusion_model. LoHa alpha", f"OneTrainer (COMFY form) or {_TO_OTHER}"),
    ("lora_unet_ alpha", "musubi-tuner or OneTrainer (KOHYA form)"),
    ("transformer. down/up alpha", "OneTrainer (LEGACY form)"),
    ("transformer. LoKr alpha", "OneTrainer"),
    ("transformer. LoHa alpha", "OneTrainer"),
    ("transformer. A/B -alpha", f"{_DIFFUSERS.replace(' or', ',')} or OneTrainer (DIFFUSERS form)"),
    ("bare A/B alpha", "OneTrainer (ORIGINAL form)"),
)

_BLOCKS = ("layers", "noise_refiner", "context_refiner")
_CORE, _ATTENTION = COMPONENTS[1:], ("to_q", "to_k", "to_v", "to_out")
# program -> (sections, components) that it trains unless it is told otherwise (facts: each trainer's default targets)
_USUAL: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "AI-Toolkit": (("layers",), COMPONENTS),  # 240: transformer_only
    "AI-Toolkit (old LoKr keys)": (("layers",), COMPONENTS),
    "musubi-tuner": (("layers",), _CORE),  # 210: excludes .*(_modulation|_refiner).*
    _TO_COMFY: (("layers",), _CORE),
    _TO_OTHER: (("layers",), _CORE),
    _DIFFSYNTH: (_BLOCKS, _CORE),  # 238
    _DIFFUSERS: (_BLOCKS, _ATTENTION),  # 136
    "SimpleTuner": (_BLOCKS, _ATTENTION),  # 136
    "diffusion-pipe": (_BLOCKS, COMPONENTS),  # 270
}

_ENDINGS: Mapping[str, str] = {
    ".lora_A.weight": "A/B",
    ".lora_down.weight": "down/up",
    ".lora_A.default.weight": "default",
    ".lora.down.weight": "dot",
    ".diff": "diff",
}
_GARBLED = re.compile(r"adaLN\.modulation|(noise|context)\.refiner|attention\.to\.|feed\.forward")
_TO_Q = re.compile(r"attention\.to\.[qkv]\.")


def recognise(lora: LoraFile) -> Trainer | None:
    """The program that wrote a file, or None where nothing tells."""
    signs = _signs(lora)
    for mark in _MARKS:
        if _is_marked(lora.metadata, mark) and _hold(mark.signs, signs):
            return Trainer(mark.name, _version(lora.metadata, mark.version), "metadata")
    if "mixed" in signs:
        return None
    return next((Trainer(name, None, "keys") for style, name in _STYLES if _hold(style, signs)), None)


def usual_modules(trainer: Trainer | None) -> frozenset[str]:
    """The modules that a program trains by default; empty where that is not known, or not which program it was."""
    sections, components = _USUAL.get(trainer.name if trainer else "", ((), ()))
    return frozenset(m.name for m in MODULES.values() if m.section in sections and m.component in components)


def _is_marked(metadata: Mapping[str, str], mark: _Mark) -> bool:
    said = metadata.get(mark.key)
    return said is not None and bool(re.search(mark.value, said)) and (not mark.lacks or mark.lacks not in metadata)


def _hold(wanted: str, signs: frozenset[str]) -> bool:
    return all(word[1:] not in signs if word.startswith("-") else word in signs for word in wanted.split())


def _signs(lora: LoraFile) -> frozenset[str]:
    """The words that hold of a file's keys."""
    changes = [change for several in lora.changes.values() for change in several]
    keys = [key for change in changes for key in change.keys.values()]
    styles = [style.split("* ", 1) for style in lora.styles]
    prefixes = {prefix or "bare" for prefix, _ in styles}
    signs = prefixes | {_ENDINGS[suffix] for _, suffix in styles if suffix in _ENDINGS}
    signs |= {"whole" if change.algorithm == FULL else change.algorithm for change in changes}
    further = {
        "mixed": len(prefixes) > 1,
        "alpha": any(change.alpha is not None for change in changes),
        "endless": any(change.alpha is not None and change.alpha >= ENDLESS for change in changes),
        "native": any(change.native for change in changes),
        "adaLN": any(MODULES[name].component == "adaLN_modulation" for name in lora),
        "garbled": any(map(_GARBLED.search, keys)),
        "to.q": any(map(_TO_Q.search, keys)),
    }
    return frozenset(signs | {word for word, holds in further.items() if holds})


def _version(metadata: Mapping[str, str], where: str) -> str | None:
    """The text at a metadata key, or at `key/inner` inside its JSON."""
    key, _, inner = where.partition("/")
    text = metadata.get(key)
    if text is None or not inner:
        return text
    try:
        table = read_json(text)
    except ValueError:  # somebody else's metadata: not ours to refuse
        return None
    version = table.get(inner) if isinstance(table, dict) else None
    return None if version is None else str(version)

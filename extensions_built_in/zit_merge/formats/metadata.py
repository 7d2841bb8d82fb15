"""What the metadata of LoRA files say, and what a merged file may say in turn."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..files.extent import read_json
from .algorithms import Rotation

if sys.version_info >= (3, 11):
    from re import _parser as regex  # type: ignore[attr-defined]
else:
    import sre_parse as regex

RECIPE_KEY = "zit_merge.recipe"
VERSION_KEY = "zit_merge.version"
CHECK_KEY = "zit_merge.check"
EXPERIMENT_KEY = "zit_merge.experiment"  # in the place of a recipe: what an experiment made the file from
BASE_KEY = "zit_merge.base"  # [{model, arch, adapter}, ...]: what the LoRAs that went in were trained on, each only once

OF_RANKS = ("ss_network_dim", "ss_network_alpha", "lora_adapter_metadata")  # what follows from the ranks

ARCHITECTURE = "Z-Image/lora"  # what musubi and OneTrainer write; SwarmUI compares without regard to case


def tag_frequency(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """`ss_tag_frequency` as {folder: {tag: count}}; empty where it is absent or not of that form."""
    table = _json(metadata.get("ss_tag_frequency"))
    if not isinstance(table, dict):
        return {}
    return {
        str(folder): {str(t): int(n) for t, n in tags.items() if _is_number(n)}
        for folder, tags in table.items()
        if isinstance(tags, dict)
    }


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The trigger words that a file names: `modelspec.trigger_phrase`, else the tags that every caption of a folder has."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return _words(phrase) if VERSION_KEY in metadata else [phrase]  # ours lists those of several LoRAs
    folders = _json(metadata.get("ss_dataset_dirs"))
    folders = folders if isinstance(folders, dict) else {}
    tables = tag_frequency(metadata).items()
    return _unique(tag for folder, tags in tables for tag in _in_every_caption(folder, tags, folders.get(folder)) if tag.strip())


def _in_every_caption(folder: str, tags: Mapping[str, int], facts: object) -> list[str]:
    """The tags of a folder that are certain to be in every caption; captions also list what is in one picture or the other.

    Args:
        folder: Its name: `1_trigger` of AI-Toolkit, `10_name` of kohya's trainers, which take the name for the caption of a
            picture that has none.
        tags: Tag -> how many captions have it.
        facts: What `ss_dataset_dirs` says of the folder: `{n_repeats, img_count}`.
    """
    images = facts.get("img_count") if isinstance(facts, dict) else None
    every = images if isinstance(images, int) and images > 1 else math.inf
    name = re.sub(r"^\d+_", "", folder)
    return [tag for tag, n in tags.items() if len(tags) == 1 or tag == name or n >= every]


def _words(phrase: str) -> list[str]:
    return [word for word in re.split(r"\s*,\s*", phrase.strip()) if word]


Base = Mapping[str, str]  # model, arch, adapter: what is known of it
_FAMILY = "zimage"  # all that ss_base_model_version and modelspec.architecture mostly tell
_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def base_of(model: object = None, arch: object = None, adapter: object = None) -> dict[str, str]:
    """What a LoRA was trained on, by names alone: of a path its last part, as folders may hold a user's name.

    Args:
        model: A path, or user/repo of the Hugging Face hub, which stays whole.
        arch: AI-Toolkit's `arch`, `zimage:turbo`, or another program's word for it.
        adapter: Of the training (AI-Toolkit's assistant_lora_path), as `model`.
    """
    names = {"model": _name(model), "arch": arch.strip() if isinstance(arch, str) else "", "adapter": _name(adapter)}
    return {key: name for key, name in names.items() if name}


def _name(path: object) -> str:
    text = path.strip().rstrip("\\/") if isinstance(path, str) else ""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) and not text.lower().endswith(_FILES):
        return text
    return re.split(r"[\\/]", text)[-1]


def bases(metadata: Mapping[str, str]) -> list[dict[str, str]]:
    """What a LoRA, or those that were merged into it, was trained on, as far as the file is certain of it."""
    own = _json(metadata.get(BASE_KEY))
    if isinstance(own, list):
        found = [base_of(b.get("model"), b.get("arch"), b.get("adapter")) for b in own if isinstance(b, dict)]
    else:
        config = _json(metadata.get("ot_config"))  # OneTrainer's; ss_sd_model_name is that of kohya's trainers and musubi
        model = config.get("base_model_name") if isinstance(config, dict) else metadata.get("ss_sd_model_name")
        kinds = (metadata.get(key, "").removesuffix("/lora") for key in ("ss_base_model_version", "modelspec.architecture"))
        found = [base_of(model, next((kind for kind in kinds if re.match(f"{_FAMILY}.", _plain(kind))), None))]
    return [dict(pairs) for pairs in dict.fromkeys(tuple(b.items()) for b in found if b)]


def base_text(base: Base) -> str:
    """`Tongyi-MAI/Z-Image-Turbo, zimage:turbo, adapter v2.safetensors`."""
    return ", ".join(f"adapter {name}" if key == "adapter" else name for key, name in base.items())


def bases_differ(named: Iterable[Base]) -> bool:
    """Whether some of them name another model, arch or adapter than others; what one does not name is no difference."""
    seen: dict[str, set[str]] = defaultdict(set)
    for base in named:
        for key, name in base.items():
            seen[key].add(_plain(re.split(r"[\\/]", name)[-1]))
    return any(len(names) > 1 for names in seen.values())


def _plain(name: str) -> str:
    """Without what differs between spellings and copies of one model: `z_image_turbo_bf16.safetensors` -> `zimageturbo`."""
    name = name.lower()
    for ending in _FILES:
        name = name.removesuffix(ending)
    return re.sub(r"[^a-z0-9]", "", re.sub(r"[-_.](bf16|fp16|fp32|fp8\w*|q\d\w*)$", "", name))


def read_recipe(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The recipe that zit_merge left in a file, or None."""
    recipe = _json(metadata.get(RECIPE_KEY))
    return recipe if isinstance(recipe, dict) else None


def read_check(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What zit_merge found when it wrote a file, or None where that is absent or not of that form."""
    found = _json(metadata.get(CHECK_KEY))
    if not isinstance(found, dict):
        return None
    numbers = [found.get("error"), found.get("kept")]
    lists = [part for part in (found.get("asked"), found.get("got")) if isinstance(part, list)]
    is_whole = all(map(_is_number, numbers)) and len(lists) == 2 and len(lists[0]) == len(lists[1])
    return found if is_whole and all(v is None or _is_number(v) for part in lists for v in part) else None


def _is_number(value: object) -> bool:
    """Whether it is one that a float can hold."""
    return isinstance(value, int | float) and abs(value) < 1e300


def made_by(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(job, step) of the merge that wrote a file, or None."""
    recipe = read_recipe(metadata) or {}
    steps = recipe.get("steps")
    last = steps[-1] if isinstance(steps, list) and steps else None
    return (str(recipe.get("job")), str(last.get("name"))) if isinstance(last, dict) else None


_PEFT_NEW = "0.18.0"  # the first one that says so in a config, and that sums Neumann's series as today


def _rotation(table: Mapping[str, object], source: str) -> Rotation:
    """Of an OFT's config; what it leaves out is as PEFT has it where that is the same in every version."""
    terms = None
    if table.get("use_cayley_neumann"):
        number = _number(table.get("num_cayley_neumann_terms", 5), "num_cayley_neumann_terms", source, positive=True)
        if number != int(number) or number > 100:
            raise ValueError(f"{source} gives no number of terms for num_cayley_neumann_terms")
        terms = int(number)
    bound = _number(table.get("eps", 6e-5), "eps", source) if table.get("coft") else None
    return Rotation(terms, terms is not None and not table.get("peft_version"), bound)


def _rotation_record(rotation: Rotation) -> dict[str, object]:
    """What `_rotation` makes the same again of."""
    return {
        "use_cayley_neumann": rotation.terms is not None,
        **({} if rotation.terms is None else {"num_cayley_neumann_terms": rotation.terms}),
        **({} if rotation.is_old else {"peft_version": _PEFT_NEW}),
        "coft": rotation.bound is not None,
        **({} if rotation.bound is None else {"eps": rotation.bound}),
    }


@dataclass(frozen=True)
class Adapter:
    """The part of a PEFT config that decides the scale (peft tuners/lora/config.py, tuners/lokr/config.py).

    Attributes:
        kind: LORA, LOHA, LOKR or OFT.
        alpha: Of every module that alpha_pattern does not name: `lora_alpha`, or `alpha` of LOHA and LOKR.
        use_rslora: The scale is alpha / sqrt(rank) in the place of alpha / rank.
        alpha_pattern: Module name, or a regular expression for its end -> alpha.
        r: Rank of every module that rank_pattern does not name; needed for the whole factors of a LOKR, which do not show it.
        rank_pattern: As alpha_pattern -> rank.
        source: Where it stands: lora_adapter_metadata or adapter_config.json.
        rotation: Of OFT, which has no alpha.
    """

    kind: str
    alpha: float
    use_rslora: bool
    alpha_pattern: Mapping[str, float]
    r: float | None
    rank_pattern: Mapping[str, float]
    source: str
    rotation: Rotation | None = None

    def scale(self, module: str, rank: int) -> float:
        """What the change of a module is multiplied with.

        Args:
            module: Canonical name.
            rank: Of the stored factors.
        """
        alpha = _of_pattern(self.alpha_pattern, module, self.alpha)
        if self.kind == "LOKR":  # peft multiplies whole factors too (tuners/lokr/layer.py get_delta_weight)
            return alpha / self._root(_of_pattern(self.rank_pattern, module, self.r or rank))
        return alpha / self._root(rank)

    def _root(self, rank: float) -> float:
        return math.sqrt(rank) if self.use_rslora else rank

    def record(self) -> dict[str, object]:
        """For a recipe: `read_adapter` makes the same again of it."""
        if self.rotation:
            return {"peft_type": self.kind, **_rotation_record(self.rotation)}
        table = {"peft_type": self.kind, "lora_alpha" if self.kind == "LORA" else "alpha": self.alpha}
        return table | {
            "use_rslora": self.use_rslora,
            "alpha_pattern": dict(self.alpha_pattern),
            "rank_pattern": dict(self.rank_pattern),
            **({"r": self.r} if self.r else {}),
        }


def _of_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the module's name or its end (peft utils/other.py get_pattern_key)."""
    return next((value for key, value in pattern.items() if _ending(key).match(module)), default)


@cache  # re forgets
def _ending(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


_LONGEST = 48  # letters of a module's name, at least
_WAYS = 20_000  # to try a table's patterns on a name; one that only spells a name has one
_LETTERS = (regex.LITERAL, regex.NOT_LITERAL, regex.ANY, regex.IN)


def _ways(parsed: Iterable[tuple[Any, Any]]) -> int:
    """In how many ways at most re tries a pattern on a name: what follows a choice is tried for each of its ways.

    Raises:
        ValueError: It has parts whose ways can't be counted: lookaround, references to groups, repeated groups.
    """
    ways = 1
    for kind, what in parsed:
        if kind is regex.BRANCH:
            ways *= sum(map(_ways, what[1]))
        elif kind is regex.SUBPATTERN and not what[1] and not what[2]:  # no flags
            ways *= _ways(what[3])
        elif kind in (regex.MAX_REPEAT, regex.MIN_REPEAT) and (what[1] == 1 or [k in _LETTERS for k, _ in what[2]] == [True]):
            ways *= min(what[1] - what[0] + 1, _LONGEST) if what[1] != 1 else 1 + _ways(what[2])
        elif kind not in (*_LETTERS, regex.AT):
            raise ValueError(str(kind))
    return ways


def read_adapter(text: str, source: str) -> Adapter:
    """The adapter's config from its JSON, with or without diffusers' `transformer.` before each key.

    Args:
        text: The JSON.
        source: Where it is from, for messages.

    Raises:
        ValueError: It does not say which alpha holds.
    """
    table = _json(text)
    table = {k.removeprefix("transformer."): v for k, v in table.items()} if isinstance(table, dict) else {}
    kind = str(table.get("peft_type") or "LORA")
    if kind == "OFT":
        return Adapter(kind, 1.0, False, {}, None, {}, source, _rotation(table, source))
    name = "lora_alpha" if kind == "LORA" else "alpha"
    return Adapter(
        kind=kind,
        alpha=_number(table.get(name), name, source),
        use_rslora=bool(table.get("use_rslora")),
        alpha_pattern=_pattern(table, "alpha_pattern", source),
        r=None if table.get("r") is None else _number(table["r"], "r", source, positive=True),
        rank_pattern=_pattern(table, "rank_pattern", source, positive=True),
        source=source,
    )


def _pattern(table: Mapping[str, object], name: str, source: str, *, positive: bool = False) -> dict[str, float]:
    pattern = table.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{source} has a {name} that is no table")
    ways = 0
    for key in pattern:
        try:
            re.compile(key)
            ways += 10 + _ways(regex.parse(rf"({key})$"))  # to find and to keep it costs too
        except (ValueError, RecursionError, OverflowError):
            ways = _WAYS + 1
        except re.error:
            raise ValueError(f"{source} has a {name} with {key!r}, which is no regular expression") from None
        if ways > _WAYS:
            raise ValueError(
                f"{source} has a {name} with {key!r}, which takes too long to match or uses more than names, classes, "
                "alternatives and a few repetitions"
            )
    return {key: _number(value, f"{name} {key}", source, positive=positive) for key, value in pattern.items() if key}


def _number(value: object, name: str, source: str, *, positive: bool = False) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{source} gives no number for {name}")
    return number


def kohya_metadata(ranks: Mapping[str, int]) -> dict[str, str]:
    """What musubi and the tools of kohya's family look at (sd-scripts: build_minimum_network_metadata)."""
    rank = str(next(iter(ranks.values()))) if len(set(ranks.values())) == 1 else "Dynamic"
    return {"ss_v2": "False", "ss_network_module": "networks.lora_zimage", "ss_network_dim": rank, "ss_network_alpha": rank}


def adapter_metadata(ranks: Mapping[str, int]) -> dict[str, str]:
    """`lora_adapter_metadata` of a file whose rank varies and whose scale is 1 throughout: what diffusers needs to read it.

    Args:
        ranks: Module -> rank.
    """
    most = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    config = {"r": most, "lora_alpha": most, "rank_pattern": pattern, "alpha_pattern": pattern, "target_modules": list(ranks)}
    return {"lora_adapter_metadata": dumps({f"transformer.{key}": value for key, value in config.items()})}


def adapter_ranks(metadata: Mapping[str, str], modules: Iterable[str]) -> dict[str, int]:
    """Module -> rank, from the metadata of a file for which `adapter_metadata` was made.

    Args:
        metadata: Of the file.
        modules: Canonical names.
    """
    adapter = read_adapter(metadata["lora_adapter_metadata"], "lora_adapter_metadata")
    most = adapter.r
    assert most is not None, "adapter_metadata writes r"
    return {module: int(_of_pattern(adapter.rank_pattern, module, most)) for module in modules}


def merged_metadata(
    output_name: str, recipe: Mapping[str, Any], version: str, inputs: Sequence[tuple[str, Mapping[str, str]]]
) -> dict[str, str]:
    """The metadata of a merged file.

    Never carried over: `sshs_*` and `modelspec.hash_sha256` (programs would take the file for an input), `training_info`
    (AI-Toolkit would resume its step count), `ss_network_*`, `lora_adapter_metadata` (they describe another file).

    Args:
        output_name: The file's name without its ending.
        recipe: What makes this file again.
        version: Of zit_merge.
        inputs: (name, metadata) of every LoRA that goes in with a strength other than 0.
    """
    versions = _unique(m["ss_base_model_version"] for _, m in inputs if m.get("ss_base_model_version"))
    merged = {
        "format": "pt",
        VERSION_KEY: version,
        RECIPE_KEY: dumps(recipe),
        "ss_base_model_version": versions[0] if len(versions) == 1 else "zimage",  # AI-Toolkit's name for it
        "ss_output_name": output_name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
        "modelspec.title": output_name,
        "modelspec.merged_from": ", ".join(metadata.get("modelspec.title") or name for name, metadata in inputs),
    }
    if trained_on := list({dumps(base): base for _, metadata in inputs for base in bases(metadata)}.values()):
        merged[BASE_KEY] = dumps(trained_on)
    return merged | _merged_words(output_name, [metadata for _, metadata in inputs])


def _merged_words(output_name: str, inputs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Tags and trigger words of all inputs. Both keys hold every trigger word: ComfyUI-Lora-Manager reads only the first folder
    (extract_trained_words), SwarmUI only the phrase."""
    counts, triggers, folders = Counter[str](), list[str](), list[str]()
    for metadata in inputs:
        tables = tag_frequency(metadata)
        words = _unique(word for phrase in trigger_words(metadata) for word in _words(phrase))
        for tags in tables.values():
            counts.update(tags)
        counts.update(word for word in words if not any(word in tags for tags in tables.values()))
        triggers += words
        folders += tables
    if not counts:
        return {}
    folder = folders[0] if len(set(folders)) == 1 else f"1_{output_name}"
    phrase = {"modelspec.trigger_phrase": ", ".join(_unique(triggers))} if triggers else {}
    return {"ss_tag_frequency": dumps({folder: dict(counts.most_common())})} | phrase


def dumps(value: object) -> str:
    """JSON in the one form that two runs agree on: no spaces, ASCII, the order of the mapping kept."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _json(text: str | None) -> object:
    try:
        return read_json(text) if text else None
    except ValueError:  # somebody else's metadata: not ours to refuse
        return None


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))

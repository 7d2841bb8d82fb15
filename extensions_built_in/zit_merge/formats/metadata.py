"""What the metadata of LoRA files say, and what a merged file may say in turn."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RECIPE_KEY = "zit_merge.recipe"
VERSION_KEY = "zit_merge.version"

ARCHITECTURE = "Z-Image/lora"  # what musubi and OneTrainer write; SwarmUI compares without regard to case


def tag_frequency(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """`ss_tag_frequency` as {folder: {tag: count}}; empty where it is absent or not of that form."""
    table = _json(metadata.get("ss_tag_frequency"))
    if not isinstance(table, dict):
        return {}
    return {
        str(folder): {str(t): int(n) for t, n in tags.items() if isinstance(n, int | float) and math.isfinite(n)}
        for folder, tags in table.items()
        if isinstance(tags, dict)
    }


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The trigger words that a file names: `modelspec.trigger_phrase`, else AI-Toolkit's one tag per folder."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [phrase]
    return _unique(tag for tags in tag_frequency(metadata).values() if len(tags) == 1 for tag in tags)


def read_recipe(metadata: Mapping[str, str]) -> dict | None:
    """The recipe that zit_merge left in a file, or None."""
    recipe = _json(metadata.get(RECIPE_KEY))
    return recipe if isinstance(recipe, dict) else None


def made_by(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(job, step) of the merge that wrote a file, or None."""
    recipe = read_recipe(metadata) or {}
    steps = recipe.get("steps")
    last = steps[-1] if isinstance(steps, list) and steps else None
    return (str(recipe.get("job")), str(last.get("name"))) if isinstance(last, dict) else None


@dataclass(frozen=True)
class Adapter:
    """The part of a PEFT LoraConfig that decides the scale (peft tuners/lora/config.py).

    Attributes:
        lora_alpha: alpha of every module that alpha_pattern does not name.
        use_rslora: The scale is alpha / sqrt(rank) in the place of alpha / rank.
        alpha_pattern: Module name, or a regular expression for its end -> alpha.
        source: Where it stands: lora_adapter_metadata or adapter_config.json.
    """

    lora_alpha: float
    use_rslora: bool
    alpha_pattern: Mapping[str, float]
    source: str

    def scale(self, module: str, rank: int) -> float:
        """What the product up @ down of a module is multiplied with."""
        matches = (a for p, a in self.alpha_pattern.items() if re.match(rf"(.*\.)?({p})$", module))  # peft: get_pattern_key
        alpha = next(matches, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def record(self) -> dict[str, object]:
        """For a recipe: `read_adapter` makes the same again of it."""
        return {"lora_alpha": self.lora_alpha, "use_rslora": self.use_rslora, "alpha_pattern": dict(self.alpha_pattern)}


def read_adapter(text: str, source: str) -> Adapter:
    """The adapter's config from its JSON, with or without diffusers' `transformer.` before each key.

    Raises:
        ValueError: It does not say which alpha holds.
    """
    table = _json(text)
    table = {k.removeprefix("transformer."): v for k, v in table.items()} if isinstance(table, dict) else {}
    pattern = table.get("alpha_pattern") or {}
    alphas = {"": table.get("lora_alpha"), **(pattern if isinstance(pattern, dict) else {"": None})}
    for key, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"{source} gives no number for {'alpha_pattern ' + key if key else 'lora_alpha'}")
    for pattern in alphas:
        try:
            re.compile(pattern)
        except re.error:
            raise ValueError(f"{source} has an alpha_pattern that is no regular expression: {pattern}") from None
    default = float(alphas.pop(""))
    return Adapter(default, bool(table.get("use_rslora")), {k: float(a) for k, a in alphas.items()}, source)


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


def merged_metadata(
    output_name: str, recipe: Mapping, version: str, inputs: Sequence[tuple[str, Mapping[str, str]]]
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
    tags: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for _, metadata in inputs:
        for folder, counts in tag_frequency(metadata).items():
            for tag, count in counts.items():
                tags[folder][tag] += count
    bases = _unique(m["ss_base_model_version"] for _, m in inputs if m.get("ss_base_model_version"))
    merged = {
        "format": "pt",
        VERSION_KEY: version,
        RECIPE_KEY: dumps(recipe),
        "ss_base_model_version": bases[0] if len(bases) == 1 else "zimage",  # AI-Toolkit's name for it
        "ss_output_name": output_name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
        "modelspec.title": output_name,
        "modelspec.merged_from": ", ".join(metadata.get("modelspec.title") or name for name, metadata in inputs),
    }
    if tags:
        merged["ss_tag_frequency"] = dumps(tags)
    if triggers := _unique(word for _, metadata in inputs for word in trigger_words(metadata)):
        merged["modelspec.trigger_phrase"] = ", ".join(triggers)
    return merged


def dumps(value: object) -> str:
    """JSON in the one form that two runs agree on: no spaces, ASCII, the order of the mapping kept."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _json(text: str | None) -> object:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):  # somebody else's metadata: not ours to refuse
        return None


def _unique(items) -> list[str]:
    return list(dict.fromkeys(items))

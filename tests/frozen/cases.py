"""What is made, called and shown for the frozen facts, as tables. Pure data: nothing of the package is imported here."""

from __future__ import annotations

from typing import Any, NamedTuple

# name -> (trainer, rank, dtype); the numbers in a file follow from its name
INPUTS = {
    "me": ("ai-toolkit", 2, "bfloat16"),  # `layers` alone, no alpha
    "style": ("musubi", 3, "bfloat16"),  # kohya's names, alpha 1, no adaLN
    "whole": ("onetrainer-kohya", 2, "float32"),  # every module, alpha = rank / 2
    "fused": ("diffusion-pipe", 4, "bfloat16"),  # fused qkv
    "half": ("diffusers-alpha", 2, "float16"),  # attention alone, alpha in the metadata
    "lokr": ("ai-toolkit-lokr", 2, "bfloat16"),  # whole factors
    "split": ("musubi-lokr", 2, "bfloat16"),  # w2 is a product
    "loha": ("musubi-loha", 2, "bfloat16"),
    "output/cat/cat": ("ai-toolkit", 2, "bfloat16"),  # a training of 3000 steps
    "output/cat/cat_000002750": ("ai-toolkit", 2, "bfloat16"),
    "output/cat/cat_000002500": ("ai-toolkit", 2, "bfloat16"),
}
MODEL = {"name_or_path": "Tongyi-MAI/Z-Image-Turbo", "arch": "zimage:turbo"}
TRAINING = {
    "type": "diffusion_trainer",
    "training_folder": "output",
    "network": {"type": "lora", "linear": 2, "linear_alpha": 2},
    "save": {"dtype": "bf16", "save_every": 250, "max_step_saves_to_keep": 3},
    "train": {"steps": 3000},
}


def lora(name: str, ratio: float, **keys: Any) -> dict[str, Any]:
    """An entry of `loras`; a name without an ending is one of INPUTS."""
    return {"lora": f"{name}.safetensors" if name in INPUTS else name, "ratio": ratio, **keys}


def step(*loras: dict[str, Any], name: str = "a", **keys: Any) -> dict[str, Any]:
    """An entry of `steps`."""
    return {"name": name, **({"loras": list(loras)} if loras else {}), **keys}


ME, STYLE, WHOLE = lora("me", 0.8), lora("style", 0.5), lora("whole", 1.25)
FUSED, HALF, LOKR, SPLIT, LOHA = (
    lora("fused", 0.4),
    lora("half", 2.0),
    lora("lokr", 0.6),
    lora("split", -50.0),
    lora("loha", 900.0),
)
WEIGHTED = lora(
    "whole",
    0.9,
    blocks={"adaLN": 0.7, "attention": 0.9, "to_q": 1.1},
    layers={"3": 0.25, "0-2": 0.5, "10-29": [1.0, 0.6], "context_refiner": 0, "other": 0.5},
    effects={"composition": 0.5, "color_light": 1.3},
    overrides={"20-29.to_v": 1.3, "other.final_layer.linear": -1},
)
F32, F16 = {"save": {"dtype": "fp32"}}, {"save": {"dtype": "fp16"}}


class Case(NamedTuple):
    """A job that makes files.

    Attributes:
        steps: Of its section.
        exact: Nothing is cut and nothing is summed up, so that the bytes are the same on every machine.
        training: It comes after a training.
        keys: More keys of the section.
    """

    steps: list[dict[str, Any]]
    exact: bool = False
    training: bool = False
    keys: dict[str, Any] = {}


CASES = {
    # strengths
    "sum": Case([step(ME, STYLE)], exact=True),
    "one": Case([step(ME)], exact=True),
    "three": Case([step(ME, STYLE, WHOLE)], exact=True),
    "weights": Case([step(WEIGHTED, STYLE)], exact=True),
    "layers as a list": Case([step(lora("me", 1, layers=[n / 29 for n in range(30)]))], exact=True),
    "negative": Case([step(lora("me", -0.7), STYLE)], exact=True),
    "zero": Case([step(lora("me", 0), STYLE)], exact=True),
    "only zero": Case([step(lora("me", 0))], exact=True),
    "preset late": Case([step(lora("whole", 0.9, preset="late_20_29", blocks={"to_q": 0.5}), STYLE)], exact=True),
    "preset fade": Case([step(lora("whole", 0.9, preset="fade_in"), lora("me", 1, preset="adaln_only"))], exact=True),
    # inputs
    "fused": Case([step(FUSED, ME)], exact=True),
    "half": Case([step(HALF, ME)], exact=True),
    "lokr": Case([step(LOKR)]),
    "lokr and lora": Case([step(LOKR, SPLIT, ME)]),
    "lokr cut": Case([step(LOKR, rank=2)]),
    "lokr cut, split": Case([step(SPLIT, ME, rank=2, **F32)]),
    "keep lokr": Case([step(LOKR, save={"keep_lokr": True})], exact=True),
    "keep lokr, split": Case(
        [step(lora("split", 40.0, blocks={"to_q": -1.5, "w2": 0}), save={"keep_lokr": True, "dtype": "fp32"})], exact=True
    ),
    "loha": Case([step(LOHA, ME)]),
    "loha cut": Case([step(LOHA, rank=2, **F16)]),
    # methods, those that draw with seeds
    "average": Case([step(ME, STYLE, method="average")], exact=True),
    "normalize": Case([step(ME, STYLE, method="normalize")]),
    "normalize per layer": Case([step(ME, STYLE, WHOLE, method="normalize", params={"per": "layer"})]),
    "slerp": Case([step(ME, STYLE, method="slerp")]),
    "nuslerp": Case([step(ME, STYLE, method="nuslerp", params={"per": "file"})]),
    "karcher": Case([step(ME, STYLE, WHOLE, method="karcher")]),
    "ties": Case([step(ME, STYLE, WHOLE, method="ties", params={"density": 0.4})]),
    "dare_linear": Case([step(ME, STYLE, method="dare_linear", params={"seed": 7})]),
    "dare_ties": Case([step(ME, STYLE, method="dare_ties", params={"density": 0.6, "seed": 1}, rank=3)]),
    "della": Case([step(ME, STYLE, method="della", params={"density": 0.5, "epsilon": 0.2, "seed": 3}, **F32)]),
    "tsv": Case([step(ME, STYLE, method="tsv")]),
    "project": Case([step(ME, STYLE, method="project", params={"mu": 0.7, "yields": "second"})]),
    "shared_once": Case([step(ME, STYLE, WHOLE, method="shared_once", params={"tau": 0.6})]),
    # how a file is stored
    "diffusers": Case([step(ME, STYLE, save={"format": "diffusers"})], exact=True),
    "kohya": Case([step(ME, STYLE, save={"format": "kohya"})], exact=True),
    "comfyui": Case([step(ME, WHOLE, save={"format": "comfyui"})], exact=True),
    "diffusers cut": Case([step(ME, WHOLE, rank=2, save={"format": "diffusers", "uniform": False})]),
    "fp32": Case([step(ME, STYLE, **F32)], exact=True),
    "fp16": Case([step(ME, STYLE, **F16)], exact=True),
    "dtype same": Case([step(HALF, save={"dtype": "same"})], exact=True),
    # ranks
    "rank": Case([step(ME, STYLE, rank=3)]),
    "rank same": Case([step(ME, STYLE, rank="same", **F32)]),
    "energy": Case([step(ME, STYLE, WHOLE, rank={"energy": 0.9, "max": 4})]),
    "energy, not uniform": Case([step(ME, STYLE, WHOLE, rank={"energy": 0.9}, save={"uniform": False})]),
    "size": Case([step(ME, STYLE, WHOLE, rank={"size_mb": 0.022})]),
    "size, not uniform": Case([step(ME, STYLE, WHOLE, rank={"size_mb": 0.022}, save={"uniform": False})]),
    "not uniform": Case([step(ME, WHOLE, save={"uniform": False})], exact=True),
    # several steps, and what a training leaves
    "steps": Case(
        [
            step(ME, STYLE, name="a", rank=3, keep=False),
            step(lora("a", 0.5), name="b", **F32),
            step(lora("b", 1.0), lora("a", -0.5), WHOLE, name="c", rank="same", method="ties"),
        ]
    ),
    "steps, exact": Case([step(ME, STYLE, name="a", keep=False), step(lora("a", 0.5), WHOLE, name="b")], exact=True),
    "section": Case([step(ME, STYLE)], keys={"rank": 2, "method": "average", **F32}),
    "checkpoints": Case([step(checkpoints={})], training=True),
    "checkpoints, weights": Case([step(checkpoints={"weights": [1, 2, 5]}, rank="exact")], exact=True, training=True),
    "trained": Case([step(lora("trained", 0.9), lora("trained@2500", 0.25), STYLE)], exact=True, training=True),
}

# Pictures: (the record's name, the step that asks for it).
_SHOTS = {"prompts": ["a cat"], "size": 64}
PICTURES = {
    "preview": step(ME, STYLE, name="p", preview=_SHOTS),
    "sweep": step(ME, STYLE, name="p", preview=_SHOTS, sweep={"loras[0].ratio": [0.5, 1], "loras[1].blocks.to_q": [0, 1]}),
    "ablate": step(ME, STYLE, name="p", ablate={"by": "components", "prompts": ["a cat"], "preset": "parts"}, preview=_SHOTS),
}

# Config files for the calls: name -> steps, section's keys.
CONFIGS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "right": ([step(ME, STYLE)], {}),
    "cut": ([step(WEIGHTED, STYLE, rank=2)], {}),
    "feeding": ([step(ME, STYLE, keep=False), step(lora("a", 0.5), WHOLE, name="b", method="ties")], {}),
    "unknown key of section": ([step(ME)], {"rnk": 3}),
    "unknown key of step": ([step(ME, rnk=3)], {}),
    "unknown key of lora": ([step(lora("me", 1, block={}))], {}),
    "unknown key of save": ([step(ME, save={"dtyp": "fp32"})], {}),
    "unknown key of preview": ([step(ME, preview={"prompt": "a cat"})], {}),
    "unknown key of ablate": ([step(ME, ablate={"by": "layers", "group": 3})], {}),
    "unknown key of checkpoints": ([step(checkpoints={"lst": 3})], {}),
    "unknown block": ([step(lora("me", 1, blocks={"to_x": 1}))], {}),
    "unknown layer": ([step(lora("me", 1, layers={"30": 1}))], {}),
    "unknown preset": ([step(lora("me", 1, preset="late"))], {}),
    "unknown method": ([step(ME, method="tie")], {}),
    "unknown param": ([step(ME, method="ties", params={"densty": 0.3})], {}),
    "wrong rank": ([step(ME, rank=0)], {}),
    "wrong rank rule": ([step(ME, rank={"energy": 2})], {}),
    "no ratio": ([step({"lora": "me.safetensors"})], {}),
    "no loras": ([step()], {}),
    "no such lora": ([step(lora("nobody.safetensors", 1))], {}),
    "same name twice": ([step(ME), step(STYLE)], {}),
    "method for two": ([step(ME, STYLE, WHOLE, method="slerp")], {}),
    "strict shapes": ([step(ME)], {"shapes": "strict"}),
}

_MERGE = ("merge", "me.safetensors", "style.safetensors", "--shapes", "free", "--device", "cpu")
CLI_FILE = "both.safetensors"
CLI_WORDS = (
    *_MERGE,
    *("-o", CLI_FILE, "--ratio", "0.8", "0.5", "--to_q", "1", "-1e-1", "--layers", "0-9=0.5,10-29=1:0.6", "--dtype", "fp32"),
)
CLI_AS_PYTHON = [  # the same from Python
    ("me.safetensors", {"ratio": 0.8, "blocks": {"to_q": 1.0}, "layers": {"0-9": 0.5, "10-29": [1.0, 0.6]}}),
    ("style.safetensors", {"ratio": 0.5, "blocks": {"to_q": -0.1}, "layers": {"0-9": 0.5, "10-29": [1.0, 0.6]}}),
]

COMMANDS = ("demo", "run", "preview", "merge", "check", "inspect", "recipe", "install", "attach")

# Calls whose exit code and first line of stderr are frozen; merged.safetensors is a file of ours.
CALLS = {
    "no command": (),
    "unknown command": ("mrge",),
    "version": ("--version",),
    "help": ("--help",),
    "merge, no ratio": ("merge", "me.safetensors", "-o", "x.safetensors"),
    "merge, no output": ("merge", "me.safetensors", "--ratio", "1"),
    "merge, no file": ("merge", "-o", "x.safetensors", "--ratio", "1"),
    "merge, no such file": ("merge", "nobody.safetensors", "-o", "x.safetensors", "--ratio", "1"),
    "merge, two values for three": ("merge", *("me.safetensors",) * 3, "-o", "x.safetensors", "--ratio", "1", "2"),
    "merge, a word for a ratio": ("merge", "me.safetensors", "-o", "x.safetensors", "--ratio", "much"),
    "merge, unknown flag": ("merge", "me.safetensors", "-o", "x.safetensors", "--ratio", "1", "--to_x", "1"),
    "merge, unknown method": (*_MERGE, "-o", "x.safetensors", "--ratio", "1", "--method", "tie"),
    "merge, unknown dtype": (*_MERGE, "-o", "x.safetensors", "--ratio", "1", "--dtype", "fp8"),
    "merge, wrong rank": (*_MERGE, "-o", "x.safetensors", "--ratio", "1", "--rank", "0"),
    "merge, wrong params": (*_MERGE, "-o", "x.safetensors", "--ratio", "1", "--params", "density"),
    "merge, wrong layers": (*_MERGE, "-o", "x.safetensors", "--ratio", "1", "--layers", "0-9"),
    "merge, wrong ending": (*_MERGE, "-o", "x.bin", "--ratio", "1"),
    "merge, foreign output": (*_MERGE, "-o", "whole.safetensors", "--ratio", "1"),
    "merge, strict shapes": ("merge", "me.safetensors", "-o", "x.safetensors", "--ratio", "1"),
    "merge, dry run": (*_MERGE, "-o", "x.safetensors", "--ratio", "1", "--dry-run"),
    "run, no such config": ("run", "nothing.yaml"),
    "run, not yaml": ("run", "broken.yaml"),
    "run, dry run": ("run", "right.yaml", "--dry-run"),
    "run, no such step": ("run", "right.yaml", "--step", "z"),
    "preview, no pictures": ("preview", "right.yaml"),
    "check, right": ("check", "right.yaml"),
    **{f"check, {name}": ("check", f"{name}.yaml") for name in CONFIGS if name not in ("right", "cut", "feeding")},
    "inspect, nothing": ("inspect",),
    "inspect, no such file": ("inspect", "nobody.safetensors"),
    "inspect, no lora": ("inspect", "foreign.safetensors"),
    "inspect, sources of nothing": ("inspect", "--sources", "me.safetensors"),
    "inspect, sources of two": ("inspect", "me.safetensors", "style.safetensors", "--sources", "whole.safetensors"),
    "inspect, presets as json": ("inspect", "--presets", "--json"),
    "inspect, html of methods": ("inspect", "--methods", "--html", "x.html"),
    "recipe, ours": ("recipe", "merged.safetensors"),
    "recipe, foreign": ("recipe", "me.safetensors"),
    "recipe, no such file": ("recipe", "nobody.safetensors"),
    "install, no such folder": ("install", "nowhere"),
    "attach, no section": ("attach", "right.yaml"),
    "attach, no such config": ("attach", "nothing.yaml", "--section", "right.yaml"),
}

# stdout for people. Those that write come with the page's path.
TEXTS = {
    "plan: right": ("run", "right.yaml", "--dry-run"),
    "plan: cut": ("run", "cut.yaml", "--dry-run"),
    "plan: feeding": ("run", "feeding.yaml", "--dry-run"),
    "done: right": ("run", "right.yaml"),
    "done: cut": ("run", "cut.yaml"),
    "done: feeding": ("run", "feeding.yaml"),
    "check": ("check", "cut.yaml"),
    "inspect: one": ("inspect", "whole.safetensors"),
    "inspect: ours": ("inspect", "merged.safetensors"),
    "inspect: two": ("inspect", "me.safetensors", "style.safetensors"),
    "inspect: three": ("inspect", "me.safetensors", "style.safetensors", "whole.safetensors"),
    "inspect: sources": ("inspect", "merged.safetensors", "--sources", "me.safetensors", "style.safetensors"),
    "inspect: methods": ("inspect", "--methods"),
    "inspect: presets": ("inspect", "--presets"),
    "recipe": ("recipe", "merged.safetensors"),
}

# JSON whose keys are frozen: name -> words.
JSON = {
    "inspect one": ("inspect", "whole.safetensors", "--json"),
    "inspect ours": ("inspect", "merged.safetensors", "--json"),
    "inspect lokr": ("inspect", "lokr.safetensors", "--json"),
    "inspect two": ("inspect", "me.safetensors", "style.safetensors", "--json"),
    "inspect three": ("inspect", "me.safetensors", "style.safetensors", "whole.safetensors", "--json"),
    "inspect sources": ("inspect", "merged.safetensors", "--sources", "me.safetensors", "style.safetensors", "--json"),
    "inspect methods": ("inspect", "--methods", "--json"),
}
# Pages whose data's keys are frozen: name -> (words, the page).
PAGES = {
    "page of run": (("run", "cut.yaml"), "out/merged_cat.html"),
    "page of one": (("inspect", "whole.safetensors", "--html", "one.html"), "one.html"),
    "page of two": (("inspect", "me.safetensors", "style.safetensors", "--html", "two.html"), "two.html"),
}

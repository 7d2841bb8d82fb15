"""How each frozen fact is found. `record.py` writes what these functions return; the tests compare it with what was written."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from frozen import cases, door
from frozen.cases import Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
CHECK = "zit_merge.check"
Fact = Any  # what JSON holds


# --- the folder ----------------------------------------------------------------------------------------------------------------


def lay_out(folder: Path) -> None:
    """Writes the inputs into a folder."""
    for name, (producer, rank, dtype) in cases.INPUTS.items():
        door.write_lora(folder / f"{name}.safetensors", producer, rank, getattr(torch, dtype))


def write_config(path: Path, steps: list[Mapping[str, Any]], *before: Mapping[str, Any], **keys: Any) -> Path:
    """A job that is one section, after other processes."""
    section = {"type": "zit_merge", "device": "cpu", "shapes": "free", "output_dir": "out", "steps": steps} | keys
    job = {"job": "extension", "config": {"name": "cat", "process": [*before, section]}}
    path.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    return path


def furnish(folder: Path) -> None:
    """Writes all that the calls of the tables name."""
    lay_out(folder)
    for name, (steps, keys) in cases.CONFIGS.items():
        write_config(folder / f"{name}.yaml", steps, **keys)
    (folder / "broken.yaml").write_text("job: [", encoding="utf-8")
    save_file({"some.weight": torch.ones(2, 2)}, folder / "foreign.safetensors")
    with door.inside(folder):
        door.quietly(*cases.CLI_WORDS[:-2], "--rank", "3")  # in bf16
        (folder / cases.CLI_FILE).rename(folder / "merged.safetensors")


# --- files ---------------------------------------------------------------------------------------------------------------------


def made(case: Case, folder: Path) -> dict[str, Fact]:
    """Every file that a job makes: name -> what is in it.

    Raises:
        AssertionError: What the run said of a result is not what is in its file.
    """
    lay_out(folder)
    before = [cases.TRAINING] if case.training else []
    with door.inside(folder):
        config = write_config(folder / "config.yaml", case.steps, *before, **case.keys)
        said = door.quietly("run", config)
    found = {path.name: describe(path) for path in sorted((folder / "out").glob("*.safetensors"))}
    kept = {f"merged_cat_{step['name']}.safetensors": step["name"] for step in case.steps if step.get("keep", True)}
    statuses = {kept[name]: file["check"]["status"] for name, file in found.items() if file["check"]["status"] != "right"}
    if {step: status for step, status in said.items() if step in kept.values()} != statuses:
        raise AssertionError(f"said {said}, the files have {statuses}")
    return found


def made_by_command(folder: Path) -> dict[str, Fact]:
    """The file that `merge` makes."""
    lay_out(folder)
    with door.inside(folder):
        door.quietly(*cases.CLI_WORDS)
    return {cases.CLI_FILE: describe(folder / cases.CLI_FILE)}


def describe(path: Path) -> dict[str, Fact]:
    """A file: hash of its tensor data, its keys, its metadata, what it does to probes."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    keys = {key: [entry["dtype"], *entry["shape"]] for key, entry in sorted(header.items())}
    with safe_open(path, framework="pt") as file:
        metadata = {key: _parsed(value) for key, value in sorted(file.metadata().items())}
    return {
        "tensors": hashlib.sha256(raw[start:]).hexdigest(),
        "keys": hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
        "count": len(keys),
        "check": metadata.pop(CHECK, None),
        "metadata": metadata,
        "probes": probes(path),
    }


def _parsed(value: str) -> Fact:
    """A metadata value: JSON as what it holds, without our version."""
    value = door.plain(value, Path("/nowhere"))
    return json.loads(value) if value.startswith(("{", "[")) else value


def probes(path: Path) -> dict[str, list[float]]:
    """Four modules of a file, by the names they have there: the change of a fixed vector, its norm and three of its numbers."""
    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    stems = sorted({re.split(r"\.(?:lora|lokr)_", key)[0] for key in tensors if not key.endswith(".alpha")})
    found = {}
    for stem in stems[:: max(1, len(stems) // 4)][:4]:
        parts = {key[len(stem) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{stem}.")}
        delta = _delta(parts)
        changed = delta @ door.numbers(stem, delta.shape[1])
        entries = changed[:: max(1, len(changed) // 3)][:3]
        found[stem] = [float(f"{number:.9g}") for number in (changed.norm(), *entries)]
    return found


def _delta(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The change of a module from its tensors, as every reader of the formats has it."""
    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        ranks = [parts[f"lokr_{w}_b"].shape[0] for w in ("w1", "w2") if f"lokr_{w}_b" in parts]
        w1, w2 = (parts[w] if (w := f"lokr_{n}") in parts else parts[f"{w}_a"] @ parts[f"{w}_b"] for n in ("w1", "w2"))
        return torch.kron(w1, w2) * (parts["alpha"] / ranks[0] if ranks else 1)
    down, up = (next(t for name, t in parts.items() if name in names) for names in (_DOWN, _UP))
    return up @ down * (parts["alpha"] / down.shape[0] if "alpha" in parts else 1)


_DOWN, _UP = ("lora_A.weight", "lora_down.weight"), ("lora_B.weight", "lora_up.weight")


# --- keys of JSON --------------------------------------------------------------------------------------------------------------

_KINDS = {bool: "bool", int: "number", float: "number", str: "text", type(None): "null"}
_MODULE = re.compile(r"(layers|noise_refiner|context_refiner|all_\w+|[tc]\w*_embedder)\..+|.*\.safetensors|[\d\- ]+")


def schema(value: Fact) -> dict[str, str]:
    """Path of keys -> what stands there. Items of lists count as one, and so do keys that name modules, layers or files."""
    found: dict[str, set[str]] = {}
    for path, kind in _leaves(value, ""):
        found.setdefault(path, set()).add(kind)
    return {path: " or ".join(sorted(kinds)) for path, kinds in sorted(found.items())}


def _leaves(value: Fact, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        yield path, "mapping"
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}/{'*' if _MODULE.fullmatch(key) else key}")
    elif isinstance(value, list):
        yield path, "list"
        for entry in value:
            yield from _leaves(entry, f"{path}[]")
    else:
        yield path, _KINDS[type(value)]


def keys(folder: Path) -> dict[str, Fact]:
    """The schemas of everything that programs may read."""
    furnish(folder)
    found = {}
    with door.inside(folder):
        for name, words in cases.JSON.items():
            found[name] = schema(json.loads(door.done(*words)))
        for name, (words, page) in cases.PAGES.items():
            door.done(*words)
            (data,) = re.findall(
                r'<script type="application/json" id="facts">(.*?)</script>', Path(page).read_text("utf-8"), re.S
            )
            found[name] = schema(json.loads(data))
        door.quietly("run", "feeding.yaml")
        found["recipe"] = schema(yaml.safe_load(door.done("recipe", "out/merged_cat_b.safetensors")))
        for name, step in cases.PICTURES.items():
            shown = door.show_pictures(folder / name, [step])
            found[name] = schema(json.loads((shown / f"p_{name}.json").read_text("utf-8")))
    return found


# --- the command line ----------------------------------------------------------------------------------------------------------


def helps(folder: Path) -> dict[str, Fact]:
    """`--help` of the program and of every command."""
    return {" ".join(words): door.done(*words, "--help") for words in [(), *((c,) for c in cases.COMMANDS)]}


def words_of(text: str) -> list[str]:
    """The words of a help, however it is laid out; `-o OUT, --out OUT` as Python from 3.13 on has it."""
    return re.sub(r"(-\w) ([A-Z]+), (--[\w-]+ \2)\b", r"\1, \3", " ".join(text.split())).split()


def exits(folder: Path) -> dict[str, Fact]:
    """What every call of the table leaves: exit code, first line of stdout, first and last line of stderr."""
    furnish(folder)
    found = {}
    with door.inside(folder):
        for name, words in cases.CALLS.items():
            ran = door.zit(*words)
            told, error = (door.plain(text, folder).splitlines() or [""] for text in (ran.out, ran.err))
            found[name] = {"code": ran.code, "out": told[0], "err": error[0], "last": error[-1] if len(error) > 1 else ""}
    return found


def texts(folder: Path) -> dict[str, Fact]:
    """What people see, line by line."""
    furnish(folder)
    with door.inside(folder):
        return {name: door.plain(door.done(*words), folder).splitlines() for name, words in cases.TEXTS.items()}


# --- Python --------------------------------------------------------------------------------------------------------------------


def names(folder: Path) -> dict[str, Fact]:
    """Public names, their signatures and attributes."""
    lay_out(folder)
    package = door.package
    lora = package.load_lora(folder / "me.safetensors")
    settled = package.merge([(lora, 1.0)])
    kinds = {"load_lora": package.load_lora, "merge": package.merge, "Merge.plan": settled.plan, "Merge.save": settled.save}
    special = [n for n in ("__iter__", "__len__", "__contains__", "__getitem__") if hasattr(lora, n)]
    return {
        "__all__": sorted(package.__all__),
        "signatures": {name: re.sub(r" at 0x\w+", "", str(inspect.signature(kind))) for name, kind in kinds.items()},
        "what they return": [type(lora).__name__, type(settled).__name__],
        "LoraFile": [n for n in dir(lora) if not n.startswith("_")] + special,
        "Merge": [n for n in dir(settled) if not n.startswith("_")],
        "ZitMergeError": [base.__name__ for base in package.ZitMergeError.__mro__],
    }


# --- the record ----------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, Fact]:
    """Every case of the table, and the file of `merge`."""
    found = {name: made(case, folder / str(n)) for n, (name, case) in enumerate(cases.CASES.items())}
    return found | {COMMAND: made_by_command(folder / "command")}


COMMAND = "merge, the command"
TOPICS: dict[str, Callable[[Path], dict[str, Fact]]] = {
    "files": files,
    "keys": keys,
    "helps": helps,
    "exits": exits,
    "names": names,
    "texts": texts,
}


def recorded(topic: str) -> dict[str, Fact]:
    """What was recorded: {"machine", "python", "facts"}."""
    return json.loads((HERE / f"{topic}.json").read_text("utf-8"))


def differences(was: Fact, now: Fact, tolerance: float = 0.0, place: str = "") -> list[str]:
    """Where two facts differ, in words; numbers may differ by `tolerance` of the larger one. The order of keys counts."""
    if isinstance(was, dict) and isinstance(now, dict):
        if list(was) != list(now):
            gone, new = [k for k in was if k not in now], [k for k in now if k not in was]
            return [f"{place}: keys gone {gone}, new {new}" if gone or new else f"{place}: keys in another order: {list(now)}"]
        return [text for key in was for text in differences(was[key], now[key], tolerance, f"{place}/{key}")]
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return [
            text for i, pair in enumerate(zip(was, now, strict=True)) for text in differences(*pair, tolerance, f"{place}[{i}]")
        ]
    if type(was) is type(now) is float and math.isclose(was, now, rel_tol=tolerance, abs_tol=1e-4 * tolerance):
        return []
    return [] if type(was) is type(now) and was == now else [f"{place}: was {was!r}, is {now!r}"]

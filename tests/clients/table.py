"""Who reads what: every form of output through every client that can be run here, as a markdown table.

    python tests/clients/table.py [--toolkit-python PYTHON] > table.md

A merge of two LoRAs of different ranks is written in every form, for a Z-Image of width 48 with all its layers. Every client, in
a process of its own, reads every file; what it makes of each of the 276 linears is compared with the float64 sum of the trainers'
deltas. Every column was run, but for ComfyUI where no checkout of it is found: it stands there by its rules then (comfyui.py).

The diffusers releases are installed with pip into a folder that is kept. PEFT and lycoris-lora are those of --python. AI-Toolkit
is the one at $AI_TOOLKIT_ROOT or ~/ai-toolkit, run by --toolkit-python, which must have its packages.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

TESTS = Path(__file__).resolve().parents[1]
REPO, READERS = TESTS.parent, TESTS / "clients" / "readers"
sys.path[:0] = [str(TESTS)]

from clients import comfyui, comfyui_source  # noqa: E402
from oracles import producers  # noqa: E402

OLDEST = (0, 36)  # the first diffusers that has Z-Image
KNOWN = ("0.36.0", "0.37.1", "0.38.0", "0.39.0", "0.40.0", "0.41.0", "0.42.1")  # if pip can't be asked for newer ones
HTTP = ("httpx", "httpcore", "h11")  # older releases need them and newer environments lack them
SHAPES = producers.small_shapes(dim=48, ffn=128, temb=48, cap=32)  # those of tests/host/tiny_zimage.py
EXACT = 1e-5  # relative; the files are float32
PATIENCE = 240  # seconds without a new answer: some releases never end on some files
RATIOS = (0.9, -0.6)

FORMATS = ("ai-toolkit", "diffusers", "kohya", "comfyui")
# number of modules -> the trainers whose files are merged; the second one's rank differs from module to module
PAIRS = {276: ("ai-toolkit-all", "kohya-resized"), 240: ("ai-toolkit", "kohya-resized")}
LOKRS = {276: "onetrainer-lokr", 240: "ai-toolkit-lokr"}  # factors that are products, with alpha; whole factors
# What other programs write, under the names of facts known about them (--trainers).
TRAINERS = (
    *("ai-toolkit", "ai-toolkit-all", "onetrainer-comfy", "kohya-resized", "simpletuner-comfyui", "diffusers", "diffusers-alpha"),
    *("diffusers-patterns", "simpletuner-peft", "onetrainer-legacy", "none-trainer", "diffsynth", "onetrainer-original"),
    *("onetrainer-diffusers", "peft", "musubi", "onetrainer-kohya", "musubi-comfy", "none-converter", "videox-fun"),
    *("diffusion-pipe", "comfyui-train", "comfyui-extract", "simpletuner-lycoris-locon", "lora-ab-bare"),
    *("ai-toolkit-lokr", "ai-toolkit-lokr-split", "onetrainer-lokr", "simpletuner-lycoris-lokr", "ai-toolkit-all-layers"),
)


@dataclass(frozen=True)
class Form:
    """One kind of output: the section's `save`, and how many modules the merged LoRAs have."""

    name: str
    save: Mapping[str, object]
    modules: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """The trainers of the LoRAs that are merged."""
        return (LOKRS[self.modules],) if self.save.get("keep_lokr") else PAIRS[self.modules]


@dataclass(frozen=True)
class Row:
    """A file and what it means: module -> float64 delta."""

    name: str
    path: Path
    deltas: Mapping[str, torch.Tensor]


@dataclass
class Column:
    """A client and its answers: row name -> deltas, or in words why there are none."""

    name: str
    answers: dict[str, Mapping[str, torch.Tensor] | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """How to run a reader.

    Attributes:
        name: Of the client; `{}` stands for the version that the reader reports.
        command: Python, script, options.
        path: Folders that come first on its sys.path.
        cwd: Where it runs.
        missing: Why it can't run at all.
    """

    name: str
    command: tuple[str, ...] = ()
    path: tuple[Path, ...] = ()
    cwd: Path = REPO
    missing: str = ""


def forms() -> list[Form]:
    """Every output form there is."""
    found = []
    for form in FORMATS:
        for modules in PAIRS:
            found.append(Form(f"{form}, {modules} modules", {"format": form}, modules))
        for modules in PAIRS:
            found.append(Form(f"{form}, uniform: false, {modules} modules", {"format": form, "uniform": False}, modules))
    return [*found, *(Form(f"keep_lokr, {n} modules ({trainer})", {"keep_lokr": True}, n) for n, trainer in LOKRS.items())]


def write_form(form: Form, path: Path) -> dict[str, torch.Tensor] | str:
    """Merges by the public command line.

    Args:
        form: What to write.
        path: The file that is wanted.

    Returns:
        The float64 truth, module -> delta; or what the command said instead of writing.
    """
    wanted: dict[str, torch.Tensor] = {}
    loras = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, (trainer, ratio) in enumerate(zip(form.inputs, RATIOS, strict=False)):
            made = producers.PRODUCERS[trainer].make(SHAPES, 4 - seed, seed, torch.float32)
            producers.save(made, Path(folder) / f"{trainer}.safetensors")
            loras.append({"lora": f"{trainer}.safetensors", "ratio": ratio})
            for module, delta in made.deltas.items():
                wanted[module] = wanted.get(module, 0) + ratio * delta
        section = {"type": "zit_merge", "device": "cpu", "shapes": "free", "output_dir": folder}
        section |= {"save": {"dtype": "fp32", **form.save}, "steps": [{"name": "form", "loras": loras}]}
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump({"job": "extension", "config": {"name": "clients", "process": [section]}}))
        command = [sys.executable, "-m", "extensions_built_in.zit_merge", "run", str(config)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=PATIENCE, check=False)
        if done.returncode:
            return done.stderr.strip() or f"exit code {done.returncode}"
        shutil.move(Path(folder) / "merged_clients_form.safetensors", path)
    return wanted


def write_rows(folder: Path, trainers: bool) -> list[Row]:
    """The files of the table; what the tool does not write yet is said on stderr and left out."""
    rows = []
    if trainers:
        for name in TRAINERS:
            made = producers.PRODUCERS[name].make(SHAPES, 3, 0, torch.float32)
            producers.save(made, folder / f"{name}.safetensors")
            rows.append(Row(f"{name} ({producers.PRODUCERS[name].note})", folder / f"{name}.safetensors", made.deltas))
        return rows
    for number, form in enumerate(forms()):
        path = folder / f"form{number}.safetensors"
        wanted = write_form(form, path)
        if isinstance(wanted, str):
            say(f"left out: {form.name}: {wanted}")
        else:
            rows.append(Row(form.name, path, wanted))
    return rows


def releases(python: str) -> list[str]:
    """The last release of every minor version of diffusers from the first one that has Z-Image."""
    asked = subprocess.run([python, "-m", "pip", "index", "versions", "diffusers"], capture_output=True, text=True, check=False)
    listed = re.search(r"Available versions: (.*)", asked.stdout)
    last: dict[tuple[int, int], str] = {}
    for version in reversed(listed[1].split(", ") if listed else KNOWN):
        if re.fullmatch(r"\d+\.\d+\.\d+", version):
            major, minor, _ = map(int, version.split("."))
            last[major, minor] = version
    return [version for minor, version in sorted(last.items()) if minor >= OLDEST]


def install(python: str, version: str, work: Path) -> Path | str:
    """The folder with a diffusers release, or why there is none. The other packages are those of the environment."""
    folder = work / f"diffusers-{version}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=work) as part:
            command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", part, f"diffusers=={version}", *HTTP]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            if done.returncode:
                return done.stderr.strip().splitlines()[-1]
            shutil.copytree(part, folder)
    return folder


def clients(args: argparse.Namespace) -> list[Client]:
    """The readers to run."""
    found = [Client("ComfyUI {}", (args.python, str(READERS / "with_comfyui.py")))] if comfyui_source.root() else []
    for version in args.diffusers or releases(args.python):
        folder = install(args.python, version, args.work)
        if isinstance(folder, str):
            found.append(Client(f"diffusers {version}", missing=folder))
        else:
            found.append(Client("diffusers {}", (args.python, str(READERS / "with_diffusers.py")), (folder,)))
    found.append(Client("PEFT {}", (args.python, str(READERS / "with_peft.py"))))
    lycoris = (args.python, str(READERS / "with_lycoris.py"))
    found += [Client("lycoris-lora {}", lycoris), Client("lycoris-lora {}, keys made flat", (*lycoris, "--flat"))]
    root = Path(os.environ.get("AI_TOOLKIT_ROOT") or Path.home() / "ai-toolkit")
    for name, option in (("assistant LoRA", "--assistant"), ("training goes on", "--training")):
        command = (args.toolkit_python, str(READERS / "with_toolkit.py"), option)
        missing = "" if (root / "run.py").is_file() else f"no AI-Toolkit at {root}"
        found.append(Client("AI-Toolkit {}, " + name, command, (root,), root, missing))
    return found


def run(client: Client, rows: Sequence[Row]) -> Column:
    """Runs a reader, and again on the files after one on which it never ended."""
    if client.missing:
        return Column(client.name.replace(" {}", ""), {row.name: f"not installed: {client.missing}" for row in rows})
    answers: dict[str, Mapping[str, torch.Tensor] | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        out, left = Path(folder), list(rows)
        while left:
            error = _run_once(client, left, out)
            answers |= {row.name: answer for row in left if (answer := _answer(row, out)) is not None}
            left = [row for row in left if row.name not in answers]
            if left:
                answers[left[0].name] = error
                left = left[1:] if error == "hangs" else []
        version = (out / "version").read_text() if (out / "version").exists() else ""
    return Column(client.name.replace("{}", version).strip(), {row.name: answers.get(row.name, error) for row in rows})


def _run_once(client: Client, rows: Sequence[Row], out: Path) -> str:
    """Starts the reader and waits as long as it goes on answering; what is wrong with the rows that have no answer after it."""
    path = [*client.path, TESTS]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(out)}
    with (out / "log").open("w") as log:
        command = [*client.command, str(out), *(str(row.path) for row in rows)]
        with subprocess.Popen(command, cwd=client.cwd, env=env, stdout=log, stderr=log) as process:
            answered, since = 0, time.monotonic()
            while process.poll() is None:
                time.sleep(0.5)
                now = sum(_answer_file(row, out) is not None for row in rows)
                if now > answered:
                    answered, since = now, time.monotonic()
                if time.monotonic() - since > PATIENCE:
                    process.kill()
                    return "hangs"
    lines = (out / "log").read_text(errors="replace").strip().splitlines()
    return f"not installed: {lines[-1] if lines else process.returncode}"


def _answer_file(row: Row, out: Path) -> Path | None:
    """What the reader left for a row: its deltas, or its refusal."""
    return next((p for s in (".pt", ".txt") if (p := out / (row.path.stem + s)).exists()), None)


def _answer(row: Row, out: Path) -> Mapping[str, torch.Tensor] | str | None:
    path = _answer_file(row, out)
    if path is None:
        return None
    return torch.load(path) if path.suffix == ".pt" else f"refused: {path.read_text(encoding='utf-8')}"


def comfyui_column(rows: Iterable[Row]) -> Column:
    """ComfyUI's answers, by its rules."""
    from safetensors.torch import load_file

    column = Column("ComfyUI (by its rules)")
    for row in rows:
        try:
            column.answers[row.name] = comfyui.apply(load_file(row.path), SHAPES).deltas
        except (KeyError, NotImplementedError) as e:
            column.answers[row.name] = f"refused: {e}"
    return column


def verdict(answer: Mapping[str, torch.Tensor] | str, wanted: Mapping[str, torch.Tensor]) -> str:
    """A cell of the table.

    Args:
        answer: What the client has in every module, or its refusal.
        wanted: The truth.

    Returns:
        `OK`; `refused`, `hangs`, `not installed`; `loads nothing`; `n of m`, where the other modules get nothing; and
        `wrong by e (n of m)`: n modules have a delta whose relative error is up to e.
    """
    if isinstance(answer, str):
        return answer.partition(":")[0]
    nothing = torch.zeros(())
    read = [module for module in wanted if answer.get(module, nothing).any()]
    if not read:
        return "loads nothing"
    errors = {m: float((answer[m].double() - wanted[m]).norm() / wanted[m].norm()) for m in read}
    wrong = [error for error in errors.values() if not error <= EXACT]
    extra = [module for module, delta in answer.items() if module not in wanted and delta.any()]
    said = [] if len(read) == len(wanted) else [f"{len(read)} of {len(wanted)}"]
    said += [f"wrong by {max(wrong):.2f} ({len(wrong)} of {len(wanted)})"] if wrong else []
    said += [f"{len(extra)} too many"] if extra else []
    return ", ".join(said) or "OK"


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The table, and what the clients said when they refused."""
    lines = ["| output form | " + " | ".join(column.name for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        lines.append("| " + " | ".join([row.name, *(verdict(c.answers[row.name], row.deltas) for c in columns)]) + " |")
    reasons: dict[str, dict[str, int]] = {}
    for column in columns:
        for row in rows:
            answer = column.answers[row.name]
            if isinstance(answer, str) and ": " in answer:
                said = reasons.setdefault(_short(answer), {})
                said[column.name] = said.get(column.name, 0) + 1
    notes = (f"* {reason} - {', '.join(f'{c} ({n})' for c, n in said.items())}" for reason, said in reasons.items())
    return "\n".join([*lines, "", *notes])


def brief(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The README's table: a line for each client, neighbours that answer alike in one, the files of 276 modules only. Ranks of
    their own, which change no answer of these clients, stand there for the first form only."""
    kept = [row for row in rows if "276 modules" in row.name and ("uniform" not in row.name or row.name.startswith("ai-toolkit"))]
    lines: list[tuple[list[str], list[str]]] = []
    for column in columns:
        cells = [verdict(column.answers[row.name], row.deltas) for row in kept]
        program, _, version = column.name.partition(" ")
        if lines and lines[-1][1] == cells and lines[-1][0][0].startswith(f"{program} "):
            lines[-1][0].append(version)
        else:
            lines.append(([column.name], cells))
    names = [re.sub(r",? 276 modules", "", row.name).replace("uniform: false", "own ranks") for row in kept]
    head = ["| client | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    return "\n".join([*head, *("| " + " | ".join([", ".join(name), *cells]) + " |" for name, cells in lines)])


def _short(reason: str) -> str:
    """Its beginning, without the lists of keys that many clients print."""
    return re.split(r"[\[({]", " ".join(reason.split()))[0][:140].strip()


def say(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Prints the table."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="runs diffusers, PEFT and lycoris-lora (default: this one)")
    parser.add_argument("--toolkit-python", default=sys.executable, help="runs AI-Toolkit (default: this one)")
    parser.add_argument("--work", type=Path, default=cache / "zit_merge" / "clients", help="keeps the diffusers releases")
    parser.add_argument("--diffusers", nargs="*", help="releases (default: the last of every minor version from 0.36 on)")
    parser.add_argument("--trainers", action="store_true", help="the files of trainers instead of ours")
    parser.add_argument("--readme", action="store_true", help="the short table of the README")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder), args.trainers)
        columns = [] if comfyui_source.root() else [comfyui_column(rows)]
        for client in clients(args):
            began = time.monotonic()
            columns.append(run(client, rows))
            say(f"{columns[-1].name}: {time.monotonic() - began:.0f} s")
        print(brief(rows, columns) if args.readme else markdown(rows, columns))


if __name__ == "__main__":
    main()

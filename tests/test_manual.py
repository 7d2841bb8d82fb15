"""The README and the manual: their YAML is what the schema takes, their commands are what the parser takes, their links lead on,
every key, preset, method and error is there, and their Python runs.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from PIL import Image
from workspace import FEW, Workspace

from extensions_built_in.zit_merge.cli.main import COMMANDS
from extensions_built_in.zit_merge.cli.parser import build_parser
from extensions_built_in.zit_merge.config import schema
from extensions_built_in.zit_merge.config.job import job_of
from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.config.presets import find_preset, presets
from extensions_built_in.zit_merge.experiments import ssr
from extensions_built_in.zit_merge.model.strengths import Weights, factors
from extensions_built_in.zit_merge.report.text.catalogue import methods_facts

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "extensions_built_in" / "zit_merge" / "docs"
README, CHINESE = ROOT / "README.md", DOCS / "README.zh-TW.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
LORA = {"lora": "x.safetensors", "ratio": 1.0}
PROGRAM = re.compile(r"(?:\S*/)?zit-merge\b|(?:\S*python|accelerate launch) .*?-m extensions_built_in\.zit_merge\b")


class Block(NamedTuple):
    """A block of code in a page."""

    page: str
    line: int
    kind: str
    text: str

    def __repr__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> list[Block]:
    found, opened = list[Block](), None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if fence := re.fullmatch(r"\s*```(\w*)", line):
            if opened is None:
                opened = number, fence[1], []
            else:
                found.append(Block(path.name, opened[0], opened[1], "\n".join(opened[2]) + "\n"))
                opened = None
        elif opened:
            opened[2].append(line)
    assert opened is None, f"{path.name}: a block is not closed"
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(block, id=repr(block)) for block in BLOCKS if block.kind == kind]


# --- YAML ----------------------------------------------------------------------------------------------------------------------


def sections(found: Any) -> Iterator[Mapping[str, Any]]:
    """The sections that a block of YAML is, or would be a part of."""
    if isinstance(found, list):
        (kind,) = {next((key for key in ("type", "lora", "name") if key in entry), None) for entry in found}
        if kind == "type":
            yield from (entry for entry in found if entry["type"] == schema.PROCESS_TYPE)
        else:
            steps = found if kind == "name" else [{"name": "a", "loras": found}]
            yield {"type": schema.PROCESS_TYPE, "steps": steps}
    elif "type" in found:
        yield found
    elif "steps" in found:
        yield {"type": schema.PROCESS_TYPE, **found}
    else:
        yield from sections(found["loras"])


@pytest.mark.parametrize("block", of_kind("yaml"))
def test_yaml_is_what_the_schema_takes(block, tmp_path):
    found = yaml.safe_load(block.text)
    if "job" in found:
        job = job_of(block.text, tmp_path / "job.yaml")
        read = [section for _, section in job.sections()]
        assert read
    elif "idea" in next(iter(found.values()), {}) if isinstance(found, dict) else False:
        (tmp_path / "mine.yaml").write_text(block.text, encoding="utf-8")
        assert find_preset("mine.yaml", tmp_path).weights
    else:
        assert [parse_section(section, folder=tmp_path) for section in sections(found)]


def fields(model: type) -> set[str]:
    """The keys that a config may have there."""
    return set(model.model_fields) if hasattr(model, "model_fields") else set(model.__dataclass_fields__)


@pytest.mark.parametrize(
    "model",
    [
        schema.Section,
        schema.Step,
        schema.Lora,
        schema.Save,
        schema.Checkpoints,
        schema.Preview,
        schema.Ablate,
        schema.Bake,
        schema.Extract,
        schema.Preset,
        schema.Base,
        schema.RankRule,
    ],
)
def test_every_key_of_the_schema_is_in_the_manual(model):
    page = (DOCS / "section.md").read_text(encoding="utf-8")
    code = " ".join(re.findall(r"`([^`\n]+)`", page))
    assert {key for key in fields(model) if not re.search(rf"\b{key}\b", code)} == set()


def test_every_key_that_people_write_is_in_an_example():
    """All but those of recipes and of AI-Toolkit, in the YAML of the same page."""
    text = "\n".join(block.text for block in BLOCKS if (block.page, block.kind) == ("section.md", "yaml"))
    models = (schema.Settings, schema.Step, schema.Save, schema.Checkpoints, schema.Preview, schema.Ablate, schema.Bake)
    wanted = {key for model in models for key in fields(model)} | {
        "device",
        "output_dir",
        "train_fixes",
        "energy",
        "max",
        "size_mb",
    }
    wanted |= {"lora", "ratio", "preset", "blocks", "layers", "effects", "overrides", "extract"}
    recipes = {"sha256", "base_sha256", "file"}
    assert {key for key in wanted - recipes if not re.search(rf"\b{key}: ", text)} == set()


# --- commands ------------------------------------------------------------------------------------------------------------------


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each call of this program, without its name."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if called := PROGRAM.match(line := line.strip().removeprefix("$ ")):
            yield shlex.split(line[called.end() :], comments=True)


@pytest.mark.parametrize("block", of_kind("sh"))
def test_commands_are_what_the_parser_takes(block):
    for words in commands(block):
        if words and words[0] == ".experiments.ssr":
            assert ssr.arguments(words[1:]).prompts
        elif words:
            assert build_parser(COMMANDS).parse_args(words).command in COMMANDS.values()
        else:
            assert block.page.startswith("README"), "only the first steps call it without a command"


def test_most_commands_are_shown_somewhere():
    shown = {words[0] for block in BLOCKS for words in commands(block) if words}
    assert shown >= COMMANDS.keys() - {"run", "recipe"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_line_in_the_manual(name):
    assert re.search(rf"^\| `{name} ?", (DOCS / "commands.md").read_text(encoding="utf-8"), re.MULTILINE)


# --- links ---------------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(target)
    assert wrong == []


def test_every_page_is_in_the_index():
    listed = set(re.findall(r"\]\(([\w.-]+\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} - listed == set()


def test_the_readme_is_short_and_its_pictures_are_small():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160
    pictures = sorted((DOCS / "images").iterdir())
    assert sum(path.stat().st_size for path in pictures) < 400_000
    shown = set(re.findall(r"!\[[^]]+\]\((?:\S*/)?images/([\w.]+)\)", "".join(p.read_text(encoding="utf-8") for p in PAGES)))
    assert shown == {path.name for path in pictures}
    for name in ("page.png", "terminal.png"):
        assert Image.open(DOCS / "images" / name).info["zit_merge: shows"], "made by tests/pictures/demo.py"


# --- what the pages say --------------------------------------------------------------------------------------------------------


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", methods_facts())
def test_a_method_is_told_as_its_docstring_tells_it(name):
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    (told,) = re.findall(rf"^### `{name}`\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    told, facts = flat(told), methods_facts()[name]
    for part in (facts["what"], f"Formula: {facts['formula']}", f"Source: {facts['source']}", f"When: {facts['use']}"):
        assert flat(part) in told
    for parameter, about in facts["parameters"].items():
        assert f"`{parameter}`, default `{about['default']}`" in told and flat(about["text"]) in told


def test_every_preset_is_told():
    code = set(re.findall(r"`([^`\n]+)`", (DOCS / "strengths.md").read_text(encoding="utf-8")))
    assert set(presets()) <= code


def test_the_worked_example_of_strengths():
    text = (DOCS / "strengths.md").read_text(encoding="utf-8")
    first = next(block for block in BLOCKS if (block.page, block.kind) == ("strengths.md", "yaml"))
    (lora,) = yaml.safe_load(first.text)["loras"]
    tables = {key: {str(k): v for k, v in lora[key].items()} for key in ("blocks", "layers", "overrides")}
    strength = {module: lora["ratio"] * factor for module, factor in factors(Weights(**tables)).items()}
    modules = {
        "layer 3, `to_q`": "layers.3.attention.to_q",
        "layer 3, `to_k`": "layers.3.attention.to_k",
        "layer 10, `w1`": "layers.10.feed_forward.w1",
        "layer 29, `w1`": "layers.29.feed_forward.w1",
        "layer 22, `to_v`": "layers.22.attention.to_v",
        "noise refiner, `to_k`": "noise_refiner.0.attention.to_k",
        "`other.x_embedder`": "all_x_embedder.2-1",
    }
    for label, module in modules.items():
        (row,) = re.findall(rf"^\| {re.escape(label)} \| (.*?) \|$", text, re.MULTILINE)
        number = float(row.partition(":")[0].split("=")[-1])
        assert number == pytest.approx(strength[module]), label


def errors_of(path: Path) -> list[str]:
    return errors_of_text(path.read_text(encoding="utf-8"), "the sentence has")


def errors_of_text(text: str, head: str) -> list[str]:
    """The first column of the tables from this head on."""
    return re.findall(r"^\| `(?!-)([^`\n]+)` \|", text.partition(head)[2], re.MULTILINE)


def provoked(work: Workspace) -> list[str]:
    """What the program says of the mistakes that people make."""
    work.shapes = FEW
    work.lora("me.safetensors"), work.lora("style.safetensors", "musubi", rank=3, seed=1)
    zeros = {"musubi": lambda t: t.update({k: torch.tensor(0.0) for k in t if k.endswith(".alpha")})}
    work.lora("zero.safetensors", "musubi", change=zeros["musubi"])
    strange = {f"diffusion_model.layers.0.foo.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}
    work.lora("strange.safetensors", change=lambda t: t.update(strange))
    work.lora("dora.safetensors", "ai-toolkit-dora")
    me, free = {"lora": "me.safetensors", "ratio": 1.0}, ("-o", "o.safetensors", "--shapes", "free", "--ratio", "1")
    work.lora("lokr.safetensors", "ai-toolkit-lokr")
    (work.folder / "me.pt").touch()
    steps = [
        [{**me, "block": {}}],
        [{"lora": "me.safetensors"}],
        [{"lora": "trained", "ratio": 1.0}],
        [{**me, "layers": {"0-9": 1, "5-14": 0.5}}],
    ]
    calls = [
        *(("check", work.job({"name": "a", "loras": loras}, name=f"{n}.yaml")) for n, loras in enumerate(steps)),
        ("merge", "nobody.safetensors", *free),
        ("merge", "me.safetensors", "-o", "o.safetensors", "--ratio", "1"),
        ("merge", "me.safetensors", "-o", "style.safetensors", "--shapes", "free", "--ratio", "1"),
        ("merge", "zero.safetensors", *free),
        ("merge", "strange.safetensors", *free),
        ("merge", "dora.safetensors", *free),
        ("merge", "me.pt", *free),
        ("merge", "me.safetensors", "style.safetensors", *free, "1", "1"),
        ("merge", "me.safetensors", "style.safetensors", *free, "0.05", "--rank", "1", "--strict"),
        ("merge", "me.safetensors", "-o", "e.safetensors", "--shapes", "free", "--ratio", "0", "--strict"),
        ("install", "."),
    ]
    before = work.config(
        work.training(network={"type": "lokr", "lokr_full_rank": True}),
        work.section({"name": "a", "loras": [{"lora": "trained", "ratio": 1.0}]}, shapes="strict"),
        name="lokr.yaml",
    )
    return [work.zit(*words).refused() for words in [*calls, ("check", before)]]


def test_the_errors_of_the_manual_are_those_of_the_program(work):
    said = provoked(work)
    told = errors_of(DOCS / "errors.md")
    assert len(told) > 10
    assert [error for error in told if not any(error in sentence for sentence in said)] == []
    assert set(errors_of(README)) <= set(told) and len(errors_of(README)) == 10


@pytest.mark.parametrize("number", range(2))
def test_its_python_runs(work, real_loras, number):
    block = [block for block in BLOCKS if block.kind == "python"][number]
    exec(compile(block.text, block.page, "exec"), {})
    assert (work.folder / ("out.safetensors", "soft.safetensors")[number]).is_file()


def test_there_is_no_other_python():
    assert [block.page for block in BLOCKS if block.kind == "python"] == ["python.md"] * 2


# --- in Chinese ----------------------------------------------------------------------------------------------------------------


def code(path: Path) -> list[tuple[str, str]]:
    """The blocks of a page without their comments, which are translated."""
    return [(block.kind, re.sub(r"\s*(?<!\S)#.*", "", block.text).strip("\n")) for block in blocks(path)]


def test_the_chinese_readme_has_the_commands_and_the_yaml_of_the_other():
    theirs = code(CHINESE)
    assert [block for block in code(README) if block not in theirs] == []
    assert [block for block in theirs if block in code(README)] == code(README), "in the same order"


def test_the_chinese_readme_has_its_errors_keys_and_pictures():
    ours, theirs = README.read_text(encoding="utf-8"), CHINESE.read_text(encoding="utf-8")
    assert errors_of_text(theirs, "訊息裡有") == errors_of(README)
    for pattern in (r"images/\w+\.png", r"^\| (`\w+`) \| [`|]", r"`(--[\w-]+)"):
        assert set(re.findall(pattern, ours, re.MULTILINE)) <= set(re.findall(pattern, theirs, re.MULTILINE))


def test_it_is_in_the_letters_of_taiwan():
    """None of the simplified forms of letters that such a text is full of."""
    assert (
        set(CHINESE.read_text(encoding="utf-8"))
        & set("这个们为会时来过对开关实现权块层训练强调颜图发载档应继还进远选错误见说读写类网页")
        == set()
    )

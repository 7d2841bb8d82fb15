"""attach: our section goes into a config and nothing else in it changes, or the section is printed with the place to paste it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tempfile
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sweep import examples
from workspace import FEW, Workspace

from extensions_built_in.zit_merge.cli import attach as module
from extensions_built_in.zit_merge.cli.attach import attach
from extensions_built_in.zit_merge.config.edit import CannotEdit
from extensions_built_in.zit_merge.config.job import load_job
from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.files.atomic import open_exclusively, publish_file
from extensions_built_in.zit_merge.files.text import to_yaml

ROOT = Path(__file__).parents[2]
TOOLKIT = Path(os.environ.get("AI_TOOLKIT_ROOT", Path.home() / "ai-toolkit"))
EXAMPLES = [path for root in (ROOT, TOOLKIT) for path in sorted((root / "config/examples").glob("*.y*ml"))]
EXAMPLES = [path for path in EXAMPLES if "omnigen2" not in path.stem]  # AI-Toolkit's lacks a quotation mark

SECTION = """\
# My weights, from March.

type: zit_merge  # ours
device: cpu
shapes: free
output_dir: out/[name]
steps:

  # softer
  - name: soft
    loras:
      - {lora: me.safetensors, ratio: 0.9, layers: {0-9: 0.5, 3: 1e-1}}
      #  {lora: style.safetensors, ratio: 0.1}
"""
ATTACHED = """\
    - type: zit_merge  # ours
      device: cpu
      shapes: free
      output_dir: out/[name]
      steps:

        # softer
        - name: soft
          loras:
            - {lora: me.safetensors, ratio: 0.9, layers: {0-9: 0.5, 3: 1e-1}}
            #  {lora: style.safetensors, ratio: 0.1}
"""
OURS = yaml.safe_load(SECTION.replace("3: 1e-1", '"3": 0.1'))
CONFIG = """\
# A job.
job: extension
config:
  name: "cat"   # the name
  process:
    - type: sd_trainer   # trains
      training_folder: output
      network: {type: lora, linear: 2}
      sample:
        prompts:
          - "a [trigger]"
"""
META = """\
# about it
meta:
  version: '1.0'
"""
JOB = {"job": "extension", "config": {"name": "cat", "process": [{"type": "other", "x": [1, "ä\n"]}]}, "meta": {"a": 1}}


@pytest.fixture
def files(work: Workspace) -> Workspace:
    """A LoRA of few layers and a section file."""
    work.shapes = FEW
    work.lora("me.safetensors")
    work.write(SECTION, "section.yaml")
    return work


def put(work: Workspace, text: str | bytes, name: str = "config.yaml") -> Path:
    """A config, its bytes as they are."""
    path = work.folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def contents(work: Workspace) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in work.folder.rglob("*") if p.is_file()}


def done(work: Workspace, text: str | bytes, name: str = "config.yaml", section: str = "section.yaml", **keys: Any) -> str:
    """The config after attach, checked: a backup of the old, the same values and order, and nothing left to do."""
    config = put(work, text, name)
    old, before = config.read_bytes(), set(work.folder.iterdir())
    was = load_job(config).processes
    result = attach(config, work.folder / section, **keys)
    assert result.backup.read_bytes() == old
    assert set(work.folder.iterdir()) - before == {result.backup}
    now = load_job(config)
    at = int(result.loc[len("process[") : -1])
    kept = [p for i, p in enumerate(now.processes) if i != at]
    assert list(map(repr, kept)) == [repr(p) for i, p in enumerate(was) if not result.replaced or i != at]
    assert now.sections()[0][0] == at
    new = config.read_bytes()
    again = attach(config, work.folder / section, replace=True)
    assert (config.read_bytes(), again.backup) == (new, None)
    assert "already" in again.text()
    result.backup.unlink()
    return new.decode("utf-16" if new[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def refused(work: Workspace, config: str | Path, section: str | Path = "section.yaml", **keys: Any) -> str:
    """The one sentence; nothing was changed or left."""
    path = config if isinstance(config, Path) else put(work, config)
    before = contents(work)
    with pytest.raises(ZitMergeError) as caught:
        attach(path, work.folder / section, **keys)
    message = str(caught.value)
    assert contents(work) == before
    assert "\n" not in message and message.isascii() and ": " in message
    return message


def printed(work: Workspace, config: str, name: str = "config.yaml", *flags: str) -> tuple[str, str]:
    """(the place, the section) as they are printed for a config that is not edited; nothing was changed or left."""
    put(work, config, name)
    before = contents(work)
    ran = work.zit("attach", name, "--section", "section.yaml", *flags)
    assert contents(work) == before
    assert re.match(rf"{name}: can't be edited automatically, since .*: paste the printed section by hand$", ran.refused())
    assert ran.out.isascii() and ran.out.endswith("\n")
    place, text = ran.out.split("\n", 1)
    return place, text


OTHER = "job: extension\nconfig:\n  name: cat\n  process:\n    - type: other\n"
SHAPES = {
    "last": (CONFIG, "", 4),
    "meta": (CONFIG, META, 4),
    "document end": (CONFIG, "...\n", 4),
    "not indented": (CONFIG.replace("\n    ", "\n  "), META, 2),
    "deep": (CONFIG.replace("\n    ", "\n        "), META, 8),
    "keys behind": ("config:\n  process:\n    - type: other\n", "  name: cat\njob: extension\n", 4),
    "wide dash": (OTHER.replace("- ", "-   "), META, 4),
    "dash alone": (OTHER.replace("- ", "-\n      "), META, 4),
    "comment first": (OTHER.replace("- ", "# first\n    - "), META, 4),
    "comments below": (CONFIG, "\n  # the config goes on\n\n    # and on\n" + META, 4),
    "shallow comment": (CONFIG, "\n#\ttabs\n", 4),
    "own comments": (CONFIG + "\n      # an option\n          # deep\n      #\ttabs\t\n", "\n" + META, 4),
    "literal": (CONFIG + "      text: |\n        one\n          # two\n", "\n", 4),
    "folded": (CONFIG + "      text: >-\n        one\n        two\n", "\n# c\n" + META, 4),
    "quoted": (CONFIG + '      text: "one\n        two"  # c\n', "\n", 4),
    "null": (CONFIG + "      text:   # none\n", META, 4),
    "brackets": (CONFIG + "      text: [1,\n  2\n  ]  # c\n", META, 4),
    "alias": (CONFIG + "      text: &a x\n      more: *a\n", "\n" + META, 4),
    "dashes": (CONFIG + "      text:\n      - - a\n        - b\n      -\n", META, 4),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("eol", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_it_comes_after_the_last_process(files, name, eol):
    above, below, column = SHAPES[name]
    item = indent(dedent(ATTACHED), " " * column)
    above, item, below = (text.replace("\n", eol) for text in (above, item, below))
    assert done(files, above + below) == above + item + below
    if name != "literal":
        assert done(files, (above + below).rstrip("\r\n")) == (above + item + below).rstrip("\r\n")


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_and_other_scripts_stay(files, codec):
    put(files, SECTION.replace("\n", "\r\n").rstrip().encode(codec), "section.yaml")
    config = CONFIG.replace("A job", "Meine Größe, 日本, 🐈").replace("a [trigger]", "ein [trigger] für 猫")
    assert done(files, config.encode(codec)) == config + ATTACHED


def test_environment_variables_and_names_stay_as_text(files, monkeypatch):
    monkeypatch.setenv("ZIT_PLACE", "/data")
    monkeypatch.setenv("ZIT_RATIO", "0.25")
    config = CONFIG.replace("output\n", "${ZIT_PLACE}/[name]\n      more: {a: ${ZIT_PLACE}/x, b: [${ZIT_RATIO}]}\n")
    put(files, SECTION.replace("0.9", "${ZIT_RATIO}"), "section.yaml")
    assert done(files, config + META) == config + ATTACHED.replace("0.9", "${ZIT_RATIO}") + META
    assert '"${ZIT_PLACE}/a"' in done(files, json.dumps(JOB).replace("other", "${ZIT_PLACE}/a"), "config.json")


LAYOUTS = {"the UI's": {"indent": 2, "ensure_ascii": False}, "Python's": {"indent": 4}, "tabs": {"indent": "\t"}, "one line": {}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("eol", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_json_as_programs_write_it(files, layout, at, eol):
    """The file is what the same program would have written with the section in it, in a new place or in that of an old one."""
    others: list[Any] = [{"type": "a"}, {"type": "b", "x": [1, "ä\n"], "1": None}]
    none, old, new = (
        json.dumps(JOB | {"config": {"process": [*others[:at], *s, *others[at:]], "name": "cat"}}, **LAYOUTS[layout])
        for s in ([], [{"type": "zit_merge", "steps": []}], [OURS])
    )
    none, old, new = (text.replace("\n", eol) + eol for text in (none, old, new))
    assert done(files, old, "config.json", replace=True) == new
    assert at < 2 or done(files, none, ".job_config.jsonc") == new


BRACKETS = {
    "one line": "process: [{type: other, x: 1}]",
    "lines": "process: [\n    {type: other},\n    {type: b}\n  ]",
    "empty": "process: []",
    "json": '"process": [\n{\n"type": "other"\n}\n]',
}


@pytest.mark.parametrize("name", BRACKETS)
def test_a_list_in_brackets_gets_json_by_hand(files, name):
    config = "job: extension\nconfig:\n  name: cat\n  " + BRACKETS[name]
    place, text = printed(files, config + "\n" + META)
    assert place == "# append it to config.process of config.yaml:" and json.loads(text) == OURS
    comma = "" if name == "empty" else ","
    put(files, config.removesuffix("]") + comma + text.replace("\n", "\n   ") + "]\n" + META)
    assert attach(files.folder / "config.yaml", files.folder / "section.yaml", replace=True).backup is None


ELSEWHERE = {
    "an alias": "p: &p\n    - type: a\njob: extension\nconfig:\n  name: cat\n  process: *p\n",
    "an alias of the config": "c: &c\n  name: cat\n  process:\n    - type: a\njob: extension\nconfig: *c\n",
    "a merge key": "c: &c {name: cat, process: [{type: a}]}\njob: extension\nconfig:\n  <<: *c\n",
    "an anchor": CONFIG.replace("process:", "process: &p"),
    "a tag": CONFIG.replace("process:", "process: !!seq"),
    "a variable": "job: extension\nconfig:\n  name: cat\n  process: ${ZIT_PROCESSES}\n",
    "a variable in brackets": "job: extension\nconfig: {name: cat, ${ZIT_KEY}}\n",
    "dashes in a text": CONFIG + '      text: "one\n    - two"\n',
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_list_that_is_not_written_out(files, name, monkeypatch):
    monkeypatch.setenv("ZIT_PROCESSES", "[{type: a}]")
    monkeypatch.setenv("ZIT_KEY", "process: [{type: a}]")
    place, text = printed(files, ELSEWHERE[name])
    assert place == "# append it to config.process of config.yaml:"
    assert text.startswith("    - type: zit_merge\n") and json.dumps(yaml.safe_load(text)) == json.dumps([OURS])


@pytest.mark.parametrize("text", ["text: |+\n        abc\n\n", "text: |\n        abc"], ids=["empty lines", "no newline"])
def test_another_value_would_change(files, text):
    config = CONFIG + "      " + text
    place, text = printed(files, config)
    assert place == "# append it to config.process (after line 13) of config.yaml:"
    pasted = yaml.safe_load("\n".join([*config.splitlines()[:13], text]))
    assert json.dumps(pasted["config"]["process"][1]) == json.dumps(OURS)
    config = CONFIG + "    - type: zit_merge\n      steps: &x []\n    - type: other\n      x: *x\n"
    place, _ = printed(files, config, "config.yaml", "--replace")
    assert place == "# put it in the place of config.process[1] (after line 11) of config.yaml:"


def test_values_that_json_has_not(files, monkeypatch):
    monkeypatch.setenv("ZIT_RATIO", "0.25")
    place, text = printed(files, json.dumps(JOB).replace("[1, ", "[${ZIT_RATIO}, "), "config.json")
    assert place == "# append it to config.process of config.json:" and json.loads(text) == OURS
    put(files, SECTION + "train: 2024-01-01\n", "section.yaml")
    assert '"train": "2024-01-01"' in printed(files, json.dumps(JOB), "config.json")[1]
    put(files, json.dumps(OURS | {"trigger_word": "\ud800"}), "section.yaml")
    assert r'"\ud800"' in printed(files, json.dumps(JOB, ensure_ascii=False), "config.json")[1]


def whole_job(item: str) -> str:
    return "job: extension\nconfig:\n  name: other\n  process:\n    - type: sd_trainer\n      x: 1\n" + item


DUMPED = {
    "job": whole_job(ATTACHED) + "# about the other\nmeta: 1\n",
    "list": "- type" + SECTION.split("\ntype")[1].replace("\n", "\n  ").rstrip(" "),
    "marks": "%YAML 1.1\n---\n" + SECTION + "...\n",
    "braces": "# head\n  " + json.dumps(OURS),
    "list in brackets": json.dumps([OURS], indent=2),
    "JSON job": json.dumps(JOB | {"config": {"process": [{"type": "other"}, OURS]}}),
    "alias to something outside": "x: &r 0.9\n" + whole_job(ATTACHED.replace("0.9", "*r")),
    "blocks of text": SECTION + "trigger_word: |2-\n    two\n  \n     \n  last\nmodel: |\n  # no comment\n",
    "words like numbers": json.dumps(OURS | {"trigger_word": "1e3", "name": "größe"}),
}


@pytest.mark.parametrize("name", DUMPED)
def test_other_files_of_a_section_give_its_values(files, name):
    put(files, DUMPED[name], "other.yaml")
    new = done(files, CONFIG + META, section="other.yaml")
    section = load_job(files.folder / "config.yaml").sections()[0][1]
    assert new.startswith(CONFIG + "    - type: zit_merge\n      device: cpu\n") and new.endswith("\n" + META)
    assert (section.steps[0].loras[0].ratio, section.output_dir) == (0.9, "out/cat")
    if name == "blocks of text":
        assert (section.trigger_word, section.model) == ("  two\n\n   \nlast", "# no comment\n")
    if name == "words like numbers":
        assert section.trigger_word == "1e3" and "name: größe\n" in new


def test_a_recipe_is_a_section(files):
    attach(config := put(files, CONFIG.replace("sd_trainer", "other")), files.folder / "section.yaml")
    assert files.zit("run", config).ok()
    recipe = files.zit("recipe", "out/cat/merged_cat_soft.safetensors").ok()
    head = "type: zit_merge\n"
    put(files, recipe.replace(head, head + "output_dir: out\n"), "recipe.yaml")
    assert "recipe.yaml: output_dir: no recipe has this key" in refused(files, CONFIG, "recipe.yaml")
    own = re.sub("(made_by|[ -]*file): .*\n", "", recipe)
    put(files, own.replace(head, head + "output_dir: out\nshapes: free\ndevice: cpu\n"), "recipe.yaml")
    done(files, CONFIG.replace("sd_trainer", "other"), section="recipe.yaml")
    (config.parent / "me.safetensors").rename(config.parent / "them.safetensors")
    assert "no file with the tensors of me.safetensors" in refused(files, CONFIG, "recipe.yaml")


def test_anchors_of_the_section(files):
    put(files, SECTION.replace("ratio: 0.9", "ratio: &r 0.9, blocks: {to_q: *r}"), "section.yaml")
    assert "*r" in done(files, CONFIG + META)
    assert "to_q: 0.9" in done(files, CONFIG.replace("linear: 2", "linear: &r 2") + META)


OLD = """\
    # mine stays
    - type: zit_merge  # old
      steps: [{name: old, loras: [{lora: gone.safetensors, ratio: 1}]}]
      # old end
"""
LATER = """\
    # later
    - type: other
      x: 1
"""


@pytest.mark.parametrize("rest", ["", META, LATER, LATER + META, "\n  # shallow\n" + META])
@pytest.mark.parametrize("head", [CONFIG, "job: extension\nconfig:\n  name: cat\n  process:\n"], ids=["after", "first"])
def test_replace_wherever_it_is(files, head, rest):
    mine = OLD.splitlines(True)[0]
    assert done(files, head + OLD + rest, replace=True) == head + mine + ATTACHED + rest
    assert done(files, (head + OLD + rest).rstrip("\n"), replace=True) == (head + mine + ATTACHED + rest).rstrip("\n")


def test_sections_that_are_there_already(files):
    message = refused(files, CONFIG + OLD)
    assert "process[1]" in message and "--replace" in message
    assert "process[1] and process[3]" in refused(files, CONFIG + OLD + LATER + OLD, replace=True)
    result = attach(put(files, CONFIG), files.folder / "section.yaml", replace=True)
    assert not result.replaced and "appended as process[1]" in result.text()
    again = attach(result.config, result.config, replace=True)
    assert again.backup is None and "nothing was changed" in again.text()


RECIPE = {"type": "zit_merge", "made_by": "zit_merge 1", "steps": [{"name": "a", "loras": [{"lora": "[name].safetensors"}]}]}
WRONG = [
    ("config.yaml", "", "neither"),
    ("config.yaml", b"\xff\x00\x81", "not a text file"),
    ("config.yaml", None, "config.yaml: can't be read"),
    ("config.yaml", CONFIG.replace("extension", "train"), "job: extension"),
    ("config.yaml", "job: extension\nconfig:\n  name: cat\n  process:\n", "config.process must be a list"),
    ("config.yaml", CONFIG + "job: extension\n", "duplicate key"),
    ("config.yaml", SECTION, "is a zit_merge section, not an AI-Toolkit job"),
    ("config.yaml", CONFIG + "---\na: 1\n", "line 12: but found another document"),
    ("config.yaml", "[" * 5000, "nested too deeply"),
    ("config.yaml", "job: extension\nconfig: &c\n  name: cat\n  process: [*c]\n", "nested too deeply"),
    ("config.yaml", CONFIG + "      x: ${ZIT_NOT_SET}\n", "ZIT_NOT_SET"),
    ("config.yaml", CONFIG + "      train: {lr_scheduler: step}\n", "process[0].train.lr_scheduler: AI-Toolkit can't make step"),
    ("config.json", CONFIG, "not valid JSON"),
    ("config.json", "[" * 100_000, "nested too deeply"),
    ("section.yaml", "", "has 0 zit_merge sections"),
    ("section.yaml", b"\xff\x00\x81", "not a text file"),
    ("section.yaml", None, "section.yaml: can't be read"),
    ("section.yaml", CONFIG, "has 0 zit_merge sections"),
    ("section.yaml", whole_job(ATTACHED + ATTACHED), "has 2 zit_merge sections"),
    ("section.yaml", SECTION.replace("ratio", "ration"), "section.yaml: steps[0].loras[0].ration"),
    ("section.yaml", SECTION + "device: cpu\n", "duplicate key"),
    ("section.yaml", SECTION.replace("me.safe", "you.safe"), "you.safetensors is not there"),
    ("section.yaml", SECTION.replace("me.safetensors", "trained@7"), "step 7"),
    ("section.yaml", SECTION.replace("me.safe", "${ZIT_NOT_SET}.safe"), "ZIT_NOT_SET"),
    ("section.yaml", to_yaml(RECIPE), "[name]"),
    ("section.yaml", "[" * 5000, "nested too deeply"),
]


@pytest.mark.parametrize(("name", "text", "says"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_file_is_refused_in_a_sentence(files, name, text, says):
    config = put(files, CONFIG, "config.json" if name == "config.json" else "config.yaml")
    if text is None:
        (files.folder / name).unlink()
    else:
        put(files, text, name)
    assert says in refused(files, config)


def test_relative_paths_start_at_the_config(files):
    """Not at the section's file."""
    (files.folder / "sub").mkdir()
    (files.folder / "me.safetensors").rename(files.folder / "sub" / "me.safetensors")
    assert "is not there" in refused(files, CONFIG)
    done(Workspace(files.folder / "sub", lambda: ("", "")), CONFIG, section="../section.yaml")


def test_a_config_in_the_folder_of_the_training_would_be_taken_for_a_checkpoint(files):
    (files.folder / "output" / "cat").mkdir(parents=True)
    put(files, SECTION.replace("me.safetensors", "trained"), "section.yaml")
    assert "checkpoint" in refused(files, put(files, CONFIG, "output/cat/cat.yaml"))
    attach(put(files, CONFIG, "output/cat/config.yaml"), files.folder / "section.yaml")


def test_a_backup_takes_no_name_that_is_used(files):
    put(files, "mine", "config.yaml.bak")
    with open_exclusively(files.folder / "config.yaml.zit_merge.part") as part:
        part.write(b"left by a killed run")
    (files.folder / "config.yaml.bak1").mkdir()
    config, texts = put(files, CONFIG), []
    for ratio in (0.1, 0.2):
        texts.append(config.read_bytes())
        put(files, SECTION.replace("0.9", str(ratio)), "section.yaml")
        attach(config, files.folder / "section.yaml", replace=True)
    assert [(files.folder / f"config.yaml.{n}").read_bytes() for n in ("bak", "bak2", "bak3")] == [b"mine", *texts]
    assert not (files.folder / "config.yaml.zit_merge.part").exists()


@pytest.mark.skipif(os.name == "nt", reason="modes and links of POSIX")
@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_the_mode_is_kept(files, mode):
    config = put(files, CONFIG)
    config.chmod(mode)
    result = attach(config, files.folder / "section.yaml")
    assert {stat.S_IMODE(p.stat().st_mode) for p in (config, result.backup)} == {mode}


@pytest.mark.skipif(os.name == "nt", reason="modes and links of POSIX")
def test_a_link_stays_a_link(files):
    (files.folder / "real").mkdir()
    real = put(files, CONFIG, "real/job.yaml")
    link = files.folder / "config.yaml"
    link.symlink_to("real/job.yaml")
    result = attach(link, files.folder / "section.yaml")
    assert link.is_symlink() and real.read_text() == CONFIG + ATTACHED
    assert result.backup.read_text() == CONFIG and result.backup.parent.samefile(real.parent)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_write_protected_is_left_alone(files, what):
    (files.folder / "sub").mkdir()
    config = put(files, CONFIG, "sub/config.yaml")
    protected = config if what == "file" else config.parent
    protected.chmod(0o555)
    try:
        assert "can't be written" in refused(files, config, files.folder / "section.yaml")
    finally:
        protected.chmod(0o755)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "no"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_write_that_fails_changes_nothing(files, monkeypatch, where, error, call):
    """At the first call of the system, or at the second, which is of the backup."""
    config, real, calls = put(files, CONFIG), getattr(os, where), []

    def fail(*words: object, **keys: object) -> None:
        calls.append(words)
        if len(calls) >= (1 if where == "replace" else call):
            raise error
        real(*words, **keys)

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ZitMergeError):
        attach(config, files.folder / "section.yaml")
    assert config.read_text() == CONFIG
    assert sorted(p.name for p in files.folder.iterdir()) == ["config.yaml", "me.safetensors", "section.yaml"]


def test_a_failure_after_the_change_keeps_the_backup(files, monkeypatch):
    def late(*words: Any) -> None:
        publish_file(*words)
        raise OSError(5, "late")

    monkeypatch.setattr(module, "publish_file", late)
    with pytest.raises(ZitMergeError):
        attach(config := put(files, CONFIG), files.folder / "section.yaml")
    assert config.read_text() == CONFIG + ATTACHED
    assert (files.folder / "config.yaml.bak").read_text() == CONFIG


def test_a_change_by_another_program_is_not_overwritten(files, monkeypatch):
    edit = module.put
    monkeypatch.setattr(module, "put", lambda *words: edit(*words) if put(files, CONFIG + META) else "")
    with pytest.raises(ZitMergeError, match="changed by another program"):
        attach(config := put(files, CONFIG), files.folder / "section.yaml")
    assert config.read_text() == CONFIG + META
    assert sorted(p.name for p in files.folder.iterdir()) == ["config.yaml", "me.safetensors", "section.yaml"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: f"{p.parent.parent.parent.name}-{p.stem}")
def test_every_example(files, path):
    """Ours, and AI-Toolkit's where it is installed."""
    text = path.read_text(encoding="utf-8")
    if "\njob: extension" not in "\n" + text:
        assert "job: extension" in refused(files, text)
        return
    text = re.sub(r"(\n {8}arch:) \S+", r"\1 zimage", text)  # check refuses other models
    section = SECTION.replace("me.safetensors", str(files.folder / "me.safetensors"))
    put(files, section, "section.yaml")
    new = done(files, text, replace=True)
    item = "- " + section[section.index("type") :].replace("\n", "\n  ").replace("\n  \n", "\n\n").rstrip(" ")
    above, below = new.split(indent(item, "    " if "\n    - type" in text else "  "))
    assert text.startswith(above) and text.endswith(below)
    assert "- type: zit_merge" in text or above + below == text


WORDS = st.text("ab c#:-'\"|>ä\n", max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)
PROCESS = st.dictionaries(st.text("pqr", min_size=1, max_size=2), VALUES, max_size=3).map(lambda d: {"type": "other"} | d)


@pytest.fixture(scope="module")
def shared_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    work = Workspace(folder, lambda: ("", ""))
    work.shapes = FEW
    return work.lora("me.safetensors")


@examples(80)
@given(
    processes=st.lists(PROCESS, min_size=1, max_size=3),
    flow=st.sampled_from([False, None]),
    style=st.sampled_from([None, None, '"', "'", "|", ">"]),
    wide=st.sampled_from([2, 4]),
    end=st.sampled_from(["\n", ""]),
    meta=st.booleans(),
    comments=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=3),
)
def test_any_yaml(shared_lora, processes, flow, style, wide, end, meta, comments):
    """Comments are strewn in where they mean nothing; all of the old text is there afterwards, and replace finds it again."""
    job = {"job": "extension", "config": {"name": "cat", "process": processes}} | ({"meta": {"a": 1}} if meta else {})
    text = yaml.dump(job, default_flow_style=flow, default_style=style, indent=wide, sort_keys=False)
    for at, column in comments:
        lines = text.splitlines(True)
        more = "".join([*lines[:at], " " * column + "# comment: [\n", *lines[at:]])
        with contextlib.suppress(yaml.YAMLError, ValueError, KeyError):  # KeyError: tags that YAML can't build
            text = more if yaml.safe_load(more) == job else text
    text = text.rstrip("\n") + end
    with tempfile.TemporaryDirectory() as folder:
        config, section = Path(folder) / "config.yaml", Path(folder) / "section.yaml"
        config.write_text(text, encoding="utf-8")
        section.write_text(SECTION.replace("me.safetensors", str(shared_lora)), encoding="utf-8")
        try:
            result = attach(config, section)
        except CannotEdit:
            assert style in ("|", ">")  # empty lines at the end of a text, or no newline
            assert config.read_text(encoding="utf-8") == text
            return
        new = config.read_text(encoding="utf-8")
        rest = iter(new)
        assert all(c in rest for c in text)
        assert result.loc == f"process[{len(processes)}]"
        assert load_job(config).processes[:-1] == load_job(result.backup.rename(Path(folder) / "old.yaml")).processes
        section.write_text(SECTION.replace("me.safetensors", str(shared_lora)).replace("0.9", "0.75"), encoding="utf-8")
        attach(config, section, replace=True)
        assert config.read_text(encoding="utf-8") == new.replace("0.9", "0.75")


def test_the_command(files):
    config = put(files, CONFIG + META)
    text = files.zit("attach", "config.yaml", "--section", "section.yaml").ok()
    assert text == "config.yaml: the section is appended as process[1]; the file as it was is config.yaml.bak\n"
    assert config.read_text() == CONFIG + ATTACHED + META
    assert "section already (process[1])" in files.zit("attach", config, "--section", "section.yaml").refused()
    assert "already" in files.zit("attach", config, "--section", "section.yaml", "--replace").ok()
    put(files, SECTION.replace("0.9", "0.8"), "section.yaml")
    text = files.zit("attach", "config.yaml", "--section", "section.yaml", "--replace").ok()
    assert "replaced as process[1]" in text and "config.yaml.bak1" in text
    assert files.zit("attach", config, "--section", "section.yaml", "--replace", "--quiet").ok() == ""
    assert files.zit("attach", config).code == 2

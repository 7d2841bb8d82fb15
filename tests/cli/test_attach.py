"""attach: our section goes into a config, and nothing else in it changes."""

from __future__ import annotations

import json
import os
import random
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from workspace import Workspace

from extensions_built_in.zit_merge.cli import attach as module
from extensions_built_in.zit_merge.cli.attach import Attached, attach
from extensions_built_in.zit_merge.config import edit as textedit
from extensions_built_in.zit_merge.config.job import load_job
from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.files.text import to_yaml

ROOT = Path(__file__).parents[2]
TOOLKIT = Path(os.environ.get("AI_TOOLKIT_ROOT", Path.home() / "ai-toolkit"))
OURS = sorted((ROOT / "config/examples").glob("*.y*ml"))
EXAMPLES = [*OURS, *sorted((TOOLKIT / "config/examples").glob("*.y*ml"))]

SECTION = """\
# My weights, from March.
#   second line
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
      # My weights, from March.
      #   second line
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


@pytest.fixture
def files(work: Workspace) -> Workspace:
    """A LoRA and a section file."""
    work.lora("me.safetensors")
    work.write(SECTION, "section.yaml")
    return work


def put(work: Workspace, text: str | bytes, name: str = "config.yaml") -> Path:
    """A config, its bytes as they are."""
    path = work.folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def done(work: Workspace, text: str | bytes, name: str = "config.yaml", section: str = "section.yaml", **keys: Any) -> str:
    """The config after attach, checked: a backup of the old, the same values and order, and nothing left to do."""
    config = put(work, text, name)
    old, before = config.read_bytes(), set(work.folder.iterdir())
    was = load_job(config).processes
    result = attach(config, work.folder / section, **keys)
    assert result.backup.read_bytes() == old
    assert set(work.folder.iterdir()) - before == {result.backup}
    now = load_job(config)
    at = int(result.place[len("process[") : -1])
    kept = [p for i, p in enumerate(now.processes) if i != at]
    assert list(map(repr, kept)) == [repr(p) for i, p in enumerate(was) if not result.replaced or i != at]
    assert now.sections()[0][0] == at
    new = config.read_bytes()
    again = attach(config, work.folder / section, replace=True)
    assert (config.read_bytes(), again.backup) == (new, None)
    assert "already" in again.text()
    for file in set(work.folder.iterdir()) - before:
        file.unlink()
    codec = "utf-16" if new[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return new.decode(codec)


def refused(work: Workspace, config: str | Path, section: str | Path = "section.yaml", **keys: Any) -> str:
    """The one sentence; nothing was changed or left."""
    path = config if isinstance(config, Path) else put(work, config)
    before = {p: p.read_bytes() for p in work.folder.rglob("*") if p.is_file()}
    with pytest.raises(ZitMergeError) as caught:
        attach(path, work.folder / section, **keys)
    assert {p: p.read_bytes() for p in work.folder.rglob("*") if p.is_file()} == before
    message = str(caught.value)
    assert "\n" not in message and message.isascii() and ": " in message
    return message


def inserted(old: str, new: str) -> str:
    """What was put between the characters of the old text, which are all there, in one place."""
    head = os.path.commonprefix([old, new])
    tail = os.path.commonprefix([old[len(head) :][::-1], new[len(head) :][::-1]])[::-1]
    assert len(head) + len(tail) == len(old)
    return new[len(head) : len(new) - len(tail)]


def test_it_comes_after_the_last_process_with_its_own_comments(files):
    assert done(files, CONFIG + META) == CONFIG + ATTACHED + META


def test_the_list_is_the_last_thing_in_the_file(files):
    assert done(files, CONFIG) == CONFIG + ATTACHED


def test_no_newline_at_the_end_stays_so(files):
    assert done(files, CONFIG.rstrip("\n")) == (CONFIG + ATTACHED).rstrip("\n")


def test_a_list_that_is_not_indented(files):
    config = CONFIG.replace("\n    ", "\n  ")
    assert "\n  - type: sd_trainer" in config
    assert done(files, config + META) == config + ATTACHED.replace("\n    ", "\n  ")[2:] + META


@pytest.mark.parametrize("dash", ["-   ", "-\n      "])
def test_other_ways_to_write_an_item(files, dash):
    config = f"job: extension\nconfig:\n  name: cat\n  process:\n    {dash}type: other\n"
    assert done(files, config + META) == config + ATTACHED + META


def test_deep_indentation(files):
    config = "job: extension\nconfig:\n    name: cat\n    process:\n        -   type: other\n            x: 1\n"
    assert (
        done(files, config + META) == config + "".join(f"    {s}" if s.strip() else s for s in ATTACHED.splitlines(True)) + META
    )


def test_name_behind_the_list_and_job_last(files):
    head, tail = "config:\n  process:\n    - type: other\n", "  name: cat\njob: extension\n"
    assert done(files, head + tail) == head + ATTACHED + tail


def test_documents_with_marks(files):
    head, tail = "%YAML 1.1\n---\n" + CONFIG, "...\n"
    assert done(files, head + tail) == head + ATTACHED + tail


def test_crlf_stays(files):
    assert done(files, (CONFIG + META).replace("\n", "\r\n")) == (CONFIG + ATTACHED + META).replace("\n", "\r\n")


def test_a_section_with_crlf_in_a_file_without(files):
    put(files, SECTION.replace("\n", "\r\n"), "section.yaml")
    assert done(files, CONFIG + META) == CONFIG + ATTACHED + META


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_stay(files, codec):
    put(files, SECTION.encode(codec), "section.yaml")
    config = put(files, (CONFIG + META).encode(codec))
    attach(config, files.folder / "section.yaml")
    assert config.read_bytes() == (CONFIG + ATTACHED + META).encode(codec)


def test_other_scripts_stay(files):
    config = CONFIG.replace("A job", "Meine Größe, 日本, 🐈").replace("a [trigger]", "ein [trigger] für 猫")
    assert done(files, config) == config + ATTACHED


COMMENTS = [
    ("", "\n# about it\n"),
    ("      # an option\n", "# about it\n"),
    ("\n      # an option\n\n    # - type: another\n", "\n  # the config goes on\n\n"),
    ("#      option: 1\n", "#\n"),
    ("      #\ttabs\t\n", "#\ttabs\n"),
    ("          # deep\n", "\n\n\n  # shallow\n      # deep again\n"),
]


@pytest.mark.parametrize(("own", "others"), COMMENTS, ids=range(len(COMMENTS)))
def test_comments_stay_with_what_they_are_about(files, own, others):
    assert done(files, CONFIG + own + others + META) == CONFIG + own + ATTACHED + others + META
    assert done(files, CONFIG + own + others) == CONFIG + own + ATTACHED + others


LAST_VALUES = {
    "literal": ("text: |\n        one\n          two\n", "\n"),
    "literal strip": ("text: |-\n        one\n", "\n\n"),
    "literal keep": ("text: |+\n        one\n\n\n", ""),
    "folded": ("text: >\n        one\n        two\n", "\n# c\n"),
    "spaces that count": ("text: |\n        one\n          \n", ""),
    "quoted over lines": ('text: "one\n        two"  # c\n', "\n"),
    "plain over lines": ("text: one\n        two\n", "\n"),
    "null": ("text:\n", "\n"),
    "null with comment": ("text:   # none\n", ""),
    "flow over lines": ("text: [1,\n  2\n  ]  # c\n", ""),
    "alias": ("text: &a x\n      more: *a\n", "\n"),
    "trailing spaces": ("text: x   \n", "   \n"),
    "nested dashes": ("text:\n      - - a\n        - b\n      -\n", "\n"),
}


@pytest.mark.parametrize("name", LAST_VALUES)
def test_whatever_the_last_value_is(files, name):
    own, others = LAST_VALUES[name]
    config = f"job: extension\nconfig:\n  name: cat\n  process:\n    - type: other\n      {own}"
    assert done(files, config + others + META) == config + ATTACHED + others + META


def test_environment_variables_and_names_stay_as_text(files, monkeypatch):
    monkeypatch.setenv("ZIT_PLACE", "/data")
    monkeypatch.setenv("ZIT_RATIO", "0.25")
    config = CONFIG.replace("output\n", "${ZIT_PLACE}/[name]\n      more: {a: ${ZIT_PLACE}/x, b: [${ZIT_RATIO}]}\n")
    put(files, SECTION.replace("0.9", "${ZIT_RATIO}"), "section.yaml")
    new = done(files, config + META)
    assert new == config + ATTACHED.replace("0.9", "${ZIT_RATIO}") + META


def test_a_variable_that_is_not_set_is_named(files):
    assert "ZIT_NOT_SET" in refused(files, CONFIG.replace("output\n", "${ZIT_NOT_SET}\n"))


def ours() -> dict[str, Any]:
    return yaml.safe_load(SECTION.replace("3: 1e-1", '"3": 0.1'))


JOB = {"job": "extension", "config": {"name": "cat", "process": [{"type": "other", "x": [1, "ä\n"]}]}, "meta": {"a": 1}}
LAYOUTS = {
    "the UI's": {"indent": 2, "ensure_ascii": False},
    "Python's": {"indent": 4},
    "tabs": {"indent": "\t"},
    "one line": {},
    "tight": {"separators": (",", ":")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_json_as_programs_write_it(files, layout, count):
    """The file is what the same program would have written with the section in it."""
    job = json.loads(json.dumps(JOB))
    job["config"]["process"] *= count
    old = json.dumps(job, **LAYOUTS[layout])
    job["config"]["process"].append(ours())
    assert done(files, old, ".job_config.json") == json.dumps(job, **LAYOUTS[layout])


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r\n\r\n"])
def test_json_keeps_its_line_ends(files, ending):
    old = json.dumps(JOB, indent=2)
    whole = json.loads(old)
    whole["config"]["process"].append(ours())
    eol = ending[: len(ending) // max(1, ending.count("\n"))]
    wanted = json.dumps(whole, indent=2).replace("\n", eol) + ending
    assert done(files, old.replace("\n", eol) + ending, "config.json") == wanted


def test_json_in_another_hand(files):
    old = '{ "job":"extension" , "config" : {"name": "c[at]}\\"", "process" : [ { "type":"other",\n "x":["]",{}] } ] } }'
    new = done(files, old, "config.jsonc")
    assert json.loads(inserted(old, new).lstrip(", "))["type"] == "zit_merge"


def test_brackets_that_open_and_close_on_the_lines_of_items(files):
    old = '{\n  "job": "extension",\n  "config": {"name": "cat", "process": [{\n    "type": "other"\n  }]}\n}\n'
    new = done(files, old, "config.json")
    assert '  }, {\n    "type": "zit_merge",\n    "device": "cpu",\n' in new and new.endswith("    ]\n  }]}\n}\n")
    assert inserted(old, new)


FLOWS = {
    "one line": "  process: [{type: other, x: 1}]\n",
    "two": "  process: [{type: other, x: 1}, {type: b}]\n",
    "lines": "  process: [\n    {type: other},\n    {type: b}   # last\n    # below\n  ]\n",
    "a comma at the end": "  process: [\n    {type: other},   # with a comma, and a ]\n  ]\n",
    "empty": "  process: []\n",
    "empty with a comment": "  process: [   # none [yet]\n  ]\n",
    "anchored": "  process: &p [{type: &t other}]\n  again: *p\n",
    "json": json.dumps({"process": [{"type": "other"}]}, indent=2)[2:-2] + "\n",
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_list_in_brackets_within_yaml(files, name):
    config = "job: extension  # c\nconfig:\n  name: cat\n" + FLOWS[name]
    new = done(files, config + META)
    rest = iter(new)
    assert all(c in rest for c in config + META)
    assert new.endswith(META) and '"type": "zit_merge"' in new


def test_all_of_the_yaml_in_brackets(files):
    config = "{job: extension, config: {name: cat, process: [{type: other}]}}"
    assert json.loads(inserted(config, done(files, config)).lstrip(", ")) == ours()


def test_yaml_that_is_json(files):
    old = json.dumps(JOB, indent=2, ensure_ascii=False)
    assert json.loads(done(files, old)) == json.loads(done(files, old, "config.json"))


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_characters_that_yaml_minds(files, name):
    text = "\u2028 \x7f \x85 \ufeff 🐈 \\ \" [x] 'y' {z} # no comment, %"
    put(files, SECTION + "trigger_word: " + json.dumps(text, ensure_ascii=True).replace("\\ud83d\\udc08", "🐈"), "section.yaml")
    done(files, "job: extension\nconfig: {name: cat, process: []}" if name == "config.yaml" else json.dumps(JOB), name)
    assert load_job(files.folder / name).sections()[0][1].trigger_word == text


def whole_job(item: str) -> str:
    return "job: extension\nconfig:\n  name: other\n  process:\n    - type: sd_trainer\n      x: 1\n" + item


SECTION_FILES = {
    "bare": SECTION,
    "bare, with marks": "%YAML 1.1\n---\n" + SECTION + "...\n",
    "bare, without newline": SECTION.rstrip("\n"),
    "bare, indented": "".join(f"   {s}" if s.strip() else s for s in SECTION.splitlines(True)),
    "list": "# My weights, from March.\n#   second line\n"
    + "- type"
    + SECTION.split("\ntype")[1].replace("\n", "\n  ").replace("\n  \n", "\n\n").rstrip(" "),
    "job": whole_job(ATTACHED) + "# about the other\nmeta: 1\n",
    "job, deeper": whole_job(
        "    # My weights, from March.\n    #   second line\n"
        + ATTACHED.replace("      # My weights, from March.\n      #   second line\n", "")
    ),
}


@pytest.mark.parametrize("name", SECTION_FILES)
def test_forms_of_a_sections_file(files, name):
    put(files, SECTION_FILES[name], "other.yaml")
    assert done(files, CONFIG + META, section="other.yaml") == CONFIG + ATTACHED + META


STEPS = "steps: [{name: a, loras: [{lora: me.safetensors, ratio: 1}]}]"
FLAT = {
    "braces": f"{{type: zit_merge, device: cpu, shapes: free, output_dir: 'out', # where\n {STEPS}}}  # end\n",
    "list in brackets": f"[{{type: zit_merge, shapes: free, output_dir: o, {STEPS}}}]",
    "json in yaml": json.dumps(yaml.safe_load(f"{{type: zit_merge, shapes: free, output_dir: o, {STEPS}}}"), indent=2),
    "steps first": "# head\nsteps:\n- name: a\n  loras:\n  - lora: me.safetensors\n    ratio: 1\n"
    "type: zit_merge\nshapes: free\noutput_dir: o\n",
}


@pytest.mark.parametrize("name", FLAT)
def test_other_layouts_of_a_section(files, name):
    put(files, FLAT[name], "other.yaml")
    new = done(files, CONFIG + META, section="other.yaml")
    assert new.startswith(CONFIG + "    - ") and new.endswith("\n" + META)
    for comment in ("# where", "# end", "# head"):
        assert (comment in new) == (comment in FLAT[name])


def test_a_section_in_json_becomes_readable_yaml(files):
    data = ours()
    data["steps"][0] |= {"name": "1e3", "copy_to": str(files.folder / "größe")}
    (files.folder / "größe").mkdir()
    put(files, json.dumps(data), "section.json")
    new = done(files, CONFIG + META, section="section.json")
    assert new.startswith(CONFIG + "    - type: zit_merge\n      device: cpu\n") and new.endswith("\n" + META)
    assert "größe" in new and "'1e3'" in new
    put(files, json.dumps([data]), "section.json")
    assert done(files, CONFIG + META, section="section.json") == new
    put(files, json.dumps({"config": {"process": [{"type": "other"}, data]}}), "section.json")
    assert done(files, CONFIG + META, section="section.json") == new


def test_a_recipe_is_a_section(files):
    attach(config := put(files, CONFIG.replace("sd_trainer", "other")), files.folder / "section.yaml")
    assert files.zit("run", config).ok()
    recipe = files.zit("recipe", "out/cat/merged_cat_soft.safetensors").ok()
    put(
        files, recipe.replace("type: zit_merge\n", "type: zit_merge\noutput_dir: out\nshapes: free\ndevice: cpu\n"), "recipe.yaml"
    )
    done(files, CONFIG.replace("sd_trainer", "other"), section="recipe.yaml")
    (config.parent / "me.safetensors").rename(config.parent / "them.safetensors")
    assert "no file with the tensors of me.safetensors" in refused(files, CONFIG, "recipe.yaml")


def test_a_recipe_whose_names_the_toolkit_would_fill_in(files):
    lora = {"lora": "[name].safetensors", "ratio": 1.0, "sha256": "0" * 64}
    recipe = {"type": "zit_merge", "made_by": "zit_merge 1", "steps": [{"name": "a", "loras": [lora]}]}
    put(files, to_yaml(recipe), "recipe.yaml")
    assert "[name]" in refused(files, CONFIG, "recipe.yaml")


def test_blocks_of_text_in_a_section_survive_the_move(files):
    text = "trigger_word: |2-\n    two more\n  \n     \n  last\nname: >-\n  folded\n  text\n\n  more\nmodel: |\n  # no comment\n"
    put(files, SECTION.replace("steps:", text + "steps:"), "section.yaml")
    done(files, CONFIG + META)
    section = load_job(files.folder / "config.yaml").sections()[0][1]
    assert section.trigger_word == "  two more\n\n   \nlast"
    assert (section.name, section.model) == ("folded text\nmore", "# no comment\n")


def test_anchors_within_the_section(files):
    put(files, SECTION.replace("ratio: 0.9", "ratio: &r 0.9, blocks: {to_q: *r}"), "section.yaml")
    assert "*r" in done(files, CONFIG + META)


def test_an_alias_to_something_outside_of_the_section(files):
    job = "x: &r 0.9\n" + whole_job(ATTACHED.replace("0.9", "*r"))
    put(files, job, "section.yaml")
    line = job[: job.index("*r")].count("\n") + 1
    message = refused(files, CONFIG)
    assert "*r is defined outside of the section" in message and f"line {line}" in message
    put(files, "base: &b\n" + "".join(f"  {s}" for s in SECTION.splitlines(True)) + whole_job("    - *b\n"), "section.yaml")
    assert "*b is defined outside" in refused(files, CONFIG)
    done(files, json.dumps(JOB), "config.json")  # JSON gets the values


def test_an_anchor_that_both_files_have(files):
    put(files, SECTION.replace("ratio: 0.9", "ratio: &r 0.9"), "section.yaml")
    config = CONFIG.replace("linear: 2", "linear: &r 2")
    assert "&r" in refused(files, config)
    done(files, CONFIG + ATTACHED.replace("0.9", "&r 0.5") + META, replace=True)  # it goes with the old section


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
def test_replace_wherever_it_stands(files, rest):
    head, mine = CONFIG, OLD.splitlines(True)[0]
    assert done(files, head + OLD + rest, replace=True) == head + mine + ATTACHED + rest


def test_replace_the_first(files):
    head = "job: extension\nconfig:\n  name: cat\n  process:\n"
    assert done(files, head + OLD + LATER, replace=True) == head + OLD.splitlines(True)[0] + ATTACHED + LATER


def test_replace_the_last_line_of_the_file(files):
    assert done(files, (CONFIG + OLD).rstrip("\n"), replace=True) == (CONFIG + "    # mine stays\n" + ATTACHED).rstrip("\n")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_replace_in_json(files, layout, at):
    processes: list[Any] = [{"type": "a"}, {"type": "b", "x": [1, 2]}]
    old, new = ([*processes[:at], s, *processes[at:]] for s in ({"type": "zit_merge", "steps": []}, ours()))
    texts = [json.dumps({"job": "extension", "config": {"name": "cat", "process": p}}, **LAYOUTS[layout]) for p in (old, new)]
    assert done(files, texts[0], "config.json", replace=True) == texts[1]


def test_replace_in_brackets(files):
    config = "job: extension\nconfig: {name: cat, process: [{type: a}, {type: zit_merge, steps: []}, {type: b}]}  # c\n"
    new = done(files, config, replace=True)
    assert new.startswith(config[: config.index("{type: zit")]) and new.endswith(", {type: b}]}  # c\n")


def test_replace_appends_where_there_is_none_and_says_so(files):
    assert done(files, CONFIG + META, replace=True) == CONFIG + ATTACHED + META
    result = attach(put(files, CONFIG), files.folder / "section.yaml", replace=True)
    assert not result.replaced and "appended as process[1]" in result.text()


def test_a_section_that_is_there_already(files):
    message = refused(files, CONFIG + OLD)
    assert "process[1]" in message and "--replace" in message


def test_several_sections_are_named(files):
    message = refused(files, CONFIG + OLD + LATER + OLD, replace=True)
    assert "process[1] and process[3]" in message


def test_a_config_is_its_own_section(files):
    config = put(files, CONFIG + "    # heading\n" + ATTACHED + META)
    result = attach(config, config, replace=True)
    assert result.backup is None and "nothing was changed" in result.text()
    assert list(files.folder.glob("*.bak*")) == []


BAD_CONFIGS = {
    "empty": ("", "neither"),
    "a list": ("- a\n- b\n", "neither"),
    "text": ("hello", "neither"),
    "a number": ("3", "neither"),
    "broken": ("a: [1", "line 1"),
    "not text": (b"\xff\x00\x81", "not a text file"),
    "another kind": (CONFIG.replace("extension", "train"), "job: extension"),
    "no job": (CONFIG.replace("job: extension\n", ""), "job: extension"),
    "config is no mapping": ("job: extension\nconfig: [1]\n", "neither"),
    "no name": (CONFIG.replace("  name:", "  title:"), "config.name"),
    "no process": ("job: extension\nconfig:\n  name: cat\n", "config.process must be a list"),
    "process is null": ("job: extension\nconfig:\n  name: cat\n  process:\n", "config.process must be a list"),
    "process is a mapping": ("job: extension\nconfig:\n  name: cat\n  process: {type: a}\n", "config.process must be a list"),
    "a key twice": (CONFIG + "job: extension\n", "twice"),
    "a recipe": (SECTION, "is a zit_merge section, not an AI-Toolkit job"),
    "two documents": (CONFIG + "---\na: 1\n", "line"),
    "an alias": ("p: &p [{type: a}]\njob: extension\nconfig:\n  name: cat\n  process: *p\n", "write the list out"),
    "a merge key": ("c: &c {name: cat, process: [{type: a}]}\njob: extension\nconfig:\n  <<: *c\n", "write the list out"),
    "deep": ("[" * 5000, "nested too deeply"),
    "within itself": ("job: extension\nconfig: &c\n  name: cat\n  process: [*c]\n", "nested too deeply"),
    "a block without newline": (CONFIG + "      text: |\n        abc", "newline"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
@pytest.mark.parametrize("replace", [False, True])
def test_a_wrong_config_is_refused_in_a_sentence(files, name, replace):
    text, says = BAD_CONFIGS[name]
    assert says in refused(files, put(files, text), replace=replace)


BAD_JSON = {
    "yaml": (CONFIG, "not valid JSON"),
    "cut": (json.dumps(JOB)[:-1], "not valid JSON"),
    "list": ("[]", "neither"),
    "another kind": (json.dumps(JOB | {"job": "train"}), "job: extension"),
    "process": ('{"job": "extension", "config": {"name": "cat", "process": {}}}', "must be a list"),
    "deep": ("[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_wrong_json_is_refused_in_a_sentence(files, name):
    text, says = BAD_JSON[name]
    assert says in refused(files, put(files, text, "config.json"))


BAD_SECTIONS = {
    "empty": ("", "is not one zit_merge section"),
    "text": ("hello", "is not one zit_merge section"),
    "no type": (SECTION.replace("type: zit_merge", "kind: zit_merge"), "is not one zit_merge section"),
    "another process": ("type: sd_trainer\n", "is not one zit_merge section"),
    "a job without one": (CONFIG, "is not one zit_merge section"),
    "a list of two": ("- type: zit_merge\n- type: other\n", "is not one zit_merge section"),
    "two": ("- type: zit_merge\n- type: zit_merge\n", "process[0] and process[1]"),
    "a job with two": (whole_job(ATTACHED + ATTACHED), "process[1] and process[2]"),
    "broken": ("a: [1", "line 1"),
    "not text": (b"\xff\x00\x81", "not a text file"),
    "an unknown key": (SECTION.replace("ratio", "ration"), "section.yaml: steps[0].loras[0].ration"),
    "no steps": ("type: zit_merge\n", "section.yaml: steps: is missing"),
    "a key twice": (SECTION + "device: cpu\n", "twice"),
    "a missing LoRA": (SECTION.replace("me.safe", "you.safe"), "you.safetensors is not there"),
    "a broken weight": (SECTION.replace("0-9:", "0-99:"), "0-99"),
    "no such variable": (SECTION.replace("me.safe", "${ZIT_NOT_SET}.safe"), "ZIT_NOT_SET"),
    "a later setting": (SECTION + "bake: true\n", "not available yet"),
    "a wrong device": (SECTION.replace("device: cpu", "device: cuda:99"), "cuda:99"),
    "deep": ("[" * 5000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_SECTIONS)
def test_a_wrong_section_is_refused_in_a_sentence(files, name):
    text, says = BAD_SECTIONS[name]
    put(files, text, "section.yaml")
    assert says in refused(files, CONFIG + META)


@pytest.mark.parametrize("which", ["config.yaml", "section.yaml"])
def test_files_that_are_not_there_and_folders(files, which):
    put(files, CONFIG)
    (files.folder / which).unlink()
    config = files.folder / "config.yaml"
    assert f"{which}: can't be read" in refused(files, config)
    (files.folder / which).mkdir()
    assert f"{which}: can't be read" in refused(files, config)


def test_relative_paths_start_at_the_config(files):
    """Not at the section's file."""
    (files.folder / "sub").mkdir()
    (files.folder / "me.safetensors").rename(files.folder / "sub" / "me.safetensors")
    assert "is not there" in refused(files, CONFIG)
    done(Workspace(files.folder / "sub", lambda: ("", "")), CONFIG, section="../section.yaml")


def test_the_training_is_looked_at(files):
    put(files, SECTION.replace("me.safetensors", "trained@7"), "section.yaml")
    assert "step 7" in refused(files, CONFIG)
    put(files, SECTION.replace("me.safetensors", "trained"), "section.yaml")
    done(files, CONFIG)


def test_a_value_that_json_has_not(files):
    put(files, SECTION + "train: 2024-01-01\n", "section.yaml")
    assert "JSON does not know" in refused(files, put(files, json.dumps(JOB), "config.json"))
    done(files, CONFIG)


def test_a_variable_without_quotes_in_a_section_for_json(files, monkeypatch):
    monkeypatch.setenv("ZIT_RATIO", "0.25")
    put(files, SECTION.replace("0.9", "${ZIT_RATIO}"), "section.yaml")
    assert "environment variables" in refused(files, put(files, json.dumps(JOB), "config.json"))
    put(files, json.dumps(ours()).replace("0.9", "${ZIT_RATIO}"), "section.json")
    assert "write its value out" in refused(files, CONFIG, "section.json")


def test_a_variable_in_a_section_for_json_stays_text(files, monkeypatch):
    monkeypatch.setenv("ZIT_NAME", "me")
    put(files, SECTION.replace("me.safe", "${ZIT_NAME}.safe"), "section.yaml")
    assert '"${ZIT_NAME}.safetensors"' in done(files, json.dumps(JOB), "config.json")


def test_a_config_in_the_folder_of_the_training_would_be_taken_for_a_checkpoint(files, monkeypatch):
    (files.folder / "output" / "cat").mkdir(parents=True)
    put(files, SECTION.replace("me.safetensors", "trained"), "section.yaml")
    assert "checkpoint" in refused(files, put(files, CONFIG, "output/cat/cat.yaml"))
    attach(put(files, CONFIG, "output/cat/config.yaml"), files.folder / "section.yaml")


def test_backups_are_numbered(files):
    config, texts = put(files, CONFIG), []
    for ratio in (0.1, 0.2, 0.3):
        texts.append(config.read_bytes())
        put(files, SECTION.replace("0.9", str(ratio)), "section.yaml")
        attach(config, files.folder / "section.yaml", replace=True)
    assert [(files.folder / f"config.yaml.{n}").read_bytes() for n in ("bak", "bak1", "bak2")] == texts


def test_a_backup_takes_no_name_that_is_used(files):
    put(files, "mine", "config.yaml.bak")
    (files.folder / "config.yaml.bak1").mkdir()
    result = attach(put(files, CONFIG), files.folder / "section.yaml")
    assert result.backup == files.folder / "config.yaml.bak2"
    assert (files.folder / "config.yaml.bak").read_text() == "mine"


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
    put(files, CONFIG)
    (files.folder / "sub").mkdir()
    config = put(files, CONFIG, "sub/config.yaml")
    protected = config if what == "file" else config.parent
    protected.chmod(0o555)
    try:
        assert "can't be written" in refused(files, config)
    finally:
        protected.chmod(0o755)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "no"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["fsync", "replace", "chmod"])
def test_a_write_that_fails_changes_nothing(files, monkeypatch, where, error):
    config = put(files, CONFIG)

    def fail(*words: object, **keys: object) -> None:
        raise error

    if where == "chmod":
        monkeypatch.setattr(module, "_copy_owner", fail)
    else:
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ZitMergeError):
        attach(config, files.folder / "section.yaml")
    assert config.read_text() == CONFIG
    assert sorted(p.name for p in files.folder.iterdir()) == ["config.yaml", "me.safetensors", "section.yaml"]


def test_a_failure_after_the_change_keeps_the_backup(files, monkeypatch):
    config = put(files, CONFIG)
    publish = module.publish_file

    def late(*words: Any) -> None:
        publish(*words)
        raise OSError(5, "late")

    monkeypatch.setattr(module, "publish_file", late)
    with pytest.raises(ZitMergeError):
        attach(config, files.folder / "section.yaml")
    assert config.read_text() == CONFIG + ATTACHED
    assert (files.folder / "config.yaml.bak").read_text() == CONFIG


def test_a_change_by_another_program_is_not_overwritten(files, monkeypatch):
    config = put(files, CONFIG)
    check = module._check_plan

    def meanwhile(*words: Any) -> None:
        check(*words)
        put(files, CONFIG + META)

    monkeypatch.setattr(module, "_check_plan", meanwhile)
    with pytest.raises(ZitMergeError, match="changed by another program"):
        attach(config, files.folder / "section.yaml")
    assert config.read_text() == CONFIG + META
    assert sorted(p.name for p in files.folder.iterdir()) == ["config.yaml", "me.safetensors", "section.yaml"]


def test_a_training_that_check_would_refuse(files):
    text = CONFIG.replace("      sample:", "      train: {steps: 9, lr_scheduler: step}\n      sample:")
    assert refused(files, text).startswith("process[0].train.lr_scheduler: AI-Toolkit can't make step")


def test_what_a_killed_run_left_is_no_obstacle(files):
    put(files, "half", "config.yaml.zit_merge.part")
    attach(put(files, CONFIG), files.folder / "section.yaml")
    assert sorted(p.name for p in files.folder.glob("config*")) == ["config.yaml", "config.yaml.bak"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: f"{p.parent.parent.parent.name}-{p.stem}")
@pytest.mark.parametrize("eol", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_every_example(files, path, eol):
    """Ours, and AI-Toolkit's where it is at hand."""
    text = path.read_text(encoding="utf-8").replace("\n", eol)
    try:
        job = yaml.safe_load(text)["job"]
    except yaml.YAMLError:  # AI-Toolkit's example for OmniGen2 lacks a quotation mark
        assert "line 65" in refused(files, text)
        return
    if job != "extension":
        assert "job: extension" in refused(files, text)
        return
    has_one = "- type: zit_merge" in text
    if has_one:
        assert "--replace" in refused(files, text)
    put(files, SECTION.replace("me.safetensors", str(files.folder / "me.safetensors")), "section.yaml")
    if "\n        arch:" in text and "arch: zimage" not in text.replace('"', ""):
        assert "is not Z-Image" in refused(files, text, replace=True)
        text = re.sub(r"(\n {8}arch:) \S+", r"\1 zimage", text)
    new = done(files, text, replace=True)
    wanted = ATTACHED.replace("me.safetensors", str(files.folder / "me.safetensors"))
    added = inserted(text, new) if not has_one else ""
    assert has_one or sorted(added) == sorted((wanted if "\n    - type" in text else _dedented(wanted)).replace("\n", eol))
    assert new.count("type: zit_merge") == text.count("type: zit_merge") + (not has_one)
    assert new.startswith(text[: text.index("- type:")])
    assert "meta:" not in text or new.endswith(text[text.index("\nmeta:") :])


def _dedented(text: str) -> str:
    return "".join(line[2:] if line.startswith("  ") else line for line in text.splitlines(True))


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.stem)
def test_our_examples_as_sections(files, path):
    """Each has one section, which is taken with its comments."""
    text = path.read_text(encoding="utf-8").replace("/path/to/loras/", f"{files.folder}/")
    put(files, text, "other.yaml")
    source = module._read_source(files.folder / "other.yaml")
    lines = textedit._block_lines(source, 0, [])
    again = yaml.safe_load("\n".join(lines))[0]
    assert repr(again) == repr(dict(source.data))
    last = text[text.index("\n      steps:") + 1 :].split("\nmeta:")[0].rstrip("\n").split("\n")
    assert [line.strip() for line in lines[-len(last) :]] == [line.strip() for line in last]


WORDS = st.text("ab c#:-'\"|>ä\n", max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)
PROCESS = st.dictionaries(st.text("pqr", min_size=1, max_size=2), VALUES, max_size=3).map(lambda d: {"type": "other"} | d)


class Indented(yaml.SafeDumper):
    """Lists indented within their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """As people write it."""
        super().increase_indent(flow, False)


@pytest.fixture(scope="module")
def shared_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    return Workspace(folder, lambda: ("", "")).lora("me.safetensors")


@settings(max_examples=80, deadline=None)
@given(
    processes=st.lists(PROCESS, min_size=1, max_size=3),
    dumper=st.sampled_from([yaml.SafeDumper, Indented]),
    flow=st.sampled_from([False, False, None, True]),
    style=st.sampled_from([None, None, '"', "'", "|", ">"]),
    indent=st.sampled_from([2, 3, 4]),
    eol=st.sampled_from(["\n", "\r\n"]),
    end=st.booleans(),
    meta=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_yaml(shared_lora, processes, dumper, flow, style, indent, eol, end, meta, seed):
    """Comments are strewn in where they mean nothing; all of the old text is there afterwards, and replace finds it again."""
    job = {"job": "extension", "config": {"name": "cat", "process": processes}} | ({"meta": {"a": 1}} if meta else {})
    text = yaml.dump(
        job, Dumper=dumper, default_flow_style=flow, default_style=style, indent=indent, sort_keys=False, line_break=eol
    )
    text = _with_comments(text, random.Random(seed), eol)
    text = text if end else text.rstrip("\r\n")
    with tempfile.TemporaryDirectory() as folder:
        config, section = Path(folder) / "config.yaml", Path(folder) / "section.yaml"
        config.write_bytes(text.encode())
        section.write_text(SECTION.replace("me.safetensors", str(shared_lora)), encoding="utf-8")
        try:
            result = attach(config, section)
        except ZitMergeError as e:
            assert "newline" in str(e) and not end  # a block of text at the very end
            assert config.read_bytes() == text.encode()
            return
        new = config.read_bytes().decode()
        rest = iter(new)
        assert all(c in rest for c in text)
        assert result.place == f"process[{len(processes)}]"
        assert load_job(config).processes[:-1] == load_job(result.backup.rename(Path(folder) / "old.yaml")).processes
        assert attach(config, section, replace=True).backup is None
        section.write_text(SECTION.replace("me.safetensors", str(shared_lora)).replace("0.9", "0.75"), encoding="utf-8")
        attach(config, section, replace=True)
        assert config.read_bytes().decode() == new.replace("0.9", "0.75")


@settings(max_examples=80, deadline=None)
@given(
    value=VALUES,
    flow=st.sampled_from([False, None, True]),
    style=st.sampled_from([None, '"', "'", "|", ">"]),
    form=st.sampled_from(["bare", "list", "job", "json"]),
    name=st.sampled_from(["config.yaml", "flow.yaml", "config.json"]),
    eol=st.sampled_from(["\n", "\r\n"]),
)
def test_any_section(shared_lora, value, flow, style, form, name, eol):
    """What a section holds arrives, from any form in any other."""
    lora = {"lora": str(shared_lora), "ratio": 0.5, "layers": {"0-9": [0.5, 1.0]}}
    data = {"type": "zit_merge", "shapes": "free", "model": value, "steps": [{"name": "a", "loras": [lora]}], "output_dir": "o"}
    document = {"bare": data, "list": [data], "job": {"config": {"process": [{"type": "x"}, data]}}, "json": data}[form]
    job = {"job": "extension", "config": {"name": "cat", "process": [{"type": "other"}]}, "meta": {"a": "b"}}
    with tempfile.TemporaryDirectory() as folder:
        config, section = Path(folder) / name, Path(folder) / ("s.json" if form == "json" else "s.yaml")
        plain = {"default_flow_style": flow, "default_style": None, "sort_keys": False, "line_break": eol}
        dumped = yaml.safe_dump(document, **plain) if style is None else _styled(document, style, plain)
        section.write_bytes((json.dumps(document) if form == "json" else dumped).encode())
        old = yaml.safe_dump(job, default_flow_style=name == "flow.yaml", sort_keys=False) if "yaml" in name else json.dumps(job)
        config.write_text(old, encoding="utf-8")
        attach(config, section)
        assert repr(load_job(config).processes[1]) == repr(data)
        assert inserted(old, config.read_text(encoding="utf-8"))
        assert attach(config, section, replace=True).backup is None


def _styled(document: Any, style: str, keys: dict[str, Any]) -> str:
    """Strings with line breaks in a style of their own."""

    class Styled(yaml.SafeDumper):
        pass

    def string(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style if "\n" in text else None)

    Styled.add_representer(str, string)
    return yaml.dump(document, Dumper=Styled, **keys)


def _with_comments(text: str, chance: random.Random, eol: str) -> str:
    """Comment lines before lines that begin a key or an item, if that changes no value."""
    lines = text.split(eol)
    wanted = yaml.safe_load(text)
    for _ in range(3):
        at = chance.randrange(len(lines))
        more = [*lines[:at], " " * chance.randrange(8) + "# comment: [", *lines[at:]]
        try:
            if yaml.safe_load(eol.join(more)) == wanted:
                lines = more
        except (yaml.YAMLError, ValueError, KeyError):  # a comment within a tagged value
            continue
    return eol.join(lines)


@settings(max_examples=60, deadline=None)
@given(
    processes=st.lists(PROCESS, max_size=3),
    layout=st.sampled_from(sorted(LAYOUTS)),
    ascii_only=st.booleans(),
    name=st.sampled_from(["config.json", "config.yaml"]),
)
def test_any_json(shared_lora, processes, layout, ascii_only, name):
    """The file is what the same program would have written."""
    if layout == "tabs":
        name = "config.json"  # tabs are no YAML
    job = {"job": "extension", "config": {"process": processes, "name": "cat"}}
    keys = LAYOUTS[layout] | {"ensure_ascii": ascii_only}
    with tempfile.TemporaryDirectory() as folder:
        config, section = Path(folder) / name, Path(folder) / "section.json"
        data = ours() | {"trigger_word": "x"}
        data["steps"][0]["loras"][0]["lora"] = str(shared_lora)
        section.write_text(json.dumps(data), encoding="utf-8")
        config.write_text(json.dumps(job, **keys), encoding="utf-8")
        attach(config, section)
        job["config"]["process"].append(data)
        assert config.read_text(encoding="utf-8") == json.dumps(job, **keys)


def test_the_command(files):
    config = put(files, CONFIG + META)
    text = files.zit("attach", "config.yaml", "--section", "section.yaml").ok()
    assert text == "config.yaml: the section is appended as process[1]; the file as it was is config.yaml.bak\n"
    assert config.read_text() == CONFIG + ATTACHED + META
    assert "process[1] is a zit_merge section already" in files.zit("attach", config, "--section", "section.yaml").refused()
    assert "already" in files.zit("attach", config, "--section", "section.yaml", "--replace").ok()
    put(files, SECTION.replace("0.9", "0.8"), "section.yaml")
    text = files.zit("attach", "config.yaml", "--section", "section.yaml", "--replace").ok()
    assert "replaced as process[1]" in text and "config.yaml.bak1" in text
    assert files.zit("attach", config, "--section", "section.yaml", "--replace", "--quiet").ok() == ""


def test_what_was_attached_runs(files):
    config = put(files, CONFIG.replace("sd_trainer", "other").replace("training_folder: output", "x: 1"))
    files.zit("attach", config, "--section", "section.yaml", "--quiet").ok()
    files.zit("check", config).ok()
    assert "wrote " in files.zit("run", config).ok()
    assert (files.folder / "out/cat/merged_cat_soft.safetensors").exists()


@pytest.mark.parametrize("words", [[], ["config.yaml"], ["--section", "section.yaml"]], ids=" ".join)
def test_a_missing_word_is_usage(files, words):
    ran = files.zit("attach", *words)
    assert ran.code == 2 and "usage: " in ran.err


def test_the_answer_is_a_line():
    told = Attached(Path("c.yaml"), "process[1]", True, Path("c.yaml.bak")).text()
    assert told == "c.yaml: the section is replaced as process[1]; the file as it was is c.yaml.bak"

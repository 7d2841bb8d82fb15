"""Texts of others and of odd editors: what they say is shown, obeyed as far as it is a setting, and never more."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracles.dense import read_metadata
from safetensors.torch import load_file, save_file
from screen import fits, steers
from workspace import FEW, Workspace

from extensions_built_in.zit_merge.cli.main import main
from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.config.recipe import only_recipe
from extensions_built_in.zit_merge.errors import SettingError, ZitMergeError
from extensions_built_in.zit_merge.files.extent import read_json
from extensions_built_in.zit_merge.files.paths import without_users

ROOT = Path(__file__).parents[2]
ME = {"lora": "me.safetensors", "ratio": 1.0}
STEP = {"name": "a", "loras": [ME]}
CHINESE = "\u89d2\u8272\u5c0f\u7ea2"
STEERING = "\x1b[2J\x1b]0;x\x07\r\b\x7f\x85\x9b\u2028\u202egpj\u2066\u200b"
pytestmark = pytest.mark.usefixtures("few")


def with_metadata(path: Path, **values: str) -> Path:
    save_file(load_file(path), path, read_metadata(path) | values)
    return path


# --- a recipe is nothing but a recipe ------------------------------------------------------------------------------------------

SPY = "import pathlib\npathlib.Path('imported').touch()\n\n\ndef far(picture, reference):\n    return 0.0\n"
FOREIGN: Mapping[str, Any] = {
    "output_dir": "elsewhere",
    "device": "cpu",
    "preview": {"prompts": "/etc/passwd"},
    "train_fixes": ["cosine_with_restarts"],
    "steps[0].copy_to": "elsewhere",
    "steps[0].ablate": {"by": "layers", "metrics": ["spy:far"]},
    "steps[0].save.path": "elsewhere",
    "steps[0].loras[0].preset": "mine.yaml",
    "steps[0].loras[0].\x1b[31m": 1,
}


def planted(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with keys that are none of a recipe."""
    for place, value in FOREIGN.items():
        *owners, key = re.split(r"\.(?!\[)", place)
        table = recipe
        for owner in owners:
            name, _, index = owner.partition("[")
            table = table[name][int(index[:-1])] if index else table[name]
        table[key] = value
    return recipe


def made(work: Workspace) -> Path:
    work.zit("run", work.job(STEP)).ok()
    return work.out / "merged_cat_a.safetensors"


def test_recipe_prints_a_recipe_and_nothing_else(work, loras):
    path = made(work)
    wanted = work.zit("recipe", path).ok()
    hostile = planted(json.loads(read_metadata(path)["zit_merge.recipe"]))
    with_metadata(path, **{"zit_merge.recipe": json.dumps(hostile)})
    ran = work.zit("recipe", path)
    assert (ran.code, ran.out) == (0, wanted)
    assert ran.err.startswith("zit_merge: left out, no recipe has these keys: ") and fits(ran.err, 10**4)
    assert all(place in ran.err for place in FOREIGN if "\x1b" not in place)
    assert work.again(work.write(ran.out, "recipe.yaml"), "--loras", work.folder).is_file()


@pytest.mark.parametrize("place", FOREIGN)
@pytest.mark.parametrize("command", ["run", "check", "preview", "attach"])
def test_a_recipe_with_other_keys_is_refused(work, loras, place, command):
    (work.folder / "spy.py").write_text(SPY)
    recipe = json.loads(read_metadata(made(work))["zit_merge.recipe"])
    hostile = planted(recipe)
    for other in set(FOREIGN) - {place}:
        hostile = {**hostile, "steps": hostile["steps"]}
        drop(hostile, other)
    path = work.write(hostile, "recipe.yaml")
    words = [work.job(STEP), "--section", path, "--replace"] if command == "attach" else [path]
    message = work.zit(command, *words, *(["--output-dir", "again"] if command != "attach" else [])).refused()
    assert place.replace("\x1b", "\\x1b") + ": no recipe has this key" in message
    assert not (work.folder / "imported").exists() and not (work.folder / "again").exists()


def drop(recipe: dict[str, Any], place: str) -> None:
    *owners, key = re.split(r"\.(?!\[)", place)
    table: Any = recipe
    for owner in owners:
        name, _, index = owner.partition("[")
        table = table[name][int(index[:-1])] if index else table[name]
    del table[key]


def test_a_recipe_in_a_file_that_is_none(work, loras):
    for recipe in (
        "[]",
        "7",
        '"x"',
        "{}",
        '{"type": 1, "steps": "x", "made_by": {"a": 1}}',
        '{"made_by": "me", "steps": [[], 3]}',
    ):
        path = with_metadata(work.lora("x.safetensors"), **{"zit_merge.recipe": recipe})
        ran = work.zit("recipe", path)
        assert "Traceback" not in ran.err
        if ran.code == 0:
            printed = yaml.safe_load(ran.out)
            assert printed["type"] == "zit_merge" and str(printed["made_by"]).startswith("zit_merge")
            work.zit("run", work.write(ran.out, "r.yaml"), "--output-dir", "o").refused()


def test_a_printed_recipe_fills_no_variable_in(work, loras, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    recipe = {
        "made_by": "me",
        "job": "x",
        "steps": [{"name": "a", "loras": [{"lora": "${SECRET_TOKEN}.safetensors", "ratio": 1}]}],
    }
    path = with_metadata(loras[0], **{"zit_merge.recipe": json.dumps(recipe)})
    message = work.zit("run", work.write(work.zit("recipe", path).ok(), "r.yaml"), "--output-dir", "o").refused()
    assert "${SECRET_TOKEN}.safetensors is not there" in message


def test_what_we_write_are_recipe_keys_only():
    frozen = json.loads((ROOT / "tests" / "frozen" / "files.json").read_text(encoding="utf-8"))
    recipes = [*recipes_in(frozen)]
    assert len(recipes) > 20
    for recipe in recipes:
        assert only_recipe(recipe) == (recipe, [])


def recipes_in(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "zit_merge.recipe" in value:
            recipe = value["zit_merge.recipe"]
            yield recipe | {"made_by": "zit_merge 1.0"}
        for entry in value.values():
            yield from recipes_in(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from recipes_in(entry)


# --- no end ---------------------------------------------------------------------------------------------------------------------

CHAIN = [f"  {chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(12)]
MERGED = [f"  {chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join([f'*{chr(97 + n)}'] * 10)}], k{n}: 1}}\n" for n in range(12)]
ENDLESS = {
    "laughs": ("x:\n  a: &a [1, 2, 3]\n" + "".join(CHAIN), "aliases"),
    "merge keys": ("x:\n  a: &a {y: 1}\n" + "".join(MERGED), "aliases"),
    "a list in itself": ("x: &a [*a]\n", "contains itself"),
    "a mapping in itself": ("x: &a {b: *a}\n", "contains itself"),
    "800 levels": ("x: " + "[" * 800 + "]" * 800 + "\n", "nested too deeply"),
    "100 levels": ("x: " + "[" * 100 + "]" * 100 + "\n", "nested too deeply"),
    "100 levels of blocks": ("x:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 101)), "nested too deeply"),
}
STEPS = "steps: [{name: a, loras: [{lora: me.safetensors, ratio: 1}]}]\n"
HOST = f"job: extension\nconfig:\n  name: cat\n  process:\n  - type: zit_merge\n    {STEPS}"


@pytest.mark.parametrize(("text", "says"), ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *(("run", kind) for kind in ("job", "section", "recipe", "preset")),
        *(("attach", kind) for kind in ("job", "section", "preset")),
        ("check", "job"),
        ("preview", "job"),
    ],
)
def test_a_yaml_without_end_is_a_sentence(work, loras, command, text, says, kind):
    section = f"type: zit_merge\n{STEPS}"
    whole = {"job": HOST, "section": section, "recipe": section + "made_by: zit_merge 1\n", "preset": "mine: {}\n"}[kind] + text
    path = work.write(whole, "hostile.yaml")
    if kind == "preset":
        path = work.job({"name": "a", "loras": [ME | {"preset": "hostile.yaml"}]})
    words = [work.write(HOST, "own.yaml"), "--section", path, "--replace"] if command == "attach" else [path]
    message = work.zit(command, *words).refused()
    assert "hostile.yaml" in message and says in message


@pytest.mark.parametrize("levels", [100, 800, 100_000])
def test_a_json_without_end_is_a_sentence(work, levels):
    text = '{"job": "extension", "config": {"name": "cat", "process": ' + "[" * levels + "]" * levels + "}}"
    for command in ("run", "check"):
        assert "config.json: is nested too deeply" in work.zit(command, work.write(text, "config.json")).refused()
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json("[" * levels + "]" * levels)


def test_many_values_without_aliases_and_a_few_aliases_are_fine(work, loras):
    many = "".join(f"  - {{folder: /d/{n}, size: [512, 768]}}\n" for n in range(3000))
    text = HOST.replace(
        "  process:\n", "  process:\n  - {type: other, common: &c {a: [1, 2, 3]}, x: [*c, *c, *c], y: {<<: *c}}\n"
    )
    config = work.write(
        f"meta:\n{many}{text}".replace("type: zit_merge\n", f"type: zit_merge\n    shapes: free\n    output_dir: {work.out}\n")
    )
    work.zit("check", config).ok()


def test_a_section_that_the_toolkit_has_read_may_contain_itself():
    loop: dict[str, Any] = {"type": "zit_merge", "steps": []}
    loop["model"] = {"x": loop}
    with pytest.raises(SettingError, match="contains itself"):
        parse_section(loop)
    laughs: list[Any] = [1]
    for _ in range(40):
        laughs = [laughs] * 10
    with pytest.raises(SettingError, match=r"stand for \d\.\d+e\+40 values"):
        parse_section({"type": "zit_merge", "model": laughs})


DEEP = {levels: '{"a":' * levels + "1" + "}" * levels for levels in (70, 900, 100_000)}
KEYS = [
    "zit_merge.recipe",
    "zit_merge.check",
    "training_info",
    "lora_adapter_metadata",
    "ss_tag_frequency",
    "software",
    "ot_config",
]


@pytest.mark.parametrize("deep", DEEP.values(), ids=map(str, DEEP))
@pytest.mark.parametrize("key", KEYS)
def test_metadata_without_end_are_no_traceback(work, key, deep):
    path = with_metadata(work.lora("me.safetensors"), **{key: deep})
    facts = json.loads(work.zit("inspect", path, "--json").ok())
    assert facts["recipe"] is None and facts["check"] is None
    assert "has no recipe" in work.zit("recipe", path).refused()
    ran = work.zit("run", work.job(STEP))
    assert "gives no number for lora_alpha" in ran.refused() if key == "lora_adapter_metadata" else ran.ok()


@pytest.mark.parametrize("count", ["1e999", "NaN", "1" + "0" * 400, "1" + "0" * 5000, "-1e400", "[]", '"x"'])
def test_counts_of_tags_that_are_no_numbers(work, count):
    path = with_metadata(work.lora("me.safetensors"), ss_tag_frequency=f'{{"a": {{"cat": {count}}}}}')
    work.zit("inspect", path).ok()
    work.zit("run", work.job(STEP)).ok()


# --- what steers a terminal -----------------------------------------------------------------------------------------------------


def test_every_control_character_is_escaped_and_no_letter_is():
    for code in [*range(0x3000), *range(0xD800, 0xE000), *range(0xFE00, 0x10000), *range(0xE0000, 0xE0080)]:
        message = str(ZitMergeError(f"a{chr(code)}b"))
        assert not any(map(steers, message)), hex(code)
    for letter in "\u89d2\u00e9\u05d0\u0627\U0001f600\u0e01\u200d\u3000":
        assert str(ZitMergeError(letter)) == letter


def test_long_words_are_shortened_in_messages_and_paths_are_not():
    assert len(str(ZitMergeError("x" * 10**6))) == 100
    assert len(str(ZitMergeError("x y " * 10**6))) == 2000
    path = "/" + "/".join(["a_folder_of_thirty_letters_here"] * 20) + "/x.safetensors: is gone"
    assert str(ZitMergeError(path)) == path
    assert str(SettingError("is " + "k" * 101, "b" * 101)).count("...") == 2


def says_nothing_else(ran: Any) -> None:
    for text in (ran.out, ran.err):
        assert not any(steers(letter) for letter in text if letter != "\n"), repr(text)
        assert "\x1b" not in text and "\u202e" not in text and "\u200b" not in text


@pytest.mark.parametrize("command", ["inspect", "recipe", "run", "check", "merge", "preview", "attach", "json"])
def test_nothing_steers_the_terminal(work, command):
    """Keys, metadata, trigger words, file names, config keys and values, on stdout and stderr."""
    hostile = STEERING.replace("/", "")
    words = {
        "modelspec.trigger_phrase": hostile,
        "ss_tag_frequency": json.dumps({hostile: {hostile: 1}}),
        "ss_base_model_version": hostile,
        "modelspec.title": hostile,
        "software": json.dumps({"name": hostile, "version": hostile}),
        "zit_merge.version": hostile,
        "zit_merge.recipe": json.dumps({"job": hostile, "steps": [{"name": hostile, "loras": [{"lora": hostile, "ratio": 1}]}]}),
    }
    name = f"a{hostile}.safetensors"

    def keys(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"text_encoder.{hostile}.lora_A.weight"] = torch.ones(1)
        tensors[f"x.{hostile}.{'k' * 500}"] = torch.ones(1)

    path = work.lora(name, change=keys)
    with_metadata(path, **words)
    step = {"name": "a", "loras": [{"lora": name, "ratio": 1.0}], "copy_to": hostile}
    section = work.section(step | {hostile: 1}, **{hostile: hostile})
    commands = {
        "inspect": [["inspect", path], ["inspect", path, path], ["inspect", path, "--sources", path]],
        "json": [["inspect", path, "--json"], ["inspect", path, path, "--json"], ["inspect", path, "--json", "--full-paths"]],
        "recipe": [["recipe", path]],
        "merge": [
            ["merge", path, "-o", f"{hostile}.safetensors", "--ratio", 1, "--shapes", "free"],
            ["merge", path, "-o", f"{hostile}.safetensors", "--ratio", 1, "--shapes", "free", "--allow-unmatched"],
            ["merge", path, "-o", "b.safetensors", "--ratio", hostile],
            ["merge", path, hostile, "-o", hostile, "--ratio", 1, f"--{hostile}"],
        ],
    }
    for config in (
        work.config(section, job=hostile),
        work.config(work.section(step), job=hostile, name="b.yaml"),
        work.job(step | {"copy_to": hostile, "allow_unmatched": True}, name="c.yaml"),
        work.job({"name": "a", "allow_unmatched": True, "loras": step["loras"]}, name="d.yaml"),
        work.write(f"a: {hostile}", "e.yaml"),
        work.write(json.dumps({hostile: 1, "job": hostile}), "f.json"),
        work.folder / f"{hostile}.yaml",
    ):
        for one in ("run", "check", "preview"):
            commands.setdefault(one, []).append([one, config])
        commands.setdefault("attach", []).append(["attach", config, "--section", work.write(section, "s.yaml")])
    for line in commands[command]:
        ran = work.zit(*line)
        assert "Traceback" not in ran.err
        says_nothing_else(ran)
        if command == "json":
            assert json.loads(ran.out)


# --- variables ------------------------------------------------------------------------------------------------------------------

VALUE = "s3cr3t_value"


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", VALUE)


@pytest.mark.parametrize(
    "step",
    [
        {"name": "a", "loras": [ME], "copy_to": "${MY_TOKEN}/x"},
        {"name": "a", "loras": [{"lora": "${MY_TOKEN}/x.safetensors", "ratio": 1}]},
        {"name": "a", "loras": [{"lora": "hf:${MY_TOKEN}", "ratio": 1}]},
        {"name": "a b ${MY_TOKEN}", "loras": [ME]},
        {"name": "a", "loras": [ME | {"${MY_TOKEN}": 1}]},
        {"name": "a", "loras": [ME | {"ratio": "${MY_TOKEN}"}]},
        {"name": "a", "loras": [ME], "method": "${MY_TOKEN}"},
        {"name": "a", "loras": [ME | {"preset": "${MY_TOKEN}.yaml"}]},
        {"name": "a", "loras": [ME], "save": {"dtype": "x${MY_TOKEN}"}},
    ],
    ids=str,
)
def test_messages_show_a_variable_as_it_was_written(work, loras, secret, step):
    message = work.zit("run", work.job(step)).refused()
    assert "MY_TOKEN" in message and VALUE not in message
    assert VALUE not in work.zit("check", work.job(step)).refused()


def test_no_output_says_what_a_variable_says(work, secret):
    work.lora(f"{VALUE}.safetensors")
    (work.folder / VALUE).mkdir()
    loras = [{"lora": "${MY_TOKEN}.safetensors", "ratio": 1}]
    steps = [
        {"name": "a_${MY_TOKEN}", "loras": loras, "copy_to": "${MY_TOKEN}"},
        {"name": "b", "loras": [{"lora": "a_${MY_TOKEN}", "ratio": 1}]},
    ]
    config = work.job(*steps, job="x_${MY_TOKEN}")
    for _ in range(2):
        ran = work.zit("run", config)
        assert VALUE not in ran.ok() and "${MY_TOKEN}" in ran.out
    made = sorted(work.out.glob("*.safetensors"))
    assert [path.name for path in made] == [f"merged_x_{VALUE}_{name}.safetensors" for name in (f"a_{VALUE}", "b")]
    for path in made:
        assert VALUE not in json.dumps(read_metadata(path))
        recipe = work.recipe(path)
        assert "MY_TOKEN" in recipe.read_text() and VALUE not in recipe.read_text()
        assert load_file(work.again(recipe, "--loras", work.folder)).keys() == load_file(path).keys()
    (page,) = work.out.glob("*.html")
    assert VALUE not in page.read_text(encoding="utf-8")


def test_a_variable_of_one_command_hides_nothing_in_the_next(work, loras, monkeypatch):
    monkeypatch.setenv("NAME", "safetensors")
    assert "${NAME}" in work.zit("run", work.job({"name": "a", "loras": [{"lora": "x.${NAME}", "ratio": 1}]})).refused()
    assert "${NAME}" not in work.zit("inspect", "x.safetensors").refused()


# --- names of users -------------------------------------------------------------------------------------------------------------


def test_pages_and_json_hold_no_names_of_users(tmp_path, capsys, monkeypatch):
    home = tmp_path / "home" / "marie"
    (home / "loras").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(home)
    work = Workspace(home, capsys.readouterr)
    work.shapes = FEW
    path = work.lora("loras/me.safetensors")
    config = work.job({"name": "a", "loras": [{"lora": str(path), "ratio": 1.0}], "copy_to": str(home / "loras")})
    work.zit("run", config).ok()
    page = (work.out / "merged_cat.html").read_text(encoding="utf-8")
    assert "marie" not in page and "~/loras/me.safetensors" in page and '"file":"merged_cat_a.safetensors"' in page
    work.zit("inspect", path, "--html", "page.html").ok()
    page = (home / "page.html").read_text(encoding="utf-8")
    assert "marie" not in page and "~/loras/me.safetensors" in page
    for words in ([path], [path, path], [path, "--sources", path]):
        assert "marie" not in work.zit("inspect", *words, "--json").ok()
        told = json.loads(work.zit("inspect", *words, "--json", "--full-paths").ok())
        assert told["paths"] == [str(path)] * (len(words) - ("--sources" in words))
    work.zit("inspect", path, "--html", "full.html", "--full-paths").ok()
    assert str(path) in (home / "full.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "left"),
    [
        ("/home/somebody/loras/x.safetensors", "x.safetensors"),
        ("/mnt/c/Users/somebody/x.safetensors", "x.safetensors"),
        ("C:\\Users\\somebody\\x.safetensors", "x.safetensors"),
        ("D:\\loras\\x.safetensors", "D:\\loras\\x.safetensors"),
        ("/data/loras/x.safetensors", "/data/loras/x.safetensors"),
        ("loras/x.safetensors", "loras/x.safetensors"),
        ("a prompt, /home/x", "a prompt, /home/x"),
    ],
)
def test_what_is_left_of_a_path(path, left):
    assert without_users({"a": [path]}) == {"a": [left]}


# --- text files of odd editors --------------------------------------------------------------------------------------------------


def written(work: Workspace, text: str, encoding: str = "utf-8", name: str = "config.yaml") -> Path:
    (work.folder / name).write_bytes(text.encode(encoding))
    return work.folder / name


def config_text(work: Workspace, **changes: str) -> str:
    lines = {
        "name": "cat",
        "output_dir": "out",
        "step": "a",
        "lora": "me.safetensors",
        "loras": "loras",
        "comment": "",
    } | changes
    return """\
job: extension
config:
  name: {name}  # {comment}
  process:
  - type: zit_merge
    shapes: free
    output_dir: {output_dir}
    steps:
    - name: {step}
      {loras}:
      - lora: {lora}
        ratio: 1.0
""".format(**lines)


def test_the_text_of_these_tests_is_right(work, loras):
    work.zit("check", written(work, config_text(work))).ok()


def test_a_config_in_another_encoding(work, loras):
    text = config_text(work, comment="mod\u00e8le")
    for encoding in ("cp1252", "latin-1", "cp850"):
        assert (
            "config.yaml: is not UTF-8 (line 3): save it as UTF-8" in work.zit("check", written(work, text, encoding)).refused()
        )
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        work.zit("check", written(work, text, encoding)).ok()


@pytest.mark.parametrize("lora", ['"C:\\loras\\style.safetensors"', '"C:\\users\\x.safetensors"', '"D:\\x\\me.safetensors"'])
def test_backslashes_in_double_quotes(work, lora):
    message = work.zit("check", written(work, config_text(work, lora=lora))).refused()
    assert "config.yaml: line 11: in double quotes a backslash needs another one" in message
    assert "single quotes, or forward slashes" in message


@pytest.mark.parametrize("lora", ['"C:\\new\\table.safetensors"', '"C:\\table.safetensors"', '"D:\\art\\running.safetensors"'])
def test_backslashes_that_yaml_reads_as_something_else(work, lora):
    message = work.zit("check", written(work, config_text(work, lora=lora))).refused()
    assert "is how YAML reads a backslash in double quotes" in message and "single quotes" in message


def test_backslashes_in_json(work):
    message = work.zit("check", written(work, '{"job": "C:\\loras"}', name="config.json")).refused()
    assert "line 1 column 12" in message and "a backslash needs another one" in message


@pytest.mark.parametrize("form", ["'\"{}\"'", "'{} '", "' {}'", '"\\u201c{}\\u201d"', "\"'{}'\"", "'\u00a0{}\u3000'"])
@pytest.mark.parametrize("absolute", [True, False])
def test_quotes_and_blanks_around_a_path(work, loras, form, absolute):
    lora = form.format(work.folder / "me.safetensors" if absolute else "me.safetensors")
    work.zit("run", written(work, config_text(work, lora=lora))).ok()
    gone = form.format(work.folder / "gone.safetensors" if absolute else "gone.safetensors")
    message = work.zit("check", written(work, config_text(work, lora=gone))).refused()
    assert "was read without the quotes or blanks around it: " in message and "gone.safetensors is not there" in message


@pytest.mark.parametrize("form", ["'\"{}\"'", "'{} '"])
def test_quotes_and_blanks_around_a_folder(work, loras, form):
    (work.folder / "there").mkdir()
    work.zit("run", written(work, config_text(work, output_dir=form.format("there")))).ok()
    assert (work.folder / "there" / "merged_cat_a.safetensors").is_file()
    message = work.zit("run", written(work, config_text(work, output_dir=form.format("gone")))).refused()
    assert "output_dir: " in message and "without the quotes or blanks around it" in message
    assert not [p for p in work.folder.iterdir() if "gone" in p.name]


def test_a_file_that_has_such_a_name_is_itself(work):
    work.lora(" 'me'.safetensors", rank=2)
    work.lora("me.safetensors", rank=3)
    out = work.zit("run", written(work, config_text(work, lora="\" 'me'.safetensors\""))).ok()
    assert "rank 2" in out and "rank 3" not in out


@pytest.mark.parametrize("blank", ["\u00a0", "\u3000", "\u200b", "\u2003", "\ufeff", "\t"])
def test_blanks_that_are_none(work, loras, blank):
    name = f"(U+{ord(blank):04X})"
    text = config_text(work)
    places = {
        9: text.replace("    - name: a\n", f"    {blank}- name: a\n"),
        10: text.replace("      loras:", f"      {blank}loras:"),
        12: text.replace("        ratio: 1.0", f"{blank * 8}ratio: 1.0"),
        3: text.replace("  name: cat", f"  name:{blank}cat"),
    }
    if blank == "\t":  # behind a key it is a blank to YAML
        del places[3]
    for line, spoiled in places.items():
        assert spoiled != text
        message = work.zit("check", written(work, spoiled)).refused()
        assert name in message and re.search(rf"line {line}\b", message), (line, message)


def test_blanks_that_are_none_in_json(work):
    message = work.zit("check", written(work, '{"job": "extension",\n\u00a0"config": {}}', name="c.json")).refused()
    assert "no-break space (U+00A0)" in message and "line 2" in message
    message = work.zit("check", written(work, '{"job": "extension",\n"\u00a0config": {}}', name="c.json")).refused()
    assert "no-break space (U+00A0)" in message


def test_such_blanks_in_texts_are_texts(work, loras):
    text = config_text(work).replace(
        "  process:\n", "  process:\n  - {type: other, sample: {prompts: [\u3000\u4e00\u4e2a, 'a\u00a0b:\u00a0c']}}\n"
    )
    text = f"meta:\n  note: |\n    \u3000\u3000\u4e00: \u4e2a\n  other: {CHINESE}\u3000x\n" + text
    work.zit("check", written(work, text)).ok()


READ = {
    "2025-12-01": "a date",
    "2025-12-01 10:00:00": "a date",
    "1_0": "the number 10",
    "12:30": "the number 750",
    "0x1F": "the number 31",
    "007": "the number 7",
    "1e3": "the number 1000.0",
    ".inf": "the number inf",
    "on": "true",
    "yes": "true",
    "No": "false",
}


@pytest.mark.parametrize(("word", "what"), READ.items())
def test_words_that_yaml_takes_for_something_else(work, loras, word, what):
    for key, place in (("name", "config.name"), ("step", "steps[0].name"), ("lora", "loras[0].lora")):
        message = work.zit("check", written(work, config_text(work, **{key: word}))).refused()
        assert place in message and f"YAML reads this as {what}, put it in quotes" in message, message
        assert "datetime" not in message
    work.zit("check", written(work, config_text(work, name=f"'{word}'"))).ok()


def test_words_that_yaml_takes_for_a_key(work, loras):
    message = work.zit("check", written(work, config_text(work, loras="on"))).refused()
    assert "steps[0].True: a key must be text: YAML reads this as true, put it in quotes" in message


@pytest.mark.parametrize("word", ["null", "~", "", "Null"])
def test_words_that_yaml_takes_for_nothing(work, loras, word):
    for key, place in (("step", "steps[0].name"), ("lora", "loras[0].lora")):
        message = work.zit("check", written(work, config_text(work, **{key: word}))).refused()
        assert place in message and "YAML reads what is written there as null" in message and "in quotes" in message


def test_a_date_that_is_none(work):
    message = work.zit("check", written(work, config_text(work, step="2025-13-01"))).refused()
    assert "config.yaml: line 9: 2025-13-01 is a date to YAML" in message and "in quotes" in message


# --- names of every script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def zit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """A command with streams of an encoding; gives what they got."""

    def run(encoding: str, *words: object) -> tuple[str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
        with monkeypatch.context() as context:
            context.setattr(sys, "stdout", streams[0])
            context.setattr(sys, "stderr", streams[1])
            main([str(word) for word in words])
        out, err = (stream.detach().getvalue().decode(encoding) for stream in streams)
        return out, err

    return run


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "gbk"])
def test_names_are_shown_as_they_are_where_the_stream_has_their_letters(work, zit, encoding):
    name = f"{CHINESE}_v1.safetensors"
    path = work.lora(name)
    shown = CHINESE if encoding in ("utf-8", "gbk") else CHINESE.encode("ascii", "backslashreplace").decode()
    for words in (["inspect", path], ["run", work.job({"name": "a", "loras": [{"lora": name, "ratio": 1.0}]})]):
        out, err = zit(encoding, *words)
        assert f"{shown}_v1.safetensors" in out and err == ""
    assert f"\n    {work.out / 'merged_cat_a.safetensors'}" in out
    _, err = zit(encoding, "inspect", f"{name}x")
    assert f"{shown}_v1.safetensorsx" in err
    out, _ = zit(encoding, "recipe", work.out / "merged_cat_a.safetensors")
    assert yaml.safe_load(out)["steps"][0]["loras"][0]["lora"] == name
    assert (f"lora: {name}" in out) == (encoding in ("utf-8", "gbk"))


def test_names_beside_numbers_keep_their_columns(work):
    names = ["me.safetensors", f"{CHINESE}.safetensors"]
    loras = [{"lora": work.lora(name, seed=n).name, "ratio": 0.5} for n, name in enumerate(names)]
    text = work.zit("run", work.job({"name": "a", "loras": loras})).ok()
    assert all(fits(line) for line in text.split("\n") if str(work.folder) not in line)
    rows = [line for line in text.split("\n") if re.match(r"  [12]  .* ratio ", line)]
    wide = [line.replace(CHINESE, CHINESE * 2) for line in rows]  # as a terminal shows it: two columns a letter
    assert len(rows) == 2 and len({line.index("ratio") for line in wide}) == 1

"""`install` and `install --remove` in a folder that looks like an AI-Toolkit: what is put there, kept and taken out.

That the real AI-Toolkit loads what was put there is in test_extension.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from extensions_built_in.zit_merge.cli.main import main

PACKAGE = Path(__file__).parents[2] / "extensions_built_in" / "zit_merge"


@pytest.fixture
def toolkit(tmp_path) -> Path:
    """A checkout with one extension of its own."""
    (tmp_path / "run.py").touch()
    other = tmp_path / "extensions_built_in" / "sd_trainer" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text("AI_TOOLKIT_EXTENSIONS = []\n")
    return tmp_path


@pytest.fixture
def target(toolkit) -> Path:
    return toolkit / "extensions_built_in" / "zit_merge"


def files(folder: Path) -> dict[str, bytes]:
    """All below a folder, without what Python has compiled."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    }


def done(capsys, *words: object) -> str:
    """stdout of a command that does what it should."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def refused(capsys, *words: object) -> str:
    """The sentence of a command that does not."""
    assert main([str(word) for word in words]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_comes_and_goes(toolkit, target, capsys):
    before = files(toolkit)
    assert f"linked {target} to {PACKAGE}\n" in done(capsys, "install", toolkit)
    assert target.is_symlink()
    ours = files(PACKAGE)
    assert done(capsys, "install", toolkit, "--remove") == f"removed {target}\n"
    assert not target.is_symlink() and files(toolkit) == before and files(PACKAGE) == ours


def test_a_copy_comes_and_goes(toolkit, target, capsys):
    before = files(toolkit)
    done(capsys, "install", toolkit, "--copy")
    assert {name: text for name, text in files(target).items() if name != "installed.json"} == files(PACKAGE)
    (target / "model" / "__pycache__").mkdir()
    (target / "model" / "__pycache__" / "zimage.pyc").touch()
    assert done(capsys, "install", toolkit, "--remove") == f"removed {target}\n"
    assert not target.exists() and files(toolkit) == before


def test_what_somebody_changed_or_added_stays_and_is_named(toolkit, target, capsys):
    done(capsys, "install", toolkit, "--copy")
    changed, added = target / "config" / "presets.yaml", target / "config" / "mine.yaml"
    changed.write_text("mine: {}\n")
    added.write_text("also mine\n")
    kept = f"{added}\n    {changed}.yours\n"
    assert done(capsys, "install", toolkit, "--remove") == (
        f"removed {target}\nkept, because you changed or added it:\n    {kept}"
    )
    assert files(target) == {"config/mine.yaml": b"also mine\n", "config/presets.yaml.yours": b"mine: {}\n"}


def test_an_update_keeps_them_too_and_loads_none_of_them(toolkit, target, capsys):
    done(capsys, "install", toolkit, "--copy")
    (target / "gone.py").write_text("added\n")
    for text in ("first", "second"):
        (target / "errors.py").write_text(text)
        assert "kept, because you changed or added it:" in done(capsys, "install", toolkit, "--copy")
    found = files(target)
    assert found.pop("errors.py.yours") == b"first" and found.pop("errors.py.yours1") == b"second"
    assert found.pop("gone.py") == b"added\n" and found.pop("installed.json")
    assert found == files(PACKAGE)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_does_not_replace_a_copy_that_somebody_changed(toolkit, target, capsys):
    done(capsys, "install", toolkit, "--copy")
    (target / "errors.py").write_text("mine")
    before = files(target)
    assert "install with --copy keeps it" in refused(capsys, "install", toolkit)
    assert files(target) == before


def test_a_copy_made_by_hand_is_removed_as_far_as_it_is_ours(toolkit, target, capsys):
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    (target / "errors.py").write_text("mine")
    done(capsys, "install", toolkit, "--remove")
    assert files(target) == {"errors.py.yours": b"mine"}


def in_its_folder(toolkit: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of the extension itself, as somebody types it who has nothing but AI-Toolkit."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", "extensions_built_in.zit_merge", *words]
    return subprocess.run(command, cwd=toolkit, env=env, capture_output=True, text=True, encoding="utf-8")


def test_a_copy_can_remove_itself(toolkit, target, capsys):
    done(capsys, "install", toolkit, "--copy")
    ran = in_its_folder(toolkit, "install", ".", "--remove")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"removed {target}\n", "")
    assert not target.exists()


def test_a_checkout_does_not_remove_itself(toolkit, target):
    """Somebody who works on the extension in AI-Toolkit's folder: nothing there was put there by install."""
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    ran = in_its_folder(toolkit, "install", ".", "--remove")
    assert ran.returncode == 1 and "delete the folder by hand" in ran.stderr
    assert files(target) == files(PACKAGE)


def test_remove_refuses_what_is_not_ours(toolkit, target, capsys):
    assert "nothing to remove" in refused(capsys, "install", toolkit, "--remove")
    target.mkdir()
    (target / "mine.txt").touch()
    assert "exists and is not zit_merge" in refused(capsys, "install", toolkit, "--remove")
    assert (target / "mine.txt").is_file()
    assert "is no AI-Toolkit folder" in refused(capsys, "install", target, "--remove")
    assert "takes no --copy" in refused(capsys, "install", toolkit, "--remove", "--copy")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_to_something_else_stays(toolkit, target, capsys):
    mine = toolkit / "mine"
    mine.mkdir()
    target.symlink_to(mine)
    for words in ([], ["--copy"], ["--remove"]):
        assert "exists and is not zit_merge" in refused(capsys, "install", toolkit, *words)
    assert target.is_symlink()


def test_install_ends_with_the_next_step(toolkit, target, capsys):
    text = done(capsys, "install", toolkit, "--copy")
    assert "\nnext: " in text and " attach CONFIG.yaml --section SECTION.yaml\n" in text
    (page,) = (Path(line.split(": ", 1)[1]) for line in text.splitlines() if line.startswith("sections to start from: "))
    assert page.parent == target / "docs"

"""The README's pictures of a terminal and of the merge page, made from the demo in a headless Chromium:

    python tests/pictures/demo.py            makes them anew in the extension's docs/images
    python tests/pictures/demo.py --check    tells which are out of date; exit code 1 if one is

A picture carries a hash of what it shows: of the texts, numbers left out, and of the page's style. It does not depend on how fast
a machine is or how it rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import os
import re
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import chromium  # noqa: E402

IMAGES = ROOT / "extensions_built_in" / "zit_merge" / "docs" / "images"
STYLE = ROOT / "extensions_built_in" / "zit_merge" / "report" / "page" / "assets" / "page.css"
MERGE = "merge demo_face.safetensors demo_style.safetensors -o both.safetensors --ratio 0.9 0.6 --to_q 1.1"
COLOURS, KEY = 192, "zit_merge: shows"
TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body {{margin: 0; background: #10141c; display: inline-block}}
pre {{margin: 0; padding: 18px 22px; color: #d7dce5; font: 14px/1.35 "DejaVu Sans Mono", monospace}}
b {{color: #8fd18b; font-weight: normal}} i {{color: #7f8a9c; font-style: normal}}
</style><pre>{text}</pre>"""


class Shot(NamedTuple):
    """A picture.

    Attributes:
        name: Of the file.
        width: Of the window, in pixels.
        height: Of the window; None shows all that there is.
        page: The file that is shown.
    """

    name: str
    width: int
    height: int | None
    page: Path


def run(folder: Path, *words: str) -> str:
    """What a command prints."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-m", "extensions_built_in.zit_merge", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8", check=True).stdout


def shots(folder: Path) -> list[Shot]:
    """Runs the demo and a merge of its LoRAs; lays out what is shown."""
    run(folder, "demo")
    made = folder / "zit_merge_demo"
    out = run(made, *MERGE.split()).strip("\n")
    text = "\n".join(f"<b>{html.escape(line)}</b>" if " is right: " in line else html.escape(line) for line in out.splitlines())
    terminal = folder / "terminal.html"
    terminal.write_text(TERMINAL.format(text=f"<i>$</i> zit-merge {MERGE}\n\n{text}"), encoding="utf-8")
    return [Shot("terminal", 1040, None, terminal), Shot("page", 1200, 740, made / "demo_page.html")]


def shown(tab: Any, shot: Shot) -> str:
    """A hash of what a picture shows."""
    words = re.sub(r"[\d.]*\d(e[-+]\d+)?", "0", " ".join(tab.inner_text("body").split()))
    return hashlib.sha256((words + STYLE.read_text(encoding="utf-8") * (shot.name == "page")).encode()).hexdigest()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="make nothing, tell what is out of date")
    check, old = parser.parse_args().check, []
    with tempfile.TemporaryDirectory() as temporary, chromium.launched() as browser:
        for shot in shots(Path(temporary)):
            path = IMAGES / f"{shot.name}.png"
            tab = browser.new_page(viewport={"width": shot.width, "height": shot.height or 400}, color_scheme="light")
            tab.goto(shot.page.as_uri())
            tab.wait_for_selector("footer" if shot.name == "page" else "pre")
            tab.wait_for_timeout(500)  # its maps are drawn
            now = shown(tab, shot)
            if check:
                if not path.is_file() or Image.open(path).info.get(KEY) != now:
                    old.append(path.name)
                continue
            raw = tab.screenshot() if shot.height else tab.locator("body").screenshot()
            picture = Image.open(BytesIO(raw)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            info = PngInfo()
            info.add_text(KEY, now)
            picture.save(path, optimize=True, pnginfo=info)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    for name in old:
        print(f"{name} is out of date: python tests/pictures/demo.py")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())

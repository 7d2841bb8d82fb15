"""Takes the manual's pictures of AI-Toolkit's web UI, with what set_up.py has built:

    python -m web_ui.screenshots FOLDER [OUTPUT]        in tests/

FOLDER has to be missing, and is removed in the end; its name shows in the pictures, so take a short one such as /data. OUTPUT is
where the pictures go, by default docs/images of the extension.
"""

from __future__ import annotations

import argparse
import shutil
from io import BytesIO
from pathlib import Path

import chromium
import yaml
from PIL import Image
from web_ui import set_up
from web_ui.browser import User
from web_ui.material import Material
from web_ui.server import REPO, WebUi

NAME = "my_char"
SIDEBAR = 226
DOCS = REPO / "extensions_built_in" / "zit_merge" / "docs" / "images"
TRAINING = REPO / "config" / "examples" / "train_zit_lora_then_merge.yaml"
COLOURS = 64
HIDE = """name => {
    const card = [...document.querySelectorAll("h2")].find((h) => h.innerText === name).closest(".shadow-lg").parentElement;
    for (const other of card.parentElement.children) if (other !== card) other.style.display = "none";
    card.style.marginTop = 0;
    for (const log of document.querySelectorAll(".overflow-y-auto")) log.scrollTop = log.scrollHeight;
}"""
SECTION = """\
    - type: zit_merge
      steps:
        - name: soft
          loras:
            - {lora: trained, ratio: 0.9, layers: {0-9: 0.5, 10-29: [1.0, 0.6]}}
        - name: with_style
          rank: 32
          loras:
            - {lora: soft, ratio: 1.0}
            - {lora: /data/loras/style.safetensors, ratio: 0.6}
"""


class Album:
    """Takes pictures of a tab."""

    def __init__(self, user: User, output: Path):
        self.user, self.output = user, output

    def take(self, name: str, **clip: int) -> None:
        """Writes a picture with few colours, of the tab or a part of it."""
        area = {"x": 0, "y": 0, **self.user.page.viewport_size, **clip}
        raw = self.user.page.screenshot(clip=area, caret="initial")
        picture = Image.open(BytesIO(raw)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        picture.save(self.output / f"ui_{name}.png", optimize=True)


def editor(album: Album, folder: Path) -> None:
    """A section pasted right, and one pasted wrong."""
    user = album.user
    config = yaml.safe_load(TRAINING.read_text(encoding="utf-8"))
    config["config"]["name"] = NAME
    del config["config"]["process"][1:]
    config["config"]["process"][0]["datasets"][0]["folder_path"] = str(folder / "datasets" / "my_char")
    path = folder / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    for name in ("paste", "red_edge"):
        user.page.set_viewport_size({"width": 1200, "height": 560})
        user.new_job()
        user.import_config(path)
        user.to_meta() if name == "paste" else user.to_new_line_above_meta()
        user.paste(SECTION)
        user.wait(lambda is_red=name != "paste": user.is_red() == is_red)
        user.page.mouse.move(700, 20)
        user.page.wait_for_timeout(1000)  # the editor scrolls smoothly and marks errors with a delay
        album.take(name)


def job(album: Album, material: Material) -> None:
    """The page of a job that is done, and its tab Plugin."""
    user = album.user
    user.page.set_viewport_size({"width": 1500, "height": 900})
    user.new_job()
    user.import_config(material.training(NAME, save_every=250))
    user.to_meta()
    user.paste(SECTION.replace("/data", str(material.folder)).replace("steps:", "shapes: free\n      steps:"))
    user.create()
    user.start(NAME)
    user.wait(lambda: user.ui.row(NAME)["status"] in ("completed", "error"), 300)
    assert user.ui.row(NAME)["status"] == "completed", user.ui.row(NAME)["info"]
    merged = {f"merged_{NAME}_soft", f"merged_{NAME}_with_style"}
    user.wait(lambda: user.status() == "completed" and merged <= set(user.checkpoints()))
    user.wait(lambda: user.page.get_by_role("button", name="Plugin").count() == 1)
    # of the right column only the files: this computer's load is of no interest
    user.page.evaluate(HIDE, "Checkpoints")
    user.page.mouse.move(700, 20)
    album.take("job", x=SIDEBAR, width=1500 - SIDEBAR, height=560)
    user.plugin()
    user.page.set_viewport_size({"width": 1200, "height": 1110})
    user.page.wait_for_timeout(500)  # its maps are drawn
    album.take("plugin", x=SIDEBAR, width=1200 - SIDEBAR)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=DOCS)
    given = parser.parse_args()
    given.folder.mkdir()
    try:
        material = Material(given.folder)
        ui = WebUi(set_up.HOME, given.folder)
        try:
            with chromium.launched() as browser:
                album = Album(User(browser, ui), given.output)
                editor(album, given.folder)
                job(album, material)
        finally:
            ui.stop()
    finally:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()

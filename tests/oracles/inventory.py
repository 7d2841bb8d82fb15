"""The linears of Z-Image, as the real model gave them (tests/data/z_image_linears.json)."""

import json
from pathlib import Path

_LIST = json.loads((Path(__file__).parents[1] / "data" / "z_image_linears.json").read_text(encoding="utf-8"))
LINEARS: dict[str, tuple[int, int]] = {entry["name"]: tuple(entry["shape"]) for entry in _LIST}
NAMES = list(LINEARS)

"""The linears of Z-Image, as the real model gave them (tests/data/z_image_linears.json), and the named sets of components."""

import json
from pathlib import Path

_LIST = json.loads((Path(__file__).parents[1] / "data" / "z_image_linears.json").read_text(encoding="utf-8"))
LINEARS: dict[str, tuple[int, int]] = {entry["name"]: tuple(entry["shape"]) for entry in _LIST}
NAMES = list(LINEARS)

GROUPS = {
    "attention": {"to_q", "to_k", "to_v", "to_out"},
    "feed_forward": {"w1", "w2", "w3"},
    "qk": {"to_q", "to_k"},
    "vo": {"to_v", "to_out"},
}
EFFECTS = {
    "prompt": {"adaLN_modulation", "to_q", "to_k"},
    "composition": {"to_q", "to_k"},
    "subject": {"to_v", "w1", "w2", "w3"},
    "detail": {"w1", "w2", "w3"},
    "background": {"to_q", "to_k", "to_out"},
    "color_light": {"adaLN_modulation", "to_v"},
}

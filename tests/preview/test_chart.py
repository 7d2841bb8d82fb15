"""The picture of an ablation: its bars, dots and cells are the numbers, its texts can be read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from extensions_built_in.zit_merge import ZitMergeError
from extensions_built_in.zit_merge.model.zimage import COMPONENTS, MODULES
from extensions_built_in.zit_merge.preview import chart
from extensions_built_in.zit_merge.preview.ablation import Ablation, Distances, number
from extensions_built_in.zit_merge.preview.groups import module_groups
from extensions_built_in.zit_merge.preview.settings import ImageSpec

paper = pytest.importorskip("extensions_built_in.zit_merge.report.plots.canvas")  # needs matplotlib
chart_figure = pytest.importorskip("extensions_built_in.zit_merge.preview.chart_figure")
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.cm import ScalarMappable  # noqa: E402
from matplotlib.collections import PolyCollection  # noqa: E402
from matplotlib.colors import Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from matplotlib.path import Path as Outline  # noqa: E402
from report.test_plots import check_texts, words  # noqa: E402

FOUR = ("pixels", "structure", "colour", "detail")


def ablation(
    by: str, count: int, *, specs: int = 4, names: Sequence[str] = FOUR, mode: str = "leave_out", **how: object
) -> Ablation:
    """Part k of metric n has in picture s the distance (1 + k % 7) * (1 + n) * (1 + 0.1 s) of a whole of 10."""
    present = how.pop("present", MODULES)
    parts = module_groups(by, count, present)
    lora, scale = how.pop("lora", "me.safetensors"), how.pop("scale", 1.0)

    def distances(n: int) -> Distances:
        found = {g.name: tuple(scale * (1 + k % 7) * (1 + n) * (1 + 0.1 * s) for s in range(specs)) for k, g in enumerate(parts)}
        return Distances((10.0,) * specs, (10.0,) * specs, found, found)

    about = {name: {"what": "", "formula": "", "source": ""} for name in names}
    told = {name: distances(n) for n, name in enumerate(names)}
    rendered = tuple(ImageSpec(f"prompt {s}", 42) for s in range(specs))
    return Ablation(lora, by, mode, rendered, parts, told, about, how.pop("is_changed", (True,) * specs))


def drawn(one: Ablation) -> Figure:
    return chart_figure.draw_chart(one)


def panels(page: Figure) -> list[Axes]:
    """The axes of the metrics, without those of colour bars."""
    return [axes for axes in page.axes if axes.patches or cells(axes)]


def cells(axes: Axes) -> list[PolyCollection]:
    """The cells of a map: those with a value, and those with a mark."""
    return [c for c in axes.collections if isinstance(c, PolyCollection)]


def centre(path: Outline) -> tuple[float, float]:
    """Of a cell, in columns and rows."""
    (left, top), (right, bottom) = path.vertices.min(0), path.vertices.max(0)
    return round(float(left + right) / 2, 6), round(float(top + bottom) / 2, 6)


NOTHING = {"is_changed": (False,) * 4}
HARD = {
    "one part": ablation("layers", 1, present=["layers.3.attention.to_q"]),
    "three": ablation("layers", 3),
    "ten": ablation("layers", 10, mode="only"),
    "thirty": ablation("layers", 30),
    "components": ablation("components", 10),
    "one metric": ablation("layers", 10, names=FOUR[:1]),
    "six metrics": ablation("layers", 10, names=(*FOUR, "my_module:a_metric_of_a_name_that_no_panel_has_room_for", "b:c")),
    "one picture": ablation("components", 10, specs=1),
    "twenty pictures": ablation("layers", 10, specs=20),
    "no change": ablation("layers", 10, **NOTHING),
    "huge": ablation("layers", 10, scale=1e5),
    "tiny": ablation("layers", 10, scale=1e-9),
    "zero": ablation("layers", 10, scale=0.0),
    "cells": ablation("cells", 10),
    "cells of one run": ablation("cells", 1),
    "cells of thirty": ablation("cells", 30),
    "cells, huge": ablation("cells", 30, scale=1e5),
    "cells, tiny": ablation("cells", 3, scale=1e-9),
    "cells, zero": ablation("cells", 10, scale=0.0),
    "cells, no change": ablation("cells", 10, **NOTHING),
    "cells, one metric": ablation("cells", 30, names=FOUR[:1]),
    "cells with holes": ablation("cells", 5, present=[m for m in MODULES if "adaLN" not in m and "refiner" not in m]),
    "no cells": ablation("cells", 5, present=["cap_embedder.1", "noise_refiner.0.attention.to_q"]),
    "long name": ablation("layers", 3, lora="n" * 240),
    "odd name": ablation("layers", 3, lora="$x^{$_$a\u202e\x1b[2J\n風格 קטן.safetensors"),
}


@pytest.mark.parametrize("one", HARD.values(), ids=HARD.keys())
def test_texts_are_large_enough_within_the_page_and_not_upon_each_other(one, recwarn):
    page = drawn(one)
    assert page.get_figwidth() == paper.WIDTH
    check_texts(page)
    said = " ".join(words(page).split())
    assert "and nothing else: another LoRA, other prompts or other seeds" in said and "The shares don't add up" in said
    assert not [w for w in recwarn if "Glyph" in str(w.message)] and "\u202e" not in said and "\x1b" not in said


@pytest.mark.parametrize(("by", "count"), [("layers", 10), ("layers", 30), ("components", 1)])
def test_bars_are_shares_and_dots_are_single_pictures(by, count):
    one = ablation(by, count)
    found = panels(drawn(one))
    assert len(found) == 4
    for axes, metric in zip(found, FOUR, strict=True):
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([100 * one.share(metric, g.name) for g in one.groups])
        (dots,) = axes.collections
        wanted = [(100 * share, k) for k, g in enumerate(one.groups) for share in one.shares(metric, g.name)]
        assert dots.get_offsets().tolist() == [pytest.approx(dot) for dot in wanted]
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first part is on top
        assert len(axes.lines) == (axes.get_xlim()[1] > 100)
    assert [label.get_text() for label in found[0].get_yticklabels()] == [g.name for g in one.groups]
    assert not any(label.get_text() for label in found[1].get_yticklabels())


def test_pictures_beyond_the_scale_are_at_its_edge():
    one = ablation("layers", 3, names=FOUR[:1])
    told = one.distances["pixels"]
    wild = dict(told.to_full) | {"layers 0-9": (0.0, 0.0, 0.0, 0.4)}
    one = replace(one, distances={"pixels": replace(told, base_to_full=(10.0, 10.0, 10.0, 0.2), to_full=wild)})
    (axes,) = panels(drawn(one))
    most = 100 * max(one.share("pixels", g.name) for g in one.groups)
    assert max(one.shares("pixels", "layers 0-9")) == 2 and most < 95
    edge = axes.get_xlim()[1]
    assert edge <= 1.06 * 2 * most and max(x for x, _ in axes.collections[0].get_offsets().tolist()) == edge


def test_a_single_picture_has_no_dots():
    page = drawn(ablation("layers", 3, specs=1))
    assert not any(axes.collections for axes in panels(page)) and "Dots" not in words(page)
    assert "Dots: single pictures" in words(drawn(ablation("layers", 3)))


@pytest.mark.parametrize("count", [1, 10, 30])
def test_cells_are_shares_at_their_layer_and_component(count):
    one = ablation("cells", count)
    page = drawn(one)
    for axes, metric in zip(panels(page), FOUR, strict=True):
        columns = [label.get_text().replace("\n", "_") for label in axes.get_xticklabels()]
        assert columns == [*dict.fromkeys(g.key.split(".")[0] for g in one.groups)]
        centres = dict(zip(columns, axes.get_xticks().round(6).tolist(), strict=True))
        shown = {tuple(round(x, 6) for x in t.get_position()): t.get_text() for t in axes.texts}
        (valued,) = cells(axes)
        colours = dict(zip(map(centre, valued.get_paths()), valued.to_rgba(valued.get_array()), strict=True))
        assert len(colours) == len(valued.get_paths()) == len(one.groups)
        scale = ScalarMappable(Normalize(0, max(one.share(metric, g.name) for g in one.groups)), "cividis")
        for group in one.groups:
            run, _, component = group.key.partition(".")
            place = (centres[run], COMPONENTS.index(component) + 0.5 if component else 4)
            share = one.share(metric, group.name)
            assert colours[place] == pytest.approx(scale.to_rgba(share), abs=0.01), group.name
            assert shown[place] == number(share)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["adaLN", *COMPONENTS[1:]]


def test_cells_that_the_lora_does_not_have_are_hatched_and_explained():
    page = drawn(HARD["cells with holes"])
    for axes in panels(page):
        (absent,) = (c for c in cells(axes) if c.get_hatch())
        assert len(absent.get_paths()) == 5  # adaLN, in each of the runs
    assert "Hatched: the LoRA has nothing there." in words(page)
    assert "Hatched" not in words(drawn(HARD["cells"]))


def test_numbers_that_have_no_room_are_left_to_the_colours():
    assert not any(axes.texts for axes in panels(drawn(HARD["cells, huge"])))
    assert all(axes.texts for axes in panels(drawn(ablation("cells", 3, scale=1e5))))


def test_without_a_change_it_says_so():
    for one in (HARD["no change"], HARD["cells, no change"]):
        said = words(drawn(one))
        assert said.count("no change") == 4 and "The LoRA changes none of the pictures" in said


def test_what_is_measured_and_how_is_said():
    said = " ".join(words(drawn(HARD["ten"])).split())
    assert "each on its own" in said and "LoRA: me.safetensors" in said and "100 % is 10" in said
    assert "4 prompts and 1 seed (4 pictures of each part)." in said and "as far as the whole LoRA does" in said
    assert "each left out in turn" in words(drawn(HARD["three"]))


def test_a_png_into_a_file_or_a_buffer(tmp_path: Path):
    buffer = BytesIO()
    chart.draw(HARD["cells"], buffer)
    chart.draw(HARD["cells"], tmp_path / "a.png")
    assert buffer.getvalue().startswith(b"\x89PNG") and (tmp_path / "a.png").read_bytes() == buffer.getvalue()
    picture = imread(tmp_path / "a.png")
    assert picture.shape[1] == int(paper.WIDTH * paper.DPI) and len({tuple(c) for c in picture[::9, ::9].reshape(-1, 4)}) > 20


def test_what_a_user_has_set_for_matplotlib_changes_nothing_and_stays():
    def png() -> bytes:
        buffer = BytesIO()
        chart.draw(HARD["three"], buffer)
        return buffer.getvalue()

    before = png()
    with paper.matplotlib.rc_context({"text.usetex": True, "font.size": 3, "axes.grid": True}):
        assert png() == before and paper.matplotlib.rcParams["font.size"] == 3


def test_matplotlib_is_loaded_only_when_a_picture_is_drawn():
    outputs = chart.__name__.replace(".chart", ".outputs")
    code = f"import sys; import {chart.__name__}, {outputs}; assert 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ZitMergeError, match=r"^ablate: its picture needs matplotlib \(.*\): python -m pip install"):
        chart.draw(HARD["three"], BytesIO())

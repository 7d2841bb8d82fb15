"""`inspect --plot`: the numbers that are drawn against dense float64, the pictures as files, and the texts in them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from oracles.producers import PRODUCERS
from pairs import MODULES, Lora, Pair, deltas, lora, write
from safetensors.torch import save_file
from workspace import SMALL, Workspace

from extensions_built_in.zit_merge import ZitMergeError
from extensions_built_in.zit_merge.analysis import measure as measuring
from extensions_built_in.zit_merge.analysis.measure import measure
from extensions_built_in.zit_merge.files import atomic
from extensions_built_in.zit_merge.formats.reader import load_lora
from extensions_built_in.zit_merge.model.zimage import COMPONENTS
from extensions_built_in.zit_merge.model.zimage import MODULES as MODEL
from extensions_built_in.zit_merge.progress import Progress
from extensions_built_in.zit_merge.report.plots.data import SHOWN, FileData, PlotData, plot_data

figure = pytest.importorskip("extensions_built_in.zit_merge.report.plots.files")  # needs matplotlib
paper = pytest.importorskip("extensions_built_in.zit_merge.report.plots.canvas")
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.collections import PolyCollection  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from matplotlib.text import Text  # noqa: E402

Dense = Mapping[str, torch.Tensor]
Q = "layers.0.attention.to_q"
SIZES = {"adaLN_modulation": (16, 4)} | dict.fromkeys(COMPONENTS[1:], (8, 8))
WHOLE = {m.name: SIZES[m.component] for m in MODEL.values() if m.section != "other"}  # all layers and refiners, tiny
LAYERS = {m: shape for m, shape in WHOLE.items() if m.startswith("layers.")}


def data_of(*paths: Path) -> PlotData:
    return plot_data(measure([load_lora(path) for path in paths], SHOWN))


def measured(folder: Path, *loras: Lora) -> PlotData:
    return data_of(*(write(folder / f"{i}.safetensors", one) for i, one in enumerate(loras)))


def drawn(folder: Path, *loras: Lora) -> Figure:
    return figure.draw(measured(folder, *loras))


def flat(one: Dense, modules: Mapping[str, tuple[int, int]] = MODULES) -> torch.Tensor:
    return torch.cat([one[m].flatten() if m in one else torch.zeros(o * i).double() for m, (o, i) in modules.items()])


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(x @ y / x.norm() / y.norm())


def zeros(one: Lora) -> Lora:
    return {m: Pair(p.up * 0, p.down, p.alpha) for m, p in one.items()}


def broken(one: Lora, *modules: str) -> Lora:
    return one | {m: Pair(one[m].up * math.nan, one[m].down) for m in modules}


# --- numbers -------------------------------------------------------------------------------------------------------------------


def check_file(found: FileData, dense: Dense) -> None:
    """Norms, quartiles of singular values and kept energy, from SVDs of the dense changes."""
    assert found.norms == pytest.approx({m: float(d.norm()) for m, d in dense.items()}, rel=1e-6)
    whole = sum(float(d.square().sum()) for d in dense.values())
    assert found.norm == pytest.approx(whole**0.5, rel=1e-6)
    width = found.values.shape[1]
    sigma = torch.zeros(len(dense), max(width, *(min(d.shape) for d in dense.values())), dtype=torch.float64)
    for row, change in zip(sigma, dense.values(), strict=True):
        row[: min(change.shape)] = torch.linalg.svdvals(change)
    if not found.is_cut:
        assert float(sigma[:, width:].max() if width < sigma.shape[1] else 0) < 1e-6 * float(sigma.max())
    sigma = sigma[:, :width]
    assert torch.allclose(found.values.sort(dim=0).values, sigma.sort(dim=0).values, atol=2e-6 * float(sigma.max()))
    for row, share in zip(found.quartiles(), (0.25, 0.5, 0.75), strict=True):
        wanted = [sorted_quantile(column, share) for column in sigma.T.tolist()]
        assert row.tolist() == pytest.approx(wanted, abs=2e-6 * float(sigma.max()))
    kept = [float((sigma[:, :r] ** 2).sum()) / whole for r in range(1, width + 1)]
    assert found.kept().tolist() == pytest.approx(kept, rel=1e-5)


def sorted_quantile(values: Sequence[float], share: float) -> float:
    values, place = sorted(values), share * (len(values) - 1)
    low, part = int(place), place - int(place)
    return values[low] + part * (values[min(low + 1, len(values) - 1)] - values[low])


def test_norms_spectra_and_energy_against_dense_changes(tmp_path):
    loras = [
        lora(8, 0),
        lora(4, 1, alpha=1),
        lora(2, 2, modules={Q: MODULES[Q]}) | lora(5, 3, modules=dict([*MODULES.items()][4:])),
    ]
    data = measured(tmp_path, *loras)
    for found, one in zip(data.files, loras, strict=True):
        check_file(found, deltas(one))
        assert not found.is_cut
    assert data.files[0].kept()[-1] == pytest.approx(1.0, abs=1e-9)


def test_cosines_of_files_and_of_modules_against_dense_changes(tmp_path):
    loras = [lora(8, 0), lora(4, 1, alpha=1), lora(8, 0, alpha=16) | lora(2, 9, modules={Q: MODULES[Q]})]
    del loras[1][Q]
    data, dense = measured(tmp_path, *loras), [deltas(one) for one in loras]
    for i, j in combinations(range(3), 2):
        assert float(data.cosines[i, j]) == pytest.approx(cosine(flat(dense[i]), flat(dense[j])), abs=1e-7)
        both = {m: cosine(dense[i][m].flatten(), dense[j][m].flatten()) for m in dense[i].keys() & dense[j].keys()}
        assert data.pairs[i, j] == pytest.approx(both, abs=1e-7)
    assert Q not in data.pairs[0, 1] and Q in data.pairs[0, 2]


@pytest.mark.parametrize("producer", ["ai-toolkit-lokr", "musubi-loha", "lycoris-full", "onetrainer-lokr", "musubi-comfy"])
def test_other_algorithms_against_the_changes_they_were_made_of(work: Workspace, producer):
    made = PRODUCERS[producer].make(SMALL, 2, 0, torch.bfloat16).deltas
    (found,) = data_of(work.lora("a.safetensors", producer)).files
    check_file(found, {m: d.double() for m, d in sorted(made.items(), key=lambda item: list(MODEL).index(item[0]))})


def test_a_change_of_high_rank_shows_its_leading_values_and_the_energy_of_all(tmp_path, monkeypatch):
    random = torch.Generator().manual_seed(0)
    full = {m: torch.randn(o, i, generator=random) for m, (o, i) in MODULES.items()}
    save_file({f"diffusion_model.{m}.diff": d for m, d in full.items()}, tmp_path / "full.safetensors")
    monkeypatch.setattr(measuring, "DRAWN_WIDE", 6)
    monkeypatch.setattr(measuring, "is_thin", lambda delta: False)
    data = data_of(tmp_path / "full.safetensors")
    (found,) = data.files
    assert found.is_cut and found.values.shape == (len(MODULES), 6)
    check_file(found, {m: full[m].double() for m in found.norms})
    assert float(found.kept()[-1]) < 0.7
    assert "LoRA 1 has changes of so high a rank that its lines end at 6 singular values." in words(figure.draw(data))


def test_files_of_two_models_are_refused(tmp_path):
    with pytest.raises(ZitMergeError, match="nothing to compare"):
        measured(tmp_path, lora(2), lora(2, modules={Q: (32, 32)}))


def test_modules_pass_through_the_bar_once(tmp_path):
    seen: list[str] = []

    class Noted(Progress):
        def track(self, items, label, unit="module", describe=None):
            for item in items:
                seen.append(item)
                yield item

    measure([load_lora(write(tmp_path / f"{i}.safetensors", lora(2, i))) for i in range(2)], progress=Noted())
    assert sorted(seen) == sorted(MODULES)


# --- what is drawn -------------------------------------------------------------------------------------------------------------


def texts(page: Figure) -> list[Text]:
    """Every text that is drawn, as it lies on the page, without the pixels; ticks beyond the limits of their axis are not."""
    found: list[Text] = []
    draw = Text.draw

    def noted(text: Text, renderer: object, *more: object, **how: object) -> None:
        if text.get_visible() and text.get_text().strip():
            found.append(text)
        draw(text, renderer, *more, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        page.draw_without_rendering()
    return list(dict.fromkeys(found))


def words(page: Figure) -> str:
    return "\n".join(t.get_text() for t in texts(page))


def check_texts(page: Figure) -> None:
    """All of them large enough, within the page, and none upon another."""
    found = texts(page)
    assert len(found) > 20
    boxes = [(t.get_text(), *t.get_window_extent().extents.tolist()) for t in found]
    for text, x0, y0, x1, y1 in boxes:
        assert x0 >= 0 and y0 >= 0 and x1 <= page.bbox.x1 and y1 <= page.bbox.y1, text
    assert min(t.get_size() for t in found) >= 7
    for (text, *a), (other, *b) in combinations(boxes, 2):
        across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        assert across < 1 or down < 3, (text, other)  # extents of lines reach a little beyond their letters


def maps(page: Figure) -> list[Axes]:
    """The maps of layers x components."""
    names = ["adaLN", *COMPONENTS[1:]]
    return [axes for axes in page.axes if [label.get_text() for label in axes.get_yticklabels()] == names]


def cells(axes: Axes) -> dict[tuple[float, float], float]:
    """(column, row) -> value of every cell of a map that has one."""
    found = {}
    for collection in axes.collections:
        if (values := collection.get_array()) is not None:
            found |= {place(path): value for path, value in zip(collection.get_paths(), values.tolist(), strict=True)}
    return found


def place(path: object) -> tuple[float, float]:
    """(column, row) of a cell's upper left corner."""
    return tuple(path.vertices.min(0).round(6).tolist())


def scale(axes: Axes) -> tuple[float, float]:
    """The ends of the colours of a map."""
    (norm,) = {c.norm for c in axes.collections if c.get_array() is not None}
    return norm.vmin, norm.vmax


def test_the_map_holds_each_norm_at_its_layer_and_component(tmp_path):
    loras = [lora(2, 0, modules=LAYERS), lora(2, 1, modules=WHOLE, up=0.2)]
    page = drawn(tmp_path, *loras)
    found = maps(page)[:2]
    assert scale(found[0]) == scale(found[1])
    gap = 2.6
    lefts = {"layers": 0, "noise_refiner": 30 + gap, "context_refiner": 32 + 2 * gap}
    for axes, one in zip(found, map(deltas, loras), strict=True):
        own = [MODEL[m] for m in one]
        wanted = {(lefts[m.section] + m.index, COMPONENTS.index(m.component)): float(one[m.name].norm()) for m in own}
        assert cells(axes) == pytest.approx(wanted, rel=1e-6)
    assert scale(found[1])[1] == pytest.approx(max(float(d.norm()) for d in deltas(loras[1]).values()), rel=1e-6)


def test_pairs_have_maps_of_their_cosines_around_zero(tmp_path):
    loras = [lora(2, 0, modules=LAYERS), lora(2, 0, modules=LAYERS) | lora(2, 1, modules={Q: LAYERS[Q]})]
    axes = maps(drawn(tmp_path, *loras))[2]
    assert scale(axes) == (-1, 1)
    wanted = cosine(*(deltas(one)[Q].flatten() for one in loras))
    assert cells(axes)[0, COMPONENTS.index("to_q")] == pytest.approx(wanted, abs=1e-7)
    assert cells(axes)[29, COMPONENTS.index("to_k")] == pytest.approx(1, abs=1e-7)


def test_lines_are_medians_and_kept_energy(tmp_path):
    loras = [lora(8, 0), lora(3, 1)]
    data = measured(tmp_path, *loras)
    (left,) = (a for a in figure.draw(data).axes if a.get_ylabel() == "singular value")
    (right,) = (a for a in figure.draw(data).axes if a.get_ylabel() == "%")
    for found, line, kept in zip(data.files, left.lines, right.lines, strict=True):
        assert line.get_ydata().tolist() == pytest.approx(found.quartiles()[1].tolist())
        assert kept.get_ydata().tolist() == pytest.approx((100 * found.kept()).tolist())
        assert line.get_xdata().tolist() == kept.get_xdata().tolist() == list(range(1, found.values.shape[1] + 1))
    assert left.get_yscale() == "log"
    styles = [(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in left.lines]
    assert all(a != b for pair in combinations(styles, 2) for a, b in zip(*pair, strict=True))


def test_the_matrix_has_its_numbers(tmp_path):
    loras = [lora(4, 0), lora(4, 0) | lora(4, 5, modules={Q: MODULES[Q]}), zeros(lora(4, 2))]
    page = drawn(tmp_path, *loras)
    (axes,) = (a for a in page.axes if a.get_xlabel() == a.get_ylabel() == "LoRA")
    alike = f"{cosine(*(flat(deltas(one)) for one in loras[:2])):.2f}"
    assert [t.get_text() for t in axes.texts] == ["1.00", alike, "-", alike, "1.00", "-", "-", "-", "-"]
    assert "LoRA 3 is zero as far as it is whole: it has no lines." in words(page)


def hatches(page: Figure) -> set[str]:
    return {c.get_hatch() for axes in page.axes for c in axes.collections if isinstance(c, PolyCollection) and c.get_hatch()}


def test_absent_modules_are_hatched_and_explained(tmp_path):
    page = drawn(tmp_path, lora(2, 0, modules=LAYERS))
    assert not hatches(page) and "not in the file" not in words(page)
    page = drawn(tmp_path, lora(2, 0, modules={m: s for m, s in LAYERS.items() if "adaLN" not in m}))
    (patches,) = (c for axes in page.axes for c in axes.collections if c.get_hatch())
    assert len(patches.get_paths()) == 30 and "not in the file" in words(page)


def test_a_broken_file_shows_what_is_whole(tmp_path):
    gone = ("layers.3.attention.to_q", "layers.9.feed_forward.w1")
    whole = lora(2, 0, modules=LAYERS)
    data = measured(tmp_path, broken(whole, *gone))
    assert {m for m, n in data.files[0].norms.items() if n is None} == set(gone)
    rest = {m: d for m, d in deltas(whole).items() if m not in gone}
    assert data.files[0].norm == pytest.approx(float(flat(rest, {m: LAYERS[m] for m in rest}).norm()), rel=1e-6)
    page = figure.draw(data)
    assert "broken: infinite or NaN" in words(page) and "NaN or infinity in 2 modules" in words(page)
    with pytest.raises(ZitMergeError, match="layers.3.attention.to_q.*broken"):
        measured(tmp_path, whole, broken(whole, *gone))


HARD = {
    "one module": [lora(2, 0, modules={Q: LAYERS[Q]})],
    "one of rank 1": [lora(1, 0, modules={Q: LAYERS[Q]})],
    "all zero": [zeros(lora(2, 0, modules=LAYERS))],
    "two zeros": [zeros(lora(2, 0, modules=LAYERS))] * 2,
    "all broken": [broken(lora(2, 0, modules=LAYERS), *LAYERS)],
    "mostly zero": [zeros(lora(2, 0, modules=LAYERS)) | lora(2, 1, modules={Q: LAYERS[Q]})],
    "nothing in common": [lora(2, 0, modules={Q: LAYERS[Q]}), lora(2, 0, modules={"layers.1.attention.to_k": (8, 8)})],
    "beyond the layers": [lora(2, 0, modules={"cap_embedder.1": (8, 8)})],
    "tiny and huge": [lora(2, 0, modules=LAYERS, up=1e-12), lora(2, 1, modules=LAYERS, up=1e12)],
    "refiners": [lora(2, i, modules=WHOLE) for i in range(4)],
    "one with refiners": [lora(2, 0, modules=WHOLE)],
    "three": [lora(2, i, modules=LAYERS) for i in range(3)],
    "twelve": [lora(2, i, modules=MODULES) for i in range(12)],
    "thirteen": [lora(2, i, modules=MODULES) for i in range(13)],
    "forty": [lora(2, i, modules=MODULES) for i in range(40)],
    "ninety": [lora(1, i, modules={Q: LAYERS[Q]}) for i in range(90)],
}


@pytest.mark.parametrize("loras", HARD.values(), ids=HARD.keys())
def test_texts_lie_in_the_page_and_not_upon_each_other(tmp_path, loras):
    check_texts(drawn(tmp_path, *loras))


def test_of_many_files_the_first_are_drawn_and_the_others_counted(tmp_path):
    page = drawn(tmp_path, *HARD["forty"])
    assert len(maps(page)) == 6
    said = words(page)
    assert "34 more are in the cosines only" in said and "over 12 files" in said and "4 at most" in said
    assert all(f"LoRA {i + 1}: {i}.safetensors" in said for i in range(40))
    assert "and 50 more" in words(drawn(tmp_path, *HARD["ninety"]))


NAMES = ["n" * 240, "$x^{$_$a_1$", "דמות של חתול", "قطة صغيرة", "風格の猫 고양이", "\u202emoc.exe\x1b[2J\ntwo", "W" * 239]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_all_kinds(tmp_path, name, recwarn):
    path = write(tmp_path / f"{name}.safetensors", lora(2, 0, modules={Q: LAYERS[Q]}))
    for count in (1, 2, 7):
        page = figure.draw(data_of(*[path] * count))
        check_texts(page)
        said = words(page)
        assert "LoRA 1: " in said and ("safetensors" in said or "..." in said)
        if name.isascii() and name.isprintable() and len(name) < 40:
            assert f"LoRA {count}: {name}.safetensors" in said
    assert "\u202e" not in said and "\x1b" not in said
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_letters_without_a_font_are_escaped_unless_one_is_installed(monkeypatch):
    assert paper.drawable("a\ue000") == "a\\ue000"
    assert paper.drawable("a\x1b\n\u202e\udcff") == "a\\x1b\\n\\u202e\\udcff"
    assert paper.drawable("é и ß") == "é и ß"
    letter = next(chr(c) for c in font("STIXGeneral").get_charmap() if c > 0xE000 and not font("DejaVu Sans").get_char_index(c))
    assert paper.drawable(letter) == letter.encode("unicode_escape").decode()
    monkeypatch.setattr(paper, "_OTHER_SCRIPTS", ("STIXGeneral",))
    paper.families.cache_clear(), paper.fonts.cache_clear()
    try:
        assert paper.drawable(letter) == (letter if letter.isprintable() else paper.drawable(letter))
        assert paper.families() == ("DejaVu Sans", "STIXGeneral")
    finally:
        paper.families.cache_clear(), paper.fonts.cache_clear()


def font(name: str):
    return paper.font_manager.get_font(paper.font_manager.findfont(name))


def test_scripts_from_right_to_left_are_escaped_where_they_would_stand_backwards(monkeypatch):
    monkeypatch.delattr(paper.ft2font, "__libraqm_version__", raising=False)
    assert paper.drawable("aא") == "a\\u05d0"
    monkeypatch.setattr(paper.ft2font, "__libraqm_version__", "0.10", raising=False)
    assert paper.drawable("aא") == "aא"


def test_what_a_user_has_set_for_matplotlib_changes_nothing_and_stays(tmp_path):
    matplotlib = paper.matplotlib
    one = lora(2, 0)
    before = drawn(tmp_path, one)
    with matplotlib.rc_context({"text.usetex": True, "font.size": 3, "xtick.labelsize": 2, "font.family": ["monospace"]}):
        page = drawn(tmp_path, one)
        check_texts(page)
        assert matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["font.size"] == 3
    assert words(page) == words(before)


# --- files ---------------------------------------------------------------------------------------------------------------------

STARTS = {"png": b"\x89PNG", "PNG": b"\x89PNG", "pdf": b"%PDF-", "svg": b"<?xml"}


@pytest.mark.parametrize("ending", STARTS)
def test_each_ending_is_its_format(work, loras, ending):
    out = work.folder / f"a picture.{ending}"
    said = work.zit("inspect", loras[0], "--plot", out).ok()
    assert said == work.zit("inspect", loras[0]).ok() + f"wrote {out}\n"
    assert out.read_bytes().startswith(STARTS[ending])
    assert not [p for p in work.folder.iterdir() if p.suffix == ".part"]


def test_a_png_is_a4_wide_and_has_something_on_it(work, loras):
    work.zit("inspect", *loras, "--plot", "two.png", "--quiet").ok()
    picture = imread("two.png")
    assert picture.shape[1] == round(8.27 * 200) - (picture.shape[1] < 8.27 * 200 - 0.5)
    assert len({tuple(c) for c in picture[::7, ::7].reshape(-1, picture.shape[2]).round(1).tolist()}) > 20


def test_a_picture_is_replaced(work, loras):
    Path("a.svg").write_text("an older one")
    work.zit("inspect", loras[0], "--plot", "a.svg").ok()
    assert "an older one" not in Path("a.svg").read_text()


def test_beside_json_stdout_is_one_object(work, loras):
    said = work.zit("inspect", *loras, "--json", "--plot", "a.png").ok()
    assert len(json.loads(said)["files"]) == 2 and Path("a.png").stat().st_size > 10_000


@pytest.mark.parametrize("out", ["a.jpg", "a", "me.safetensors", "config.yaml", ".png"])
def test_other_endings_are_refused_and_nothing_is_touched(work, loras, out):
    before = loras[0].read_bytes()
    message = work.zit("inspect", loras[0], "--plot", out).refused()
    assert "pictures are written as .png, .pdf or .svg" in message
    assert loras[0].read_bytes() == before and len(list(work.folder.iterdir())) == 2


def test_missing_folders_folders_and_inputs_are_refused(work, loras):
    assert "gone is not a folder" in work.zit("inspect", loras[0], "--plot", "gone/a.png").refused()
    Path("b.png").mkdir()
    assert "is a folder: name a file in it" in work.zit("inspect", loras[0], "--plot", "b.png").refused()
    renamed = loras[0].rename("c.png")
    before = renamed.read_bytes()
    assert "is one of the LoRAs" in work.zit("inspect", renamed, "--plot", "./c.png").refused()
    assert renamed.read_bytes() == before
    for letters in (249, 253):  # with and without room for the ending of a part file
        assert "File name too long" in work.zit("inspect", loras[1], "--plot", "n" * letters + ".png").refused()


@pytest.mark.parametrize("words", [["--methods"], ["--presets"], ["me.safetensors", "--sources", "style.safetensors"]], ids=str)
def test_what_is_no_plot_of_files(work, loras, words):
    message = work.zit("inspect", *words, "--plot", "a.png").refused()
    assert "leave one of the two out" in message and not Path("a.png").exists()


def test_without_files(work):
    assert "name a LoRA file" in work.zit("inspect", "--plot", "a.png").refused()


def test_without_matplotlib(work, loras, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = work.zit("inspect", loras[0], "--plot", "a.png").refused()
    assert "needs matplotlib" in message and "pip install matplotlib" in message
    work.zit("inspect", loras[0]).ok()


def test_an_interruption_leaves_the_old_picture_and_no_litter(work, loras, monkeypatch):
    Path("a.png").write_bytes(b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "publish_file", interrupt)
    assert work.zit("inspect", loras[0], "--plot", "a.png").code == 130
    assert Path("a.png").read_bytes() == b"old" and not list(work.folder.glob("*.part"))

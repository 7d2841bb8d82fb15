"""What `inspect` shows of files is measured in one pass: each change is read once and decomposed at most once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from analysis.test_compare import plus, times
from pairs import MODULES, lora, write
from workspace import Workspace

from extensions_built_in.zit_merge import ZitMergeError
from extensions_built_in.zit_merge.algebra import truncate
from extensions_built_in.zit_merge.analysis.measure import measure
from extensions_built_in.zit_merge.formats.reader import TensorReader, load_lora
from extensions_built_in.zit_merge.report.page.files import write_page

ONE, TWO = lora(8, 0), lora(4, 1)


@pytest.fixture
def paths(work: Workspace) -> list[Path]:
    """Two LoRAs of the same eight modules."""
    return [write(work.folder / f"{i}.safetensors", one) for i, one in enumerate((ONE, TWO))]


@pytest.fixture
def reads(monkeypatch) -> Counter[tuple[str, str]]:
    """(file, module) -> how often its change was read."""
    found, read = Counter(), TensorReader.delta

    def counted(reader: TensorReader, module: str) -> object:
        found[reader._lora.path.name, module] += 1
        return read(reader, module)

    monkeypatch.setattr(TensorReader, "delta", counted)
    return found


@pytest.fixture
def decompositions(monkeypatch) -> list[object]:
    """An entry for every singular value decomposition; one of a LoRA's change takes one."""
    found: list[object] = []

    def counted(decompose: Callable) -> Callable:
        return lambda *args, **how: found.append(args) or decompose(*args, **how)

    for name in ("_cholesky_core", "_spectrum"):
        monkeypatch.setattr(truncate, name, counted(getattr(truncate, name)))
    return found


@pytest.mark.parametrize("shown", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("count", [1, 2])
def test_report_plot_and_page_read_and_decompose_every_change_once(work, paths, reads, decompositions, count, shown):
    pytest.importorskip("matplotlib")
    work.zit("inspect", *paths[:count], *shown, "--plot", "a.png", "--html", "a.html").ok()
    assert Path("a.png").exists() and Path("a.html").exists()
    assert reads == {(path.name, module): 1 for path in paths[:count] for module in MODULES}
    assert len(decompositions) == count * len(MODULES)


def test_what_is_not_shown_is_not_decomposed(work, paths, reads, decompositions):
    work.zit("inspect", paths[0], "--html", "a.html").ok()
    assert set(reads.values()) == {1} and not decompositions


@pytest.mark.parametrize(
    ("out", "kind", "decomposed"),
    [
        (plus(times(ONE, 0.5), times(TWO, 0.5)), "the file is 0.50 of source 1 and 0.50 of source 2", 0),  # inner products tell
        (lora(8, 5), "lies outside of the directions of the sources", 3),  # those of the sources have to be known
    ],
    ids=["sum", "something else"],
)
def test_sources_are_looked_for_in_one_pass(work, paths, reads, decompositions, out, kind, decomposed):
    path = write(work.folder / "out.safetensors", out)
    assert kind in " ".join(work.zit("inspect", path, "--sources", *paths).ok().split())
    assert reads == {(p.name, module): 1 for p in (path, *paths) for module in MODULES}
    assert len(decompositions) == decomposed * len(MODULES)


def test_a_broken_file_alone_is_measured_as_far_as_it_is_whole(work, paths):
    broken = dict(ONE)
    module = next(iter(broken))
    broken[module] = times({module: ONE[module]}, float("nan"))[module]
    path = write(work.folder / "b.safetensors", broken)
    found = measure([load_lora(path)])
    assert list(found.broken) == [module] and "NaN" in found.broken[module]
    assert found.norms(0)[module] is None and len(found.norms(0)) == len(MODULES) == len(found.modules) + 1
    with pytest.raises(ZitMergeError, match=r"b\.safetensors: .*NaN"):
        measure([load_lora(p) for p in (paths[0], path)])
    with pytest.raises(ZitMergeError, match=r"b\.safetensors: .*NaN"):
        write_page(found, work.folder / "page.html")

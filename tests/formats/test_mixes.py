"""Random mixes: every module of a file in another form, and two such files merged, against the dense sums in float64."""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.dense import best_error, read_deltas, sizes, weighted_sum
from oracles.producers import PRODUCERS, small_shapes
from reading import DTYPES, READABLE, VECTORS, check, clear, store
from sweep import examples

from extensions_built_in.zit_merge import merge

SHAPES = {
    name: shape
    for name, shape in small_shapes(dim=12, ffn=20, temb=8, cap=10, n_layers=2, n_refiners=1).items()
    if not name.startswith("t_embedder")
}
# What stands in metadata or twice belongs to a whole file, and fullrank's lora_A too: test_reader has them.
WHOLE_FILES = {"ai-toolkit-fullrank", "anime-z", "anime-z-alpha-apart", *VECTORS}
FORMS = [n for n in READABLE if n not in WHOLE_FILES and PRODUCERS[n].alpha not in ("metadata", "sidecar")]


def units():
    """Modules that a file may hold under one name: q, k and v of a block, and every other one alone."""
    blocks: dict[str, tuple[str, ...]] = {}
    for name in SHAPES:
        key = name.rpartition(".")[0] if name.endswith((".to_q", ".to_k", ".to_v")) else name
        blocks[key] = (*blocks.get(key, ()), name)
    return list(blocks.values())


@dataclass(frozen=True)
class Piece:
    """One unit of a file.

    Attributes:
        modules: Of the unit.
        form: Producer.
        rank, seed: Of the producer.
        dtype: Of the tensors.
        turn: What its alpha is multiplied with, where alpha counts.
    """

    modules: tuple[str, ...]
    form: str
    rank: int
    seed: int
    dtype: str
    turn: float

    def make(self):
        """Tensors and deltas."""
        producer = PRODUCERS[self.form]
        made = producer.make({m: SHAPES[m] for m in self.modules}, self.rank, self.seed, DTYPES[self.dtype])
        whole = any(key.endswith("lokr_w1") for key in made.tensors) and any(key.endswith("lokr_w2") for key in made.tensors)
        turn = self.turn if producer.alpha == "key" and not whole else 1.0
        # a power of two with a sign: no alpha is rounded
        tensors = {k: (t.double() * turn).to(t.dtype) if k.endswith(".alpha") else t for k, t in made.tensors.items()}
        return tensors, {module: delta * turn for module, delta in made.deltas.items()}


@cache
def forms_for(modules: tuple[str, ...]) -> list[str]:
    """The producers that train all of these modules."""
    shapes = {module: SHAPES[module] for module in modules}
    return [form for form in FORMS if len(PRODUCERS[form].make(shapes, 1, 0, torch.float32).deltas) == len(modules)]


@st.composite
def files(draw) -> list[Piece]:
    """A file with a form for each of some units: how many is hypothesis' choice, which ones is drawn evenly."""
    random = Random(draw(st.integers(0, 10**6)))
    chosen = random.sample(units(), draw(st.integers(1, 12)))
    return [
        Piece(
            modules,
            random.choice(forms_for(modules)),
            random.randint(1, 6),
            random.randint(0, 999),
            random.choice([*DTYPES]),
            random.choice([1.0, -1.0, 0.5, -2.0, 4.0]),
        )
        for modules in chosen
    ]


def write(folder, pieces, name):
    """The file and its deltas."""
    tensors, deltas = {}, {}
    for own, its in (piece.make() for piece in pieces):
        tensors |= own
        deltas |= its
    return store(Path(folder), tensors, name), deltas


quick = examples(60, derandomize=True)
ratios = st.sampled_from([1.0, 0.5, -1.3, 2.0])


@quick
@given(files())
def test_a_file_of_many_forms_is_read_as_its_deltas(pieces):
    with tempfile.TemporaryDirectory() as folder:
        path, deltas = write(folder, pieces, "lora")
        lora = clear(path)
        check(lora, deltas)
        assert sum(lora.algorithms.values()) == len(deltas)


@quick
@given(files(), files(), ratios, ratios, st.integers(1, 8), st.sampled_from(["fp32", "bf16"]))
def test_two_such_files_merge_to_the_sum_and_to_its_best_approximation(one, two, ratio, other, rank, dtype):
    with tempfile.TemporaryDirectory() as folder:
        (first, its), (second, others) = write(folder, one, "one"), write(folder, two, "two")
        parts, loras = [(its, ratio), (others, other)], [(first, ratio), (second, other)]
        wanted, size = weighted_sum(parts), sizes(parts)
        how = {"shapes": "free", "device": "cpu"}
        exact = read_deltas(merge(loras, dtype="fp32", **how).save(Path(folder) / "exact.safetensors"))
        assert wanted.keys() <= exact.keys()
        for module, delta in exact.items():
            if module in wanted:
                assert float((delta - wanted[module]).norm()) <= 1e-6 * size[module], module
            else:
                assert not delta.any(), module  # what clients want beside the merged modules
        found = read_deltas(merge(loras, rank=rank, dtype=dtype, **how).save(Path(folder) / "cut.safetensors"))
        slack = {"fp32": 1e-6, "bf16": 2**-7}[dtype]
        for module, delta in wanted.items():
            assert int(torch.linalg.matrix_rank(found[module], rtol=1e-9)) <= max(rank, 2), module  # the lowest beside alpha
            assert float((found[module] - delta).norm()) <= best_error(delta, rank) + slack * size[module], module


@pytest.mark.parametrize(
    "forms", [("ai-toolkit-lokr", "musubi"), ("lycoris-lokr-both", "musubi-loha"), ("lycoris-full",)], ids="+".join
)
def test_wide_changes_are_cut_as_well_as_a_dense_svd_cuts_them(tmp_path, forms):
    # 640 wide: no side is short, and none of the changes is thin
    shapes = {"layers.3.attention.to_out.0": (640, 640)}
    parts, loras = [], []
    for i, form in enumerate(forms):
        made = PRODUCERS[form].make(shapes, 24, i, torch.bfloat16)
        ratio = (0.8, -1.1)[i]
        norm = float(made.deltas["layers.3.attention.to_out.0"].norm())
        parts.append((made.deltas, ratio / norm))  # of equal weight
        loras.append((store(tmp_path, made.tensors, form), ratio / norm))
    (delta,) = weighted_sum(parts).values()
    for rank in (4, 40):
        out = merge(loras, rank=rank, shapes="free", dtype="fp32").save(tmp_path / f"out{rank}.safetensors")
        found = read_deltas(out)["layers.3.attention.to_out.0"]
        assert float((found - delta).norm()) <= best_error(delta, rank) * (1 + 1e-6)

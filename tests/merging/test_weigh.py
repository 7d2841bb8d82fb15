"""`rank: {..., weigh: base}`: components count by their share of the norm of the weight that they change."""

from __future__ import annotations

import pytest
import torch
from checkpoints import SHAPES, model, write_folder
from oracles.dense import read_header, read_metadata
from pairs import lora, write
from workspace import Workspace

LARGE, SMALL = "layers.0.attention.to_q", "layers.1.attention.to_q"
FEW = {m: SHAPES[m] for m in (LARGE, SMALL)}


@pytest.fixture
def files(work: Workspace) -> Workspace:
    """Two modules with changes of one size; the weight of one is a hundred times as large."""
    tensors = model()
    tensors[f"{LARGE}.weight"] = tensors[f"{LARGE}.weight"] * 100
    write_folder(work.folder / "base", tensors)
    write(work.folder / "me.safetensors", lora(16, 1, None, FEW))
    return work


def ranks(work: Workspace, rank: str, *words: object) -> dict[str, int]:
    out = work.folder / "out.safetensors"
    out.unlink(missing_ok=True)
    flags = ("--shapes", "free", "--uniform", "false", "--rank", rank, *words)
    work.zit("merge", "me.safetensors", "-o", out, "--ratio", 1, *flags).ok()
    header, _ = read_header(out)
    return {m: header[f"diffusion_model.{m}.lora_A.weight"]["shape"][0] for m in FEW}


def test_components_go_where_the_weight_is_small(files):
    plain = ranks(files, "energy=0.5")
    weighed = ranks(files, "energy=0.5,weigh=base", "--base", "base")
    assert abs(plain[LARGE] - plain[SMALL]) <= 4
    assert weighed[LARGE] == 2 and weighed[SMALL] < plain[SMALL] + 3, "half of the weighed energy is in one module alone"
    assert weighed == expected(files)


def expected(work: Workspace) -> dict[str, int]:
    """By dense singular values: the fewest components, by squared share of the weight, that hold half of all shares."""
    one, tensors = lora(16, 1, None, FEW), model()
    shares = []
    for module in FEW:
        weight = tensors[f"{module}.weight"].double() * (100 if module == LARGE else 1)
        values = torch.linalg.svdvals(one[module].delta)[:16] / weight.norm()
        shares += [(float(v) ** 2, k < 2, module) for k, v in enumerate(values)]
    shares.sort(key=lambda s: (not s[1], -s[0]))  # two stand in every module anyway
    total, held, found = sum(s[0] for s in shares), 0.0, dict.fromkeys(FEW, 0)
    for share, _, module in shares:
        if held >= 0.5 * total:
            break
        held += share
        found[module] += 1
    return found


def test_the_recipe_names_the_model(files):
    before = ranks(files, "energy=0.5,weigh=base", "--base", "base")
    made = files.folder / "out.safetensors"
    content = made.read_bytes()
    assert '"weigh":"base"' in read_metadata(made)["zit_merge.recipe"]
    assert files.again(files.recipe(made)).read_bytes() == content
    tensors = model()
    write_folder(files.folder / "base", tensors)
    said = files.zit("run", files.folder / "recipe.yaml", "--output-dir", "again").refused()
    assert "does not hold the tensors of the recipe" in said and before[LARGE] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "energy=0.5,weigh=base"], "--rank weigh: needs the model: set base to its path"),
        (["--rank", "energy=0.5,weigh=bass", "--base", "base"], "takes weigh: base, not 'bass'"),
        (["--rank", "energy=0.5,weight=base"], "has no weight (did you mean weigh?)"),
        (["--rank", "weigh=base", "--base", "base"], "needs either energy"),
        (["--rank", "energy=0.5,weigh=base", "--base", "nowhere"], "nowhere is not there"),
    ],
    ids=str,
)
def test_what_is_refused(files, words, said):
    flags = ("--shapes", "free", "-o", "out.safetensors", "--ratio", 1, *words)
    assert said in files.zit("merge", "me.safetensors", *flags).refused()


def test_a_second_run_keeps_the_file(files):
    step = {
        **{"name": "a", "base": "base", "rank": {"energy": 0.5, "weigh": "base"}, "save": {"uniform": False}},
        "loras": [{"lora": "me.safetensors", "ratio": 1.0}],
    }
    files.zit("run", files.job(step)).ok()
    assert "made before by the same recipe" in " ".join(files.zit("run", files.job(step)).ok().split())

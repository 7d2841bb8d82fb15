"""What AI-Toolkit trains beside plain LoRAs, merged in the job that trained it."""

import pytest
import torch
from host.job import job, training
from host.test_job import component, products, write
from safetensors.torch import load_file

pytestmark = pytest.mark.toolkit

RANK = 4
WEIGHTS = {"ratio": 0.9, "blocks": {"to_q": -0.5, "feed_forward": 0.25}}


def strength(module: str) -> float:
    return 0.9 * {"to_q": -0.5, "w1": 0.25, "w2": 0.25, "w3": 0.25}.get(component(module), 1.0)


def section(*steps, **keys):
    return {"type": "zit_merge", "shapes": "free", "save": {"dtype": "fp32"}, "steps": list(steps)} | keys


def run_job(run_python, folder, name, network, merging):
    config = write(folder, name, job(name, training(folder, name, network=network), merging))
    return run_python("run.py", config)


@pytest.fixture(scope="session")
def lokr(place, run_python):
    """A default LoKr training, then three merges of it."""
    steps = (
        {"name": "thin", "rank": RANK, "loras": [{"lora": "trained", **WEIGHTS}]},
        {"name": "kept", "save": {"keep_lokr": True}, "loras": [{"lora": "trained", **WEIGHTS}]},
        {
            "name": "styled",
            "rank": RANK,
            "loras": [{"lora": "trained", "ratio": 1}, {"lora": "style.safetensors", "ratio": 0.7}],
        },
    )
    network = {"type": "lokr", "linear": RANK, "linear_alpha": RANK, "lokr_full_rank": True, "lokr_factor": -1}
    done = run_job(run_python, place, "kr", network, section(*steps))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return place / "output" / "kr"


def krons(path) -> dict[str, torch.Tensor]:
    """Module -> float64 Kronecker product of a file of whole factors."""
    tensors = load_file(path)
    stems = [k.removesuffix(".lokr_w1") for k in tensors if k.endswith(".lokr_w1")]
    return {
        s.removeprefix("diffusion_model."): torch.kron(tensors[f"{s}.lokr_w1"].double(), tensors[f"{s}.lokr_w2"].double())
        for s in stems
    }


def excess(got: torch.Tensor, want: torch.Tensor, rank: int) -> float:
    """How much further than the best approximation of that rank a matrix is from `want`, as a share of |want|."""
    best = torch.linalg.svdvals(want)[rank:].norm()
    return float(((got - want).norm() - best) / want.norm())


def test_a_default_lokr_training_merges_to_the_best_approximation_of_a_rank(lokr):
    trained, thin = krons(lokr / "kr.safetensors"), products(lokr / "merged_kr_thin.safetensors")
    assert len(trained) == 240 and trained.keys() == thin.keys()
    for module, delta in trained.items():
        want = strength(module) * delta
        assert want.norm() > 0
        assert torch.linalg.matrix_rank(thin[module]) <= RANK
        assert excess(thin[module], want, RANK) < 1e-6, module


def test_a_lokr_that_is_only_weighed_stays_one(lokr):
    trained, kept = krons(lokr / "kr.safetensors"), krons(lokr / "merged_kr_kept.safetensors")
    assert len(kept) == 240
    assert all((kept[m] - strength(m) * d).norm() <= 1e-6 * d.norm() for m, d in trained.items())


def test_a_lokr_and_a_lora_of_another_trainer(lokr, style):
    trained, styled = krons(lokr / "kr.safetensors"), products(lokr / "merged_kr_styled.safetensors")
    for module, delta in trained.items():
        want = delta + 0.7 * style.deltas.get(module, 0)
        assert excess(styled[module], want, RANK) < 1e-6, module


@pytest.mark.parametrize("shapes", ["strict", "free"])
def test_without_a_rank_a_lokr_stops_before_the_training(place, run_python, shapes):
    step = {"name": "exact", "loras": [{"lora": "trained", "ratio": 1}]}
    done = run_job(run_python, place, f"kr_{shapes}", {"type": "lokr"}, section(step, shapes=shapes))
    assert done.returncode != 0
    message = next(line for line in done.stdout.splitlines() if line.startswith("Error running job: "))
    assert "process[1].steps[0]" in message and "rank: 64" in message and "keep_lokr: true" in message
    assert "Running  2 processes" not in done.stdout
    assert not list((place / "output" / f"kr_{shapes}").glob("*.safetensors"))


def test_a_lokr_of_products_merges_exactly(place, run_python):
    network = {"type": "lokr", "linear": 2, "linear_alpha": 1, "lokr_full_rank": False, "lokr_factor": 4}
    step = {"name": "all", "confirm_size": True, "loras": [{"lora": "trained", **WEIGHTS}]}
    done = run_job(run_python, place, "kp", network, section(step))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = place / "output" / "kp"
    stored, got = load_file(folder / "kp.safetensors"), products(folder / "merged_kp_all.safetensors")
    assert len(got) == 240 and any(k.endswith("lokr_w2_a") for k in stored), "the small model must leave room for products"
    for module, delta in got.items():
        stem = f"diffusion_model.{module}.lokr_"
        w2 = stored[f"{stem}w2_a"].double() @ stored[f"{stem}w2_b"].double() if f"{stem}w2_a" in stored else None
        # The toolkit overrules linear_alpha and stores the alpha it trained with.
        scale = 1.0 if w2 is None else float(stored[f"{stem.removesuffix('lokr_')}alpha"]) / 2
        want = torch.kron(stored[f"{stem}w1"].double(), stored[f"{stem}w2"].double() if w2 is None else w2) * scale
        assert (delta - strength(module) * want).norm() <= 1e-6 * want.norm(), module


def test_whole_differences_and_norms_beside_pairs(place, run_python):
    """full_if_contains and all_layers: .diff on weights is merged, vectors are dropped where that was asked for."""
    extras = {"full_if_contains": ["adaLN_modulation"]}
    network = {"type": "lora", "linear": RANK, "linear_alpha": RANK, "all_layers": True, "network_kwargs": extras}
    lora = {"lora": "trained", **WEIGHTS}
    asked = run_job(run_python, place, "nd", network, section({"name": "no", "rank": 8, "loras": [lora]}))
    assert asked.returncode != 0 and "drop: [norm, bias]" in asked.stdout and "Running  2 processes" not in asked.stdout

    step = {"name": "full", "rank": 8, "loras": [lora | {"drop": ["norm", "bias"]}]}
    done = run_job(run_python, place, "df", network, section(step))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = place / "output" / "df"
    stored, got = load_file(folder / "df.safetensors"), products(folder / "merged_df_full.safetensors")
    assert any(".norm_q.diff" in k for k in stored) and any(k.endswith(".diff_b") for k in stored)
    pairs = products(folder / "df.safetensors")
    whole = {
        k.removeprefix("diffusion_model.").removesuffix(".diff"): t.double()
        for k, t in stored.items()
        if k.endswith("adaLN_modulation.0.diff")
    }
    assert len(pairs) == 210 and len(whole) == 30 and got.keys() == {*pairs, *whole}
    for module, delta in {**pairs, **whole}.items():
        assert excess(got[module], strength(module) * delta, 8) < 1e-6, module


def test_a_full_rank_network(place, run_python):
    step = {"name": "low", "rank": RANK, "loras": [{"lora": "trained", **WEIGHTS}]}
    done = run_job(run_python, place, "fr", {"type": "fullrank", "linear": RANK, "linear_alpha": RANK}, section(step))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = place / "output" / "fr"
    stored, got = load_file(folder / "fr.safetensors"), products(folder / "merged_fr_low.safetensors")
    assert not any(k.endswith("lora_B.weight") for k in stored)
    for module, delta in got.items():
        want = strength(module) * stored[f"diffusion_model.{module}.lora_A.weight"].double()
        assert excess(delta, want, RANK) < 1e-6, module


def test_a_dora_stops_before_the_training(place, run_python):
    step = {"name": "x", "rank": 8, "loras": [{"lora": "trained", "ratio": 1}]}
    done = run_job(run_python, place, "dr", {"type": "dora", "linear": RANK, "linear_alpha": RANK}, section(step))
    assert done.returncode != 0 and "DoRA" in done.stdout and "Running  2 processes" not in done.stdout

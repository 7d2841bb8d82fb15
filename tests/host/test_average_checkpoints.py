"""Averages over a real training's own saves."""

from pathlib import Path

import pytest
import torch
import yaml
from host.job import job, training
from host.test_job import products, write

EXAMPLE = Path(__file__).parents[2] / "config" / "examples" / "average_checkpoints.yaml"
pytestmark = pytest.mark.toolkit


def example_section(**changes) -> dict:
    """The section of the example, as it stands there, for the tiny model."""
    return yaml.safe_load(EXAMPLE.read_text())["config"]["process"][1] | {"shapes": "free", "save": {"dtype": "fp32"}} | changes


@pytest.fixture(scope="module")
def averaged(place, run_python):
    """Six steps, of which four are kept and the final one, with the example's section."""
    trains = training(place, "ema")
    trains["train"]["steps"] = 6
    done = run_python("run.py", write(place, "ema", job("ema", trains, example_section())))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return place / "output" / "ema", done


def best_of_rank_4(delta: torch.Tensor) -> torch.Tensor:
    u, sigma, v = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :4] * sigma[:4]) @ v[:4]


@pytest.mark.parametrize("name", ["ema", "even"])
def test_each_file_is_the_weighted_sum_of_products_cut_to_the_training_rank(averaged, name):
    folder, _ = averaged
    if name == "ema":
        files, sigma = ["ema_000000003", "ema_000000004", "ema_000000005", "ema"], 0.1
        gamma = max(torch.linalg.eigvals(_companion(sigma)).real.tolist())
        weights = [(step / 6) ** gamma for step in (3, 4, 5, 6)]
    else:
        files, weights = ["ema_000000004", "ema_000000005", "ema"], [1, 1, 1]
    saves = [products(folder / f"{file}.safetensors") for file in files]
    got = products(folder / f"merged_ema_{name}.safetensors")
    assert len(got) == 240
    for module, delta in got.items():
        want = best_of_rank_4(sum(w / sum(weights) * save[module] for w, save in zip(weights, saves, strict=True)))
        assert (delta - want).norm() <= 1e-5 * want.norm(), module


def _companion(sigma: float) -> torch.Tensor:
    """Of sigma^2 (g + 2)^2 (g + 3) = g + 1."""
    t = sigma**-2
    return torch.tensor([[-7, t - 16, t - 12], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)


def test_the_log_says_what_was_averaged_and_that_it_is_right(averaged):
    _, done = averaged
    for step in (3, 4, 5):
        assert f"ema_{step:09d}.safetensors" in done.stdout
    assert done.stdout.count("of the energy kept") == 2


def test_too_few_saves_are_found_before_the_training(place, run_python):
    section = example_section(steps=[{"name": "wide", "checkpoints": {"last": 9}}])
    trains = training(place, "few")
    trains["train"]["steps"] = 6
    done = run_python("run.py", write(place, "few", job("few", trains, section)))
    assert done.returncode != 0 and not list((place / "output" / "few").glob("*.safetensors"))
    message = done.stdout + done.stderr
    assert "wide: 9 checkpoints are asked for, 5 will be there" in message and "(process[1].steps[0].checkpoints)" in message
    assert "steps 6, save_every 1 and max_step_saves_to_keep 4 leave 2, 3, 4, 5, 6" in message

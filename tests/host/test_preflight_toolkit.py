"""The preflight on the real toolkit: its schedulers, its optimizers, and restarts that restart."""

import importlib.util
import sys

import pytest
import torch
from host import tiny_zimage
from host.job import job, training
from host.test_job import write

from extensions_built_in.zit_merge.preflight import OPTIMIZERS, known_scheduler
from extensions_built_in.zit_merge.training import ARCHS

pytestmark = pytest.mark.toolkit

STEPS = 8


@pytest.fixture(scope="session")
def place(toolkit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    tiny_zimage.make_model(folder / "model")
    tiny_zimage.make_dataset(folder / "dataset")
    return folder


def merging(**keys):
    return {"type": "zit_merge", "shapes": "free", "steps": [{"name": "a", "loras": [{"lora": "trained", "ratio": 1}]}], **keys}


def with_train(folder, name, **train):
    process = training(folder, name)
    process["train"] = process["train"] | train
    return process


@pytest.mark.parametrize(
    "name", ["constant", "cosine", "linear", "constant_with_warmup", "cosine_with_restarts", "step", "polynomial"]
)
@pytest.mark.parametrize(
    "params",
    [
        {"total_iters": 10},
        {"total_iters": 10, "eta_min": 1e-6},
        {"total_iters": 10, "num_warmup_steps": 3},
        {"total_iters": 10, "T_mult": 2},
        {"total_iters": 10, "start_factor": 1.0, "end_factor": 0.1},
        {"max_iterations": 10},
        {"total_iters": 10, "num_cycles": 2},
        {"T_0": 5},
        {"total_iters": 10, "factor": 0.5},
        {"total_iters": 10, "power": 2.0},
    ],
)
def test_our_table_of_schedulers_is_the_toolkits(toolkit, name, params):
    """Whatever the toolkit makes of parameters, the table that stands for it makes too."""
    sys.path.append(str(toolkit))
    from toolkit.scheduler import get_lr_scheduler

    def works(maker):
        try:
            maker(name, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4), **params)
        except Exception:
            return False
        return True

    assert works(known_scheduler) == works(get_lr_scheduler)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "sgd", "adamw8bits", "automagic4", "prodigy8bit2"])
def test_our_table_of_optimizers_is_the_toolkits(toolkit, name):
    sys.path.append(str(toolkit))
    from toolkit.optimizer import get_optimizer

    package = OPTIMIZERS.get(name)
    try:
        get_optimizer([torch.nn.Parameter(torch.zeros(8, 8))], name, 1e-4, {})
        known = True
    except ImportError as e:
        known = package is not None and package in str(e).replace("-", "_")
    except ValueError:
        known = False
    if package and importlib.util.find_spec(package) is None:
        assert known, name
    assert known == (name in OPTIMIZERS) or name == "prodigy8bit2"  # the toolkit takes any name that begins so


def test_our_table_of_archs_is_the_toolkits(run_python):
    code = "from extensions_built_in.zit_merge.host import toolkit; print('ARCHS', sorted(toolkit.zimage_archs()))"
    assert f"ARCHS {sorted(ARCHS)}" in run_python("-c", code).stdout


@pytest.mark.parametrize(
    "train, says",
    [
        ({"lr_scheduler": "step"}, "process[0].train.lr_scheduler: AI-Toolkit can't make step"),
        ({"lr_scheduler": "cosine", "lr_scheduler_params": {"max_iterations": 3}}, "process[0].train.lr_scheduler"),
        ({"lr_scheduler": "cosine_with_restarts"}, "never restarts"),
        ({"optimizer": "sgd"}, "process[0].train.optimizer: AI-Toolkit knows no sgd"),
        ({"optimizer": "dadaptation"}, "dadaptation needs a package that is not installed"),
    ],
)
def test_errors_stop_the_job_before_the_training(place, run_python, train, says):
    if train.get("optimizer") == "dadaptation" and importlib.util.find_spec("dadaptation"):
        pytest.skip("dadaptation is installed here")
    done = run_python("run.py", write(place, "pe", job("pe", with_train(place, "pe", **train), merging())))
    assert done.returncode != 0
    assert says in next(line for line in done.stdout.splitlines() if line.startswith("Error running job: "))
    assert "Running  2 processes" not in done.stdout


RATES = """
import sys
sys.argv = ["run.py", sys.argv[1]]
from toolkit.job import get_job

job = get_job(sys.argv[1], None)
trainer = job.process[0]
hook = trainer.end_step_hook
def told():
    print("RATE", trainer.optimizer.param_groups[0]["lr"])
    hook()
trainer.end_step_hook = told
job.run()
"""


def rates(run_python, config):
    done = run_python("-c", RATES, config)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("RATE ")], done.stdout


@pytest.mark.parametrize("params", [{"total_iters": 3}, {"total_iters": 3, "max_iterations": 99}])
def test_restarts_restart_in_this_job(place, run_python, params):
    train = {"steps": STEPS, "lr": 0.01, "lr_scheduler": "cosine_with_restarts", "lr_scheduler_params": params}
    config = write(place, "pr", job("pr", with_train(place, "pr", **train), merging(train_fixes=["cosine_with_restarts"])))
    (place / "output" / "pr").mkdir(parents=True, exist_ok=True)
    for old in (place / "output" / "pr").iterdir():
        old.unlink() if old.is_file() else None
    seen, log = rates(run_python, config)
    assert "lr restarts after 3 steps" in log
    rises = [i for i in range(1, len(seen)) if seen[i] > seen[i - 1]]
    assert len(rises) == (STEPS - 1) // 3 and all(b - a == 3 for a, b in zip(rises, rises[1:], strict=False)), seen
    assert all(abs(seen[i] - 0.01) < 1e-9 for i in rises), "each restart begins at the full rate"


def test_without_the_fix_the_toolkit_does_not_restart(toolkit, place, run_python):
    """Why the fix is there: this fails when the toolkit learns to restart."""
    train = {"steps": STEPS, "lr": 0.01, "lr_scheduler": "cosine_with_restarts", "lr_scheduler_params": {"total_iters": 3}}
    other = {"type": "zit_merge", "shapes": "free", "output_dir": str(place / "x")}
    config = write(place, "pn", job("pn", with_train(place, "pn", **train), other))
    script = RATES.replace("from toolkit.job", "import json\nfrom toolkit.job").replace(
        "job = get_job(sys.argv[1], None)",
        "from jobs import ExtensionJob\nfrom toolkit.config import get_config\n"
        "c = get_config(sys.argv[1], None); c['config']['process'].pop()\njob = ExtensionJob(c)",
    )
    done = run_python("-c", script, config)
    seen = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("RATE ")]
    assert len(seen) >= STEPS - 1, done.stdout[-2000:] + done.stderr[-2000:]
    before_the_end = seen[: STEPS - 1]  # its one period is the whole training
    assert all(b <= a for a, b in zip(before_the_end, before_the_end[1:], strict=False)), seen


def test_a_failed_merge_is_made_up_for_without_training_again(place, run_python):
    """The training is there; the second start makes what is missing, and keeps what the same recipe made."""
    section = merging(output_dir=str(place / "out"))
    later = {"name": "b", "loras": [{"lora": str(place / "later.safetensors"), "ratio": 1}]}
    section["steps"] = [*section["steps"], later]
    from oracles import producers

    made = producers.PRODUCERS["ai-toolkit"].make(tiny_zimage.linear_shapes(tiny_zimage.transformer()), 4, 5, torch.bfloat16)
    good = dict(made.tensors)
    made.tensors["diffusion_model.layers.9.attention.to_q.lora_A.weight"][0, 0] = float("nan")
    producers.save(made, place / "later.safetensors")
    config = write(place, "pf", job("pf", training(place, "pf"), section))
    first = run_python("run.py", config)
    assert first.returncode != 0 and "NaN" in first.stdout
    assert "advice: process[0]: cache_text_embeddings: true" in first.stdout, "advice stops nothing"
    kept = place / "out" / "merged_pf_a.safetensors"
    before = kept.stat().st_mtime_ns
    from dataclasses import replace

    producers.save(
        replace(made, tensors=good | {k: t.nan_to_num() for k, t in made.tensors.items()}), place / "later.safetensors"
    )
    second = run_python("run.py", config)
    assert second.returncode == 0, second.stdout[-2000:]
    assert f"kept {kept}" in second.stdout and kept.stat().st_mtime_ns == before
    assert (place / "out" / "merged_pf_b.safetensors").is_file()
    assert "RESUMING FROM" in second.stdout and "merged_" not in second.stdout.partition("RESUMING FROM")[2].splitlines()[0]

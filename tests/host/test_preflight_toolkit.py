"""The preflight on the real toolkit: its schedulers, its optimizers, and restarts that restart."""

import importlib.util
import re
import sys
from dataclasses import replace

import pytest
import torch
from host.job import job, training
from host.test_job import write
from oracles import producers

from extensions_built_in.zit_merge.planning.preflight import OPTIMIZERS, known_scheduler, one_number
from extensions_built_in.zit_merge.planning.training import ARCHS

pytestmark = pytest.mark.toolkit

STEPS = 8


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
            maker(name, **params)
        except Exception:
            return False
        return True

    assert works(known_scheduler) == works(lambda name, **params: get_lr_scheduler(name, one_number(), **params))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "sgd", "adamw8bits", "automagic4"])
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
    assert known == (name in OPTIMIZERS)


def test_the_toolkit_has_no_optimizer_that_our_table_lacks(toolkit):
    source = (toolkit / "toolkit" / "optimizer.py").read_text(encoding="utf-8")
    named = set(re.findall(r"lower_type == ['\"](\w+)['\"]", source))
    assert len(named) > 10 and named <= set(OPTIMIZERS)


def test_our_table_of_archs_is_the_toolkits(run_python):
    code = "from extensions_built_in.zit_merge.host import toolkit; print('ARCHS', sorted(toolkit.zimage_archs()))"
    assert f"ARCHS {sorted(ARCHS)}" in run_python("-c", code).stdout


@pytest.mark.parametrize(
    "train, says",
    [
        ({"lr_scheduler": "step"}, "AI-Toolkit can't make step"),
        ({"lr_scheduler": "cosine", "lr_scheduler_params": {"max_iterations": 3}}, "(process[0].train.lr_scheduler)"),
        ({"lr_scheduler": "cosine_with_restarts"}, "never restarts"),
        ({"optimizer": "sgd"}, "Error running job: AI-Toolkit knows no sgd"),
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


@pytest.mark.parametrize(
    ("name", "params"), [("pr", {"total_iters": 3}), ("pm", {"total_iters": 3, "max_iterations": 99})], ids=["plain", "longer"]
)
def test_restarts_restart_in_this_job(place, run_python, name, params):
    train = {"steps": STEPS, "lr": 0.01, "lr_scheduler": "cosine_with_restarts", "lr_scheduler_params": params}
    config = write(place, name, job(name, with_train(place, name, **train), merging(train_fixes=["cosine_with_restarts"])))
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


def test_a_failed_merge_is_made_up_for_without_training_again(place, style, run_python, tmp_path):
    """The training is there; the second start makes what is missing, and keeps what the same recipe made."""
    section, later = merging(output_dir=str(tmp_path)), tmp_path / "later.safetensors"
    section["steps"] = [*section["steps"], {"name": "b", "loras": [{"lora": str(later), "ratio": 1}]}]
    tensors = {k: t.clone() for k, t in style.tensors.items()}
    tensors["lora_unet_layers_9_attention_to_q.lora_down.weight"][0, 0] = float("nan")
    producers.save(replace(style, tensors=tensors), later)
    config = write(place, "pf", job("pf", training(place, "pf"), section))
    first = run_python("run.py", config)
    assert first.returncode != 0 and "NaN" in first.stdout
    assert "advice: process[0]: cache_text_embeddings: true" in first.stdout, "advice stops nothing"
    kept = tmp_path / "merged_pf_a.safetensors"
    before = kept.stat().st_mtime_ns
    producers.save(style, later)
    second = run_python("run.py", config)
    assert second.returncode == 0, second.stdout[-2000:]
    assert f"kept {kept.name} (made before by the same recipe)" in second.stdout and kept.stat().st_mtime_ns == before
    assert (tmp_path / "merged_pf_b.safetensors").is_file()
    assert "RESUMING FROM" in second.stdout and "merged_" not in second.stdout.partition("RESUMING FROM")[2].splitlines()[0]

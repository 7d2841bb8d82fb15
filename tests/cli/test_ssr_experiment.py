"""What the experiment `ssr` refuses before it loads a model, and what it tells; its merges are tested in the real AI-Toolkit."""

from pathlib import Path

import pytest
import torch

from extensions_built_in.zit_merge.experiments import ssr

NAN = float("nan")


def judged(inner, sizes=None):
    inner = torch.tensor(inner, dtype=torch.float64)
    return ssr.Judged(inner, torch.ones_like(inner) if sizes is None else torch.tensor(sizes, dtype=torch.float64)).text


def test_strengths_that_differ():
    assert judged([[0.9, 0.2], [0.3, 0.8]]).splitlines() == [
        "LoRA 1: at 0.90 of its strength on its own prompt, at 0.20 on the others'",
        "LoRA 2: at 0.80 of its strength on its own prompt, at 0.30 on the others'",
    ]


def test_strengths_that_are_alike_are_an_average():
    assert judged([[0.52, 0.48], [0.48, 0.52]]).endswith("may help")


def test_pairs_that_share_no_module_do_not_count():
    """LoRA 3 shares nothing; it must not make the others look less alike."""
    told = judged([[0.5, 0.45, 0], [0.45, 0.5, 0], [0, 0, 0]], [[1, 1, 0], [1, 1, 0], [0, 0, 0]]).splitlines()
    assert told[:3] == [
        "LoRA 1: at 0.50 of its strength on its own prompt, at 0.45 on the others'",
        "LoRA 2: at 0.50 of its strength on its own prompt, at 0.45 on the others'",
        "LoRA 3: as in a sum",
    ]
    assert "close to an average" in told[3]


@pytest.fixture
def run(work, real_loras, capsys):
    """Runs it on a step of two LoRAs: (exit code, what it said)."""

    def run(*flags, prompts=("a", "b"), out="out.safetensors", loras=None, **step):
        files = loras or [{"lora": str(path), "ratio": 1.0} for path in real_loras]
        model = {"name_or_path": "someone/Z-Image", "arch": "zimage:turbo"}
        config = work.job({"name": "both", "loras": files} | step, model=model, shapes="strict")
        words = [config, "--step", "both", "-o", out, *flags, *(["--prompts", *prompts] if prompts else [])]
        return ssr.main(list(map(str, words))), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "ties", "rank": 8}, "process[0].steps[0].method: is ties"),
        ({"rank": {"energy": 0.9}}, "process[0].steps[0].rank: follows from numbers"),
        ({"prompts": ["a"]}, "--prompts: got 1 prompt for 2 LoRAs"),
        ({"out": "out.pt"}, "--out: out.pt is no name of a LoRA"),
        ({"out": "x" * 260 + ".safetensors"}, "--out: xxx"),
    ],
    ids=["method", "rank", "prompts", "ending", "long"],
)
def test_what_is_refused_before_a_model_is_loaded(run, given, says):
    code, told = run(**given)
    assert code == 1
    assert told.startswith(f"zit_merge: {says}")
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize("ridge", ["nan", "inf", "-1", "0", "much"])
def test_a_ridge_is_a_number_above_0(run, ridge):
    code, told = run("--ridge", ridge)
    assert code == 2
    assert "--ridge" in told


def test_seeds_are_whole_numbers_from_0(run):
    code, told = run("--seeds", 1, 2**63)
    assert code == 2
    assert "--seeds: 9223372036854775808 is no seed" in told


def test_a_file_that_is_there_stays(run):
    Path("out.safetensors").write_bytes(b"somebody's work")
    code, told = run()
    assert code == 1
    assert "--out: out.safetensors exists" in told
    assert Path("out.safetensors").read_bytes() == b"somebody's work"


def test_loras_that_share_nothing_need_no_model(run, real_loras):
    off = [{"lora": str(path), "ratio": ratio} for path, ratio in zip(real_loras, (1.0, 0.0), strict=True)]
    code, told = run(loras=off)
    assert code == 1
    assert "no two of its LoRAs change one module" in told


def test_what_is_kept_of_the_activations_has_a_limit(run, monkeypatch):
    monkeypatch.setattr(ssr, "MEMORY", 1e3)
    code, told = run()
    assert code == 1
    assert "process[0].steps[0].loras: would take" in told

"""Jobs in the real AI-Toolkit, from its own run.py."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from host.job import job, training
from safetensors.torch import load_file, safe_open

LOADER = Path(__file__).with_name("load_in_toolkit.py")

pytestmark = pytest.mark.toolkit


def merging(**changes) -> dict:
    section = {
        "type": "zit_merge",
        "shapes": "free",
        "save": {"dtype": "fp32"},
        "steps": [
            {
                "name": "soft",
                "loras": [{"lora": "trained", "ratio": 0.9, "blocks": {"attention": 0.5, "to_q": 1.1}, "layers": {"0-9": 0.5}}],
            },
            {
                "name": "with_style",
                "loras": [{"lora": "soft", "ratio": 1.0}, {"lora": "style.safetensors", "ratio": -0.6, "blocks": {"w2": 2.0}}],
            },
            {"name": "early", "loras": [{"lora": "trained@2", "ratio": 1}]},
        ],
    }
    return section | changes


def write(folder, name, config):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def products(path) -> dict[str, torch.Tensor]:
    """Module -> float64 delta of a file in AI-Toolkit's form, alpha applied where there is one."""
    tensors = load_file(path)
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            alpha = tensors.get(f"{module}.alpha", torch.tensor(down.shape[0]))
            up = tensors[f"{module}.lora_B.weight"]
            found[module.removeprefix("diffusion_model.")] = up.double() @ down.double() * float(alpha) / down.shape[0]
    return found


def component(module: str) -> str:
    return next(p for p in module.split(".") if p.startswith(("to_", "w", "adaLN")))


@pytest.fixture(scope="session")
def trained(place, run_python):
    """One real training of three steps with our section after it."""
    config = write(place, "cat_v1", job("cat_v1", training(place, "cat_v1"), merging()))
    done = run_python("run.py", config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return place / "output" / "cat_v1", done


def test_the_job_trains_and_merges_in_one_go(trained):
    folder, done = trained
    names = {p.name for p in folder.glob("*.safetensors")}
    assert {"cat_v1.safetensors", "merged_cat_v1_soft.safetensors", "merged_cat_v1_with_style.safetensors"} <= names
    assert "cat_v1_000000002.safetensors" in names, "the trainer's own checkpoints stay"
    assert not list(folder.glob("*.part"))
    # The forecast comes before the training, the results after it.
    assert done.stdout.index("still to be trained") < done.stdout.index("Running  2 processes") < done.stdout.index("wrote ")


def test_the_page_lies_where_the_ui_shows_it(trained):
    """JobPlugin.tsx shows plugin.html of the job's folder; the toolkit's search for checkpoints passes it by."""
    folder, done = trained
    html = (folder / "plugin.html").read_text(encoding="utf-8")
    assert f"report:\n    {folder / 'plugin.html'}\n" in done.stdout
    shown = json.loads(re.search(r'id="facts">(.*?)</script>', html)[1])
    assert [step["name"] for step in shown["sections"][0]["steps"]] == ["soft", "with_style", "early"]
    assert shown["sections"][0]["raw"]["steps"] == merging()["steps"]
    before, energies = products(folder / "cat_v1.safetensors"), shown["sections"][0]["steps"][0]["details"]["energies"][0]
    modules = [m[0] for m in shown["modules"]]
    assert {m for m, e in zip(modules, energies, strict=True) if e is not None} == set(before)
    for module, energy in zip(modules, energies, strict=True):
        assert energy is None or energy == pytest.approx(float(before[module].square().sum()), rel=1e-3)


def test_the_weighed_file_holds_the_strengths_that_were_asked_for(trained):
    folder, _ = trained
    before, after = products(folder / "cat_v1.safetensors"), products(folder / "merged_cat_v1_soft.safetensors")
    assert len(before) == 240 and before.keys() == after.keys()
    for module, delta in before.items():
        blocks = {"to_q": 1.1, "to_k": 0.5, "to_v": 0.5, "to_out": 0.5}.get(component(module), 1.0)
        strength = 0.9 * blocks * (0.5 if int(module.split(".")[1]) < 10 else 1.0)
        assert delta.norm() > 0, "three steps of training have moved every module"
        assert (after[module] - strength * delta).norm() <= 1e-6 * delta.norm(), module


def test_the_second_lora_is_added_as_products(trained, style):
    folder, _ = trained
    soft, both = products(folder / "merged_cat_v1_soft.safetensors"), products(folder / "merged_cat_v1_with_style.safetensors")
    for module, got in both.items():
        want = soft[module] + (-0.6 * (2.0 if component(module) == "w2" else 1.0)) * style.deltas.get(module, 0)
        assert (got - want).norm() <= 1e-6 * want.norm(), module


def test_a_checkpoint_is_named_by_its_step(trained):
    folder, _ = trained
    want, got = products(folder / "cat_v1_000000002.safetensors"), products(folder / "merged_cat_v1_early.safetensors")
    assert all((got[m] - want[m]).norm() <= 1e-6 * want[m].norm() for m in want)


def test_our_files_never_claim_to_be_the_training(trained):
    with safe_open(trained[0] / "merged_cat_v1_soft.safetensors", "pt") as file:
        metadata = file.metadata()
    assert "training_info" not in metadata and not [k for k in metadata if k.startswith("sshs_")]
    assert metadata["ss_base_model_version"] == "zimage"
    assert json.loads(metadata["zit_merge.base"]) == [{"model": "model", "arch": "zimage:turbo"}]  # a folder by its name alone
    assert json.loads(metadata["zit_merge.recipe"])["job"] == "cat_v1"


def test_running_the_same_merge_alone_gives_the_same_bytes(trained, place, run_python, tmp_path):
    """The command line without AI-Toolkit and the job in it are one program."""
    folder, _ = trained
    config = place / "cat_v1.yaml"
    done = run_python("-m", "extensions_built_in.zit_merge", "run", config, "--step", "with_style", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    for step in ("soft", "with_style"):
        name = f"merged_cat_v1_{step}.safetensors"
        assert digest(tmp_path / name) == digest(folder / name)


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_merge_only_job(place, style, run_python):
    section = {
        "type": "zit_merge",
        "device": "cuda",  # what the UI writes into the first process; means auto
        "training_folder": str(place / "output"),
        "sqlite_db_path": "./aitk_db.db",
        "model": {"name_or_path": "x"},
        "shapes": "free",
        "steps": [{"name": "half", "loras": [{"lora": "style.safetensors", "ratio": 0.5}]}],
    }
    done = run_python("run.py", write(place, "alone", job("alone", section)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    got = products(place / "output" / "alone" / "merged_alone_half.safetensors")
    assert all((got[m] - 0.5 * d).norm() <= 4e-3 * (0.5 * d).norm() for m, d in style.deltas.items()), "bf16 rounding"


@pytest.mark.parametrize(
    "change, says",
    [
        (
            {"steps": [{"name": "a", "loras": [{"lora": "trained", "ratio": 1, "blocks": {"to_w": 1}}]}]},
            "(process[1].steps[0].loras[0].blocks.to_w)",
        ),
        ({"steps": [{"name": "a", "loras": [{"lora": "nowhere.safetensors", "ratio": 1}]}]}, "nowhere.safetensors is not there"),
        ({"steps": [{"name": "a", "loras": [{"lora": "trained@7", "ratio": 1}]}]}, "will not keep a checkpoint of step 7"),
        ({"devise": "cpu"}, "Error running job: unknown key (did you mean device?)"),
    ],
)
def test_a_mistake_stops_the_job_before_the_training(place, run_python, change, says):
    done = run_python("run.py", write(place, "typo", job("typo", training(place, "typo"), merging(**change))))
    assert done.returncode != 0
    assert "Error running job: " in done.stdout and says in done.stdout
    assert "Running  2 processes" not in done.stdout
    assert not list((place / "output" / "typo").glob("*.safetensors"))


def test_two_processes_write_one_file(place, run_python):
    """Under `accelerate launch`, which is torchrun underneath, every rank runs the job; only the main one merges."""
    section = {"type": "zit_merge", "training_folder": str(place / "output"), "shapes": "free"}
    section["steps"] = [{"name": "one", "loras": [{"lora": str(place / "style.safetensors"), "ratio": 1}]}]
    config = write(place, "ranks", job("ranks", section))
    done = run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py", config, ACCELERATE_USE_CPU="true"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1 and done.stdout.count("Running job: ranks") == 2
    assert (place / "output" / "ranks" / "merged_ranks_one.safetensors").is_file()


def test_processes_that_accelerate_does_not_see_are_stopped(place, run_python):
    """torchrun on a CPU without ACCELERATE_USE_CPU: every process would take itself for the main one."""
    section = {"type": "zit_merge", "training_folder": str(place / "output"), "shapes": "free"}
    section["steps"] = [{"name": "one", "loras": [{"lora": str(place / "style.safetensors"), "ratio": 1}]}]
    config = write(place, "unseen", job("unseen", section))
    for words in (["run.py", config], ["-m", "extensions_built_in.zit_merge", "preview", config]):
        if "preview" in words:
            section |= {"preview": {"prompts": ["a cat"]}, "model": {"name_or_path": str(place / "model"), "arch": "zimage"}}
            write(place, "unseen", job("unseen", section))
        done = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words)
        assert done.returncode != 0
        assert "2 processes were started (WORLD_SIZE), accelerate sees 1" in done.stdout + done.stderr
        assert "set ACCELERATE_USE_CPU=true" in done.stdout + done.stderr
        assert not (place / "output" / "unseen").exists()


@pytest.mark.parametrize("number", ["1", "", "many"])
def test_a_number_of_processes_that_says_nothing(place, run_python, number):
    section = {"type": "zit_merge", "training_folder": str(place / "output"), "shapes": "free"}
    section["steps"] = [{"name": "one", "loras": [{"lora": str(place / "style.safetensors"), "ratio": 1}]}]
    done = run_python("run.py", write(place, f"alone{number}", job(f"alone{number}", section)), WORLD_SIZE=number)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_toolkits_own_loader_reads_our_file(trained, place, run_python, tmp_path):
    """LoRASpecialNetwork, which trains and previews with a file, holds the wanted delta in every module."""
    folder, _ = trained
    path = folder / "merged_cat_v1_with_style.safetensors"
    torch.save(products(path), tmp_path / "wanted.pt")
    done = run_python(LOADER, place / "model", path, tmp_path / "wanted.pt")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "240 modules agree" in done.stdout


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_the_sentence_of_the_toolkits_error_steers_no_log_and_tells_no_variable(place, run_python, encoding):
    """On Windows the UI's log is not UTF-8: a letter that it lacks must not end the job with an error of its own."""
    step = {"name": "a", "loras": [{"lora": "style.safetensors", "ratio": 1}], "copy_to": "${MY_TOKEN}/\x1b[2J\u89d2\u202ex"}
    config = write(place, "hostile", job("hostile", merging(output_dir=str(place / "hostile"), steps=[step])))
    done = run_python("run.py", config, MY_TOKEN="s3cr3t_value", PYTHONIOENCODING=encoding)
    shown = "\u89d2" if encoding == "utf-8" else r"\u89d2"
    told = (done.stdout + done.stderr).splitlines()
    said = [line for line in told if "is not a folder: create it" in line and "raise " not in line]  # not the source
    assert done.returncode != 0 and said, done.stdout[-3000:] + done.stderr[-3000:]
    for line in said:
        assert rf"a: ${{MY_TOKEN}}/\x1b[2J{shown}\u202ex is not a folder" in line and "(process[0].steps[0].copy_to)" in line
        assert "s3cr3t" not in line and "\x1b" not in line and "UnicodeEncodeError" not in line

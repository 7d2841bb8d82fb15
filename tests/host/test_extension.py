"""The extension as AI-Toolkit sees it: registration, installation, and file names beside a job's own."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracles import producers

from extensions_built_in.zit_merge.cli import main as cli
from extensions_built_in.zit_merge.config.job import Job
from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.files.atomic import part_path
from extensions_built_in.zit_merge.planning.job import make_context
from extensions_built_in.zit_merge.planning.training import Training

REPO = Path(__file__).parents[2]


def test_the_package_imports_nothing_that_may_be_missing():
    """AI-Toolkit imports every extension at the start of every job: an import error here would break all of them."""
    code = (
        "import sys; before = set(sys.modules); import extensions_built_in.zit_merge; "
        "print(sorted(m for m in set(sys.modules) - before if not m.startswith('extensions_built_in')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.toolkit
def test_other_jobs_live_without_our_packages(run_python):
    """With pydantic, yaml, safetensors and tqdm out of reach, the toolkit still gets our class; only a job that uses it fails."""
    code = """
import sys
import toolkit.extension, jobs.process                     # what the toolkit itself needs
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "yaml", "safetensors", "tqdm"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Missing())
for name in [m for m in sys.modules if m.partition(".")[0] in ("pydantic", "yaml", "safetensors", "tqdm")]:
    del sys.modules[name]
import extensions_built_in.zit_merge as ours
[extension] = ours.AI_TOOLKIT_EXTENSIONS
print(extension.uid, extension.get_process().__name__)
"""
    done = run_python("-c", code)
    assert done.stdout.strip().endswith("zit_merge ZitMergeProcess"), done.stderr[-2000:]


@pytest.mark.toolkit
def test_the_toolkit_registers_the_process(run_python):
    code = "from toolkit.extension import get_all_extensions_process_dict as d; print('found', d()['zit_merge'].__name__)"
    assert "found ZitMergeProcess" in run_python("-c", code).stdout


@pytest.mark.toolkit
@pytest.mark.parametrize("copy", [False, True])
def test_install_puts_it_in_place_and_loads_it(toolkit, run_python, tmp_path, copy):
    view = tmp_path / "ai-toolkit"
    shutil.copytree(toolkit, view, symlinks=True)
    target = view / "extensions_built_in" / "zit_merge"
    target.unlink()
    for _ in range(2):  # again: an older link or copy of ours is replaced
        done = run_python("-m", "extensions_built_in.zit_merge", "install", view, *(["--copy"] if copy else []), cwd=REPO)
        assert done.returncode == 0, done.stderr
        assert "it loads there" in done.stdout
    assert target.is_symlink() is not copy and (target / "model" / "zimage.py").is_file()


@pytest.mark.toolkit
def test_a_copy_replaces_the_files_of_an_older_one(toolkit, run_python, tmp_path):
    """Before 0.4 most modules lay at the top; none of them is left beside the folders of today."""
    view = tmp_path / "ai-toolkit"
    shutil.copytree(toolkit, view, symlinks=True)
    target = view / "extensions_built_in" / "zit_merge"
    target.unlink()
    (target / "report").mkdir(parents=True)
    for name in ("__init__.py", "zimage.py", "cli.py", "merging.py", "plan.py", "report/text.py"):
        (target / name).write_text("raise ImportError('an old module')\n")
    done = run_python("-m", "extensions_built_in.zit_merge", "install", view, "--copy", cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"copied to {target}\nit loads there: process type zit_merge is ready\n\nnext: ")
    assert _files(target) == _files(REPO / "extensions_built_in" / "zit_merge") | {Path("installed.json")}
    code = "from toolkit.extension import get_all_extensions_process_dict as d; print('found', d()['zit_merge'].__module__)"
    done = run_python("-c", f"{code}; import extensions_built_in.zit_merge as z; print(z.__file__)", cwd=view)
    assert done.stdout.endswith(f"found extensions_built_in.zit_merge.host.process\n{target / '__init__.py'}\n"), done.stderr


def _files(folder: Path) -> set[Path]:
    """Below a folder, without what Python has compiled."""
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def test_install_refuses_what_is_no_toolkit(tmp_path, capsys):
    assert cli.main(["install", str(tmp_path)]) == 1
    assert "is no AI-Toolkit folder" in capsys.readouterr().err
    (tmp_path / "run.py").touch()
    other = tmp_path / "extensions_built_in" / "zit_merge"
    other.mkdir(parents=True)
    (other / "mine.txt").touch()
    assert cli.main(["install", str(tmp_path)]) == 1
    assert "exists and is not zit_merge" in capsys.readouterr().err
    assert (other / "mine.txt").exists()


HOSTILE = [
    "cat_v1",
    "m",
    "merged",
    "merged_x",
    "MERGED",
    "plugin",
    "[mz]",
    "[!a]",
    "zit*",
    "a b",
    "plugin",
    "\u00fcn\u00efc\u00f6de",
    "m_",
    "x[1]",
]


@pytest.mark.toolkit
@pytest.mark.parametrize("name", HOSTILE)
def test_a_resume_never_takes_our_files(toolkit, tmp_path, name):
    """The toolkit's own functions, with our newest files beside an older checkpoint of the job."""
    sys.path.append(str(toolkit))
    from jobs.process.BaseSDTrainProcess import BaseSDTrainProcess as Trainer

    folder = tmp_path / name
    folder.mkdir()
    own = folder / f"{name}_000000002.safetensors"
    own.touch()
    section = parse_section({"type": "zit_merge", "steps": [{"name": "soft", "loras": [{"lora": "trained", "ratio": 1}]}]})
    processes = [{"type": "diffusion_trainer", "training_folder": str(tmp_path), "network": {"type": "lora"}}, {}]
    context = make_context(Job(name, processes, tmp_path), 1, section)
    ours = context.output(section.steps[0]), part_path(context.output(section.steps[0]))
    for path in ours:
        path.touch()
        os.utime(path, (2e9, 2e9))
    trainer = SimpleNamespace(job=SimpleNamespace(name=name), save_root=str(folder), network_config=None)
    taken = Trainer.get_latest_save_path(trainer)
    assert taken is None or Path(taken) == own  # None: the toolkit itself can't find a name with brackets again
    trainer.accelerator = SimpleNamespace(is_main_process=True)
    trainer.embed_config, trainer.sd, trainer.save_config = None, None, SimpleNamespace(max_step_saves_to_keep=1)
    trainer.snr_gos = trainer.adapter_config = trainer.network_config = None
    Trainer.clean_up_saves(trainer)
    assert all(path.exists() for path in ours)


@pytest.mark.toolkit
@pytest.mark.parametrize("name", [*HOSTILE, "x_LoRA", "x_cn"])
def test_the_checkpoint_that_is_looked_at_is_the_one_that_the_toolkit_resumes_from(toolkit, tmp_path, name):
    sys.path.append(str(toolkit))
    from jobs.process.BaseSDTrainProcess import BaseSDTrainProcess as Trainer

    folder, pretrained = tmp_path / name, tmp_path / "pretrained.safetensors"
    folder.mkdir()
    pretrained.touch()
    config = {"training_folder": str(tmp_path), "network": {"type": "lora", "pretrained_lora_path": str(pretrained)}}
    network = SimpleNamespace(pretrained_lora_path=str(pretrained))
    trainer = SimpleNamespace(job=SimpleNamespace(name=name), save_root=str(folder), network_config=network)
    endings = ("_000000002.safetensors", ".safetensors", "_LoRA.safetensors", "_t2i.pt", "_cn", "_refiner_1.pt", "_1.pt", "x")
    for file in (None, "other.safetensors", *(f"{name}{ending}" for ending in endings)):
        if file:
            (folder / file).touch()
            time.sleep(0.01)  # the newest counts
        found = Training("process[0]", name, config).resumes_from()
        assert found == Path(Trainer.get_latest_save_path(trainer, name)), file


@pytest.mark.toolkit
@pytest.mark.parametrize(
    "gone, says",
    [
        ([("toolkit.scheduler", "get_lr_scheduler"), ("toolkit.optimizer", "get_optimizer"), ("toolkit.basic", "flush")], ""),
        ([("toolkit.config", "get_config"), ("toolkit.paths", "CONFIG_ROOT")], ""),
        ([("toolkit.accelerator", "get_accelerator")], "has no toolkit.accelerator.get_accelerator"),
    ],
)
def test_a_toolkit_that_lacks_a_part(run_python, tmp_path, gone, says):
    """A merge goes on without what it can do without; what it needs is named before anything runs."""
    made = producers.PRODUCERS["ai-toolkit"].make(producers.small_shapes(dim=8, ffn=16, temb=8, cap=8), 2, 0, torch.bfloat16)
    producers.save(made, tmp_path / "me.safetensors")
    section = {"type": "zit_merge", "shapes": "free", "device": "cpu", "output_dir": str(tmp_path / "out")}
    section["steps"] = [{"name": "a", "loras": [{"lora": str(tmp_path / "me.safetensors"), "ratio": 1}]}]
    code = f"""
import importlib
from collections import OrderedDict
from jobs import ExtensionJob
import toolkit.config, toolkit.optimizer, toolkit.basic, toolkit.paths, toolkit.scheduler
config = OrderedDict(job="extension", config=OrderedDict(name="x", process=[OrderedDict({section!r})]), meta=OrderedDict())
from toolkit.extension import get_all_extensions_process_dict
get_all_extensions_process_dict()
for module, name in {gone!r}:
    delattr(importlib.import_module(module), name)
ExtensionJob(config).run()
"""
    done = run_python("-c", code)
    if says:
        assert done.returncode != 0 and says in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "merged_x_a.safetensors").is_file() == (not says)

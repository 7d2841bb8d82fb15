"""LoRAs of the small world trained by the real AI-Toolkit: `diffusion_trainer`, arch `zimage:turbo`, in a process of its own.

The model goes there as a pipeline (`pipeline.export`), the pictures as PNG with a caption file each. Loss, times, optimizer,
rank, rate, batch and the number of steps are those of `loras.train_lora`; the order of the pictures and the noise are the
toolkit's. Its pictures have 8 bits a colour where ours are floats.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.benchmarks.small_world import world
from tests.benchmarks.small_world.loras import Recipe
from tests.benchmarks.small_world.pipeline import REDUCED, enlarged
from tests.host.shim import SHIM

ASKED = (
    "import importlib.util as u, torch; print(bool(torch.version.cuda), all(map(u.find_spec, ('oyaml', 'optimum', 'diffusers'))))"
)


def root() -> Path:
    """The toolkit's folder: $AI_TOOLKIT_ROOT, else `~/ai-toolkit`."""
    return Path(os.environ.get("AI_TOOLKIT_ROOT") or Path.home() / "ai-toolkit")


def python() -> str:
    """The Python that has the toolkit's packages: $AI_TOOLKIT_PYTHON, else this one."""
    return os.environ.get("AI_TOOLKIT_PYTHON") or sys.executable


def _asked() -> list[str]:
    done = subprocess.run([python(), "-c", ASKED], capture_output=True, text=True, check=False)
    return done.stdout.split() or ["False", "False"]


def missing() -> str:
    """What is not here, as a sentence; empty where the toolkit can run."""
    if not (root() / "run.py").is_file():
        return "no AI-Toolkit at $AI_TOOLKIT_ROOT or ~/ai-toolkit"
    if _asked()[1] != "True":
        return f"{python()} lacks AI-Toolkit's packages: set AI_TOOLKIT_PYTHON"
    return ""


def run(words: list[str], cwd: Path, log: Path, seed: int = 0) -> None:
    """Runs Python as the toolkit does, offline.

    Args:
        words: Of the command line, after Python's name.
        cwd: Working directory.
        log: Gets all output.
        seed: Of Python's, numpy's and torch's random numbers in `run.py`.

    Raises:
        RuntimeError: It failed; the message has the end of the output.
    """
    paths = [str(root())] + [str(SHIM)] * (_asked()[0] == "False")
    wanted = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "SEED": str(seed)}
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [python(), *words], cwd=cwd, env=os.environ | threads | wanted, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise RuntimeError(f"AI-Toolkit failed, see {log}:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


def write_pictures(pictures: world.Pictures, folder: Path) -> None:
    """A data set: 00.png with 00.txt and so on, each picture enlarged by 8.

    Args:
        pictures: With their captions.
        folder: Made.
    """
    folder.mkdir(parents=True)
    large = (enlarged(pictures.pixels) * 255).round().astype("uint8")
    for n, (picture, caption) in enumerate(zip(large, pictures.captions, strict=True)):
        Image.fromarray(picture).save(folder / f"{n:02}.png")
        (folder / f"{n:02}.txt").write_text(caption, encoding="utf-8")


def job(recipe: Recipe, pipeline: Path, work: Path, adapter: Path | None, times: str) -> dict[str, Any]:
    """The config of a training, float32 throughout.

    Args:
        recipe: Of the LoRA.
        pipeline: Folder of `pipeline.export`.
        work: `pictures` is below it, `output` will be.
        adapter: Training adapter, as AI-Toolkit's UI gives one with `zimage:turbo`: merged into the model for the training, and
            not part of the result.
        times: `train.timestep_type`.
    """
    model = {"name_or_path": str(pipeline), "arch": "zimage:turbo", "quantize": False}
    process = {
        "type": "diffusion_trainer",
        "training_folder": str(work / "output"),
        "network": {"type": "lora", "linear": recipe.rank, "linear_alpha": recipe.rank},
        "save": {"dtype": "float32", "save_every": recipe.steps + 1},
        "datasets": [
            {
                "folder_path": str(work / "pictures"),
                "caption_ext": "txt",
                "resolution": [world.SIZE * REDUCED],
                "cache_latents_to_disk": True,
                "num_workers": 0,
            }
        ],
        "train": {
            "batch_size": recipe.batch,
            "steps": recipe.steps,
            "lr": recipe.rate,
            "optimizer": "adamw",
            "optimizer_params": {"weight_decay": 1e-4},
            "noise_scheduler": "flowmatch",
            "timestep_type": times,
            "gradient_checkpointing": False,
            "cache_text_embeddings": True,
            "disable_sampling": True,
            "dtype": "float32",
        },
        "logging": {"log_every": 1, "use_ui_logger": True},
        "model": model | ({"assistant_lora_path": str(adapter)} if adapter else {}),
        "sample": {"samples": []},
    }
    return {"job": "extension", "config": {"name": "trained", "process": [process]}}


def train_lora(
    recipe: Recipe, pipeline: Path, path: Path, work: Path, adapter: Path | None = None, times: str = "sigmoid"
) -> list[float]:
    """Trains a LoRA in the toolkit; returns the loss of each step but the first, which it does not log.

    Args:
        recipe: How.
        pipeline: Folder of `pipeline.export`.
        path: Of the LoRA, which `loras.load` reads. Its log lies beside it.
        work: An empty folder for pictures, caches and the toolkit's output.
        adapter: File of a training adapter.
        times: `sigmoid` as in our own training but without its shift, or `weighted` as AI-Toolkit's UI writes.

    Raises:
        RuntimeError: The toolkit failed; the message has the end of its output.
    """
    work = work.resolve()
    write_pictures(recipe.draw(), work / "pictures")
    config = job(recipe, pipeline.resolve(), work, adapter and adapter.resolve(), times)
    (work / "job.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    run([str(root() / "run.py"), str(work / "job.json")], work, path.with_suffix(".log"), recipe.seed)
    made = work / "output" / "trained"
    fresh = path.with_suffix(".new")
    shutil.copyfile(made / "trained.safetensors", fresh)  # `work` may lie on another disk
    fresh.replace(path)
    with closing(sqlite3.connect(made / "loss_log.db")) as base:
        rows = base.execute("SELECT value_real FROM metrics WHERE key = 'loss/loss' ORDER BY step").fetchall()
    return [loss for (loss,) in rows]

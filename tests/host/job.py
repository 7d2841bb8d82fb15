"""A real training job on the tiny Z-Image, as data."""


def training(folder, name: str, **changes) -> dict:
    """A diffusion_trainer process like the one AI-Toolkit's UI writes, at the smallest size."""
    process = {
        "type": "diffusion_trainer",
        "training_folder": str(folder / "output"),
        "device": "cuda",
        "performance_log_every": 10,
        "network": {"type": "lora", "linear": 4, "linear_alpha": 4},
        "save": {"dtype": "bf16", "save_every": 1, "max_step_saves_to_keep": 4},
        "datasets": [{"folder_path": str(folder / "dataset"), "caption_ext": "txt", "resolution": [64], "num_workers": 0}],
        "train": {
            "batch_size": 1,
            "steps": 3,
            "gradient_checkpointing": True,
            "noise_scheduler": "flowmatch",
            "optimizer": "adamw",
            "timestep_type": "weighted",
            "lr": 0.01,
            "disable_sampling": True,
            "dtype": "bf16",
        },
        "model": {"name_or_path": str(folder / "model"), "arch": "zimage:turbo", "quantize": False},
        "sample": {"sampler": "flowmatch", "width": 64, "height": 64, "samples": [{"prompt": "a cat"}], "sample_steps": 2},
    }
    return process | changes


def job(name: str, *processes: dict) -> dict:
    """The whole config."""
    return {
        "job": "extension",
        "config": {"name": name, "process": list(processes)},
        "meta": {"name": "[name]", "version": "1.0"},
    }

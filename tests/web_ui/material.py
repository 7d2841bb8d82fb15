"""What the jobs of these tests are made of: a tiny model, LoRAs, and configs as files and as texts to paste."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from host import tiny_zimage
from host.job import job, training
from oracles import producers

EXAMPLE = Path(__file__).parents[2] / "config" / "examples" / "ui_merge_job.yaml"
STUDIO = EXAMPLE.with_name("studio.yaml")
SAMPLES = [{"prompt": "a cat"}, {"prompt": "a dog"}]


class Material:
    """A folder with the tiny model, its pictures and two LoRAs that fit it.

    Args:
        folder: An empty one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.loras = folder / "loras"
        self.loras.mkdir()
        tiny_zimage.make_model(folder / "model")
        tiny_zimage.make_dataset(folder / "dataset")
        shapes = tiny_zimage.linear_shapes(tiny_zimage.transformer())
        for name, producer, seed in (("me", "ai-toolkit", 1), ("style", "onetrainer-kohya", 5)):
            made = producers.PRODUCERS[producer].make(shapes, 3, seed, torch.bfloat16)
            producers.save(made, self.loras / f"{name}.safetensors")

    def training(self, name: str, **save: object) -> Path:
        """A job that trains three steps and samples; to import."""
        process = training(self.folder, name)
        process["save"] |= save
        process["train"]["disable_sampling"] = False
        process["sample"] |= {"samples": SAMPLES, "guidance_scale": 1, "seed": 42, "walk_seed": True}
        return self._write(name, job(name, process))

    def _write(self, name: str, config: dict) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path

    def merge(self, name: str) -> Path:
        """The example for the UI, with paths that exist here and the tiny model's shapes."""
        text = EXAMPLE.read_text(encoding="utf-8").replace("/path/to/loras", str(self.loras))
        text = text.replace("my_ui_merge", name).replace("- type: zit_merge", "- type: zit_merge\n      shapes: free")
        path = self.folder / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def merge_with_pictures(self, name: str, prompts: int, steps: int) -> Path:
        """The same with pictures of each result."""
        config = yaml.safe_load(self.merge(name).read_text(encoding="utf-8"))
        (process,) = config["config"]["process"]
        process["model"]["name_or_path"] = str(self.folder / "model")
        asked = {"prompts": [f"a cat {n}" for n in range(prompts)], "size": 64, "steps": steps}
        process["preview"] = asked
        return self._write(name, config)

    def studio(self, name: str) -> Path:
        """The example of the studio, with paths that exist here and small pictures."""
        text = STUDIO.read_text(encoding="utf-8").replace("/path/to/loras", str(self.loras))
        config = yaml.safe_load(text.replace("my_studio", name))
        (process,) = config["config"]["process"]
        process |= {"shapes": "free", "model": process["model"] | {"name_or_path": str(self.folder / "model")}}
        process["sample"] |= {"width": 128, "height": 128, "sample_steps": 2, "samples": SAMPLES}
        return self._write(name, config)

    def section(self, typo: bool = False) -> str:
        """A section as the README shows one, to paste below `process:`."""
        key = "lorras" if typo else "loras"
        return f"""\
    - type: zit_merge
      shapes: free
      preview: true
      steps:
        - name: soft
          loras:
            - {{lora: trained, ratio: 0.9, blocks: {{attention: 0.5}}}}
        - name: with_style
          {key}:
            - {{lora: soft, ratio: 1.0}}
            - {{lora: {self.loras}/style.safetensors, ratio: 0.6}}
"""

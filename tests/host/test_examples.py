"""The example configs: against our schema, and with AI-Toolkit's own config classes where it is at hand."""

import copy
import inspect
import re
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from oracles import producers

from extensions_built_in.zit_merge.cli import main as cli
from extensions_built_in.zit_merge.config.job import load_job

EXAMPLES = sorted((Path(__file__).parents[2] / "config" / "examples").glob("*.yaml"))
TRAINING = next(p for p in EXAMPLES if p.stem == "train_zit_lora_then_merge")


def test_the_examples_are_there():
    assert {p.stem for p in EXAMPLES} >= {"train_zit_lora_then_merge", "merge_loras", "block_weights"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_each_opens_with_what_it_is_for_and_fits_the_schema(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and text.isascii()
    assert "${" not in text, "AI-Toolkit replaces variables in comments too, and stops if one is not set"
    assert load_job(path).sections()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_each_passes_check_with_files_in_place(path, tmp_path, monkeypatch, capsys):
    """The placeholder paths are made to exist; everything else stays as a user has it."""
    text = path.read_text(encoding="utf-8").replace("/path/to/loras", str(tmp_path))
    text = text.replace("/path/to/models/tuned.safetensors", str(checkpoints.write_one(tmp_path / "tuned", checkpoints.model())))
    for name in re.findall(rf"{re.escape(str(tmp_path))}/([\w.-]+\.safetensors)", text):
        producer = producers.PRODUCERS["ai-toolkit-lokr" if "lokr" in name else "ai-toolkit"]
        producers.save(producer.make(producers.small_shapes(), 4, 1, torch.bfloat16), tmp_path / name)
    config = tmp_path / path.name
    config.write_text(text.replace("type: zit_merge", "type: zit_merge\n      shapes: free"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", str(config)]) == 0, capsys.readouterr().err


@pytest.mark.toolkit
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_toolkit_loads_each(toolkit, path):
    sys.path.append(str(toolkit))
    from toolkit.config import get_config

    assert get_config(str(path))["config"]["process"][-1]["type"] == "zit_merge"


@pytest.mark.toolkit
def test_the_training_section_means_what_the_blog_says(toolkit):
    """process[0] through the toolkit's own config classes, the way BaseSDTrainProcess reads it; no key goes unread."""
    sys.path.append(str(toolkit))
    from toolkit import config_modules as cm
    from toolkit.config import get_config

    section = copy.deepcopy(get_config(str(TRAINING))["config"]["process"][0])
    train = cm.TrainConfig(**section["train"])
    model = cm.ModelConfig(**{**section["model"], "dtype": train.dtype})
    network, save, sample = (
        cm.NetworkConfig(**section["network"]),
        cm.SaveConfig(**section["save"]),
        cm.SampleConfig(**section["sample"]),
    )
    [dataset] = [cm.DatasetConfig(**d) for d in cm.preprocess_dataset_raw_config(section["datasets"])]
    cm.validate_configs(train, model, save, [dataset])
    assert (train.batch_size, train.steps, train.cache_text_embeddings) == (1, 5000, True)
    assert (train.do_differential_guidance, train.differential_guidance_scale) == (True, 3)
    assert (dataset.resolution, dataset.cache_latents_to_disk, dataset.num_repeats) == (1024, True, 1)
    assert model.arch == "zimage" and len(model.assistant_lora_path.split("/")) == 3
    assert (network.type, network.linear) == ("lora", 32) and len(sample.samples) == 1
    owners = {"network": cm.NetworkConfig, "train": cm.TrainConfig, "model": cm.ModelConfig, "save": cm.SaveConfig}
    owners |= {"sample": cm.SampleConfig, "logging": cm.LoggingConfig, "datasets": cm.DatasetConfig}
    for key, owner in owners.items():
        read = set(re.findall(r"kwargs\.get\(\s*['\"](\w+)['\"]", inspect.getsource(owner)))
        for part in section[key] if isinstance(section[key], list) else [section[key]]:
            assert set(part) <= read, key

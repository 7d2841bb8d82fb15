"""Run with AI-Toolkit: the prediction that its trainer asks for, while its own network wears a LoRA.

usage: wear_in_toolkit.py PIPELINE LORA GIVEN OUT [TRAINING_ADAPTER]

GIVEN holds noisy (n, 3, h, w), sigma (n,) and features, a list of (words, width); OUT gets the prediction, (n, 3, h, w).
"""

import sys
from pathlib import Path

import torch
from toolkit.prompt_utils import PromptEmbeds

sys.path.insert(0, str(Path(__file__).parents[2] / "host"))

from toolkit_network import loaded

pipeline, lora, given, out, *adapter = sys.argv[1:]
sd, network = loaded(pipeline, lora, next(iter(adapter), None))
data = torch.load(given)
with torch.no_grad(), network:
    embeds = PromptEmbeds([data["features"], None])
    torch.save(sd.get_noise_prediction(data["noisy"], data["sigma"] * 1000, embeds).cpu(), out)

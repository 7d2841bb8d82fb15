"""diffusers reads LoRAs: `ZImagePipeline.load_lora_weights` and `fuse_lora`, the release that comes first on sys.path."""

from pathlib import Path

import answers
import diffusers


def read(path: Path) -> answers.Deltas:
    """The fused weights; the base is zero."""
    model = answers.zero_model()
    pipe = diffusers.ZImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=model)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)  # older releases want it so when offline
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return answers.weights(model)


answers.main("diffusers", diffusers.__version__, read)

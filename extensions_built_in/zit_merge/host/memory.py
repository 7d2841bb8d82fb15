"""Releases what a trainer leaves in memory.

AI-Toolkit's trainer deletes its own names for the models when it ends, but the accelerator, the optimizer, the data loader and
some lists keep every one of them alive: transformer, text encoder, VAE, network (measured by counting live modules). A merge has
no use for them, and neither has a model that is loaded afterwards.
"""

from __future__ import annotations

import gc

# Attributes of BaseSDTrainProcess and SDTrainer that hold a model, or something that holds one.
_HOLDERS = (
    *("optimizer", "lr_scheduler", "params", "data_loader", "data_loader_reg", "ema", "sd", "network", "adapter"),
    *("assistant_adapter", "embedding", "decorator", "taesd", "dfe", "snr_gos", "_validation_cache", "unconditional_embeds"),
    *("cached_blank_embeds", "cached_trigger_embeds", "diff_output_preservation_embeds", "torch_profiler"),
)


def release(trainer: object) -> None:
    """Lets go of a trainer's models; what an older or newer trainer does not have is passed over.

    Args:
        trainer: A process of the job that has run.
    """
    from . import toolkit

    if hasattr(trainer, "modules_being_trained"):
        trainer.modules_being_trained = []
    for name in _HOLDERS:
        if getattr(trainer, name, None) is not None:
            setattr(trainer, name, None)
    toolkit.accelerator().free_memory()
    gc.collect()
    toolkit.flush()

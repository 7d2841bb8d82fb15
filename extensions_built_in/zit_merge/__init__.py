"""zit_merge: merges Z-Image Turbo LoRAs, block by block, as a process of AI-Toolkit or on its own.

AI-Toolkit imports every extension at the start of every job, so nothing is imported here that could be missing or slow.
"""

__version__ = "0.4.0"
__all__ = ["AI_TOOLKIT_EXTENSIONS", "ZitMergeError", "load_lora", "merge"]

_PUBLIC = {"load_lora": ".formats.reader", "merge": ".api", "ZitMergeError": ".errors"}


def __getattr__(name):
    from importlib import import_module

    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    if name == "AI_TOOLKIT_EXTENSIONS":
        return import_module(".host.extension", __name__).AI_TOOLKIT_EXTENSIONS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

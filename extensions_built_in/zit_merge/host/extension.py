"""The registration that AI-Toolkit looks for. It runs at the start of every job of every user, so it imports next to nothing."""

from __future__ import annotations

from toolkit.extension import Extension


class ZitMergeExtension(Extension):
    """Registers the process type `zit_merge`."""

    uid = "zit_merge"
    name = "Z-Image LoRA merge"

    @classmethod
    def get_process(cls):
        """The process class; what it needs is imported when one is made."""
        from .process import ZitMergeProcess

        return ZitMergeProcess


AI_TOOLKIT_EXTENSIONS = [ZitMergeExtension]

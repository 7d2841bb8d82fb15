"""Stands in for torchaudio where only a CUDA build of it exists; see sitecustomize.py."""

__version__ = "0"

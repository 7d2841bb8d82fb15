"""Where a section runs: the folders that it reads from and writes to, and the training before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.schema import Step
from ..errors import joined
from ..files.paths import USUAL_PREFIX, file_name
from .training import Training

# The first that no glob of the toolkit matches is taken; single letters get past patterns such as [!a]*.
PREFIXES = (USUAL_PREFIX, "zit_merge_", *(f"{c}_merged_" for c in "abcdefghijklmnopqrstuvwxyz0123456789"))


@dataclass(frozen=True)
class RunContext:
    """Where a section runs.

    Attributes:
        job: The job's name.
        loc: Of the section: `process[1]`; empty for a recipe and for `merge`.
        output_dir: Where files go.
        training: The training before us, if any.
        folders: Where relative LoRA paths start, in order.
        lora_folders: `--loras`: where inputs are looked for by name and hash.
        prefix: What output names begin with.
        file: The one output, where it was named (`merge -o`).
        baked: The one model that is written, where it was named (`bake -o`).
        may_download: Whether sources on the Hugging Face hub may be fetched; else only the local cache is looked at.
        home: Whose folder is the job's own, where AI-Toolkit's UI looks; None where the command line names another one.
    """

    job: str
    loc: str
    output_dir: Path
    training: Training | None = None
    folders: Sequence[Path] = (Path(),)
    lora_folders: Sequence[Path] = ()
    prefix: str = USUAL_PREFIX
    file: Path | None = None
    baked: Path | None = None
    may_download: bool = False
    home: Training | None = None

    def output(self, step: Step) -> Path:
        """The file that a step writes."""
        return self.file or self.output_dir / (step.file or f"{self.prefix}{file_name(self.job)}_{step.name}.safetensors")

    def at(self, key: str) -> str:
        """The location of a key of the section."""
        return joined(self.loc, key)

    def claims(self, path: Path) -> bool:
        """Whether the toolkit would take a file or folder for a checkpoint of the training before us, or of the job's own."""
        return any(training.claims(path) for training in (self.home, self.training) if training)

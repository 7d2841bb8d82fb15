"""The file of the steps that were kept: the section with them, beside the job, so that nothing is lost when the tab closes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.plain import plain_keys
from ..files.atomic import os_errors, write_whole
from ..files.paths import file_name
from ..files.text import to_yaml
from ..planning.context import RunContext
from ..wording import masked

_FROM_UI = ("sqlite_db_path", "performance_log_every")  # which the UI writes into the first process


@dataclass
class StepsFile:
    """A section in a file of ours.

    Attributes:
        path: The file; another number behind its name where there is one already, of an earlier studio or of one beside us.
        place: Of the section in its job: `process[1]`; empty where it stands alone.
        job: The job's name.
    """

    path: Path
    place: str
    job: str
    _is_ours: bool = False

    def write(self, section: Mapping[str, Any]) -> None:
        """Writes the section; the file is replaced at once or not at all.

        Args:
            section: As a config has it.

        Raises:
            ZitMergeError: It can't be written.
        """
        where = f"in the place of {self.place} of the job {self.job}" if self.place else "under process: of a job"
        head = f"# What was kept in the studio: paste it {where}.\n"
        kept = {key: _public(value) for key, value in plain_keys(section).items() if key not in _FROM_UI}
        with os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._claim()
            write_whole(self.path, [head.encode(), to_yaml([kept], unicode=True).encode()])

    def _claim(self) -> None:
        """Takes the first name that nobody has."""
        stem, number = self.path.stem, 1
        while not self._is_ours:
            try:
                self.path.open("x").close()
                self._is_ours = True
            except FileExistsError:
                number += 1
                self.path = self.path.with_name(f"{stem}_{number}.yaml")


def _public(value: Any) -> Any:
    """With `${NAME}` again where the config took a value from the environment."""
    if isinstance(value, Mapping):
        return {key: _public(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    return masked(value) if isinstance(value, str) else value


def steps_file(context: RunContext) -> StepsFile:
    """The file of a section.

    Args:
        context: Where the section runs.
    """
    folder = context.home.folder if context.home else context.output_dir
    return StepsFile(folder / f"{context.prefix}{file_name(context.job)}_studio.yaml", context.loc, context.job)

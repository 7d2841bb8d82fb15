"""alpha / rank, and what turns an OFT's numbers into rotations: where a file says it, and what to do where it does not."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..errors import ZitMergeError, counted
from ..files.extent import read_json
from ..files.text import TextFile
from .algorithms import Rotation
from .changes import Group
from .metadata import VERSION_KEY, Adapter, read_adapter
from .reading import Reading

ADAPTER_KEY = "lora_adapter_metadata"  # diffusers, SimpleTuner
ADAPTER_FILE = "adapter_config.json"  # peft save_pretrained
_PUT_CONFIG = f"put the {ADAPTER_FILE} that PEFT saved with it there"
ENDLESS = 1e9  # AI-Toolkit writes 9999999999 beside whole LoKr factors, in any dtype; inf in fp16


class Alphas(Protocol):
    """What a file's header says of alpha; see `header.Header`."""

    path: Path
    metadata: dict[str, str]

    def alpha(self, key: str) -> float:
        """An alpha as stored, finite or not."""

    def error(self, text: str) -> ZitMergeError:
        """An error of this file."""


class Scales:
    """The scale of every change of a file.

    Attributes:
        adapter: The PEFT config that gives scales or rotations here, if one does.
        rotation: Of an OFT that is stored as triangles.
        questions, remarks: As in LoraFile.
    """

    def __init__(self, header: Alphas, groups: Sequence[Group], reading: Reading):
        self._header, self._reading = header, reading
        self._zeros: list[str] = []
        self._negative = 0
        self._idle: set[float] = set()  # alphas that have no meaning, as stored
        self._adapter_scales: set[float] = set()
        self.questions: list[str] = []
        self.remarks: list[str] = []
        scaled = [g for g in groups if g.is_scaled]
        self.rotation = _onetrainer(header.metadata, groups)
        self.adapter = self._find_adapter(groups)
        if reading.alpha == "key" and scaled and not any(g.alpha for g in scaled):
            self.questions.append("alpha: key was asked for, but the file has no alpha keys: use metadata, none or a number")

    def _find_adapter(self, groups: Sequence[Group]) -> Adapter | None:
        """The adapter's config, where the tensors do not say alpha or the form of an OFT, or where it was asked for."""
        is_peft = any("base_model." in g.prefix for g in groups)
        asked = self._reading.alpha == "metadata"
        scaled = (g for g in groups if g.is_scaled or (is_peft and g.algorithm == "LoKr"))
        missing = self._reading.alpha is None and any(g.alpha is None for g in scaled)
        packed = None if self.rotation else next((g.keys["packed"] for g in groups if "packed" in g.keys), None)
        if not asked and not missing and not packed:
            return None
        beside = self._header.path.with_name(ADAPTER_FILE)
        try:
            found = self._reading.adapter or self._read_adapter(beside, is_near=is_peft or packed is not None)
            if found and bool(found.rotation) != bool(packed):
                raise ValueError(f"{found.source} is of {found.kind}, which is another form than the tensors'")
        except (ValueError, ZitMergeError) as e:
            why = f"{ADAPTER_FILE} {str(e).removeprefix(f'{beside}: ').partition(': ')[0]}" if isinstance(e, ZitMergeError) else e
            self.questions.append(
                f"{packed} is OFT, whose form is outside of the tensors, but {why}: {_PUT_CONFIG}"
                if packed
                else f"alpha is outside of the tensors, but {why}: set alpha: none (alpha is the rank) or a number"
            )
            return None
        if found:
            self.rotation = self.rotation or found.rotation
        elif packed:
            self.questions.append(
                f"{packed} is OFT, and only {ADAPTER_FILE}, which is not beside the file, says whether its rotations are exact "
                f"or cut off (use_cayley_neumann): {_PUT_CONFIG}"
            )
        elif asked:
            self.questions.append(
                f"alpha: metadata was asked for, but there is no {ADAPTER_KEY} in the file and no {ADAPTER_FILE} beside it: "
                "use key, none or a number"
            )
        elif is_peft:
            self.questions.append(
                f"a PEFT adapter's alpha is in {ADAPTER_FILE}, which is not beside the file: put it there, or set "
                "alpha: none (alpha is the rank) or a number"
            )
        return found

    def _read_adapter(self, beside: Path, *, is_near: bool) -> Adapter | None:
        """The adapter's config from the file's metadata, or from beside it where a program is known to put it."""
        if ADAPTER_KEY in self._header.metadata:
            return read_adapter(self._header.metadata[ADAPTER_KEY], ADAPTER_KEY)
        if (is_near or self._header.path.name == "adapter_model.safetensors") and os.path.lexists(beside):
            return read_adapter(TextFile.read(beside).text, ADAPTER_FILE)
        return None

    def __call__(self, group: Group, module: str, rank: int) -> tuple[float, float | None]:
        """(alpha / rank, alpha as stored) of one module of a group."""
        stored = self._header.alpha(group.alpha) if group.alpha else None
        if group.is_bounded:
            if stored is not None and not math.isfinite(stored):
                raise self._header.error(f"{group.alpha} is {stored}, so its OFT has no defined constraint: get a whole file")
            return 1.0, stored
        if not group.is_scaled and not (self.adapter and self.adapter.kind == "LOKR"):
            if stored is not None and abs(stored) < ENDLESS and VERSION_KEY not in self._header.metadata:  # ours: see lokr.py
                self._idle.add(stored)
            return 1.0, stored
        asked = self._reading.alpha
        if asked == "none":
            return 1.0, stored
        if isinstance(asked, int | float):
            return asked / rank, stored
        if stored is None or asked == "metadata":
            scale = self.adapter.scale(module, rank) if self.adapter else 1.0
            self._adapter_scales.add(scale)
            if self.adapter and scale == 0 and asked is None:
                self._zeros.append(f"alpha of {module} in {self.adapter.source}")
            return scale, stored
        if not math.isfinite(stored):
            raise self._header.error(
                f"{group.alpha} is {stored}, so the LoRA has no defined strength: get a whole file, or set alpha: none (alpha is "
                "the rank) or a number"
            )
        if stored == 0 and asked is None and group.alpha and group.alpha not in self._zeros:
            self._zeros.append(group.alpha)
        self._negative += stored < 0
        return stored / rank, stored

    def conclude(self) -> None:
        """Adds what was seen while the scales were asked for to `questions` and `remarks`."""
        if self._zeros:
            more = f" and {len(self._zeros) - 1} more" if len(self._zeros) > 1 else ""
            self.questions.append(
                f"{self._zeros[0]}{more} is 0, which trainers take for alpha = rank and programs for no effect: "
                f"set alpha: none (alpha is the rank) or alpha: {'metadata' if self.adapter else 'key'} (no effect)"
            )
        if self._idle:
            values = f"{min(self._idle):g}" if len(self._idle) == 1 else f"{min(self._idle):g} to {max(self._idle):g}"
            self.remarks.append(
                f"alpha ({values}) stands beside whole LoKr factors or differences, where it has no meaning, and is ignored as "
                "in every program: the strength is 1, whatever rank the metadata name"
            )
        if self._negative:
            self.remarks.append(f"alpha is negative in {counted(self._negative, 'module')}, its sign is kept")
        if self.adapter and self._adapter_scales - {1.0}:
            low, high = min(self._adapter_scales), max(self._adapter_scales)
            span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            self.remarks.append(
                f"alpha stands only in {self.adapter.source}: alpha / rank = {span} is applied, as diffusers and PEFT do; "
                "ComfyUI takes 1 (alpha: none does the same here)"
            )


def _onetrainer(metadata: Mapping[str, str], groups: Sequence[Group]) -> Rotation | None:
    """How OneTrainer rotates: five terms, bounded where its config says so. Without the config the bound is left out: what is
    stored was within it before the last step of the training."""
    if not any(key.startswith("ot_") for key in metadata) and not any("scaled" in g.keys for g in groups):
        return None
    try:
        config = read_json(metadata.get("ot_config", "{}"))
    except ValueError:
        config = None
    config = config if isinstance(config, dict) else {}
    eps = config.get("coft_eps")
    is_bound = bool(config.get("oft_coft")) and isinstance(eps, int | float) and math.isfinite(eps)
    return Rotation(5, bound=float(eps) if is_bound and isinstance(eps, int | float) else None)

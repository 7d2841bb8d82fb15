"""The names of the forms that a change can have, and what is known of one beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass

FULL = "full difference"
DORA, OFT, BOFT, IA3, GLORA, SET = "DoRA", "OFT", "BOFT", "IA3", "GLoRA", "replaced weight"
BASED = (DORA, OFT, BOFT, IA3, GLORA, SET)  # W' - W, which can be told with the base model's weight W only


@dataclass(frozen=True)
class Rotation:
    """How the triangles of an OFT become rotations (peft tuners/oft/config.py): the tensors do not tell.

    Attributes:
        terms: Of Neumann's series in the place of an inverse (`use_cayley_neumann`); None is the inverse.
        is_old: As PEFT before 0.18 sums it.
        bound: Of the norms of the blocks (`coft` with its `eps`), or None.
    """

    terms: int | None
    is_old: bool = False
    bound: float | None = None


def told(algorithm: str) -> str:
    """What a sentence says that a tensor is.

    Args:
        algorithm: As in `Change`.
    """
    return f"a {algorithm}" if algorithm in (FULL, SET) else algorithm

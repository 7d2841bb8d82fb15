"""The strengths of one LoRA, from its keys."""

from __future__ import annotations

from ..config.schema import Lora
from ..errors import SettingError
from ..model.strengths import Weights, compact, factors, strengths


def lora_factors(spec: Lora) -> dict[str, float]:
    """Module -> factor of a LoRA's weights.

    Raises:
        SettingError: Keys that select nothing or overlap, a strength that is no number, a recipe's table that does not fit.
    """
    try:
        found = factors(Weights(**spec.tables))
    except SettingError as e:
        if spec.preset and "overlap" in e.message:  # one of the two may be a key that the user never typed
            raise SettingError(f"{e.message} (the preset {spec.preset} has entries of its own there)", e.loc) from None
        raise
    table = strengths(spec.ratio, found)
    if spec.strengths is not None and spec.strengths != compact(table):
        raise SettingError(
            "the table does not follow from ratio, blocks, layers, effects and overrides: drop it if you changed them; else "
            "another version of zit_merge made this recipe",
            "strengths",
        )
    return found

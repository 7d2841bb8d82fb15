"""Static pictures of numbers. `canvas`, `heatmap` and what draws on them import matplotlib, which is loaded when it is drawn."""

from ...errors import ZitMergeError


def require_matplotlib(what: str) -> None:
    """Loads matplotlib.

    Args:
        what: What needs it, for messages.

    Raises:
        ZitMergeError: It is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ZitMergeError(f"{what} needs matplotlib ({e}): python -m pip install matplotlib") from e

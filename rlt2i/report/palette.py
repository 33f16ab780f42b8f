"""Colours that survive colour-blindness, dark mode and a grey printer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SERIES = ("#0072B2", "#D55E00", "#007A5A", "#A6439A", "#8A6D00", "#4C4C4C")
"""Okabe and Ito's hues, darkened until each has a contrast of 3:1 against white."""

SERIES_DARK = ("#5BB3E6", "#FF9A57", "#4FC9A2", "#E08FD6", "#DDBB4A", "#BDBDBD")
"""The same hues in the same order, for a dark page."""

SUCCESS = "#2A8C4A"
FAILURE = "#C8442E"
NEUTRAL = "#9A9A9A"

_VIRIDIS = (
    "#440154", "#482878", "#3E4989", "#31688E", "#26828E",
    "#1F9E89", "#35B779", "#6DCD59", "#B4DE2C", "#FDE725",
)  # fmt: skip


def rgb(colour: str) -> tuple[int, int, int]:
    """'#RRGGBB' to three integers."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


_TABLE = np.array([rgb(colour) for colour in _VIRIDIS], dtype=np.float64)


def colour_map(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Viridis by linear interpolation of ten anchors: lightness rises evenly with the value.

    Args:
        values: [...] in [0, 1]; values outside are clipped, nan is shown as 0.

    Returns:
        [..., 3] uint8.
    """
    position = np.nan_to_num(np.clip(values, 0.0, 1.0)) * (len(_TABLE) - 1)
    lower = np.minimum(position.astype(np.int64), len(_TABLE) - 2)
    share = (position - lower)[..., None]
    return np.rint(_TABLE[lower] * (1 - share) + _TABLE[lower + 1] * share).astype(np.uint8)


def colour_stops() -> tuple[str, ...]:
    """The anchors, evenly spaced from 0 to 1, for a gradient in CSS or SVG."""
    return _VIRIDIS

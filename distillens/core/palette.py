"""One colour a name, everywhere: those of the paper's figures where it has them."""

from __future__ import annotations

import zlib

_PAPER = {
    "real": "#000000",
    "full data": "#000000",
    "bptt": "#E69F00",
    "dm": "#0072B2",
    "dc": "#009E73",
    "mtt": "#CC79A7",
    "random_subset": "#7F7F7F",
    "herding": "#B0A18F",
}
_OTHERS = ("#56B4E9", "#D55E00", "#8C6BB1", "#A6761D", "#66A61E", "#E7298A")


def colour(name: str) -> str:
    """A hex colour; a name that the paper does not draw keeps one of its own, whatever stands beside it."""
    return _PAPER.get(name) or _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]

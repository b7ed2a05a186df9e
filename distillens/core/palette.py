"""One colour a name, everywhere: those of the paper's figures where it has them."""

from __future__ import annotations

import zlib

_KNOWN = {
    "real": "#000000",
    "full data": "#000000",
    "bptt": "#E69F00",
    "dm": "#0072B2",
    "dc": "#009E73",
    "mtt": "#CC79A7",
    "random_subset": "#7F7F7F",
    "herding": "#B0A18F",
    # The paper does not draw these.
    "tesla": "#A6761D",
    "ftd": "#D55E00",
    "datm": "#66A61E",
    "wang2018": "#56B4E9",
    "rtp": "#8C6BB1",
    "rat_bptt": "#7B1E3A",
    "kip": "#1B7837",
    "frepo": "#E6550D",
    "k_center": "#C9A227",
    "k_means": "#8FBC94",
    "el2n": "#4F6D7A",
    "grand": "#9DB4C0",
    "forgetting": "#C08497",
    "m3d": "#2F4B9C",
    "ncfm": "#17799C",
    "dsa": "#4DAF8C",
    "idc": "#A6B92F",
}
_OTHERS = ("#E7298A", "#1F9E9E", "#3B528B", "#B5A000", "#A0522D", "#5E8C31")


def colour(name: str) -> str:
    """A hex colour; a name that is not known keeps one of its own, whatever stands beside it."""
    return _KNOWN.get(name) or _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]

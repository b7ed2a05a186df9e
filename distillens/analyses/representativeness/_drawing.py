"""How curves along real training are drawn: colours, the axis of updates, the legend above."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillens.analyses.representativeness._beside import SEEN, TEST, UNSEEN
from distillens.core.palette import colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def tint(name: str) -> str:
    """The colour of a name; real images are black."""
    return colour("real" if name in (TEST, UNSEEN, SEEN) else name)


def dashes(name: str) -> str:
    """The line of a name: of real images of the sets' number the unseen ones are dashed, those of the training dotted."""
    return {UNSEEN: "--", SEEN: ":"}.get(name, "-")


def axis_of_updates(ax: Axes, last: int) -> None:
    """Updates of real training, linear up to the eighth, then their logarithm: as the moments lie."""
    ax.set_xscale("symlog", linthresh=8)
    ticks = [t for t in (0, 4, 8, 16, 32, 64, 128, 256, 512) if t <= last]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set_xlim(-0.2, last * 1.02)
    ax.set_xlabel("updates of real training")
    ax.spines[["top", "right"]].set_visible(False)


def legend_above(ax: Axes, entries: int) -> None:
    """A legend over the picture, in up to four columns."""
    columns = min(entries, 4)
    ax.legend(frameon=False, fontsize=8, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    ax.spines[["top", "right"]].set_visible(False)

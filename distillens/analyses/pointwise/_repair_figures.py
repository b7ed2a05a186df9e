"""The figures of a repair: accuracy by points kept, gains, and the weak points beside what stands in their place."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from distillens.analyses.pointwise._orders import ORDERS
from distillens.analyses.pointwise._repair_estimates import INIT
from distillens.core.palette import colour
from distillens.core.result import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from distillens.analyses.pointwise.repair import RepairResult

SHOWN = 10  # weak points that are drawn


def panels(result: RepairResult) -> dict[str, Callable[[Axes], None]]:
    """Accuracy against points kept, gains of the repairs, weak points and what stands in their place."""
    panels: dict[str, Callable[[Axes], None]] = {
        "Test accuracy on the first points by ridge regression (line, 95 % intervals over initialisations), "
        "of random orders (dashed) and by influence (dotted)": partial(heights, result)
    }
    if result.policies:
        panels[
            "Gain in test accuracy over the untouched set: the weakest points with 95 % intervals, random points as dots"
        ] = partial(_gains, result)
    for name in result.distilled:
        kinds = ["as they are", *(f"{p}d" for p in result.mended[name])]
        panels[f"{name}: its weakest points, " + ", ".join(kinds)] = _pictures(result, name)
    return panels


def heights(result: RepairResult, ax: Axes) -> None:
    """Test accuracy against the points kept."""
    for name, curves in result.curves.items():
        sizes = [*result.sizes[name], len(result.labels[name])]
        whole = result.untouched[name]
        found = [Estimate.mean(x.tolist(), INIT) for x in (*curves[0], whole)]
        ax.plot(sizes, [e.value for e in found], color=colour(name), label=name, lw=1.8, marker="o", ms=3)
        if math.isfinite(found[0].low):
            low, high = [e.low for e in found], [e.high for e in found]
            ax.fill_between(sizes, low, high, color=colour(name), alpha=0.12, lw=0)
        random = curves[len(ORDERS) :].mean((0, 2)).tolist()
        for heights, style in ((random, "--"), (curves[1].mean(1).tolist(), ":")):
            ax.plot(sizes, [*heights, float(whole.mean())], color=colour(name), lw=1.2, ls=style)
    ax.set_xlabel("points kept")
    ax.set_ylabel("test accuracy")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)


def _gains(result: RepairResult, ax: Axes) -> None:
    names = list(result.repaired)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for p, policy in enumerate(result.policies):
            x = p + (i + 0.5) * width - 0.4
            draws = (result.repaired[name][p, 1:] - result.untouched[name]).mean(1)
            ax.plot([x + 0.25 * width] * len(draws), draws, "o", ms=2.5, color=colour(name), alpha=0.4, mew=0)
            e = result.gain(name, policy)
            if math.isfinite(e.low):
                ax.errorbar(x, e.value, [[e.value - e.low], [e.high - e.value]], color=colour(name), lw=1.2)
            ax.plot([x], [e.value], "D", ms=4.5, color=colour(name), label=name if not p else None)
    ax.axhline(0, color="grey", lw=1, ls=":")
    ax.set_xticks(range(len(result.policies)), result.policies)
    ax.set_ylabel("gain in test accuracy")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _pictures(result: RepairResult, name: str) -> Callable[[Axes], None]:
    """Draw a row of weak points, and under it one for each kind of image in their place."""

    def draw(ax: Axes) -> None:
        pictures = result.pictures[name][:, :SHOWN]
        c, h, w = pictures.shape[2:]
        canvas = torch.ones(len(pictures) * (h + 1), pictures.shape[1] * (w + 1), 3)
        for r, row in enumerate(pictures):
            for column, image in enumerate(row):
                shown = image if c == 3 else image.mean(0, keepdim=True).expand(3, h, w)
                canvas[r * (h + 1) :, column * (w + 1) :][:h, :w] = shown.clamp(0, 1).permute(1, 2, 0)
        ax.imshow(canvas.numpy(force=True), interpolation="nearest")
        ax.set_axis_off()

    return draw

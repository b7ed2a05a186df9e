"""The figures of semantics: shares of points and attributes, and the images themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from distillens.core.palette import colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from distillens.analyses.pointwise.semantics import SemanticsResult


def shares_of_points(result: SemanticsResult, ax: Axes) -> None:
    """A bar a set, and what shuffled attributes give."""
    for i, name in enumerate(result.counts):
        p = len(result.labels[name])
        ax.bar(i, result.carriers(name) / p, width=0.6, color=colour(name))
        null = result.shuffled[name][:, 1].double() / p
        low, middle, high = torch.quantile(null, torch.tensor([0.025, 0.5, 0.975], dtype=null.dtype)).tolist()
        error = [[middle - low], [high - middle]]
        ax.errorbar(i + 0.38, middle, error, fmt="_", color="grey", capsize=4, lw=1.6, ms=8)
        ax.annotate(
            f"p = {result.chance(name):.2g}",
            (i, max(result.carriers(name) / p, high)),
            (0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    ax.set_xticks(
        range(len(result.counts)), list(result.counts), rotation=20 if len(result.counts) > 4 else 0
    )
    ax.set_ylim(0, max(0.1, 1.15 * ax.get_ylim()[1]))
    ax.set_ylabel("share of points with a finding")
    ax.spines[["top", "right"]].set_visible(False)


def shares_of_attributes(result: SemanticsResult, ax: Axes) -> None:
    """For each set the share of points with a finding in each attribute."""
    names = list(dict.fromkeys(attribute for attribute, _ in result.words))
    shares = torch.zeros(len(result.counts), len(names))
    for row, name in enumerate(result.counts):
        of_all, _ = result.found[name]
        for column, attribute in enumerate(names):
            own = [i for i, (a, _) in enumerate(result.words) if a == attribute]
            shares[row, column] = of_all[:, own].any(1).double().mean()
    most = max(0.1, float(shares.max()))
    ax.imshow(shares.numpy(force=True), cmap="Blues", vmin=0, vmax=most, aspect="auto")
    for row in range(len(result.counts)):
        for column in range(len(names)):
            dark = float(shares[row, column]) > 0.6 * most
            ax.text(
                column,
                row,
                f"{float(shares[row, column]):.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    ax.set_yticks(range(len(result.counts)), list(result.counts), fontsize=8)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def strongest_points(result: SemanticsResult, name: str) -> Callable[[Axes], None]:
    """Draw the strongest points, a gap, the images that they help most, and the words in which these differ from their class."""
    points, helped = result.points[name], result.helped[name]
    of_all, both = result.found[name]
    tests = result.tests[name]
    tail = tests.tail(result.counts[name][0]).masked_fill(~tests.tested, 1.0)

    def draw(ax: Axes) -> None:
        c, h, w = points.shape[1:]
        gap, columns = w // 2, 1 + helped.shape[1]
        tile_h, tile_w = h + max(1, h // 6), w + max(1, w // 16)
        canvas = torch.ones(len(points) * tile_h, columns * tile_w + gap, 3)
        for row, j in enumerate(result.strongest[name].tolist()):
            for column, image in enumerate([points[row], *helped[row]]):
                x = column * tile_w + (gap if column else 0)
                shown = (image if c == 3 else image.mean(0, keepdim=True).expand(3, h, w)).clamp(0, 1)
                canvas[row * tile_h : row * tile_h + h, x : x + w] = shown.permute(1, 2, 0)
            lines = [f"point {j}, {result.classes[int(result.labels[name][j])]}"]
            words = of_all[j].nonzero()[:, 0].tolist() or [int(tail[j].argmin())]
            for word in sorted(words, key=lambda i: float(tail[j, i]))[:2]:
                mark = "" if bool(of_all[j, word]) else " (no finding)"
                mark += ", repeats" if bool(both[j, word]) else ""
                lines.append(
                    f"{': '.join(result.words[word])}  x{result.lift(name, j, word).value:.1f}{mark}"
                )
            ax.text(canvas.shape[1] + w / 4, row * tile_h + h / 2, "\n".join(lines), va="center", fontsize=7)
        ax.imshow(canvas.numpy(force=True), interpolation="nearest")
        ax.set_axis_off()

    return draw

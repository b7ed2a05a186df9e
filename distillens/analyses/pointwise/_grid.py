"""Points of a set and the real images that belong to them, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def grid_of(points: torch.Tensor, beside: torch.Tensor, labels: torch.Tensor) -> Callable[[Axes], None]:
    """Draw one point of each class, from pixels [P, c, h, w], a gap, and the images [P, top, c, h, w] that belong to it."""

    def draw(ax: Axes) -> None:
        firsts = [int((labels == c).nonzero()[0, 0]) for c in sorted(set(labels.tolist()))]
        half = -(-len(firsts) // 2)
        c, h, w = points.shape[1:]
        columns = 1 + beside.shape[1]
        tile_h, tile_w = h + 1, w + 1
        block = columns * tile_w + w // 2
        canvas = torch.ones(half * tile_h, 2 * block + w, 3)
        for i, j in enumerate(firsts):
            left, top = (i // half) * (block + w), (i % half) * tile_h
            for column, image in enumerate([points[j], *beside[j]]):
                x = left + column * tile_w + (w // 2 if column else 0)
                shown = (image if c == 3 else image.mean(0, keepdim=True).expand(3, h, w)).clamp(0, 1)
                canvas[top : top + h, x : x + w] = shown.permute(1, 2, 0)
        ax.imshow(canvas.numpy(force=True), interpolation="nearest")
        ax.set_axis_off()

    return draw

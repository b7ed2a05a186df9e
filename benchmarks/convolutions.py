"""How far our 3 x 3 convolutions and PyTorch's, both in float32, are from float64.

    python benchmarks/convolutions.py

docs/engine.md quotes the ratios.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.environment import environment
from distillens.core.rng import Key
from distillens.core.storage import write_json
from distillens.kernels import convolutions

IMAGES, CHANNELS, DRAWS = 32, 64, 5
SIZES = (4, 8, 16, 32)
ASKED = ("result", "gradient in the images", "gradient in the filters")


def errors(size: int, draw: int) -> list[tuple[float, float]]:
    """For each of ``ASKED`` the relative error of ours and of PyTorch's, on normal numbers."""
    key = Key(draw).fold(size)
    x, g = (key.fold(name).normal(IMAGES, CHANNELS, size, size) for name in ("x", "g"))
    weight, bias = key.fold("weight").normal(CHANNELS, CHANNELS, 3, 3), key.fold("bias").normal(CHANNELS)
    ours = (
        convolutions.convolve(x, weight, bias, 1, 1),
        convolutions.back(g, weight, 1, 1),
        convolutions.in_weight(x, g, 1, 1),
    )
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = torch.conv2d(*leaves, padding=1)
        found.append((y.detach(), *torch.autograd.grad(y, leaves[:2], g.to(dtype))))

    def far(one: torch.Tensor, exact: torch.Tensor) -> float:
        return float((one.double() - exact).norm() / exact.norm())

    return [
        (far(one, exact), far(other, exact))
        for one, (other, exact) in zip(ours, zip(*found, strict=True), strict=True)
    ]


def main() -> None:
    """Measure and write."""
    rows = []
    for size in SIZES:
        drawn = [errors(size, draw) for draw in range(DRAWS)]
        for place, asked in enumerate(ASKED):
            pairs = [one[place] for one in drawn]
            ratios = sorted(ours / theirs for ours, theirs in pairs)
            row = {"planes": f"{size} x {size}", "what": asked, "ours": pairs[0][0], "pytorch": pairs[0][1]}
            rows.append(row | {"ratio": {"median": ratios[DRAWS // 2], "low": ratios[0], "high": ratios[-1]}})
            print(row["planes"], asked, *(f"{each:.2f}" for each in ratios))
    about = {"images": IMAGES, "channels": CHANNELS, "draws": DRAWS, "rows": rows}
    write_json(Path("benchmarks/results/convolutions.json"), about | {"environment": environment()})


if __name__ == "__main__":
    main()

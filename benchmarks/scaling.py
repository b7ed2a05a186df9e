"""How time grows with the size of the work, on one machine in one run.

    python -m benchmarks.scaling           # writes benchmarks/results/scaling.json and docs/figures/scaling.svg
    python -m benchmarks.scaling --draw    # only draws what is on record

Every size is timed three times, up and down the sizes in turns. The slope of log time on log size is a least-squares line through
all times of the upper half of the sizes (the middle one included), where fixed costs no longer rule, with its 95 % interval: 1 is linear.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats

from benchmarks.engine import settled
from benchmarks.environment import environment
from benchmarks.works import KEY, K, digits
from distillens import Recipe
from distillens.core.config import describe
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.palette import colour
from distillens.core.space import Pixel
from distillens.core.storage import read_json, write_json
from distillens.core.vector import Shapes
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.train import Training, train
from distillens.unroll import unroll

PATH = Path(__file__).parent / "results" / "scaling.json"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "scaling.svg"
REPEATS = 3
LONG_ENOUGH = 0.5  # seconds of a timing: shorter works are called again
WIDE = 0.25  # half the width of an interval that no longer tells linear growth from worse
NET = ConvNet(depth=3, width=32)


@dataclass(frozen=True)
class Law:
    """``work(size)`` gives what is timed, under the default plan for data ``like`` its own; ``measure`` turns a size into
    what time is set against.
    """

    about: str
    axis: str
    sizes: tuple[int, ...]
    work: Callable[[int], Callable[[], object]]
    like: Callable[[], Dataset]
    measure: Callable[[int], int] = int


def noise(images: int, side: int) -> Dataset:
    shown = KEY.fold("scaling").normal(images, 3, side, side)
    return Dataset(shown, Hard(torch.arange(images) % K), tuple(map(str, range(K))), Pixel())


def models(count: int) -> Callable[[], object]:
    data = digits().train.take(torch.arange(100))
    training = Training(data, ConvNet.defaults(data), Recipe(steps=50), KEY.split(count))
    return lambda: train(training, Plan.resolve(data))


def images(count: int) -> Callable[[], object]:
    return _steps(noise(count, 32), 3)


def side(pixels: int) -> Callable[[], object]:
    return _steps(noise(64, pixels), 3)


def _steps(data: Dataset, steps: int) -> Callable[[], object]:
    training = Training(data, NET, Recipe(steps=steps), (KEY,))
    return lambda: train(training, Plan.resolve(data))


def inner_steps(count: int) -> Callable[[], object]:
    data = noise(20, 32)
    params, _ = NET.init(data, KEY)
    shapes = Shapes.of(params)
    start, labels = shapes.flatten(params), data.labels.hard()

    def inner(flat: torch.Tensor, learned: Sequence[torch.Tensor], t: int) -> torch.Tensor:
        return F.cross_entropy(NET.logits(shapes.unflatten(flat), {}, learned[0], "train")[0], labels)

    return lambda: unroll(
        inner, lambda flat: flat.square().sum(), start, [data.images], torch.full((count,), 0.01)
    )


LAWS = (
    Law(
        "digits models, 100 images, 50 steps, in one process",
        "models",
        (1, 2, 4, 8, 16, 32, 64),
        models,
        lambda: digits().train,
    ),
    Law(
        "images of 32 px in a training step, width 32",
        "images",
        (10, 20, 40, 80, 160, 320, 640),
        images,
        lambda: noise(1, 32),
    ),
    Law(
        "pixels of an image, 64 images a training step, width 32",
        "pixels",
        (8, 16, 32, 64),
        side,
        lambda: noise(1, 32),
        lambda side: side * side,
    ),
    Law(
        "inner steps of the exact adjoint, 20 images of 32 px, width 32",
        "inner steps",
        (5, 10, 20, 40, 80),
        inner_steps,
        lambda: noise(1, 32),
    ),
)


def _seconds(work: Callable[[], object], calls: int) -> float:
    """The mean time of so many calls."""
    begun = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - begun) / calls


def measured(law: Law) -> dict[str, Any]:
    """Median times by size, and the slope over the upper half."""
    plan = Plan.resolve(law.like())
    with settled(plan):
        works = {size: law.work(size) for size in law.sizes}
        seconds: dict[int, list[float]] = {size: [] for size in law.sizes}
        calls = {}
        for size, work in works.items():
            work()
            calls[size] = math.ceil(LONG_ENOUGH / _seconds(work, 1))
        for turn in range(REPEATS):
            # Up and down in turns: a machine that slows down in time must not look like a law of size.
            for size, work in list(works.items())[:: -1 if turn % 2 else 1]:
                seconds[size].append(_seconds(work, calls[size]))
    upper = law.sizes[(len(law.sizes) - 1) // 2 :]
    points = [(math.log(law.measure(size)), math.log(s)) for size in upper for s in seconds[size]]
    fit = stats.linregress(*zip(*points, strict=True))
    half = float(stats.t.ppf(0.975, len(points) - 2) * fit.stderr)
    return {
        "about": law.about,
        "axis": law.axis,
        "sizes": [law.measure(size) for size in law.sizes],
        "seconds": [float(f"{statistics.median(s):.4g}") for s in seconds.values()],
        "fitted": [law.measure(size) for size in upper],
        "slope": {
            "value": round(float(fit.slope), 3),
            "low": round(float(fit.slope) - half, 3),
            "high": round(float(fit.slope) + half, 3),
        },
        # No worse than linear, as far as the interval can tell: one that is too wide tells nothing.
        "linear": float(fit.slope) - half <= 1 if half < WIDE else None,
        "n": REPEATS,
        "plan": describe(plan),
    }


def draw(saved: dict[str, Any]) -> None:
    """Time against size, a panel a law, with the line that linear growth from the largest size would give."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same figures draw the same bytes
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot.subplots(1, len(saved["laws"]), figsize=(12, 3.2))
    for ax, law in zip(axes, saved["laws"], strict=True):
        sizes, seconds, slope = law["sizes"], law["seconds"], law["slope"]
        linear = [seconds[-1] * size / sizes[-1] for size in sizes]
        ax.loglog(sizes, linear, color="#999999", lw=1, ls="--", label="linear")
        ax.loglog(sizes, seconds, color=colour("dm"), marker="o", ms=4, label="measured")
        ax.set_xticks(sizes, map(str, sizes), fontsize=7)
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xlabel(law["axis"])
        ax.set_title(f"slope {slope['value']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draw", action="store_true")
    if not parser.parse_args().draw:
        laws = []
        for law in LAWS:
            laws.append(measured(law))
            print(law.axis, laws[-1]["seconds"], laws[-1]["slope"], flush=True)
        write_json(PATH, {"laws": laws, "environment": environment()})
    draw(read_json(PATH))


if __name__ == "__main__":
    main()

"""What a whitened space costs: the fit, the map, the inverse, the memory, and a forecast for 64 px.

    python -m benchmarks.whitening --data digits
    python -m benchmarks.whitening --data parquet:cifar10/

Each runs in a process of its own on one thread, as a fit always does, and puts its row in benchmarks/results/whitening.json. The
forecast is by d^3 (eigenvectors, inverse) and n d^2 (covariance, map), from the largest row.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, forget, memory
from distillens import load
from distillens.core.space import Zca
from distillens.core.storage import read_json, write_json
from distillens.engine.workers import settle_process

PATH = Path(__file__).parent / "results" / "whitening.json"
MAPPED = 10_000  # images


def seconds(work: Callable[[], object]) -> float:
    """The time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def row(spec: str) -> dict[str, Any]:
    """The figures of the kornia kind on one dataset's training images."""
    train = load(spec).train
    d = math.prod(train.shape)
    forget()
    before = memory("VmRSS")
    fitted: list[Zca] = []
    fit = seconds(lambda: fitted.append(Zca.fit(train.exact_pixels())))
    fit_bytes = memory("VmHWM") - before
    (space,) = fitted
    some = train.space.to_pixels(train.images[torch.arange(MAPPED) % len(train)])
    square = torch.eye(d, dtype=torch.float64) + 1e-3
    return {
        "data": spec.partition(":")[0],
        "shape": list(train.shape),
        "images": len(train),
        "d": d,
        "fit": fit,
        "eigenvectors": seconds(lambda: torch.linalg.eigh(square)),
        "map": seconds(lambda: space.from_pixels(some)),
        "inverse": seconds(lambda: space.inverse),
        "fit_bytes": fit_bytes,
        "set_bytes": sum(t.numel() * t.element_size() for t in space.tensors().values()),
        "environment": environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="digits")
    asked = parser.parse_args()
    settle_process()
    torch.set_num_threads(1)
    rows = read_json(PATH)["rows"] if PATH.is_file() else []
    made = row(asked.data)
    kept = [one for one in rows if one["shape"] != made["shape"]]
    write_json(PATH, {"rows": sorted([*kept, made], key=lambda one: one["d"])})
    print(made)

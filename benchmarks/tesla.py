"""How far TESLA's gradient is from the exact one, against the number of inner steps.

    python benchmarks/tesla.py                          # on digits: writes benchmarks/results/tesla.json
    python benchmarks/tesla.py parquet:FOLDER width=32  # adds a row a number of steps for other data and network

Real images as the distilled set (full batch, no augmentation), one expert of plain SGD, its first pass to its
second. Cosine and length against the exact adjoint, for pixels; the ratio for the step size. n = 5 experts.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from distillens import Key, load
from distillens.core.config import override
from distillens.core.contracts import Problem
from distillens.core.result import Estimate
from distillens.core.storage import write_json
from distillens.distillers.mtt import MTT
from distillens.distillers.tesla import TESLA
from distillens.engine.plan import Plan
from distillens.engine.workers import Engine, pinned_threads, settle_process
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.unroll import Unrolled

STEPS = (1, 2, 5, 10, 20, 50)
SEEDS = 5
PATH = Path(__file__).parent / "results" / "tesla.json"


def measure(source: str, settings: list[str]) -> list[dict[str, Any]]:
    """A row a number of steps and images a class."""
    real = load(source).train
    net = override(ConvNet.defaults(real), settings)
    small = real.shape[1] < 16
    rate, batch = (0.05, 64) if small else (0.01, 256)
    shared = {
        "expert_epochs": 1,
        "max_start_epoch": 1,
        "experts": 1,
        "expert_lr": rate,
        "expert_batch": batch,
    }
    rows = []
    with pinned_threads(1), Engine(1, 1) as engine:
        runs = Runs(Plan("loop", 1), engine)
        for ipc in (1, 10):
            found: dict[int, list[tuple[Unrolled, Unrolled]]] = {steps: [] for steps in STEPS}
            for seed in range(SEEDS):
                problem = Problem(real, ipc, Key(seed, ("tesla",)), shared=Key(seed, ("tesla experts",)))
                exact = MTT(**shared, lr_start=rate, augment="", net=net)
                experts = runs.trajectories(exact.needs(problem)["experts"])
                problem = replace(problem, inputs={"experts": experts})
                rough = TESLA(**shared, lr_start=rate, augment="", net=net)
                images = exact.start(problem).tensors["images"]
                key = problem.key.fold("step", 0)
                stretch = exact.stretch(problem, key, 0, 1)
                for steps in STEPS:
                    one, other = (
                        replace(method, syn_steps=steps).matched(problem, key, stretch, rate, [images])
                        for method in (exact, rough)
                    )
                    found[steps].append((one, other))
            for steps, pairs in found.items():
                rows.append(
                    {"data": source.partition(":")[0], "width": net.width, "ipc": ipc, "steps": steps}
                )
                rows[-1] |= {"lr": rate, **_compared(pairs)}
                print(rows[-1], flush=True)
    return rows


def _compared(pairs: list[tuple[Unrolled, Unrolled]]) -> dict[str, Any]:
    def estimate(values: list[float]) -> dict[str, Any]:
        return asdict(Estimate.mean(values, "expert"))

    exact = [one.gradients[0].flatten().double() for one, _ in pairs]
    rough = [other.gradients[0].flatten().double() for _, other in pairs]
    by_rate = [(float(one.rate_gradients.sum()), float(other.rate_gradients.sum())) for one, other in pairs]
    return {
        "cosine": estimate([float(a @ b / (a.norm() * b.norm())) for a, b in zip(exact, rough, strict=True)]),
        "length": estimate([float(b.norm() / a.norm()) for a, b in zip(exact, rough, strict=True)]),
        "rate": estimate([b / a for a, b in by_rate]),
    }


def main(source: str, settings: list[str]) -> None:
    settle_process()
    rows = measure(source, settings)
    kept = []
    if PATH.is_file():
        mine = {(row["data"], row["width"]) for row in rows}
        kept = [
            row for row in json.loads(PATH.read_text())["rows"] if (row["data"], row["width"]) not in mine
        ]
    write_json(PATH, {"rows": sorted(kept + rows, key=_place), "environment": environment()})


def _place(row: dict[str, Any]) -> tuple[bool, int, int, int]:
    return row["data"] != "digits", row["width"], row["ipc"], row["steps"]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "digits", sys.argv[2:])

"""Is bfloat16 as good on average? Pairs that differ in precision alone, and an interval against a margin.

    python -m benchmarks.precision --data digits
    python -m benchmarks.precision --data parquet:cifar10/ --pairs 10
    python -m benchmarks.precision --data parquet:cifar10/ --pairs 10 --question dm --set steps=60
    python -m benchmarks.precision --data parquet:cifar10/ --pairs 10 --question dc --set steps=2 --set net.width=32

*training*: a network trained on a random real subset with a plan of ``precision`` bfloat16, beside one of the same
subset and start in float32. The name of a method: a set that it distils with ``targets`` in bfloat16, beside one in
float32, each looked at by a network that is trained in float32. Predictions are always made in float32.

What is found here may settle a default: it is the validation split that is predicted, and the test split is not touched.

A pair has its own subset, its own keys. Calling the two the same needs two one-sided tests at 5 %: the 90 % interval of
the mean difference in validation accuracy lies within the margin, which was fixed before any pair was run. What is neither
within nor outside is not settled. Rows are written to benchmarks/results/precision.json pair by pair; a run that is
cut off goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from distillens import DistilledDataset, Key, Recipe, load, making, pipeline
from distillens.core.dataset import Splits
from distillens.core.result import Estimate
from distillens.core.storage import read_json, write_json
from distillens.engine.plan import Plan
from distillens.engine.workers import settle_process
from distillens.kernels.conv_block import multiplies_bfloat16
from distillens.nets import default_net
from distillens.sessions import chosen_plan
from distillens.train import Training, train

PATH = Path(__file__).parent / "results" / "precision.json"
MARGIN = (
    0.01  # of accuracy: a third of what lies between DM (48.9 %) and DSA (52.1 %) on CIFAR-10 at 10 a class
)
FEWEST = 10  # pairs, before which nothing is said
IPC = 10
STEPS = 300  # of the networks that look at a set


def judged(points: DistilledDataset, real: Splits, plan: Plan, key: Key) -> float:
    """Validation accuracy of a network trained on a set by a plan, looked at in float32."""
    net, recipe = default_net(real.train), Recipe(steps=STEPS, lr=0.01, momentum=0.9)
    population = train(Training(points.dataset(), net, recipe, (key,)), plan)
    with plan.pinned():
        return float(population.accuracy(real.val)[0])


def training(real: Splits, plan: Plan, pair: int) -> tuple[float, float]:
    """Accuracy after training in float32, and in bfloat16."""
    points = pipeline.distill("random_subset", real, ipc=IPC, replicate=pair)
    first, second = (
        judged(points, real, replace(plan, precision=precision), Key(0, ("precision", pair)))
        for precision in ("float32", "bfloat16")
    )
    return first, second


def targets(real: Splits, plan: Plan, pair: int, name: str, settings: Sequence[str]) -> tuple[float, float]:
    """Accuracy by a set of a method that followed float32 targets, and by one that followed bfloat16's."""
    order = making.order(name, real, IPC, replicate=pair, settings=settings)
    method, problem = order.distiller, order.problem(real.train, {})
    found = []
    for kind in ("float32", "bfloat16"):
        with replace(plan, targets=kind).pinned():
            state = method.start(problem)
            for i in range(method.steps):
                state, _ = method.step(problem, state, i)
        found.append(judged(method.finish(problem, state), real, plan, Key(0, ("precision", pair))))
    return found[0], found[1]


def multiplies() -> str:
    """The kind of number in which this machine multiplies what is rounded to bfloat16."""
    return "bfloat16" if multiplies_bfloat16() else "float32"


def verdict(differences: list[float]) -> dict[str, Any]:
    """The mean difference with its 90 % interval, and whether it lies within the margin."""
    mean = Estimate.mean(differences, "pair (own subset and keys)", 0.90)
    within = mean.low > -MARGIN and mean.high < MARGIN
    outside = mean.low > MARGIN or mean.high < -MARGIN
    settled = len(differences) >= FEWEST and (within or outside)
    return {"difference": asdict(mean), "same": within if settled else None}


def main(spec: str, question: str, pairs: int, settings: Sequence[str]) -> None:
    settle_process()
    real = load(spec)
    plan = chosen_plan(real, precision="float32")
    saved = read_json(PATH) if PATH.is_file() else {"margin": MARGIN, "rows": []}
    kind, colon, place = spec.partition(":")
    name = {
        "question": question,
        "data": kind + colon + Path(place).name,  # where the folder lies is nobody's business
        "settings": list(settings),
        "steps": STEPS,
        "net": str(default_net(real.train)),
    }
    row = next((one for one in saved["rows"] if name.items() <= one.items()), None)
    if row is None:
        row = name | {"float32": [], "bfloat16": []}
        saved["rows"].append(row)
    for pair in range(len(row["float32"]), pairs):
        if question == "training":
            first, second = training(real, plan, pair)
        else:
            first, second = targets(real, plan, pair, question, settings)
        row["float32"].append(first)
        row["bfloat16"].append(second)
        if pair:
            row |= verdict([b - a for a, b in zip(row["float32"], row["bfloat16"], strict=True)])
        row |= {"threads": plan.threads, "environment": environment() | {"multiplies": multiplies()}}
        write_json(PATH, saved)
        print(question, pair, first, second, row.get("difference"), row.get("same"), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument(
        "--question", default="training", help="training, or the method whose targets are rounded"
    )
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="settings of the method"
    )
    asked = parser.parse_args()
    main(asked.data, asked.question, asked.pairs, asked.set)

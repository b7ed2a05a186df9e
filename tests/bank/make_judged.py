"""Make the bank of what random subsets' networks do: clean, corrupted, attacked, class by class, and their confidence.

    python tests/bank/make_judged.py

Real digits only. One network a subset, the first that tests/bank/make.py trains on it too.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distillens import pipeline
from distillens.analyses.behaviour.fairness import Fairness
from distillens.analyses.behaviour.pixels import Pixels
from distillens.analyses.behaviour.robustness import Robustness
from distillens.core.contracts import Problem, Sets
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.sessions import session

SUBSETS = 60
SIZES = (1, 10)


def main() -> None:
    real = load("digits")
    key = Key(2024, ("bank",))
    tensors: dict[str, torch.Tensor] = {}
    with session(real) as runs:
        for ipc in SIZES:
            subsets = []
            for r in range(SUBSETS):
                problem = Problem(real.train, ipc, key.fold("subset", ipc, r))
                method = pipeline.distillers.room.find("random_subset").defaults(real.train, ipc)
                subsets.append(method.finish(problem, method.start(problem)))
            sets = Sets({"null": tuple(subsets)})
            pixels = Pixels.defaults(real.train)(sets, real, runs, key=key)
            tensors[f"distances.{ipc}"] = pixels.distances["null"].float()
            tensors[f"power.{ipc}"] = pixels.power["null"].float()
            tensors["power.real"] = pixels.power["real"].float()
            robustness = Robustness.defaults(real.train)(sets, real, runs, key=key)
            for name in ("clean", "corrupted", "untouched", "attacked"):
                tensors[f"{name}.{ipc}"] = getattr(robustness, name)["null"].float()
            fairness = Fairness.defaults(real.train)(sets, real, runs, key=key)
            for name in ("by_class", "reliability"):
                tensors[f"{name}.{ipc}"] = getattr(fairness, name)["null"].float()
    write_tensors(Path(__file__).with_name("judged.safetensors"), tensors)


if __name__ == "__main__":
    main()

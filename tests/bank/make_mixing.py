"""Make the banks of pairs of random subsets under ``behaviour/mixing`` and ``behaviour/sensitivity``.

    python tests/bank/make_mixing.py [mixing | sensitivity]

Both of a pair are random subsets of real digits with a replicate's real images and network keys: what the claims see where
there is nothing to find. Values are images of the test split that a network gets right.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from distillens import pipeline
from distillens.analyses.behaviour.mixing import Mixing
from distillens.analyses.behaviour.sensitivity import RANDOM, Sensitivity
from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Problem, Sets
from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.runs import Runs
from distillens.sessions import session

PAIRS = 12
SIZES = (1, 10)
KEY = Key(2026, ("bank", "pairs"))


def main() -> None:
    real = load("digits")
    for name in sys.argv[1:] or ("mixing", "sensitivity"):
        tensors: dict[str, torch.Tensor] = {}
        with session(real) as runs:
            for ipc in SIZES:
                sets = Sets({"null": _subsets(real, ipc, "null")}, {RANDOM: _subsets(real, ipc, "base")})
                found = _mixing(sets, real, runs) if name == "mixing" else _sensitivity(sets, real, runs)
                counts = {of: (values[:, 0] * len(real.test)).round() for of, values in found.items()}
                tensors |= {f"{of}.{ipc}": values.to(torch.int16) for of, values in counts.items()}
                write_tensors(Path(__file__).with_name(f"{name}.safetensors"), tensors)


def _mixing(sets: Sets, real: Splits, runs: Runs) -> dict[str, torch.Tensor]:
    """Accuracies [pairs, networks, amounts] of the default amounts."""
    result = Mixing.defaults(real.train)(sets, real, runs, key=KEY)
    return {
        f"{reading}.{of}": curves[name]
        for reading, curves in (("fixed", result.curves), ("tuned", result.tuned))
        for of, name in (("null", "null"), ("random", RANDOM))
    }


def _sensitivity(sets: Sets, real: Splits, runs: Runs) -> dict[str, torch.Tensor]:
    """Accuracies [pairs, networks, settings] of the default settings, the base first."""
    result = Sensitivity.defaults(real.train)(sets, real, runs, key=KEY)
    return {"null": result.values["null"], "random": result.values[RANDOM]}


def _subsets(real: Splits, ipc: int, name: str) -> tuple[DistilledDataset, ...]:
    method = pipeline.distillers.room.find("random_subset").defaults(real.train, ipc)
    problems = [Problem(real.train, ipc, KEY.fold(name, ipc, r)) for r in range(PAIRS)]
    return tuple(method.finish(problem, method.start(problem)) for problem in problems)


if __name__ == "__main__":
    main()

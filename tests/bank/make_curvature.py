"""Make the bank of traces on random training subsets, that the null rates are resampled from.

    python tests/bank/make_curvature.py

Real digits only: along independent real trajectories, the trace on eight random training subsets each and on all
training images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from distillens.analyses.representativeness.curvature import ALIKE, REAL, Curvature
from distillens.core.contracts import Problem, Sets
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.distillers.random_subset import RandomSubset
from distillens.sessions import session

SUBSETS, TRAJECTORIES = 7, 10


def main() -> None:
    real = load("digits")
    key = Key(2025, ("curvature bank",))
    tensors: dict[str, torch.Tensor] = {}
    with session(real) as runs:
        for ipc in (1, 10):
            problems = {
                str(s): [Problem(real.train, ipc, key.fold(ipc, s, r)) for r in range(TRAJECTORIES)]
                for s in range(SUBSETS)
            }
            method = RandomSubset()
            sets = Sets(
                {
                    name: tuple(method.finish(p, method.start(p)) for p in many)
                    for name, many in problems.items()
                }
            )
            asked = replace(
                Curvature.defaults(real.train), moments=12, trajectories=TRAJECTORIES, most=16, top=0
            )
            found = asked(sets, real, runs, key=key.fold(ipc))
            subsets = [found.traces[name][:, 0] for name in (*map(str, range(SUBSETS)), ALIKE)]
            tensors[f"subsets.{ipc}"] = torch.stack(subsets, 1).float()  # [trajectories, subsets, moments]
            tensors[f"real.{ipc}"] = found.traces[REAL][:, 0].float()
            tensors["moments"] = torch.tensor(found.moments)
    write_tensors(Path(__file__).with_name("curvature.safetensors"), tensors)


if __name__ == "__main__":
    main()

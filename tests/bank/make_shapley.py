"""Make the bank of Shapley values and interactions of random real subsets, that the null rates are resampled from.

    python tests/bank/make_shapley.py

Real digits only: the values of each permutation, and the second differences of each context.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distillens.analyses.pointwise.shapley import Shapley
from distillens.core.contracts import Problem, Sets
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.distillers.random_subset import RandomSubset
from distillens.nets.convnet import ConvNet
from distillens.sessions import session

SUBSETS = 16
PATH = Path(__file__).with_name("shapley.safetensors")


def main() -> None:
    real = load("digits")
    key = Key(2025, ("shapley bank",))
    analysis = Shapley(ConvNet(depth=2, width=8), Recipe(steps=100, lr=0.03), permutations=8, error=1e-6)
    problems = [Problem(real.train, 1, key.fold("subset", s)) for s in range(SUBSETS)]
    sets = Sets(
        {str(s): (RandomSubset().finish(p, RandomSubset().start(p)),) for s, p in enumerate(problems)}
    )
    with session(real) as runs:
        found = analysis(sets, real, runs, key=key.fold("net"))
    names = [str(s) for s in range(SUBSETS)]
    tensors = {
        "values": torch.stack([found.values[name] for name in names]),
        "interactions": torch.stack([found.interactions[name] for name in names]),
    }
    write_tensors(PATH, {name: value.float() for name, value in tensors.items()})


if __name__ == "__main__":
    main()

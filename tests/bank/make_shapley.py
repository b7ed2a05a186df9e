"""Make the bank of Shapley values and interactions of random real subsets, that the null rates are resampled from.

    python -m tests.bank.make_shapley

Real digits only: the values of each permutation, and the second differences of each context.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distillens.analyses.pointwise.shapley import Shapley
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.nets.convnet import ConvNet
from distillens.sessions import session
from tests.analyses.by_hand import subsets_by_number

SUBSETS = 16
PATH = Path(__file__).with_name("shapley.safetensors")


def main() -> None:
    real = load("digits")
    key = Key(2025, ("shapley bank",))
    analysis = Shapley(ConvNet(depth=2, width=8), Recipe(steps=100, lr=0.03), permutations=8, error=1e-6)
    sets = subsets_by_number(key.fold("subset"), real, SUBSETS, 1)
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

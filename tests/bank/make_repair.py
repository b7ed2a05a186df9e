"""Make the bank of repairs and orders of random points, that the null rates are resampled from.

    python -m tests.bank.make_repair

Real subsets, every repair done to nine tenths of their points, tenth by tenth, and random orders: which of them is called the weakest, or the
order, is left to the tests.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distillens.analyses.pointwise.repair import ORDERS, Repair
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.nets.convnet import ConvNet
from distillens.sessions import session
from tests.analyses.by_hand import subsets_by_number

SUBSETS = 8
PATH = Path(__file__).with_name("repair.safetensors")


def main() -> None:
    real = load("digits")
    key = Key(2026, ("repair bank",))
    analysis = Repair(ConvNet(depth=2, width=8), Recipe(steps=60, lr=0.05), inits=2, draws=9, kept=(0.3, 0.6))
    sets = subsets_by_number(key.fold("subset"), real, SUBSETS, 2)
    with session(real) as runs:
        found = analysis(sets, real, runs, key=key.fold("net"))
    names = [str(s) for s in range(SUBSETS)]
    tensors = {
        "untouched": torch.stack([found.untouched[name] for name in names]),
        "repaired": torch.stack([found.repaired[name][:, 1:] for name in names]),
        "curves": torch.stack([found.curves[name][len(ORDERS) :] for name in names]),
    }
    write_tensors(PATH, {name: value.float() for name, value in tensors.items()})


if __name__ == "__main__":
    main()

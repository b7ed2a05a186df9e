"""Make the bank of gradients' inner products that the null rates of the equivalent size are resampled from.

    python tests/bank/make_gradients.py

Real images along real training, no distilled set: rows of one image a class from the test, validation and training split.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distillens.analyses.representativeness.gradients import Gradients, layers_of, products, rows
from distillens.core.contracts import Problem, Sets
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.distillers.random_subset import RandomSubset
from distillens.sessions import session

REFERENCE, BESIDE, SEEN = 30, 22, 20  # rows
MOMENTS = (8, 22, 157, 218, 300)  # updates; two early, three late


def main() -> None:
    real = load("digits")
    key = Key(2026, ("bank", "gradients"))
    problem, method = Problem(real.train, 1, key), RandomSubset()
    sets = Sets({"null": (method.finish(problem, method.start(problem)),)})
    analysis = Gradients.defaults(real.train)
    with session(real) as runs:
        (population,) = runs.get(*analysis.trainings(sets, real, key=key))
    vectors = [
        *rows(real.test, REFERENCE, key.fold("reference")),
        *rows(real.val, BESIDE, key.fold("beside")),
        *rows(real.train, SEEN, key.fold("seen")),
    ]
    near = [min(population.moments, key=lambda kept: abs(kept - t)) for t in MOMENTS]
    layers = layers_of(population.shapes)
    table = torch.stack(
        [
            torch.stack(
                [products(analysis.net, population.shapes, layers, flat, vectors)[0] for flat in flats]
            )
            for flats in torch.stack([population.at(t) for t in near], 1)
        ]
    )
    upper = torch.triu_indices(len(vectors), len(vectors))
    tensors = {"upper": table[..., upper[0], upper[1]].float(), "moments": torch.tensor(near)}
    write_tensors(Path(__file__).with_name("gradients.safetensors"), tensors)


if __name__ == "__main__":
    main()

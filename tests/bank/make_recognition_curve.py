"""Make the bank of real trajectories' answers that the null rates of the recognition curve are resampled from.

    python tests/bank/make_recognition_curve.py

Which images are right at each moment, those that no trajectory was trained on and training images: no distilled set, so there
is nothing to find.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from distillens.analyses.representativeness._beside import answers
from distillens.analyses.representativeness.recognition_curve import RecognitionCurve
from distillens.core.contracts import Problem, Sets
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.distillers.random_subset import RandomSubset
from distillens.sessions import session

TRAJECTORIES = 12


def main() -> None:
    real = load("digits")
    key = Key(2025, ("bank", "recognition_curve"))
    problem, method = Problem(real.train, 1, key), RandomSubset()
    sets = Sets({"null": (method.finish(problem, method.start(problem)),)})
    like = RecognitionCurve.defaults(real.train)
    analysis = RecognitionCurve(like.net, like.recipe, like.moments, TRAJECTORIES)
    with session(real) as runs:
        (population,) = runs.get(*analysis.trainings(sets, real, key=key))
    tensors = {"moments": torch.tensor(population.moments), "final": population.accuracy(real.val).float()}
    for name, data in {"unseen": real.val.joined(real.test), "seen": real.train}.items():
        labels = data.labels.hard()
        right = answers(population, data, population.moments)[0] == labels
        # Eight images a byte, along the images.
        tensors[f"right.{name}"] = torch.from_numpy(np.packbits(right.numpy(), axis=-1))
        tensors[f"labels.{name}"] = labels.to(torch.uint8)
    write_tensors(Path(__file__).with_name("recognition_curve.safetensors"), tensors)


if __name__ == "__main__":
    main()

"""Make the bank of judges' answers that the null rates of recognition and of the feature map are resampled from.

    python tests/bank/make_recognition.py

Real images that no judge was trained on, no distilled set: every entry is what a claim sees when there is nothing to find.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distillens.analyses.behaviour.feature_map import FeatureMap, _nearest, _usual
from distillens.analyses.behaviour.recognition import NOISE, Recognition
from distillens.core.contracts import Problem, Sets
from distillens.core.dataset import Dataset
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.distillers.random_subset import RandomSubset
from distillens.sessions import session


def main() -> None:
    real = load("digits")
    key = Key(2025, ("bank", "recognition"))
    problem, method = Problem(real.train, 1, key), RandomSubset()
    sets = Sets({"null": (method.finish(problem, method.start(problem)),)})
    recognition, on_map = Recognition.defaults(real.train), FeatureMap.defaults(real.train)
    with session(real) as runs:
        judges = runs.get(*recognition.trainings(sets, real, key=key))
        (networks,) = runs.get(*on_map.trainings(sets, real, key=key))
    unseen = real.val.joined(real.test)
    among, own = networks.features(real.test), networks.features(real.val)
    distances, index = _nearest(among, own, on_map.neighbours)
    usual = _usual(among, own, real.val, on_map.neighbours)
    classes = real.test.labels.hard()
    noise = real.train.images.std() * key.fold("noise").normal(*unseen.images.shape)
    harder = [Dataset(unseen.images + a * noise, unseen.labels, unseen.classes, unseen.space) for a in NOISE]
    tensors = {
        "judges": torch.stack([p.predictions(unseen) for p in judges]).to(torch.uint8),
        "harder": torch.stack([torch.stack([p.predictions(d) for p in judges]) for d in harder]).to(
            torch.uint8
        ),
        "labels": unseen.labels.hard().to(torch.uint8),
        "neighbours": classes[index].to(torch.uint8),
        "far": (distances / usual[:, real.val.labels.hard()]).log().float(),
    }
    write_tensors(Path(__file__).with_name("recognition.safetensors"), tensors)


if __name__ == "__main__":
    main()

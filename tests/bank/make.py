"""Make the bank of trained-model outputs that the null rates are resampled from.

    python tests/bank/make.py

Real digits only, no distilled set: every entry is what a claim sees when there is nothing to find.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from distillens import pipeline
from distillens.analyses.behaviour.mixing import Mixing
from distillens.analyses.behaviour.recognition import Recognition
from distillens.analyses.representativeness.early_agreement import EarlyAgreement
from distillens.core.contracts import Problem, Sets
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.nets.convnet import ConvNet
from distillens.sessions import session
from distillens.train import networks, on

SUBSETS = 60
SIZES = (1, 10)


def main() -> None:
    real = load("digits")
    key = Key(2024, ("bank",))
    net = ConvNet.defaults(real.train)
    tensors: dict[str, torch.Tensor] = {}
    with session(real) as runs:
        for ipc in SIZES:
            subsets = []
            for r in range(SUBSETS):
                problem = Problem(real.train, ipc, key.fold("subset", ipc, r))
                method = pipeline.distillers.room.find("random_subset").defaults(real.train, ipc)
                subsets.append(method.finish(problem, method.start(problem)))
            recipe = pipeline.protocols.find("wddl").recipe
            # Two networks a subset, each with its own key: two measurements of one and the same set.
            asked = [on(one, net, recipe, networks(key, r, 2)) for r, one in enumerate(subsets)]
            tensors[f"accuracy.{ipc}"] = torch.stack([p.accuracy(real.test) for p in runs.get(*asked)])
            mixing = replace(Mixing.defaults(real.train), real_per_class=(0, ipc))
            sets = Sets({"null": tuple(subsets)}, {"random_subset": tuple(subsets)})
            tensors[f"mixing.{ipc}"] = mixing(sets, real, runs, key=key).curves["null"].mean(1)
        recognition = Recognition.defaults(real.train)
        judges = runs.get(*recognition.trainings(sets, real, key=key))
        tensors["judges"] = torch.stack([p.predictions(real.test) for p in judges]).to(torch.uint8)
        tensors["labels"] = real.test.labels.hard().to(torch.uint8)
        agreement = replace(EarlyAgreement.defaults(real.train), subset=160, early=24)
        early, subset = runs.get(*agreement.trainings(sets, real, key=key)[-2:])
        tensors["early"] = early.seen["test"].to(torch.uint8)
        tensors["early_accuracy"] = (early.seen["val"] == real.val.labels.hard()).double().mean(2)
        tensors["moments"] = torch.tensor(early.seen_moments)
        tensors["subset"] = subset.predictions(real.test).to(torch.uint8)
        tensors["subset_accuracy"] = subset.accuracy(real.val)
    write_tensors(Path(__file__).with_name("digits.safetensors"), tensors)


if __name__ == "__main__":
    main()

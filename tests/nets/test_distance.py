from __future__ import annotations

from dataclasses import replace

import pytest

from distillens import Key
from distillens.core.artefact import DistilledDataset, Provenance
from distillens.core.config import describe
from distillens.core.contracts import Net, Problem
from distillens.core.dataset import Splits
from distillens.distillers.random_subset import RandomSubset
from distillens.nets import distance, made_with
from distillens.nets.convnet import ConvNet
from distillens.nets.lenet import LeNet
from distillens.nets.mlp import MLP
from distillens.nets.resnet18 import ResNet18
from distillens.nets.vit import ViT


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [
        (ConvNet(), ConvNet(), 0),
        (ConvNet(), ConvNet(width=32), 1),
        (ConvNet(), ConvNet(norm="batch"), 1),
        (ConvNet(), ResNet18(), 2),
        (LeNet(), ResNet18(width=8), 2),
        (ConvNet(), MLP(), 3),
        (ViT(), MLP(), 3),
    ],
)
def test_distance_is_a_matter_of_kind(a: Net, b: Net, steps: int) -> None:
    assert distance(a, b) == distance(b, a) == steps


def of(digits: Splits, settings: dict[str, object]) -> DistilledDataset:
    problem = Problem(digits.train, 1, Key(0))
    made = RandomSubset().finish(problem, RandomSubset().start(problem))
    return replace(made, provenance=Provenance("dm", settings, 1, Key(0), "digits", ""))


def test_a_set_names_the_network_it_was_made_with(digits: Splits) -> None:
    assert made_with(of(digits, {"net": describe(ConvNet(width=24))})) == ConvNet(width=24)
    assert made_with(of(digits, {"steps": 3})) is None
    assert made_with(of(digits, {"net": {"is": "distillens.nets.unheard.Of"}})) is None
    assert made_with(replace(of(digits, {}), provenance=None)) is None

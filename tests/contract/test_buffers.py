"""Methods that differentiate through training refuse a network that remembers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from distillens import distillers
from distillens.core.checks import UserError
from distillens.core.contracts import Buffers, Like, Params, Problem
from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.engine.plan import Plan
from distillens.nets.mlp import MLP
from distillens.train import train


@dataclass(frozen=True)
class Remembering(MLP):
    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        params, _ = super().init(like, key)
        return params, {"seen": torch.zeros(1)}


@pytest.mark.parametrize("name", ["bptt", "dc", "mtt"])
def test_a_network_with_buffers_is_refused(name: str, planted: Splits) -> None:
    method = replace(distillers.room.find(name).defaults(planted.train, 1), net=Remembering())
    if name == "mtt":
        method = replace(method, experts=1, max_start_epoch=1, expert_epochs=1)
    problem = Problem(planted.train, 1, Key(0))
    inputs = {key: train(training, Plan()) for key, training in method.needs(problem).items()}
    problem = Problem(planted.train, 1, Key(0), inputs)
    with pytest.raises(UserError, match="needs a network without buffers; got Remembering with seen"):
        method.step(problem, method.start(problem), 0)

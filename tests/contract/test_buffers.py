"""Methods that differentiate through training refuse a network that remembers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from distillens import distillers
from distillens.core.checks import UserError
from distillens.core.config import override, settings_of
from distillens.core.contracts import Buffers, Like, Params, Problem
from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.engine.plan import Plan
from distillens.nets.mlp import MLP
from distillens.runs import Runs

THROUGH_TRAINING = [
    name
    for name in distillers.room.names()
    if distillers.room.find(name).family in ("gradient", "trajectory", "unrolled")
]
# One expert of one pass, and nothing of which the refusal has to wait.
TINY = {
    "experts": 1,
    "expert_epochs": 1,
    "expansion_end": 0,
    "first_max_start_epoch": 1,
    "max_start_epoch": 1,
}


@dataclass(frozen=True)
class Remembering(MLP):
    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        params, _ = super().init(like, key)
        return params, {"seen": torch.zeros(1)}


def test_the_methods_are_known() -> None:
    assert {"bptt", "dc", "mtt", "tesla", "ftd", "datm", "wang2018", "rtp", "rat_bptt"} <= set(
        THROUGH_TRAINING
    )


@pytest.mark.parametrize("name", THROUGH_TRAINING)
def test_a_network_with_buffers_is_refused(name: str, planted: Splits) -> None:
    method = distillers.room.find(name).defaults(planted.train, 1)
    known = settings_of(method)
    method = override(method, [f"{field}={value}" for field, value in TINY.items() if field in known])
    method = replace(method, net=Remembering())
    problem = Problem(planted.train, 1, Key(0))
    runs = Runs(Plan())
    inputs = {place: runs.trajectories(need) for place, need in method.needs(problem).items()}
    problem = Problem(planted.train, 1, Key(0), inputs)
    with pytest.raises(UserError, match="needs a network without buffers; got Remembering with seen"):
        method.step(problem, method.start(problem), 0)

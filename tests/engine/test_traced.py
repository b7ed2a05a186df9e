"""Training by traced graphs: the numbers of training without, one graph a shape, whichever came first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo import config

from distillens import Key, Recipe
from distillens.core.dataset import Dataset
from distillens.engine import traced
from distillens.engine.plan import Plan
from distillens.kernels import planes
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.train import Training, train

# The compiler warns of its own parts, which are no matter of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning"),
]

PLAN = Plan(kernels="plain")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was traced, run as it stands: its programs are the compiler's business."""
    found: list[Any] = []

    def kept(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(traced, "BACKEND", kept)
    traced.traced.cache_clear()
    torch.compiler.reset()
    yield found
    traced.traced.cache_clear()
    torch.compiler.reset()


def training(data: Dataset, net: Any, models: int = 2, **changes: Any) -> Training:
    return Training(data, net, Recipe(steps=4, **changes), Key(3).split(models))


@pytest.mark.parametrize(
    ("net", "changes"),
    [
        pytest.param(ConvNet(depth=2, width=8), {}, id="group"),
        pytest.param(ConvNet(depth=2, width=8, norm="batch"), {"batch": 20}, id="buffers, batches"),
        pytest.param(MLP(), {"cutmix": 0.9, "batch": 20}, id="under vmap, mixed"),
        pytest.param(
            ConvNet(depth=2, width=8), {"augment": "flip+crop", "optimiser": "adam"}, id="augmented"
        ),
    ],
)
def test_they_train_as_without(digits: Any, graphs: list[Any], net: Any, changes: dict[str, Any]) -> None:
    data = digits.train.take(torch.arange(40))
    wanted = training(data, net, **changes)
    plain, ours = train(wanted, PLAN), train(wanted, replace(PLAN, traced=True))
    assert len(graphs) == 1, "no step is traced twice, none in pieces"
    torch.testing.assert_close(ours.final, plain.final, rtol=1e-5, atol=1e-6)
    for name, value in plain.buffers.items():
        torch.testing.assert_close(ours.buffers[name], value, rtol=1e-5, atol=1e-6)


def test_each_shape_has_a_graph_of_its_own(digits: Any, graphs: list[Any]) -> None:
    """More than the compiler would keep by itself; one for several shapes would depend on which came first."""
    plan = replace(PLAN, traced=True, images=1 << 12)
    net = ConvNet(depth=2, width=8)
    with config.patch(recompile_limit=2, accumulated_recompile_limit=4):
        for count in range(20, 31):
            train(training(digits.train.take(torch.arange(count)), net), plan)
    assert len(graphs) == 11
    train(training(digits.train.take(torch.arange(25)), net), plan)
    assert len(graphs) == 11


@pytest.mark.skipif(not planes.available(), reason="no C++ compiler")
def test_the_compilers_programs_train_as_without(digits: Any) -> None:
    torch.compiler.reset()
    wanted = training(digits.train.take(torch.arange(20)), ConvNet(depth=2, width=8))
    plain, ours = train(wanted, PLAN), train(wanted, replace(PLAN, traced=True))
    torch.testing.assert_close(ours.final, plain.final, rtol=1e-5, atol=1e-6)
    again = train(wanted, replace(PLAN, traced=True))
    assert torch.equal(again.final, ours.final)
    torch.compiler.reset()

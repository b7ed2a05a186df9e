"""No step of a training waits for the device: nothing asks for a number that the device has still to find.

Held without such a device. Tensors on ``meta`` have no numbers, so that whatever asks for one fails; and they do not mix with
those of the CPU, so that what a step needs must lie where it is used.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.train import Observe, Training, train_chunk
from distillens.unroll import Mode, Momentum, unroll

N, MODELS, CLASSES = 20, 3, 4
STEPS = Recipe(steps=3, batch=8)
CASES: dict[str, dict[str, Any]] = {
    "full batches": {"recipe": Recipe(steps=3)},
    "batches": {},
    "weights": {"recipe": Recipe(steps=3), "weights": torch.ones(MODELS, N)},
    "subsets": {"subsets": tuple(torch.arange(12) + j for j in range(MODELS))},
    "subsets of several sizes": {"subsets": tuple(torch.arange(9 + j) for j in range(MODELS))},
    "adam": {"recipe": STEPS.but(optimiser="adam")},
    "adamw, weight decay, a cosine": {
        "recipe": STEPS.but(optimiser="adamw", weight_decay=0.1, schedule="cosine")
    },
    "augmented": {"recipe": STEPS.but(augment="color_crop_cutout_flip_scale_rotate")},
    "CutMix": {"recipe": STEPS.but(cutmix=1.0)},
    "flat minima": {"recipe": STEPS.but(rho=0.1, gsam_alpha=0.1)},
    "snapshots": {"snapshots": (0, 2)},
}


def data(device: str = "cpu") -> Dataset:
    labels = Hard((torch.arange(N) % CLASSES).to(device))
    return Dataset(Key(1).normal(N, 1, 8, 8).to(device), labels, tuple(map(str, range(CLASSES))), Pixel())


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A dataset on a device; what is looked at when it is made, once, is not the steps' affair."""
    monkeypatch.setattr(Dataset, "__post_init__", lambda self: None)
    return data("meta")


def training(on: Dataset, **wishes: Any) -> Training:
    given = {"recipe": STEPS, "keys": Key(2).split(MODELS)} | wishes
    return Training(on, ConvNet(depth=2, width=8), **given)


@pytest.mark.parametrize("plan", [Plan("stacked", 8, 400), Plan("loop", 1)], ids=["stacked", "one by one"])
@pytest.mark.parametrize("case", CASES)
def test_a_training_step_does_not_wait(case: str, plan: Plan, away: Dataset) -> None:
    wanted = training(away, **CASES[case])
    for part in (wanted,) if plan.layout == "stacked" else map(wanted.some, ([j] for j in range(MODELS))):
        found = train_chunk(part, plan)
        assert found.final.device.type == found.snapshots.device.type == "meta"


def test_watching_a_training_does_not_wait(away: Dataset) -> None:
    found = train_chunk(training(away, observe=Observe((1, 3), {"itself": away})), Plan("stacked", 8, 400))
    assert found.seen["itself"].device.type == "meta"


def test_one_that_waits_is_found(away: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Hard.loss
    monkeypatch.setattr(Hard, "loss", lambda self, logits: loss(self, logits) * float(logits.mean() > 0))
    with pytest.raises(RuntimeError, match="meta"):
        train_chunk(training(away), Plan("stacked", 8, 400))


class Waits(TorchDispatchMode):
    """Counts what asks the device for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["graph", "adjoint", "tesla"])
def test_differentiating_through_training_waits_once_however_long_it_is(mode: Mode) -> None:
    start, images = Key(3).normal(6), Key(4).normal(5, 6)
    rule = Momentum() if mode == "tesla" else Momentum(0.5)

    def waits(steps: int) -> int:
        with Waits() as counted:
            unroll(
                lambda theta, learned, t: F.softplus(learned[0] @ theta).mean(),
                lambda theta: theta.square().sum(),
                start,
                [images],
                torch.full((steps,), 0.1),
                rule=rule,
                mode=mode,
            )
        return counted.count

    assert waits(2) == waits(7) == 1

"""Networks that remember: methods through training refuse them, gradient matching holds their statistics constant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from distillens import distillers
from distillens.core.checks import UserError
from distillens.core.config import override, settings_of
from distillens.core.contracts import Buffers, Distiller, Like, Mode, Params, Problem, State
from distillens.core.dataset import Dataset, Splits
from distillens.core.rng import Key
from distillens.data.planted import planted
from distillens.distillers._gradient import Network
from distillens.distillers._pixels import real_batch
from distillens.distillers.dc import DC
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.runs import Runs


def of_family(*families: str) -> list[str]:
    return [name for name in distillers.room.names() if distillers.room.find(name).family in families]


THROUGH_TRAINING = of_family("trajectory", "unrolled")
BY_GRADIENT = of_family("gradient")
# One expert of one pass, and nothing of which the refusal has to wait.
TINY = {
    "steps": 3,
    "experts": 1,
    "expert_epochs": 1,
    "expansion_end": 0,
    "first_max_start_epoch": 1,
    "max_start_epoch": 1,
    "outer_loop": 2,
    "inner_loop": 2,
    "batch_real": 4,
    "batch_train": 4,
    "n_data": 8,
    "lr_net": 0.1,
    "init": "real",
}


def tiny(name: str, data: Dataset, ipc: int) -> Distiller:
    method = distillers.room.find(name).defaults(data, ipc)
    known = settings_of(method)
    return override(method, [f"{field}={value}" for field, value in TINY.items() if field in known])


@dataclass(frozen=True)
class Remembering(MLP):
    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        params, _ = super().init(like, key)
        return params, {"seen": torch.zeros(1)}


def test_the_methods_are_known() -> None:
    assert {"bptt", "mtt", "tesla", "ftd", "datm", "wang2018", "rtp", "rat_bptt"} <= set(THROUGH_TRAINING)
    assert {"dc", "dsa", "idc"} <= set(BY_GRADIENT)


@pytest.mark.parametrize("name", THROUGH_TRAINING)
def test_a_network_with_buffers_is_refused(name: str, planted: Splits) -> None:
    method = replace(tiny(name, planted.train, 1), net=Remembering())  # type: ignore[type-var]
    problem = Problem(planted.train, 1, Key(0))
    runs = Runs(Plan())
    inputs = {place: runs.trajectories(need) for place, need in method.needs(problem).items()}
    problem = Problem(planted.train, 1, Key(0), inputs)
    with pytest.raises(UserError, match="needs a network without buffers; got Remembering with seen"):
        method.step(problem, method.start(problem), 0)


def test_a_network_with_many_buffers_is_refused_in_one_line(planted: Splits) -> None:
    method = replace(tiny("bptt", planted.train, 1), net=ConvNet(depth=2, width=4, norm="batch"))  # type: ignore[type-var]
    problem = Problem(planted.train, 1, Key(0))
    with pytest.raises(UserError, match=r"got ConvNet with norm0\.mean and 3 more; choose a norm"):
        method.step(problem, method.start(problem), 0)


# ---- batch norm in gradient matching ----


@dataclass(frozen=True)
class BatchNormed:
    """One convolution, batch norm as torch defines it (momentum 0.1), ReLU, the mean over places, a linear layer."""

    mixes_examples: ClassVar[bool] = True

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        params = {
            "conv.weight": key.fold("conv").normal(4, like.shape[0], 3, 3) / 3,
            "norm.weight": torch.ones(4),
            "norm.bias": torch.zeros(4),
            "linear.weight": key.fold("linear").normal(like.k, 4),
        }
        return params, {"mean": torch.zeros(4), "variance": torch.ones(4)}

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        x = F.conv2d(x, params["conv.weight"], padding=1)
        mean, variance, after = buffers["mean"], buffers["variance"], buffers
        if mode == "train":
            mean = x.mean((0, 2, 3))
            variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
            n = x.numel() // 4
            after = {
                "mean": 0.9 * buffers["mean"] + 0.1 * mean.detach(),
                "variance": 0.9 * buffers["variance"] + 0.1 * variance.detach() * n / (n - 1),
            }
        x = (x - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
        x = x * params["norm.weight"][:, None, None] + params["norm.bias"][:, None, None]
        return x.relu().mean((2, 3)), after

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        features, after = self.features(params, buffers, x, mode)
        return features @ params["linear.weight"].T, after


NET = BatchNormed()
KEY = Key(5, ("batch norm",))


def fine() -> Dataset:
    rough = planted(Key(7), per_class=20, shape=(2, 8, 8)).train
    return Dataset(rough.images.double(), rough.labels, rough.classes, rough.space)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_net_is_torchs() -> None:
    params, buffers = NET.init(fine(), Key(1))
    x = Key(2).normal(6, 2, 8, 8)
    mean, variance = buffers["mean"].clone(), buffers["variance"].clone()
    found, after = NET.features(params, buffers, x, "train")
    z = F.conv2d(x, params["conv.weight"], padding=1)
    seen = F.batch_norm(z, mean, variance, training=True)  # moves both in place
    torch.testing.assert_close(found, seen.relu().mean((2, 3)))
    torch.testing.assert_close(after, {"mean": mean, "variance": variance})


def test_sixteen_real_images_a_class_set_the_statistics() -> None:
    problem = Problem(fine(), 2, KEY)
    network = Network.fresh(NET, problem, Key(1))
    settled = network.settled(problem, Key(2))
    images = real_batch(problem, Key(2), 16)
    assert images.shape[:2] == (3, 16)
    z = F.conv2d(images.flatten(0, 1), network.params["conv.weight"], padding=1)
    mean, variance = network.buffers["mean"].clone(), network.buffers["variance"].clone()
    F.batch_norm(z, mean, variance, training=True)
    assert off(settled.buffers["mean"], mean) < 1e-12 and off(settled.buffers["variance"], variance) < 1e-12
    assert torch.equal(network.buffers["variance"], torch.ones(4).double())  # nothing given is changed
    assert torch.equal(settled.flat, network.flat)
    assert Network.fresh(MLP(), problem, Key(1)).settled(problem, Key(2)).buffers == {}


def gradients(params: Params, buffers: Buffers, x: torch.Tensor, c: int, keep: bool) -> list[torch.Tensor]:
    weights = [params["conv.weight"], params["linear.weight"]]
    logits, _ = NET.logits(params, buffers, x, "evaluate")
    loss = F.cross_entropy(logits, torch.full((len(x),), c))
    return list(torch.autograd.grad(loss, weights, create_graph=keep))


def test_dc_matches_under_constant_statistics_and_trains_with_its_own() -> None:
    """Settle, match in evaluation mode, train in training mode, settle again: class by class, image by image."""
    problem = Problem(fine(), 2, KEY)
    method = DC(
        outer_loop=2, inner_loop=2, batch_real=5, batch_train=4, lr_img=3.0, lr_net=0.2, init="real", net=NET
    )
    before = method.start(problem)
    key = KEY.fold("step", 0)
    first, buffers = NET.init(fine(), key.fold("net"))
    params = {name: p.double().requires_grad_() for name, p in first.items()}
    buffers = {name: b.double() for name, b in buffers.items()}
    images = before.tensors["images"].clone().requires_grad_()
    mover = torch.optim.SGD([images], 3.0, momentum=0.5)
    trainer = torch.optim.SGD(params.values(), 0.2)
    y = problem.labels()
    for turn in range(2):
        place = key.fold("turn", turn)
        with torch.no_grad():
            settle = real_batch(problem, place.fold("settle"), 16).flatten(0, 1)
            buffers = NET.logits(params, buffers, settle, "train")[1]
        real = real_batch(problem, place.fold("real"), 5)
        loss = torch.zeros((), dtype=torch.float64)
        for c in range(3):
            goal = gradients(params, buffers, real[c], c, keep=False)
            mine = gradients(params, buffers, images[2 * c : 2 * c + 2], c, keep=True)
            for a, b in zip(goal, mine, strict=True):
                for u, v in zip(a.flatten(1), b.flatten(1), strict=True):
                    loss = loss + 1 - u.dot(v) / (u.norm() * v.norm() + 1e-6)
        mover.zero_grad()
        (images.grad,) = torch.autograd.grad(loss, images)
        mover.step()
        for a_pass in range(2 if turn == 0 else 0):
            for index in torch.split(place.fold("train").fold(a_pass).permutation(6), 4):
                logits, buffers = NET.logits(params, buffers, images.detach()[index], "train")
                trainer.zero_grad()
                F.cross_entropy(logits, y[index]).backward()
                trainer.step()
    after, _ = method.step(problem, before, 0)
    assert (
        off(after.tensors["images"] - before.tensors["images"], images.detach() - before.tensors["images"])
        < 1e-8
    )


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_gradient_matching_takes_batch_norm_and_goes_on_from_any_step(name: str, tmp_path: Path) -> None:
    problem = Problem(fine(), 2, KEY)
    method = replace(tiny(name, problem.real, 2), net=NET)  # type: ignore[type-var]
    whole = [method.start(problem)]
    for i in range(3):
        whole.append(method.step(problem, whole[-1], i)[0])
        assert not torch.equal(whole[-1].tensors["images"], whole[-2].tensors["images"])
        assert all(bool(torch.isfinite(value).all()) for value in whole[-1].tensors.values())
    for killed in range(3):
        whole[killed].save(tmp_path / "state")
        state = State.load(tmp_path / "state")
        for i in range(killed, 3):
            state = method.step(problem, state, i)[0]
        for place, value in whole[-1].tensors.items():
            assert torch.equal(state.tensors[place], value), (killed, place)

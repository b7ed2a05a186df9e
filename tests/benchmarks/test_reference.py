"""The benchmark's plain references compute what the package computes: the ratios compare the same work."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks.reference import dc, dm, early_stopped, leave_one_out, mtt, step, subsets
from benchmarks.reference.convnet import convnet
from distillens.core.contracts import Problem
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.core.vector import Shapes
from distillens.distillers.dc import DC
from distillens.distillers.dm import DM
from distillens.distillers.mtt import MTT
from distillens.engine.plan import Plan
from distillens.experts import Trajectories
from distillens.nets.convnet import ConvNet
from distillens.train import Observe, Training, train

K, EACH, IPC = 3, 4, 2
NET = ConvNet(depth=2, width=4)
EXACT = Plan("loop", 1, precision="float64")
CLOSE = 1e-9
KEY = Key(3)


def data() -> Dataset:
    images = KEY.fold("data").normal(K * EACH, 1, 8, 8).double()
    return Dataset(images, Hard(torch.arange(K).repeat_interleave(EACH)), ("a", "b", "c"), Pixel())


def problem() -> Problem:
    return Problem(data(), IPC, KEY.fold("problem"))


def module(key: Key) -> nn.Sequential:
    """The reference's network with the parameters that ours has at a key."""
    built = convnet(1, 8, width=4, depth=2, k=K).double()
    params, _ = NET.init(data(), key)
    for own, value in zip(built.parameters(), params.values(), strict=True):
        own.data.copy_(value)
    return built


def flat(net: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def real() -> list[torch.Tensor]:
    return [data().images[index] for index in data().by_class]


def moving(images: torch.Tensor, lr: float, momentum: float = 0.5) -> tuple[torch.Tensor, torch.optim.SGD]:
    leaf = images.clone().requires_grad_()
    return leaf, torch.optim.SGD([leaf], lr, momentum)


def test_the_references_stand_on_their_own() -> None:
    files = sorted(Path(step.__file__).parent.glob("*.py"))
    assert len(files) == 9
    assert [file.name for file in files if "distillens" in file.read_text()] == []


def test_a_training_step_is_the_same() -> None:
    recipe = Recipe(steps=3, lr=0.1)
    net = module(KEY.fold("init"))
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        step.step(net, data().images, data().labels.hard(), optimiser)
    found = train(Training(data(), NET, recipe, (KEY,)), EXACT).final[0]
    assert off(found, flat(net)) < CLOSE


def test_dm_moves_the_images_alike() -> None:
    """Every real image is drawn, so that the order of a draw does not count."""
    method = DM(lr_img=1.0, batch_real=EACH, augment="", net=NET)
    state = method.start(problem())
    images, optimiser = moving(state.tensors["images"], 1.0)
    for i in range(2):
        place = problem().key.fold("step", i, "net")
        dm.step(lambda place=place: module(place), real(), images, optimiser, EACH)
        state, _ = method.step(problem(), state, i)
        assert off(state.tensors["images"], images.detach()) < CLOSE


def test_dc_matches_and_trains_alike() -> None:
    """The second turn starts from the network that was trained on the images that the first one moved."""
    method = DC(outer_loop=2, inner_loop=3, lr_net=0.1, batch_real=EACH, init="real", net=NET)
    before = method.start(problem())
    images, optimiser = moving(before.tensors["images"], 0.1)
    net = module(problem().key.fold("step", 0, "net"))
    for turn in range(2):
        dc.match(net, real(), images, optimiser, EACH)
        if turn == 0:
            trained = torch.optim.SGD(net.parameters(), 0.1)
            dc.train(net, images, problem().labels(), trained, passes=3)
    state, _ = method.step(problem(), before, 0)
    moved = images.detach() - before.tensors["images"]
    assert off(state.tensors["images"] - before.tensors["images"], moved) < 1e-8


def test_mtt_moves_images_and_rate_alike() -> None:
    params, _ = NET.init(data(), KEY.fold("expert"))
    shapes = Shapes.of(params)
    theta = shapes.flatten(params).double()
    target = theta + 0.1 * KEY.fold("target").normal(shapes.size).double()
    experts = Trajectories(NET, shapes, 1, (torch.stack([theta, target])[None],), (1,))
    asked = Problem(data(), IPC, problem().key, {"experts": experts})
    method = MTT(
        syn_steps=4,
        expert_epochs=1,
        max_start_epoch=1,
        lr_start=0.05,
        lr_lr=1e-3,
        experts=1,
        augment="",
        net=NET,
    )
    before = method.start(asked)
    images, of_images = moving(before.tensors["images"], method.lr_img)
    rate, of_rate = moving(torch.tensor(0.05, dtype=torch.float64), method.lr_lr)
    mtt.step(
        convnet(1, 8, width=4, depth=2, k=K).double(),
        theta,
        target,
        images,
        asked.labels(),
        rate,
        (of_images, of_rate),
        steps=4,
    )
    state, _ = method.step(asked, before, 0)
    moved = images.detach() - before.tensors["images"]
    assert off(state.tensors["images"] - before.tensors["images"], moved) < 1e-8
    assert abs(float(state.values["rate"]) - float(rate.detach())) < 1e-9


def test_leave_one_out_trains_the_same_models() -> None:
    weights = 1 - torch.cat([torch.zeros(1, K * EACH), torch.eye(K * EACH)])
    recipe = Recipe(steps=5, lr=0.1)
    found = train(Training(data(), NET, recipe, (KEY,) * len(weights), weights=weights), EXACT).final
    expected = leave_one_out.train(
        module(KEY.fold("init")), data().images, data().labels.hard(), steps=5, lr=0.1
    )
    assert off(found, torch.stack([flat(net) for net in expected])) < CLOSE
    assert off(found[1], found[0]) > 1e-3


def test_subsets_train_the_same_models() -> None:
    """Batches are as large as the subsets: what is drawn by chance is their order alone."""
    keys = KEY.split(2)
    chosen = (torch.tensor([0, 4, 8, 9]), torch.tensor([1, 2, 5, 7, 10]))
    recipe = Recipe(steps=5, lr=0.1, batch=8)
    found = train(Training(data(), NET, recipe, keys, subsets=chosen), EXACT).final
    nets = iter([module(key.fold("init")) for key in keys])
    expected = subsets.train(
        lambda: next(nets), data().images, data().labels.hard(), chosen, steps=5, batch=8, lr=0.1
    )
    assert off(found, torch.stack([flat(net) for net in expected])) < CLOSE


def test_a_subset_is_seen_in_batches_that_cover_it() -> None:
    seen: list[int] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, K).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return self.linear(x.flatten(1))

    subsets.train(Watching, data().images, data().labels.hard(), [torch.arange(K * EACH)], steps=5, batch=5)
    assert seen == [5, 5, 2, 5, 5]


def test_early_stopped_models_predict_alike() -> None:
    keys = KEY.split(2)
    test = Dataset(
        KEY.fold("test").normal(50, 1, 8, 8).double(), Hard(torch.arange(50) % K), data().classes, Pixel()
    )
    watched = Observe(tuple(range(1, 6)), {"test": test})
    recipe = Recipe(steps=5, lr=0.1, batch=64)
    found = train(Training(data(), NET, recipe, keys, observe=watched), EXACT).seen["test"]
    nets = iter([module(key.fold("init")) for key in keys])
    expected = early_stopped.predictions(
        lambda: next(nets),
        data().images,
        data().labels.hard(),
        test.images,
        models=2,
        steps=5,
        batch=64,
        lr=0.1,
    )
    assert torch.equal(found.long(), expected)
    assert bool((expected[:, 0] != expected[:, -1]).any())

"""Gradients of all images and of each, against plain torch modules and autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from distillens.attribution import gradients as attribution
from distillens.attribution.gradients import example_gradients, mean_gradient
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard, Labels, Logits, Probabilities, Targets
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.core.vector import Shapes
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP

KEY = Key(811, ("attribution",))
N, K = 7, 3
IMAGES = KEY.fold("images").normal(N, 2, 8, 8).double()
CLASSES = KEY.fold("classes").integers(K, N)
TABLE = KEY.fold("table").normal(N, K).double()

Started = tuple[Shapes, torch.Tensor, dict[str, torch.Tensor]]


def labelled(labels: Labels) -> Dataset:
    return Dataset(IMAGES, labels, ("a", "b", "c"), Pixel())


DATA = labelled(Hard(CLASSES))


def started(net: ConvNet | MLP) -> Started:
    params, buffers = net.init(DATA, KEY.fold("init"))
    shapes = Shapes.of(params)
    return shapes, shapes.flatten(params).double(), {name: b.double() for name, b in buffers.items()}


def plain(norm: str, buffers: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Two blocks and a linear layer of torch's own modules, in evaluation."""
    blocks: list[torch.nn.Module] = []
    for place, channels in enumerate((2, 4)):
        after = torch.nn.GroupNorm(4, 4) if norm == "group" else torch.nn.BatchNorm2d(4)
        if isinstance(after, torch.nn.BatchNorm2d):
            after.running_mean = buffers[f"norm{place}.mean"]
            after.running_var = buffers[f"norm{place}.variance"]
        blocks += [torch.nn.Conv2d(channels, 4, 3, padding=1), after, torch.nn.ReLU(), torch.nn.AvgPool2d(2)]
    return torch.nn.Sequential(*blocks, torch.nn.Flatten(), torch.nn.Linear(16, K)).double().eval()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_both_are_what_autograd_gives_for_torchs_own_modules(norm: str) -> None:
    net = ConvNet(depth=2, width=4, norm=norm)  # type: ignore[arg-type]
    shapes, flat, buffers = started(net)
    # What a trained network remembers is neither 0 nor 1.
    buffers = {name: b + 0.1 + KEY.fold(name).uniform(*b.shape) for name, b in buffers.items()}
    before = {name: b.clone() for name, b in buffers.items()}
    twin = plain(norm, buffers)
    for own, value in zip(twin.parameters(), shapes.unflatten(flat).values(), strict=True):
        own.data = value.clone()
    slow = []
    for i in range(N):
        loss = F.cross_entropy(twin(IMAGES[i : i + 1]), CLASSES[i : i + 1])
        slow.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))]))
    each = torch.cat(list(example_gradients(net, shapes, flat, DATA, buffers)))
    torch.testing.assert_close(each, torch.stack(slow), rtol=1e-9, atol=1e-12)
    together = mean_gradient(net, shapes, flat, DATA, buffers)
    torch.testing.assert_close(together, torch.stack(slow).mean(0), rtol=1e-9, atol=1e-12)
    assert all(bool((buffers[name] == b).all()) for name, b in before.items())


# The slope of each loss with respect to the logits, worked out by hand.
SLOPES: dict[str, tuple[Labels, Callable[[torch.Tensor], torch.Tensor]]] = {
    "probabilities": (Probabilities(TABLE.softmax(1)), lambda z: z.softmax(1) - TABLE.softmax(1)),
    "logits": (Logits(TABLE), lambda z: z.softmax(1) - TABLE.softmax(1)),
    "targets": (Targets(TABLE), lambda z: z - TABLE),
}


@pytest.mark.parametrize("kind", SLOPES)
def test_soft_labels_have_the_slope_of_their_own_loss(kind: str) -> None:
    labels, slope = SLOPES[kind]
    net = MLP(1, 5)
    shapes, flat, _ = started(net)
    leaf = flat.clone().requires_grad_()
    logits, _ = net.logits(shapes.unflatten(leaf), {}, IMAGES)
    wanted = slope(logits.detach())
    each = torch.cat(list(example_gradients(net, shapes, flat, labelled(labels))))
    for i, found in enumerate(each):
        only = torch.zeros_like(wanted)
        only[i] = wanted[i]
        (slow,) = torch.autograd.grad(logits, leaf, only, retain_graph=True)
        torch.testing.assert_close(found, slow, rtol=1e-9, atol=1e-12)
    together = mean_gradient(net, shapes, flat, labelled(labels))
    torch.testing.assert_close(together, each.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", [ConvNet(depth=2, width=4, norm="batch"), MLP(1, 5)])
def test_pieces_equal_the_whole_and_come_in_order(
    net: ConvNet | MLP, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, flat, buffers = started(net)
    each = torch.cat(list(example_gradients(net, shapes, flat, DATA, buffers)))
    together = mean_gradient(net, shapes, flat, DATA, buffers)
    monkeypatch.setattr(attribution, "TOGETHER", 3 * IMAGES[0].numel())
    monkeypatch.setattr(attribution, "NUMBERS", 2 * shapes.size)
    pieces = list(example_gradients(net, shapes, flat, DATA, buffers))
    assert [len(piece) for piece in pieces] == [2, 2, 2, 1]
    torch.testing.assert_close(torch.cat(pieces), each, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        mean_gradient(net, shapes, flat, DATA, buffers), together, rtol=1e-9, atol=1e-12
    )
    order = KEY.fold("order").permutation(N)
    shuffled = torch.cat(list(example_gradients(net, shapes, flat, DATA.take(order), buffers)))
    torch.testing.assert_close(shuffled, each[order], rtol=1e-9, atol=1e-12)


def test_they_are_in_the_precision_of_the_parameters_and_leave_these_alone() -> None:
    net = MLP(1, 5)
    shapes, flat, _ = started(net)
    flat = flat.float()
    before = flat.clone()
    assert mean_gradient(net, shapes, flat, DATA).dtype == torch.float32
    assert next(example_gradients(net, shapes, flat, DATA)).dtype == torch.float32
    assert not flat.requires_grad and bool((flat == before).all())

"""Each network beside torch's own modules with the same parameters, and populations beside models one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distillens import kernels, nets
from distillens.core.contracts import Buffers, Net, Params, logits_of_many
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.data.planted import planted
from distillens.engine.plan import Plan
from distillens.engine.workers import Engine
from distillens.nets.alexnet import AlexNet
from distillens.nets.convnet import ConvNet
from distillens.nets.lenet import LeNet
from distillens.nets.resnet18 import ResNet18
from distillens.nets.resnet34 import ResNet34
from distillens.nets.vgg11 import VGG11
from distillens.nets.vit import ViT
from distillens.runs import Runs
from distillens.train import Observe, Training, train

EXACT = Plan("loop", 1, precision="float64")
STACKED = Plan("stacked", 8, precision="float64")
CLOSE = 1e-9


@dataclass(frozen=True)
class Images:
    shape: tuple[int, int, int]
    k: int


COLOUR_32 = Images((3, 32, 32), 10)
GREY_28 = Images((1, 28, 28), 10)
ODD = Images((1, 8, 12), 3)


# ---- twins ----


def normed(kind: str, channels: int) -> list[nn.Module]:
    kinds: dict[str, Callable[[], list[nn.Module]]] = {
        "group": lambda: [nn.InstanceNorm2d(channels, affine=True)],
        "layer": lambda: [nn.GroupNorm(1, channels)],
        "batch": lambda: [nn.BatchNorm2d(channels)],
        "none": list,
    }
    return kinds[kind]()


def layers(kind: str, *rows: tuple[int, int, int, int] | str) -> list[nn.Module]:
    """Convolutions (in, out, side, padding), each with norm and ReLU; "max" and "average" pool by 2."""
    found: list[nn.Module] = []
    for row in rows:
        if isinstance(row, str):
            found.append(nn.MaxPool2d(2) if row == "max" else nn.AvgPool2d(2))
        else:
            before, after, side, padding = row
            found += [nn.Conv2d(before, after, side, padding=padding), *normed(kind, after), nn.ReLU()]
    return found


def convnet(kind: str, pool: str, inputs: int) -> nn.Module:
    rows: list[Any] = [(1, 6, 3, 1), pool, (6, 6, 3, 1), pool]
    return nn.Sequential(
        *layers(kind, *(row for row in rows if row != "none")), nn.Flatten(), nn.Linear(inputs, 3)
    )


def lenet(channels: int, paddings: tuple[int, int], inputs: int, k: int, kind: str = "none") -> nn.Module:
    first, second = paddings
    return nn.Sequential(
        *layers(kind, (channels, 6, 5, first), "max", (6, 16, 5, second), "max"),
        nn.Flatten(),
        nn.Linear(inputs, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, k),
    )


def alexnet(channels: int, padding: int, inputs: int, k: int, kind: str = "none") -> nn.Module:
    rows = [(channels, 8, 5, padding), "max", (8, 12, 5, 2), "max", (12, 16, 3, 1), (16, 12, 3, 1)]
    return nn.Sequential(*layers(kind, *rows, (12, 12, 3, 1), "max"), nn.Flatten(), nn.Linear(inputs, k))


def vgg11(channels: int, padding: int, pools: str, inputs: int, k: int, kind: str) -> nn.Module:
    """``pools``: y or n for each of the five."""
    rows: list[Any] = []
    before = channels
    widths = [[4], [8], [16, 16], [32, 32], [32, 32]]
    for block, pooled in zip(widths, pools, strict=True):
        for after in block:
            rows.append((before, after, 3, 1 if rows else padding))
            before = after
        rows += ["max"] if pooled == "y" else []
    return nn.Sequential(*layers(kind, *rows), nn.Flatten(), nn.Linear(inputs, k))


class Residual(nn.Module):
    def __init__(self, before: int, after: int, kind: str, halving: str) -> None:
        super().__init__()
        stride = 2 if halving == "stride" else 1
        pool: list[nn.Module] = [nn.AvgPool2d(2)] if halving == "average" else []
        self.inner = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            *normed(kind, after),
            nn.ReLU(),
            *pool,
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            *normed(kind, after),
        )
        self.shortcut = nn.Sequential()
        if before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), *pool, *normed(kind, after)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (self.inner(x) + self.shortcut(x)).relu()
        return out


def resnet(
    channels: int, blocks: tuple[int, ...], halvings: str, kind: str, mode: str, inputs: int, k: int
) -> nn.Module:
    """``halvings``: y or n for each of the four stages."""
    stages: list[nn.Module] = [nn.Conv2d(channels, 4, 3, 1, 1, bias=False), *normed(kind, 4), nn.ReLU()]
    before = 4
    for after, count, halves in zip((4, 8, 16, 32), blocks, halvings, strict=True):
        for place in range(count):
            halving = mode if halves == "y" and place == 0 else ""
            stages.append(Residual(before, after, kind, halving))
            before = after
    end: list[nn.Module] = [nn.AdaptiveAvgPool2d(1)] if mode == "stride" else []
    return nn.Sequential(*stages, *end, nn.Flatten(), nn.Linear(inputs, k))


class Transformer(nn.Module):
    def __init__(self, channels: int, patch: int, tokens: int, k: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, 8, patch, patch)
        self.position = nn.Parameter(torch.zeros(tokens, 8))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.linear(self.norm(x).mean(1))
        return out

    def parameters(self, recurse: bool = True) -> Any:
        """In our order; a block's norms stand before what they norm."""
        yield from self.patches.parameters()
        yield self.position
        for block in self.blocks:
            attention, mixed = block.self_attn, block.self_attn.out_proj
            yield from block.norm1.parameters()
            yield from (attention.in_proj_weight, attention.in_proj_bias)
            for part in (mixed, block.norm2, block.linear1, block.linear2):
                yield from part.parameters()
        yield from (*self.norm.parameters(), *self.linear.parameters())


R18, R34 = (2, 2, 2, 2), (3, 4, 6, 3)
TWINS: list[Any] = [
    *(
        pytest.param(ConvNet(2, 6, norm, pool), ODD, convnet(norm, pool, inputs), id=f"convnet-{norm}-{pool}")  # type: ignore[arg-type]
        for norm in ("group", "batch", "layer", "none")
        for pool, inputs in (("average", 36), ("max", 36), ("none", 576))
    ),
    pytest.param(LeNet(), COLOUR_32, lenet(3, (0, 0), 400, 10), id="lenet-32"),
    pytest.param(LeNet(), GREY_28, lenet(1, (2, 0), 400, 10), id="lenet-28"),
    pytest.param(LeNet(norm="batch"), ODD, lenet(1, (2, 2), 96, 3, "batch"), id="lenet-odd-batch"),
    pytest.param(AlexNet(8), COLOUR_32, alexnet(3, 2, 192, 10), id="alexnet-32"),
    pytest.param(AlexNet(8), GREY_28, alexnet(1, 4, 192, 10), id="alexnet-28"),
    pytest.param(AlexNet(8, "batch"), ODD, alexnet(1, 2, 12, 3, "batch"), id="alexnet-odd-batch"),
    pytest.param(VGG11(4), COLOUR_32, vgg11(3, 1, "yyyyy", 32, 10, "group"), id="vgg11-32"),
    pytest.param(VGG11(4, "batch"), GREY_28, vgg11(1, 3, "yyyyy", 32, 10, "batch"), id="vgg11-28-batch"),
    pytest.param(VGG11(4, "none"), ODD, vgg11(1, 1, "nnyyy", 32, 3, "none"), id="vgg11-odd-none"),
    pytest.param(ResNet18(4), COLOUR_32, resnet(3, R18, "nyyy", "group", "stride", 32, 10), id="resnet18-32"),
    pytest.param(
        ResNet18(4, "batch"),
        GREY_28,
        resnet(1, R18, "nyyy", "batch", "stride", 32, 10),
        id="resnet18-28-batch",
    ),
    pytest.param(
        ResNet18(4, "group", "average"),
        GREY_28,
        resnet(1, R18, "nyyy", "group", "average", 32 * 9, 10),
        id="resnet18-28-average",
    ),
    pytest.param(
        ResNet18(4, "batch", "average"),
        COLOUR_32,
        resnet(3, R18, "nyyy", "batch", "average", 32 * 16, 10),
        id="resnet18-32-average-batch",
    ),
    pytest.param(
        ResNet18(4, "none"), ODD, resnet(1, R18, "nyyn", "none", "stride", 32, 3), id="resnet18-odd-none"
    ),
    pytest.param(
        ResNet34(4, "batch"), ODD, resnet(1, R34, "nyyn", "batch", "stride", 32, 3), id="resnet34-odd-batch"
    ),
    pytest.param(ViT(4, 2, 8, 2), ODD, Transformer(1, 4, 6, 3), id="vit-odd"),
    pytest.param(ViT(8, 2, 8, 2), COLOUR_32, Transformer(3, 8, 16, 10), id="vit-32"),
]


def moved(net: Net, like: Images) -> tuple[Params, Buffers]:
    """Parameters and statistics away from where they start, so that none can be overlooked."""
    params, buffers = net.init(like, Key(0))
    place = Key(3)
    return (
        {n: (v + 0.1 * place.fold(n).normal(*v.shape)).double() for n, v in params.items()},
        {n: (v + place.fold(n).uniform(*v.shape)).double() for n, v in buffers.items()},
    )


def copied(twin: nn.Module, params: Params, buffers: Buffers) -> nn.Module:
    twin = twin.double()
    with torch.no_grad():
        for own, value in zip(twin.parameters(), params.values(), strict=True):
            own.copy_(value.view(own.shape))
        for own, value in zip(remembered(twin), buffers.values(), strict=True):
            own.copy_(value)
    return twin


def remembered(twin: nn.Module) -> list[torch.Tensor]:
    return [value for value in twin.buffers() if value.is_floating_point()]


@pytest.mark.parametrize(("net", "like", "twin"), TWINS)
def test_a_network_is_torchs_own_module_with_the_same_parameters(
    net: Net, like: Images, twin: nn.Module
) -> None:
    params, buffers = moved(net, like)
    twin = copied(twin, params, buffers)
    x = Key(4).normal(5, *like.shape).double()
    with torch.no_grad():
        torch.testing.assert_close(net.logits(params, buffers, x)[0], twin.eval()(x), rtol=1e-10, atol=1e-10)
        logits, after = net.logits(params, buffers, x, "train")
        torch.testing.assert_close(logits, twin.train()(x), rtol=1e-10, atol=1e-10)
    assert after.keys() == buffers.keys()
    for own, value in zip(remembered(twin), after.values(), strict=True):
        torch.testing.assert_close(value, own, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("lenet", {}, 62_006),
        ("alexnet", {}, 1_872_202),
        ("vgg11", {}, 9_231_114),
        ("vgg11", {"norm": "batch"}, 9_231_114),
        ("resnet18", {"norm": "batch"}, 11_173_962),
        ("resnet18", {}, 11_173_962),
        ("resnet18", {"downsample": "average"}, 11_250_762),
        ("resnet34", {"norm": "batch"}, 21_282_122),
        ("vit", {}, 2_693_194),
    ],
)
def test_the_networks_have_the_published_sizes_on_cifar10(name: str, changes: Any, count: int) -> None:
    net = replace(nets.named(name, COLOUR_32), **changes)
    assert net == replace(nets.named(name), **changes)  # what the field takes is the default
    assert sum(value.numel() for value in net.init(COLOUR_32, Key(0))[0].values()) == count


@pytest.mark.parametrize("name", nets.room.names())
def test_the_page_on_networks_says_their_sizes(name: str) -> None:
    rows = (Path(__file__).parents[2] / "docs" / "networks.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{name}` |")]
    params, _ = nets.named(name, COLOUR_32).init(COLOUR_32, Key(0))
    assert f"| {sum(value.numel() for value in params.values()):,} |" in row


@pytest.mark.parametrize("name", nets.room.names())
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64), (2, 9, 5), (1, 4, 6)])
def test_other_sizes_are_taken_too(name: str, shape: tuple[int, int, int]) -> None:
    like = Images(shape, 4)
    net: Any = nets.named(name, like)
    net = replace(net, **{field: 4 for field in ("width",) if name != "vit" and hasattr(net, field)})
    if name == "convnet" and min(shape[1:]) < 4:
        net = replace(net, depth=1)
    params, buffers = net.init(like, Key(0))
    x = Key(1).normal(2, *shape)
    logits, _ = net.logits(params, buffers, x)
    assert logits.shape == (2, 4)
    assert not torch.equal(logits[0], logits[1])  # no norm has left nothing of the images


# ---- batch norm, alone and stacked ----


def test_evaluation_after_training_takes_what_was_remembered() -> None:
    """Twin with every number by hand: momentum 0.1, variance with n - 1."""
    net = ConvNet(1, 2, "batch", "none")
    params, buffers = (
        {n: v.double() for n, v in part.items()} for part in net.init(Images((1, 2, 2), 2), Key(0))
    )
    x = Key(1).normal(3, 1, 2, 2).double()
    _, after = net.logits(params, buffers, x, "train")
    maps = F.conv2d(x, params["conv0.weight"], params["conv0.bias"], padding=1)
    values = maps.transpose(0, 1).flatten(1)
    mean, variance = 0.1 * values.mean(1), 0.9 + 0.1 * values.var(1)
    torch.testing.assert_close(after, {"norm0.mean": mean, "norm0.variance": variance})
    expected = (maps - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(net.features(params, after, x)[0], expected.relu().flatten(1))


MANY = [
    *(ConvNet(2, 4, norm, pool) for norm in ("batch", "layer", "none") for pool in ("average", "max")),  # type: ignore[arg-type]
    ConvNet(2, 4, "group", "max"),
    LeNet(2, "batch"),
    ResNet18(2, "batch"),
    ViT(4, 1, 4, 2),
    nets.from_module("tests.modules:Normed", channels="{channels}", classes="{k}"),
]
every = pytest.mark.parametrize("net", MANY, ids=str)


@every
@pytest.mark.parametrize("shared", [True, False], ids=["shared images", "own images"])
@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_many_networks_are_each_alone(net: Net, shared: bool, mode: Any) -> None:
    started = [net.init(ODD, Key(seed)) for seed in range(3)]
    stacked = [
        {n: torch.stack([own[part][n] for own in started]).double() for n in started[0][part]}
        for part in (0, 1)
    ]
    x = Key(5).normal(*(() if shared else (3,)), 4, *ODD.shape).double()
    logits, after = logits_of_many(net, stacked[0], stacked[1], x, mode)
    assert after.keys() == stacked[1].keys()
    for j in range(3):
        own = [{n: v[j] for n, v in part.items()} for part in stacked]
        alone, left = net.logits(own[0], own[1], x if shared else x[j], mode)
        torch.testing.assert_close(logits[j], alone, rtol=1e-11, atol=1e-12)
        for name, value in left.items():
            torch.testing.assert_close(after[name][j], value, rtol=1e-11, atol=1e-12)


def data(place: str = "data", n: int = 12) -> Dataset:
    images = torch.stack([Key(1).fold(place, i).normal(1, 8, 12) for i in range(n)])
    return Dataset(images, Hard(torch.arange(n) % 3), ("a", "b", "c"), Pixel())


MIXING = [ConvNet(2, 4, "batch"), VGG11(2, "batch"), ResNet18(2, "batch"), MANY[-1]]
mixing = pytest.mark.parametrize("net", MIXING, ids=["convnet", "vgg11", "resnet18", "module"])


def asked(net: Net, **changes: Any) -> Training:
    return Training(data(), net, Recipe(steps=5, lr=0.05, momentum=0.9, **changes), Key(0).split(3))


SUBSETS = tuple(torch.arange(12)[start:] for start in (0, 2, 5))


@mixing
@pytest.mark.parametrize("case", ["full", "batches", "subsets"])
def test_a_population_with_batch_norm_is_its_models_one_by_one(net: Net, case: str) -> None:
    training = asked(net, batch=5 if case == "batches" else None)
    if case == "subsets":
        training = replace(training, subsets=SUBSETS)
    together = train(training, STACKED)
    assert together.buffers
    for j in range(3):
        alone = training.models(j, j + 1)
        if case == "subsets":
            alone = replace(alone, data=data().take(SUBSETS[j]), subsets=None)
        one = train(alone, EXACT)
        pairs = [(together.final[j], one.final[0]), (together.logits(data())[j], one.logits(data())[0])]
        pairs += [(value[j], one.buffers[name][0]) for name, value in together.buffers.items()]
        for found, expected in pairs:
            assert float((found - expected).norm() / expected.norm()) < CLOSE


@mixing
def test_accuracy_and_what_is_observed_take_the_stored_statistics(net: Net) -> None:
    watched = data("watched", 7)
    training = replace(asked(net), observe=Observe((5,), {"watched": watched}))
    population = train(training, STACKED)
    for j in range(3):
        params = population.shapes.unflatten(population.final[j])
        own = {name: value[j] for name, value in population.buffers.items()}
        fresh = net.init(watched, Key(0))[1]
        assert any(not torch.equal(value, fresh[name].double()) for name, value in own.items())
        by_hand = torch.cat([net.logits(params, own, x)[0] for x in watched.images.double().split(1)])
        torch.testing.assert_close(population.logits(watched)[j], by_hand, rtol=1e-9, atol=1e-11)
        right = (by_hand.argmax(1) == watched.labels.hard()).double().mean()
        torch.testing.assert_close(population.accuracy(watched)[j], right)
        assert torch.equal(population.seen["watched"][j, 0].long(), by_hand.argmax(1))


@mixing
def test_the_store_gives_statistics_back(net: Net, tmp_path: Path) -> None:
    plan = Plan("stacked", 2)
    (made,) = Runs(plan, folder=tmp_path).get(asked(net))
    again = Runs(plan, folder=tmp_path)
    (read,) = again.get(asked(net))
    assert not again.trained
    assert read.buffers.keys() == made.buffers.keys() != set()
    assert all(torch.equal(read.buffers[name], value) for name, value in made.buffers.items())
    assert torch.equal(read.logits(data()), made.logits(data()))


def test_a_worker_makes_a_module_again(tmp_path: Path) -> None:
    plan = Plan("stacked", 2)
    (here,) = Runs(plan).get(asked(MANY[-1]))
    with Engine(2) as engine:
        (there,) = Runs(plan, engine, tmp_path).get(asked(MANY[-1]))
    assert torch.equal(here.final, there.final)
    assert all(torch.equal(there.buffers[name], value) for name, value in here.buffers.items())


SGD = Recipe(steps=150, batch=64, lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    ("net", "recipe"),
    [
        pytest.param(LeNet(), SGD, id="lenet"),
        pytest.param(VGG11(4), SGD.but(lr=0.02), id="vgg11"),
        pytest.param(ResNet18(4, "batch"), SGD.but(steps=100), id="resnet18"),
        pytest.param(ViT(2, 2, 24), SGD.but(optimiser="adam", lr=5e-3), id="vit"),
    ],
)
def test_networks_learn_digits(net: Net, recipe: Recipe, digits: Splits) -> None:
    """Measured once: 0.91, 0.97, 0.94 and 0.84. A norm that leaves nothing of small maps stays at 0.1."""
    population = train(Training(digits.train, net, recipe, (Key(0),)), Plan())
    assert float(population.accuracy(digits.val)) > 0.7


@pytest.mark.parametrize("name", nets.room.names())
def test_only_the_fields_convnet_is_rounded(name: str) -> None:
    """It alone is shown to train as well in bfloat16, which a plan may take unasked."""
    like = planted(Key(1), shape=(3, 16, 16), per_class=2).train
    found: Any = nets.room.find(name)
    variants = [found.defaults(like)]
    if name == "convnet":
        variants += [replace(variants[0], norm="batch"), replace(variants[0], pooling="max")]
    for place, net in enumerate(variants):
        params, buffers = net.init(like, Key(2))
        exact = net.logits(params, buffers, like.images)[0]
        with kernels.using(kernels.Setting(products=torch.bfloat16)):
            rounded = net.logits(params, buffers, like.images)[0]
        assert torch.equal(rounded, exact) == (name != "convnet" or place > 0)

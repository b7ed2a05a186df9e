"""What every network must keep. A new file in ``distillens/nets`` is held to all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from distillens import nets
from distillens.core.checks import UserError
from distillens.core.config import describe, override, restore, settings_of
from distillens.core.contracts import Buffers, Mode, Net, Params
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from tests import modules

STEP = 1e-6  # of finite differences: small enough that no ReLU changes sign on the way
CLOSE = 1e-5  # relative; torch's own norms miss it by 0.5 to 400 %


@dataclass(frozen=True)
class Images:
    """Image shape and number of classes: all that a network may know of the data."""

    shape: tuple[int, int, int]
    k: int


ODD = Images((1, 8, 12), 3)
COLOUR = Images((3, 16, 16), 5)
GREY_28 = Images((1, 28, 28), 10)
SHAPES = [
    pytest.param(ODD, id="1x8x12"),
    pytest.param(COLOUR, id="3x16x16"),
    pytest.param(GREY_28, id="1x28x28"),
]

# Settings that make any network small, where it has them.
TINY = {"depth": "2", "width": "4", "heads": "2"}

# Settings that change what a network computes: held to the same.
VARIANTS = [
    "convnet norm=batch",
    "convnet norm=layer",
    "convnet norm=none pooling=max",
    "convnet norm=batch pooling=none",
    "lenet norm=batch",
    "alexnet norm=group",
    "vgg11 norm=batch",
    "resnet18 norm=batch",
    "resnet18 norm=none downsample=average",
    "resnet18 downsample=average",
    "module",
    "module batch",
]
EVERY = [*nets.room.names(), *VARIANTS]

every_net = pytest.mark.parametrize("name", EVERY)


def tiny(name: str, like: Images) -> Net:
    """A network of the room by name, with settings behind it; somebody else's module."""
    name, *changes = name.split()
    if name == "module":
        return nets.from_module(
            f"{modules.__name__}:{'Normed' if changes else 'Plain'}", channels="{channels}", classes="{k}"
        )
    net: Net = nets.room.find(name).defaults(like)  # type: ignore[attr-defined]
    known = settings_of(net)
    return override(net, [f"{field}={text}" for field, text in TINY.items() if field in known] + changes)


def images(like: Images, n: int, dtype: torch.dtype = torch.float64, place: str = "x") -> torch.Tensor:
    return Key(5).fold(place).normal(n, *like.shape).to(dtype)


def begin(net: Net, like: Images, seed: int = 0) -> tuple[Params, Buffers]:
    params, buffers = net.init(like, Key(seed))
    return {n: v.double() for n, v in params.items()}, {n: v.double() for n, v in buffers.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", nets.room.names())
@pytest.mark.parametrize("like", SHAPES)
def test_the_defaults_give_one_row_of_logits_an_image(name: str, like: Images) -> None:
    net = nets.room.find(name).defaults(like)  # type: ignore[attr-defined]
    params, buffers = net.init(like, Key(0))
    x = images(like, 2, torch.float32)
    features, _ = net.features(params, buffers, x)
    logits, _ = net.logits(params, buffers, x)
    assert features.ndim == 2 and len(features) == 2
    assert logits.shape == (2, like.k)
    assert logits.dtype == features.dtype == torch.float32


@every_net
@pytest.mark.parametrize("like", SHAPES)
def test_logits_are_the_last_layer_on_the_features(name: str, like: Images) -> None:
    net = tiny(name, like)
    params, buffers = begin(net, like)
    x = images(like, 5)
    features, _ = net.features(params, buffers, x)
    *_, weight, bias = params.values()  # the last layer comes last
    assert weight.shape == (like.k, features.shape[1])
    assert bias.shape == (like.k,)
    torch.testing.assert_close(net.logits(params, buffers, x)[0], features @ weight.T + bias)


@every_net
@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_call_changes_nothing_and_repeats(name: str, mode: Mode) -> None:
    net = tiny(name, ODD)
    params, buffers = begin(net, ODD)
    x = images(ODD, 4)
    before = [{n: v.clone() for n, v in given.items()} for given in (params, buffers, {"x": x})]
    first, state = net.logits(params, buffers, x, mode)
    second, state_again = net.logits(params, buffers, x, mode)
    assert torch.equal(first, second)
    assert same(state, state_again)
    for given, kept in zip((params, buffers, {"x": x}), before, strict=True):
        assert same(given, kept)
    if mode == "evaluate":
        assert same(state, buffers)


@every_net
@pytest.mark.parametrize("like", SHAPES)
def test_evaluation_of_an_image_does_not_depend_on_its_batch_mates(name: str, like: Images) -> None:
    net = tiny(name, like)
    params, buffers = begin(net, like)
    x = images(like, 6)
    together, _ = net.logits(params, buffers, x)
    alone = torch.cat([net.logits(params, buffers, one)[0] for one in x.split(1)])
    others = net.logits(params, buffers, torch.cat([x[:1], 100 * images(like, 5, place="others")]))[0]
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(together[:1], others[:1], rtol=1e-11, atol=1e-13)


@every_net
def test_whether_training_mixes_images_is_said_truly(name: str) -> None:
    net = tiny(name, ODD)
    params, buffers = begin(net, ODD)
    x = images(ODD, 4)
    other = torch.cat([x[:1], images(ODD, 3, place="others")])
    here, there = (net.logits(params, buffers, batch, "train")[0][0] for batch in (x, other))
    assert net.mixes_examples != torch.allclose(here, there, rtol=1e-11, atol=1e-13)


@every_net
def test_the_initialisation_comes_from_the_key_alone(name: str) -> None:
    net = tiny(name, ODD)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    params, buffers = net.init(ODD, Key(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, buffers_again = tiny(name, ODD).init(ODD, Key(3))
    assert same(params, again) and same(buffers, buffers_again)
    other, _ = net.init(ODD, Key(4))
    assert list(other) == list(params)
    drawn = [n for n, v in params.items() if float(v.std()) > 0]  # norms start at 1 and 0
    assert sum(params[n].numel() for n in drawn) >= sum(v.numel() for v in params.values()) // 2
    for n in drawn:
        assert not torch.equal(params[n], other[n]), n


@every_net
def test_parameters_are_float32_on_the_cpu_and_no_two_alike(name: str) -> None:
    params, buffers = tiny(name, COLOUR).init(COLOUR, Key(0))
    for value in (*params.values(), *buffers.values()):
        assert value.dtype == torch.float32
        assert value.device.type == "cpu"
        assert not value.requires_grad
    # Two tensors that drew from one place would be multiples of each other.
    drawn = torch.stack([v.flatten()[:4] / v.flatten()[0] for v in params.values() if float(v.std()) > 0])
    apart = torch.cdist(drawn, drawn) + torch.eye(len(drawn))
    assert float(apart.min()) > 1e-3


@every_net
def test_settings_survive_json(name: str) -> None:
    net = tiny(name, ODD)
    assert restore(describe(net)) == net


# ---- derivatives ----

Loss = Callable[[torch.Tensor], torch.Tensor]  # flat parameters or images -> a number


def unit(place: str, like: torch.Tensor) -> torch.Tensor:
    direction = Key(9).fold(place).normal(*like.shape).to(like)
    return direction / direction.norm()


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Case:
    """A network, a batch, labels and a gradient to match, in float64."""

    def __init__(self, net: Net, like: Images, models: int = 1) -> None:
        self.net, self.like = net, like
        started = [begin(net, like, seed) for seed in range(models)]
        self.buffers = started[0][1]
        self.shapes = Shapes.of(started[0][0])
        self.flat = torch.stack([self.shapes.flatten(params) for params, _ in started])
        self.x = images(like, 6)
        self.y = torch.arange(6) % like.k
        self.real = images(like, 6, place="real")

    def loss(self, flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        logits, _ = self.net.logits(self.shapes.unflatten(flat), self.buffers, x, "train")
        return F.cross_entropy(logits, self.y)

    def gradient(self, flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        leaf = flat if flat.requires_grad else flat.detach().requires_grad_()
        return torch.autograd.grad(self.loss(leaf, x), leaf, create_graph=True)[0]


def hessian_vector_product_error(case: Case) -> float:
    flat = case.flat[0].requires_grad_()
    v = unit("v", flat)
    (found,) = torch.autograd.grad(case.gradient(flat, case.x), flat, v)
    ahead, behind = (case.gradient(flat.detach() + s * STEP * v, case.x).detach() for s in (1, -1))
    return off(found, (ahead - behind) / (2 * STEP))


def outer_gradient_error(case: Case) -> float:
    target = case.gradient(case.flat[0], case.real).detach()

    def distance(x: torch.Tensor) -> torch.Tensor:
        return 1 - F.cosine_similarity(case.gradient(case.flat[0], x), target, dim=0)

    return image_gradient_error(distance, case.x)


def third_derivative_error(case: Case) -> float:
    v = unit("v", case.flat[0])

    def curvature(x: torch.Tensor) -> torch.Tensor:
        flat = case.flat[0].detach().requires_grad_()
        (product,) = torch.autograd.grad(case.gradient(flat, x), flat, v, create_graph=True)
        return product @ v

    return image_gradient_error(curvature, case.x)


def stacked_outer_gradient_error(case: Case) -> float:
    per_model = torch.func.vmap(torch.func.grad(case.loss), in_dims=(0, None))
    target = per_model(case.flat, case.real).detach()

    def distance(x: torch.Tensor) -> torch.Tensor:
        return (1 - F.cosine_similarity(per_model(case.flat, x), target, dim=1)).sum()

    return image_gradient_error(distance, case.x)


def image_gradient_error(value: Loss, x: torch.Tensor) -> float:
    """Against finite differences along 8 directions: a directional derivative may hide a fault."""
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    found, expected = [], []
    for i in range(8):
        d = unit(f"direction {i}", x)
        ahead, behind = (value(x + s * STEP * d).detach() for s in (1, -1))
        found.append((gradient * d).sum())
        expected.append((ahead - behind) / (2 * STEP))
    return off(torch.stack(found), torch.stack(expected))


DERIVATIVES: list[Any] = [
    pytest.param(hessian_vector_product_error, 1, id="hessian-vector product"),
    pytest.param(outer_gradient_error, 1, id="outer gradient"),
    pytest.param(third_derivative_error, 1, id="third derivative"),
    pytest.param(stacked_outer_gradient_error, 3, id="outer gradient, models stacked"),
]


@every_net
@pytest.mark.parametrize(("error", "models"), DERIVATIVES)
@pytest.mark.parametrize("like", [pytest.param(ODD, id="1x8x12"), pytest.param(COLOUR, id="3x16x16")])
def test_derivatives_are_those_of_finite_differences(
    name: str, like: Images, error: Callable[[Case], float], models: int
) -> None:
    assert error(Case(tiny(name, like), like, models)) < CLOSE


@dataclass(frozen=True)
class Forgetful:
    """Instance norm whose variance is a constant to the gradient: right values, wrong derivatives."""

    mixes_examples: ClassVar[bool] = False

    def init(self, like: Any, key: Key) -> tuple[Params, Buffers]:
        c, h, w = like.shape
        return {
            "conv.weight": key.fold("conv").normal(4, c, 3, 3) / 3,
            "linear.weight": key.fold("linear").normal(like.k, 4 * h * w) / 10,
            "linear.bias": torch.zeros(like.k),
        }, {}

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        x = F.conv2d(x, params["conv.weight"], padding=1)
        spread = x.detach().std((2, 3), keepdim=True) if mode == "train" else x.std((2, 3), keepdim=True)
        return F.relu(x / spread).flatten(1), buffers

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        features, buffers = self.features(params, buffers, x, mode)
        return F.linear(features, params["linear.weight"], params["linear.bias"]), buffers


@pytest.mark.parametrize(("error", "models"), DERIVATIVES)
def test_the_check_of_derivatives_finds_a_norm_that_is_wrong(
    error: Callable[[Case], float], models: int
) -> None:
    assert error(Case(Forgetful(), ODD, models)) > 100 * CLOSE


# ---- the networks by name ----


def test_the_networks_of_the_field_are_there() -> None:
    assert nets.room.names() == ["alexnet", "convnet", "lenet", "mlp", "resnet18", "resnet34", "vgg11", "vit"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("lenet", "LeNet"), ("alexnet", "AlexNet"), ("vgg11", "VGG11"), ("resnet34", "ResNet34")],
)
def test_images_of_one_row_are_refused(name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        tiny(name, ODD).init(Images((1, 1, 12), 3), Key(0))
    assert str(error.value) == (
        f"images of 1 x 12 are too small for {said}; expected at least 2 pixels a side"
    )


def test_patches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError) as error:
        override(tiny("vit", ODD), ["patch=3"]).init(ODD, Key(0))
    assert str(error.value) == (
        "patches of 3 x 3 do not fit images of 8 x 12; choose a net.patch that divides both sides"
    )


@pytest.mark.parametrize(
    ("name", "field", "known"),
    [
        ("lenet", "norm", "batch, group, none"),
        ("resnet18", "norm", "batch, group, none"),
        ("resnet18", "downsample", "average, stride"),
    ],
)
def test_unknown_words_are_met_with_the_known_ones(name: str, field: str, known: str) -> None:
    with pytest.raises(UserError, match=rf"unknown {field} 'zzz'; Known: {known}$"):
        nets.room.find(name)(**{field: "zzz"})


def test_the_convnet_of_the_field_has_320010_parameters() -> None:
    net = nets.room.find("convnet").defaults(Images((3, 32, 32), 10))  # type: ignore[attr-defined]
    params, buffers = net.init(Images((3, 32, 32), 10), Key(0))
    assert sum(value.numel() for value in params.values()) == 320_010
    assert params["linear.weight"].shape == (10, 2048)
    assert not buffers


@pytest.mark.parametrize(
    ("like", "count"), [(Images((3, 32, 32), 100), 504_420), (Images((3, 64, 64), 200), 857_160)]
)
def test_the_convnet_of_other_benchmarks_has_the_published_size(like: Images, count: int) -> None:
    net = nets.room.find("convnet").defaults(like)  # type: ignore[attr-defined]
    assert sum(value.numel() for value in net.init(like, Key(0))[0].values()) == count


def test_the_convnet_pads_28_pixels_to_32() -> None:
    net = tiny("convnet", GREY_28)
    params, buffers = begin(net, GREY_28)
    x = images(GREY_28, 3)
    by_hand = F.pad(x, (3, 3, 3, 3))
    for block in range(2):
        padding = 0 if block == 0 else 1
        by_hand = F.conv2d(
            by_hand, params[f"conv{block}.weight"], params[f"conv{block}.bias"], padding=padding
        )
        by_hand = F.instance_norm(
            by_hand, weight=params[f"norm{block}.weight"], bias=params[f"norm{block}.bias"]
        )
        by_hand = F.avg_pool2d(F.relu(by_hand), 2)
    assert by_hand.shape[2:] == (8, 8)
    torch.testing.assert_close(net.features(params, buffers, x)[0], by_hand.flatten(1))


def test_a_convnet_too_deep_for_the_images_says_so() -> None:
    net = override(tiny("convnet", ODD), ["depth=4"])
    with pytest.raises(UserError) as error:
        net.init(ODD, Key(0))
    assert str(error.value) == (
        "images of 8 x 12 are too small for a ConvNet of depth 4; "
        "expected at least 16 pixels a side; choose a smaller net.depth"
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("convnet", "depth=0", "convnet: depth must be at least 1; got 0"),
        ("mlp", "width=0", "mlp: width must be at least 1; got 0"),
        ("lenet", "width=0", "lenet: width must be at least 1; got 0"),
        ("alexnet", "width=0", "alexnet: width must be at least 1; got 0"),
        ("vgg11", "width=0", "vgg11: width must be at least 1; got 0"),
        ("resnet18", "width=0", "resnet18: width must be at least 1; got 0"),
        ("vit", "heads=0", "vit: heads must be at least 1; got 0"),
        (
            "vit",
            "heads=3",
            "vit: the heads must divide the width; got 3 heads of 4 numbers; set net.width and net.heads",
        ),
    ],
)
def test_sizes_below_one_are_refused(name: str, change: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        override(tiny(name, ODD), [change])
    assert str(error.value) == message


def test_an_unknown_norm_is_met_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"unknown norm 'groups'; Did you mean 'group'\? Known: batch, group"):
        nets.room.find("convnet")(norm="groups")  # type: ignore[call-arg]

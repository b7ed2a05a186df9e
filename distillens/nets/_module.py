"""Anybody's ``torch.nn.Module`` as a network of ours: pure, and with right derivatives of its norms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distillens.core.checks import UserError
from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.rng import Key
from distillens.nets._layers import batch_norm, standardised

PREFIX = "module:"  # how the command line tells a module from a network of the room
KNOWN = {
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    nn.LayerNorm,
}
RELATED = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm)
TRIED = 4  # images that a fresh module is tried on


@dataclass(frozen=True)
class FromModule:
    """Somebody's ``nn.Module`` as a network; made by ``from_module``, which says more.

    ``make`` is "package.module:function", ``arguments`` its keyword arguments, by name.
    """

    make: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        module, colon, function = self.make.partition(":")
        if not (colon and module and function):
            raise UserError(
                "a module is named PACKAGE.MODULE:FUNCTION",
                got=repr(self.make),
                fix="torchvision.models:resnet18, say",
            )
        for name, value in self.arguments:
            if not _plain(value):
                raise UserError(
                    f"{self.make}: the argument {name!r} cannot be written as JSON",
                    got=type(value).__name__,
                    expected="numbers, text, or tuples of them",
                )

    @property
    def mixes_examples(self) -> bool:
        """Whether training mode lets one image change another's output: by a batch norm somewhere in the module."""
        return _mixes(self)

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        """Fresh parameters and floating-point buffers, as the module makes them when torch's generator has the key's seed.

        The global generator is left as it was.

        Raises:
            UserError: the module cannot be made or used (``from_module`` says when).
        """
        shape, k = tuple(like.shape), like.k
        _tried(self, shape, k)
        return _state(_made(self, shape, k, key), k, self.make)

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """What enters the last linear layer, [n, d]."""
        k = len(next(reversed(params.values()))) if params else 0
        body = _body(self, tuple(x.shape[-3:]), k, mode == "train")
        own = {name for name, _ in body.named_parameters()}
        remembered = {name: value.clone() for name, value in buffers.items()} if mode == "train" else buffers
        # What a call assigns to a buffer comes back in this mapping.
        held = {**{name: value for name, value in params.items() if name in own}, **remembered}
        with _plain_attention():
            features = torch.func.functional_call(body, held, (x,))
        return features, {name: held[name] for name in buffers}

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [n, k]."""
        features, buffers = self.features(params, buffers, x, mode)
        *_, last = params
        weight, bias = (
            (last, None) if last.endswith("weight") else (last.removesuffix("bias") + "weight", last)
        )
        return F.linear(features, params[weight], None if bias is None else params[bias]), buffers


def from_module(make: str, **arguments: Any) -> FromModule:
    """Anybody's ``nn.Module`` as a network: ``make`` names the callable that returns it, with its keyword arguments.

    ``from_module("torchvision.models:resnet18", num_classes="{k}")``: the texts "{k}", "{channels}", "{height}" and
    "{width}" stand for the data's numbers. The name, not the module, is kept: JSON can describe it, a worker process
    makes it again. So a folder whose settings name a module runs that module's code when it is used: use only those that
    you trust.

    The module must end in an ``nn.Linear`` with an output a class; the features are what enters it. When it is made,
    ``BatchNorm``, ``InstanceNorm`` and ``LayerNorm`` in it are replaced by elementary operations with the same results
    and parameter names, because torch's have wrong higher derivatives; so is fused attention while it runs, and in-place
    activations are made plain. Running statistics move with every training batch and are returned, never written. Buffers
    of whole numbers (index tables) stay as they were made.

    A fresh module is tried on a few images, once for a shape of data.

    Raises:
        UserError: (here, or from ``init``) the name is not PACKAGE.MODULE:FUNCTION or leads nowhere; an argument is not
            plain; the call fails or gives no module; its last layer is not such a linear layer; training is random
            (dropout); a norm is of an unknown kind, has no fixed momentum, or lets an evaluated image depend on others; a
            call changes the images it is given.
    """
    return FromModule(make, tuple((name, _frozen(value)) for name, value in sorted(arguments.items())))


def from_text(text: str) -> FromModule:
    """The network that ``module:torchvision.models:resnet18`` names, with arguments behind commas: ``,width=8``.

    Arguments are JSON where they can be read so, else text. Without any, the callable is given ``num_classes``.
    """
    make, *given = text.removeprefix(PREFIX).split(",")
    arguments: dict[str, Any] = {}
    for assignment in given:
        name, equals, value = assignment.partition("=")
        if not (equals and name):
            raise UserError(
                "an argument of a module is written NAME=VALUE",
                got=repr(assignment),
                fix=f"{PREFIX}{make},num_classes={{k}}, say",
            )
        try:
            arguments[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name.strip()] = value.strip()
    return from_module(make, **(arguments or {"num_classes": "{k}"}))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


# ---- making the module ----


def _found(make: str) -> Callable[..., Any]:
    """The callable of that name."""
    name, _, function = make.partition(":")
    try:
        found: Any = import_module(name)
        for part in function.split("."):
            found = getattr(found, part)
    except (
        ImportError,
        RuntimeError,
        AttributeError,
    ) as error:  # a torchvision beside another torch raises the second
        raise UserError(
            f"{make} cannot be imported",
            got=f"{type(error).__name__}: {_line(error)}",
            fix="install its package, or put its folder on PYTHONPATH",
        ) from error
    if not callable(found):
        raise UserError(f"{make} is not a function or class", got=type(found).__name__)
    chosen: Callable[..., Any] = found
    return chosen


def _made(net: FromModule, shape: tuple[int, ...], k: int, key: Key) -> nn.Module:
    """A fresh module, its norms replaced; torch's generator has the key's seed meanwhile."""
    make = _found(net.make)
    numbers = {"{k}": k, "{channels}": shape[0], "{height}": shape[1], "{width}": shape[2]}

    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        return numbers.get(value, value) if isinstance(value, str) else value

    arguments = {name: filled(value) for name, value in net.arguments}
    with _generator(key), ThreadPoolExecutor(1) as apart:
        try:
            # In a thread of its own: a transform of torch.func that is under way here does not reach in.
            module = apart.submit(make, **arguments).result()
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError) as error:
            called = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
            raise UserError(
                f"{net.make}({called}) fails", got=f"{type(error).__name__}: {_line(error)}"
            ) from error
    if not isinstance(module, nn.Module):
        raise UserError(f"{net.make} gives no torch.nn.Module", got=type(module).__name__)
    for name, part in list(module.named_modules()):
        if type(part) in KNOWN:
            _put(module, name, _replaced(net.make, name, part))
        elif isinstance(part, RELATED):
            raise UserError(
                f"{net.make}: the norm {name!r} is of a kind whose derivatives are not known to be right",
                got=type(part).__name__,
                expected="torch's own BatchNorm, InstanceNorm, LayerNorm or GroupNorm",
            )
        elif isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            raise UserError(
                f"{net.make}: the layer {name!r} is random in training",
                got=f"{type(part).__name__}({part.p:g})",
                fix="make the module with dropout 0",
            )
        elif getattr(part, "inplace", False):
            part.inplace = False
    return module


def _state(module: nn.Module, k: int, make: str) -> tuple[Params, Buffers]:
    """Its parameters, the last linear layer's last, and its floating-point buffers."""
    head = _head(module, k, make)

    def own(value: torch.Tensor) -> torch.Tensor:
        return value.detach().to("cpu", torch.float32, copy=True)

    params = {name: own(value) for name, value in module.named_parameters()}
    last = {name: value for name, value in params.items() if name.rpartition(".")[0] == head}
    rest = {name: value for name, value in params.items() if name not in last}
    return rest | last, {n: own(b) for n, b in module.named_buffers() if b.is_floating_point()}


def _head(module: nn.Module, k: int, make: str) -> str:
    """The name of the last linear layer with k outputs."""
    found = [
        n
        for n, part in module.named_modules()
        if n and isinstance(part, nn.Linear) and part.out_features == k
    ]
    if not found:
        raise UserError(f"{make} has no nn.Linear inside with {k} outputs, one a class")
    return str(found[-1])


@lru_cache(maxsize=8)
def _body(net: FromModule, shape: tuple[int, ...], k: int, training: bool) -> nn.Module:
    """The module without its last layer: a structure, called with parameters that are given to it."""
    module = _made(net, shape, k, Key(0))
    _put(module, _head(module, k, net.make), nn.Identity())
    return module.train(training)


@lru_cache(maxsize=64)
def _mixes(net: FromModule) -> bool:
    # Its layers, not its sizes, settle this: the field's images stand for any.
    module = _made(net, (3, 32, 32), 10, Key(0))
    return any(isinstance(part, _BatchNorm) for part in module.modules())


@lru_cache(maxsize=64)
def _tried(net: FromModule, shape: tuple[int, ...], k: int) -> None:
    """Refuse a module that does not do what a network must."""
    module = _made(net, shape, k, Key(0))
    params, buffers = _state(module, k, net.make)
    x = Key(0).fold("images").normal(TRIED, *shape)
    given = x.clone()

    def whole(mode: Mode, seed: int) -> torch.Tensor:
        with _generator(Key(seed)), torch.no_grad(), _plain_attention():
            found: torch.Tensor = deepcopy(module).train(mode == "train")(x)
        return found

    try:
        logits, first, second = whole("evaluate", 0), whole("train", 1), whole("train", 2)
    except (TypeError, ValueError, RuntimeError, LookupError, AssertionError) as error:
        raise UserError(
            f"{net.make} does not take images of shape {shape}", got=f"{type(error).__name__}: {_line(error)}"
        ) from error
    if not torch.equal(x, given):
        raise UserError(f"{net.make} changes the images that it is given")
    if not isinstance(logits, torch.Tensor) or logits.shape != (TRIED, k):
        got = str(tuple(logits.shape)) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f"{net.make} gives no logits for {TRIED} images", got=got, expected=f"({TRIED}, {k})")
    if not torch.equal(first, second):
        raise UserError(
            f"{net.make} is random in training", fix="make it without dropout or other randomness in training"
        )
    with torch.no_grad():
        features, _ = net.features(params, buffers, x)
        ours = net.logits(params, buffers, x)[0] if features.ndim == 2 else features
    if ours.shape != logits.shape or not torch.allclose(ours, logits, rtol=1e-4, atol=1e-5):
        raise UserError(
            f"{net.make} does not end in its linear layer {_head(module, k, net.make)!r}",
            fix="a network's logits are the last linear layer on its features",
        )


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Put a layer where another stood."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, part)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def _generator(key: Key) -> Iterator[None]:
    """Torch's global generator with the key's seed, and afterwards as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(key.number())
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by elementary operations: the fused ones can be differentiated once only."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# ---- the norms, by elementary operations ----


class _BatchNorm(nn.Module):
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, like: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias = like.weight, like.bias
        self.eps, self.momentum = like.eps, like.momentum
        self.register_buffer("running_mean", like.running_mean)
        self.register_buffer("running_var", like.running_var)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.momentum is not None
        mode: Mode = "train" if self.training else "evaluate"
        y, *after = batch_norm(
            x, self.running_mean, self.running_var, mode, momentum=self.momentum, eps=self.eps
        )
        if self.training:
            self.running_mean, self.running_var = after
        return _scaled(y, self.weight, self.bias)


class _InstanceNorm(nn.Module):
    def __init__(self, like: nn.modules.instancenorm._InstanceNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = like.weight, like.bias, like.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _scaled(standardised(x, tuple(range(2, x.ndim)), self.eps)[0], self.weight, self.bias)


class _LayerNorm(nn.Module):
    def __init__(self, like: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = like.weight, like.bias, like.eps
        self.axes = tuple(range(-len(like.normalized_shape), 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = standardised(x, self.axes, self.eps)[0]
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


def _scaled(y: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """Channels of [n, c, ...], scaled and shifted."""
    shape = (-1, *[1] * (y.ndim - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _replaced(make: str, name: str, norm: nn.Module) -> nn.Module:
    """A norm of torch's as one of ours."""
    if isinstance(norm, nn.LayerNorm):
        return _LayerNorm(norm)
    if isinstance(norm, nn.modules.instancenorm._InstanceNorm) and not norm.track_running_stats:
        return _InstanceNorm(norm)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
        if norm.momentum is None:
            raise UserError(f"{make}: the norm {name!r} has no momentum", expected="a fixed one, 0.1 say")
        return _BatchNorm(norm)
    raise UserError(
        f"{make}: the norm {name!r} does not evaluate an image by itself",
        got=f"{type(norm).__name__} with track_running_stats={norm.track_running_stats}",
        expected="running statistics in batch norm, none in instance norm",
    )

"""Other people's modules as networks: what they give, what is replaced in them, what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from distillens import cost, nets
from distillens.core.checks import UserError
from distillens.core.config import describe, restore
from distillens.core.rng import Key
from distillens.nets import from_module
from tests import modules


@dataclass(frozen=True)
class Images:
    shape: tuple[int, int, int] = (2, 8, 12)
    k: int = 3


LIKE = Images()
PLAIN = from_module("tests.modules:Plain", channels="{channels}", classes="{k}")
NORMED = from_module("tests.modules:Normed", channels="{channels}", classes="{k}")


def module(kind: str) -> nets._module.FromModule:
    return from_module(
        "tests.modules:sequence",
        kind=kind,
        channels="{channels}",
        height="{height}",
        width="{width}",
        classes="{k}",
    )


@pytest.mark.parametrize("net", [PLAIN, NORMED], ids=["plain", "batch norm"])
def test_the_logits_are_those_of_the_module_itself(net: Any) -> None:
    twin: nn.Module = (modules.Plain if net is PLAIN else modules.Normed)(2, 3).double()
    params, buffers = net.init(LIKE, Key(0))
    params = {n: v.double() for n, v in params.items()}
    buffers = {n: (v + Key(1).fold(n).uniform(*v.shape)).double() for n, v in buffers.items()}
    missing, unexpected = twin.load_state_dict({**params, **buffers}, strict=False)
    assert not unexpected  # names are the module's own
    assert all(name.endswith("num_batches_tracked") for name in missing)
    x = Key(2).normal(5, *LIKE.shape).double()
    kept = x.clone()
    logits, same = net.logits(params, buffers, x)
    torch.testing.assert_close(logits, twin.eval()(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(same[name], buffers[name]) for name in buffers)
    for _ in range(2):
        before = {n: v.clone() for n, v in buffers.items()}
        logits, after = net.logits(params, buffers, x, "train")
        torch.testing.assert_close(logits, twin.train()(x.clone()), rtol=1e-10, atol=1e-10)
        assert all(torch.equal(buffers[name], before[name]) for name in buffers)
        buffers = after
        state = twin.state_dict()
        for name, value in buffers.items():
            torch.testing.assert_close(value, state[name], rtol=1e-10, atol=1e-10)
    assert torch.equal(x, kept)


def test_the_key_is_the_generators_seed_while_the_module_is_made() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    params, _ = PLAIN.init(LIKE, Key(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(Key(3).number())
    twin = modules.Plain(2, 3)
    torch.set_rng_state(before)
    assert params.keys() == dict(twin.named_parameters()).keys()
    assert list(params)[-2:] == ["fc.weight", "fc.bias"]  # the last layer last, wherever the module has it
    assert all(torch.equal(params[name], value) for name, value in twin.named_parameters())


def test_batch_norm_is_what_mixes_images() -> None:
    assert NORMED.mixes_examples
    assert not PLAIN.mixes_examples


def test_it_is_a_value_that_json_describes() -> None:
    net = from_module("a.b:c.d", size=[8, ("{height}", None)], rate=0.5, kind="x")
    assert net.arguments == (("kind", "x"), ("rate", 0.5), ("size", (8, ("{height}", None))))
    assert restore(json.loads(json.dumps(describe(net)))) == net
    assert len({net, from_module("a.b:c.d", kind="x", rate=0.5, size=(8, ("{height}", None)))}) == 1


def test_its_memory_is_counted_like_any_networks() -> None:
    found = cost.cost(NORMED, LIKE)
    assert found.parameters == sum(v.numel() for v in NORMED.init(LIKE, Key(0))[0].values())
    assert found.first > 0


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            from_module("tests.nowhere:f"),
            "tests.nowhere:f cannot be imported; got ModuleNotFoundError: No module ",
        ),
        (
            from_module("tests.modules:Nothing"),
            "tests.modules:Nothing cannot be imported; got AttributeError: module 'tests.modules' has no attribute "
            "'Nothing'; install its package, or put its folder on PYTHONPATH",
        ),
        (from_module("tests.modules:NUMBER"), "tests.modules:NUMBER is not a function or class; got int"),
        (
            from_module("tests.modules:Plain", channels="{channels}"),
            "tests.modules:Plain(channels=2) fails; got TypeError: ",
        ),
        (module("nothing"), "tests.modules:sequence gives no torch.nn.Module; got NoneType"),
        (
            module("dropout"),
            "tests.modules:sequence: the layer '2' is random in training; got Dropout(0.5); "
            "make the module with dropout 0",
        ),
        (
            module("noise"),
            "tests.modules:sequence is random in training; make it without dropout or other randomness in training",
        ),
        (
            module("softmax"),
            "tests.modules:sequence does not end in its linear layer '1'; "
            "a network's logits are the last linear layer on its features",
        ),
        (module("no head"), "tests.modules:sequence has no nn.Linear inside with 3 outputs, one a class"),
        (
            module("tracking"),
            "tests.modules:sequence: the norm '1' does not evaluate an image by itself; got BatchNorm1d with "
            "track_running_stats=False; expected running statistics in batch norm, none in instance norm",
        ),
        (
            module("momentum"),
            "tests.modules:sequence: the norm '1' has no momentum; expected a fixed one, 0.1 say",
        ),
        (
            module("own norm"),
            "tests.modules:sequence: the norm '1' is of a kind whose derivatives are not known to be right; got "
            "_OwnNorm; expected torch's own BatchNorm, InstanceNorm, LayerNorm or GroupNorm",
        ),
        (module("in place"), "tests.modules:sequence changes the images that it is given"),
        (
            module("narrow"),
            "tests.modules:sequence does not take images of shape (2, 8, 12); got RuntimeError: mat1 and mat2",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(net: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        net.init(LIKE, Key(0))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_module_that_breaks_on_import_is_met_with_words(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_vision.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="broken_vision:f cannot be imported; got RuntimeError: operator nms"):
        from_module("broken_vision:f").init(LIKE, Key(0))


@pytest.mark.parametrize("make", ["", "torch.nn", "torch.nn:", ":Linear"])
def test_a_name_needs_a_module_and_a_function(make: str) -> None:
    with pytest.raises(UserError, match=r"a module is named PACKAGE\.MODULE:FUNCTION; got "):
        from_module(make)


def test_arguments_are_plain() -> None:
    with pytest.raises(UserError) as error:
        from_module("a:b", layer=nn.ReLU)
    assert str(error.value) == (
        "a:b: the argument 'layer' cannot be written as JSON; got type; expected numbers, text, or tuples of them"
    )

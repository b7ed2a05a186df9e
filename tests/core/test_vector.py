"""Parameters as one flat vector, and back."""

from __future__ import annotations

import pytest
import torch

from distillens.core.rng import Key
from distillens.core.vector import Shapes

SHAPES = {"weight": (2, 3), "bias": (2,), "scale": (), "deep": (2, 1, 2)}
P = 6 + 2 + 1 + 4


def params(*leading: int) -> dict[str, torch.Tensor]:
    return {name: Key(3).fold(name).normal(*leading, *shape).double() for name, shape in SHAPES.items()}


def test_shapes_remember_names_and_order() -> None:
    shapes = Shapes.of(params())
    assert shapes.names == tuple(SHAPES)
    assert shapes.shapes == tuple(SHAPES.values())
    assert shapes.size == P


def test_flatten_lays_parameters_side_by_side() -> None:
    given = params()
    flat = Shapes.of(given).flatten(given)
    by_hand = [x for name in SHAPES for x in given[name].flatten().tolist()]
    assert flat.tolist() == by_hand


@pytest.mark.parametrize("leading", [(), (4,), (3, 2), (1,)])
def test_unflatten_undoes_flatten(leading: tuple[int, ...]) -> None:
    given, shapes = params(*leading), Shapes.of(params())
    flat = shapes.flatten(given)
    assert flat.shape == (*leading, P)
    again = shapes.unflatten(flat)
    assert list(again) == list(SHAPES)
    for name, tensor in given.items():
        assert again[name].shape == (*leading, *SHAPES[name])
        assert torch.equal(again[name], tensor)


def test_each_model_is_flattened_on_its_own() -> None:
    given, shapes = params(3), Shapes.of(params())
    flat = shapes.flatten(given)
    for m in range(3):
        assert torch.equal(flat[m], shapes.flatten({name: t[m] for name, t in given.items()}))


def test_the_order_is_that_of_the_shapes_not_of_the_mapping() -> None:
    given = params()
    backwards = dict(reversed(given.items()))
    assert torch.equal(Shapes.of(given).flatten(backwards), Shapes.of(given).flatten(given))


def test_unflatten_gives_views() -> None:
    flat = torch.zeros(P)
    Shapes.of(params()).unflatten(flat)["bias"][1] = 5.0
    assert flat.nonzero().flatten().tolist() == [7]


def test_gradients_flow_through_both() -> None:
    shapes = Shapes.of(params())
    flat = Key(4).normal(2, P).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: tuple(t.square() for t in shapes.unflatten(x).values()), (flat,)
    )
    given = {name: t.requires_grad_() for name, t in params().items()}
    weights = torch.arange(P, dtype=torch.float64)
    (shapes.flatten(given) * weights).sum().backward()
    for name, gradient in shapes.unflatten(weights).items():
        assert torch.equal(given[name].grad, gradient)


def test_parameters_that_do_not_fit_are_refused() -> None:
    shapes = Shapes.of(params())
    with pytest.raises(KeyError):
        shapes.flatten({"weight": torch.zeros(2, 3)})
    with pytest.raises(RuntimeError):
        shapes.unflatten(torch.zeros(P + 1))


def test_no_parameters_have_no_shapes() -> None:
    assert Shapes.of({}).size == 0

"""Keys: a draw belongs to a named place, never to the order of calls."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from distillens.core.checks import UserError
from distillens.core.rng import Key

DRAWS: dict[str, Callable[[Key], torch.Tensor]] = {
    "normal": lambda k: k.normal(5),
    "uniform": lambda k: k.uniform(5),
    "integers": lambda k: k.integers(1000, 5),
    "permutation": lambda k: k.permutation(20),
    "generator": lambda k: torch.rand(5, generator=k.generator()),
}
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


@draws
def test_a_key_is_never_consumed(draw: Callable[[Key], torch.Tensor], key: Key) -> None:
    assert torch.equal(draw(key), draw(key))


@draws
def test_the_order_of_draws_is_irrelevant(draw: Callable[[Key], torch.Tensor], key: Key) -> None:
    places = [key.fold("step", i) for i in range(4)]
    forward = [draw(place) for place in places]
    backward = [draw(place) for place in reversed(places)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


@draws
def test_two_places_draw_differently(draw: Callable[[Key], torch.Tensor], key: Key) -> None:
    assert not torch.equal(draw(key.fold(0)), draw(key.fold(1)))
    assert not torch.equal(draw(Key(0)), draw(Key(1)))


def test_more_items_leave_the_draws_of_the_first_alone(key: Key) -> None:
    few = [k.normal(3) for k in key.split(2)]
    many = [k.normal(3) for k in key.split(5)]
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=False))


def test_no_two_of_these_places_share_a_number() -> None:
    places: list[Key] = [
        Key(0),
        Key(1),
        Key(0, (1,)),
        Key(0, ("1",)),
        Key(0, (0,)),
        Key(0, ("",)),
        Key(0, ("a", "b")),
        Key(0, ("ab",)),
        Key(0, ("a, b",)),
        Key(0, ('a", "b',)),
        Key(0, ("b", "a")),
        Key(0, (1, 2)),
        Key(0, (12,)),
        Key(12),
        Key(0, (-1,)),
    ]
    assert len({place.number() for place in places}) == len(places)


def test_folding_one_by_one_or_at_once_is_the_same_place(key: Key) -> None:
    assert key.fold("view", 3) == key.fold("view").fold(3) == Key(0, ("view", 3))


def test_split_folds_whole_numbers(key: Key) -> None:
    assert key.split(3) == (key.fold(0), key.fold(1), key.fold(2))
    assert key.split(0) == ()


def test_a_key_is_a_frozen_value(key: Key) -> None:
    assert hash(Key(0).fold("a")) == hash(Key(0, ("a",)))
    with pytest.raises(AttributeError):
        key.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("path", [(), ("view", 3), ("step", 0, "net", -1), ("naïve",)])
def test_a_number_is_the_sha_256_of_its_place(path: tuple[str | int, ...]) -> None:
    digest = hashlib.sha256(json.dumps([5, *path]).encode()).hexdigest()
    number = Key(5, path).number()
    assert number == int(digest[:16], 16) // 2
    assert 0 <= number < 2**63


def test_json_round_trip_keeps_names_and_numbers_apart() -> None:
    place = Key(3).fold("a", 1, "1")
    written = json.loads(json.dumps(place.to_json()))
    assert written == [3, "a", 1, "1"]
    assert Key.from_json(written) == place
    assert Key.from_json(written).number() == place.number()


@pytest.mark.parametrize("seed", [-1, True, 1.0, "0", None])
def test_a_bad_seed_is_refused(seed: Any) -> None:
    with pytest.raises(
        UserError, match=r"a seed is a whole number from 0; got .*; use --seed 0, say"
    ) as error:
        Key(seed)
    assert repr(seed) in str(error.value)


def _global_states() -> tuple[Any, ...]:
    kind, words, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (kind, words.tolist(), *rest), random.getstate()


@draws
def test_global_generators_are_not_written(draw: Callable[[Key], torch.Tensor], key: Key) -> None:
    before = _global_states()
    draw(key)
    assert _global_states() == before


@draws
def test_global_generators_are_not_read(draw: Callable[[Key], torch.Tensor], key: Key) -> None:
    saved = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        drawn = []
        for seed in (3, 4):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            drawn.append(draw(key))
        assert torch.equal(*drawn)
    finally:
        torch.set_rng_state(saved[0])
        np.random.set_state(saved[1])
        random.setstate(saved[2])


def test_normal_numbers_are_standard_normal(key: Key) -> None:
    x = key.normal(200_000).double()
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.square().mean()) - 1) < 0.02
    assert abs(float((x**4).mean()) - 3) < 0.1
    assert abs(float((x.abs() < 1.96).double().mean()) - 0.95) < 0.005


def test_uniform_numbers_fill_their_range(key: Key) -> None:
    x = key.uniform(100_000, low=-2.0, high=3.0).double()
    assert float(x.min()) >= -2
    assert float(x.max()) < 3
    counts = torch.histc(x, bins=10, min=-2, max=3)
    assert float((counts / 10_000 - 1).abs().max()) < 0.05


def test_whole_numbers_are_evenly_spread_below_high(key: Key) -> None:
    counts = key.integers(7, 70_000).bincount()
    assert len(counts) == 7
    assert float((counts / 10_000 - 1).abs().max()) < 0.05


def test_a_permutation_holds_every_number_once(key: Key) -> None:
    drawn = key.permutation(50)
    assert drawn.sort().values.tolist() == list(range(50))
    assert drawn.tolist() != list(range(50))


def test_the_first_draws_of_many_places_are_independent(key: Key) -> None:
    x = torch.stack([k.normal(2) for k in key.split(2000)]).double()
    assert float(x.mean(0).abs().max()) < 0.08
    assert float((x.var(0) - 1).abs().max()) < 0.12
    assert abs(float(torch.corrcoef(x.T)[0, 1])) < 0.08
    assert abs(float(torch.corrcoef(torch.stack([x[:-1, 0], x[1:, 0]]))[0, 1])) < 0.08


def test_shapes_kinds_and_device_are_fixed(key: Key) -> None:
    for x in (key.normal(2, 3), key.uniform(2, 3)):
        assert (x.shape, x.dtype, x.device.type) == ((2, 3), torch.float32, "cpu")
    assert key.integers(4, 2, 3).shape == (2, 3)
    assert key.integers(4, 2).dtype == key.permutation(4).dtype == torch.int64
    assert key.normal().shape == key.uniform().shape == key.integers(4).shape == ()

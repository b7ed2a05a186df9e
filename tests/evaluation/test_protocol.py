"""A protocol as a value: its budget, candidates and labels, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from distillens import distillers, pipeline
from distillens.core.artefact import DistilledDataset, Order
from distillens.core.checks import UserError
from distillens.core.config import describe, override, restore
from distillens.core.decode import MultiFormation
from distillens.core.labels import Hard, Labels, Logits, Probabilities, Targets, Teacher
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.evaluation.protocol import NEUTRAL, WDDL, Protocol, find
from distillens.evaluation.published import FREPO, IDC, PROTOCOLS, RDED, SRE2L
from distillens.evaluation.teaching import Teaching
from distillens.evaluation.trials import labelled, trials
from distillens.nets.convnet import ConvNet

KEY = Key(5, ("protocols",))
NET = ConvNet(depth=2, width=4)
SHORT = Recipe(steps=10, batch=4)


def a_set(n: int = 10, k: int = 2, **changes: Any) -> DistilledDataset:
    names = tuple("abcdefghij"[:k])
    plain = DistilledDataset({"images": KEY.normal(n, 1, 8, 8)}, Hard(torch.arange(n) % k), names, Pixel())
    return replace(plain, **changes)


# ---- budgets ----


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (8, 4), (3, 4), (10, 1), (10, None)])
def test_passes_are_as_many_steps_as_the_images_make_batches(n: int, batch: int | None) -> None:
    protocol = Protocol("own", "", SHORT.but(batch=batch), passes=7)
    (recipe,) = protocol.recipes(a_set(n))
    left, steps = list(range(n)), 0
    while left:  # one pass, batch by batch
        left, steps = left[batch or n :], steps + 1
    assert recipe.steps == 7 * steps
    assert protocol.recipes()[0].steps == 7
    assert WDDL.recipes(a_set(n)) == (WDDL.recipe,)


def test_a_pass_counts_the_images_that_a_set_decodes_into() -> None:
    four = a_set(4, decode=MultiFormation(2))
    assert len(four) == 4 and len(four.dataset()) == 16
    assert Protocol("own", "", SHORT, passes=3).recipes(four)[0].steps == 3 * 4
    assert IDC.recipes(four)[0].steps == 1000


@pytest.mark.parametrize(
    ("n", "steps"),
    [
        (10, 1000),
        (11, 2000),
        (100, 2000),
        (500, 5000),
        (1000, 10_000),
        (2000, 40_000),
        (5000, 40_000),
        (9000, 40_000),
    ],
)
def test_frepos_steps_go_by_the_points_of_the_set(n: int, steps: int) -> None:
    assert FREPO.recipes(a_set(n))[0].steps == steps


@pytest.mark.parametrize(
    ("ipc", "batch", "steps"), [(1, 10, 300), (2, 50, 300), (10, 50, 600), (50, 100, 1500)]
)
def test_rdeds_batch_goes_by_the_images_a_class(ipc: int, batch: int, steps: int) -> None:
    (recipe,) = RDED.recipes(a_set(10 * ipc, k=10))
    assert (recipe.batch, recipe.steps) == (batch, steps)
    assert RDED.looks(recipe) == tuple(m * steps // 300 for m in (250, 260, 270, 280, 290, 300))


def test_the_learned_rate_is_honoured_where_there_is_one() -> None:
    learned = a_set(recipe=Recipe(lr=0.123))
    follows = replace(WDDL, learned_rate=True)
    assert [r.lr for r in follows.recipes(learned)] == [0.123]
    assert [r.lr for r in follows.recipes(a_set())] == [WDDL.recipe.lr]
    assert [r.lr for r in follows.recipes(a_set(), rate_of=learned)] == [0.123]
    assert [r.lr for r in WDDL.recipes(learned)] == [WDDL.recipe.lr]
    for name in ("mtt", "datm", "wang2018"):
        assert [t.recipe.lr for t in trials(find(name), learned, NET, (KEY,))] == [0.123]
    for name in ("dc", "dsa", "dc_bench", "neutral"):
        assert 0.123 not in [t.recipe.lr for t in trials(find(name), learned, NET, (KEY,))]


def test_a_set_of_ordered_steps_is_replayed_whatever_the_protocol() -> None:
    order = Order(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0.1, 0.2]))
    own = a_set(order=order, labels=Probabilities(torch.full((10, 2), 0.5)))
    for protocol in PROTOCOLS.values():
        (training,) = trials(protocol, own, NET, (KEY,))
        assert training.steps == 2
        assert training.data.labels.kind == "probabilities"


# ---- labels ----

ROWS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.5, 0.25]])
KINDS: dict[str, tuple[Labels, list[list[float]]]] = {
    "hard": (Hard(torch.tensor([0, 2, 1])), [[1, 0, 0], [0, 0, 1], [0, 1, 0]]),
    "probabilities": (Probabilities(ROWS), ROWS.tolist()),
    "logits": (
        Logits(ROWS),
        [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in ROWS.tolist()],
    ),
    "teacher": (
        Teacher("t", torch.stack([2 * ROWS.log(), 2 * ROWS.flip(0).log()]), 0, temperature=2.0),
        [
            [(a + b) / 2 for a, b in zip(*pair, strict=True)]
            for pair in zip(ROWS.tolist(), ROWS.flip(0).tolist(), strict=True)
        ],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_centred_shares(kind: str) -> None:
    labels, shares = KINDS[kind]
    found = labelled(a_set(3, 3, labels=labels), "targets").labels
    assert isinstance(found, Targets)
    expected = [[share - 1 / 3 for share in row] for row in shares]
    torch.testing.assert_close(found.values, torch.tensor(expected))


@pytest.mark.parametrize("kind", [*KINDS, "targets"])
def test_hard_labels_are_the_likeliest_classes(kind: str) -> None:
    labels = Targets(ROWS - 1 / 3) if kind == "targets" else KINDS[kind][0]
    found = labelled(a_set(3, 3, labels=labels), "hard").labels
    assert isinstance(found, Hard)
    if kind != "teacher":
        assert found.index.tolist() == [0, 2, 1]


def test_what_fits_stays_the_very_set() -> None:
    """So that its trainings stay those of other protocols and analyses."""
    plain, learned = a_set(), a_set(labels=Targets(torch.zeros(10, 2)))
    assert labelled(plain, "hard") is plain
    assert labelled(learned, "targets") is learned
    for one in (plain, learned):
        assert labelled(one, "own") is one


def test_soft_sets_lose_their_labels_under_a_protocol_of_hard_ones() -> None:
    soft = a_set(labels=Logits(KEY.fold("soft").normal(10, 2)))
    assert trials(find("dsa"), soft, NET, (KEY,))[0].data.labels.kind == "hard"
    assert trials(find("datm"), soft, NET, (KEY,))[0].data.labels.kind == "logits"
    assert trials(find("wddl"), soft, NET, (KEY,))[0].data.labels.kind == "logits"


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nets": 0}, "protocol: nets must be at least 1; got 0"),
        ({"passes": -1}, "protocol: passes must be at least 0; got -1"),
        ({"selection": "best"}, "unknown selection 'best'"),
        ({"labels": "soft"}, "unknown labels 'soft'"),
        ({"rates": (0.1,)}, "a protocol with candidates must say how it chooses"),
        (
            {"selection": "best_test", "moments": (5, 10)},
            "best_test is for published protocols: it takes the best of several moments on the test split; got source ''",
        ),
        (
            {"selection": "best_test", "source": "a paper", "rates": (0.1, 0.2)},
            r"best_test is for published protocols.*rates \(0.1, 0.2\); selection='best_validation'",
        ),
        (
            {"selection": "best_validation", "moments": (5, 9)},
            r"moments end with the training; got moments \(5, 9\); expected the last at 10 steps",
        ),
        (
            {"selection": "best_validation", "moments": (5, 9), "passes": 8},
            r"moments end with the training; got moments \(5, 9\); expected the last at 8 passes",
        ),
        (
            {"selection": "best_validation", "moments": (5, 10), "recipe": SHORT.but(schedule="cosine")},
            "moments stand for shorter trainings: that needs a constant schedule; got schedule cosine",
        ),
        ({"sizes": (1, 2), "steps_by_size": (5,)}, r"sizes rise, and each has its steps; got sizes \(1, 2\)"),
        ({"sizes": (2, 1), "steps_by_size": (5, 6)}, "sizes rise, and each has its steps"),
        (
            {"sizes": (1,), "steps_by_size": (5,), "passes": 3},
            "steps by size go with neither passes nor moments",
        ),
        (
            {"teaching": Teaching(SHORT), "labels": "hard"},
            "a teacher's labels are taken as they are; got labels='hard'",
        ),
        (
            {"teaching": Teaching(SHORT, views=3)},
            "labels a view need an augmentation to view through; set views=0: one label an image",
        ),
    ],
)
def test_a_protocol_without_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Protocol(**{"name": "own", "source": "", "recipe": SHORT, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": -1}, "teaching: passes must be at least 0; got -1"),
        ({"views": -2}, "teaching: views must be at least 0; got -2"),
        ({"temperature": 0.0}, "teaching: temperature must be above 0; got 0.0"),
    ],
)
def test_a_teaching_without_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Teaching(SHORT, **changes)


def test_an_unknown_protocol_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="unknown protocol 'sre2'; Did you mean 'sre2l'"):
        find("sre2")


# ---- the published ones ----

ROWS_OF_THE_TABLE = {
    *(
        "dc",
        "dsa",
        "idc",
        "mtt",
        "datm",
        "wang2018",
        "rtp",
        "rat_bptt",
        "kip",
        "frepo",
        "ncfm",
        "sre2l",
        "rded",
    ),
    *("dc_bench", "dd_ranking_hard", "dd_ranking_soft", "wddl", "neutral"),
}


def test_every_row_of_the_table_is_listed() -> None:
    assert set(PROTOCOLS) == ROWS_OF_THE_TABLE
    assert [row["name"] for row in pipeline.listed("protocols")] == list(PROTOCOLS)
    assert all(find(name).name == name and find(name).source for name in PROTOCOLS)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_survives_json_and_settings(name: str) -> None:
    assert restore(describe(PROTOCOLS[name])) == PROTOCOLS[name]
    changed = override(PROTOCOLS[name], ["recipe.lr=0.5", "nets=2", "labels=own"])
    assert (changed.recipe.lr, changed.nets, changed.labels) == (0.5, 2, "own")


def test_only_published_protocols_select_on_test_and_no_default_does() -> None:
    selecting = {name for name, one in PROTOCOLS.items() if one.selection == "best_test"}
    assert selecting == {"rat_bptt", "ncfm", "rded"}
    assert Protocol("own", "", SHORT).selection == "last"
    assert NEUTRAL.selection == "best_validation"
    from distillens import analyses, data

    like = data.load("digits").train
    settings = [describe(analyses.room.find(name).defaults(like)) for name in analyses.room.names()]
    settings += [describe(distillers.room.find(name).defaults(like, 1)) for name in distillers.room.names()]
    assert "best_test" not in str(settings)


def test_the_published_passes_are_the_tables() -> None:
    ten = a_set(100, k=10)
    steps = {name: {r.steps for r in one.recipes(ten)} for name, one in PROTOCOLS.items()}
    assert steps == {
        "neutral": {1000},
        "wddl": {300},
        "dc": {301},
        "dsa": {1001},
        "idc": {2000},
        "mtt": {1001},
        "datm": {1001},
        "wang2018": {30},
        "rtp": {300},
        "rat_bptt": {3000},
        "kip": {1000},
        "frepo": {2000},
        "ncfm": {2000},
        "sre2l": {300},
        "rded": {600},
        "dc_bench": {1001},
        "dd_ranking_hard": {300},
        "dd_ranking_soft": {300},
    }
    assert SRE2L.teaching is not None and SRE2L.teaching.views == 300

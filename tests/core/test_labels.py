"""Each kind of label against its loss written out by hand, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from distillens.core.checks import UserError
from distillens.core.labels import Hard, Labels, Logits, Probabilities, Targets, Teacher, restore_labels
from distillens.core.rng import Key

N, K, VIEWS, TEMPERATURE = 5, 3, 4, 2.5
KEY = Key(11)


def table(name: str, *shape: int) -> torch.Tensor:
    return 2 * KEY.fold(name).normal(*shape).double()


MAKE: dict[str, Callable[[], Labels]] = {
    "hard": lambda: Hard(torch.tensor([2, 0, 1, 1, 2])),
    "probabilities": lambda: Probabilities(table("p", N, K).softmax(-1)),
    "logits": lambda: Logits(table("l", N, K)),
    "targets": lambda: Targets(table("t", N, K)),
    "teacher": lambda: Teacher("abc", table("v", VIEWS, N, K), 3, TEMPERATURE, 1234),
}
kinds = pytest.mark.parametrize("kind", MAKE)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [p / sum(powers) for p in powers]


def one(labels: Labels) -> Labels:
    """Labels that have a loss: of a teacher, one view."""
    return labels.view(2) if isinstance(labels, Teacher) else labels


def loss_by_hand(labels: Labels, i: int, row: list[float]) -> float:
    """The loss of item i for the logits ``row``."""
    log_q = [math.log(q) for q in softmax(row)]
    if isinstance(labels, Hard):
        return -log_q[int(labels.index[i])]
    if isinstance(labels, Probabilities):
        return -sum(p * q for p, q in zip(labels.values[i].tolist(), log_q, strict=True))
    if isinstance(labels, Logits):
        return -sum(p * q for p, q in zip(softmax(labels.values[i].tolist()), log_q, strict=True))
    if isinstance(labels, Targets):
        return sum((a - b) ** 2 for a, b in zip(row, labels.values[i].tolist(), strict=True)) / 2
    assert isinstance(labels, Teacher)
    p = softmax([x / TEMPERATURE for x in labels.views[0, i].tolist()])
    q = softmax([x / TEMPERATURE for x in row])
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


@kinds
def test_the_loss_is_its_closed_form(kind: str) -> None:
    labels, logits = one(MAKE[kind]()), table("logits", N, K)
    expected = [loss_by_hand(labels, i, logits[i].tolist()) for i in range(N)]
    torch.testing.assert_close(
        labels.loss(logits), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@kinds
def test_a_population_is_scored_in_one_call(kind: str) -> None:
    labels, logits = one(MAKE[kind]()), table("models", 2, N, K)
    expected = [[loss_by_hand(labels, i, logits[m, i].tolist()) for i in range(N)] for m in range(2)]
    got = labels.loss(logits)
    assert got.shape == (2, N)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@kinds
def test_a_batch_of_its_own_for_each_model(kind: str) -> None:
    labels, index = MAKE[kind](), torch.tensor([[0, 4, 4], [3, 1, 2]])
    logits = table("batches", 2, 3, K)
    taken = one(labels.take(index))
    expected = [
        [loss_by_hand(one(labels), int(index[m, b]), logits[m, b].tolist()) for b in range(3)]
        for m in range(2)
    ]
    got = taken.loss(logits)
    assert len(taken) == 3
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@kinds
def test_the_gradient_of_the_loss_is_right(kind: str) -> None:
    labels = one(MAKE[kind]())
    logits = table("gradient", N, K).requires_grad_()
    assert torch.autograd.gradcheck(labels.loss, (logits,))


def test_the_loss_is_finite_for_huge_logits() -> None:
    logits = torch.tensor([[1000.0, -1000.0, 0.0]])
    assert Hard(torch.tensor([1])).loss(logits).item() == pytest.approx(2000)
    assert Probabilities(torch.tensor([[0.5, 0.5, 0.0]])).loss(logits).item() == pytest.approx(1000)
    assert Logits(logits).loss(logits).item() == pytest.approx(0)


@kinds
def test_take_gives_the_items_in_the_order_asked(kind: str) -> None:
    labels = MAKE[kind]()
    taken = labels.take(torch.tensor([4, 0, 0]))
    assert type(taken) is type(labels)
    assert len(taken) == 3
    assert taken.settings() == labels.settings()
    assert taken.hard().tolist() == [labels.hard().tolist()[i] for i in (4, 0, 0)]
    axis = 1 if kind == "teacher" else 0
    for name, tensor in labels.tensors().items():
        assert torch.equal(taken.tensors()[name], tensor.index_select(axis, torch.tensor([4, 0, 0])))


@kinds
def test_joined_labels_follow_one_another(kind: str) -> None:
    labels = MAKE[kind]()
    index = torch.tensor([1, 3])
    joined = labels.joined([labels.take(index), labels])
    assert len(joined) == 2 * N + 2
    assert joined.settings() == labels.settings()
    expected = labels.take(torch.tensor([0, 1, 2, 3, 4, 1, 3, 0, 1, 2, 3, 4]))
    for name, tensor in expected.tensors().items():
        assert torch.equal(joined.tensors()[name], tensor)


def test_labels_of_two_kinds_are_not_joined() -> None:
    with pytest.raises(
        UserError, match="labels of two kinds cannot be joined; got probabilities and targets"
    ):
        MAKE["probabilities"]().joined([MAKE["targets"]()])


def test_labels_of_two_teachers_are_not_joined() -> None:
    first = MAKE["teacher"]()
    assert isinstance(first, Teacher)
    with pytest.raises(UserError, match="labels of two kinds cannot be joined"):
        first.joined([Teacher("another", first.views, first.seed, first.temperature, first.teacher_bytes)])


@kinds
def test_restored_labels_are_the_same(kind: str) -> None:
    labels = MAKE[kind]()
    again = restore_labels(labels.kind, labels.tensors(), labels.settings())
    assert type(again) is type(labels)
    assert labels.kind == kind
    assert again.settings() == labels.settings()
    assert again.tensors().keys() == labels.tensors().keys()
    assert torch.equal(one(again).loss(table("x", N, K)), one(labels).loss(table("x", N, K)))


@kinds
def test_labels_move_to_a_device(kind: str) -> None:
    labels = MAKE[kind]()
    moved = labels.to(torch.device("meta"))
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    assert moved.settings() == labels.settings()


def test_an_unknown_kind_of_label_is_refused() -> None:
    with pytest.raises(
        UserError,
        match="unknown kind of label; got 'odd'; expected hard, probabilities, logits, targets, teacher",
    ):
        restore_labels("odd", {}, {})


@pytest.mark.parametrize(
    ("tensors", "settings"), [({}, {}), ({"index": torch.zeros(1)}, {"more": 1}), ({"values": None}, {})]
)
def test_damaged_labels_are_refused(tensors: dict[str, torch.Tensor], settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"hard labels are damaged; got .*; make the file again"):
        restore_labels("hard", tensors, settings)


def test_hard_is_the_likeliest_class() -> None:
    values = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    assert Hard(torch.tensor([1, 2])).hard().tolist() == [1, 2]
    for make in (Probabilities, Logits, Targets):
        hard = make(values).hard()
        assert hard.tolist() == [1, 2]
        assert hard.dtype == torch.int64


def test_hard_of_a_teacher_averages_the_views_probabilities() -> None:
    # One very sure view and two that lean the other way: logits would favour class 0, probabilities do not.
    views = torch.tensor([[[9.0, 0.0]], [[0.0, 2.0]], [[0.0, 2.0]]])
    means = [sum(softmax(v[0])[c] for v in views.tolist()) / 3 for c in range(2)]
    assert means[1] > means[0]
    assert Teacher("r", views, 0).hard().tolist() == [1]


def test_a_teacher_has_no_loss_before_a_view_is_chosen() -> None:
    with pytest.raises(ValueError, match=r"choose a view before the loss: labels.view\(i\)"):
        MAKE["teacher"]().loss(torch.zeros(N, K))


def test_each_view_of_a_teacher_is_its_own_label() -> None:
    labels = MAKE["teacher"]()
    assert isinstance(labels, Teacher)
    logits = table("view", N, K)
    for v in range(VIEWS):
        chosen = labels.view(v)
        assert torch.equal(chosen.views[0], labels.views[v])
        assert chosen.settings() == labels.settings()
        expected = [loss_by_hand(chosen, i, logits[i].tolist()) for i in range(N)]
        torch.testing.assert_close(chosen.loss(logits), torch.tensor(expected, dtype=torch.float64))


def test_a_teacher_agrees_with_itself() -> None:
    labels = MAKE["teacher"]()
    assert isinstance(labels, Teacher)
    assert float(labels.view(1).loss(labels.views[1]).abs().max()) < 1e-12


@kinds
def test_fitting_labels_pass_the_check(kind: str) -> None:
    MAKE[kind]().check(K)


NAN = torch.full((2, 3), math.nan)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            Hard(torch.tensor([0, 3])),
            "a label is outside the classes; got labels 0 to 3; expected 0 to 2",
        ),
        (Hard(torch.tensor([-1, 2])), "a label is outside the classes; got labels -1 to 2; expected 0 to 2"),
        (
            Hard(torch.tensor([0.0, 1.0])),
            r"hard labels are whole numbers, one an image; got torch.float32 of shape \(2,\); expected int64 \[n\]",
        ),
        (
            Hard(torch.tensor([[0, 1]])),
            r"hard labels are whole numbers, one an image; got torch.int64 of shape \(1, 2\)",
        ),
        (
            Probabilities(torch.ones(4, 2) / 2),
            r"probabilities labels are one row an image; got shape \(4, 2\); expected \[n, 3\]",
        ),
        (Logits(torch.ones(3)), r"logits labels are one row an image; got shape \(3,\); expected \[n, 3\]"),
        (Targets(torch.ones(2, 2, 3)), r"targets labels are one row an image; got shape \(2, 2, 3\)"),
        (Logits(NAN), "logits labels hold numbers that are not finite"),
        (Targets(NAN), "targets labels hold numbers that are not finite"),
        (
            Probabilities(torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]])),
            r"probability labels are not distributions; got rows that sum to 0.6 to 1.5, least entry 0.2; "
            "expected rows from 0 up that sum to 1; learned logits are the kind 'logits'",
        ),
        (
            Probabilities(torch.tensor([[1.5, -0.5, 0.0]])),
            "probability labels are not distributions; got rows that sum to 1 to 1, least entry -0.5",
        ),
        (
            Teacher("r", torch.ones(2, 5, 4), 0),
            r"teacher labels are one row a view and image; got shape \(2, 5, 4\); expected \[views, n, 3\]",
        ),
        (
            Teacher("r", torch.ones(5, 3), 0),
            r"teacher labels are one row a view and image; got shape \(5, 3\)",
        ),
        (
            Teacher("r", torch.ones(0, 5, 3), 0),
            r"teacher labels are one row a view and image; got shape \(0, 5, 3\)",
        ),
        (Teacher("r", NAN[None], 0), "teacher labels hold numbers that are not finite"),
        (Teacher("r", torch.ones(1, 5, 3), 0, 0.0), "teacher labels: temperature must be above 0; got 0.0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Labels, message: str) -> None:
    with pytest.raises(UserError, match=message):
        labels.check(3)

"""A teacher labels every set alike: its labels against a slow twin, and where each of them goes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from distillens import augment
from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.core.artefact import DistilledDataset, Order
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Splits
from distillens.core.decode import MultiFormation
from distillens.core.labels import Hard, Probabilities, Teacher
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.engine.plan import Plan
from distillens.evaluation.protocol import Protocol
from distillens.evaluation.teaching import Teaching
from distillens.evaluation.trials import taught, teacher, trials
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Population

KEY = Key(17, ("teaching",))
NET, OTHER = ConvNet(depth=2, width=4), ConvNet(depth=1, width=6, norm="batch")
SHORT = Recipe(steps=8, lr=0.05, augment="crop+flip")
ONE = Teaching(Recipe(batch=256, lr=0.05), passes=2, temperature=3.0)
VIEWS = replace(ONE, views=4, net=OTHER)


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def some(real: Splits, place: int, n: int = 10) -> DistilledDataset:
    rows = torch.arange(n) + 20 * place
    return DistilledDataset(
        {"images": real.train.images[rows]},
        Hard(real.train.labels.hard()[rows]),
        real.train.classes,
        real.space,
    )


def sets_of(real: Splits) -> Sets:
    return Sets(
        {"a": (some(real, 0), some(real, 1))},
        {"random_subset": (some(real, 2), some(real, 3))},
        {"a": (some(real, 4), some(real, 5))},
    )


def outputs(population: Population, images: torch.Tensor) -> torch.Tensor:
    """The teacher's logits, image by image."""
    params = {name: value[0] for name, value in population.shapes.unflatten(population.final).items()}
    buffers = {name: value[0] for name, value in population.buffers.items()}
    rows = [population.net.logits(params, buffers, image[None])[0][0] for image in images]
    return torch.stack(rows).detach()


def labels_of(sets: Sets) -> list[DistilledDataset]:
    return [
        one
        for group in (sets.distilled, sets.baselines, sets.initial)
        for many in group.values()
        for one in many
    ]


@pytest.mark.parametrize("teaching", [ONE, VIEWS], ids=["one label", "views"])
def test_every_set_gets_the_teachers_labels(digits: Splits, runs: Runs, teaching: Teaching) -> None:
    protocol = Protocol("own", "", SHORT, teaching=teaching)
    before = sets_of(digits)
    after = taught(protocol, NET, before, digits, runs, KEY)
    (population,) = runs.get(*teacher(protocol, NET, digits, KEY))
    for old, new in zip(labels_of(before), labels_of(after), strict=True):
        assert torch.equal(old.dataset().images, new.dataset().images)
        labels = new.labels
        if teaching is ONE:
            assert isinstance(labels, Probabilities)
            expected = torch.softmax(outputs(population, old.dataset().images) / 3.0, 1)
            torch.testing.assert_close(labels.values, expected, atol=1e-5, rtol=1e-4)
            assert new.storage().bits == 32 * (10 * 64 + 10 * 10)
        else:
            assert isinstance(labels, Teacher)
            for view in range(4):
                place = Key(labels.seed).fold("view", view)
                shown = augment.apply(old.dataset().images, augment.draw("crop+flip", place, 10))
                torch.testing.assert_close(
                    labels.views[view], outputs(population, shown), atol=1e-4, rtol=1e-3
                )
            assert not torch.equal(labels.views[0], labels.views[1])
            weights = population.final.numel() + sum(b.numel() for b in population.buffers.values())
            assert new.storage().teacher_bytes == 4 * weights
            assert new.storage().bits == 32 * (10 * 64 + 4 * 10 * 10)


def test_the_teacher_is_trained_once_on_the_real_training_images(digits: Splits, runs: Runs) -> None:
    (asked,) = teacher(Protocol("own", "", SHORT, teaching=VIEWS), NET, digits, KEY)
    assert asked.data is digits.train and asked.net == OTHER
    assert asked.steps == 2 * -(-len(digits.train) // 256)
    (own,) = teacher(Protocol("own", "", SHORT, teaching=ONE), NET, digits, KEY)
    assert own.net == NET, "the network that is taught, where no other is named"
    by_steps = teacher(Protocol("own", "", SHORT, teaching=replace(ONE, passes=0)), NET, digits, KEY)
    assert by_steps[0].steps == ONE.recipe.steps
    assert teacher(Protocol("own", "", SHORT), NET, digits, KEY) == []
    sets = sets_of(digits)
    assert taught(Protocol("own", "", SHORT), NET, sets, digits, runs, KEY) is sets
    store = Runs(Plan())
    for _ in range(2):
        taught(Protocol("own", "", SHORT, teaching=ONE), NET, sets, digits, store, KEY)
    assert sum(store.trained.values()) == 1


def test_a_training_step_shows_the_view_that_its_label_is_of(digits: Splits, runs: Runs) -> None:
    """One step of plain descent against a twin: the view's images, the view's logits, the temperature."""
    protocol = Protocol("own", "", Recipe(steps=6, lr=0.1, momentum=0.0, augment="crop+flip"), teaching=VIEWS)
    after = taught(protocol, NET, sets_of(digits), digits, runs, KEY)
    one = after.distilled["a"][0]
    (training,) = trials(protocol, one, NET, (KEY.fold("net"),))
    asked = replace(training, snapshots=tuple(range(7)))
    population = runs.get(asked)[0]
    labels = one.labels
    assert isinstance(labels, Teacher)
    for step in (0, 3, 5):  # step 5 is view 1 again
        view = step % 4
        shown = augment.apply(
            one.dataset().images, augment.draw("crop+flip", Key(labels.seed).fold("view", view), 10)
        )
        leaf = population.at(step)[0].clone().requires_grad_()
        params = {name: value[0] for name, value in population.shapes.unflatten(leaf[None]).items()}
        logits = NET.logits(params, {}, shown, "train")[0]
        target = F.softmax(labels.views[view] / 3.0, 1)
        loss = F.kl_div(F.log_softmax(logits / 3.0, 1), target, reduction="batchmean")
        (slope,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(
            population.at(step + 1)[0], leaf.detach() - 0.1 * slope, atol=1e-6, rtol=1e-4
        )


def test_a_point_of_several_images_gets_the_mean_of_their_logits(digits: Splits, runs: Runs) -> None:
    four = replace(some(digits, 0, 4), decode=MultiFormation(2))
    protocol = Protocol("own", "", SHORT, teaching=ONE)
    after = taught(protocol, NET, Sets({"a": (four,)}), digits, runs, KEY).distilled["a"][0]
    (population,) = runs.get(*teacher(protocol, NET, digits, KEY))
    each = outputs(population, four.dataset().images).view(4, 4, 10)  # patch outside, point inside
    labels = after.labels
    assert isinstance(labels, Probabilities)
    torch.testing.assert_close(labels.values, torch.softmax(each.mean(0) / 3.0, 1), atol=1e-5, rtol=1e-4)
    assert len(after.dataset()) == 16


def test_a_set_of_ordered_steps_keeps_its_labels(digits: Splits, runs: Runs) -> None:
    own = replace(some(digits, 0), order=Order(torch.tensor([[0, 1]]), torch.tensor([0.1])))
    protocol = Protocol("own", "", SHORT, teaching=VIEWS)
    after = taught(protocol, NET, Sets({"a": (own,), "b": (some(digits, 1),)}), digits, runs, KEY)
    assert after.distilled["a"][0] is own
    assert after.distilled["b"][0].labels.kind == "teacher"
    Accuracy(protocol, NET)(after, digits, runs, key=KEY)


@pytest.mark.parametrize("teaching", [ONE, VIEWS], ids=["one label", "views"])
def test_sets_that_the_teacher_has_not_labelled_are_refused(
    digits: Splits, runs: Runs, teaching: Teaching
) -> None:
    protocol = Protocol("own", "", SHORT, teaching=teaching)
    with pytest.raises(
        UserError,
        match=f"protocol 'own' trains on a teacher's labels, which the set 'a' does not have; got hard labels; "
        f"expected {teaching.kind}; label all sets first",
    ):
        Accuracy(protocol, NET)(sets_of(digits), digits, runs, key=KEY)

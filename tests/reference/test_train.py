from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distillens import augment
from distillens.core.artefact import DistilledDataset, Order
from distillens.core.checks import UserError
from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard, Logits, Probabilities, Targets, Teacher
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.core.vector import Shapes
from distillens.engine.plan import Plan
from distillens.kernels import planes
from distillens.nets.convnet import ConvNet
from distillens.train import Observe, Population, Training, chunks, networks, on, train, train_chunk

N, K, STEPS = 12, 3, 10
NET = ConvNet(depth=2, width=4)
EXACT = Plan("loop", 1, precision="float64")
STACKED = Plan("stacked", 8, precision="float64")
KEYS = Key(0).split(5)
RECIPE = Recipe(steps=STEPS, lr=0.1, momentum=0.9)
CLOSE = 1e-9


def data(n: int = N, place: str = "data") -> Dataset:
    images = torch.stack([Key(1).fold(place, i).normal(1, 8, 12) for i in range(n)])
    return Dataset(images, Hard(torch.arange(n) % K), ("a", "b", "c"), Pixel())


def run(training: Training, plan: Plan = EXACT) -> torch.Tensor:
    """The last parameters [m, P]."""
    return train(training, plan).final


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- torch.optim on a module ----


def module(params: Params) -> nn.Sequential:
    """The network as torch's own layers, in float64, with these parameters."""
    built = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.InstanceNorm2d(4, affine=True),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.InstanceNorm2d(4, affine=True),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, K),
    ).double()
    for own, value in zip(built.parameters(), params.values(), strict=True):
        own.data.copy_(value)
    return built


def flat(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def optimiser(model: nn.Module, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    parameters = model.parameters()
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr, recipe.momentum, weight_decay=recipe.weight_decay)
    kind = torch.optim.Adam if recipe.optimiser == "adam" else torch.optim.AdamW
    return kind(parameters, lr, weight_decay=recipe.weight_decay)


def by_torch(
    recipe: Recipe,
    *,
    key: Key = KEYS[0],
    loss: Callable[[int, nn.Module], torch.Tensor] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> torch.Tensor:
    model = module(NET.init(data(), key.fold("init"))[0])
    steps = optimiser(model, recipe, recipe.lr)
    schedule = scheduler(steps) if scheduler else None
    images, labels = data().images.double(), data().labels.hard()
    for t in range(recipe.steps):
        steps.zero_grad()
        (loss(t, model) if loss else F.cross_entropy(model(images), labels)).backward()
        steps.step()
        if schedule is not None:
            schedule.step()
    return flat(model)


@pytest.mark.parametrize("plan", [EXACT, STACKED], ids=["loop", "stacked"])
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(RECIPE.but(momentum=0.0), id="sgd"),
        pytest.param(RECIPE, id="momentum"),
        pytest.param(RECIPE.but(weight_decay=0.05), id="momentum, decay"),
        pytest.param(RECIPE.but(momentum=0.0, weight_decay=0.05), id="decay"),
        pytest.param(RECIPE.but(optimiser="adam", lr=0.01), id="adam"),
        pytest.param(RECIPE.but(optimiser="adam", lr=0.01, weight_decay=0.05), id="adam, decay"),
        pytest.param(RECIPE.but(optimiser="adamw", lr=0.01), id="adamw"),
        pytest.param(RECIPE.but(optimiser="adamw", lr=0.01, weight_decay=0.5), id="adamw, decay"),
    ],
)
def test_optimisers_are_torchs(recipe: Recipe, plan: Plan) -> None:
    found = run(Training(data(), NET, recipe, KEYS[:2]), plan)
    for j in range(2):
        assert off(found[j], by_torch(recipe, key=KEYS[j])) < CLOSE


def test_the_cosine_is_torchs() -> None:
    recipe = RECIPE.but(schedule="cosine")
    expected = by_torch(
        recipe, scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, recipe.steps)
    )
    assert off(run(Training(data(), NET, recipe, KEYS[:1]))[0], expected) < CLOSE
    assert off(expected, by_torch(RECIPE)) > 1e-3


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("steps", [10, 11])
def test_a_tenth_at_half_begins_again_with_an_empty_memory(name: str, steps: int) -> None:
    """Steps count from 0: those above steps // 2 take a tenth of the rate, by a new optimiser."""
    recipe = RECIPE.but(steps=steps, optimiser=name, lr=0.05, weight_decay=0.05, schedule="tenth_at_half")
    model = module(NET.init(data(), KEYS[0].fold("init"))[0])
    images, labels = data().images.double(), data().labels.hard()
    for lr, count in ((0.05, steps // 2 + 1), (0.005, steps - steps // 2 - 1)):
        now = optimiser(model, recipe, lr)
        for _ in range(count):
            now.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            now.step()
    assert off(run(Training(data(), NET, recipe, KEYS[:1]))[0], flat(model)) < CLOSE


@pytest.mark.parametrize("kind", ["probabilities", "logits", "targets"])
def test_soft_labels_bring_their_loss(kind: str) -> None:
    table = Key(4).normal(N, K)
    labels, loss = {
        "probabilities": (
            Probabilities(table.softmax(1)),
            lambda z: F.cross_entropy(z, table.softmax(1).double()),
        ),
        "logits": (Logits(table), lambda z: F.cross_entropy(z, table.double().softmax(1))),
        "targets": (Targets(table), lambda z: (z - table.double()).square().sum(1).mean() / 2),
    }[kind]
    soft = Dataset(data().images, labels, data().classes, Pixel())
    expected = by_torch(RECIPE, loss=lambda t, model: loss(model(soft.images.double())))
    assert off(run(Training(soft, NET, RECIPE, KEYS[:1]))[0], expected) < 1e-6  # tables are float32


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_teachers_label_belongs_to_the_view_that_is_seen(temperature: float) -> None:
    """View i % views, its augmentation drawn from the labels' own seed, the same for every model."""
    taught = with_teacher(temperature)
    labels = taught.labels
    assert isinstance(labels, Teacher)
    recipe = RECIPE.but(augment="crop_rotate")

    def loss(t: int, model: nn.Module) -> torch.Tensor:
        view = t % 3
        drawn = augment.draw("crop_rotate", Key(labels.seed).fold("view", view), N)
        seen = augment.apply(taught.images.double(), drawn)
        teacher = (labels.views[view].double() / temperature).log_softmax(1)
        student = (model(seen) / temperature).log_softmax(1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

    for plan in (EXACT, STACKED):
        found = run(Training(taught, NET, recipe, KEYS[:2]), plan)
        for j in range(2):
            assert off(found[j], by_torch(recipe, key=KEYS[j], loss=loss)) < 1e-6


def with_teacher(temperature: float = 1.0) -> Dataset:
    labels = Teacher("somebody", Key(5).normal(3, N, K), seed=8, temperature=temperature)
    return Dataset(data().images, labels, data().classes, Pixel())


def test_example_weights_make_a_weighted_mean() -> None:
    weights = Key(6).uniform(2, N)
    images, labels = data().images.double(), data().labels.hard()
    found = run(Training(data(), NET, RECIPE, KEYS[:2], weights=weights), STACKED)
    for j in range(2):
        share = weights[j].double() / weights[j].double().sum()

        def loss(t: int, model: nn.Module, share: torch.Tensor = share) -> torch.Tensor:
            return (F.cross_entropy(model(images), labels, reduction="none") * share).sum()

        assert off(found[j], by_torch(RECIPE, key=KEYS[j], loss=loss)) < CLOSE
    scaled = run(Training(data(), NET, RECIPE, KEYS[:2], weights=7 * weights.double()), STACKED)
    assert off(scaled, found) < CLOSE


# ---- ordered steps ----

ORDER = Order(
    torch.tensor([[0, 1, 2], [3, 4, -1], [-1, 5, 5], [6, -1, -1], [9, 10, 11], [0, 4, 8]]),
    torch.tensor([0.1, 0.05, 0.2, 0.01, 0.1, 0.3]),
)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("plan", [EXACT, STACKED], ids=["loop", "stacked"])
def test_ordered_steps_are_replayed_with_their_own_rates(momentum: float, plan: Plan) -> None:
    recipe = Recipe(steps=999, batch=2, lr=77.0, momentum=momentum, weight_decay=0.01)
    found = train(Training(data(), NET, recipe, KEYS[:2], order=ORDER, snapshots=(0, 2)), plan)
    for j in range(2):
        theta, moments = ordered_by_hand(ORDER, momentum, KEYS[j])
        assert off(found.final[j], theta) < 1e-8  # the rates are float32
        assert off(found.at(2)[j], moments[2]) < 1e-8


def ordered_by_hand(
    order: Order, momentum: float, key: Key, left_out: int = -1
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = module(NET.init(data(), key.fold("init"))[0])
    images, labels = data().images.double(), data().labels.hard()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    moments = [flat(model)]
    for row, lr in zip(order.steps.tolist(), order.lr.tolist(), strict=True):
        seen = [i for i in row if i not in (-1, left_out)]
        model.zero_grad()
        if seen:
            F.cross_entropy(model(images[seen]), labels[seen]).backward()
        for v, p in zip(velocity, model.parameters(), strict=True):
            v.mul_(momentum).add_((0 if p.grad is None else p.grad) + 0.01 * p.data)
            p.data -= lr * v
        moments.append(flat(model))
    return flat(model), moments


def test_weights_leave_an_image_out_of_ordered_steps() -> None:
    """Image 6 is alone in its step: without it the step has no gradient, and nothing is not a number."""
    weights = torch.ones(2, N)
    weights[0, 6] = weights[1, 5] = 0
    recipe = Recipe(steps=1, batch=2, momentum=0.9, weight_decay=0.01)
    training = Training(data(), NET, recipe, KEYS[:2], order=ORDER, weights=weights)
    for plan in (EXACT, STACKED):
        found = run(training, plan)
        for j, gone in enumerate((6, 5)):
            assert off(found[j], ordered_by_hand(ORDER, 0.9, KEYS[j], gone)[0]) < 1e-8


def test_a_distilled_set_brings_its_order() -> None:
    source = data()
    distilled = DistilledDataset(
        {"images": source.images}, source.labels, source.classes, Pixel(), order=ORDER
    )
    plain = Recipe(momentum=0.0)
    expected = run(Training(source, NET, plain, KEYS[:1], order=ORDER))
    # It is a training by itself: no recipe of whoever trains on it changes a thing.
    for recipe in (RECIPE, Recipe(weight_decay=0.1, schedule="tenth_at_half", augment="flip", batch=2)):
        training = on(distilled, NET, recipe, KEYS[:1])
        assert training.steps == 6
        assert torch.equal(run(training), expected)
    own = Recipe(optimiser="adam")
    brought = on(replace(distilled, recipe=own), NET, RECIPE, KEYS[:1])
    assert torch.equal(run(brought), run(Training(source, NET, own, KEYS[:1], order=ORDER)))


# ---- what a step sees ----


@dataclass
class Recorder:
    """A network that remembers the batches it was shown in training."""

    mixes_examples: ClassVar[bool] = False
    seen: list[torch.Tensor] = field(default_factory=list)

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        return NET.init(like, key)

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        return NET.features(params, buffers, x, mode)

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        if mode == "train":
            self.seen.append(x.detach().clone())
        return NET.logits(params, buffers, x, mode)


def batches(training: Training) -> list[list[int]]:
    """The images of each step of a single model, by number."""
    recorder = Recorder()
    train(replace(training, net=recorder), EXACT)
    known = training.data.images.double()
    return [[int((known == image).flatten(1).all(1).nonzero()) for image in batch] for batch in recorder.seen]


def test_each_pass_sees_each_image_once_in_an_order_of_its_own() -> None:
    seen = batches(Training(data(), NET, RECIPE.but(steps=9, batch=5), KEYS[:1]))
    assert [len(batch) for batch in seen] == [5, 5, 2] * 3
    passes = [list(chain(*seen[i : i + 3])) for i in (0, 3, 6)]
    assert all(sorted(each) == list(range(N)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3
    assert seen != batches(Training(data(), NET, RECIPE.but(steps=9, batch=5), KEYS[1:2]))
    assert seen == batches(Training(data(), NET, RECIPE.but(steps=9, batch=5), KEYS[:1]))


@pytest.mark.parametrize("batch", [None, N, 1000])
def test_full_batches_are_the_whole_set(batch: int | None) -> None:
    seen = batches(Training(data(), NET, RECIPE.but(batch=batch, steps=3), KEYS[:1]))
    assert [sorted(one) for one in seen] == [list(range(N))] * 3


def test_a_subset_is_all_that_a_model_sees() -> None:
    subset = torch.tensor([1, 4, 5, 7, 8])
    seen = batches(Training(data(), NET, RECIPE.but(batch=2, steps=6), KEYS[:1], subsets=(subset,)))
    assert [len(one) for one in seen] == [2, 2, 1, 2, 2, 1]
    assert all(sorted(chain(*seen[i : i + 3])) == subset.tolist() for i in (0, 3))


@pytest.mark.parametrize(
    "training",
    [
        Training(data(), NET, RECIPE.but(batch=5), KEYS[:1]),
        Training(data(), NET, RECIPE, KEYS[:1]),
        Training(data(), NET, RECIPE.but(batch=2, steps=6), KEYS[:1], subsets=(torch.arange(5),)),
        Training(data(), NET, RECIPE, KEYS[:1], order=ORDER),
    ],
    ids=["batches", "full", "subset", "order"],
)
def test_the_measure_of_work_is_what_is_seen(training: Training) -> None:
    seen = sum(map(len, batches(training)))
    short = {5: 9, 2: 3}.get(training.recipe.batch or 0, 0)  # short last batches count as full ones
    assert seen <= training.image_steps <= seen + short
    double = replace(training, keys=KEYS[:2], subsets=training.subsets and training.subsets * 2)
    assert double.image_steps == 2 * training.image_steps


def test_augmentation_is_drawn_from_the_models_key_and_the_step() -> None:
    recorder = Recorder()
    recipe = RECIPE.but(augment="rotate_scale", steps=4)
    train(Training(data(), recorder, recipe, KEYS[:1]), EXACT)
    for step, seen in enumerate(recorder.seen):
        drawn = augment.draw("rotate_scale", KEYS[0].fold("augment", step), N)
        torch.testing.assert_close(seen, augment.apply(data().images.double(), drawn))
    assert not torch.allclose(recorder.seen[0], recorder.seen[1])


def test_a_teachers_view_of_an_image_is_the_same_in_every_batch() -> None:
    taught, recorder = with_teacher(), Recorder()
    recipe = RECIPE.but(augment="rotate_scale", batch=5)
    train(Training(taught, recorder, recipe, KEYS[:1]), EXACT)
    assert isinstance(taught.labels, Teacher)
    order = batches(Training(data(), NET, recipe.but(augment=""), KEYS[:1]))
    for step, (index, seen) in enumerate(zip(order, recorder.seen, strict=True)):
        drawn = augment.draw("rotate_scale", Key(taught.labels.seed).fold("view", step % 3), N)
        torch.testing.assert_close(seen, augment.apply(data().images.double(), drawn)[index])


def test_cutmix_takes_a_box_and_its_share_of_the_label_from_a_partner() -> None:
    """The loss is written out: the label is a mixed distribution over the classes."""
    mixed = []

    def loss(t: int, model: nn.Module) -> torch.Tensor:
        x, y = data().images.double(), F.one_hot(data().labels.hard(), K).double()
        mix = augment.draw_mix(0.5, KEYS[0].fold("cutmix", t), N, (8, 12))
        if mix is not None:
            inside = torch.zeros(8, 12)
            inside[mix.top : mix.bottom, mix.left : mix.right] = 1
            x = x * (1 - inside) + x[mix.partner] * inside
            share = float(inside.mean())
            y = (1 - share) * y + share * y[mix.partner]
        mixed.append(mix is not None)
        return -(y * model(x).log_softmax(1)).sum(1).mean()

    recipe = RECIPE.but(cutmix=0.5)
    expected = by_torch(recipe, loss=loss)
    assert any(mixed) and not all(mixed)
    assert off(run(Training(data(), NET, recipe, KEYS[:1]))[0], expected) < CLOSE
    assert off(run(Training(data(), NET, RECIPE, KEYS[:1]))[0], expected) > 1e-3


# ---- many models are single models side by side ----


def cases() -> dict[str, Training]:
    base = Training(data(), NET, RECIPE, KEYS)
    subsets = tuple(Key(9).fold(j).permutation(N)[: 4 + j] for j in range(5))
    equal = tuple(Key(9).fold(j).permutation(N)[:6] for j in range(5))
    weights = Key(6).uniform(5, N)
    weights[:, 3] = 0
    batched = replace(base, recipe=RECIPE.but(batch=5))
    augmented = RECIPE.but(augment="color_crop_cutout_flip_scale_rotate")
    return {
        "full": base,
        "adam": replace(base, recipe=RECIPE.but(optimiser="adam", lr=0.01)),
        "batches": batched,
        "augmented": replace(base, recipe=augmented),
        "augmented batches": replace(base, recipe=augmented.but(batch=5)),
        "weights": replace(base, weights=weights),
        "subsets": replace(base, subsets=subsets),
        "equal subsets": replace(base, subsets=equal),
        "subsets in batches": replace(batched, subsets=subsets),
        "subsets, augmented batches": replace(base, recipe=augmented.but(batch=3), subsets=subsets),
        "order": replace(base, order=ORDER),
        "order, weights": replace(base, order=ORDER, weights=weights),
        "teacher": replace(base, data=with_teacher(), recipe=augmented.but(batch=5)),
        "same key": replace(base, keys=KEYS[:1] * 5, weights=weights),
        "cutmix": replace(base, recipe=RECIPE.but(cutmix=0.5)),
        "cutmix, subsets, augmented batches": replace(
            base, recipe=augmented.but(batch=3, cutmix=0.5), subsets=subsets
        ),
    }


CASES = cases()
every_case = pytest.mark.parametrize("case", CASES)


@every_case
@pytest.mark.parametrize("chunk", [8, 2, 1])
def test_many_models_are_one_by_one(case: str, chunk: int) -> None:
    training = CASES[case]
    together = run(training, Plan("stacked", chunk, precision="float64"))
    for j in range(5):
        alone = run(training.models(j, j + 1))[0]
        assert off(together[j], alone) < CLOSE


@pytest.mark.skipif(not planes.available(), reason="there is no C++ compiler here")
@every_case
@pytest.mark.parametrize("plan", [EXACT, STACKED], ids=["loop", "stacked"])
def test_compiled_kernels_train_the_same_models(case: str, plan: Plan) -> None:
    training = CASES[case]
    assert off(run(training, replace(plan, kernels="fused")), run(training)) < CLOSE


@every_case
def test_the_order_of_models_changes_nothing(case: str) -> None:
    training = CASES[case]
    order = [3, 0, 4, 2, 1]
    shuffled = replace(
        training,
        keys=tuple(training.keys[j] for j in order),
        subsets=training.subsets and tuple(training.subsets[j] for j in order),
        weights=None if training.weights is None else training.weights[order],
    )
    assert off(run(shuffled, STACKED), run(training, STACKED)[order]) < CLOSE


@every_case
@pytest.mark.parametrize("plan", [Plan(), Plan("loop", 1)], ids=["stacked", "loop"])
def test_the_same_plan_gives_the_same_bytes_and_changes_nothing(case: str, plan: Plan) -> None:
    training = CASES[case]
    before = training.fingerprint
    images = training.data.images.clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(training, plan)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(run(training, plan), first)
    assert first.dtype == torch.float32 and not first.requires_grad
    assert torch.equal(training.data.images, images)
    assert replace(training, data=replace(training.data)).fingerprint == before


def test_models_differ_by_their_keys() -> None:
    final = run(CASES["full"], STACKED)
    assert float(torch.cdist(final, final)[~torch.eye(5, dtype=torch.bool)].min()) > 0.1


def test_chunks_are_cut_before_the_work_and_cover_all_models() -> None:
    parts = chunks(CASES["full"], Plan("stacked", 2))
    assert [part.keys for part in parts] == [KEYS[:2], KEYS[2:4], KEYS[4:]]
    assert [len(part.keys) for part in chunks(CASES["full"], Plan("loop"))] == [1] * 5
    nine = replace(CASES["full"], keys=Key(0).split(9))
    assert [len(part.keys) for part in chunks(nine, Plan("stacked", 4))] == [3] * 3  # none waits
    big = replace(CASES["full"], data=data(200))
    assert [len(part.keys) for part in chunks(big, Plan("stacked", 8))] == [1] * 5


def test_models_of_like_subsets_share_a_chunk_and_keep_their_places() -> None:
    sizes = [4, 9, 5, 9, 4, 12, 5]
    subsets = tuple(torch.arange(size) for size in sizes)
    training = replace(CASES["full"], keys=Key(0).split(7), subsets=subsets)
    plan = Plan("stacked", 3, images=18, precision="float64")
    cut = [[len(subset) for subset in part.subsets or ()] for part in chunks(training, plan)]
    assert cut == [[4, 4, 5], [5, 9], [9], [12]]  # no more than three models, no more than 18 images
    together = train(training, plan)
    for j in range(7):
        assert off(together.final[j], run(training.models(j, j + 1))[0]) < CLOSE
    mixing = replace(training, net=BatchNorm())
    cut = [[len(subset) for subset in part.subsets or ()] for part in chunks(mixing, plan)]
    assert cut == [[4, 4], [5, 5], [9, 9], [12]]


@pytest.mark.parametrize("case", ["subsets", "equal subsets", "subsets in batches"])
def test_a_subset_is_training_on_that_subset_alone(case: str) -> None:
    training = CASES[case]
    together = run(training, STACKED)
    assert training.subsets is not None
    for j, subset in enumerate(training.subsets):
        alone = Training(data().take(subset), NET, training.recipe, (training.keys[j],))
        assert off(together[j], run(alone)[0]) < CLOSE


def test_a_weight_of_zero_is_training_without_the_image() -> None:
    weights = torch.ones(N, N) - torch.eye(N)
    together = run(Training(data(), NET, RECIPE, KEYS[:1] * N, weights=weights), STACKED)
    for j in range(N):
        rest = data().take(torch.tensor([i for i in range(N) if i != j]))
        assert off(together[j], run(Training(rest, NET, RECIPE, KEYS[:1]))[0]) < CLOSE
    assert float(torch.cdist(together, together)[~torch.eye(N, dtype=torch.bool)].min()) > 1e-4


def test_equal_weights_are_no_weights() -> None:
    weighted = run(Training(data(), NET, RECIPE, KEYS, weights=torch.full((5, N), 0.5)), STACKED)
    assert off(weighted, run(CASES["full"], STACKED)) < CLOSE


@dataclass(frozen=True)
class BatchNorm:
    """A linear layer behind batch statistics, with a running mean: a network that mixes its images."""

    mixes_examples: ClassVar[bool] = True

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        d = math.prod(like.shape)
        return {"weight": key.normal(like.k, d) / 10, "bias": torch.zeros(like.k)}, {"mean": torch.zeros(d)}

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        x = x.flatten(1)
        if mode == "evaluate":
            return x - buffers["mean"], buffers
        return x - x.mean(0), {"mean": 0.5 * buffers["mean"] + 0.5 * x.mean(0)}

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        features, buffers = self.features(params, buffers, x, mode)
        return F.linear(features, params["weight"], params["bias"]), buffers


@pytest.mark.parametrize(
    "case", ["full", "batches", "subsets", "equal subsets", "subsets in batches", "order"]
)
def test_a_network_that_mixes_images_is_trained_on_its_own_images_only(case: str) -> None:
    training = replace(CASES[case], net=BatchNorm())
    together = train(training, STACKED)
    for j in range(5):
        alone = training.models(j, j + 1)
        if training.subsets is not None:
            alone = replace(alone, data=data().take(training.subsets[j]), subsets=None)
        one = train(alone, EXACT)
        assert off(together.final[j], one.final[0]) < CLOSE
        assert off(together.buffers["mean"][j], one.buffers["mean"][0]) < CLOSE
        assert off(together.logits(data())[j], one.logits(data())[0]) < CLOSE


def test_absent_images_of_ordered_steps_do_not_reach_batch_statistics() -> None:
    order = Order(torch.tensor([[4, -1, 5], [-1, 7, 8]]), torch.tensor([0.1, 0.1]))
    plain = Order(torch.tensor([[4, 5], [7, 8]]), torch.tensor([0.1, 0.1]))
    found, expected = (
        train(Training(data(), BatchNorm(), RECIPE, KEYS, order=o), STACKED) for o in (order, plain)
    )
    assert torch.equal(found.final, expected.final)
    assert torch.equal(found.buffers["mean"], expected.buffers["mean"])


# ---- relabelling relabels ----

PERMUTATION = torch.tensor([2, 0, 1])


@dataclass(frozen=True)
class Relabelled:
    """The same network with the rows of its last layer in another order from the start."""

    mixes_examples: ClassVar[bool] = False

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        params, buffers = NET.init(like, key)
        for name in ("linear.weight", "linear.bias"):
            params[name] = params[name][PERMUTATION.argsort()]  # class c becomes PERMUTATION[c]
        return params, buffers

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        return NET.features(params, buffers, x, mode)

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        return NET.logits(params, buffers, x, mode)


@pytest.mark.parametrize("case", ["full", "batches", "weights", "augmented", "order"])
def test_other_names_for_the_classes_give_the_same_models(case: str) -> None:
    training = CASES[case]
    renamed = Dataset(data().images, Hard(PERMUTATION[data().labels.hard()]), ("c", "a", "b"), Pixel())

    before = train(training, STACKED)
    after = train(replace(training, data=renamed, net=Relabelled()), STACKED)
    watched = data(20, "watched")
    assert off(after.logits(watched)[..., PERMUTATION], before.logits(watched)) < CLOSE
    assert torch.equal(after.predictions(watched), PERMUTATION[before.predictions(watched)])


# ---- what is kept ----


@pytest.mark.parametrize("case", ["full", "adam", "batches", "augmented", "subsets in batches"])
@pytest.mark.parametrize("plan", [EXACT, STACKED], ids=["loop", "stacked"])
def test_snapshots_are_shorter_trainings(case: str, plan: Plan) -> None:
    training = replace(CASES[case], snapshots=(7, 0, 3, 10, 3))
    population = train(training, plan)
    assert population.moments == (0, 3, 7, 10)
    assert population.snapshots.shape == (5, 4, population.shapes.size)
    for moment in (3, 7):
        shorter = replace(CASES[case], recipe=training.recipe.but(steps=moment))
        assert torch.equal(population.at(moment), run(shorter, plan))
    assert torch.equal(population.at(10), population.final)
    for j, key in enumerate(KEYS):
        start = population.shapes.flatten(NET.init(data(), key.fold("init"))[0])
        assert torch.equal(population.at(0)[j], start.double())
    assert torch.equal(population.final, run(CASES[case], plan))  # looking changes nothing


def test_what_is_observed_is_what_shorter_trainings_predict() -> None:
    watched = {"far": data(30, "far"), "near": data(7, "near")}
    training = replace(CASES["batches"], observe=Observe((10, 0, 4), watched), snapshots=(0, 4))
    population = train(training, STACKED)
    assert population.seen_moments == (0, 4, 10)
    assert population.seen["far"].shape == (5, 3, 30)
    for name, one in watched.items():
        for place, moment in enumerate((0, 4, 10)):
            shorter = replace(CASES["batches"], recipe=training.recipe.but(steps=moment))
            expected = train(shorter, STACKED).predictions(one)
            assert torch.equal(population.seen[name][:, place].long(), expected)
    assert len(population.seen["far"].unique()) > 1


def test_no_steps_leave_the_initialisation() -> None:
    population = train(replace(CASES["full"], recipe=RECIPE.but(steps=0)), STACKED)
    start = population.shapes.flatten(NET.init(data(), KEYS[2].fold("init"))[0])
    assert torch.equal(population.final[2], start.double())
    assert population.snapshots.shape == (5, 0, population.shapes.size)


def test_progress_counts_every_step_of_every_model() -> None:
    told: list[int] = []
    train(CASES["full"], Plan("stacked", 2), told.append)
    assert sum(told) == 5 * STEPS


def test_a_population_scores_as_its_networks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    population = train(CASES["full"], STACKED)
    watched = data(50, "watched")
    expected = torch.stack(
        [
            NET.logits(population.shapes.unflatten(theta), {}, watched.images.double())[0]
            for theta in population.final
        ]
    )
    assert off(population.logits(watched), expected) < 1e-12
    monkeypatch.setattr("distillens.train.TOGETHER", 7 * watched.images[0, 0].numel())  # one model, 7 images
    assert off(population.logits(watched), expected) < 1e-12
    start = torch.zeros_like(population.final)
    assert torch.equal(population.logits(watched, start), torch.zeros(5, 50, K, dtype=torch.float64))
    assert torch.equal(population.predictions(watched), expected.argmax(-1))
    labels = watched.labels.hard()
    share = [(expected[j].argmax(-1) == labels).sum().item() / 50 for j in range(5)]
    assert population.accuracy(watched).tolist() == share
    for j in range(5):
        loss = F.cross_entropy(expected[j], labels, reduction="none")
        assert off(population.losses(watched)[j], loss) < 1e-12
    assert len(population) == 5


def test_populations_are_joined_in_order() -> None:
    training = replace(CASES["full"], snapshots=(1,), observe=Observe((2,), {"w": data(4, "w")}))
    parts = [train_chunk(part, STACKED) for part in chunks(training, Plan("stacked", 2))]
    joined, whole = Population.joined(parts), train(training, Plan("stacked", 2, precision="float64"))
    for found, expected in ((joined.final, whole.final), (joined.at(1), whole.at(1))):
        assert torch.equal(found, expected)
    assert torch.equal(joined.seen["w"], whole.seen["w"])


def test_training_learns() -> None:
    labels = data().labels.hard()
    population = train(replace(CASES["full"], recipe=RECIPE.but(steps=60)), Plan())
    assert bool((population.predictions(data()) == labels).all())


def test_network_keys_are_shared_by_all_sets_of_a_replicate() -> None:
    assert networks(Key(0), 1, 3) == networks(Key(0), 1, 3)
    assert networks(Key(0), 1, 3)[:2] == networks(Key(0), 1, 2)
    assert not set(networks(Key(0), 1, 3)) & set(networks(Key(0), 2, 3))


def test_a_flat_vector_has_the_parameters_in_order() -> None:
    params, _ = NET.init(data(), Key(0))
    shapes = Shapes.of(params)
    whole = shapes.flatten(params)
    assert torch.equal(whole, torch.cat([value.flatten() for value in params.values()]))
    assert shapes.size == len(whole)
    for name, value in shapes.unflatten(torch.stack([whole, 2 * whole])).items():
        assert torch.equal(value, torch.stack([params[name], 2 * params[name]]))


# ---- identity ----


def test_an_identity_is_what_is_trained_and_not_what_is_kept() -> None:
    base = CASES["full"]
    names = base.identities()
    assert len(set(names)) == 5
    watching = replace(base, snapshots=(1,), observe=Observe((1,), {"w": data(4, "w")}))
    assert watching.identities() == names
    assert watching.fingerprint != base.fingerprint
    assert replace(base, keys=KEYS[::-1]).identities() == names[::-1]
    others = {
        "data": replace(base, data=data(place="other")),
        "net": replace(base, net=ConvNet(depth=2, width=5)),
        "recipe": replace(base, recipe=RECIPE.but(lr=0.2)),
        "key": replace(base, keys=Key(1).split(5)),
        "weights": CASES["weights"],
        "subsets": CASES["subsets"],
        "order": CASES["order"],
    }
    for name, other in others.items():
        assert not set(other.identities()) & set(names), name
        assert other.fingerprint != base.fingerprint, name


@pytest.mark.parametrize("change", ["snapshots", "moments", "watched", "watched name"])
def test_a_fingerprint_tells_what_is_kept(change: str) -> None:
    observe = Observe((1,), {"w": data(4, "w")})
    base = replace(CASES["full"], snapshots=(1,), observe=observe)
    other = {
        "snapshots": replace(base, snapshots=(2,)),
        "moments": replace(base, observe=replace(observe, moments=(2,))),
        "watched": replace(base, observe=replace(observe, data={"w": data(5, "w")})),
        "watched name": replace(base, observe=replace(observe, data={"v": data(4, "w")})),
    }[change]
    assert other.fingerprint != base.fingerprint
    assert other.identities() == base.identities()


# ---- mistakes ----

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no models": ({"keys": ()}, "a training needs a model and an image; got 0 models, 12 images"),
    "subsets": (
        {"subsets": (torch.arange(3),)},
        "every model needs one subset; got 1 subsets for 5 models",
    ),
    "empty subset": (
        {"subsets": (torch.arange(3),) * 4 + (torch.arange(0),)},
        "every model needs an image; got an empty subset for model 4",
    ),
    "weights": (
        {"weights": torch.ones(5, 11)},
        "example weights do not fit; got (5, 11); expected [5, 12]",
    ),
    "weights in batches": (
        {"weights": torch.ones(5, N), "recipe": RECIPE.but(batch=11)},
        "example weights need full batches of the whole set; leave points out by subsets",
    ),
    "weights of subsets": (
        {"weights": torch.ones(5, N), "subsets": (torch.arange(3),) * 5},
        "example weights need full batches of the whole set; leave points out by subsets",
    ),
    "weights, mixing": (
        {"weights": torch.ones(5, N), "net": BatchNorm()},
        "example weights need a network that does not mix examples; got BatchNorm; "
        "leave points out by subsets",
    ),
    "negative weights": (
        {"weights": -torch.ones(5, N)},
        "example weights must be from 0 up, with some above 0 in each model",
    ),
    "no weight": (
        {"weights": torch.zeros(5, N)},
        "example weights must be from 0 up, with some above 0 in each model",
    ),
    "late snapshot": (
        {"snapshots": (0, 11)},
        "a moment lies after the last step; got 11; expected up to 10",
    ),
    "late look": (
        {"observe": Observe((12,), {})},
        "a moment lies after the last step; got 12; expected up to 10",
    ),
    "early look": (
        {"observe": Observe((-1, 3), {})},
        "a moment lies before the first step; got -1; expected from 0",
    ),
    "subset outside": (
        {"subsets": (torch.arange(3),) * 4 + (torch.tensor([10**6]),)},
        f"the subset of model 4 names images that are not there; got 1000000 to 1000000; expected 0 to {N - 1}",
    ),
    "late in order": (
        {"order": ORDER, "snapshots": (7,)},
        "a moment lies after the last step; got 7; expected up to 6",
    ),
    "order of subsets": (
        {"order": ORDER, "subsets": (torch.arange(3),) * 5},
        "ordered steps name their images: subsets do not go with them; leave points out by example weights",
    ),
    "order beyond": (
        {"order": Order(torch.tensor([[0, 12]]), torch.ones(1))},
        "an ordered step names an image that is not there; got 12; expected 0 to 11",
    ),
    "weights, cutmix": (
        {"weights": torch.ones(5, N), "recipe": RECIPE.but(cutmix=0.5)},
        "example weights do not go with CutMix, which mixes the images; got cutmix 0.5; "
        "leave points out by subsets",
    ),
    "order, cutmix": (
        {"order": ORDER, "recipe": RECIPE.but(cutmix=0.5)},
        "ordered steps name their images: CutMix does not go with them; got cutmix 0.5",
    ),
    "augmentation": (
        {"recipe": RECIPE.but(augment="flop")},
        "unknown augmentation 'flop'; Did you mean 'flip'? Known: color, crop, cutout, flip, rotate, scale",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_what_does_not_fit_is_refused(mistake: str) -> None:
    changes, message = WRONG[mistake]
    with pytest.raises(UserError) as error:
        replace(CASES["full"], **changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "stack"}, "unknown layout 'stack'; Did you mean 'stacked'? Known: loop, stacked"),
        (
            {"precision": "float16"},
            "unknown precision 'float16'; Did you mean 'bfloat16'? Known: bfloat16, float32, float64",
        ),
        ({"chunk": 0}, "plan: chunk must be at least 1; got 0"),
        ({"threads": 0}, "plan: threads must be at least 1; got 0"),
    ],
)
def test_plans_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Plan(**changes)
    assert str(error.value) == message


def test_an_order_needs_one_rate_a_step() -> None:
    with pytest.raises(UserError) as error:
        Order(torch.zeros(3, 2, dtype=torch.int64), torch.ones(2))
    assert str(error.value) == (
        "ordered steps need one row of images and one rate a step; got steps (3, 2), rates (2,)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "recipe: steps must be at least 0; got -1"),
        ({"lr": 0.0}, "recipe: lr must be above 0; got 0.0"),
        ({"lr": math.nan}, "recipe: lr must be above 0; got nan"),
        ({"momentum": 1.0}, "recipe: momentum must be below 1; got 1.0"),
        ({"batch": 0}, "recipe: batch must be at least 1; got 0"),
        ({"cutmix": 1.5}, "recipe: cutmix is a probability; got 1.5; expected 0 to 1"),
        (
            {"optimiser": "sdg"},
            "unknown optimiser 'sdg'; Did you mean 'sgd'? Known: adam, adamw, sgd",
        ),
        (
            {"schedule": "cosin"},
            "unknown schedule 'cosin'; Did you mean 'cosine'? Known: constant, cosine, "
            "fifth_at_4_and_5_sixths, half_at_fifths, half_cosine, tenth_at_half, warm_up_cosine",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        RECIPE.but(**changes)
    assert str(error.value) == message

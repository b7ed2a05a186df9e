"""Methods that choose real images against twins in plain loops, closed forms, and plants that they must find."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from distillens import distillers
from distillens.core.checks import UserError
from distillens.core.config import override
from distillens.core.contracts import Buffers, Like, Mode, Params, Problem
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.data.planted import planted
from distillens.distillers import grand
from distillens.distillers._coreset import Scored, ranked
from distillens.distillers.el2n import EL2N
from distillens.distillers.forgetting import Forgetting, events
from distillens.distillers.grand import GraNd, gradient_lengths
from distillens.distillers.herding import Herding
from distillens.distillers.k_center import KCenter, farthest
from distillens.distillers.k_means import KMeans, clusters, nearest_to
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Population, Training

K, IPC = 3, 2
KEY = Key(3, ("reference",))
NET = ConvNet(depth=2, width=4)
SCORED: tuple[type[Scored], ...] = (EL2N, GraNd, Forgetting)


def fine(per_class: int = 10, shape: tuple[int, int, int] = (2, 8, 12)) -> Dataset:
    """Three classes of images in float64: twins agree to many digits."""
    rough = planted(Key(7), per_class=per_class, shape=shape).train
    return Dataset(rough.images.double(), rough.labels, rough.classes, rough.space)


def problem(data: Dataset | None = None, ipc: int = IPC, key: Key = KEY, **inputs: Any) -> Problem:
    return Problem(data if data is not None else fine(), ipc, key, inputs)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))


# ---- k-center ----


def slow_farthest(features: torch.Tensor, count: int) -> list[int]:
    n = range(len(features))
    centre = sum(features) / len(features)
    chosen = [min(n, key=lambda i: gap(features[i], centre))]
    for _ in range(count - 1):
        rest = [i for i in n if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(gap(features[i], features[j]) for j in chosen)))
    return chosen


def radius(features: torch.Tensor, chosen: torch.Tensor) -> float:
    return float(torch.cdist(features, features[chosen]).amin(1).max())


def test_k_center_is_the_greedy_choice_in_plain_loops() -> None:
    for seed in range(5):
        features = Key(seed).normal(25, 4).double()
        assert farthest(features, 8).tolist() == slow_farthest(features, 8)


def test_k_center_takes_each_image_once_and_all_of_them_at_last() -> None:
    assert sorted(farthest(Key(0).normal(9, 4).double(), 9).tolist()) == list(range(9))
    assert sorted(farthest(torch.zeros(5, 3), 5).tolist()) == list(range(5))  # all alike


def test_k_center_covers_within_twice_the_best_radius() -> None:
    features = Key(4).normal(12, 3).double()
    best = min(radius(features, torch.tensor(some)) for some in itertools.combinations(range(12), 4))
    assert best < radius(features, farthest(features, 4)) <= 2 * best


# ---- k-means ----


def objective(features: torch.Tensor, centres: torch.Tensor) -> float:
    return float(torch.cdist(features, centres).amin(1).square().sum())


def test_clusters_stand_still_under_one_more_round_of_lloyd() -> None:
    features = Key(1).normal(60, 5).double()
    centres = clusters(features, 6, Key(2))
    members: list[list[torch.Tensor]] = [[] for _ in centres]
    for x in features:
        members[min(range(6), key=lambda c: gap(x, centres[c]))].append(x)
    again = torch.stack([sum(own[1:], own[0]) / len(own) for own in members])
    assert off(centres, again) < 1e-12


def test_clusters_come_from_the_key() -> None:
    features = Key(1).normal(60, 5).double()
    found = [clusters(features, 6, Key(seed)) for seed in (2, 2, 3, 2**40 + 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])


def test_each_mean_gets_its_nearest_image() -> None:
    features = Key(5).normal(30, 4).double()
    centres = features[[3, 14, 20]] + 0.01
    assert nearest_to(centres, features).tolist() == [3, 14, 20]


def test_two_means_with_one_nearest_image_share_the_images_at_the_least_cost() -> None:
    features = Key(6).normal(7, 2).double()
    centres = torch.cat([features[:1] + 0.01, features[:1] - 0.02, features[4:5] + 0.1])

    def cost(some: tuple[int, ...]) -> float:
        return sum(gap(features[i], centre) ** 2 for i, centre in zip(some, centres, strict=True))

    found = nearest_to(centres, features).tolist()
    assert found == list(min(itertools.permutations(range(7), 3), key=cost))
    assert len({min(range(7), key=lambda i: gap(features[i], centre)) for centre in centres}) == 2  # they do


def test_fewer_different_images_than_clusters() -> None:
    features = torch.tensor([[0.0], [0.0], [0.0], [1.0]], dtype=torch.float64)
    found = nearest_to(clusters(features, 3, Key(0)), features).tolist()
    assert len(set(found)) == 3 and 3 in found


# ---- what they are for ----


def test_each_choice_is_far_better_than_chance_at_its_own_aim() -> None:
    data = fine(60, (1, 2, 3))
    count = 8
    asked = problem(data, count)
    draws = [
        torch.cat([m[Key(9).fold(i, c).permutation(60)[:count]] for c, m in enumerate(data.by_class)])
        for i in range(100)
    ]

    def residual(x: torch.Tensor, chosen: torch.Tensor) -> float:
        return float((x.mean(0) - x[chosen].mean(0)).norm())

    def quantised(x: torch.Tensor, chosen: torch.Tensor) -> float:
        return objective(x, x[chosen])

    def each_class(measure: Any, index: torch.Tensor) -> float:
        x = data.images.flatten(1)
        places = [
            (index[c * count : (c + 1) * count, None] == m).nonzero()[:, 1]
            for c, m in enumerate(data.by_class)
        ]
        return sum(measure(x[m], own) for m, own in zip(data.by_class, places, strict=True))

    for method, measure, share in (
        (Herding(embedding="pixels"), residual, 0.5),
        (KCenter(embedding="pixels"), radius, 1.0),
        (KMeans(embedding="pixels"), quantised, 1.0),
    ):
        ours = each_class(measure, method.start(asked).tensors["index"])
        assert ours < share * min(each_class(measure, index) for index in draws), method.name


@dataclass(frozen=True)
class Linear:
    """One linear layer on pixels: everything has a closed form.

    The pixels lie under a mask that is remembered, not learned, and counts in evaluation mode only.
    """

    mixes_examples: ClassVar[bool] = False

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        d = math.prod(like.shape)
        params = {"weight": 0.1 * key.fold("w").normal(like.k, d), "bias": key.fold("b").normal(like.k)}
        return params, {"mask": (key.fold("m").uniform(d) > 0.5).float()}

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        seen = buffers["mask"] if mode == "evaluate" else 1 - buffers["mask"]
        return x.flatten(1) * seen.to(x), buffers

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        return F.linear(self.features(params, buffers, x, mode)[0], params["weight"], params["bias"]), buffers


def untrained(net: Any, data: Dataset, models: int = 2) -> Population:
    """Networks at initialisation, as the store hands them over."""
    started = [net.init(data, Key(8).fold(j)) for j in range(models)]
    shapes = Shapes.of(started[0][0])
    flat = torch.stack([shapes.flatten(params) for params, _ in started]).double()
    buffers = {name: torch.stack([b[name] for _, b in started]).double() for name in started[0][1]}
    return Population(net, shapes, flat, (), flat[:, None], buffers=buffers)


def slow_error(net: Linear, data: Dataset, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax - y [n, k] and the masked pixels [n, d], image by image."""
    params, buffers = net.init(data, key)
    errors, hidden = [], []
    for image, y in zip(data.images, data.labels.hard().tolist(), strict=True):
        h = image.flatten() * buffers["mask"].double()
        z = params["weight"].double() @ h + params["bias"].double()
        p = z.exp() / z.exp().sum()
        p[y] -= 1
        errors.append(p)
        hidden.append(h)
    return torch.stack(errors), torch.stack(hidden)


@pytest.mark.parametrize("embedding", [KCenter, KMeans])
def test_the_embedding_is_looked_at_with_its_own_buffers(embedding: type[KCenter] | type[KMeans]) -> None:
    data = fine()
    population = untrained(Linear(), data)
    asked = problem(data, embedding=population)
    index = embedding(net=Linear()).start(asked).tensors["index"]
    for c, members in enumerate(data.by_class):
        x = data.images[members].flatten(1) * population.buffers["mask"][0]
        if embedding is KCenter:
            expected = members[slow_farthest(x, IPC)]
        else:
            centres = clusters(x, IPC, KEY.fold("choice", c))
            expected = members[[int((x - centre).norm(dim=1).argmin()) for centre in centres]]
        assert index[c * IPC : (c + 1) * IPC].tolist() == expected.tolist()


# ---- EL2N and GraNd ----


def test_el2n_is_the_mean_length_of_the_error() -> None:
    data = fine()
    expected = sum(slow_error(Linear(), data, Key(8).fold(j))[0].square().sum(1).sqrt() for j in range(2)) / 2
    found = EL2N(net=Linear()).scores(problem(data, log=untrained(Linear(), data)))
    assert off(found, torch.as_tensor(expected)) < 1e-12


@pytest.mark.parametrize("parameters", ["all", "last_layer"])
def test_grand_of_a_linear_network_has_a_closed_form(parameters: Any) -> None:
    """The gradient in the weights is the outer product of error and input, in the bias the error."""
    data = fine()
    expected = torch.zeros(len(data), dtype=torch.float64)
    for j in range(2):
        errors, hidden = slow_error(Linear(), data, Key(8).fold(j))
        for i, (error, h) in enumerate(zip(errors, hidden, strict=True)):
            expected[i] += (torch.outer(error, h).square().sum() + error.square().sum()).sqrt() / 2
    found = GraNd(net=Linear(), parameters=parameters).scores(problem(data, log=untrained(Linear(), data)))
    assert off(found, expected) < 1e-12


def classify(params: Params, x: torch.Tensor) -> torch.Tensor:
    """The ConvNet in torch's plainest functions."""
    for block in range(2):
        x = F.conv2d(x, params[f"conv{block}.weight"], params[f"conv{block}.bias"], padding=1)
        mean = x.mean((2, 3), keepdim=True)
        spread = (x - mean).square().mean((2, 3), keepdim=True)
        x = (x - mean) / (spread + 1e-5).sqrt()
        x = x * params[f"norm{block}.weight"].view(-1, 1, 1) + params[f"norm{block}.bias"].view(-1, 1, 1)
        x = F.avg_pool2d(x.relu(), 2)
    return x.flatten(1) @ params["linear.weight"].T + params["linear.bias"]


def slow_gradients(data: Dataset, only: str = "") -> torch.Tensor:
    """For each image one backward by itself, over two fresh networks."""
    lengths = torch.zeros(len(data), dtype=torch.float64)
    for j in range(2):
        params = {
            name: value.double().requires_grad_() for name, value in NET.init(data, Key(8).fold(j))[0].items()
        }
        for i, (x, y) in enumerate(zip(data.images, data.labels.hard().tolist(), strict=True)):
            loss = -classify(params, x[None]).log_softmax(1)[0, y]
            wanted = [value for name, value in params.items() if name.startswith(only)]
            found = torch.autograd.grad(loss, wanted)
            lengths[i] += sum(float(g.square().sum()) for g in found) ** 0.5 / 2
    return lengths


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_grand_is_one_backward_an_image(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fine(4)
    method = GraNd(net=NET)
    monkeypatch.setattr(grand, "GRADIENTS", at_once * method._each(problem(data)))
    sizes = []

    def counted(*args: Any) -> torch.Tensor:
        sizes.append(len(args[3]))
        return gradient_lengths(*args)

    monkeypatch.setattr(grand, "gradient_lengths", counted)
    found = method.scores(problem(data, log=untrained(NET, data)))
    assert max(sizes) == min(at_once, len(data)) and sum(sizes) == 2 * len(data)
    assert off(found, slow_gradients(data)) < 1e-10


def test_grand_of_the_last_layer_is_the_gradient_in_the_last_layer() -> None:
    data = fine(4)
    found = GraNd(net=NET, parameters="last_layer").scores(problem(data, log=untrained(NET, data)))
    assert off(found, slow_gradients(data, "linear")) < 1e-10
    assert off(found, slow_gradients(data)) > 0.01


# ---- forgetting ----


def test_forgetting_counts_right_then_wrong() -> None:
    truth = torch.tensor([1, 1, 1, 1, 1])
    one = torch.tensor(
        [
            [1, 0, 0, 1, 1],
            [1, 0, 1, 0, 0],
            [1, 0, 1, 1, 2],
            [1, 2, 1, 0, 1],
        ]
    )  # never forgotten; never learned; learned late; forgotten twice; forgotten once
    assert events(one[None].to(torch.int16), truth).tolist() == [0, 4, 0, 2, 1]


def test_what_a_network_never_learns_comes_before_all_that_is_learned() -> None:
    truth = torch.zeros(4, dtype=torch.int64)
    often = torch.tensor([0, 1] * 4)  # forgotten four times, all that is possible in eight looks
    never, always = torch.ones(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    first = torch.stack([often, never, never, always], 1)
    second = torch.stack([often, never, always, always], 1)
    found = events(torch.stack([first, second]), truth)
    assert found.argsort(descending=True).tolist() == [1, 2, 0, 3]
    assert found[0] == 4 and found[3] == 0


def test_forgetting_looks_after_every_pass() -> None:
    """The populations after each pass, trained so far and no farther, say the same."""
    data = planted(Key(7), per_class=10, noise=3).train
    method = Forgetting(nets=2, net=NET, recipe=Recipe(steps=24, batch=8, lr=0.03))  # a pass is four steps
    training: Training = method.needs(problem(data))["log"]
    runs = Runs(Plan(precision="float64"))
    seen = []
    for passes in range(1, 7):
        short = replace(training, recipe=training.recipe.but(steps=4 * passes), observe=None)
        seen.append(runs.get(short)[0].predictions(data))
    scores = method.scores(problem(data, log=runs.get(training)[0]))
    expected = []
    for i, y in enumerate(data.labels.hard().tolist()):
        total = 0.0
        for j in range(2):
            right = [int(now[j, i]) == y for now in seen]
            total += sum(a and not b for a, b in itertools.pairwise(right)) / 2 + (0 if any(right) else 6)
        expected.append(total)
    assert scores.tolist() == expected
    assert any(score % 6 for score in expected) and max(expected) >= 6  # some forget, some never learn


# ---- the order ----


def test_the_order_is_by_score_and_ties_are_drawn() -> None:
    scores = torch.tensor([9.0, 3, 1, 2, 5, 4, 0, 9])
    members = torch.tensor([1, 2, 3, 4, 5])
    assert ranked(scores, members, "hard", KEY).tolist() == [4, 5, 1, 3, 2]
    assert ranked(scores, members, "easy", KEY).tolist() == [2, 3, 1, 5, 4]
    middle = ranked(scores, members, "middle", KEY).tolist()
    assert middle[0] == 1 and set(middle[:3]) == {3, 1, 5}


@pytest.mark.parametrize("order", ["hard", "easy", "middle"])
def test_equal_scores_are_taken_in_random_order(order: Any) -> None:
    scores, members = torch.zeros(40), torch.arange(40)
    first = [int(ranked(scores, members, order, Key(seed))[0]) for seed in range(400)]
    assert len(set(first)) == 40
    assert max(first.count(i) for i in range(40)) < 30  # 10 expected
    again = [ranked(scores, members, order, Key(5)).tolist() for _ in range(2)]
    assert again[0] == again[1]
    # But a difference counts, whatever the draw.
    scores[17], scores[3] = 1, -1
    ends = {int(ranked(scores, members, order, Key(seed))[0]) for seed in range(50)}
    assert ends == {"hard": {17}, "easy": {3}}.get(order, ends - {3, 17})


def spoiled(what: str) -> tuple[Dataset, set[int]]:
    """Forty images a class; four of each carry another class's label, or are noise. And which."""
    clean = planted(Key(11), per_class=40).train
    bad = torch.cat([members[5:40:10] for members in clean.by_class])
    images, labels = clean.images.clone(), clean.labels.hard().clone()
    if what == "mislabelled":
        labels[bad] = (labels[bad] + 1) % K
    else:
        images[bad] = Key(12).normal(len(bad), *clean.shape)
    return Dataset(images, Hard(labels), clean.classes, clean.space), set(bad.tolist())


@pytest.mark.parametrize("what", ["mislabelled", "noise"])
def test_hard_orders_find_what_is_spoiled_and_easy_ones_never(what: str) -> None:
    """Four of forty a class are spoiled, so chance finds 1.2 of them among the twelve that are taken."""
    data, bad = spoiled(what)
    runs = Runs(Plan())
    for kind in SCORED:
        # As long as it takes to learn the others, not these.
        method = kind(nets=3, net=NET, recipe=Recipe(steps=64, batch=30, lr=0.01))
        asked = problem(data, 4, log=runs.get(method.needs(problem(data))["log"])[0])
        found = {
            order: len(bad & set(replace(method, order=order).start(asked).tensors["index"].tolist()))
            for order in ("hard", "easy", "middle")
        }
        assert found["hard"] >= 8, (method.name, found)
        # Noise that networks happen to have right from the first pass on was never forgotten: counting is blind to it.
        most = 1 if kind is Forgetting and what == "noise" else 0
        assert max(found["easy"], found["middle"]) <= most, (method.name, found)
    assert sum(runs.trained.values()) == 3


# ---- what is trained ----


def choosers(data: Dataset) -> list[Any]:
    """Every method that chooses by something trained, with its defaults but for the length."""
    found = [
        distillers.room.find(name).defaults(data, IPC)
        for name in ("herding", "k_center", "k_means", "el2n", "grand", "forgetting")
    ]
    return [override(one, ["net.depth=1", "net.width=4", "recipe.steps=6"]) for one in found]


@pytest.mark.parametrize("plan", [Plan(), Plan("loop", 1)], ids=["stacked", "loop"])
def test_one_embedding_and_one_log_serve_all_methods_sizes_and_orders(plan: Plan) -> None:
    data = planted(Key(7), per_class=10).train
    runs = Runs(plan)

    def everything(shared: Key) -> None:
        for method in choosers(data):
            for ipc in (1, 2):
                for changed in (
                    [method] if not isinstance(method, Scored) else [method, replace(method, order="easy")]
                ):
                    asked = Problem(data, ipc, Key(0).fold(method.name, ipc), shared=shared)
                    given = {name: runs.get(need)[0] for name, need in changed.needs(asked).items()}
                    changed.start(replace(asked, inputs=given))

    everything(Key(0, ("shared", 0)))
    assert set(runs.trained.values()) == {1} and len(runs.trained) == 1 + 5
    everything(Key(0, ("shared", 0)))
    assert set(runs.trained.values()) == {1} and len(runs.trained) == 1 + 5
    everything(Key(0, ("shared", 1)))
    assert set(runs.trained.values()) == {1} and len(runs.trained) == 2 * (1 + 5)


def test_models_that_are_stored_one_by_one_serve_requests_for_fewer() -> None:
    data = planted(Key(7), per_class=10).train
    runs = Runs(Plan("loop", 1))
    for nets in (3, 1, 2):
        method = EL2N(nets=nets, net=NET, recipe=Recipe(steps=4, batch=8))
        runs.get(*method.needs(problem(data)).values())
    assert sum(runs.trained.values()) == 3


def test_by_default_the_methods_of_one_kind_ask_for_one_training() -> None:
    for shape in ((1, 8, 8), (3, 32, 32)):
        data = planted(Key(7), per_class=1, shape=shape).train
        names = {
            name: distillers.room.find(name).defaults(data, IPC).needs(problem(data))
            for name in ("herding", "k_center", "k_means", "el2n", "grand", "forgetting")
        }
        prints = {name: next(iter(needs.values())).fingerprint for name, needs in names.items()}
        assert prints["herding"] == prints["k_center"] == prints["k_means"]
        assert prints["el2n"] == prints["grand"]
        assert (prints["forgetting"] == prints["el2n"]) == (shape == (1, 8, 8))


def test_pixels_need_no_training() -> None:
    for kind in (Herding, KCenter, KMeans):
        method = kind(embedding="pixels")
        assert method.needs(problem()) == {} and method.work(problem()) == 0


def test_grand_of_no_steps_looks_at_networks_at_initialisation() -> None:
    data = fine()
    method = GraNd(nets=2, net=NET, recipe=Recipe(steps=0))
    training = method.needs(problem(data))["log"]
    (log,) = Runs(Plan(precision="float64")).get(training)
    for j in range(2):
        params = NET.init(data, problem().shared.fold("log", j, "init"))[0]
        assert torch.equal(log.final[j], log.shapes.flatten(params).double())
    method.start(problem(data, log=log))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        (
            "el2n",
            {"order": "harder"},
            "unknown order 'harder'; Did you mean 'hard'? Known: easy, hard, middle",
        ),
        ("forgetting", {"nets": 0}, "forgetting: nets must be at least 1; got 0"),
        ("grand", {"parameters": "first"}, "unknown parameters 'first'; Known: all, last_layer"),
        ("k_center", {"embedding": "cls"}, "unknown embedding 'cls'; Known: pixels, trained"),
    ],
)
def test_settings_are_checked(name: str, setting: dict[str, Any], said: str) -> None:
    method: Any = distillers.room.find(name)
    with pytest.raises(UserError) as error:
        method(**setting)
    assert str(error.value) == said


def test_forgetting_needs_two_passes() -> None:
    data = fine()
    method = Forgetting(nets=1, net=NET, recipe=Recipe(steps=7, batch=8))
    (log,) = Runs(Plan()).get(method.needs(problem(data))["log"])
    with pytest.raises(UserError) as error:
        method.start(problem(data, log=log))
    assert str(error.value) == (
        "forgetting: nothing can be forgotten in less than two passes over the data; "
        "got 7 steps of 4 a pass; set more --set recipe.steps"
    )


@pytest.mark.parametrize("kind", [EL2N, GraNd])
def test_scores_of_networks_that_diverged_are_refused(kind: type[EL2N] | type[GraNd]) -> None:
    data = fine()
    log = untrained(NET, data)
    log.final[1, 0] = torch.nan
    with pytest.raises(UserError) as error:
        kind(net=NET).start(problem(data, log=log))
    assert str(error.value) == (
        f"{kind.__name__.lower()}: the score of an image is not finite: the training of the networks diverged; "
        "set a smaller --set recipe.lr"
    )


@pytest.mark.parametrize("kind", [Herding, KCenter, KMeans])
def test_an_embedding_that_diverged_is_refused(kind: type[Herding | KCenter | KMeans]) -> None:
    data = fine()
    embedding = untrained(NET, data, 1)
    embedding.final[0, 0] = torch.inf
    with pytest.raises(UserError, match="the training of the embedding diverged; set a smaller --set recipe"):
        kind(net=NET).start(problem(data, embedding=embedding))

"""Estimators of influence: against retraining where it is exact, and against each other."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from distillens.attribution.influence import ConjugateGradient, ExactInfluence, GaussNewton, hessian
from distillens.attribution.similarity import GradientCosine, GradientDot, TracIn
from distillens.attribution.trained import Trained
from distillens.attribution.trak import Trak
from distillens.attribution.unrolled import Unrolled
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset, Splits
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.train import Training, train

DECAY = 1e-2
KEY = Key(31, ("influence",))


def newton(
    x: torch.Tensor, y: torch.Tensor, theta: torch.Tensor, share: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax regression with L2 on inputs [n, d] with a last column of ones, to the optimum: weights [k, d].

    ``share`` [n] is what each image counts in the mean.
    """
    k, d = theta.shape
    share = (torch.ones(len(x)) / len(x) if share is None else share).double()
    hot = torch.nn.functional.one_hot(y, k).double()
    for _ in range(50):
        p = (x @ theta.T).softmax(1)
        gradient = (share[:, None] * (p - hot)).T @ x + DECAY * theta
        if float(gradient.abs().max()) < 1e-12:
            break
        weight = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        curved = torch.einsum("n,nab,ni,nj->aibj", share, weight, x, x).reshape(k * d, k * d)
        curved += DECAY * torch.eye(k * d, dtype=torch.float64)
        theta = theta - torch.linalg.solve(curved, gradient.flatten()).view(k, d)
    return theta


def ones(images: torch.Tensor) -> torch.Tensor:
    flat = images.double().flatten(1)
    return torch.cat([flat, flat.new_ones(len(flat), 1)], 1)


@pytest.fixture(scope="module")
def convex(digits: Splits) -> tuple[Trained, Dataset, torch.Tensor]:
    """The optimum on 60 images of five classes, 40 others, and what leaving each out does to these (by retraining)."""
    few = [members[:12] for members in digits.train.by_class[:5]]
    data = digits.train.take(torch.cat(few))
    data = Dataset(data.images.double(), data.labels, data.classes, data.space)
    others = digits.test.take(torch.cat([members[:8] for members in digits.test.by_class[:5]]))
    x, y = ones(data.images), data.labels.hard()
    theta = newton(x, y, torch.zeros(10, x.shape[1], dtype=torch.float64))
    z, label = ones(others.images), others.labels.hard()

    def losses(theta: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(z @ theta.T, label, reduction="none")

    everything = losses(theta)
    rows = []
    for j in range(len(x)):
        kept = torch.arange(len(x)) != j
        rows.append(losses(newton(x[kept], y[kept], theta)) - everything)
    shapes = Shapes(("layer0.weight", "layer0.bias"), ((10, x.shape[1] - 1), (10,)))
    flat = torch.cat([theta[:, :-1].flatten(), theta[:, -1]])
    model = Trained(MLP(0), shapes, flat, data, torch.arange(len(x)), Recipe(weight_decay=DECAY))
    return model, others, torch.stack(rows)


def agreement(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """Rank correlation over points, averaged over images."""
    found = [spearmanr(scores[:, i], truth[:, i]).statistic for i in range(truth.shape[1])]
    return float(torch.tensor(found).mean())


@pytest.mark.parametrize(
    "estimator",
    # Weight decay is in the whole Hessian; to the others it is a damping.
    [ExactInfluence((0.0,)), GaussNewton((DECAY,)), ConjugateGradient((DECAY,), tolerance=1e-10)],
)
def test_every_influence_function_is_leave_one_out_where_it_is_exact(
    convex: tuple[Trained, Dataset, torch.Tensor], estimator: ExactInfluence
) -> None:
    model, others, truth = convex
    (scores,) = estimator(model, others)
    assert agreement(scores, truth) > 0.97
    # Not the order alone: the sizes are the slope of retraining with a little less of a point.
    x, y = ones(model.data.images), model.data.labels.hard()
    theta = torch.cat([model.final[:-10].view(10, -1), model.final[-10:, None]], 1)
    z, label = ones(others.images), others.labels.hard()
    for j in (0, 31):
        losses = []
        for move in (-1e-4, 1e-4):
            weights = torch.ones(len(x), dtype=torch.float64)
            weights[j] += move
            moved = newton(x, y, theta, weights / weights.sum())
            losses.append(torch.nn.functional.cross_entropy(z @ moved.T, label, reduction="none"))
        torch.testing.assert_close(scores[j], (losses[0] - losses[1]) / 2e-4, rtol=1e-4, atol=1e-8)


def test_likeness_of_gradients_is_no_influence_function(
    convex: tuple[Trained, Dataset, torch.Tensor],
) -> None:
    model, others, truth = convex
    for estimator in (GradientDot(), GradientCosine()):
        assert agreement(estimator(model, others)[0], truth) < 0.9


def test_three_ways_to_the_same_damped_matrix(convex: tuple[Trained, Dataset, torch.Tensor]) -> None:
    model, others, _ = convex
    dampings = (1e-2, 1e-1)
    whole = ExactInfluence(dampings)(
        Trained(model.net, model.shapes, model.final, model.data, model.origin, Recipe()), others
    )
    dual = GaussNewton(dampings)(model, others)
    solved = ConjugateGradient(dampings, tolerance=1e-10)(model, others)
    torch.testing.assert_close(dual, whole, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(solved, whole, rtol=1e-6, atol=1e-12)


@pytest.fixture(scope="module")
def trained(digits: Splits) -> tuple[Trained, Dataset]:
    """A small ConvNet trained for 15 steps on 20 images, in float64."""
    data = digits.train.take(torch.cat([members[:2] for members in digits.train.by_class]))
    recipe = Recipe(steps=15, lr=0.05, weight_decay=1e-3, schedule="tenth_at_half")
    return follow(data, recipe), digits.test.take(torch.arange(12))


def follow(data: Dataset, recipe: Recipe, weights: torch.Tensor | None = None) -> Trained:
    moments = tuple(range(recipe.steps + 1))
    training = Training(data, ConvNet(1, 4), recipe, (KEY,), weights=weights, snapshots=moments)
    population = train(training, Plan("loop", 1, precision="float64"))
    return Trained.of(population, 0, data, torch.arange(len(data)), recipe)


def test_unrolled_influence_is_the_slope_of_retraining(trained: tuple[Trained, Dataset]) -> None:
    model, others = trained
    (scores,) = Unrolled()(model, others)
    for j in (0, 7, 19):
        away = []
        for move in (-1e-4, 1e-4):
            weights = torch.ones(1, len(model.data), dtype=torch.float64)
            weights[0, j] += move
            after = follow(
                Dataset(model.data.images.float(), model.data.labels, model.data.classes, model.data.space),
                model.recipe,
                weights,
            )
            logits, _ = after.net.logits(after.shapes.unflatten(after.final), {}, others.images.double())
            away.append(others.labels.loss(logits))
        slope = (away[0] - away[1]) / 2e-4  # of the loss by leaving out
        torch.testing.assert_close(scores[j], slope, rtol=1e-4, atol=1e-8)


def test_tracin_is_the_sum_over_steps(trained: tuple[Trained, Dataset]) -> None:
    model, others = trained
    expected = torch.zeros(20, 12, dtype=torch.float64)
    for step in range(15):
        flat = model.snapshots[step]

        def slopes(data: Dataset, flat: torch.Tensor = flat) -> torch.Tensor:
            rows = []
            for i in range(len(data)):
                leaf = flat.clone().requires_grad_()
                logits, _ = model.net.logits(
                    model.shapes.unflatten(leaf), {}, data.images[i : i + 1].double()
                )
                loss = torch.nn.functional.cross_entropy(logits, data.labels.hard()[i : i + 1])
                rows.append(torch.autograd.grad(loss, leaf)[0])
            return torch.stack(rows)

        own = slopes(model.data)
        rate = 0.05 * (0.1 if step > 7 else 1.0) * 10  # momentum 0.9
        expected += rate * ((own - own.mean(0)) / 20) @ slopes(others).T
    torch.testing.assert_close(TracIn()(model, others)[0], expected, rtol=1e-8, atol=1e-12)


def test_trak_is_ridge_regression_on_margins(trained: tuple[Trained, Dataset]) -> None:
    model, others = trained

    def margin(data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        rows, doubts = [], []
        for i in range(len(data)):
            leaf = model.final.clone().requires_grad_()
            logits, _ = model.net.logits(model.shapes.unflatten(leaf), {}, data.images[i : i + 1].double())
            p = logits.softmax(1)[0, data.labels.hard()[i]]
            rows.append(torch.autograd.grad((p / (1 - p)).log(), leaf)[0])
            doubts.append(1 - p.detach())
        return torch.stack(rows), torch.stack(doubts)

    own, doubt = margin(model.data)
    theirs, unsure = margin(others)
    damped = own.T @ own + 20 * 1e-2 * torch.eye(own.shape[1], dtype=torch.float64)
    expected = own @ torch.linalg.solve(damped, theirs.T) * doubt[:, None] * unsure
    torch.testing.assert_close(Trak((1e-2,))(model, others)[0], expected, rtol=1e-6, atol=1e-12)


def test_the_dual_equals_the_matrix_in_parameters(trained: tuple[Trained, Dataset]) -> None:
    model, others = trained
    rows = []
    for i in range(20):
        leaf = model.final.clone().requires_grad_()
        logits, _ = model.net.logits(model.shapes.unflatten(leaf), {}, model.data.images[i : i + 1])
        slopes = torch.stack([torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in logits[0]])
        p = logits[0].detach().softmax(0)
        rows.append(slopes.T @ (torch.diag(p) - torch.outer(p, p)) @ slopes)
    matrix = torch.stack(rows).mean(0)
    linear = matrix.shape[0] - 10 - model.shapes.shapes[-2][1] * 10
    for layers, first in (("all", 0), ("last", linear)):
        z = torch.cat(list(model.gradients(others)))[:, first:]
        moved = model.point_gradients()[:, first:]
        damped = matrix[first:, first:] + 1e-3 * torch.eye(matrix.shape[0] - first, dtype=torch.float64)
        expected = moved @ torch.linalg.solve(damped, z.T)
        (scores,) = GaussNewton((1e-3,), layers)(model, others)  # type: ignore[arg-type]
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-9)


def test_a_point_of_two_images_is_left_out_with_both(trained: tuple[Trained, Dataset]) -> None:
    model, others = trained
    pairs = Trained(
        model.net,
        model.shapes,
        model.final,
        model.data,
        torch.arange(20) // 2,
        model.recipe,
        model.moments,
        model.snapshots,
    )
    for estimator in (GaussNewton((1e-2,)), Trak((1e-2,)), GradientDot(), TracIn()):
        single, double = estimator(model, others), estimator(pairs, others)
        torch.testing.assert_close(double, single[:, 0::2] + single[:, 1::2])


def test_what_cannot_be_estimated_is_refused(trained: tuple[Trained, Dataset], digits: Splits) -> None:
    model, others = trained
    with pytest.raises(UserError, match=r"needs the parameters along the way.*0 moments"):
        TracIn()(Trained(model.net, model.shapes, model.final, model.data, model.origin, Recipe()), others)
    adam = Trained(
        model.net,
        model.shapes,
        model.final,
        model.data,
        model.origin,
        Recipe(optimiser="adam"),
        model.moments,
    )
    with pytest.raises(UserError, match="plain SGD on whole batches"):
        Unrolled()(adam, others)
    large = ConvNet(2, 32)
    params, _ = large.init(digits.train, KEY)
    shapes = Shapes.of(params)
    wide = Trained(large, shapes, shapes.flatten(params), model.data, model.origin, Recipe())
    with pytest.raises(UserError, match="up to 3,000"):
        ExactInfluence()(wide, others)


def test_the_hessian_is_that_of_the_trained_loss(trained: tuple[Trained, Dataset]) -> None:
    model, _ = trained
    probe = KEY.fold("probe").normal(model.shapes.size).double()

    def slope(flat: torch.Tensor) -> torch.Tensor:
        leaf = flat.clone().requires_grad_()
        logits, _ = model.net.logits(model.shapes.unflatten(leaf), {}, model.data.images)
        loss = torch.nn.functional.cross_entropy(logits, model.data.labels.hard())
        return torch.autograd.grad(loss, leaf)[0] + 1e-3 * flat

    eps = 1e-6
    expected = (slope(model.final + eps * probe) - slope(model.final - eps * probe)) / (2 * eps)
    torch.testing.assert_close(hessian(model) @ probe, expected, rtol=1e-3, atol=1e-5)

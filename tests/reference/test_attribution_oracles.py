"""Estimators of influence against captum and dattri: second opinions that share no code with ours.

Every library scores a point by its own gradient. Ours is the gradient minus the mean gradient, over n: the derivative by the
weight of a point in the weighted mean loss. What is linear in the gradient must agree once the library's scores are centred
over the points and divided by n, to the tolerance that stands beside each comparison.

Where the libraries differ from what one would expect:

- captum's Hessian is of the summed loss, so its ``hessian_reg`` is n times ours, and its scores come divided by n. It adds
  the regularisation in float32 and drops eigenvalues below a tolerance.
- dattri writes its scores into float32 whatever the network's precision.
- dattri's conjugate gradients take all their steps whatever their ``tol``, and end in NaN where a system is solved before.
- dattri projects gradients to 512 numbers unless told ``identity``, in a default that one attributor changes for the next.
- dattri's cosine is between gradients that are not centred.
- dattri's TRAK takes the gradient of the loss at training points and of the target at test points. Given a margin as the
  target, as its documentation has it, all signs are turned round: a helpful point scores negative. It scales gradients by the
  root of the number of parameters, so its regularisation is n / P times ours.

dattri is no light thing to install (see ``oracles`` in pyproject.toml), so its scores on these problems are on record
(tests/bank/make_oracles.py). Where it is installed they are asked for again and must be those on record.

Neither has a Gauss-Newton matrix of all parameters. That is checked on softmax regression, where it is the Hessian.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch.utils.data import DataLoader, TensorDataset

from distillens.attribution.influence import ConjugateGradient, ExactInfluence, GaussNewton, hessian
from distillens.attribution.similarity import GradientCosine, GradientDot, TracIn
from distillens.attribution.trained import Trained
from distillens.attribution.trak import Trak
from distillens.core.dataset import Dataset, Splits
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.mlp import MLP
from distillens.train import Training, train

KEY = Key(57, ("oracles",))
POINTS, TARGETS = 30, 12
DECAY, DAMPING = 1e-2, 0.3
RECIPE = Recipe(steps=20, lr=0.2, weight_decay=DECAY)
MOMENTS = (0, 5, 10, 20)
NETS = {"regression": (MLP(0), (64, 10)), "hidden": (MLP(1, 8), (64, 8, 10))}
BANK = Path(__file__).parents[1] / "bank" / "oracles.safetensors"


@dataclass(frozen=True, eq=False)
class Case:
    """A trained network as ours and as a module of torch, with its points and the images that it is asked about."""

    name: str
    model: Trained
    others: Dataset
    module: torch.nn.Module

    def state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parameters under the module's names."""
        return {
            name.removeprefix("layer"): value.clone()
            for name, value in self.model.shapes.unflatten(flat).items()
        }

    @property
    def points(self) -> TensorDataset:
        return TensorDataset(self.model.data.images, self.model.data.labels.hard())

    @property
    def targets(self) -> TensorDataset:
        return TensorDataset(self.others.images.double(), self.others.labels.hard())

    def centred(self, scores: torch.Tensor) -> torch.Tensor:
        """A library's scores [points, m] as those of a weight in the mean loss."""
        scores = scores.double()
        return (scores - scores.mean(0)) / len(scores)


class Layers(torch.nn.Module):
    """The same network in torch's own layers, by the numbers of ours."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.depth = len(sizes) - 1
        for i, (a, b) in enumerate(pairwise(sizes)):
            self.add_module(str(i), torch.nn.Linear(a, b))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for i in range(self.depth):
            x = self.get_submodule(str(i))(x.relu() if i else x)
        return x


def case(digits: Splits, name: str) -> Case:
    net, sizes = NETS[name]
    few = [members[: POINTS // 10] for members in digits.train.by_class]
    data = digits.train.take(torch.cat(few))
    others = digits.test.take(torch.arange(TARGETS))
    training = Training(data, net, RECIPE, (KEY,), snapshots=MOMENTS)
    population = train(training, Plan("loop", 1, precision="float64"))
    model = Trained.of(population, 0, data, torch.arange(POINTS), RECIPE)
    found = Case(name, model, others, Layers(sizes))
    found.module.load_state_dict(found.state(model.final))
    return found


@pytest.fixture(scope="module")
def regression(digits: Splits) -> Case:
    return case(digits, "regression")


@pytest.fixture(scope="module")
def hidden(digits: Splits) -> Case:
    return case(digits, "hidden")


@pytest.fixture(params=["regression", "hidden"])
def either(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


def optional(name: str) -> ModuleType:
    """A library that need not be there; what it warns of when it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: ModuleType = pytest.importorskip(name)
    return found


def by_captum(
    one: Case, kind: str, folder: Path, weights: dict[int, float] | None = None, **options: Any
) -> Any:
    """Scores [points, m] by a class of captum, at the end or summed over snapshots with their weights."""
    if kind == "TracInCP":
        make = optional("captum.influence").TracInCP
    else:
        make = getattr(optional("captum.influence._core.influence_function"), kind)
    states = {MOMENTS[-1]: one.model.final} | dict(zip(MOMENTS, one.model.snapshots, strict=True))
    weights = weights or {MOMENTS[-1]: 1.0}
    paths = {str(folder / f"{moment}.pt"): moment for moment in weights}
    for path, moment in paths.items():
        torch.save(one.state(states[moment]), path)

    def load(module: torch.nn.Module, path: str) -> float:
        module.load_state_dict(torch.load(path))
        return weights[paths[path]]

    checkpoints: Any = list(paths) if kind == "TracInCP" else next(iter(paths))
    loss = torch.nn.CrossEntropyLoss(reduction="none")
    # A copy: captum leaves the last checkpoint that it looked at in the module.
    asked = make(
        deepcopy(one.module), one.points, checkpoints, load, loss_fn=loss, batch_size=POINTS, **options
    )
    return asked.influence(one.targets.tensors).T


def loader(data: TensorDataset) -> Any:
    return DataLoader(data, batch_size=len(data), shuffle=False)


def together(function: Callable[..., torch.Tensor], module: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """A function of logits and labels as dattri calls it: with a batch, and with one image without the batch's axis."""

    def called(params: dict[str, torch.Tensor], pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = pair
        if x.ndim == 3:
            x, y = x[None], y[None]
        return function(torch.func.functional_call(module, params, (x,)), y)

    return called


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    own = logits.gather(1, labels[:, None])[:, 0]
    label = torch.arange(logits.shape[1]) == labels[:, None]
    return (own - logits.masked_fill(label, -torch.inf).logsumexp(1)).mean()


def certainty(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.softmax(1).gather(1, labels[:, None])[:, 0].mean()


def task(one: Case, loss: Any = None, target: Any = None, moments: tuple[int, ...] = MOMENTS[-1:]) -> Any:
    states = dict(zip(MOMENTS, one.model.snapshots, strict=True))
    loss = together(loss or torch.nn.functional.cross_entropy, one.module)
    return optional("dattri.task").AttributionTask(
        loss_func=loss,
        model=one.module,
        checkpoints=[one.state(states[moment]) for moment in moments],
        target_func=together(target, one.module) if target else loss,
    )


def products(
    one: Case, first: TensorDataset, second: TensorDataset, weights: dict[int, float] | None = None
) -> Any:
    """Products of gradients [first, second] by dattri, at the end or summed over snapshots."""
    weights = weights or {MOMENTS[-1]: 1.0}
    asked = optional("dattri.algorithm.tracin").TracInAttributor(
        task(one, moments=tuple(weights)),
        torch.tensor(list(weights.values())),
        normalized_grad=False,
        projector_kwargs={"proj_type": "identity"},
    )
    return asked.attribute(loader(first), loader(second)).double()


def along() -> dict[int, float]:
    """What a snapshot counts in TracIn: the rates until the next one, ten times for the momentum of 0.9."""
    return {t: 10 * sum(RECIPE.rate(step) for step in range(t, until)) for t, until in pairwise(MOMENTS)}


def influence(one: Case, kind: str, **options: Any) -> Any:
    """Influence functions by a class of dattri."""
    attributor = getattr(optional("dattri.algorithm.influence_function"), kind)
    asked = attributor(task(one), regularization=DECAY + DAMPING, **options)
    asked.cache(loader(one.points))
    return asked.attribute(loader(one.points), loader(one.targets))


def trak(one: Case, loss: Any, target: Any = margin) -> Any:
    ridge = POINTS * DAMPING / one.model.shapes.size
    asked = optional("dattri.algorithm.trak").TRAKAttributor(
        task(one, loss, target),
        together(certainty, one.module),
        projector_kwargs={"proj_type": "identity"},
        regularization=ridge,
    )
    asked.cache(loader(one.points))
    return asked.attribute(loader(one.targets)).detach().double()


LOSS = torch.nn.functional.cross_entropy
ASKED: dict[str, Callable[[Case], torch.Tensor]] = {
    "influence": lambda one: influence(one, "IFAttributorExplicit"),
    "conjugate gradients": lambda one: influence(one, "IFAttributorCG", max_iter=40),
    "products at the end": lambda one: products(one, one.points, one.targets),
    "products along the way": lambda one: products(one, one.points, one.targets, along()),
    "products among points": lambda one: products(one, one.points, one.points),
    "products among targets": lambda one: products(one, one.targets, one.targets),
    "trak of margins": lambda one: trak(one, margin),
    "trak of loss and margin": lambda one: trak(one, LOSS),
    "trak of losses": lambda one: trak(one, LOSS, LOSS),
}


def by_dattri(one: Case, what: str) -> torch.Tensor:
    """What dattri says, [points, m]: on record, and the same again where it is installed."""
    recorded = read_tensors(BANK)[0][f"{one.name}: {what}"].double()
    if find_spec("dattri") is None:
        return recorded
    found = ASKED[what](one).detach().double()
    torch.testing.assert_close(found, recorded, rtol=1e-4, atol=1e-6 * float(recorded.abs().max()))
    return found


def test_the_problems_have_a_damped_hessian_that_can_be_inverted(either: Case) -> None:
    values = torch.linalg.eigvalsh(hessian(either.model)) + DAMPING
    assert float(values.min()) > 0.05
    spread = either.model.point_gradients().norm(dim=1)
    assert float(spread.min()) > 1e-4


def test_exact_influence_agrees_with_captum(either: Case, tmp_path: Path) -> None:
    size = either.model.shapes.size
    theirs = by_captum(
        either,
        "NaiveInfluenceFunction",
        tmp_path,
        projection_dim=size,
        hessian_reg=POINTS * (DECAY + DAMPING),
    )
    ours = ExactInfluence((DAMPING,))(either.model, either.others)[0]
    # By the summed Hessian: 1 / n is in the scores already. To the float32 in which the damping is added.
    torch.testing.assert_close(ours, POINTS * either.centred(theirs), rtol=1e-5, atol=1e-9)


def test_exact_influence_agrees_with_dattri(either: Case) -> None:
    theirs = either.centred(by_dattri(either, "influence"))
    ours = ExactInfluence((DAMPING,))(either.model, either.others)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(ours.abs().max()))


@pytest.mark.parametrize(
    "estimator", [GaussNewton((DECAY + DAMPING,)), ConjugateGradient((DECAY + DAMPING,), tolerance=1e-10)]
)
def test_gauss_newton_agrees_where_it_is_the_hessian(
    regression: Case, estimator: GaussNewton | ConjugateGradient, tmp_path: Path
) -> None:
    theirs = by_captum(
        regression,
        "NaiveInfluenceFunction",
        tmp_path,
        projection_dim=regression.model.shapes.size,
        hessian_reg=POINTS * (DECAY + DAMPING),
    )
    ours = estimator(regression.model, regression.others)[0]
    torch.testing.assert_close(ours, POINTS * regression.centred(theirs), rtol=1e-5, atol=1e-9)


def test_conjugate_gradients_agree_with_dattri(regression: Case) -> None:
    theirs = regression.centred(by_dattri(regression, "conjugate gradients"))
    ours = ConjugateGradient((DECAY + DAMPING,), tolerance=1e-10)(regression.model, regression.others)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(ours.abs().max()))


def test_products_of_gradients_agree_with_captum(either: Case, tmp_path: Path) -> None:
    last = either.centred(by_captum(either, "TracInCP", tmp_path))
    torch.testing.assert_close(GradientDot()(either.model, either.others)[0], last, rtol=1e-8, atol=1e-12)
    way = either.centred(by_captum(either, "TracInCP", tmp_path, along()))
    torch.testing.assert_close(TracIn()(either.model, either.others)[0], way, rtol=1e-8, atol=1e-12)


def test_products_of_gradients_agree_with_dattri(either: Case) -> None:
    last = either.centred(by_dattri(either, "products at the end"))
    ours = GradientDot()(either.model, either.others)[0]
    torch.testing.assert_close(ours, last, rtol=1e-4, atol=1e-6 * float(ours.abs().max()))
    way = either.centred(by_dattri(either, "products along the way"))
    ours = TracIn()(either.model, either.others)[0]
    torch.testing.assert_close(ours, way, rtol=1e-4, atol=1e-6 * float(ours.abs().max()))


def test_cosines_follow_from_the_products_of_dattri(either: Case) -> None:
    scores, among, own = (
        by_dattri(either, f"products {which}") for which in ("at the end", "among points", "among targets")
    )
    # Lengths of the gradients less their mean, from the products among the points.
    centre = among - among.mean(0) - among.mean(1, keepdim=True) + among.mean()
    theirs = (scores - scores.mean(0)) / (centre.diagonal()[:, None] * own.diagonal()).sqrt()
    torch.testing.assert_close(GradientCosine()(either.model, either.others)[0], theirs, rtol=0, atol=1e-5)


def test_trak_agrees_with_dattri_given_margins_on_both_sides(either: Case) -> None:
    ours = Trak((DAMPING,))(either.model, either.others)[0]
    logits = either.module(either.others.images.double()).detach()
    doubt = 1 - logits.softmax(1).gather(1, either.others.labels.hard()[:, None])[:, 0]
    # Ours is of the loss, -(1 - p) times the margin, and of leaving out: two signs, one more factor.
    torch.testing.assert_close(
        ours, by_dattri(either, "trak of margins") * doubt, rtol=1e-4, atol=1e-6 * float(ours.abs().max())
    )


def test_dattri_turns_the_sign_of_trak_round_given_the_loss(either: Case) -> None:
    ours = Trak((DAMPING,))(either.model, either.others)[0]

    def agreement(theirs: torch.Tensor) -> float:
        return sum(spearmanr(ours[:, i], theirs[:, i]).statistic for i in range(TARGETS)) / TARGETS

    assert agreement(by_dattri(either, "trak of loss and margin")) < -0.2
    assert agreement(by_dattri(either, "trak of losses")) > 0.2

"""Estimators of influence beside retraining: which of them can be trusted on distilled data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from distillens.analyses.pointwise._jackknife import pseudo_values
from distillens.analyses.pointwise._retrained import chosen, moved_losses, without, without_each
from distillens.attribution.influence import ConjugateGradient, ExactInfluence, GaussNewton
from distillens.attribution.similarity import GradientCosine, GradientDot, TracIn
from distillens.attribution.trained import Trained
from distillens.attribution.trak import Trak
from distillens.attribution.unrolled import Unrolled
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, unknown
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.ranks import rank_correlation
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Population, Training, on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ESTIMATORS: dict[str, Any] = {
    "exact": ExactInfluence(),
    "gauss_newton": GaussNewton(),
    "last_layer": GaussNewton(layers="last"),
    "conjugate_gradient": ConjugateGradient(),
    "unrolled": Unrolled(),
    "tracin": TracIn(),
    "trak": Trak(),
    "gradient_dot": GradientDot(),
    "gradient_cosine": GradientCosine(),
}
# Conjugate gradients have the matrix of gauss_newton: they are for networks whose derivatives do not fit into memory.
USUAL = tuple(name for name in ESTIMATORS if name != "conjugate_gradient")
FOLLOWED = 1 << 20  # derivatives of images that unrolling may take: points x images x steps
MOMENTS = 10  # at which TracIn looks
BLOCKS = 8  # of subsets, for the error
TRUSTED = 0.3  # the score from which an order is worth acting on
SUBSETS_UNIT = "block of subsets or initialisation"


@dataclass(frozen=True)
class Estimators:
    """Scores of several estimators against two truths: leave-one-out, and networks trained on random halves of the points.

    *Leave-one-out* is averaged over initialisations; the score is the rank correlation over points, averaged over real
    images. The *linear datamodelling score* adds up the scores of the points in a subset and asks how well that orders
    ``subsets`` random halves by the loss that networks trained on them have on an image: rank correlation over subsets, averaged
    over images. Single leave-one-out effects are mostly noise, so the second is the one to judge by.

    Every estimator is averaged over the same initialisations. What is damped is damped by the amount that scores best on
    the first half of the subsets and on *validation* images; all figures are of the other half and of test images.
    A truth has a *ceiling*: what a perfect estimator could score, from how far initialisations agree, with its own interval.

    Replicate 0 of each set is taken, with the random real subset. ``images`` are random test images, ``only`` the
    sets to ask about (all where empty), ``estimators`` those to try.

    Source: Park et al. 2023 for the linear datamodelling score; Bae et al. 2024 for unrolling.
    """

    question: ClassVar[str] = "Which estimator of influence agrees with retraining on this data?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "inits", "subsets")

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=300)
    inits: int = 3
    subsets: int = 64
    images: int = 500
    estimators: tuple[str, ...] = USUAL
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, "estimators", inits=self.inits, images=self.images, estimators=len(self.estimators))
        at_least(2 * BLOCKS, "estimators", subsets=self.subsets)
        for name in self.estimators:
            if name not in ESTIMATORS:
                raise unknown("estimator", name, ESTIMATORS)

    @classmethod
    def defaults(cls, like: Dataset) -> Estimators:
        """The training of leave-one-out, with the field's network for such images."""
        return cls(ConvNet.defaults(like))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """For each set the leave-one-out networks, those of the subsets, and those that the estimators see."""
        return [t for one in self._chosen(sets).values() for t in self._training(one, key)]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> EstimatorsResult:
        """The scores."""
        sets.check_against(real)
        runs.make(self.trainings(sets, real, key=key))
        test = _some(real.test, self.images, key.fold("test images"))
        val = _some(real.val, self.images, key.fold("val images"))
        found: dict[str, SetScores] = {}
        for name, one in self._chosen(sets).items():
            trainings = self._training(one, key)
            single, halves, seen = runs.get(*trainings)
            members = self._members(one, key)
            loss_test, loss_val = (
                halves.losses(data).view(self.inits, len(members), -1) for data in (test, val)
            )
            found[name] = self._scores(
                one,
                seen,
                Truth(members, loss_val, loss_test, moved_losses(single, self.inits, test)),
                test,
                val,
            )
            for truth, training in zip(("loo", "lds"), trainings, strict=False):
                found[name].retraining[truth] = training.image_steps // self.inits
        return EstimatorsResult(
            tuple(name for name in sets.distilled if name in found),
            {name: scores.lds for name, scores in found.items()},
            {name: scores.loo for name, scores in found.items()},
            {name: scores.ceilings for name, scores in found.items()},
            {name: scores.passes for name, scores in found.items()},
            {name: scores.damping for name, scores in found.items()},
            {name: scores.curves for name, scores in found.items()},
            {name: scores.best for name, scores in found.items()},
            {name: scores.left_out for name, scores in found.items()},
            {name: scores.retraining for name, scores in found.items()},
            len(test),
        )

    def _chosen(self, sets: Sets) -> dict[str, DistilledDataset]:
        return chosen(sets, self.only, "estimators")

    def _members(self, one: DistilledDataset, key: Key) -> torch.Tensor:
        """Which points each random half holds, [subsets, P]; no half twice, so fewer of a set of few points."""
        points = len(one)
        there_are = math.comb(points, points // 2)
        if there_are < 2 * BLOCKS:
            raise UserError(
                "estimators: the set has too few points to tell subsets apart",
                got=f"{points} points, {there_are} halves",
                expected=f"{2 * BLOCKS} halves or more (6 points)",
            )
        halves: dict[tuple[int, ...], None] = {}  # in the order drawn
        draw = 0
        while len(halves) < min(self.subsets, there_are):
            half = key.fold("subset", draw).permutation(points)[: points // 2]
            halves[tuple(half.sort().values.tolist())] = None
            draw += 1
        members = torch.zeros(len(halves), points)
        for row, half_points in zip(members, halves, strict=True):
            row[list(half_points)] = 1
        return members

    def _training(self, one: DistilledDataset, key: Key) -> list[Training]:
        asked = self.net, self.recipe, self.inits, key
        left_out = [(row == 0).nonzero().flatten().tolist() for row in self._members(one, key)]
        inits = tuple(key.fold("init", s) for s in range(self.inits))
        seen = on(one, self.net, self.recipe.but(batch=None), inits)
        moments = {round(seen.steps * i / MOMENTS) for i in range(MOMENTS + 1)}
        return [
            without_each(one, *asked),
            without(one, left_out, *asked),
            replace(seen, snapshots=tuple(sorted(moments))),
        ]

    def _scores(
        self, one: DistilledDataset, seen: Population, truth: Truth, test: Dataset, val: Dataset
    ) -> SetScores:
        origin = one.decode.origin(one.stored)
        data, recipe = one.dataset(), self.recipe.but(batch=None)
        models = [Trained.of(seen, s, data, origin, recipe) for s in range(self.inits)]
        first, second = torch.arange(len(truth.members)).tensor_split(2)
        found = SetScores(truth.ceilings(second))
        everything = test.joined(val)
        for name in self.estimators:
            estimator = ESTIMATORS[name]
            reason = _out_of_reach(name, one, self.recipe)
            if reason:
                found.left_out[name] = reason
                continue
            try:  # [inits, dampings, P, n]
                scores = torch.stack([estimator(model, everything) for model in models])
            except UserError as error:
                found.left_out[name] = str(error).splitlines()[0]
                continue
            own, trial = scores[..., : len(test)], scores[..., len(test) :].mean(0)
            curve = [truth.lds(each, first, truth.val) for each in trial]
            best = max(range(len(curve)), key=curve.__getitem__)
            if estimator.damped:
                found.curves[name] = torch.tensor(list(zip(estimator.dampings, curve, strict=True)))
                found.damping[name] = f"{estimator.dampings[best]:g}"
            found.first[name] = curve[best]
            found.passes[name] = estimator.passes(models[0], len(everything))
            found.lds[name] = truth.lds_estimate(own[:, best], second)
            found.loo[name] = truth.loo_estimate(own[:, best])
        return found


def _some(data: Dataset, count: int, key: Key) -> Dataset:
    return data if len(data) <= count else data.take(key.permutation(len(data))[:count].sort().values)


def _out_of_reach(name: str, one: DistilledDataset, recipe: Recipe) -> str:
    """Why an estimator is not tried on a set; nothing where it is."""
    if one.order is not None and name in ("unrolled", "tracin"):
        return "its training is a list of ordered steps"
    images = len(one.decode.origin(one.stored))
    work = len(one) * images * recipe.steps
    if name == "unrolled" and work > FOLLOWED:
        return (
            f"it would take {work:,} products with single images' Hessians (at most {FOLLOWED:,} are taken)"
        )
    return ""


@dataclass(frozen=True, eq=False)
class Truth:
    """What retraining says: which points each subset holds [M, P], losses on validation and test images [inits, M, n].

    ``single`` [inits, P, n] is leave-one-out on the test images.
    """

    members: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor
    single: torch.Tensor

    def lds(self, scores: torch.Tensor, subsets: torch.Tensor, losses: torch.Tensor) -> float:
        """The linear datamodelling score of scores [P, n] on some of the subsets."""
        predicted = self.members[subsets].to(scores) @ scores  # [M', n]
        actual = -losses[:, subsets].mean(0)
        return float(rank_correlation(predicted.T, actual.T.to(scores)).mean())

    def lds_estimate(self, scores: torch.Tensor, subsets: torch.Tensor) -> Estimate:
        """The score of [inits, P, n] averaged over initialisations, its error over subsets and initialisations."""
        mean = scores.mean(0)
        parts = {
            "subsets": pseudo_values(lambda i: self.lds(mean, i, self.test), subsets.tensor_split(BLOCKS))
        }
        value = self.lds(mean, subsets, self.test)
        return self._crossed(value, parts, lambda s: self.lds(scores[s].mean(0), subsets, self.test[s]))

    def loo(self, scores: torch.Tensor, inits: torch.Tensor, images: torch.Tensor) -> float:
        """The rank correlation with leave-one-out over points, averaged over some images."""
        truth = self.single[inits].mean(0)[:, images]
        return float(rank_correlation(scores[inits].mean(0)[:, images].T, truth.T).mean())

    def loo_estimate(self, scores: torch.Tensor) -> Estimate:
        """The agreement of [inits, P, n] with leave-one-out, its error over images and initialisations."""
        inits, images = torch.arange(len(scores)), torch.arange(scores.shape[2])
        parts = {
            "images": pseudo_values(
                lambda i: self.loo(scores, inits, i), images.tensor_split(min(BLOCKS, len(images)))
            )
        }
        value = self.loo(scores, inits, images)
        return self._crossed(value, parts, lambda s: self.loo(scores, s, images))

    def _crossed(
        self, value: float, parts: dict[str, list[float]], of_inits: Callable[[torch.Tensor], float]
    ) -> Estimate:
        inits = torch.arange(len(self.single))
        if len(inits) > 1:
            parts["inits"] = pseudo_values(of_inits, inits.tensor_split(len(inits)))
        return Estimate.components(value, parts, SUBSETS_UNIT)

    def ceilings(self, subsets: torch.Tensor) -> dict[str, Estimate]:
        """What a perfect estimator could score against each truth; nothing with a single initialisation.

        The interval is that of how far two initialisations agree, over blocks of images or subsets and over initialisations,
        at its ends. Of two initialisations there is one agreement, and no interval.
        """
        inits, images = torch.arange(len(self.single)), torch.arange(self.single.shape[2])
        if len(inits) < 2:
            return {}
        return {
            "loo": self._ceiling(
                lambda s, i: agreement(self.single[s][:, :, i].transpose(1, 2)),
                images.tensor_split(min(BLOCKS, len(images))),
            ),
            "lds": self._ceiling(
                lambda s, i: agreement(self.test[s][:, i].transpose(1, 2)), subsets.tensor_split(BLOCKS)
            ),
        }

    def _ceiling(
        self, agree: Callable[[torch.Tensor, torch.Tensor], float], blocks: Sequence[torch.Tensor]
    ) -> Estimate:
        inits, items = torch.arange(len(self.single)), torch.cat(list(blocks))
        value = agree(inits, items)
        parts = {"blocks": pseudo_values(lambda i: agree(inits, i), blocks)}
        # Without one of two initialisations nothing is left to agree: one value, of which nothing is known.
        parts["inits"] = (
            pseudo_values(lambda s: agree(s, items), inits.tensor_split(len(inits)))
            if len(inits) > 2
            else [value]
        )
        found = Estimate.components(value, parts, SUBSETS_UNIT)
        low, high = (ceiling(x, len(inits)) if math.isfinite(x) else x for x in (found.low, found.high))
        return replace(found, value=ceiling(value, len(inits)), low=low, high=high)


def agreement(truths: torch.Tensor) -> float:
    """The mean rank correlation along the last axis of every two of the first, [inits, n, items]."""
    pairs = list(combinations(truths, 2))
    return sum(float(rank_correlation(a, b).mean()) for a, b in pairs) / len(pairs)


def ceiling(agreement: float, inits: int) -> float:
    """What can agree best with the mean of initialisations, from how far two of them agree.

    The mean of n has the reliability n r / (1 + (n - 1) r) (Spearman and Brown), and nothing agrees with it better than
    by the root of that.
    """
    r = min(max(agreement, 0.0), 1.0)
    return math.sqrt(inits * r / (1 + (inits - 1) * r))


@dataclass(eq=False)
class SetScores:
    """What was found for one set, by estimator."""

    ceilings: dict[str, Estimate]
    lds: dict[str, Estimate] = field(default_factory=dict)
    loo: dict[str, Estimate] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    damping: dict[str, str] = field(default_factory=dict)
    curves: dict[str, torch.Tensor] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    retraining: dict[str, int] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The estimator that scores best on the first half of the subsets; nothing where none could be tried."""
        return max(self.first, key=self.first.__getitem__, default="")


@dataclass(frozen=True, eq=False)
class EstimatorsResult(Result):
    """By set and estimator: both scores, passes of one image, the damping chosen and its curve [dampings, 2].

    ``retraining`` are the passes that each truth takes from one initialisation.
    """

    analysis: ClassVar[str] = "pointwise/estimators"
    title: ClassVar[str] = "Which estimator of influence can be trusted"
    question: ClassVar[str] = Estimators.question

    distilled: tuple[str, ...]
    lds: Mapping[str, Mapping[str, Estimate]]
    loo: Mapping[str, Mapping[str, Estimate]]
    ceilings: Mapping[str, Mapping[str, Estimate]]
    passes: Mapping[str, Mapping[str, int]]
    damping: Mapping[str, Mapping[str, str]]
    curves: Mapping[str, Mapping[str, torch.Tensor]]
    best: Mapping[str, str]
    left_out: Mapping[str, Mapping[str, str]]
    retraining: Mapping[str, Mapping[str, int]]
    images: int

    def headline(self) -> dict[str, Estimate]:
        """The score of the estimator that was chosen for each set."""
        return {f"{name}: {best}": self.lds[name][best] for name, best in self.best.items() if best}

    def claims(self) -> tuple[Claim, ...]:
        """The estimator chosen on half of the subsets orders the others far better than chance."""
        return tuple(
            Claim(
                "an estimator can be trusted",
                name,
                f"{self.best[name]} (chosen on other subsets) orders unseen subsets at a rank correlation above {TRUSTED:g}",
                self.lds[name][self.best[name]],
                "greater",
                TRUSTED,
                "scores shuffled over the points",
                "a convex network, where influence functions are exact to first order",
            )
            for name in self.distilled
            if self.best[name]
        )

    def tables(self) -> tuple[Table, ...]:
        """For each set its estimators, best first; the ceilings last."""
        return tuple(self._table(name) for name in self.lds)

    def _table(self, name: str) -> Table:
        lds = self.lds[name]
        rows: list[tuple[str | int | Estimate, ...]] = [
            (
                each + (" (chosen)" if each == self.best[name] else ""),
                lds[each],
                self.loo[name][each],
                self.damping[name].get(each, "none"),
                self.passes[name][each],
            )
            for each in sorted(lds, key=lambda each: -lds[each].value)
        ]
        ceilings, cost = self.ceilings[name], self.retraining[name]
        both = " and ".join(f"{cost[truth]:,}" for truth in ("lds", "loo"))
        rows.append(("ceiling", *(ceilings.get(truth, "unknown") for truth in ("lds", "loo")), "", both))
        columns = (
            "estimator",
            "linear datamodelling score",
            "agreement with leave-one-out",
            "damping",
            "passes of one image, a network",
        )
        return Table(f"{name}: estimators against retraining", columns, tuple(rows))

    def notes(self) -> tuple[str, ...]:
        """What the figures are of, and what was not tried."""
        notes = [
            f"Scores are of replicate 0 of each set, on {self.images} test images and on subsets that chose neither the damping "
            "nor the estimator. Estimators see the networks of the initialisations that the truths are averaged over. A pass is one "
            "image's derivative by all parameters; a product with its Hessian counts as two.",
            "The ceiling is what a perfect estimator could score: no truth agrees with anything better than with itself. Its interval "
            "covers images or subsets and initialisations, of which three are needed. Beside it stands what the two truths cost: the passes "
            "of retraining from one initialisation.",
        ]
        reasons: dict[tuple[str, str], list[str]] = {}
        for name, why in self.left_out.items():
            for each, reason in why.items():
                reasons.setdefault((each, reason), []).append(name)
        notes += [f"{each} was not tried on {', '.join(of)}: {why}." for (each, why), of in reasons.items()]
        return tuple(notes)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Scores, then how they depend on the damping."""
        return {
            "The linear datamodelling score of each estimator; the ceiling as a line, its interval at the right": self.plot,
            "The score of gauss_newton on the subsets and validation images that choose, by damping": self._plot_damping,
        }

    def plot(self, ax: Axes) -> None:
        """A dot with its interval for each estimator and set."""
        names = list(self.lds)
        kinds = [each for each in ESTIMATORS if any(each in self.lds[name] for name in names)]
        for i, name in enumerate(names):
            shift = (i - (len(names) - 1) / 2) * 0.14
            for x, each in enumerate(kinds):
                if each not in self.lds[name]:
                    continue
                e = self.lds[name][each]
                ax.plot([x + shift] * 2, [max(e.low, -1), min(e.high, 1)], color=colour(name), lw=1.2)
                ax.plot(x + shift, e.value, "o", color=colour(name), ms=5, label=name if not x else None)
            if "lds" in self.ceilings[name]:
                limit = self.ceilings[name]["lds"]
                ax.axhline(limit.value, color=colour(name), lw=0.8, ls=":")
                if math.isfinite(limit.low):
                    right = len(kinds) - 0.5 + i * 0.08
                    ax.plot([right] * 2, [limit.low, limit.high], color=colour(name), lw=1.2)
        ax.axhline(0, color="grey", lw=0.8)
        ax.set_xticks(range(len(kinds)), [each.replace("_", "\n") for each in kinds], fontsize=8)
        ax.set_ylabel("rank correlation over subsets")
        handles, labels = ax.get_legend_handles_labels()
        if handles:
            ax.legend(handles, labels, frameon=False, fontsize=8, ncols=min(3, len(labels)))
        ax.spines[["top", "right"]].set_visible(False)

    def _plot_damping(self, ax: Axes) -> None:
        for name, curves in self.curves.items():
            if "gauss_newton" in curves:
                dampings, scores = curves["gauss_newton"].T
                ax.plot(dampings, scores, "o-", ms=4, color=colour(name), label=name)
        ax.set_xscale("log")
        ax.set_xlabel("damping")
        ax.set_ylabel("linear datamodelling score")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)

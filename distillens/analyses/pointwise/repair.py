"""Mending the weakest points of a set, and an order of its points in which the first k are the best k."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from distillens.analyses.pointwise import _repair_figures, _repair_tables
from distillens.analyses.pointwise._coalitions import with_only
from distillens.analyses.pointwise._jackknife import pseudo_values
from distillens.analyses.pointwise._mending import Mending, members
from distillens.analyses.pointwise._orders import ORDERS, by_features, in_rounds
from distillens.analyses.pointwise._repair_estimates import INIT, area, beyond
from distillens.analyses.pointwise._repair_relabel import relabelled
from distillens.analyses.pointwise._retrained import chosen, moved_losses, without_each
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, one_of, positive
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.decode import Pixels
from distillens.core.ranks import rank_correlation
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table, paired, weaker
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training, on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POLICIES = ("drop", "relabel", "replace", "reoptimise")
DOING = {
    "drop": "dropping",
    "relabel": "relabelling",
    "replace": "replacing",
    "reoptimise": "re-optimising",
}
POINT = "distilled point"
Asked = dict[tuple[int, ...], int]  # each coalition that is trained, and its place


@dataclass(frozen=True)
class Repair:
    """What a set gains where its weakest points are mended, and how good its first k points are.

    A point is weak where leaving it out lowers the *validation* loss most (or raises it least), in the mean over ``inits``
    initialisations. Of each set ``share`` of the points, the weakest (at least one), are repaired together:

    - *drop*: they are left out;
    - *relabel*: each is given the mean probability that networks trained without it predict. Soft, because a hard class says nothing
      where they agree with the label, and throws their doubt away where a point is ambiguous. Of a set of regression targets:
      the mean output; hard labels become probabilities;
    - *replace*: each gives its place, and its label, to the training image of its class whose gradient points most along the
      validation gradient, at the networks trained without it (influence to first order; of up to ``donors`` random images a class);
    - *reoptimise*: ``pixel_steps`` steps of Adam on their pixels only, which bring the gradient of the whole set nearer to that of the
      real training images at ``moments`` moments of trainings on the set. Adam's rate is ``pixel_step`` of the spread of real pixels.

    What is reported is the accuracy on the *test* split of networks from ``fresh`` initialisations, which chose nothing. The same repair is done to
    ``draws`` random groups of as many other points: that of the weakest has to gain more.

    *Order.* Points are added one by one, each the one that lowers the validation error of a ridge regression most: on the features
    of networks trained on the whole set. Every class comes once before any twice, in random orders too, so that no order wins by
    balance alone. Networks are trained on the first ``kept`` of each order (shares of the points), beside the order by leave-one-out influence
    and ``draws`` random ones.

    Replicate 0 of each set is taken, with the random real subset; ``only`` keeps the named sets (all where empty). It is
    not in the paper.

    Source: Koh & Liang 2017 (mending by influence); Pruthi et al. 2020 (products of gradients along the way); Zhao et al. 2021 (matching
    gradients).
    """

    question: ClassVar[str] = "What does mending its weakest images bring, and which images to keep first?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "inits", "fresh", "draws")
    adaptive: ClassVar[bool] = True

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=300)
    inits: int = 3
    share: float = 0.1
    policies: tuple[str, ...] = POLICIES
    fresh: int = 4
    draws: int = 5
    kept: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7)
    donors: int = 200
    images: int = 2000
    moments: int = 6
    pixel_steps: int = 20
    pixel_step: float = 0.05
    ridge: float = 0.1
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name)
            for name in ("inits", "fresh", "draws", "donors", "images", "moments", "pixel_steps")
        }
        at_least(1, "repair", **counts)
        positive("repair", share=self.share, pixel_step=self.pixel_step, ridge=self.ridge)
        for policy in self.policies:
            one_of("repair", policy, POLICIES)
        if len(set(self.policies)) < len(self.policies):
            raise UserError("repair: a policy is named twice", got=", ".join(self.policies))
        if self.share > 0.5:
            raise UserError("repair: the weakest are at most half of the points", got=f"share {self.share:g}")
        if not self.kept or not all(0 < x < 1 for x in self.kept):
            raise UserError(
                "repair: kept are shares of the points",
                got=", ".join(f"{x:g}" for x in self.kept) or "none",
                expected="numbers above 0 and below 1",
            )

    @classmethod
    def defaults(cls, like: Dataset) -> Repair:
        """The training of leave-one-out."""
        return cls(ConvNet.defaults(like))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The most that is trained: what is decided on the way is stood in for by the set itself, with keys of its own."""
        found = []
        for one in self._chosen(sets).values():
            found.append(self._each(one, key))
            found += [self._way(one, key)] if "reoptimise" in self.policies else []
            known: Asked = {_all(one): 0}
            for order in self._random_orders(one, key):
                self._add_order(known, one, order)
            found.append(self._subsets(one, known, key))
            for s in range(len(ORDERS)):
                stand_in: Asked = {}
                self._add_order(stand_in, one, torch.arange(len(one)))
                found.append(self._subsets(one, stand_in, key.fold("stand in", s)))
            rest = {_rest(one, range(self._count(one))): 0}
            for policy in self.policies:
                places = [key.fold("stand in", policy, d) for d in range(1 + self.draws)]
                if policy == "drop":
                    found += [self._subsets(one, rest, place) for place in places]
                else:
                    found += [self._mended(one, [one.dataset()], place)[0] for place in places]
        return found

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> RepairResult:
        """The repairs and the orders."""
        sets.check_against(real)
        found: dict[str, dict[str, Any]] = {}
        for name, one in self._chosen(sets).items():
            found[name] = self._looked_at(one, real, runs, key)
        return RepairResult(
            distilled=tuple(name for name in sets.distilled if name in found),
            classes=real.test.classes,
            policies=self.policies,
            **{part: {name: one[part] for name, one in found.items()} for part in next(iter(found.values()))},
        )

    def _chosen(self, sets: Sets) -> dict[str, DistilledDataset]:
        found = chosen(sets, self.only, "repair")
        for name, one in found.items():
            if one.labels.kind == "teacher":
                raise UserError(
                    f"repair: {name} is labelled by a teacher, view by view: a mended point would have no label",
                    fix="name other sets with only",
                )
        return found

    def _count(self, one: DistilledDataset) -> int:
        """How many points are repaired."""
        return min(max(1, round(self.share * len(one))), len(one) // 2)

    def _fresh(self, key: Key) -> tuple[Key, ...]:
        """The networks that measure: none of them chose anything."""
        return key.fold("repair", "fresh").split(self.fresh)

    def _draws(self, one: DistilledDataset, weak: tuple[int, ...], key: Key) -> list[tuple[int, ...]]:
        """Random groups of as many other points; no two share a point while there are points enough.

        Were the weak ones random too, all groups would be alike: none knows which was called weak.
        """
        others = torch.tensor(_rest(one, weak))
        a_pass = len(others) // len(weak)
        found = []
        for d in range(self.draws):
            order = key.fold("repair", "draw", d // a_pass).permutation(len(others))
            found.append(tuple(others[order][(d % a_pass) * len(weak) :][: len(weak)].tolist()))
        return found

    def _random_orders(self, one: DistilledDataset, key: Key) -> list[torch.Tensor]:
        classes = one.labels.hard().cpu()
        return [
            in_rounds(key.fold("repair", "order", d).uniform(len(one)), classes) for d in range(self.draws)
        ]

    def _sizes(self, one: DistilledDataset) -> list[int]:
        """How many points are kept."""
        return sorted({min(len(one) - 1, max(1, round(x * len(one)))) for x in self.kept})

    def _add_order(self, asked: Asked, one: DistilledDataset, order: torch.Tensor) -> list[int]:
        return [_add(asked, tuple(sorted(order[:size].tolist()))) for size in self._sizes(one)]

    # What is trained

    def _each(self, one: DistilledDataset, key: Key) -> Training:
        return without_each(one, self.net, self.recipe, self.inits, key)

    def _way(self, one: DistilledDataset, key: Key) -> Training:
        """Networks on the whole set with parameters kept along the way; those of leave-one-out keep their last alone."""
        keys = key.fold("repair", "way").split(self.inits)
        training = on(one, self.net, self.recipe.but(batch=None), keys)
        steps = training.steps
        last = max(1, self.moments - 1)
        return replace(
            training, snapshots=tuple(sorted({round(steps * i / last) for i in range(self.moments)}))
        )

    def _mended(self, one: DistilledDataset, sets: Sequence[Dataset], key: Key) -> list[Training]:
        """The measuring networks on each mended set: side by side as one training [sets, fresh], of ordered steps a training each."""
        keys = self._fresh(key)
        training = on(one, self.net, self.recipe.but(batch=None), keys)
        if one.order is not None:
            return [replace(training, data=data) for data in sets]
        # A few networks on a few images are trained a third as fast as a full stack of them.
        joined = sets[0].joined(*sets[1:])
        blocks = torch.arange(len(joined)).view(len(sets), -1)
        subsets = tuple(block for block in blocks for _ in keys)
        return [replace(training, data=joined, keys=keys * len(sets), subsets=subsets)]

    def _subsets(self, one: DistilledDataset, asked: Asked, key: Key) -> Training:
        """The measuring networks on some points alone, for each coalition [coalitions, fresh]."""
        keys = self._fresh(key)
        coalitions = [torch.tensor(points) for points in asked for _ in keys]
        return with_only(one, coalitions, self.net, self.recipe, keys * len(asked))

    # What is looked at

    def _looked_at(self, one: DistilledDataset, real: Splits, runs: Runs, key: Key) -> dict[str, Any]:
        (each,) = runs.get(self._each(one, key))
        helped = moved_losses(each, self.inits, real.val).mean(2).cpu()
        order = helped.mean(0).argsort(stable=True)
        weak = tuple(order[: self._count(one)].tolist())
        groups = [weak, *self._draws(one, weak, key)]
        hard = one.labels.hard().cpu()

        untouched = each.taken(torch.arange(self.inits) * (1 + len(one)))
        orders = [by_features(one, untouched, real.val, self.ridge), in_rounds(helped.mean(0), hard)]
        asked: Asked = {_all(one): 0}
        dropped = [_add(asked, _rest(one, group)) for group in groups] if "drop" in self.policies else []
        curves = [self._add_order(asked, one, o) for o in [*orders, *self._random_orders(one, key)]]

        mend = Mending(self, one, real, each, key)
        mended = {p: mend(p, groups, runs, self._way(one, key)) for p in self.policies if p != "drop"}
        wanted = {p: self._mended(one, many, key) for p, many in mended.items()}
        parts, *others = runs.get(
            self._subsets(one, asked, key), *(t for many in wanted.values() for t in many)
        )
        small = parts.accuracy(real.test).view(len(asked), self.fresh).cpu()
        accuracies = {"drop": small[dropped]}
        for p, many in wanted.items():
            measured = [others.pop(0).accuracy(real.test).cpu() for _ in many]
            accuracies[p] = torch.cat(measured).view(-1, self.fresh)

        rows = members(mend.origin, weak)
        same = mend.data
        shown = [same, *(mended[p][0] for p in ("replace", "reoptimise") if p in mended)]
        return {
            "labels": hard,
            "helped": helped,
            "weak": torch.tensor(weak),
            "said": mend.said[list(weak)].cpu(),
            "untouched": small[asked[_all(one)]],
            "repaired": torch.stack([accuracies[p] for p in self.policies])
            if self.policies
            else torch.empty(0, 1 + self.draws, self.fresh, dtype=torch.float64),
            "sizes": tuple(self._sizes(one)),
            "orders": torch.stack(orders),
            "curves": torch.stack([small[places] for places in curves]),
            "rows": rows.cpu(),
            "mended": {p: mended[p][0].images[rows].cpu() for p in ("replace", "reoptimise") if p in mended},
            "pictures": torch.stack([same.space.to_pixels(d.images[rows]).cpu() for d in shown]),
        }


def _add(asked: Asked, points: tuple[int, ...]) -> int:
    """The place of a coalition, with a new one where it was not asked for yet: none is trained twice."""
    return asked.setdefault(points, len(asked))


def _all(one: DistilledDataset) -> tuple[int, ...]:
    """All points."""
    return _rest(one, ())


def _rest(one: DistilledDataset, group: Sequence[int]) -> tuple[int, ...]:
    """All points but a group."""
    return tuple(j for j in range(len(one)) if j not in group)


@dataclass(frozen=True, eq=False)
class RepairResult(Result):
    """By set: which points are weak, test accuracies [policies, 1 + draws, fresh] with them mended, and along orders.

    ``helped`` [inits, P] is the rise of validation loss without each point, ``weak`` [w] the weakest first, ``said`` [w, k] what networks
    trained without them predict. The first of the draws are the weakest; ``untouched`` [fresh] is the set as it is. ``orders``
    [2, P] begin with what to keep; ``curves`` [2 + draws, sizes, fresh] has the random ones too. ``mended`` holds the images of ``rows`` that
    stand where the weak points' were, in the set's units, ``pictures`` what they were and are, as pixels.
    """

    analysis: ClassVar[str] = "pointwise/repair"
    title: ClassVar[str] = "Repair of the weakest points, and which to keep first"
    question: ClassVar[str] = Repair.question

    distilled: tuple[str, ...]
    classes: tuple[str, ...]
    policies: tuple[str, ...]
    labels: Mapping[str, torch.Tensor]
    helped: Mapping[str, torch.Tensor]
    weak: Mapping[str, torch.Tensor]
    said: Mapping[str, torch.Tensor]
    untouched: Mapping[str, torch.Tensor]
    repaired: Mapping[str, torch.Tensor]
    sizes: Mapping[str, tuple[int, ...]]
    orders: Mapping[str, torch.Tensor]
    curves: Mapping[str, torch.Tensor]
    rows: Mapping[str, torch.Tensor]
    mended: Mapping[str, Mapping[str, torch.Tensor]]
    pictures: Mapping[str, torch.Tensor]

    def gain(self, name: str, policy: str) -> Estimate:
        """What the repair of the weakest brings over the untouched set, in pairs over fresh initialisations."""
        mended = self.repaired[name][self.policies.index(policy), 0]
        return paired(mended.tolist(), self.untouched[name].tolist(), INIT)

    def beyond_random(self, name: str, policy: str) -> Estimate:
        """What it brings beyond the same repair of random points."""
        weak, *draws = self.repaired[name][self.policies.index(policy)].mean(1).tolist()
        return beyond(weak, draws)

    def both(self, name: str, policy: str) -> Estimate:
        """The weaker of the two: a repair of the weakest has to bring both."""
        return weaker("greater", self.gain(name, policy), self.beyond_random(name, policy))

    def areas(self, name: str) -> torch.Tensor:
        """The mean accuracy along each order, from the smallest size to all points, [2 + draws, fresh]."""
        curves = self.curves[name]
        whole = self.untouched[name].expand(len(curves), -1)
        return area(curves.transpose(1, 2), self.sizes[name], len(self.labels[name]), whole)

    def ahead(self, name: str, order: int = 0) -> Estimate:
        """How much higher an order's curve lies than those of random orders, in the mean."""
        areas = self.areas(name).mean(1)
        return beyond(float(areas[order]), areas[len(ORDERS) :].tolist())

    def repeats(self, name: str) -> Estimate:
        """The rank correlation of points' weakness between initialisations; the jackknife over points."""
        helped = self.helped[name]
        pairs = list(combinations(range(len(helped)), 2))
        if not pairs:
            return Estimate(0.0, -math.inf, math.inf, 0, POINT)

        def figure(points: torch.Tensor) -> float:
            own = helped[:, points]
            return math.fsum(float(rank_correlation(own[a], own[b])) for a, b in pairs) / len(pairs)

        return Estimate.mean(pseudo_values(figure, torch.split(torch.arange(helped.shape[1]), 1)), POINT)

    def set_of(self, name: str, policy: str, one: DistilledDataset) -> DistilledDataset:
        """The set ``one``, which the result is of, with its weakest points mended; without provenance.

        Raises:
            UserError: the policy was not asked, or gives images to a set that does not store images.
        """
        one_of("policy of this result", policy, self.policies)
        weak = self.weak[name]
        if policy == "drop":
            return replace(one.without(*weak.tolist()), provenance=None)
        if policy == "relabel":
            return replace(one, labels=relabelled(one.labels, weak, self.said[name]), provenance=None)
        if not isinstance(one.decode, Pixels):
            raise UserError(
                f"{policy} gives whole images, and this set stores something smaller",
                got=one.decode.describe()["kind"],
                fix="drop or relabel its points",
            )
        images = one.stored["images"].clone()
        images[self.rows[name]] = self.mended[name][policy].to(images)
        return replace(one, stored={"images": images}, provenance=None, chosen=None)

    def headline(self) -> dict[str, Estimate]:
        """What each repair of the weakest brings, and how far the order is ahead of random ones."""
        found = {
            f"{name}: gain by {DOING[policy]} the weakest": self.gain(name, policy)
            for name in self.distilled
            for policy in self.policies
        }
        return found | {
            f"{name}: first k by ridge regression, beyond random orders": self.ahead(name)
            for name in self.distilled
        }

    def claims(self) -> tuple[Claim, ...]:
        """Each repair of the weakest helps; the first k are better than random."""
        claims = []
        for name in self.distilled:
            claims += [
                Claim(
                    f"{DOING[policy]} the weakest helps",
                    name,
                    f"{DOING[policy]} its weakest points gains test accuracy, and more than with random points",
                    self.both(name, policy),
                    "greater",
                    0.0,
                    "random points in the place of the weakest",
                    "a real subset of which a fifth of the points are mislabelled",
                )
                for policy in self.policies
            ]
            claims.append(
                Claim(
                    "first k are better than random",
                    name,
                    "networks on the first k points of its order are better than on those of random orders",
                    self.ahead(name),
                    "greater",
                    0.0,
                    "a random order in the order's place",
                    "a real subset of which half the points are mislabelled",
                )
            )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """The repairs, the orders, the weak points."""
        return _repair_tables.tables(self)

    def notes(self) -> tuple[str, ...]:
        """What chose, what measured, and what the intervals cover."""
        inits, fresh = len(next(iter(self.helped.values()))), len(next(iter(self.untouched.values())))
        notes = [
            f"Points were chosen, mended and ordered by training and validation images and {inits} "
            f"initialisation{'s' if inits > 1 else ''}; {fresh} others on the test images measured. One replicate a set: the intervals "
            "cover initialisations and random draws, not other distillations.",
        ]
        decoded = [name for name in self.rows if len(self.rows[name]) > len(self.weak[name])]
        if decoded:
            notes.append(
                f"Points of several images were replaced by as many, which take more storage: {', '.join(decoded)}."
            )
        return tuple(notes)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Accuracy against points kept, gains of the repairs, weak points and what stands in their place."""
        return _repair_figures.panels(self)

    def plot(self, ax: Axes) -> None:
        """Test accuracy against the points kept."""
        _repair_figures.heights(self, ax)

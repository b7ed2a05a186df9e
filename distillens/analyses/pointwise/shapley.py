"""What each distilled image is worth beside the others: Shapley values, and which pairs stand in for each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from distillens.analyses.pointwise._coalitions import with_only
from distillens.analyses.pointwise._retrained import chosen
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, positive
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROUND = 4  # permutations that are walked before the error is looked at
ENDS = 5  # points shown from each end of the order
POINT, WALK, CONTEXT = "distilled point", "permutation, walked both ways", "context"


@dataclass(frozen=True)
class Shapley:
    """Shapley values of distilled points, by truncated permutations; and how the strongest points interact.

    A coalition's utility is the validation accuracy of a network trained on it alone; that of no points is chance. So the
    values of all points add up to the whole set's accuracy above chance. Accuracy and not the loss: a network that has
    seen one class is so sure of it that the first points' losses drown all others (measured on ten DM points of digits,
    24 walks: a value's standard error is 0.8 of the values' spread by the loss, 0.4 by accuracy).

    A permutation is walked from both ends, by networks with an initialisation of its own: permutations are independent, and
    their spread is the error. A walk stops at up to ``stops`` sizes. With more points than these it takes several at a
    time, in sizes of equal ratio: most is gained early, where networks are cheap. How much more a block gains than blocks at that
    place do in the mean is counted for each of its points (right in the mean where points of one block do not interact). After the first round walks are cut where its mean utility stays within
    ``tolerance`` of the whole set's; what a cut walk leaves is shared evenly. Rounds go on until the standard error of
    a value (root mean square) is at most ``error`` of the mean value, or ``permutations`` are walked, or the images of all
    walked networks would be more than ``budget`` (the first round is always walked). The error reached is reported.

    The interaction of two points is U(S + both) - U(S + one) - U(S + other) + U(S), averaged over ``contexts``
    random coalitions S of the others, of every size alike: the Shapley interaction index. It is negative where they stand in
    for each other. It is measured for the pairs of the ``strong`` points of largest value, and for ``pairs``.

    Replicate 0 of each set is taken, with the random real subset; ``only`` keeps the named sets (all where empty).

    Source: Ghorbani & Zou 2019, algorithm 1 (truncated Monte Carlo), whose rule stops when values stop moving; Grabisch &
    Roubens 1999 for the interaction index.
    """

    question: ClassVar[str] = (
        "What is one distilled image worth beside the others, and which stand in for each other?"
    )
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "permutations", "contexts")
    adaptive: ClassVar[bool] = True

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=300)
    permutations: int = 8
    error: float = 0.1
    tolerance: float = 0.02
    stops: int = 10
    budget: int = 2000
    strong: int = 2
    contexts: int = 6
    pairs: tuple[tuple[int, int], ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, "shapley", permutations=self.permutations, stops=self.stops, contexts=self.contexts)
        at_least(1, "shapley", budget=self.budget)
        at_least(0, "shapley", tolerance=self.tolerance, strong=self.strong)
        positive("shapley", error=self.error)
        for pair in self.pairs:
            if len(set(pair)) != 2 or len(pair) != 2 or min(pair) < 0:
                raise UserError("shapley: a pair names two points by their numbers, from 0", got=repr(pair))

    @classmethod
    def defaults(cls, like: Dataset) -> Shapley:
        """The training of leave-one-out."""
        return cls(ConvNet.defaults(like))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The most that is trained: all walks to their ends, and pairs of the first points in place of the strongest."""
        found = []
        for one in chosen(sets, self.only, "shapley").values():
            self._check_pairs(one)
            found.append(self._walks(one, range(self._most(len(one))), self._sizes(len(one))[:-1], key))
            possible = [pair for pair in combinations(range(len(one)), 2) if pair not in self._named()]
            stand_ins = possible[: math.comb(self.strong, 2)]
            found += self._quartets(one, [*stand_ins, *self._named()], key)
        return found

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> ShapleyResult:
        """The values and interactions."""
        sets.check_against(real)
        found: dict[str, dict[str, Any]] = {}
        for name, one in chosen(sets, self.only, "shapley").items():
            self._check_pairs(one)
            sizes, curves, cuts = self._walked(one, runs, real.val, key)
            orders = torch.stack([self._order(one, i, key) for i in range(len(curves))])
            values = values_of(curves, orders, sizes, cuts, 1 / real.val.k)
            pairs = self._pairs(values.mean(0))
            found[name] = {
                "labels": one.labels.hard(),
                "values": values,
                "curves": curves.mean(1),
                "sizes": tuple(sizes),
                "cuts": cuts,
                "pairs": tuple(pairs),
                "interactions": self._interactions(one, pairs, runs, real.val, key),
            }
        return ShapleyResult(
            distilled=tuple(name for name in sets.distilled if name in found),
            classes=real.val.classes,
            error=self.error,
            permutations=self.permutations,
            **{part: {name: one[part] for name, one in found.items()} for part in next(iter(found.values()))},
        )

    def _check_pairs(self, one: DistilledDataset) -> None:
        for pair in self.pairs:
            if max(pair) >= len(one):
                raise UserError(
                    "shapley: a pair does not fit the set",
                    got=repr(pair),
                    expected=f"two of the points 0 to {len(one) - 1}",
                )

    def _sizes(self, points: int) -> list[int]:
        """The sizes at which a walk stops: all points last, in equal ratios down to steps of one."""
        sizes = [points]
        for left in range(min(self.stops, points) - 1, 0, -1):
            # As many sizes as are left must lie below.
            smaller = math.ceil(sizes[0] ** (left / (left + 1)) - 1e-9)
            sizes.insert(0, min(max(smaller, left), sizes[0] - 1))
        return sizes

    def _most(self, points: int) -> int:
        """The most permutations that are walked."""
        images = points + 2 * sum(self._sizes(points)[:-1])
        return min(self.permutations, max(ROUND, self.budget // images))

    def _order(self, one: DistilledDataset, i: int, key: Key) -> torch.Tensor:
        return key.fold("shapley", "order", i).permutation(len(one))

    def _walks(self, one: DistilledDataset, which: range, sizes: Sequence[int], key: Key) -> Training:
        """The networks of some permutations: all points, then each size from the one end, then from the other."""
        coalitions, keys = [], []
        for i in which:
            order = self._order(one, i, key)
            prefixes = [way[:size] for way in (order, order.flip(0)) for size in sizes]
            coalitions += [order.sort().values, *prefixes]
            keys += [key.fold("shapley", "init", i)] * (1 + len(prefixes))
        return with_only(one, coalitions, self.net, self.recipe, keys)

    def _walked(
        self, one: DistilledDataset, runs: Runs, val: Dataset, key: Key
    ) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """The sizes, the utilities [permutations, 2, sizes] (nan where a walk is cut), and at how many sizes it is cut.

        Each count is of the sizes that were walked before the whole set.
        """
        sizes = self._sizes(len(one))
        walked: list[torch.Tensor] = []
        cuts, cut, most = [], len(sizes) - 1, self._most(len(one))
        while len(walked) < most:
            which = range(len(walked), min(len(walked) + ROUND, most))
            (population,) = runs.get(self._walks(one, which, sizes[:cut], key))
            for utilities in population.accuracy(val).view(len(which), -1):
                curve = torch.full((2, len(sizes)), torch.nan, dtype=torch.float64)
                curve[:, -1] = utilities[0]
                curve[:, :cut] = utilities[1:].view(2, cut)
                walked.append(curve)
                cuts.append(cut)
            curves = torch.stack(walked)
            if len(walked) == len(which):
                cut = self._cut(curves)
            orders = torch.stack([self._order(one, i, key) for i in range(len(walked))])
            values = values_of(curves, orders, sizes, torch.tensor(cuts), 1 / val.k)
            if len(values) > 1 and relative_error(values) <= self.error:
                break
        return sizes, curves, torch.tensor(cuts)

    def _cut(self, curves: torch.Tensor) -> int:
        """After how many sizes walks may be cut: from there on the mean utility is as good as the whole set's."""
        short = (curves[:, :, -1:] - curves).mean((0, 1)).abs() > self.tolerance
        beyond = short.nonzero().flatten()
        return min(int(beyond[-1]) + 2 if len(beyond) else 1, len(short) - 1)

    def _named(self) -> list[tuple[int, int]]:
        """The pairs that are asked about, each once."""
        return list(dict.fromkeys((min(pair), max(pair)) for pair in self.pairs))

    def _pairs(self, values: torch.Tensor) -> list[tuple[int, int]]:
        """The pairs of the strongest points, then those asked about."""
        strongest = sorted(values.argsort(descending=True)[: self.strong].tolist())
        named = self._named()
        return [*(pair for pair in combinations(strongest, 2) if pair not in named), *named]

    def _contexts(self, one: DistilledDataset, pair: tuple[int, int], key: Key) -> list[torch.Tensor]:
        """Random coalitions of the other points, of every size alike."""
        others = torch.tensor([j for j in range(len(one)) if j not in pair], dtype=torch.int64)
        found = []
        for c in range(self.contexts):
            place = key.fold("shapley", "context", c)
            size = int(place.fold("size").integers(len(others) + 1, 1))
            found.append(others[place.fold("order").permutation(len(others))[:size]])
        return found

    def _quartets(self, one: DistilledDataset, pairs: Sequence[tuple[int, int]], key: Key) -> list[Training]:
        """The networks of each pair, context by context: with both, with the first, with the second, with neither.

        An empty coalition is not trained: it comes last in its context, and is left away.
        """
        found = []
        for pair in pairs:
            first, second = (torch.tensor([j]) for j in pair)
            coalitions, keys = [], []
            for c, context in enumerate(self._contexts(one, pair, key)):
                four = [torch.cat([context, *more]) for more in ([first, second], [first], [second], [])]
                coalitions += [coalition for coalition in four if len(coalition)]
                keys += [key.fold("shapley", "pair", *pair, c)] * (4 if len(context) else 3)
            found.append(with_only(one, coalitions, self.net, self.recipe, keys))
        return found

    def _interactions(
        self, one: DistilledDataset, pairs: Sequence[tuple[int, int]], runs: Runs, val: Dataset, key: Key
    ) -> torch.Tensor:
        """The second differences [pairs, contexts]."""
        rows = [torch.empty(0, self.contexts, dtype=torch.float64)]
        for pair, population in zip(pairs, runs.get(*self._quartets(one, pairs, key)), strict=True):
            utilities = population.accuracy(val).tolist()
            row = []
            for context in self._contexts(one, pair, key):
                both, first, second = (utilities.pop(0) for _ in range(3))
                neither = utilities.pop(0) if len(context) else 1 / val.k
                row.append(both - first - second + neither)
            rows.append(torch.tensor([row], dtype=torch.float64))
        return torch.cat(rows)


def values_of(
    curves: torch.Tensor, orders: torch.Tensor, sizes: Sequence[int], cuts: torch.Tensor, empty: float
) -> torch.Tensor:
    """The points' shares [permutations, P] of what walks gain; their mean over permutations is the Shapley values.

    ``curves`` [permutations, 2, sizes] are utilities along each permutation of ``orders`` [permutations, P] from its two
    ends, ``cuts`` how many sizes each walk stopped at before all points, ``empty`` the utility of none.

    Of a block of b of P points each gets the mean gain a point at that place, and the block's gain beyond the mean one times
    (P - 1) / (P - b). Where points add up, a block's gain beyond the mean is a point's own plus, for each of the b - 1 beside
    it, what the other P - 1 have in the mean, which is minus its own over P - 1: the factor makes it right. For blocks
    of one it is the gain itself. What is beyond a cut is shared evenly.
    """
    permutations, points = orders.shape
    starts = torch.tensor([0, *sizes[:-1]])
    blocks = torch.tensor(sizes) - starts
    before = torch.cat([torch.full_like(curves[:, :, :1], empty), curves[:, :, :-1]], 2)
    gains = curves - before
    walked = torch.arange(len(sizes)) < cuts[:, None]
    # The last size counts as walked where nothing is cut: its gain is from the size before it.
    walked[:, -1] = cuts == len(sizes) - 1
    shares = torch.zeros(permutations, 2, points, dtype=torch.float64)
    for k, (start, block) in enumerate(zip(starts.tolist(), blocks.tolist(), strict=True)):
        rows = walked[:, k]
        if not bool(rows.any()):
            continue
        mean = gains[rows, :, k].mean()
        factor = (points - 1) / (points - block) if block < points else 0.0
        each = mean / block + (gains[rows, :, k] - mean) * factor
        shares[rows, :, start : start + block] = each[:, :, None]
    for i in (~walked[:, -1]).nonzero().flatten().tolist():
        cut = int(cuts[i])
        last = curves[i, :, cut - 1] if cut else torch.full((2,), empty, dtype=torch.float64)
        done = sizes[cut - 1] if cut else 0
        shares[i, :, done:] = ((curves[i, :, -1] - last) / (points - done))[:, None]
    found = torch.zeros(permutations, points, dtype=torch.float64)
    found.scatter_add_(1, orders, shares[:, 0])
    found.scatter_add_(1, orders.flip(1), shares[:, 1])
    return torch.div(found, 2)


def relative_error(values: torch.Tensor) -> float:
    """The standard error of a value, root mean square over points, beside the mean of all values (at two permutations or more)."""
    error = (values.var(0) / len(values)).mean().sqrt()
    mean = values.mean().abs()
    return float(error / mean) if mean > 0 else math.inf


def correlation(first: torch.Tensor, second: torch.Tensor) -> Estimate:
    """The correlation of two values of each point, with Fisher's interval over points; unknown below five points."""
    n = len(first)
    a, b = first - first.mean(), second - second.mean()
    scale = float(a.norm() * b.norm())
    r = float((a * b).sum()) / scale if scale > 0 else 0.0
    if n < 5 or scale == 0:
        return Estimate(r, -math.inf, math.inf, n, POINT)
    from scipy.stats import norm

    half = float(norm.ppf(0.975)) / math.sqrt(n - 3)
    z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r)))
    return Estimate(r, math.tanh(z - half), math.tanh(z + half), n, POINT)


@dataclass(frozen=True, eq=False)
class ShapleyResult(Result):
    """By set: values [permutations, P], utilities along walks [permutations, sizes], interactions [pairs, contexts].

    ``cuts`` [permutations] says at how many sizes a walk stopped before all points.
    """

    analysis: ClassVar[str] = "pointwise/shapley"
    title: ClassVar[str] = "Shapley values of distilled points"
    question: ClassVar[str] = Shapley.question

    distilled: tuple[str, ...]
    classes: tuple[str, ...]
    error: float
    permutations: int
    labels: Mapping[str, torch.Tensor]
    values: Mapping[str, torch.Tensor]
    curves: Mapping[str, torch.Tensor]
    sizes: Mapping[str, tuple[int, ...]]
    cuts: Mapping[str, torch.Tensor]
    pairs: Mapping[str, tuple[tuple[int, int], ...]]
    interactions: Mapping[str, torch.Tensor]

    def value(self, name: str, point: int) -> Estimate:
        """What a point is worth, in validation accuracy."""
        return Estimate.mean(self.values[name][:, point].tolist(), WALK)

    def total(self, name: str) -> Estimate:
        """The sum of all values: the set's validation accuracy above chance."""
        return Estimate.mean(self.values[name].sum(1).tolist(), WALK)

    def order(self, name: str) -> list[int]:
        """The points from the most valuable to the least."""
        return self.values[name].mean(0).argsort(descending=True).tolist()

    def repeats(self, name: str) -> Estimate:
        """The correlation over points of the values from every second permutation with those from the others."""
        values = self.values[name]
        if len(values) < 2:
            return Estimate(0.0, -math.inf, math.inf, 0, POINT)
        return correlation(values[0::2].mean(0), values[1::2].mean(0))

    def interaction(self, name: str) -> Estimate | None:
        """The mean interaction of the pairs, over contexts; None without pairs."""
        if not len(self.interactions[name]):
            return None
        return Estimate.mean(self.interactions[name].mean(0).tolist(), CONTEXT)

    def needed(self, name: str) -> int | str:
        """How many permutations the asked error takes, from the error of those that were walked."""
        values = self.values[name]
        if len(values) < 2:
            return "one is not enough to know"
        found = len(values) * (relative_error(values) / self.error) ** 2
        return "no number" if math.isinf(found) else max(2, math.ceil(found))

    def headline(self) -> dict[str, Estimate]:
        """How far values repeat, and how the strongest points interact."""
        found = {
            f"{name}: values from two halves of the permutations agree": self.repeats(name)
            for name in self.values
        }
        for name in self.values:
            interaction = self.interaction(name)
            if interaction is not None:
                found[f"{name}: interaction of its strongest points"] = interaction
        return found

    def claims(self) -> tuple[Claim, ...]:
        """Values repeat; the strongest points stand in for each other."""
        claims = []
        for name in self.distilled:
            claims.append(
                Claim(
                    "values repeat",
                    name,
                    "the points' values from two halves of the permutations agree (correlation above 0.3)",
                    self.repeats(name),
                    "greater",
                    0.3,
                    "values of two halves that share nothing",
                    "points of which one is mislabelled",
                )
            )
            interaction = self.interaction(name)
            if interaction is not None:
                claims.append(
                    Claim(
                        "strong points stand in for each other",
                        name,
                        "two of its strongest points bring less together than the sum of what each brings",
                        interaction,
                        "less",
                        0.0,
                        "second differences with random signs",
                        "the same image twice",
                    )
                )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """How far values can be trusted, the ends of the order, the interactions."""
        return (
            self._trust(),
            *(self._ends(name) for name in self.distilled),
            *(self._pairs(name) for name in self.distilled if self.pairs[name]),
        )

    def _trust(self) -> Table:
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name, values in self.values.items():
            errors = values.std(0) / len(values) ** 0.5 if len(values) > 1 else None
            rows.append(
                (
                    name,
                    values.shape[1],
                    len(values),
                    self.sizes[name][int(self.cuts[name][-1]) - 1] if int(self.cuts[name][-1]) else 0,
                    self.total(name),
                    Estimate.mean(values.mean(0).tolist(), POINT),
                    "unknown" if errors is None else Estimate.mean(errors.tolist(), POINT),
                    self.needed(name),
                    self.repeats(name),
                )
            )
        columns = (
            "set",
            "points",
            "permutations",
            "walked up to",
            "sum of the values",
            "mean value",
            "its standard error",
            f"permutations for {self.error:g} of it",
            "agreement of two halves",
        )
        return Table("How far the values can be trusted", columns, tuple(rows))

    def _ends(self, name: str) -> Table:
        order = self.order(name)
        ends = order if len(order) <= 2 * ENDS else [*order[:ENDS], *order[-ENDS:]]
        rows = tuple((j, self.classes[int(self.labels[name][j])], self.value(name, j)) for j in ends)
        return Table(
            f"{name}: the points worth most, and least",
            ("point", "class", "worth, in validation accuracy"),
            rows,
        )

    def _pairs(self, name: str) -> Table:
        rows = []
        for (i, j), row in zip(self.pairs[name], self.interactions[name], strict=True):
            rows.append(
                (
                    f"{i} and {j}",
                    " and ".join(self.classes[int(self.labels[name][p])] for p in (i, j)),
                    Estimate.mean(row.tolist(), CONTEXT),
                )
            )
        return Table(
            f"{name}: interactions of its strongest points", ("points", "classes", "interaction"), tuple(rows)
        )

    def notes(self) -> tuple[str, ...]:
        """What the intervals cover, and where the asked error was not reached."""
        notes = [
            "Values are those of one replicate a set, on the validation split; the intervals cover permutations and "
            "initialisations, not other distillations."
        ]
        missed = {
            name: relative_error(values) if len(values) > 1 else math.nan
            for name, values in self.values.items()
            if len(values) < 2 or relative_error(values) > self.error
        }
        if missed:
            reached = (
                f"{name} ({'unknown' if math.isnan(error) else f'{error:.2g}'} after {len(self.values[name])})"
                for name, error in missed.items()
            )
            notes.append(
                f"Asked for was a standard error of {self.error:g} of the mean value. It is larger, after so many "
                f"permutations: {', '.join(reached)}."
            )
        if any(len(self.values[name]) < self.permutations for name in missed):
            notes.append(
                "Walks were ended by the budget: more are had by a larger `budget`, and the table says how many the asked "
                "error takes."
            )
        blocks = [name for name, sizes in self.sizes.items() if len(sizes) < self.values[name].shape[1]]
        if blocks:
            notes.append(
                f"Points were added several at a time, which takes no note of how these interact: {', '.join(blocks)}."
            )
        return tuple(notes)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Values in order, utilities along the walks, interactions."""
        panels: dict[str, Callable[[Axes], None]] = {
            "What each point is worth, in order, with its standard error": self.plot,
            "Validation accuracy of coalitions of growing size, the mean over permutations": self._plot_walks,
        }
        if any(self.pairs.values()):
            panels["Interactions of the strongest points, a dot a pair, with 95 % intervals"] = (
                self._plot_pairs
            )
        return panels

    def plot(self, ax: Axes) -> None:
        """The values of each set from the largest to the smallest."""
        for name, values in self.values.items():
            mean = values.mean(0)
            order = mean.argsort(descending=True)
            place = torch.linspace(0, 1, len(order))
            ax.plot(
                place,
                mean[order],
                color=colour(name),
                label=name,
                lw=1.6,
                marker="o",
                ms=3 if len(order) <= 20 else 0,
            )
            if len(values) > 1:
                error = (values.std(0) / len(values) ** 0.5)[order]
                low, high = mean[order] - error, mean[order] + error
                ax.fill_between(place, low, high, color=colour(name), alpha=0.15, lw=0)
        ax.axhline(0, color="grey", lw=1, ls=":")
        ax.set_xlabel("points of the set, from the most valuable to the least")
        ax.set_xticks([0, 0.5, 1], ["first", "middle", "last"])
        ax.set_ylabel("Shapley value (validation accuracy)")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)

    def _plot_walks(self, ax: Axes) -> None:
        for name, curves in self.curves.items():
            sizes = [0, *self.sizes[name]]
            mean = torch.cat([torch.tensor([1 / len(self.classes)]).double(), curves.nanmean(0)])
            ax.plot(sizes, mean, color=colour(name), label=name, lw=1.6, marker="o", ms=3)
        ax.set_xlabel("points in the coalition")
        ax.set_ylabel("validation accuracy")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)

    def _plot_pairs(self, ax: Axes) -> None:
        names = [name for name, pairs in self.pairs.items() if pairs]
        for place, name in enumerate(names):
            rows = [Estimate.mean(row.tolist(), CONTEXT) for row in self.interactions[name]]
            for i, e in enumerate(rows):
                x = place + 0.6 * ((i + 0.5) / len(rows) - 0.5)
                if math.isfinite(e.low):
                    ax.errorbar(x, e.value, [[e.value - e.low], [e.high - e.value]], color=colour(name), lw=1)
                ax.plot([x], [e.value], "o", ms=4, color=colour(name))
        ax.axhline(0, color="grey", lw=1, ls=":")
        ax.set_xticks(range(len(names)), names)
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.set_ylabel("interaction (validation accuracy)")
        ax.spines[["top", "right"]].set_visible(False)

"""Gradients on distilled data beside those on real data, along real training: how many real images a set is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.analyses.representativeness._beside import UNSEEN
from distillens.analyses.representativeness._drawing import dashes, legend_above, tint
from distillens.analyses.representativeness._trajectory import (
    TRAJECTORIES,
    along,
    by_replicate,
    looks_of,
    mean_of_known,
    real_recipe,
    shown,
)
from distillens.attribution.gradients import mean_gradient
from distillens.core.checks import UserError, at_least
from distillens.core.contracts import RANDOM, Net, Sets
from distillens.core.dataset import Dataset, Splits, check_per_class
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WHOLE = "all layers"
SIZES = (1, 2, 5, 10, 20, 50, 100)  # images a class of the subsets that the scale is checked on
EARLY, LATE = "early", "late"


@dataclass(frozen=True)
class Gradients:
    """Cosine and ratio of norms between the gradient on a set and on real data, and the set's equivalent size.

    The real gradient is that of the distribution, every class counting the same. It is estimated on test images, which
    neither the trajectories nor any set has seen (nothing is chosen on them): the training images' own gradient vanishes
    once they are fitted, and with it what a set could be compared to. Its sampling noise is taken out: the images are
    dealt into rows of one image a class, and squares are averaged over pairs of different rows, which makes them
    unbiased.

    A random subset of n images has cos^2 = |g|^2 / (|g|^2 + T / n), T being the variance of one image's gradient in its
    class. The **equivalent size** of a set is the n that gives its cosine. A single subset's logarithm strays, and not
    evenly: so random subsets of the set's own size, drawn from validation images, go the same way beside it, and count
    as their number on average. Sizes below one image and above the number of test images used cannot be told apart.

    The paper's early phase is the first tenth of the updates here (``early``), the late one the second half (``late``):
    both are shares of the recipe's steps, fixed beforehand. ``looks`` of the kept ``moments`` are looked at. ``sample`` is the
    most images a class that either split gives.

    Not in the paper. It asks its claim that distilled data keeps the early dynamics of real training (section 4) of the
    gradients themselves.
    """

    question: ClassVar[str] = (
        "How many real images is the gradient on a distilled set worth, through training?"
    )
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "trajectories", "looks", "sample")

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=392, batch=256)
    moments: int = 48
    trajectories: int = TRAJECTORIES
    looks: int = 24
    sample: int = 200
    draws: int = 20
    early: float = 0.1
    late: float = 0.5

    def __post_init__(self) -> None:
        at_least(1, "gradients", trajectories=self.trajectories, draws=self.draws)
        at_least(2, "gradients", moments=self.moments, looks=self.looks, sample=self.sample)
        if not 0 <= self.early < self.late <= 1:
            raise UserError(
                "gradients: the early phase ends before the late one begins",
                got=f"early {self.early:g}, late {self.late:g}",
                expected="0 <= early < late <= 1",
            )

    @classmethod
    def defaults(cls, like: Dataset) -> Gradients:
        """The real trajectories that all analyses of this question share."""
        return cls(ConvNet.defaults(like), real_recipe(like))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The real trajectories."""
        return [along(self.net, self.recipe, self.moments, self.trajectories, sets, real, key)]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> GradientsResult:
        """Cosines, ratios of norms and equivalent sizes at each look."""
        sets.check_against(real)
        check_per_class(real.test, 2, "test images per class")
        check_per_class(real.val, 1, "validation images per class")
        (population,) = runs.get(*self.trainings(sets, real, key=key))
        place = key.fold("gradients")
        moments = looks_of(population.moments, self.looks)
        layers = layers_of(population.shapes)
        reference = rows(real.test, self.sample, place.fold("reference"))
        named, k = sets.everything(), real.train.k
        sizes = {name: len(many[0].dataset()) for name, many in named.items()}
        found: dict[str, list[torch.Tensor]] = {name: [] for name in (*named, UNSEEN)}
        checked = []
        for r, models in enumerate(by_replicate(population, sets)):
            beside = rows(real.val, self.sample, place.fold("beside", r))
            sizes[UNSEEN] = k * min(len(beside), max(1, round(max(sizes.values()) / k)))
            here = {name: shown(many[r].dataset()) for name, many in named.items() if r < len(many)}
            vectors = [*reference, *beside, *here.values()]
            table = torch.stack(
                [
                    torch.stack([products(self.net, models.shapes, layers, flat, vectors) for flat in flats])
                    for flats in torch.stack([models.at(t) for t in moments], 1)
                ]
            )
            scale = Scale(table, len(reference), len(beside), k)
            drawn = place.fold("draws", r)
            for i, name in enumerate(here):
                found[name].append(scale.judged(scale.own(i), sizes[name], self.draws, drawn))
            one = scale.subsets(sizes[UNSEEN] // k, 1, place.fold("unseen", r))
            found[UNSEEN].append(scale.judged(one, sizes[UNSEEN], self.draws, drawn))
            checked.append(scale.checked(sizes[UNSEEN], self.draws, drawn))
        return GradientsResult(
            tuple(sets.distilled),
            moments,
            (WHOLE, *layers),
            sizes,
            tuple(math.log(n) for n in (1, len(reference) * k)),
            {name: torch.stack(values) for name, values in found.items()},
            tuple(k * n for n in SIZES if n <= len(beside)),
            torch.stack(checked),
            {
                EARLY: tuple(t <= self.early * self.recipe.steps for t in moments),
                LATE: tuple(t >= self.late * self.recipe.steps for t in moments),
            },
        )


def rows(data: Dataset, most: int, key: Key) -> list[Dataset]:
    """Images dealt at random into rows of one image a class, at most ``most`` of them: what a class has more is left out.

    The mean gradient of some rows is that of a random subset with as many images of each class.
    """
    count = min(most, *map(len, data.by_class))
    dealt = torch.stack(
        [m[key.fold(c).permutation(len(m))[:count].to(m.device)] for c, m in enumerate(data.by_class)], 1
    )
    return [data.take(row) for row in dealt]


def layers_of(shapes: Shapes) -> dict[str, list[int]]:
    """The places of each layer's tensors: those whose names differ after the last dot."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(shapes.names):
        found.setdefault(name.rpartition(".")[0] or name, []).append(place)
    return found


def products(
    net: Net, shapes: Shapes, layers: Mapping[str, Sequence[int]], flat: torch.Tensor, many: Sequence[Dataset]
) -> torch.Tensor:
    """Inner products [1 + layers, q, q] of the mean gradients on q datasets at ``flat`` [P]: of all, then layer by layer."""
    gradients = torch.stack([mean_gradient(net, shapes, flat, data) for data in many])
    pieces = torch.split(gradients, [math.prod(shape) for shape in shapes.shapes], 1)
    found = []
    for places in layers.values():
        layer = torch.cat([pieces[place] for place in places], 1).double()
        found.append(layer @ layer.T)
    return torch.stack([torch.stack(found).sum(0), *found]).cpu()


@dataclass(frozen=True, eq=False)
class Scale:
    """Inner products [trajectories, looks, parts, q, q] of gradients on reference rows, rows beside, then sets.

    A subset is its weights [q]: a random one has equal weights on some of the rows beside.
    """

    table: torch.Tensor
    reference: int
    beside: int
    k: int

    def own(self, i: int) -> torch.Tensor:
        """The weights [1, q] of set i."""
        weights = torch.zeros(1, self.table.shape[-1], dtype=self.table.dtype)
        weights[0, self.reference + self.beside + i] = 1
        return weights

    def subsets(self, wanted: int, count: int, key: Key) -> torch.Tensor:
        """The weights [count, q] of random subsets of ``wanted`` rows beside."""
        weights = torch.zeros(count, self.table.shape[-1], dtype=self.table.dtype)
        for own, place in zip(weights, key.split(count), strict=True):
            own[self.reference + place.permutation(self.beside)[:wanted]] = 1 / wanted
        return weights

    def measured(self, weights: torch.Tensor) -> torch.Tensor:
        """Cosine with the real gradient, ratio of norms and log size [trajectories, looks, d, parts, 3] of subsets [d, q].

        The size is not cut: infinite where the squared cosine is found to be outside of (0, 1). NaN where the real
        gradient cannot be told from none.
        """
        b = self.reference
        real = self.table[..., :b, :b]
        squares = real.diagonal(dim1=-2, dim2=-1).sum(-1)
        length = ((real.sum((-2, -1)) - squares) / (b * (b - 1)))[..., None, :]  # |g|^2, without bias
        length = length.where(length > 0, torch.nan)
        variance = self.k * (squares[..., None, :] / b - length)  # T: that of one image within its class
        table = self.table[..., None, :, :, :]
        ways = (weights[:, None, None, :] @ table)[..., 0, :]  # [trajectories, looks, d, parts, q]
        norm = (ways * weights[:, None, :]).sum(-1)
        onto = ways[..., :b]
        mean = onto.mean(-1)
        square = (onto.sum(-1).square() - onto.square().sum(-1)) / (b * (b - 1))  # <d, g>^2, without bias
        share = square / (norm * length)
        odds = torch.where(share < 1, share / (1 - share), torch.inf)
        size = (odds * variance / length).where((mean > 0) & (share > 0) | length.isnan(), 0.0).log()
        return torch.stack([mean / (norm * length).sqrt(), (norm / length).sqrt(), size], -1)

    @property
    def bounds(self) -> tuple[float, float]:
        """The logarithms of the sizes that can be told apart."""
        return 0.0, math.log(self.reference * self.k)

    def stray(self, size: int, count: int, key: Key) -> torch.Tensor:
        """The mean log size less the true one [trajectories, looks, parts] of random subsets, as large as they can be."""
        wanted = max(1, min(self.beside, round(size / self.k)))
        found = self.measured(self.subsets(wanted, count, key))[..., 2].clamp(*self.bounds)
        return found.mean(2) - math.log(wanted * self.k)

    def judged(self, weights: torch.Tensor, size: int, count: int, key: Key) -> torch.Tensor:
        """``measured`` of one subset of ``size`` images, [trajectories, looks, parts, 3]; random ones as large count as their number."""
        found = self.measured(weights)[:, :, 0]
        level = (found[..., 2] - self.stray(size, count, key)).clamp(*self.bounds)
        return torch.stack([found[..., 0], found[..., 1], level], -1)

    def checked(self, size: int, count: int, key: Key) -> torch.Tensor:
        """What random subsets of other sizes count as [trajectories, looks, sizes], by the scale set at ``size``: log sizes."""
        level = self.stray(size, count, key)[..., 0]
        found = [
            self.stray(n * self.k, count, key.fold("checked", n))[..., 0] + math.log(n * self.k)
            for n in SIZES
            if n <= self.beside
        ]
        return torch.stack([one - level for one in found], -1)


@dataclass(frozen=True)
class GradientsResult(Result):
    """Values [replicates, trajectories, looks, parts, 3] by name: cosine, ratio of norms, log of the equivalent size.

    ``parts`` are all layers, then each. ``checked`` [replicates, trajectories, looks, sizes] are the log sizes that random
    subsets of ``drawn`` images count as. ``phases`` say which looks are early and which late.
    """

    analysis: ClassVar[str] = "representativeness/gradients"
    title: ClassVar[str] = "Equivalent size: as many random real images have as good a gradient"
    question: ClassVar[str] = Gradients.question

    distilled: tuple[str, ...]
    moments: tuple[int, ...]
    parts: tuple[str, ...]
    sizes: Mapping[str, int]
    bounds: tuple[float, ...]
    values: Mapping[str, torch.Tensor]
    drawn: tuple[int, ...]
    checked: torch.Tensor
    phases: Mapping[str, tuple[bool, ...]]

    def over(self, name: str, phase: str, measure: int = 2, part: int = 0) -> torch.Tensor:
        """The mean of a measure over a phase, [replicates, trajectories]; NaN where it was not found at any look."""
        return self.values[name][:, :, list(self.phases[phase]), part, measure].nanmean(2)

    def worth(self, name: str, phase: str, part: int = 0) -> Estimate | None:
        """The equivalent size in a phase: the geometric mean; None where it could not be measured."""
        found = mean_of_known(self.over(name, phase, 2, part))
        return found and _grown(found)

    def above_its_number(self, name: str, phase: str) -> Estimate | None:
        """The logarithm of the equivalent size over the number of images."""
        return mean_of_known(self.over(name, phase) - math.log(self.sizes[name]))

    def turned(self, name: str) -> Estimate | None:
        """How the log of the equivalent size changes from early to late, less how a random training subset's does."""
        change = [self.over(one, LATE) - self.over(one, EARLY) for one in (name, RANDOM)]
        pairs = min(map(len, change))
        return mean_of_known(change[0][:pairs] - change[1][:pairs])

    def headline(self) -> dict[str, Estimate]:
        """The early equivalent size of each set."""
        found = {name: self.worth(name, EARLY) for name in self.distilled}
        return {name: one for name, one in found.items() if one is not None}

    def claims(self) -> tuple[Claim, ...]:
        """Worth more than its number early; turning away from unseen images sooner than training images do."""
        claims = []
        for name in self.distilled:
            more = self.above_its_number(name, EARLY)
            if more is not None:
                claims.append(
                    Claim(
                        "worth more than its number",
                        name,
                        "early in real training its gradient is as good as that of more real images than it has",
                        more,
                        "greater",
                        0.0,
                        "random unseen real images, and the set under permuted labels",
                        "a random real subset that is larger than it says",
                    )
                )
            turned = self.turned(name) if RANDOM in self.values else None
            if turned is not None:
                claims.append(
                    Claim(
                        "turns away",
                        name,
                        "from early to late in real training it loses more of its worth than real training images do",
                        turned,
                        "less",
                        0.0,
                        "another random training subset",
                        "a random training subset whose labels give a third to the other classes",
                    )
                )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Sizes, cosines and ratios in both phases, layer by layer, and how well the scale holds."""
        phases = (EARLY, LATE)
        whole = []
        for name in self.values:
            measured = [self._said(name, phase) for phase in phases]
            rest = [
                mean_of_known(self.over(name, phase, m)) or "not measured" for m in (0, 1) for phase in phases
            ]
            whole.append((name, self.sizes[name], *measured, *rest))
        columns = (
            "set",
            "images",
            "worth, early",
            "worth, late",
            "cosine, early",
            "cosine, late",
            "norm over real, early",
            "norm over real, late",
        )
        by_layer = tuple(
            (name, *(self._said(name, EARLY, part) for part in range(1, len(self.parts))))
            for name in self.values
        )
        held = tuple((n, *(self._held(phase, i) for phase in phases)) for i, n in enumerate(self.drawn))
        return (
            Table("Worth of the gradient, in random unseen real images", columns, tuple(whole)),
            Table("Worth early, layer by layer", ("set", *self.parts[1:]), by_layer),
            Table("What random unseen subsets count as", ("images", *phases), held),
        )

    def _said(self, name: str, phase: str, part: int = 0) -> str | Estimate:
        """A size; in words where it lies outside of what can be told apart at all looks."""
        found = self.over(name, phase, 2, part)
        found = found[~found.isnan()]
        if not len(found):
            return "not measured"
        low, high = self.bounds
        if bool((found <= low + 1e-9).all()):
            return f"below {math.exp(low):.0f}"
        if bool((found >= high - 1e-9).all()):
            return f"above {math.exp(high):.0f}"
        return self.worth(name, phase, part) or "not measured"

    def _held(self, phase: str, i: int) -> str | Estimate:
        found = mean_of_known(self.checked[:, :, list(self.phases[phase]), i].nanmean(2))
        return "not measured" if found is None else _grown(found)

    def notes(self) -> tuple[str, ...]:
        """What was seen by whom, where the scale ends, and what an interval covers."""
        low, high = (math.exp(bound) for bound in self.bounds)
        notes = [
            f"Sizes from {low:.0f} to {high:.0f} can be told apart; what lies outside at a look counts as the nearest of them. "
            f"Early: up to update {self._ends(EARLY)[1]}; late: from update {self._ends(LATE)[0]}.",
            "Baselines are images on which the trajectories train: late in training they are fitted, and worth less than "
            "unseen images for that reason alone. So are a set's real images, if it has any: turning away is asked beyond the "
            "random subset's.",
        ]
        large = [name for name in self.distilled if math.log(self.sizes[name]) >= self.bounds[1]]
        if large:
            notes.append(
                f"{', '.join(large)}: more images than can be told apart, their number cannot be exceeded."
            )
        lost = [n for n in self.values if bool(self.values[n][..., 0, 2].isnan().any())]
        if lost:
            notes.append("At some looks the real gradient could not be told from none: these are left out.")
        if len(self.checked) == 1:
            notes.append("One replicate: the interval covers training only.")
        return tuple(notes)

    def _ends(self, phase: str) -> tuple[int, int]:
        inside = [t for t, is_in in zip(self.moments, self.phases[phase], strict=True) if is_in]
        return inside[0], inside[-1]

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Equivalent size against the update, by layer, and the cosine."""
        return {
            self.title: self.plot,
            "Equivalent size early in training, layer by layer": self.plot_layers,
            "Cosine between the gradient on a set and on real data": self.plot_cosine,
        }

    def plot(self, ax: Axes) -> None:
        """A line a set, the geometric mean over replicates; dotted: the number of images."""
        self._lines(ax, 2, torch.exp)
        for size in sorted({self.sizes[name] for name in self.distilled}):
            ax.axhline(size, color="grey", lw=1, ls=":")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_ylabel("equivalent number of real images\n(dotted: images in the set)")

    def plot_cosine(self, ax: Axes) -> None:
        """A line a set, the mean over replicates."""
        self._lines(ax, 0, lambda values: values)
        ax.set_ylabel("cosine with the real gradient")
        ax.axhline(0, color="grey", lw=1, ls=":")

    def _lines(self, ax: Axes, measure: int, shape: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name, values in self.values.items():
            own = values[:, :, :, 0, measure].nanmean(1)  # [replicates, looks]
            ax.plot(self.moments, shape(own.nanmean(0)), dashes(name), color=tint(name), lw=1.6, label=name)
            if len(own) > 1:
                known = own.nan_to_num(nan=float(own.nanmean()))
                ax.fill_between(
                    self.moments,
                    shape(known.amin(0)),
                    shape(known.amax(0)),
                    color=tint(name),
                    alpha=0.12,
                    lw=0,
                )
        for x in (self._ends(EARLY)[1], self._ends(LATE)[0]):
            ax.axvline(x, color="grey", lw=0.8, ls=":")
        ax.set_xscale("symlog", linthresh=1)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlim(0, self.moments[-1])
        ax.set_xlabel("update of real training (band: all replicates; upright: end of early, begin of late)")
        legend_above(ax, len(self.values))

    def plot_layers(self, ax: Axes) -> None:
        """A dot a layer and set with its interval; dotted: the number of images."""
        names = list(self.values)
        for i, name in enumerate(names):
            found = [self.worth(name, EARLY, part) for part in range(len(self.parts))]
            kept = [(x, e) for x, e in enumerate(found) if e is not None]
            low, high = (math.exp(bound) for bound in self.bounds)
            ax.errorbar(
                [x + 0.7 * ((i + 0.5) / len(names) - 0.5) for x, _ in kept],
                [e.value for _, e in kept],
                [
                    [e.value - max(e.low, low / 2) if e.low < e.value else 0.0 for _, e in kept],
                    [min(e.high, 2 * high) - e.value if e.high > e.value else 0.0 for _, e in kept],
                ],
                fmt="o",
                ms=4,
                lw=1,
                color=tint(name),
                label=name,
            )
        for size in sorted({self.sizes[name] for name in self.distilled}):
            ax.axhline(size, color="grey", lw=1, ls=":")
        crowded = len(self.parts) > 8
        ax.set_xticks(range(len(self.parts)), self.parts, rotation=90 if crowded else 0, fontsize=8)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.tick_params(axis="y", which="minor", labelsize=8)
        ax.set_ylabel("equivalent number of real images, early")
        legend_above(ax, len(names))


def _grown(e: Estimate) -> Estimate:
    """An estimate of a logarithm as one of the thing itself."""
    return Estimate(math.exp(e.value), math.exp(e.low), math.exp(e.high), e.n, e.unit, e.level)

"""The curvature of the loss on distilled and on real data, along real training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.analyses.representativeness._beside import updates
from distillens.analyses.representativeness._trajectory import (
    EVERY,
    TRAJECTORIES,
    along,
    by_replicate,
    looks_of,
    real_recipe,
    shown,
)
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import at_least, positive
from distillens.core.contracts import RANDOM, Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table, units
from distillens.core.rng import Key
from distillens.curvature import FIRST, Curved, Trace, curve, lanczos, largest_eigenvalues, signs
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Population, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REAL = "real"
ALIKE = "real, as many"  # random training images, as many as the set has: what the claims compare with
PUBLISHED_PROBES = 35  # of 25 to 45 that the paper's time a moment allows (PyHessian's stopping rule)
# Of the way to the greatest real trace: where the paper's dotted line at update 60 stands (its peak is at 91).
EARLY = 2 / 3
LATE = 0.8  # the share of the updates after which training counts as late
DENSITY_STEPS, DENSITY_STARTS = 40, 2


@dataclass(frozen=True)
class Curvature:
    """The trace of the Hessian of the loss on each set and on the real training data, at moments of real training.

    One estimator for all: Hutchinson's, by products with random signs. A replicate's signs are the same for all sets at a moment, so that
    differences between sets carry little of their noise; replicates have their own, so that the interval over replicates
    covers it. A measurement meets ``images`` images, and the next one others, in turn: the spread between measurements counts the images' variance
    too, and the whole training set need never be met, nor held. A set of no more than ``images`` is met whole. The trace bends smoothly
    along training, so all measurements at ``looks`` of the kept ``moments``, up to update ``last`` (0: to the end), are joined by a Gaussian process.
    Each look gets as many as bring its standard error below ``error`` times the trace, at most ``most``. Where looks are dense, few
    images are enough.

    The ``top`` largest eigenvalues are taken at three moments (a third of the way to the greatest real trace, there, and the last), on
    ``sample`` images at most; the spectral density at the last in the first replicate.

    Source: Yang et al. 2024, section 4.3 (one network, one run of PyHessian 0.1 a point, smoothed; 301 moments).
    """

    question: ClassVar[str] = "Is there more to learn from a set early in real training, and less later?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "trajectories", "most")

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=392, batch=256)
    moments: int = 48
    trajectories: int = TRAJECTORIES
    looks: int = 12
    last: int = 0
    error: float = 0.05
    most: int = 20
    images: int = 128
    top: int = 5
    sample: int = 256

    def __post_init__(self) -> None:
        positive("curvature", error=self.error)
        at_least(1, "curvature", trajectories=self.trajectories, images=self.images, sample=self.sample)
        at_least(2, "curvature", looks=self.looks, moments=self.moments)
        at_least(0, "curvature", last=self.last, top=self.top)
        at_least(FIRST, "curvature", most=self.most)

    @classmethod
    def defaults(cls, like: Dataset) -> Curvature:
        """The real trajectories that all analyses of this question share."""
        return cls(ConvNet.defaults(like), real_recipe(like))

    @classmethod
    def as_published(cls, like: Dataset) -> Curvature:
        """Every update up to the 300th, along one trajectory a replicate, at the published estimator's error.

        That is 2 % of the trace (25 to 45 probes over all images). Where we differ: no stopping rule that a small change can end, a part of
        the images in turn in place of all 50,000 at each measurement, and neighbouring moments help each other (see above).
        """
        return cls(
            ConvNet.defaults(like),
            real_recipe(like),
            moments=EVERY,
            trajectories=1,
            looks=EVERY,
            last=300,
            error=0.02,
            most=120,
            images=16,
        )

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The real trajectories."""
        return [along(self.net, self.recipe, self.moments, self.trajectories, sets, real, key)]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> CurvatureResult:
        """Traces, eigenvalues and densities."""
        sets.check_against(real)
        (population,) = runs.get(*self.trainings(sets, real, key=key))
        trajectories = by_replicate(population, sets)
        kept = tuple(t for t in population.moments if not self.last or t <= self.last)
        moments = looks_of(kept, self.looks)
        place = key.fold("curvature")
        named = dict(sets.distilled) | ({RANDOM: sets.random} if sets.random else {})
        compared = _compared(named)
        rows: dict[str, list[list[list[Trace]]]] = {name: [] for name in (REAL, *compared.values(), *named)}
        published = 0
        for r, one in enumerate(trajectories):
            own = {name: shown(many[r].dataset()) for name, many in named.items() if r < len(many)}
            alike = {
                label: _as_many(real.train, own[name], place.fold("alike", r))
                for name, label in reversed(compared.items())  # the first of a size stands for it
                if name in own
            }
            for name, data in {REAL: real.train, **alike, **own}.items():
                about = Looked(one, data, place.fold("probe", r))
                rows[name].append([self._curve(about, j, moments) for j in range(len(one))])
                published += PUBLISHED_PROBES * len(data) * len(one) * len(moments)
        traces = {name: _table(many, "value") for name, many in rows.items()}
        spectra = self._spectra_at(traces[REAL], moments)
        eigenvalues, densities = self._spectra(
            named, real.train, trajectories, [moments[i] for i in spectra], place
        )
        return CurvatureResult(
            tuple(sets.distilled),
            compared,
            moments,
            traces,
            {name: _table(many, "error") for name, many in rows.items()},
            {name: _table(many, "measurements").long() for name, many in rows.items()},
            {name: sum(t.products for a in many for b in a for t in b) for name, many in rows.items()},
            published,
            len(real.train),
            self.error,
            self.most,
            tuple(moments[i] for i in spectra),
            eigenvalues,
            densities,
        )

    def _curve(self, about: Looked, j: int, moments: tuple[int, ...]) -> list[Trace]:
        """The trace at every moment of trajectory j."""
        images = min(self.images, len(about.data))
        order = {moment: i for i, moment in enumerate(moments)}

        @lru_cache(maxsize=1)  # the measurements of a moment follow one another
        def whole(moment: int) -> Curved:
            return about.curved(about.data, j, moment)

        def measure(i: int, moment: int) -> float:
            # Numbered through all moments: neighbours in time meet different images.
            place = i * len(moments) + order[moment]
            curved = whole(moment) if images == len(about.data) else about.part(place, images, j, moment)
            return curved.form(about.probe(place, j))

        return curve(measure, moments, images, self.error, self.most)

    def _spectra_at(self, real: torch.Tensor, moments: tuple[int, ...]) -> list[int]:
        """Where spectra are taken: on the way to the greatest real trace, there, and at the end."""
        peak = int(real.mean((0, 1)).argmax())
        early = min(range(len(moments)), key=lambda i: abs(moments[i] - moments[peak] / 3))
        return sorted({early, peak, len(moments) - 1})

    def _spectra(
        self,
        named: Mapping[str, tuple[DistilledDataset, ...]],
        train: Dataset,
        trajectories: list[Population],
        at: list[int],
        place: Key,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The largest eigenvalues [replicates, moments, top] and the density at the last moment [2, nodes], by set."""
        eigenvalues: dict[str, torch.Tensor] = {}
        densities: dict[str, torch.Tensor] = {}
        if not self.top:
            return eigenvalues, densities
        for name in (REAL, *named):
            found = []
            for r, one in enumerate(trajectories):
                if name != REAL and r >= len(named[name]):
                    continue
                data = train if name == REAL else shown(named[name][r].dataset())
                if len(data) > self.sample:
                    data = data.take(place.fold("sample", r).permutation(len(data))[: self.sample])
                start = place.fold("start", r).normal(one.shapes.size)
                by_moment = []
                for t in at:
                    curved = Curved(one.net, one.shapes, one.at(t)[0], data)
                    count = min(self.top, one.shapes.size - 1)
                    by_moment.append(largest_eigenvalues(curved, count, start.to(one.final)))
                    if r == 0 and t == at[-1]:
                        parts = [
                            lanczos(
                                curved,
                                place.fold("density", i).normal(len(start)).to(one.final),
                                DENSITY_STEPS,
                            )
                            for i in range(DENSITY_STARTS)
                        ]
                        nodes, weights = (torch.cat(each) for each in zip(*parts, strict=True))
                        densities[name] = torch.stack([nodes, weights / DENSITY_STARTS])
                found.append(torch.stack(by_moment))
            eigenvalues[name] = torch.stack(found)
        return eigenvalues, densities


@dataclass(frozen=True, eq=False)
class Looked:
    """Data that is looked at along the trajectories of a replicate."""

    population: Population
    data: Dataset
    key: Key

    def probe(self, i: int, j: int) -> torch.Tensor:
        """The signs [P] of measurement i along trajectory j: the same for all data."""
        return signs(self.key.fold("signs", j, i).uniform(self.population.shapes.size))

    def part(self, i: int, images: int, j: int, moment: int) -> Curved:
        """The Hessian on the i-th so many images of the data in random order, then in another."""
        n, first = len(self.data), i * images
        rounds = range(first // n, (first + images - 1) // n + 1)
        order = torch.cat([self.key.fold("images", c).permutation(n) for c in rounds])
        return self.curved(self.data.take(order[first - rounds[0] * n :][:images]), j, moment)

    def curved(self, data: Dataset, j: int, moment: int) -> Curved:
        """The Hessian of the mean loss on some data."""
        return Curved(self.population.net, self.population.shapes, self.population.at(moment)[j], data)


def _compared(named: Mapping[str, tuple[DistilledDataset, ...]]) -> dict[str, str]:
    """The real images that each set is compared with: the same for all sets that show as many."""
    sizes = {name: len(many[0].dataset()) for name, many in named.items()}
    usual = next(iter(sizes.values()))
    return {name: ALIKE if size == usual else f"{ALIKE} ({size})" for name, size in sizes.items()}


def _as_many(train: Dataset, data: Dataset, key: Key) -> Dataset:
    """Random training images, as many a class as a set shows; a class of fewer training images whole."""
    counts = torch.bincount(data.labels.hard(), minlength=train.k).tolist()
    return train.take(train.drawn(counts, key))


def _table(many: list[list[list[Trace]]], what: str) -> torch.Tensor:
    return torch.tensor(
        [[[float(getattr(t, what)) for t in b] for b in a] for a in many], dtype=torch.float64
    )


@dataclass(frozen=True, eq=False)
class CurvatureResult(Result):
    """Traces, their standard errors and measurements [replicates, trajectories, moments], by set.

    ``compared`` names the real images that are as many as a set's. ``products`` are the example-products of the traces, ``published`` those of the published estimator at the same points.
    """

    analysis: ClassVar[str] = "representativeness/curvature"
    title: ClassVar[str] = "Curvature along real training"
    question: ClassVar[str] = Curvature.question

    distilled: tuple[str, ...]
    compared: Mapping[str, str]
    moments: tuple[int, ...]
    traces: Mapping[str, torch.Tensor]
    errors: Mapping[str, torch.Tensor]
    measurements: Mapping[str, torch.Tensor]
    products: Mapping[str, int]
    published: int
    training_images: int
    error: float
    most: int
    spectra_at: tuple[int, ...]
    eigenvalues: Mapping[str, torch.Tensor]
    densities: Mapping[str, torch.Tensor]

    @property
    def peak(self) -> int:
        """The place of the moment at which the real trace is greatest, averaged over trajectories."""
        return int(self.traces[REAL].mean((0, 1)).argmax())

    def _weights(self, early: bool) -> torch.Tensor:
        """What each moment counts in a mean over updates, [moments]: well before the real peak, or late in training."""
        t = torch.tensor(self.moments, dtype=torch.float64)
        widths = torch.zeros_like(t)
        widths[:-1] += (t[1:] - t[:-1]) / 2
        widths[1:] += (t[1:] - t[:-1]) / 2
        where = t <= max(EARLY * float(t[self.peak]), float(t[1])) if early else t >= LATE * t[-1]
        return torch.where(where, widths, 0.0) / torch.where(where, widths, 0.0).sum()

    def level(self, name: str, early: bool) -> torch.Tensor:
        """The mean trace over the early or the late updates, [replicates, trajectories]."""
        return self.traces[name] @ self._weights(early)

    def ratio(self, name: str, early: bool) -> Estimate:
        """The mean trace on a set over that on the real data, early or late."""
        own, real = self.level(name, early), self.level(REAL, early)
        return Estimate.mean(*units(own / real[: len(own)]))

    def contrast(self, name: str, early: bool) -> Estimate:
        """(set - real) / (set + real) for as many real training images, from -1 to 1; 0 where they are alike.

        A ratio of 2 is 1/3. Exchanging the two changes its sign alone, whatever the spread of traces between small sets.
        """
        own, real = self.level(name, early), self.level(self.compared[name], early)
        real = real[: len(own)]
        return Estimate.mean(*units((own - real) / (own.abs() + real.abs()).clamp(min=1e-12)))

    def crossing(self, name: str) -> torch.Tensor:
        """When the trace on a set falls below that on the real data for good, as log(1 + updates); infinite where it does not.

        [replicates, trajectories]; between two moments in proportion, along the logarithm; 0 updates where it never is above.
        """
        own = self.traces[name]
        above = own - self.traces[REAL][: len(own)]
        logs = torch.tensor(self.moments, dtype=torch.float64).log1p()
        found = torch.full(above.shape[:2], math.inf, dtype=torch.float64)
        for r, rows in enumerate(above):
            for j, row in enumerate(rows):
                last = (row >= 0).nonzero().flatten().tolist()
                if not last:
                    found[r, j] = 0.0
                elif last[-1] < len(row) - 1:
                    i = last[-1]
                    part = row[i] / (row[i] - row[i + 1])
                    found[r, j] = logs[i] + part * (logs[i + 1] - logs[i])
        return found

    def headline(self) -> dict[str, Estimate]:
        """The trace on each set over the real one, early and late."""
        found = {f"{name}: early": self.ratio(name, True) for name in self.distilled}
        return found | {f"{name}: late": self.ratio(name, False) for name in self.distilled}

    def claims(self) -> tuple[Claim, ...]:
        """The curvature on a set rises above that on as many real images early on, and is below it late."""
        claims = []
        for name in self.distilled:
            claims += [
                Claim(
                    "rises above real",
                    name,
                    "until two thirds of the way to the greatest real trace, the trace on it is above that on as many real training images",
                    self.contrast(name, True),
                    "greater",
                    0.0,
                    "random training images in the set's place",
                    "the mean image of each class, which is learned first",
                    "paper T8",
                ),
                Claim(
                    "curvature collapses",
                    name,
                    "late in training the trace on it is below that on as many real training images",
                    self.contrast(name, False),
                    "less",
                    0.0,
                    "random training images in the set's place",
                    "the training images nearest to their class's mean",
                    "paper T8",
                ),
            ]
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Ratios and crossings, the estimator's errors and work, eigenvalues."""
        found = [self._ratios(), self._work()]
        if self.eigenvalues:
            found.append(self._largest())
        return tuple(found)

    def _ratios(self) -> Table:
        last = self.moments[-1]
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name in self.traces:
            if name == REAL:
                continue
            crossing = self.crossing(name)
            never = int(crossing.isinf().sum())
            rows.append(
                (
                    name,
                    self.ratio(name, True),
                    self.ratio(name, False),
                    "never" if never == crossing.numel() else updates(crossing, last),
                    f"{never} of {crossing.numel()}",
                )
            )
        columns = (
            "set",
            f"trace over real until update {math.floor(EARLY * self.moments[self.peak])}",
            f"from update {math.ceil(LATE * last)} on",
            "below real for good after updates",
            "never below",
        )
        return Table("Curvature on each set over that on the real training data", columns, tuple(rows))

    def _work(self) -> Table:
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name, values in self.traces.items():
            relative = (self.errors[name] / values.abs()).median(-1).values
            capped = self.measurements[name] >= self.most
            rows.append(
                (
                    name,
                    Estimate.mean(*units(relative)),
                    Estimate.mean(*units(self.measurements[name].double().mean(-1))),
                    f"{int(capped.sum())} of {capped.numel()}",
                )
            )
        columns = (
            "set",
            "standard error over the trace (median moment)",
            "measurements",
            f"points that stopped at {self.most}",
        )
        return Table("How well each point is known", columns, tuple(rows))

    def _largest(self) -> Table:
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name, values in self.eigenvalues.items():
            for i, moment in enumerate(self.spectra_at):
                of_replicates = values[:, i]
                cells = [Estimate.mean(of_replicates[:, e].tolist(), "replicate") for e in (0, -1)]
                share = of_replicates.clamp(min=0).sum(1) / self._trace_at(name, moment)[: len(of_replicates)]
                rows.append((name, moment, *cells, Estimate.mean(share.tolist(), "replicate")))
        top = next(iter(self.eigenvalues.values())).shape[2]
        columns = (
            "set",
            "update",
            "largest eigenvalue",
            f"eigenvalue {top}",
            f"the first {top}, of the trace",
        )
        return Table("The largest eigenvalues", columns, tuple(rows))

    def _trace_at(self, name: str, moment: int) -> torch.Tensor:
        return self.traces[name][:, 0, self.moments.index(moment)].abs().clamp(min=1e-12)

    def notes(self) -> tuple[str, ...]:
        """What the work was, and what it would have been."""
        products = sum(self.products.values())
        factor = self.published / products
        return (
            f"The traces took {products:,} example-products (one image's Hessian times one vector). The published "
            f"estimator, {PUBLISHED_PROBES} probes (25 to 45) over all {self.training_images:,} training images and all images "
            f"of each set at each point, would have taken {self.published:,}: {factor:.1f} times as many, most of them for the "
            "real data.",
            f"Measurements of a moment: as many as bring the standard error to {self.error:g} of the trace, {FIRST} to {self.most}. It is "
            "that of the estimator; the intervals over replicates hold it too.",
        )

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """The traces, their ratios to real, the spectral density."""
        panels: dict[str, Callable[[Axes], None]] = {
            "Trace of the Hessian along real training, mean over replicates; bands: standard error of the estimator": self.plot,
            "The same over the trace on the real data": self._plot_ratio,
        }
        if self.densities:
            panels[f"Spectral density after update {self.spectra_at[-1]}, first replicate"] = (
                self._plot_density
            )
        return panels

    def plot(self, ax: Axes) -> None:
        """A line a set."""
        t = [m + 1 for m in self.moments]
        for name in self._drawn():
            mean = self.traces[name].mean((0, 1))
            error = self.errors[name].square().mean((0, 1)).sqrt() / self.errors[name][..., 0].numel() ** 0.5
            ax.plot(t, mean, color=colour(name), label=name.replace("_", " "), lw=2 if name == REAL else 1.5)
            ax.fill_between(t, mean - error, mean + error, color=colour(name), alpha=0.15, lw=0)
        ax.set_ylabel("trace of the Hessian")
        self._finish(ax)

    def _plot_ratio(self, ax: Axes) -> None:
        t = [m + 1 for m in self.moments]
        real = self.traces[REAL].mean((0, 1)).clamp(min=1e-12)
        for name in self._drawn():
            if name != REAL:
                ax.plot(
                    t, self.traces[name].mean((0, 1)) / real, color=colour(name), label=name.replace("_", " ")
                )
        ax.axhline(1, color="black", lw=1)
        ax.set_yscale("symlog", linthresh=0.1)
        ax.set_ylabel("over the real trace")
        self._finish(ax)

    def _plot_density(self, ax: Axes) -> None:
        for name, (nodes, weights) in self.densities.items():
            order = nodes.argsort()
            # A vector sees each eigenvalue in proportion to its number: 1 - cumulative weight is the share above it.
            above = 1 - weights[order].cumsum(0) + weights[order]
            ax.step(
                nodes[order],
                above.clamp(min=1e-12),
                color=colour(name),
                label=name.replace("_", " "),
                where="pre",
            )
        ax.set_yscale("log")
        ax.set_xscale("symlog", linthresh=0.1)
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("share of eigenvalues at or above it")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)

    def _drawn(self) -> list[str]:
        beside = (REAL, *self.compared.values())
        return [REAL, *(name for name in self.traces if name not in beside)]

    def _finish(self, ax: Axes) -> None:
        ax.set_xscale("log")
        ax.set_xlabel("1 + updates of real training")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)

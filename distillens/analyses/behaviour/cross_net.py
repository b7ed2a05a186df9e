"""Distilled sets on other networks than the one they were made with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens import nets
from distillens.analyses.behaviour._grid import on_grid
from distillens.core.checks import UserError, at_least
from distillens.core.contracts import FULL, RANDOM, Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table, units
from distillens.core.rng import Key
from distillens.evaluation.protocol import NEUTRAL, Protocol
from distillens.evaluation.trials import choose, of_full, of_sets
from distillens.nets.alexnet import AlexNet
from distillens.nets.convnet import ConvNet
from distillens.nets.lenet import LeNet
from distillens.nets.mlp import MLP
from distillens.nets.resnet18 import ResNet18
from distillens.nets.vgg11 import VGG11
from distillens.nets.vit import ViT
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

WEAK = 0.5  # a network that gains less of the best possible over chance, on the full data, is called weak
TRIED = 2  # networks that see the full data, of each kind
DISTANCES = ("the same", "other width or depth", "also convolutional", "another family")


@dataclass(frozen=True)
class CrossNet:
    """The accuracy that each set gives each network, and how its gain over random falls with distance from its own.

    The distance is ``nets.distance`` to the network that the set was distilled on, as its provenance says. No rate fits
    all networks: ``recipe`` is tried at each of ``rates`` for every set, the random subset and the full data, and the
    one that is best on validation counts. Labels are the set's own; a step size that it learned is one network's, and
    is left aside.

    Networks that learn little even from the full data are weak: they are shown, and no claim rests on them.
    """

    question: ClassVar[str] = "Is the distilled set tied to the network that it was made with?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps",)

    nets: tuple[Net, ...] = (
        ConvNet(),
        ConvNet(width=64),
        LeNet(),
        AlexNet(),
        VGG11(),
        ResNet18(),
        MLP(),
        ViT(),
    )
    recipe: Recipe = NEUTRAL.recipe
    rates: tuple[float, ...] = NEUTRAL.rates
    models: int = 1
    margin: float = 0.01

    def __post_init__(self) -> None:
        at_least(1, "cross_net", models=self.models)
        at_least(0, "cross_net", margin=self.margin)
        if len(self.nets) < 2 or len(set(self.nets)) < len(self.nets):
            raise UserError(
                "cross_net: networks must be two or more, all different",
                got=", ".join(nets.labels_of(self.nets)) or "none",
            )

    @classmethod
    def defaults(cls, like: Dataset) -> CrossNet:
        """The field's networks for such images; on digits' scale five small ones and 60 full-batch steps of Adam.

        So few steps of SGD leave LeNet and a transformer at chance, at any rate.
        """
        own = ConvNet.defaults(like)
        half = ConvNet(own.depth, own.width // 2)
        if like.shape[1] * like.shape[2] <= 256:
            patch = ViT.defaults(like).patch
            small = (own, half, LeNet.defaults(like), MLP.defaults(like), ViT(patch, depth=1, width=24))
            return cls(small, Recipe(steps=60, optimiser="adam"), rates=(0.003, 0.01))
        others = (LeNet, AlexNet, VGG11, ResNet18, MLP, ViT)
        return cls((own, half, *(kind.defaults(like) for kind in others)))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """One training a set, replicate, network and rate, and the full data's."""
        asked = [
            t for net in self.nets for many in self._asked(sets, net, key).values() for e in many for t in e
        ]
        return asked + [t for net in self.nets for each in self._full(net, real, key) for t in each]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> CrossNetResult:
        """The matrix.

        Raises:
            UserError: there is no random subset beside the sets.
        """
        sets.check_against(real)
        runs.make(self.trainings(sets, real, key=key))
        grid, everything = self._grid(), sets.everything()
        values: dict[str, list[torch.Tensor]] = {name: [] for name in (*everything, FULL)}
        chosen: dict[str, list[str]] = {name: [] for name in everything}
        weak = []
        called = nets.labels_of(self.nets)
        for net, its_name in zip(self.nets, called, strict=True):
            for name, many in self._asked(sets, net, key).items():
                judged = [choose(grid, runs.get(*each), real) for each in many]
                values[name].append(torch.stack([one.accuracy(real.test) for one in judged]))
                counts = Counter(one.candidate.partition(",")[0] for one in judged)
                chosen[name].append(", ".join(f"{n} x {rate}" for rate, n in sorted(counts.items()) if rate))
            full = [choose(grid, runs.get(*each), real) for each in self._full(net, real, key)]
            values[FULL].append(torch.stack([one.accuracy(real.test) for one in full]))
            on_validation = torch.stack([one.accuracy(real.val) for one in full])
            if float(on_validation.mean()) < 1 / real.train.k + WEAK * (1 - 1 / real.train.k):
                weak.append(its_name)
        distances, origins = {}, {}
        for name, replicates in sets.distilled.items():
            own = [nets.made_with(one) for one in replicates]
            known = [net for net in own if net is not None]
            if len(known) == len(own):
                rows = [[nets.distance(net, other) for other in self.nets] for net in known]
                distances[name] = torch.tensor(rows)
            origins[name] = ", ".join(dict.fromkeys(map(nets.label, known)))
        return CrossNetResult(
            called,
            tuple(sets.distilled),
            tuple(everything),
            origins,
            {name: torch.stack(each, 1) for name, each in values.items()},
            distances,
            {name: tuple(each) for name, each in chosen.items()},
            tuple(weak),
            tuple(name for name, many in sets.distilled.items() if many[0].order is not None),
            self.margin,
        )

    def _grid(self) -> Protocol:
        return on_grid(self.recipe, self.rates, self.models)

    def _asked(self, sets: Sets, net: Net, key: Key) -> dict[str, list[list[Training]]]:
        if not sets.random:
            raise UserError("cross_net needs a random subset beside the sets", fix="add one as random_subset")
        return of_sets(self._grid(), net, sets.everything(), key)

    def _full(self, net: Net, real: Splits, key: Key) -> list[list[Training]]:
        return of_full(self._grid(), net, real, TRIED, key)


@dataclass(frozen=True, eq=False)
class CrossNetResult(Result):
    """Test accuracies [replicates, kinds of network, networks of a kind] by set; distances [replicates, kinds].

    ``distances`` has the sets whose distilling network is known.
    """

    analysis: ClassVar[str] = "behaviour/cross_net"
    title: ClassVar[str] = "Distilled sets on other networks"
    question: ClassVar[str] = CrossNet.question

    nets: tuple[str, ...]
    distilled: tuple[str, ...]
    names: tuple[str, ...]
    origins: Mapping[str, str]
    values: Mapping[str, torch.Tensor]
    distances: Mapping[str, torch.Tensor]
    chosen: Mapping[str, tuple[str, ...]]
    weak: tuple[str, ...]
    ordered: tuple[str, ...]
    margin: float

    def accuracy(self, name: str, net: str) -> Estimate:
        """The accuracy of a network that was trained on a set."""
        return Estimate.mean(*units(self.values[name][:, self.nets.index(net)]))

    def gain(self, name: str, net: str) -> Estimate:
        """That accuracy minus the random subset's on the same network, paired."""
        return Estimate.mean(*units(self._gains(name)[:, self.nets.index(net)]))

    def everywhere(self, name: str) -> Estimate:
        """The gain over random, averaged over all networks that learn (over all, where none does)."""
        strong = self._strong()
        gains = self._gains(name)
        return Estimate.mean(*units((gains[:, strong] if bool(strong.any()) else gains).mean(1)))

    def at_distance(self, name: str, distance: int) -> Estimate | None:
        """The gain over random, averaged over the networks at a distance; None where there are none."""
        at = (self.distances[name] == distance) & self._strong()
        if not bool(at.any(1).all()):
            return None
        return Estimate.mean(*units(_mean(self._gains(name), at)))

    def at_home(self, name: str) -> Estimate | None:
        """The gain over random on the network that the set was distilled on, or on the nearest one there is."""
        found = self._home_and_away(name)
        return None if found is None else Estimate.mean(*units(found[0]))

    def away(self, name: str) -> Estimate | None:
        """The gain over random, averaged over all networks that are further away."""
        found = self._home_and_away(name)
        return None if found is None else Estimate.mean(*units(found[1]))

    def loss(self, name: str) -> Estimate | None:
        """The gain at home minus the gain away, paired; None where nothing is known or nothing is further away."""
        found = self._home_and_away(name)
        return None if found is None else Estimate.mean(*units(found[0] - found[1]))

    def slope(self, name: str) -> Estimate | None:
        """How much the gain over random changes with a step of distance: a line through all networks that learn."""
        if self._home_and_away(name) is None:
            return None
        strong = self._strong()
        x = self.distances[name][:, strong].double()
        x = (x - x.mean(1, keepdim=True))[..., None]
        gains = self._gains(name)[:, strong]
        return Estimate.mean(*units((x * gains).sum(1) / x.square().sum(1)))

    def _gains(self, name: str) -> torch.Tensor:
        pairs = min(len(self.values[name]), len(self.values[RANDOM]))
        return self.values[name][:pairs] - self.values[RANDOM][:pairs]

    def _strong(self) -> torch.Tensor:
        return torch.tensor([net not in self.weak for net in self.nets])

    def _home_and_away(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Gains [replicates, networks] on the nearest networks and on all others."""
        if name not in self.distances or not bool(self._strong().any()):
            return None
        gains, strong = self._gains(name), self._strong()
        distances = self.distances[name][: len(gains)]
        nearest = distances[:, strong].amin(1, keepdim=True)
        near, far = (distances == nearest) & strong, (distances > nearest) & strong
        if not bool(far.any(1).all()):
            return None
        return _mean(gains, near), _mean(gains, far)

    def headline(self) -> dict[str, Estimate]:
        """The gain over random of each distilled set on all networks, and what it loses off its own."""
        gains = {f"{name}, gain over random": self.everywhere(name) for name in self.distilled}
        return gains | {f"{name}, loss off its network": loss for name, loss in self._losses().items()}

    def _losses(self) -> dict[str, Estimate]:
        return {name: loss for name in self.distilled if (loss := self.loss(name)) is not None}

    def claims(self) -> tuple[Claim, ...]:
        """Each set is tied to its network."""
        return tuple(
            Claim(
                "tied to its network",
                name,
                "gains more over random on the network that it was made with than on others",
                loss,
                "greater",
                self.margin,
                "a second random subset in the set's place",
                "real images moved by a pixel: a convolutional network as their own, and a perceptron",
            )
            for name, loss in self._losses().items()
        )

    def tables(self) -> tuple[Table, ...]:
        """Accuracies, gains, the loss with distance, and the rates."""
        accuracies: list[tuple[str | int | Estimate, ...]] = [
            (name, self.origins.get(name, ""), *(self.accuracy(name, net) for net in self.nets))
            for name in self.names
        ]
        full = self.values[FULL].flatten(2)
        accuracies.append(
            (
                FULL,
                "",
                *(Estimate.mean(full[:, j].flatten().tolist(), "network") for j in range(len(self.nets))),
            )
        )
        lost = tuple(
            (
                name,
                *(
                    found or ""
                    for found in (self.at_home(name), self.away(name), self.loss(name), self.slope(name))
                ),
            )
            for name in self.distilled
        )
        others = [name for name in self.names if name != RANDOM]
        return (
            Table("Test accuracy, set by network", ("set", "made with", *self.nets), tuple(accuracies)),
            Table(
                "Gain over the random subset on the same network",
                ("set", *self.nets),
                tuple((name, *(self.gain(name, net) for net in self.nets)) for name in others),
            ),
            Table(
                "Gain over random near the distilling network and further away",
                ("set", "nearest", "further away", "difference", "slope a step of distance"),
                lost,
            ),
            Table(
                "Rates chosen on validation",
                ("set", *self.nets),
                tuple((name, *self.chosen[name]) for name in self.names),
            ),
        )

    def notes(self) -> tuple[str, ...]:
        """What the distances are, and which cells say little."""
        found = [
            "Distance: 0 the same network, 1 the same kind in another size, 2 both convolutional, 3 of two families. Rates "
            "are chosen on validation, from one grid for all sets."
        ]
        if self.weak:
            found.append(
                f"Weak networks, which learn little even from the full data (on validation): {', '.join(self.weak)}. No "
                "claim, mean or slope counts them."
            )
        unknown = [name for name in self.distilled if name not in self.distances]
        if unknown:
            found.append(f"Nothing says on which network these were distilled: {', '.join(unknown)}.")
        absent = [name for name, each in self.distances.items() if int(each.min()) > 0]
        if absent:
            found.append(
                f"The distilling network is not among those tried, so the nearest stands in: {', '.join(absent)}."
            )
        if self.ordered:
            found.append(
                f"{', '.join(self.ordered)}: ordered steps at rates of their own, which are replayed on every network: no "
                "rate is chosen for them."
            )
        return tuple(found)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """The matrix; with known networks gain against distance."""
        if not self._losses():
            return {self.title: self.plot}
        return {self.title: self.plot, "Gain over random against distance": self.plot_distance}

    def plot(self, ax: Axes) -> None:
        """Accuracies as numbers, gains over random as colours, the nearest networks in boxes."""
        from matplotlib.patches import Rectangle

        rows = [*self.names, FULL]
        mean = {name: self.values[name].mean((0, 2)) for name in rows}
        gains = torch.stack(
            [torch.zeros(len(self.nets)) if n in (RANDOM, FULL) else mean[n] - mean[RANDOM] for n in rows]
        )
        reach = max(0.02, float(gains.abs().max()))
        ax.imshow(gains.numpy(), cmap="RdBu", vmin=-2 * reach, vmax=2 * reach, aspect="auto")
        for i, name in enumerate(rows):
            for j, net in enumerate(self.nets):
                gain = "" if name in (RANDOM, FULL) else f"\n{round(float(gains[i, j]), 2) + 0.0:+.2f}"
                tint = "#999999" if net in self.weak else "black"
                ax.text(j, i, f"{mean[name][j]:.2f}{gain}", ha="center", va="center", fontsize=8, color=tint)
                if name in self.distances:
                    distances = self.distances[name].float().mean(0)
                    if distances[j] == distances.min():
                        ax.add_patch(Rectangle((j - 0.47, i - 0.45), 0.94, 0.9, fill=False, lw=1.4))
        ax.set_xticks(range(len(self.nets)), [net.replace(" ", "\n") for net in self.nets], fontsize=8)
        made = {name: self.origins.get(name, "") for name in rows}
        ax.set_yticks(range(len(rows)), [f"{n}\n{made[n]}".rstrip() for n in rows], fontsize=8)
        ax.set_xlabel("test accuracy, gain over random below it; box: nearest to the distilling network")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)

    def plot_distance(self, ax: Axes) -> None:
        """The gain over random at each distance, with intervals."""
        names = list(self._losses())
        for i, name in enumerate(names):
            found = [(d, e) for d in range(len(DISTANCES)) if (e := self.at_distance(name, d)) is not None]
            at = [d + 0.06 * (i - (len(names) - 1) / 2) for d, _ in found]
            values = [e.value for _, e in found]
            bars = [[e.value - e.low for _, e in found], [e.high - e.value for _, e in found]]
            known = all(e.n > 1 for _, e in found)
            ax.errorbar(
                at,
                values,
                bars if known else None,
                fmt="o-",
                ms=4,
                lw=1,
                capsize=3,
                color=colour(name),
                label=name,
            )
        ax.axhline(0, color="grey", lw=1, ls=":")
        ax.set_xticks(range(len(DISTANCES)), [f"{d}\n{words}" for d, words in enumerate(DISTANCES)])
        ax.set_xlabel("distance from the distilling network")
        ax.set_ylabel("gain in accuracy over random")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Means [replicates, m] of values [replicates, n, m] over the columns that each replicate's row marks [replicates, n]."""
    marks = where[: len(values), :, None].to(values)
    return (values * marks).sum(1) / marks.sum(1)

"""Which real images a distilled image came from, read from what its method wrote down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from distillens.analyses.pointwise._grid import grid_of
from distillens.analyses.pointwise._jackknife import pseudo_values
from distillens.analyses.pointwise._retrained import first_copy
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.donors import Donors
from distillens.core.palette import colour
from distillens.core.ranks import rank_correlation, ranks
from distillens.core.result import REPLICATE, Claim, Estimate, Result, Table
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLASS = "class (one set: the interval covers no other distillation)"
LEAST = 10  # real images of a class, met in both halves, that donors can be told apart among
FEW = 0.1  # the share of a class's images that are called its strongest donors
TINY = 1e-300  # where nothing moved, nothing is owed
PLACES = 51  # of a curve
ROWS = 512  # images that go through a network at once
SPACES = ("pixels", "features")


@dataclass(frozen=True)
class Provenance:
    """Who the donors of each distilled image are, how few they are, whether they are the same again, and whether they look like it.

    A method with the setting ``donors`` shares out what each step on record adds to the distance of a distilled image from its start: a real
    image's part is what it contributed to the step, along the way so far. A part below 0 held the image back. A real image's
    *rate* is the sum of its parts over the batches that it was in.

    Single parts are mostly noise, and noise alone makes some images look like donors. So steps of even and of odd number are kept
    apart: donors are named in one half and looked at in the other, both ways round. What is left is theirs.

    Similarity: of a class's images the tenth with the highest rates stands against the rest; how likely one of the first is nearer
    to the point than one of the second, less a half; in pixels, and in the features of ``views`` networks that were never trained.

    All replicates are read. Sets without a record are left out; nothing is trained. Ours: the paper has no such experiment.
    """

    question: ClassVar[str] = "Which real images did each distilled image come from?"
    scales: ClassVar[tuple[str, ...]] = ("views",)

    net: Net = field(default_factory=ConvNet)
    views: int = 3
    top: int = 6

    def __post_init__(self) -> None:
        at_least(1, "provenance", views=self.views, top=self.top)

    @classmethod
    def defaults(cls, like: Dataset) -> Provenance:
        """The field's network for such images, three times; once from 28 px on, where all real images pass through it."""
        small = like.shape[1] * like.shape[2] <= 256
        return cls(ConvNet.defaults(like), views=3 if small else 1)

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """None."""
        return []

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> ProvenanceResult:
        """The donors.

        Raises:
            UserError: sets and data do not fit, or a record is of other training images.
        """
        sets.check_against(real)
        recorded = {
            name: replicates
            for name, replicates in sets.distilled.items()
            if all(one.donors is not None for one in replicates)
        }
        for name, replicates in recorded.items():
            check_record(name, replicates, real.train)
        sights = _sights(self.net, self.views, real.train, key) if recorded else []
        found: dict[str, dict[str, Any]] = {}
        few = []
        for name, replicates in recorded.items():
            if min(fewest(one, real.train) for one in replicates) < LEAST:
                few.append(name)
                continue
            first = replicates[0]
            each = [_of_set(one, real.train, sights) for one in replicates]
            found[name] = {
                "figures": {part: torch.stack([one[part] for one in each]) for part in each[0]},
                "agreement": between([totals(one) for one in replicates], real.train),
                "points": first.dataset().pixels()[first_copy(first)],
                "labels": first.labels.hard(),
                "donors": _strongest(first, real.train, self.top),
            }
        parts = ("figures", "agreement", "points", "labels", "donors")
        return ProvenanceResult(
            distilled=tuple(found),
            silent=tuple(name for name in sets.distilled if name not in recorded),
            few=tuple(few),
            **{part: {name: one[part] for name, one in found.items()} for part in parts},
        )


def check_record(name: str, replicates: Sequence[DistilledDataset], train: Dataset) -> None:
    """Refuse a record of other training images than these.

    Raises:
        UserError: it has another number of them.
    """
    for one in replicates:
        known = _donors(one).met.shape[1]
        if known != len(train):
            raise UserError(
                f"provenance: the record of {name!r} is of other training images",
                got=f"{known} images",
                expected=str(len(train)),
                fix="name the data it was made from with --data",
            )


def _donors(one: DistilledDataset) -> Donors:
    assert one.donors is not None
    return one.donors


def _classes(one: DistilledDataset, train: Dataset) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each class its points, and its real images."""
    labels = one.labels.hard().cpu()
    return [((labels == c).nonzero()[:, 0], members.cpu()) for c, members in enumerate(train.by_class)]


def fewest(one: DistilledDataset, train: Dataset) -> int:
    """How many images of a class were met in both halves, in the class with the fewest."""
    both = (_donors(one).met.cpu() > 0).all(0)
    return min(int(both[images].sum()) for _, images in _classes(one, train))


def totals(one: DistilledDataset) -> torch.Tensor:
    """What each real image gave to all points of its class a batch that it was in [n]; -1 times infinity where it was in none."""
    record = _donors(one)
    met = record.met.cpu().sum(0)
    rate = record.parts.cpu().double().sum((0, 1)) / met.clamp(min=1)
    return rate.masked_fill(met == 0, -math.inf)


def between(each: Sequence[torch.Tensor], train: Dataset) -> torch.Tensor:
    """How far replicates agree on who the donors are [R, R]: rank correlations of their totals [n] within a class, mean over classes.

    Over the images that both of them met.
    """
    found = torch.eye(len(each), dtype=torch.float64)
    for a, b in combinations(range(len(each)), 2):
        values = []
        for members in train.by_class:
            first, second = each[a][members.cpu()], each[b][members.cpu()]
            both = first.isfinite() & second.isfinite()
            values.append(float(rank_correlation(first[both], second[both])))
        found[a, b] = found[b, a] = math.fsum(values) / len(values)
    return found


def concentration(parts: torch.Tensor, met: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of one class's parts [2, p, m] and counts [2, m], means over points. Images that one half did not meet are never called donors.

    ``repeats`` is the rank correlation of the images' rates between halves. ``hundredth`` and ``tenth``: donors are the hundredth and the tenth of
    the images with the highest rates in one half; the share of the other half's pull (its positive parts, all points together) that is theirs, less
    the share of its batches that they were in. ``curve`` [PLACES] is the share of the pull up to a place in that order; behind its
    top come images that held the points back. ``net`` is what is left of the pull when those are taken off.
    ``effective`` is the number of equal donors that are as concentrated, 1 / sum p^2 over the positive sums of both halves, and
    ``equal`` what it would be if every batch were shared out equally. Noise lowers ``effective``.
    """
    batches = met.double().sum(1)
    pull = parts.double().clamp(min=0).sum((1, 2))
    net = parts.double().sum((1, 2)) / pull.clamp(min=TINY)
    both = (met > 0).all(0)
    parts, counts = parts[:, :, both].double(), met[:, both].double()
    rates = parts / counts[:, None]
    m = parts.shape[2]
    shares: dict[str, list[torch.Tensor]] = {"hundredth": [], "tenth": []}
    curves = []
    for named, looked_at in ((0, 1), (1, 0)):
        order = rates[named].argsort(dim=1, descending=True)
        way = parts[looked_at].gather(1, order).cumsum(1).sum(0) / pull[looked_at].clamp(min=TINY)
        fair = counts[looked_at].expand_as(order).gather(1, order).cumsum(1).mean(0) / batches[looked_at]
        for name, share in (("hundredth", FEW / 10), ("tenth", FEW)):
            last = _few(m, share) - 1
            shares[name].append((way - fair)[last])
        from_start = torch.cat([way.new_zeros(1), way])
        places = (torch.linspace(0, 1, PLACES, dtype=torch.float64) * m).round().long()
        curves.append(from_start[places])
    positive = parts.sum(0).clamp(min=0)
    positive = positive / positive.sum(1, keepdim=True).clamp(min=TINY)
    squares = positive.square().sum(1).clamp(min=1 / m)
    together = counts.sum(0)
    return {
        "net": net.mean(),
        "repeats": rank_correlation(rates[0], rates[1]).mean(),
        **{name: torch.stack(values).mean() for name, values in shares.items()},
        "curve": torch.stack(curves).mean(0),
        "effective": (1 / squares).mean(),
        "equal": together.sum() ** 2 / together.square().sum(),
    }


def _few(m: int, share: float = FEW) -> int:
    """How many of ``m`` images a share of them is, one at least."""
    return max(1, round(share * m))


def nearness(rates: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """How much likelier than chance a donor is nearer to a point than another image of the class, [p points, p records].

    ``rates`` [p, m] name the donors of each record, ``distances`` [p, m] are those of the points; 0 is chance, 0.5 the most. The
    diagonal is each point with its own donors.
    """
    m = rates.shape[1]
    few = _few(m)
    picked = torch.zeros_like(rates, dtype=torch.float64).scatter_(1, rates.topk(few, 1).indices, 1.0)
    above = ranks(distances) @ picked.T - few * (few + 1) / 2  # how often another image is nearer
    return 0.5 - above / (few * (m - few))


def of_class(
    parts: torch.Tensor, met: torch.Tensor, distances: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All figures of one class, from its points' parts [2, p, m], counts [2, m] and distances [p, m] in each space."""
    found = concentration(parts, met)
    both = (met > 0).all(0)
    rates = parts[:, :, both].double().sum(0) / met[:, both].double().sum(0)
    for space, far in distances.items():
        near = nearness(rates, far[:, both])
        found[space] = near.diagonal().mean()
        if len(near) > 1:
            others = (near.sum(1) - near.diagonal()) / (len(near) - 1)
            found[f"own {space}"] = (near.diagonal() - others).mean()
    return found


@dataclass(frozen=True, eq=False)
class _Sight:
    """Images as vectors, and all real images so."""

    look: Callable[[torch.Tensor], torch.Tensor]
    real: torch.Tensor


def _sights(net: Net, views: int, train: Dataset, key: Key) -> list[_Sight]:
    """Pixels first, then the features of networks that were never trained."""

    def view(place: Key) -> Callable[[torch.Tensor], torch.Tensor]:
        params, buffers = (
            {name: value.to(train.images) for name, value in part.items()} for part in net.init(train, place)
        )

        def look(images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                pieces = [net.features(params, buffers, part)[0] for part in torch.split(images, ROWS)]
            return torch.cat(pieces).flatten(1)

        return look

    looks = [lambda images: images.flatten(1), *(view(key.fold("view", v)) for v in range(views))]
    return [_Sight(look, look(train.images)) for look in looks]


def _of_set(one: DistilledDataset, train: Dataset, sights: Sequence[_Sight]) -> dict[str, torch.Tensor]:
    """The figures of one set, class by class [k, ...]."""
    record = _donors(one)
    parts, met = record.parts.cpu(), record.met.cpu()
    own = one.dataset().images[first_copy(one)]
    ours = [sight.look(own) for sight in sights]
    each = []
    for points, images in _classes(one, train):
        far = [
            torch.cdist(seen[points].double(), sight.real[images].double())
            for seen, sight in zip(ours, sights, strict=True)
        ]
        distances = {"pixels": far[0], "features": torch.stack([f / f.mean() for f in far[1:]]).mean(0)}
        each.append(of_class(parts[:, :, images], met[:, images], distances))
    return {name: torch.stack([found[name] for found in each]) for name in each[0]}


def _strongest(one: DistilledDataset, train: Dataset, top: int) -> torch.Tensor:
    """The images [P, top, c, h, w] that gave each point most a batch, as pixels."""
    record = _donors(one)
    rates = record.parts.cpu().double().sum(0) / record.met.cpu().sum(0).clamp(min=1)
    top = min(top, *map(len, train.by_class))
    places = torch.empty(len(one), top, dtype=torch.long)
    for points, images in _classes(one, train):
        places[points] = images[rates[:, images].topk(top, 1).indices]
    return train.space.to_pixels(train.images[places.flatten()]).view(len(one), top, *train.shape)


@dataclass(frozen=True, eq=False)
class ProvenanceResult(Result):
    """Figures by set: [replicates, classes] each, and how far replicates agree [R, R].

    ``silent`` sets have no record, in ``few`` too few images were met.
    """

    analysis: ClassVar[str] = "pointwise/provenance"
    title: ClassVar[str] = "Where distilled images came from"
    question: ClassVar[str] = Provenance.question

    distilled: tuple[str, ...]
    silent: tuple[str, ...]
    few: tuple[str, ...]
    figures: Mapping[str, Mapping[str, torch.Tensor]]
    agreement: Mapping[str, torch.Tensor]
    points: Mapping[str, torch.Tensor]
    labels: Mapping[str, torch.Tensor]
    donors: Mapping[str, torch.Tensor]

    def figure(self, name: str, part: str) -> Estimate:
        """A figure of a set: its mean over replicates, or over the classes of a single one."""
        values = self.figures[name][part]
        if len(values) == 1:
            return Estimate.mean(values[0].tolist(), CLASS)
        return Estimate.mean(values.mean(1).tolist(), REPLICATE)

    def shared(self, name: str) -> Estimate | None:
        """How far replicates agree on who the donors are; None with one.

        The mean over pairs, with the error of the jackknife over replicates; of two there is no error.
        """
        pairs, count = self.agreement[name], len(self.agreement[name])
        if count < 2:
            return None

        def mean(which: torch.Tensor) -> float:
            return float((pairs[which][:, which].sum() - len(which)) / (len(which) * (len(which) - 1)))

        if count == 2:
            return Estimate(mean(torch.arange(2)), -math.inf, math.inf, 1, "pair of replicates")
        return Estimate.mean(pseudo_values(mean, list(torch.split(torch.arange(count), 1))), REPLICATE)

    def headline(self) -> dict[str, Estimate]:
        """How far donors repeat, and how much a tenth of the images gave beyond its share."""
        found = {}
        for name in self.distilled:
            found[f"{name}: donors agree between halves of the steps"] = self.figure(name, "repeats")
            found[f"{name}: pull of a tenth of the images, beyond its share"] = self.figure(name, "tenth")
        return found

    def claims(self) -> tuple[Claim, ...]:
        """Donors repeat, are few, are shared by replicates, and look like the point."""
        found = []
        for name in self.distilled:
            found += [
                Claim(
                    "donors repeat",
                    name,
                    "the same real images give more in both halves of the steps",
                    self.figure(name, "repeats"),
                    "greater",
                    0.1,
                    "parts shuffled over the images of the class, each half on its own",
                    "parts of both halves that are one number an image with little noise",
                ),
                Claim(
                    "few images give more than their share",
                    name,
                    "a tenth of a class's images, named in one half of the steps, gives more of the other half's pull than its share of the batches",
                    self.figure(name, "tenth"),
                    "greater",
                    0.05,
                    "parts shuffled over the images of the class, each half on its own",
                    "a tenth of the images that gives half of the pull",
                ),
            ]
            shared = self.shared(name)
            if shared is not None:
                found.append(
                    Claim(
                        "replicates share donors",
                        name,
                        "other distillations draw on the same real images",
                        shared,
                        "greater",
                        0.05,
                        "totals shuffled over the images of the class, each replicate on its own",
                        "totals that are one number an image with noise",
                    )
                )
            for space in SPACES:
                found.append(
                    Claim(
                        f"donors look like the point ({space})",
                        name,
                        f"the tenth of the class that gave a point most is nearer to it in {space} than the rest",
                        self.figure(name, space),
                        "greater",
                        0.02,
                        "parts shuffled over the images of the class",
                        "parts that grow with nearness to the point",
                    )
                )
                if f"own {space}" in self.figures[name]:
                    found.append(
                        Claim(
                            f"donors look like their own point ({space})",
                            name,
                            f"a point's donors are nearer to it in {space} than the donors of the class's other points",
                            self.figure(name, f"own {space}"),
                            "greater",
                            0.02,
                            "records shuffled over the points of the class",
                            "parts that grow with nearness to the point",
                        )
                    )
        return tuple(found)

    def tables(self) -> tuple[Table, ...]:
        """How few and how steady donors are, and how like the points."""
        if not self.distilled:
            return ()
        steady: list[tuple[str | int | Estimate, ...]] = []
        alike: list[tuple[str | int | Estimate, ...]] = []
        for name in self.distilled:
            parts = ("repeats", "hundredth", "tenth", "net", "effective", "equal")
            shared = self.shared(name)
            steady.append(
                (
                    name,
                    len(self.agreement[name]),
                    *(self.figure(name, part) for part in parts),
                    shared if shared is not None else "one replicate",
                )
            )
            columns = (column for space in SPACES for column in (space, f"own {space}"))
            alike.append(
                (
                    name,
                    *(
                        self.figure(name, c) if c in self.figures[name] else "one point a class"
                        for c in columns
                    ),
                )
            )
        return (
            Table(
                "How few and how steady the donors are",
                (
                    "set",
                    "replicates",
                    "rank agreement of halves",
                    "a hundredth gives, beyond its share",
                    "a tenth gives, beyond its share",
                    "left of the pull, less what holds back",
                    "effective number of donors",
                    "the same if batches were shared equally",
                    "rank agreement of replicates",
                ),
                tuple(steady),
            ),
            Table(
                "How likely a donor is nearer to the point than another image of its class, less a half",
                (
                    "set",
                    "in pixels",
                    "beyond donors of other points",
                    "in features",
                    "beyond donors of other points, in features",
                ),
                tuple(alike),
            ),
        )

    def notes(self) -> tuple[str, ...]:
        """What has no record, and what a record is not."""
        found = []
        if self.distilled:
            found.append(
                "All donors of a point are of its class: these methods match class by class. Parts say what moved an image, not what it "
                "started from."
            )
            found.append(
                "The effective number of donors counts noise as concentration; the other figures do not."
            )
        if self.silent:
            found.append(
                f"No record of donors: {', '.join(self.silent)}. dm, m3d, ncfm, dc, dsa and idc keep one when they are asked to: "
                "--set dm.donors=true in a study, --set donors=true in distill."
            )
        if self.few:
            found.append(
                f"Too few steps: {', '.join(self.few)}. Of each class {LEAST} images must be met in steps of even and of odd number."
            )
        return tuple(found)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """The curve, then for each set one point of each class and its strongest donors."""
        found: dict[str, Callable[[Axes], None]] = {
            "How much of the pull comes from how few images: named in one half of the steps, counted in the other": self.plot
        }
        for name in self.distilled:
            found[f"{name}: one point of each class and the real images that gave it most"] = grid_of(
                self.points[name], self.donors[name], self.labels[name]
            )
        return found

    def plot(self, ax: Axes) -> None:
        """Concentration curves, beside equal shares."""
        if not self.distilled:
            ax.text(0.5, 0.5, "no set has a record of donors", ha="center", va="center")
            ax.set_axis_off()
            return
        place = torch.linspace(0, 1, PLACES)
        for name in self.distilled:
            curves = self.figures[name]["curve"]  # [R, k, places]
            each = curves[0] if len(curves) == 1 else curves.mean(1)
            ax.plot(place, each.mean(0), color=colour(name), lw=1.8, label=name)
            if len(each) > 1:
                error = each.std(0) / len(each) ** 0.5
                low, high = each.mean(0) - error, each.mean(0) + error
                ax.fill_between(place, low, high, color=colour(name), alpha=0.15, lw=0)
        ax.plot([0, 1], [0, 1], color="grey", lw=1, ls=":", label="equal shares")
        ax.set_xlabel("share of the class's images, the strongest donors of the other half first")
        ax.set_ylabel("share of the pull, less what holds back")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)

"""The values of distilled pixels over the whole set: range, distance to real ones, power spectrum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.core.checks import UserError, positive
from distillens.core.contracts import RANDOM, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.result import REPLICATE, Claim, Estimate, Result, Table, paired
from distillens.core.rng import Key
from distillens.core.space import ROWS
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOLERANCE = 1e-3  # what leaves [0, 1] by less than this is rounding on the way out of a space
LEVEL = (
    1e-4  # real training pixels are counted on levels so far apart: the distance errs by half of it at most
)
SMOOTH = 0.02  # standard deviation of the kernel that densities are drawn with
REAL, UNSEEN = "real", "real, unseen"
IMAGE = "image of one replicate"


@dataclass(frozen=True)
class Pixels:
    """All pixels of all images of each set, in natural units, beside the real training split.

    Share outside [0, 1], extremes, Wasserstein-1 distance to the real pixels of each channel, and the power spectrum.
    Beside every set: the random subset of its replicate, and for the tables unseen real images (of the validation split).
    ``single_test`` and ``singles`` name images to draw alone, as the paper does: one of the test split, and for each set in
    its turn one of its first class.

    Source: Yang et al. 2024, section 3 (figure 3, left): three single images. The whole set is ours.
    """

    question: ClassVar[str] = "Which values do distilled pixels take, and are they those of real pixels?"
    scales: ClassVar[tuple[str, ...]] = ()

    tolerance: float = TOLERANCE
    single_test: int | None = None
    singles: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        positive("pixels", tolerance=self.tolerance)
        if (self.single_test is None) != (not self.singles):
            raise UserError(
                "pixels: single images are drawn beside one of the test split",
                got=f"single_test={self.single_test}, singles={self.singles}",
                fix="name both or neither",
            )

    @classmethod
    def defaults(cls, like: Dataset) -> Pixels:
        """The same for all data: nothing is trained."""
        return cls()

    @classmethod
    def as_published(cls, like: Dataset) -> Pixels:
        """Beside the whole sets the paper's single images: test image 3, images 9 and 8 of the sets' first class.

        Theirs are of DM (9) and TM (8): the first set here is drawn by its image 9, the second by 8, and so on.
        """
        return cls(single_test=3, singles=(9, 8))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """None."""
        return []

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> PixelsResult:
        """Range, distance and spectrum of every set."""
        sets.check_against(real)
        shown = {
            name: tuple(one.dataset().pixels() for one in many) for name, many in sets.everything().items()
        }
        size = len(next(iter(shown.values()))[0])
        replicates = max(map(len, shown.values()))
        shown[UNSEEN] = tuple(_drawn(real.val, size, key.fold("unseen", r)) for r in range(replicates))
        levels = _levels(real.train)
        grid = _grid(shown)
        densities = {
            name: torch.stack([_density(x.flatten(), grid) for x in many]) for name, many in shown.items()
        }
        waves = {name: [_Power.of([x]) for x in many] for name, many in shown.items()}
        waves[REAL] = [_Power.of(_pieces(real.train))]
        return PixelsResult(
            tuple(sets.distilled),
            tuple(sets.baselines),
            self.tolerance,
            sets.space.invertible,
            {name: _outside(many, self.tolerance) for name, many in shown.items()},
            {name: torch.stack([torch.stack(x.aminmax()) for x in many]) for name, many in shown.items()},
            {name: torch.stack([_distance(x, levels) for x in many]) for name, many in shown.items()},
            grid,
            densities | {REAL: _density_of_levels(levels, grid)[None]},
            torch.arange(1, min(real.train.shape[1:]) // 2 + 1) / min(real.train.shape[1:]),
            {name: torch.stack([one.spectrum for one in many]) for name, many in waves.items()},
            {name: torch.stack([one.fine for one in many]) for name, many in waves.items()},
            self._alone(sets, real),
        )

    def _alone(self, sets: Sets, real: Splits) -> dict[str, torch.Tensor]:
        """The pixels of the single images, by what they are."""
        if self.single_test is None:
            return {}
        if self.single_test >= len(real.test):
            raise UserError(
                "pixels: there is no such test image",
                got=str(self.single_test),
                expected=f"0 to {len(real.test) - 1}",
            )
        test = real.test.take(torch.tensor([self.single_test]))
        found = {f"test image {self.single_test}": test.pixels().flatten()}
        for place, (name, many) in enumerate(sets.distilled.items()):
            data = many[0].dataset()
            first = data.by_class[0]
            wanted = self.singles[place % len(self.singles)]
            chosen = min(wanted, len(first) - 1)  # a smaller class gives its last
            image = data.take(first[chosen : chosen + 1]).pixels()
            found[f"{name}, image {chosen} of class {data.classes[0]}"] = image.flatten()
        return found


@dataclass(frozen=True, eq=False)
class PixelsResult(Result):
    """Shares outside by replicate and image, extremes [replicates, 2], distances [replicates, channels], by set.

    Densities [replicates, grid] at the pixel values ``grid``; power [replicates, frequencies] at ``frequencies`` in
    cycles a pixel; the share of the power above half the highest frequency, [replicates].
    """

    analysis: ClassVar[str] = "behaviour/pixels"
    title: ClassVar[str] = "Pixel values of whole sets"
    question: ClassVar[str] = Pixels.question

    distilled: tuple[str, ...]
    baselines: tuple[str, ...]
    tolerance: float
    exact: bool
    outside: Mapping[str, tuple[torch.Tensor, ...]]
    extremes: Mapping[str, torch.Tensor]
    distances: Mapping[str, torch.Tensor]
    grid: torch.Tensor
    densities: Mapping[str, torch.Tensor]
    frequencies: torch.Tensor
    power: Mapping[str, torch.Tensor]
    fine: Mapping[str, torch.Tensor]
    alone: Mapping[str, torch.Tensor]

    def share_outside(self, name: str) -> Estimate:
        """The share of pixels outside [0, 1], over replicates; over the images of a single set."""
        many = self.outside[name]
        if len(many) == 1:
            return Estimate.mean(many[0].tolist(), IMAGE)
        return Estimate.mean([float(one.mean()) for one in many], REPLICATE)

    def distance(self, name: str) -> Estimate:
        """The Wasserstein-1 distance to real training pixels, averaged over channels."""
        return Estimate.mean(self.distances[name].mean(1).tolist(), REPLICATE)

    def other_values(self, name: str) -> Estimate | None:
        """The distance of a set minus that of the random subset of its size, paired."""
        return self._beside_random({key: value.mean(1) for key, value in self.distances.items()}, name)

    def spectral_distance(self, name: str) -> torch.Tensor:
        """How far the log10 power lies from the real images', root mean square over frequencies, [replicates]."""
        gap = self.power[name].log10() - self.power[REAL].log10()
        return gap.square().mean(1).sqrt()

    def other_spectrum(self, name: str) -> Estimate | None:
        """The spectral distance of a set minus that of the random subset of its size, paired."""
        shown = [name, *([RANDOM] if RANDOM in self.power else [])]
        return self._beside_random({one: self.spectral_distance(one) for one in shown}, name)

    def slope(self, name: str) -> Estimate:
        """How log10 power falls with log10 frequency, by least squares."""
        x = self.frequencies.double().log10()
        x = x - x.mean()
        return Estimate.mean(((self.power[name].log10() * x).sum(1) / x.square().sum()).tolist(), REPLICATE)

    def _beside_random(self, values: Mapping[str, torch.Tensor], name: str) -> Estimate | None:
        if RANDOM not in values:
            return None
        first, second = values[name], values[RANDOM]
        pairs = min(len(first), len(second))
        return paired(first[:pairs].tolist(), second[:pairs].tolist(), REPLICATE)

    def headline(self) -> dict[str, Estimate]:
        """The share outside [0, 1] (the distance to real pixels where a space keeps no exact pixels)."""
        read = self.share_outside if self.exact else self.distance
        return {name: read(name) for name in [*self.distilled, *self.baselines]}

    def claims(self) -> tuple[Claim, ...]:
        """It leaves the valid range; its values and its spectrum are not those of real images."""
        claims = []
        for name in self.distilled:
            if self.exact:
                claims.append(
                    Claim(
                        "leaves the valid range",
                        name,
                        "more than one pixel in a hundred lies outside [0, 1]",
                        self.share_outside(name),
                        "greater",
                        0.01,
                        "a random real subset in the set's place, of which no pixel does",
                        "real images of twice their contrast in the set's place",
                        "paper T10",
                    )
                )
            values, spectrum = self.other_values(name), self.other_spectrum(name)
            if values is not None:
                claims.append(
                    Claim(
                        "other pixel values than real",
                        name,
                        "its pixel values lie further from real training pixels (Wasserstein-1) than those of a "
                        "random real subset of its size",
                        values,
                        "greater",
                        0.0,
                        "a second random real subset in the set's place",
                        "real images of a little more brightness in the set's place",
                    )
                )
            if spectrum is not None:
                claims.append(
                    Claim(
                        "other spectrum than real",
                        name,
                        "its power spectrum (log) lies further from real training images' than that of a random "
                        "real subset of its size",
                        spectrum,
                        "greater",
                        0.0,
                        "a second random real subset in the set's place",
                        "real images with noise in the set's place",
                    )
                )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Range and distance; spectrum."""
        names = [*self.distilled, *self.baselines, UNSEEN]
        channels = next(iter(self.distances.values())).shape[1]
        each = range(channels if channels > 1 else 0)
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name in names:
            low, high = (Estimate.mean(self.extremes[name][:, side].tolist(), REPLICATE) for side in (0, 1))
            more = self.other_values(name) if name in self.distilled else None
            by_channel = (Estimate.mean(self.distances[name][:, c].tolist(), REPLICATE) for c in each)
            rows.append(
                (name, self.share_outside(name), low, high, self.distance(name), more or "", *by_channel)
            )
        columns = ("set", "share outside [0, 1]", "lowest", "highest", "distance", "more than random")
        spectra: list[tuple[str | int | Estimate, ...]] = []
        for name in [*names, REAL]:
            more = self.other_spectrum(name) if name in self.distilled else None
            spectra.append(
                (
                    name,
                    self.slope(name),
                    Estimate.mean(self.fine[name].tolist(), REPLICATE),
                    Estimate.mean(self.spectral_distance(name).tolist(), REPLICATE),
                    more or "",
                )
            )
        return (
            Table(
                "Pixel values of whole sets, and their Wasserstein-1 distance to real training pixels",
                (*columns, *(f"distance, channel {c}" for c in each)),
                tuple(rows),
            ),
            Table(
                "Power spectrum",
                (
                    "set",
                    "slope (log-log)",
                    "share in high frequencies",
                    "distance to real",
                    "more than random",
                ),
                tuple(spectra),
            ),
        )

    def notes(self) -> tuple[str, ...]:
        """What counts as outside, and what stands beside."""
        notes = [
            f"Outside [0, 1] is what leaves it by more than {self.tolerance:g}; a density is drawn with a kernel of "
            f"standard deviation {SMOOTH:g}.",
            "A small set of real images has a distance to the real pixels too: that of random and of unseen images "
            "is what a set is read against. High frequencies are above 0.25 cycles a pixel.",
        ]
        if not self.exact:
            notes.append(
                "The space keeps no exact pixels: these are likenesses with the average brightness and contrast, of "
                "which real ones leave [0, 1] too. There is no claim about the range."
            )
        alone = [name for name in self.distilled if len(self.outside[name]) == 1]
        if alone:
            notes.append(
                f"{', '.join(alone)}: one set. The interval of its share outside covers its images; distances "
                "and spectra have none."
            )
        return tuple(notes)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Densities, spectra and, as published, single images."""
        found: dict[str, Callable[[Axes], None]] = {
            "Density of all pixels of all images of each set (mean over replicates); shaded: outside [0, 1]": self.plot,
            "Radially averaged power spectrum of each set, mean over replicates": self.plot_spectrum,
        }
        if self.alone:
            found[
                "As published: kernel density of single images. One image says nothing of its set; the whole sets are "
                "in the first figure"
            ] = self.plot_alone
        return found

    def plot(self, ax: Axes) -> None:
        """The density of pixel values of each set."""
        x = self.grid.tolist()
        for side in ((x[0], 0.0), (1.0, x[-1])):
            if side[1] > side[0]:
                ax.axvspan(*side, color="#F3E9E4", lw=0)
        real = self.densities[REAL][0]
        ax.fill_between(x, real.tolist(), color="#BBBBBB", alpha=0.6, lw=0, label="real training split")
        for name in [*self.distilled, *self.baselines]:
            tone = 1.8 if name in self.distilled else 1.1
            ax.plot(x, self.densities[name].mean(0).tolist(), color=colour(name), lw=tone, label=name)
        ax.set_yscale("log")
        peak = max(float(each.max()) for each in self.densities.values())
        ax.set_ylim(1e-3, 2 * peak)
        ax.set_xlim(x[0], x[-1])
        ax.set_xlabel("pixel value")
        ax.set_ylabel("density (log)")
        _legend(ax)

    def plot_spectrum(self, ax: Axes) -> None:
        """Power against frequency, both in log."""
        x = self.frequencies.tolist()
        ax.plot(
            x,
            self.power[REAL][0].tolist(),
            color=colour("real"),
            lw=2.5,
            alpha=0.5,
            label="real training split",
        )
        for name in [*self.distilled, *self.baselines]:
            tone = 1.8 if name in self.distilled else 1.1
            ax.plot(
                x,
                self.power[name].mean(0).tolist(),
                color=colour(name),
                lw=tone,
                marker="o",
                ms=3,
                label=name,
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ticks = [x[0], *(t for t in (0.125, 0.25, 0.5) if t > 1.2 * x[0])]
        ax.set_xticks(ticks, [f"{t:.3g}" for t in ticks])
        ax.minorticks_off()
        ax.set_xlabel("cycles a pixel (log)")
        ax.set_ylabel("power (log)")
        _legend(ax)

    def plot_alone(self, ax: Axes) -> None:
        """The paper's figure: a kernel density of one image each."""
        from scipy.stats import gaussian_kde

        for name, values in self.alone.items():
            tint = colour("real") if name.startswith("test image") else colour(name.split(", image")[0])
            if float(values.max() - values.min()) < 1e-6:
                ax.axvline(float(values[0]), color=tint, label=name)  # one value has no density
                continue
            kernel = gaussian_kde(values.double().numpy())
            reach = 3 * float(kernel.factor * values.double().std())
            x = torch.linspace(float(values.min()) - reach, float(values.max()) + reach, 200)
            y = kernel(x.numpy())
            ax.fill_between(x.tolist(), y, color=tint, alpha=0.1, lw=0)
            ax.plot(x.tolist(), y, color=tint, lw=1.4, label=name)
        for edge in (0, 1):
            ax.axvline(edge, color="grey", lw=0.8, ls=":")
        ax.set_xlabel("pixel value of one image")
        ax.set_ylabel("kernel density")
        _legend(ax)


def _legend(ax: Axes) -> None:
    ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    ax.spines[["top", "right"]].set_visible(False)


def _pieces(data: Dataset) -> Iterator[torch.Tensor]:
    """The pixels some at a time: those of all training images need not lie in memory twice."""
    for images in torch.split(data.images, ROWS):
        yield data.space.to_pixels(images)


def _drawn(data: Dataset, size: int, key: Key) -> torch.Tensor:
    """As many images as a set has, or all there are, as equal a number of each class as the data allows."""
    each = [members[key.fold(c).permutation(len(members))] for c, members in enumerate(data.by_class)]
    deep = max(map(len, each))
    turns = [members[place] for place in range(deep) for members in each if place < len(members)]
    return data.take(torch.stack(turns[:size])).pixels()


def _outside(many: tuple[torch.Tensor, ...], tolerance: float) -> tuple[torch.Tensor, ...]:
    """The share of each image's numbers that leave [0, 1] by more than the tolerance, [n] for each replicate."""
    return tuple(((x < -tolerance) | (x > 1 + tolerance)).double().flatten(1).mean(1).cpu() for x in many)


Levels = list[tuple[torch.Tensor, torch.Tensor]]


def _levels(data: Dataset) -> Levels:
    """For each channel the levels that pixels take, on a grid of ``LEVEL``, and how many pixels each has.

    Piece by piece: millions of numbers become some thousand levels, of which the distance is exact.
    """
    counted: list[Counter[int]] = [Counter() for _ in range(data.shape[0])]
    for pixels in _pieces(data):
        for c, seen in enumerate(counted):
            level, count = torch.unique((pixels[:, c] / LEVEL).round().long(), return_counts=True)
            seen.update(dict(zip(level.tolist(), count.tolist(), strict=True)))
    found = []
    for seen in counted:
        level = torch.tensor(sorted(seen))
        found.append((level * LEVEL, torch.tensor([seen[int(v)] for v in level], dtype=torch.float64)))
    return found


def _distance(pixels: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Wasserstein-1 of the pixels [n, c, h, w] of each channel to the real ones, [c]."""
    from scipy.stats import wasserstein_distance

    return torch.tensor(
        [
            wasserstein_distance(
                pixels[:, c].flatten().double().numpy(force=True), level.numpy(), None, count.numpy()
            )
            for c, (level, count) in enumerate(levels)
        ],
        dtype=torch.float64,
    )


def _grid(shown: Mapping[str, tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """The pixel values that densities are drawn at: all but one in a thousand on either side."""
    import numpy as np

    ends = [np.quantile(x.numpy(force=True), (0.001, 0.999)) for many in shown.values() for x in many]
    low, high = min(float(e[0]) for e in ends), max(float(e[1]) for e in ends)
    return torch.linspace(min(low, 0) - 4 * SMOOTH, max(high, 1) + 4 * SMOOTH, 400)


def _density(values: torch.Tensor, grid: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The density at evenly spaced places: counts between them, smoothed by a normal kernel. What lies beyond is not seen."""
    from scipy.ndimage import gaussian_filter1d

    step = float(grid[1] - grid[0])
    edges = torch.cat([grid[:1] - step / 2, grid + step / 2]).double().cpu()
    values = values.double().cpu()
    counts, _ = torch.histogram(values, edges, weight=weights)
    total = float(len(values) if weights is None else weights.sum())
    smooth = gaussian_filter1d(counts.numpy() / total / step, SMOOTH / step, mode="constant")
    return torch.from_numpy(smooth)


def _density_of_levels(levels: Levels, grid: torch.Tensor) -> torch.Tensor:
    values, counts = (torch.cat(parts) for parts in zip(*levels, strict=True))
    return _density(values, grid, counts)


@dataclass(frozen=True)
class _Power:
    """The power [h, w] at each frequency, mean over images and channels, and how fast each is, in cycles a pixel."""

    power: torch.Tensor
    speed: torch.Tensor

    @staticmethod
    def of(pieces: Iterable[torch.Tensor]) -> _Power:
        """The power of images [n, c, h, w] that come in pieces, without their mean brightness."""
        total, seen = torch.zeros(()), 0
        for part in pieces:
            part = part.double()
            waves = torch.fft.fft2(part - part.mean((2, 3), keepdim=True))
            h, w = part.shape[2:]
            total = total + (waves.abs().square().sum((0, 1)) / (h * w)).cpu()
            seen += len(part) * part.shape[1]
        h, w = total.shape
        speed = torch.fft.fftfreq(h)[:, None].square() + torch.fft.fftfreq(w)[None].square()
        return _Power(total / seen, speed.sqrt().double())

    @property
    def spectrum(self) -> torch.Tensor:
        """The mean over rings one cycle an image wide (of the shorter side), up to half a cycle a pixel.

        Nothing of it is 0, so that it has a logarithm.
        """
        side = min(self.power.shape)
        ring = (self.speed * side).round().long()
        return torch.stack([self.power[ring == r].mean() for r in range(1, side // 2 + 1)]).clamp(min=1e-12)

    @property
    def fine(self) -> torch.Tensor:
        """The share above a quarter of a cycle a pixel, corners of the spectrum included."""
        return self.power[self.speed > 0.25].sum() / self.power[self.speed > 0].sum().clamp(min=1e-12)

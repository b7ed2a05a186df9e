"""NCFM, neural characteristic function matching."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from distillens import augment
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, one_of, positive
from distillens.core.contracts import Log, Net, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.decode import MultiFormation
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.distillers._donors import begun, credited, over_length, recorded, way_back
from distillens.distillers._features import (
    Draws,
    Loss,
    View,
    by_class,
    classes_at_once,
    draws_of,
    felt,
    matching_bytes,
    of_stored,
    per_class,
    slope,
)
from distillens.distillers._formations import (
    decoded,
    in_pixels,
    in_range,
    mixed,
    out_of_pixels,
    per_pixel,
)
from distillens.distillers._pixels import (
    AS_THEY_ARE,
    Init,
    adam_moved,
    finished,
    initial,
    real_index,
    small,
    with_moments,
)
from distillens.nets.convnet import ConvNet
from distillens.train import Population, Training

BETAS = (0.9, 0.999)  # PyTorch's
GAIN = 300.0  # of the discrepancy, in the authors' ``match_loss``
THRESHOLD = 1e-4  # PyTorch's: what is not lower by this share is no better
LATENT, HIDDEN, LEAK = 16, 64, 0.2  # the sampler's sizes and the slope of its rectifier below 0
FLOAT = 4  # bytes


@dataclass(frozen=True)
class NCFM:
    """Each class's features get the characteristic function of those of the real images.

    Phi(t) = mean exp(i t.z) over the L2-normalised features z of a class, at ``num_freqs`` frequencies t ~ N(0, I).
    Loss of a class: 300 mean_t sqrt(a (|Phi_T| - |Phi_S|)^2 + (1 - a) 2 (|Phi_T| |Phi_S| - Re Re - Im Im)), plus
    ``calibration`` times the cross-entropy of the distilled images under a trained network. At a = 1/2 the root is
    |Phi_T - Phi_S| / sqrt(2). f cuts each stored image in ``factor``^2 patches, each enlarged to full size.

    Networks: ``n_nets`` trainings on the real data; each step draws one, mixes its initial and its trained weights (and
    what it remembers, as batch norm does) in a random share, and calibrates by the trained one. They run in evaluation
    mode, by the statistics they have stored.

    With ``sampler`` the frequencies are a scale mixture of normals, t = exp(tanh(g(u))) n with u and n normal: g is a
    small network that climbs the loss while the images go down it. It begins at N(0, I), and scales stay within
    [1/e, e]. Off, as in the published results.

    ``stepping``: AdamW moves and decays every image at every step. ``by_class`` makes 2 k steps of it a step of ours,
    as the authors do: first a class's discrepancy, then a class's cross-entropy, each on the whole tensor. How far an
    image moves then depends on how many classes there are, and in the authors' program on how many devices share them.
    ``summed`` (the default) makes one step for the sum; an image moves about sqrt(2 k) times less a step.

    ``donors`` writes down which real images the discrepancy's gradient came from (``shares``).

    Source: Wang et al. 2025; ``NCFM.py``, ``Condenser.py``, ``compute_loss.py``. Where we differ:
    real batches are drawn anew (their loader gives the first 1,024 images every time) and gradients are those of the
    present pixels (theirs are up to ten steps old); all classes share a step's frequencies; the sampler gives each
    frequency scales of its own (theirs had 4 different frequencies) and climbs by Adam, once a step; networks train
    at a constant rate; pixels are cut to [0, 1] after every step, the last too; noise is standard normal in the data's
    space.
    """

    paper: ClassVar[str] = "Wang et al. 2025"
    family: ClassVar[str] = "distribution"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False

    steps: int = 20_000
    num_freqs: int = 4096
    amplitude: float = 0.5
    calibration: float = 1.0
    lr_img: float = 0.001
    weight_decay: float = 5e-4
    patience: int = 500
    stepping: Literal["summed", "by_class"] = "summed"
    sampler: bool = False
    lr_sampler: float = 0.001
    batch_real: int = 1024
    factor: int = 2
    augment: str = "color+crop+cutout"
    init: Init = "real"
    n_nets: int = 20
    recipe: Recipe = Recipe(
        steps=60 * 196,
        batch=256,
        weight_decay=5e-4,
        augment="flip+color+crop_scale_rotate",
        cutmix=0.5,
    )
    net: Net = field(default_factory=ConvNet)
    donors: bool = False

    def __post_init__(self) -> None:
        at_least(
            0,
            "ncfm",
            steps=self.steps,
            calibration=self.calibration,
            weight_decay=self.weight_decay,
            patience=self.patience,
        )
        at_least(
            1,
            "ncfm",
            num_freqs=self.num_freqs,
            batch_real=self.batch_real,
            factor=self.factor,
            n_nets=self.n_nets,
        )
        positive("ncfm", lr_img=self.lr_img, lr_sampler=self.lr_sampler)
        if not 0 <= self.amplitude <= 1:
            raise UserError("ncfm: amplitude is a share", got=f"{self.amplitude!r}", expected="0 to 1")
        one_of("stepping", self.stepping, ("summed", "by_class"))
        one_of("init", self.init, ("real", "noise"))
        augment.parse(self.augment)

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> NCFM:
        """The authors' values, networks trained for 60 passes; on digits' scale a short version of whole images."""
        net = ConvNet.defaults(like)
        if small(like):
            return cls(
                steps=300,
                num_freqs=256,
                lr_img=0.02 if ipc == 1 else 0.01,
                batch_real=64,
                factor=1,
                augment="",
                n_nets=5,
                recipe=Recipe(steps=50, batch=256, cutmix=0.5),
                net=net,
            )
        published = cls(net=net)
        passes = 60 * math.ceil(len(like) / 256)
        return cls(recipe=published.recipe.but(steps=passes), net=net)

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Networks trained on the real data, with what they began as."""
        keys = problem.shared.fold("ncfm").split(self.n_nets)
        return {"networks": Training(problem.real, self.net, self.recipe, keys, snapshots=(0,))}

    def start(self, problem: Problem) -> State:
        """Images whose patches are real images made smaller, or noise, within the range of pixels; the sampler.

        Raises:
            UserError: donors are asked for under a network that mixes images.
        """
        real = problem.real
        images = mixed(problem, self.factor) if self.init == "real" else initial(problem, "noise")
        tensors = {"images": in_range(images, real.space)}
        if self.sampler:
            width = self._views(problem, problem.key)[0].width(problem)
            tensors["sampler"] = fresh_sampler(width, problem.key.fold("sampler")).to(real.images)
        return begun(problem, with_moments(tensors, rate=self.lr_img, bad=0), self.net, self.donors)

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One step of the images, or one for each term and class; one of the sampler, where there is one."""
        key, k, like = problem.key.fold("step", i), problem.real.k, problem.real
        view, trained = self._views(problem, key.fold("net"))
        index = real_index(problem, key.fold("real"), self.batch_real)
        real = like.images[index]
        draws, others = (draws_of(self.augment, key.fold(name), k) for name in ("augment", "calibration"))
        climb = state.tensors["sampler"].detach().requires_grad_() if self.sampler else None
        frequencies = self._frequencies(view, problem, climb, key.fold("frequencies"))
        fixed = frequencies.detach()
        features: list[torch.Tensor] = []

        def summary(part: torch.Tensor) -> torch.Tensor:
            return characteristic(part, fixed)

        def of_real(part: torch.Tensor) -> torch.Tensor:
            if self.donors:
                features.append(part)
            return summary(part)

        target = view.targets(real, draws, of_real, like)

        def matching(own: torch.Tensor, part: slice) -> torch.Tensor:
            found = summary(view.features(decoded(own, self.factor), draws[part]))
            return GAIN * distance(target[part], found, self.amplitude)

        def calibrating(own: torch.Tensor, part: slice) -> torch.Tensor:
            logits = trained.logits(decoded(own, self.factor), others[part])
            classes = torch.arange(k, device=own.device)[part, None].expand(logits.shape[:2])
            losses = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none")
            return self.calibration * losses.reshape(classes.shape).mean(1)

        terms: dict[str, Loss] = {"loss": matching}
        if self.calibration:
            terms["calibration"] = calibrating

        def with_donors(state: State, gradient: torch.Tensor, classes: range) -> State:
            part = slice(classes.start, classes.stop)
            parts = self._shares(problem, state, gradient, part, view, draws, torch.cat(features), fixed)
            return credited(state, index[part], parts, i)

        after, sums = self._moved(problem, state, terms, i, with_donors if self.donors else None)
        after = State(after.tensors, self._judged(after.values, sum(sums.values()) / k))
        if climb is not None:
            uphill = self._uphill(problem, view, real, state.tensors["images"], draws, fixed)
            (gradient,) = torch.autograd.grad(frequencies, climb, uphill)
            after = adam_moved(after, -gradient, self.lr_sampler, BETAS, i, "sampler")
        return after, {**sums, "rate": float(after.values["rate"])}

    def _views(self, problem: Problem, key: Key) -> tuple[View, View]:
        """A random mixture of a network's initial and trained weights, and the trained network."""
        networks: Population = problem.inputs["networks"]
        j = int(key.fold("which").integers(self.n_nets, 1))
        return (
            blend(self.net, problem, networks, j, float(key.fold("share").uniform(1))),
            blend(self.net, problem, networks, j, 1.0),
        )

    def _frequencies(
        self, view: View, problem: Problem, sampler: torch.Tensor | None, key: Key
    ) -> torch.Tensor:
        """Frequencies [f, d]: normal, or differentiable in the sampler."""
        noise = key.fold("noise").normal(self.num_freqs, view.width(problem)).to(problem.real.images)
        if sampler is None:
            return noise
        return sampled(sampler, key.fold("latent").normal(self.num_freqs, LATENT).to(noise), noise)

    def _moved(
        self,
        problem: Problem,
        state: State,
        terms: Mapping[str, Loss],
        i: int,
        told: Callable[[State, torch.Tensor, range], State] | None = None,
    ) -> tuple[State, dict[str, float]]:
        """The images after step i, and each term's sum over classes.

        ``told`` is given a state, the gradient [m, n, c, h, w] of the discrepancy there, and of which classes.
        """
        k, space = problem.real.k, problem.real.space
        together = classes_at_once(self.net, "evaluate", self._shown(problem), problem.real)
        turns: list[tuple[tuple[str, ...], range]] = [(tuple(terms), range(k))]
        if self.stepping == "by_class":
            turns = [((name,), range(c, c + 1)) for name in terms for c in range(k)]
        sums = dict.fromkeys(terms, 0.0)
        for turn, (names, classes) in enumerate(turns):
            own = by_class(state.tensors["images"], k)
            gradient = torch.zeros_like(own)
            for name in names:
                losses, found = slope(own, terms[name], together, classes)
                gradient[classes.start : classes.stop] += found
                sums[name] += float(losses.sum())
                if told is not None and name == "loss":
                    state = told(state, found, classes)
            rate = float(state.values["rate"])
            pixels, pulled = in_pixels(space, state.tensors["images"], gradient.flatten(0, 1))
            # AdamW: what decays is the image, not the gradient.
            decayed = State(
                {**state.tensors, "images": pixels * (1 - rate * self.weight_decay)}, state.values
            )
            after = adam_moved(decayed, pulled, rate, BETAS, i * len(turns) + turn)
            state = State(
                {**after.tensors, "images": out_of_pixels(space, after.tensors["images"])}, after.values
            )
        return State(
            {**state.tensors, "images": in_range(state.tensors["images"], space)}, state.values
        ), sums

    def _shares(
        self,
        problem: Problem,
        state: State,
        gradient: torch.Tensor,
        part: slice,
        view: View,
        draws: Draws,
        real: torch.Tensor,
        frequencies: torch.Tensor,
    ) -> torch.Tensor:
        """What each real image, with features ``real`` [k, b, d], gave to the way of the images of some classes [m, n, b]."""
        images = state.tensors["images"]

        def stepped(change: torch.Tensor) -> torch.Tensor:
            return per_pixel(problem.real.space, images, change.flatten(0, 1)).view_as(change)

        every = torch.zeros_like(by_class(images, problem.real.k))
        every[part] = gradient
        back = way_back(state, stepped(every))
        own, ways = by_class(images, problem.real.k)[part], stepped(back)[part]
        together = classes_at_once(self.net, "evaluate", self._shown(problem), problem.real)
        at, moving = felt(view, own, ways, draws[part], together, self.factor)
        parts = shares(real[part], at, moving, frequencies, self.amplitude)
        return over_length(of_stored(parts, self.factor), back[part])

    def _judged(self, values: Mapping[str, float | int | str], loss: float) -> dict[str, float | int | str]:
        """The values after a step of this mean loss: the rate is halved after ``patience`` + 1 steps without a best."""
        if "best" not in values or loss < float(values["best"]) * (1 - THRESHOLD):
            return {**values, "best": loss, "bad": 0}
        bad = int(values["bad"]) + 1
        if bad <= self.patience:
            return {**values, "bad": bad}
        return {**values, "rate": 0.5 * float(values["rate"]), "bad": 0}

    def _uphill(
        self,
        problem: Problem,
        view: View,
        real: torch.Tensor,
        images: torch.Tensor,
        draws: Draws,
        frequencies: torch.Tensor,
    ) -> torch.Tensor:
        """The slope [f, d] of the discrepancy in the frequencies, class by class: a second look at the images."""
        own = by_class(images, problem.real.k)
        total = torch.zeros_like(frequencies)
        for c in range(problem.real.k):
            part = slice(c, c + 1)
            with torch.no_grad():
                theirs = view.features(real[part], draws[part])
                ours = view.features(decoded(own[part], self.factor), draws[part])
            leaf = frequencies.detach().requires_grad_()
            found = distance(characteristic(theirs, leaf), characteristic(ours, leaf), self.amplitude)
            total += torch.autograd.grad(GAIN * found.sum(), leaf)[0]
        return total

    def _shown(self, problem: Problem) -> int:
        """Decoded images of a class."""
        return problem.ipc * self.factor**2

    def work(self, problem: Problem) -> float:
        """A forward of the real batch, forward and backward of the decoded images for each term; the sampler's look."""
        real, ours = per_class(problem, self.batch_real), self._shown(problem)
        terms = 2 if self.calibration else 1
        again = real + ours if self.sampler else 0
        return self.steps * problem.real.k * (real + 3.0 * terms * ours + again)

    def memory(self, problem: Problem) -> float:
        """The graph of the decoded images that go together, and the phases of what is looked at, at every frequency."""
        real, ours = per_class(problem, self.batch_real), self._shown(problem)
        seen = [classes_at_once(self.net, "evaluate", n, problem.real) * n for n in (real, ours)]
        width = View.fresh(self.net, problem, Key(0)).width(problem)
        # The phase, its cosine and its sine.
        phases = 3.0 * FLOAT * self.num_freqs * sum(seen)
        return (
            matching_bytes(self.net, "evaluate", problem, real, ours)
            + phases
            + FLOAT * self.num_freqs * (width + 2 * problem.real.k)
        )

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images, with how they decode, and their donors where they were asked for."""
        decode = AS_THEY_ARE if self.factor == 1 else MultiFormation(self.factor)
        return replace(finished(problem, state.tensors["images"], decode=decode), donors=recorded(state))


def blend(net: Net, problem: Problem, networks: Population, j: int, share: float) -> View:
    """Network j between its initial (0) and its trained (1) weights; what it remembers between the two likewise."""
    like = problem.real.images
    mixture = torch.lerp(networks.at(0)[j].to(like), networks.final[j].to(like), share)
    buffers = {}
    if networks.buffers:
        _, begun = net.init(problem.real, problem.shared.fold("ncfm", j, "init"))
        for name, ended in networks.buffers.items():
            buffers[name] = torch.lerp(begun[name].to(like), ended[j].to(like), share)
    return View(net, networks.shapes.unflatten(mixture), buffers, "evaluate")


def characteristic(features: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Real and imaginary part [m, 2, f] of each class's characteristic function, from features [m, n, d].

    Features count by their direction only.
    """
    phase = F.normalize(features, dim=2) @ frequencies.T
    return torch.stack([phase.cos().mean(1), phase.sin().mean(1)], 1)


def distance(real: torch.Tensor, distilled: torch.Tensor, amplitude: float = 0.5) -> torch.Tensor:
    """The distance [m] of characteristic functions [m, 2, f], averaged over frequencies."""
    return distances(real, distilled, amplitude).mean(1)


def distances(real: torch.Tensor, distilled: torch.Tensor, amplitude: float) -> torch.Tensor:
    """How far characteristic functions [m, 2, f] are apart at each frequency [m, f].

    Equal ones have the distance 0 and no gradient.
    """
    lengths = [_root(phi.square().sum(1)) for phi in (real, distilled)]
    apart = (lengths[0] - lengths[1]).square()
    turned = 2 * (lengths[0] * lengths[1] - (real * distilled).sum(1))
    return _root(amplitude * apart + (1 - amplitude) * turned)


def shares(
    real: torch.Tensor,
    at: torch.Tensor,
    moving: torch.Tensor,
    frequencies: torch.Tensor,
    amplitude: float,
) -> torch.Tensor:
    """What each real image, with features ``real`` [k, b, d], gave to the way of each distilled one of its class [k, n, b].

    ``at`` [k, n, d] are the features of the distilled images and ``moving`` their derivatives along the way. Given how long the real
    characteristic function and the distance are at each frequency, the distance's derivative is a sum over the real images' own
    exp(i t.z); that each has a hand in these two numbers, which scale all terms alike, is left out.
    """
    b, n = real.shape[1], at.shape[1]
    phi_real, phi = characteristic(real, frequencies), characteristic(at, frequencies)

    def waves(features: torch.Tensor) -> torch.Tensor:
        each = characteristic(features.flatten(0, 1)[:, None], frequencies)
        return each.reshape(*features.shape[:2], *each.shape[1:])

    change: torch.Tensor = (
        torch.func.jvp(waves, (at,), (moving,))[1] / n
    )  # [k, n, 2, f]: one image moves, the mean by an n-th
    long, short = (_root(one.square().sum(1))[:, None] for one in (phi_real, phi))
    shorter = (phi[:, None] * change).sum(2) / short.clamp(min=torch.finfo(short.dtype).tiny)
    apart = distances(phi_real, phi, amplitude)[:, None]
    slope = GAIN * torch.where(apart > 0, 1 / (2 * apart), 0.0) / len(frequencies)
    alone = (2 * amplitude * (short - long) + 2 * (1 - amplitude) * long) * shorter
    along = 2 * (1 - amplitude) * slope[:, :, None] * change
    common = (slope * alone).sum(2, keepdim=True)
    found: torch.Tensor = (common - along.flatten(2) @ waves(real).flatten(2).mT) / b
    return found


def _root(x: torch.Tensor) -> torch.Tensor:
    """The square root, 0 and without a slope where there is nothing above rounding (rounding may fall below 0)."""
    there = x > torch.finfo(x.dtype).eps ** 2
    return torch.where(there, x, 1.0).sqrt() * there


def _shapes(width: int) -> Shapes:
    """The sampler's parameters."""
    return Shapes(
        ("hidden.weight", "hidden.bias", "scale.weight", "scale.bias"),
        ((HIDDEN, LATENT), (HIDDEN,), (width, HIDDEN), (width,)),
    )


def fresh_sampler(width: int, key: Key) -> torch.Tensor:
    """A sampler's parameters [P] for frequencies of that width: every scale is 1."""
    bound = 1 / math.sqrt(LATENT)
    return _shapes(width).flatten(
        {
            "hidden.weight": key.fold("weight").uniform(HIDDEN, LATENT, low=-bound, high=bound),
            "hidden.bias": key.fold("bias").uniform(HIDDEN, low=-bound, high=bound),
            "scale.weight": torch.zeros(width, HIDDEN),
            "scale.bias": torch.zeros(width),
        }
    )


def sampled(sampler: torch.Tensor, latent: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Frequencies [f, d]: normal numbers, each row on scales of its own, which the sampler makes of ``latent``."""
    p = _shapes(noise.shape[1]).unflatten(sampler)
    hidden = F.leaky_relu(F.linear(latent, p["hidden.weight"], p["hidden.bias"]), LEAK)
    return noise * F.linear(hidden, p["scale.weight"], p["scale.bias"]).tanh().exp()

"""What methods share that match the gradients of classes: the network, the match, its training in between."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from distillens import augment, cost, kernels
from distillens.augment import Draw, Mix
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import at_least, one_of, positive
from distillens.core.contracts import Buffers, Like, Log, Net, Params, Problem, State, logits_of_many
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.distillers._donors import EVERY, begun, credited, over_length, recorded, told, way_back
from distillens.distillers._pixels import (
    Init,
    begin,
    check_finite,
    classes_together,
    drawn,
    finished,
    initial,
    moved,
    real_batch,
    real_index,
)
from distillens.nets.convnet import ConvNet

NUMBERS = 1 << 23  # gradients of single real images held at a time, as numbers
EPSILON = 1e-6  # beside the lengths of two gradients, as DC's code has it
SETTLE = 16  # real images a class that set the statistics of batch norm (``BNSizePC`` of DC's code)

# Gradients [rows, ...] of some weights, twice -> how far they are apart; rows are output units of all classes.
Distance = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]
# Stored images [m, n, c, h, w] of the m classes from the given one on -> those to train on, [m, n', c, h, w].
Decoding = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Network:
    """A network on its way through training: parameters [P], SGD's velocity [P], and what it remembers itself."""

    net: Net
    shapes: Shapes
    flat: torch.Tensor
    velocity: torch.Tensor
    buffers: Buffers

    @staticmethod
    def fresh(net: Net, problem: Problem, key: Key) -> Network:
        """A network at rest, where the real images live."""
        params, buffers = drawn(net, problem, key)
        shapes = Shapes.of(params)
        flat = shapes.flatten(params)
        return Network(net, shapes, flat, torch.zeros_like(flat), buffers)

    @staticmethod
    def recalled(net: Net, problem: Problem, tensors: Mapping[str, torch.Tensor]) -> Network:
        """The network that ``tensors`` wrote down."""
        params, buffers = net.init(problem.real, Key(0))  # for its names and shapes alone
        kept = {name: tensors[f"net.buffer.{name}"] for name in buffers}
        return Network(net, Shapes.of(params), tensors["net"], tensors["net.velocity"], kept)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The network as tensors by name, for a state."""
        kept = {f"net.buffer.{name}": value for name, value in self.buffers.items()}
        return {"net": self.flat, "net.velocity": self.velocity, **kept}

    @property
    def params(self) -> Params:
        """The parameters by name."""
        return self.shapes.unflatten(self.flat)

    def settled(self, problem: Problem, key: Key) -> Network:
        """The network with the statistics that matching holds constant; as it is where it remembers nothing.

        As DC's code has it: one pass in training mode over 16 real images of every class together.
        """
        if not self.buffers:
            return self
        images = real_batch(problem, key, SETTLE).flatten(0, 1)
        with torch.no_grad():
            _, buffers = self.net.logits(self.params, self.buffers, images, "train")
        return replace(self, buffers=buffers)

    def stepped(self, images: torch.Tensor, labels: torch.Tensor, mix: Mix | None, recipe: Recipe) -> Network:
        """The network after one step of SGD on the mean loss of a batch; with CutMix, on both labels of each image."""
        leaf = self.flat.detach().requires_grad_()
        seen = images if mix is None else mix.images(images)
        logits, buffers = self.net.logits(self.shapes.unflatten(leaf), self.buffers, seen, "train")
        loss = F.cross_entropy(logits, labels)
        if mix is not None:
            share, partners = mix.share(images), labels[mix.partner.to(labels.device)]
            loss = (1 - share) * loss + share * F.cross_entropy(logits, partners)
        (gradient,) = torch.autograd.grad(loss, leaf)
        if recipe.weight_decay:
            gradient = gradient + recipe.weight_decay * self.flat
        velocity = recipe.momentum * self.velocity + gradient if recipe.momentum else gradient
        after = {name: value.detach() for name, value in buffers.items()}
        return replace(self, flat=self.flat - recipe.lr * velocity, velocity=velocity, buffers=after)


def trained(
    network: Network, images: torch.Tensor, labels: torch.Tensor, recipe: Recipe, key: Key
) -> Network:
    """The network after ``recipe.steps`` of SGD; batches run through a fresh permutation each pass.

    Raises:
        DivergedError: the parameters are not finite; the state before the step is kept.
    """
    labels = labels.to(images.device)
    batch = recipe.batch or len(images)
    a_pass = math.ceil(len(images) / batch)
    order: tuple[torch.Tensor, ...] = ()
    for step in range(recipe.steps):
        if step % a_pass == 0:
            order = torch.split(key.fold(step // a_pass).permutation(len(images)), batch)
        index = order[step % a_pass]
        draw = augment.draw(recipe.augment, key.fold("augment", step), len(index))
        h, w = images.shape[2:]
        mix = augment.draw_mix(recipe.cutmix, key.fold("cutmix", step), len(index), (h, w))
        network = network.stepped(augment.apply(images[index], draw), labels[index], mix, recipe)
    check_finite(network.flat, "the inner network", "lr_net")
    return network


@dataclass(frozen=True, eq=False)
class Match:
    """How gradients of classes are matched: those of which weights, how far apart, what the network sees.

    ``draws`` is one siamese augmentation a class, for its real and its distilled images; ``shown`` is how many images a
    class the decoding gives.
    """

    weights: tuple[str, ...]
    distance: Distance
    draws: Sequence[Draw | None]
    shown: int
    decode: Decoding

    def targets(self, network: Network, like: Like, real: torch.Tensor) -> list[torch.Tensor]:
        """The gradients [k * units, ...] of each class's mean loss on its real images [k, b, c, h, w].

        As many classes at a time as a cache holds.
        """
        targets = []
        with kernels.for_targets():
            together = classes_together(real.shape[1], like)
            for first in range(0, len(real), together):
                seen = self.augmented(real[first : first + together], first)
                targets.append(self.gradients(network, seen, _classes(seen, first), keep=False))
        return [torch.cat(parts) for parts in zip(*targets, strict=True)]

    def slope(
        self, network: Network, like: Like, target: Sequence[torch.Tensor], images: torch.Tensor
    ) -> tuple[float, torch.Tensor]:
        """The distance from the targets, and its gradient [k * n, c, h, w] in the stored images [k, n, c, h, w].

        As many classes at a time as a cache holds: the distance is a sum over classes, so it is the same.
        """
        k = len(images)
        total, pieces = 0.0, []
        together = classes_together(self.shown, like)
        for first in range(0, k, together):
            leaf = images[first : first + together].detach().requires_grad_()
            seen = self.augmented(self.decode(leaf, first), first)
            rows = [t.reshape(k, -1, *t.shape[1:])[first : first + together].flatten(0, 1) for t in target]
            ours = self.gradients(network, seen, _classes(seen, first), keep=True)
            loss = self.distance(rows, ours)
            pieces.append(torch.autograd.grad(loss, leaf)[0].flatten(0, 1))
            total += float(loss.detach())
        return total, torch.cat(pieces)

    def augmented(self, images: torch.Tensor, first: int) -> torch.Tensor:
        """The images [m, n, c, h, w] of the classes from ``first`` on, each class under its draw."""
        draws = self.draws[first : first + len(images)]
        if not any(draws):
            return images
        return torch.stack([augment.apply(own, draw) for own, draw in zip(images, draws, strict=True)])

    def gradients(
        self, network: Network, x: torch.Tensor, classes: torch.Tensor, keep: bool
    ) -> list[torch.Tensor]:
        """The gradients [m * units, ...] of the mean loss on each row of images [m, n, c, h, w] of ``classes`` [m].

        A class's gradient is that of a network of its own: the classes are a population with the same parameters.
        """
        leaves, loss = self.loss(network, x, classes)
        return [g.flatten(0, 1) for g in torch.autograd.grad(loss, leaves, create_graph=keep)]

    def loss(
        self, network: Network, x: torch.Tensor, classes: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The sum over rows of images [m, n, c, h, w] of the mean loss on each, and what it depends on: the weights [m, ...]."""
        m = len(x)
        leaves = {
            n: p.detach().expand(m, *p.shape).clone().requires_grad_() for n, p in network.params.items()
        }
        buffers = {name: value.expand(m, *value.shape) for name, value in network.buffers.items()}
        logits, _ = logits_of_many(network.net, leaves, buffers, x, "evaluate")
        labels = classes.repeat_interleave(x.shape[1])
        loss = m * F.cross_entropy(logits.flatten(0, 1), labels)
        return [leaves[name] for name in self.weights], loss


def _classes(images: torch.Tensor, first: int) -> torch.Tensor:
    """The classes [m] of images [m, ...], from ``first`` on."""
    return torch.arange(first, first + len(images), device=images.device)


def as_they_are(images: torch.Tensor, first: int) -> torch.Tensor:
    """Stored images that are those to train on."""
    return images


def cosine(
    first: Sequence[torch.Tensor], second: Sequence[torch.Tensor], eps: float = EPSILON
) -> torch.Tensor:
    """Sum over weights and their output units of 1 - cosine (DC's equation 9); rows are output units."""
    total = first[0].new_zeros(())
    for a, b in zip(first, second, strict=True):
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        alike = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)
        total = total + (1 - alike).sum()
    return total


def squared(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of squared differences."""
    return torch.stack([(a - b).square().sum() for a, b in zip(first, second, strict=True)]).sum()


def absolute(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of absolute differences."""
    return torch.stack([(a - b).abs().sum() for a, b in zip(first, second, strict=True)]).sum()


def match_work(problem: Problem, batch_real: int, shown: int) -> float:
    """Forward passes of one match: 2.9 a real image and 7.8 a distilled one."""
    return problem.real.k * (2.9 * real_images(problem, batch_real) + 7.8 * shown)


def match_memory(net: Net, problem: Problem, batch_real: int, shown: int) -> float:
    """Bytes of the classes that are taken together: second order for the distilled images, first for the real."""
    one, like = cost.cost(net, problem.real), problem.real
    real = real_images(problem, batch_real)
    ours, theirs = (min(like.k, classes_together(n, like)) for n in (shown, real))
    return max(ours * one.step(shown), theirs * real * one.first)


def real_images(problem: Problem, batch_real: int) -> int:
    """Real images a class in a match: no more than the smallest class has."""
    return min(batch_real, min(map(len, problem.by_class)))


def shares(
    network: Network,
    match: Match,
    target: Sequence[torch.Tensor],
    real: torch.Tensor,
    images: torch.Tensor,
    ways: torch.Tensor,
) -> torch.Tensor:
    """What each real image of a batch gives to the distance when images [k, n, c, h, w] move along ways of that shape, [k, n, b].

    The target is the mean of the real images' own gradients, and the distance's derivative along a way is a sum over them (``Push``): exactly
    for ``squared``, given the length of the target for ``cosine``. An image's part is its own term.
    """
    k, b = len(images), real.shape[1]
    rows = [t.reshape(k, t.shape[0] // k, -1) for t in target]
    pulls, common = _pushes(network, match, rows, images, ways)
    classes = torch.arange(k, device=real.device)[:, None]
    size = max(1, NUMBERS // pulls.shape[2])
    found = []
    for c in range(k):
        theirs = match.augmented(real[c : c + 1], c)[0]
        parts = []
        with kernels.for_targets():
            for piece in torch.split(theirs, size):  # each image a class of its own
                alone = match.gradients(network, piece[:, None], classes[c].expand(len(piece)), keep=False)
                flat = torch.cat([g.reshape(len(piece), -1) for g in alone], 1)
                parts.append(pulls[c] @ flat.T)
        found.append((torch.cat(parts, 1) + common[c, :, None]) / b)
    return torch.stack(found)


def _pushes(
    network: Network,
    match: Match,
    rows: Sequence[torch.Tensor],
    images: torch.Tensor,
    ways: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a real image's own gradient is multiplied with, flat and for each stored image [k, n, p], and what is added, [k, n]."""
    push = PUSHES[match.distance]
    k, n = images.shape[:2]
    together = max(1, NUMBERS // (match.shown * sum(network.params[name].numel() for name in match.weights)))
    pulls, common = [], []
    for first in range(0, k, together):
        part = slice(first, first + together)
        seen, way, still = (
            match.augmented(match.decode(x, first), first)
            for x in (images[part], ways[part], torch.zeros_like(ways[part]))
        )
        m, views = seen.shape[:2]
        labels = _classes(seen, first).repeat_interleave(views)
        # Stored images as plain as their number say which of them a view is a part of.
        plain = torch.arange(n, device=images.device).to(images)[None, :, None, None, None]
        whose = match.decode(plain.expand_as(images[part]), first).flatten(2).mean(2).round().long()
        whose = F.one_hot(whose, n).mT.to(images) / views  # [m, n, views]: of the mean over views

        leaf = seen.flatten(0, 1)[:, None].detach().requires_grad_()  # each view a class of its own
        weights, loss = match.loss(network, leaf, labels)
        by_image, *at = torch.autograd.grad(loss, [leaf, *weights], create_graph=True)
        # Decoding and augmentation are affine in the image: what they do to a difference is exact.
        moving = torch.autograd.grad(by_image, weights, (way - still).flatten(0, 1)[:, None])
        pieces, added = [], images.new_zeros(m, n)
        for wanted, slope, change in zip(rows, at, moving, strict=True):
            t = wanted[part]  # [m, units, ...]
            s = slope.detach().reshape(m, views, *t.shape[1:]).mean(1)
            move = (whose @ change.reshape(m, views, -1)).view(m, n, *t.shape[1:])
            piece, more = push(t, s, move)
            pieces.append(piece.flatten(2))
            added = added + more
        pulls.append(torch.cat(pieces, 2))
        common.append(added)
    return torch.cat(pulls), torch.cat(common)


# Rows [m, units, q] of a class's target t and own gradient s, and derivatives [m, n, units, q] of s as each image moves -> the factors [m, n, units, q]
# and what is added to their products with a real image's own gradient g [m, n], for that image's term of the distance's derivative.
Push = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _by_cosine(t: torch.Tensor, s: torch.Tensor, move: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Given |t| a row's 1 - t.s / (|t| |s|) is a sum over real images, of -(g / b).s / (|t| |s|).

    That each image has a hand in |t| too, which scales a row's terms all alike, is left out.
    """
    long, short = t.norm(dim=2)[:, None, :, None], s.norm(dim=2)[:, None, :, None]
    s, both = s[:, None], long * short + EPSILON
    stretch = (move * s).sum(3, keepdim=True) * long / short.clamp(min=torch.finfo(s.dtype).tiny)
    return (stretch * s / both - move) / both, move.new_zeros(move.shape[:2])


def _by_square(t: torch.Tensor, s: torch.Tensor, move: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The derivative of |t - s|^2 is 2 (s - t).s', and t the mean of the g: exactly a sum."""
    return -2 * move, 2 * (move * s[:, None]).sum((2, 3))


PUSHES: Mapping[Distance, Push] = {cosine: _by_cosine, squared: _by_square}


@dataclass(frozen=True)
class Alternating(ABC):
    """Settings and pieces of matching under a network that is trained on the distilled set in turn.

    One step of ours is one outer iteration of the authors': a fresh network, ``outer_loop`` matching steps,
    ``inner_loop`` passes of training on S after each but the last. Where the network remembers statistics (batch norm), a pass
    over 16 real images a class sets them before each match, which holds them constant; training moves them on.

    ``donors`` writes down which real images the images moved towards (``shares``): of one match in ``donors_every``, one a step at most, drawn
    at random, since it costs about two more.
    """

    paper: ClassVar[str] = ""
    family: ClassVar[str] = "gradient"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False

    steps: int = 1000
    outer_loop: int = 1
    inner_loop: int = 1
    lr_img: float = 0.1
    momentum: float = 0.5
    lr_net: float = 0.01
    batch_real: int = 256
    batch_train: int = 256
    init: Init = "noise"
    net: Net = field(default_factory=ConvNet)
    donors: bool = False
    donors_every: int = EVERY

    def __post_init__(self) -> None:
        name = type(self).__module__.rpartition(".")[2]
        at_least(0, name, steps=self.steps, momentum=self.momentum, inner_loop=self.inner_loop)
        positive(name, lr_img=self.lr_img, lr_net=self.lr_net)
        at_least(
            1,
            name,
            outer_loop=self.outer_loop,
            batch_real=self.batch_real,
            batch_train=self.batch_train,
            donors_every=self.donors_every,
        )
        one_of("init", self.init, ("real", "noise"))
        augment.parse(self.strategy)

    @property
    @abstractmethod
    def strategy(self) -> str:
        """How images are augmented, "" for not at all: one draw a class in matching, one an image in training."""

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def start(self, problem: Problem) -> State:
        """The initial images.

        Raises:
            UserError: donors are asked for under a network that mixes images.
        """
        return begun(problem, begin(initial(problem, self.init)), self.net, self.donors)

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One outer iteration: a fresh network is matched and trained in turn."""
        key = problem.key.fold("step", i)
        network = Network.fresh(self.net, problem, key.fold("net"))
        weights = tuple(name for name, p in network.params.items() if p.ndim > 1)
        k = problem.real.k
        on_record = told(key, self.outer_loop, self.donors_every)
        total = 0.0
        for turn in range(self.outer_loop):
            place = key.fold("turn", turn)
            network = network.settled(problem, place.fold("settle"))
            index = real_index(problem, place.fold("real"), self.batch_real)
            real = problem.real.images[index]
            draws = [augment.draw(self.strategy, place.fold("augment", c)) for c in range(k)]
            match = Match(weights, cosine, draws, problem.ipc, as_they_are)
            images = state.tensors["images"]
            own = images.reshape(k, problem.ipc, *images.shape[1:])
            target = match.targets(network, problem.real, real)
            loss, gradient = match.slope(network, problem.real, target, own)
            if self.donors and turn == on_record:
                back = way_back(state, gradient.reshape(own.shape))
                parts = shares(network, match, target, real, own, back)
                state = credited(state, index, over_length(parts, back), i)
            state = moved(state, gradient, self.lr_img, self.momentum)
            total += loss
            if turn < self.outer_loop - 1:
                images, labels = state.tensors["images"], problem.labels()
                network = trained(network, images, labels, self.training(problem), place.fold("train"))
        return state, {"loss": total / self.outer_loop}

    def training(self, problem: Problem) -> Recipe:
        """What the network goes through between two matches: plain SGD on the distilled images."""
        batches = math.ceil(problem.real.k * problem.ipc / self.batch_train)
        return Recipe(
            steps=self.inner_loop * batches,
            batch=self.batch_train,
            lr=self.lr_net,
            momentum=0.0,
            augment=self.strategy,
        )

    def work(self, problem: Problem) -> float:
        """Those of the matches, and 2.9 an image that the network is trained on."""
        matching = self.outer_loop * match_work(problem, self.batch_real, problem.ipc)
        training = (self.outer_loop - 1) * self.inner_loop * problem.real.k * problem.ipc * 2.9
        return self.steps * (matching + training)

    def memory(self, problem: Problem) -> float:
        """That of a match."""
        return match_memory(self.net, problem, self.batch_real, problem.ipc)

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images, and their donors where they were asked for."""
        return replace(finished(problem, state.tensors["images"]), donors=recorded(state))


# Matching steps and training passes between them, by images a class (``get_loops`` of the authors' code).
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


def loops(ipc: int) -> dict[str, Any]:
    """The authors' loops: the nearest row of their table."""
    outer, inner = LOOPS[min(LOOPS, key=lambda known: abs(known - ipc))]
    return {"outer_loop": outer, "inner_loop": inner}

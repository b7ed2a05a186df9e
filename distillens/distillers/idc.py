"""IDC, gradient matching on real networks, with several images in one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from distillens import augment
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, one_of, positive
from distillens.core.contracts import Log, Net, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.decode import MultiFormation
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.distillers._donors import EVERY, begun, credited, over_length, recorded, told, way_back
from distillens.distillers._formations import decoded, in_range, mixed, per_pixel
from distillens.distillers._gradient import (
    PUSHES,
    Match,
    Network,
    absolute,
    cosine,
    match_memory,
    match_work,
    shares,
    squared,
    trained,
)
from distillens.distillers._pixels import (
    AS_THEY_ARE,
    Init,
    begin,
    finished,
    initial,
    moved,
    real_index,
    small,
)
from distillens.nets.convnet import ConvNet

METRICS = {"mse": squared, "l1": absolute, "cos": cosine}
DIMENSIONS = {"convolutions": (4,), "weights": (2, 3, 4), "all": (1, 2, 3, 4)}  # of the parameters that count


@dataclass(frozen=True)
class IDC:
    """Gradients are matched under a network that learns from real data; a stored image holds several small ones.

    min_S  E_theta  sum_c  Dist(grad L(A(T_c); theta), grad L(A(f(S)_c); theta)), theta trained on **real** data.
    f cuts each stored image in ``factor``^2 patches and enlarges each to full size; ``factor`` 1 is IDC-I. At most
    ``batch_syn_max`` of a class's images are seen a step. Dist (``metric``) is the sum of squared (``mse``) or absolute (``l1``)
    differences, or of 1 - cosine over output units (``cos``), over the gradients of ``layers``.

    One step of ours is one inner iteration of theirs: a match, then about ``n_data`` real images of training, with
    CutMix. After ``inner_loop * fix_iter`` steps a fresh network takes its place, trained for ``early`` passes before it is used;
    the network between steps is part of the state. Each ``inner_loop`` steps pixels are brought into [0, 1].

    ``lr_img`` is the authors': of pixels in [0, 1], for 10 images a class of ``base`` pixels a side; the rate that is used
    grows with the images a class and the area. ``stepping`` is how a match moves the images: ``class`` as the authors' code,
    class after class with one optimiser on all images, so that each class moves on with what is left of its speed
    in the steps of the others; ``sum`` once, by the gradient of the sum. The published rates belong to ``class``, which
    costs no more here (a class's gradient does not depend on the others' images), so it is the default.

    ``donors`` writes down which real images steps came from, of one match in ``donors_every`` at random; not for ``metric=l1``.

    Source: Kim et al. 2022, equations 5 and 6, algorithm 1; ``condense.py``. Batch norm as DC: a pass over 16 real images a
    class sets its statistics before each match, which holds them constant (their networks have instance norm). Where we
    differ: the stored images are in the data's space and are moved there as their pixels would be; the network that is
    about to be dropped is not trained once more; images start from means over blocks, not from every other pixel.
    """

    paper: ClassVar[str] = "Kim et al. 2022"
    family: ClassVar[str] = "gradient"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False

    steps: int = 200_000
    inner_loop: int = 100
    fix_iter: int = 1
    early: int = 0
    factor: int = 2
    metric: Literal["mse", "l1", "cos"] = "mse"
    layers: Literal["convolutions", "weights", "all"] = "convolutions"
    stepping: Literal["class", "sum"] = "class"
    lr_img: float = 5e-3
    base: int = 32
    momentum: float = 0.5
    batch_real: int = 64
    batch_syn_max: int = 128
    augment: str = "color+crop+cutout"
    n_data: int = 2000
    batch_train: int = 64
    lr_net: float = 0.01
    momentum_net: float = 0.9
    weight_decay: float = 5e-4
    augment_net: str = "color+crop"
    cutmix: float = 0.5
    init: Init = "real"
    net: Net = field(default_factory=ConvNet)
    donors: bool = False
    donors_every: int = EVERY

    def __post_init__(self) -> None:
        at_least(0, "idc", steps=self.steps, early=self.early, n_data=self.n_data, momentum=self.momentum)
        at_least(1, "idc", inner_loop=self.inner_loop, fix_iter=self.fix_iter, factor=self.factor)
        at_least(1, "idc", batch_real=self.batch_real, batch_syn_max=self.batch_syn_max)
        at_least(1, "idc", base=self.base, donors_every=self.donors_every)
        positive("idc", lr_img=self.lr_img)
        if self.momentum >= 1:
            raise UserError("idc: momentum must be below 1", got=f"{self.momentum!r}")
        one_of("metric", self.metric, METRICS)
        one_of("layers", self.layers, DIMENSIONS)
        one_of("stepping", self.stepping, ("class", "sum"))
        one_of("init", self.init, ("real", "noise"))
        augment.parse(self.augment)
        augment.parse(self.augment_net)
        if self.donors and METRICS[self.metric] not in PUSHES:
            raise UserError(
                "idc keeps no record of donors for this metric: a step follows the signs of differences, which are no one image's",
                got=f"metric={self.metric}",
                fix="set metric=mse or metric=cos, or leave donors out",
            )
        self._recipe(0)  # refuses what no training could be

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> IDC:
        """The authors' values for CIFAR-10, grey images and ImageNet's size; on digits' scale a short IDC-I."""
        net = ConvNet.defaults(like)
        channels, side = like.shape[0], min(like.shape[1:])
        if small(like):
            # A digit of 4 x 4, enlarged, shows too little; moving and mixing digits did not help on validation.
            quick: dict[str, Any] = {"steps": 100, "inner_loop": 10, "batch_real": 32, "n_data": 64}
            plain: dict[str, Any] = {"factor": 1, "augment": "", "augment_net": "", "cutmix": 0.0}
            return cls(**quick, **plain, lr_img=0.3, base=8, net=net)
        if side >= 128:
            return cls(
                steps=50_000,
                early=10,
                factor=3,
                metric="l1",
                lr_img=3e-3,
                base=224,
                n_data=500,
                cutmix=1.0,
                net=net,
            )
        if channels == 1:
            return cls(metric="l1", lr_img=1e-4, base=28, n_data=500, net=net)
        return cls(net=net)

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def start(self, problem: Problem) -> State:
        """The initial images, and the first network.

        Raises:
            UserError: the network has none of the layers whose gradients are matched, or donors are asked for under one that mixes
                images.
        """
        images = mixed(problem, self.factor) if self.init == "real" else initial(problem, self.init)
        network = Network.fresh(self.net, problem, problem.key.fold("net"))
        if not self._weights(network):
            raise UserError(
                f"idc matches the gradients of {self.layers}, and this network has none",
                got=type(self.net).__name__,
                fix="set layers=weights",
            )
        # The first step brings the images into the range of pixels: that is no way.
        state = begun(problem, begin(in_range(images, problem.real.space)), self.net, self.donors)
        return State({**state.tensors, "images": images, **network.tensors()}, state.values)

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One match, and the network's training after it."""
        key = problem.key.fold("step", i)
        k, n = problem.real.k, problem.ipc
        images, labels = problem.real.images, problem.real.labels.hard()
        network = Network.recalled(self.net, problem, state.tensors)
        if i % self.inner_loop == 0:
            within = in_range(state.tensors["images"], problem.real.space)
            state = State({**state.tensors, "images": within}, state.values)
        if i % (self.inner_loop * self.fix_iter) == 0:
            warm_up = self._recipe(self.early * self._batches(len(images)))
            network = trained(network, images, labels, warm_up, key.fold("early"))
        network = network.settled(problem, key.fold("settle"))

        # Classes whose steps come before a class's own, and after it.
        before = torch.arange(k) if self.stepping == "class" else torch.zeros(k, dtype=torch.int64)
        after = k - 1 - before if self.stepping == "class" else before
        rate = self._rate(problem)
        state = self._coasted(state, before, rate)
        match = Match(
            self._weights(network),
            METRICS[self.metric],
            [augment.draw(self.augment, key.fold("augment", c)) for c in range(k)],
            self._shown(problem),
            lambda own, first: self._decoded(own, first, key.fold("shown")),
        )
        index = real_index(problem, key.fold("real"), self.batch_real)
        real = images[index]
        stored, space = state.tensors["images"], problem.real.space
        own = stored.reshape(k, n, *stored.shape[1:])
        target = match.targets(network, problem.real, real)
        loss, gradient = match.slope(network, problem.real, target, own)
        gradient = per_pixel(space, stored, gradient)
        if self.donors and told(key, 1, self.donors_every) == 0:
            back = way_back(state, gradient.view_as(own))
            ways = per_pixel(space, stored, back.flatten(0, 1)).view_as(own)
            parts = shares(network, match, target, real, own, ways)
            state = credited(state, index, over_length(parts, back), i)
        state = self._coasted(moved(state, gradient, rate, self.momentum), after, rate)

        if (i + 1) % (self.inner_loop * self.fix_iter) == 0:
            network = Network.fresh(self.net, problem, key.fold("net"))
        else:
            recipe = self._recipe(self._batches(min(self.n_data, len(images))))
            network = trained(network, images, labels, recipe, key.fold("train"))
        return State({**state.tensors, **network.tensors()}, state.values), {"loss": loss}

    def _weights(self, network: Network) -> tuple[str, ...]:
        """The parameters whose gradients are matched."""
        sizes = DIMENSIONS[self.layers]
        return tuple(name for name, p in network.params.items() if p.ndim in sizes)

    def _rate(self, problem: Problem) -> float:
        """``lr_img``, grown with the images a class and their area (``tune_lr_img``)."""
        h, w = problem.real.shape[1:]
        return self.lr_img * (problem.ipc / 10) * (h * w / self.base**2)

    def _shown(self, problem: Problem) -> int:
        """Images a class that the network sees of the set."""
        return min(self.batch_syn_max, problem.ipc * self.factor**2)

    def _decoded(self, own: torch.Tensor, first: int, key: Key) -> torch.Tensor:
        """What stored images [m, n, c, h, w] decode to; of too many a random part, another for each class."""
        shown = decoded(own, self.factor)
        if shown.shape[1] <= self.batch_syn_max:
            return shown
        parts = [key.fold(c).permutation(shown.shape[1]) for c in range(first, first + len(own))]
        return torch.stack(
            [images[part[: self.batch_syn_max]] for images, part in zip(shown, parts, strict=True)]
        )

    def _coasted(self, state: State, turns: torch.Tensor, rate: float) -> State:
        """The state after so many steps [k] of other classes: what is left of a class's speed carries it on.

        Steps with gradient 0: v <- mu v, S <- S - rate v each.
        """
        images, velocity = state.tensors["images"], state.tensors["velocity"]
        left = [self.momentum**t for t in turns.tolist()]
        way = [sum(self.momentum**j for j in range(1, t + 1)) for t in turns.tolist()]
        each = len(images) // len(turns)
        scale, distance = (
            images.new_tensor(numbers).repeat_interleave(each)[:, None, None, None] for numbers in (left, way)
        )
        after = {"images": images - rate * distance * velocity, "velocity": scale * velocity}
        return State({**state.tensors, **after}, state.values)

    def _batches(self, images: int) -> int:
        """Steps of training that see about so many images."""
        return math.ceil(images / self.batch_train)

    def _recipe(self, steps: int) -> Recipe:
        """So many steps of the network's training on real data."""
        return Recipe(
            steps=steps,
            batch=self.batch_train,
            lr=self.lr_net,
            momentum=self.momentum_net,
            weight_decay=self.weight_decay,
            augment=self.augment_net,
            cutmix=self.cutmix,
        )

    def work(self, problem: Problem) -> float:
        """Those of the match, and 2.9 a real image that the network is trained on."""
        real = len(problem.real)
        training = min(self.n_data, real) + self.early * real / (self.inner_loop * self.fix_iter)
        return self.steps * (match_work(problem, self.batch_real, self._shown(problem)) + 2.9 * training)

    def memory(self, problem: Problem) -> float:
        """That of a match."""
        return match_memory(self.net, problem, self.batch_real, self._shown(problem))

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The stored images, how they decode, and their donors where they were asked for."""
        decode = MultiFormation(self.factor) if self.factor > 1 else AS_THEY_ARE
        return replace(finished(problem, state.tensors["images"], decode=decode), donors=recorded(state))

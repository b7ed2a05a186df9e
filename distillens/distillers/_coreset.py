"""What methods that choose real images share: the choice as a set, an embedding, scores under many networks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch

from distillens import cost
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, one_of
from distillens.core.contracts import Buffers, Log, Net, Params, Problem, State
from distillens.core.dataset import Dataset, check_per_class
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.distillers._donors import SELECTS
from distillens.distillers._pixels import AT_ONCE, finished, small
from distillens.nets.convnet import ConvNet
from distillens.train import Observe, Population, Training

Score = Callable[[Params, Buffers, torch.Tensor, torch.Tensor], torch.Tensor]  # images, classes [b] -> [b]
Rank = Literal["hard", "easy", "middle"]

# Of Paul et al. and of Toneva et al. alike, while their rates are constant.
AUTHORS = Recipe(batch=128, lr=0.1, weight_decay=5e-4, augment="crop_flip")


@dataclass(frozen=True)
class Coreset(ABC):
    """Real images, chosen class by class before the first step; there is nothing to do after it."""

    paper: ClassVar[str] = ""
    family: ClassVar[str] = "coreset"
    selects: ClassVar[bool] = True
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False
    lacks: ClassVar[Mapping[str, str]] = SELECTS
    steps: ClassVar[int] = 0

    @abstractmethod
    def choose(self, problem: Problem) -> torch.Tensor:
        """Indices [k * ipc] of the chosen images, class by class, without repeats; every class has enough."""

    @property
    def name(self) -> str:
        """The method's name in messages: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    def start(self, problem: Problem) -> State:
        """The chosen indices.

        Raises:
            UserError: a class has fewer images than were asked for.
        """
        check_per_class(problem.real, problem.ipc)
        return State({"index": self.choose(problem)})

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """Nothing is left to do."""
        return state, {}

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The chosen images, and which they are."""
        index = state.tensors["index"]
        return replace(finished(problem, problem.real.images[index]), chosen=index.cpu())


@dataclass(frozen=True)
class Embedded(Coreset):
    """A choice by where the images of a class lie: as features of one trained network, or as pixels.

    The network is drawn from the replicate's shared key: methods and sizes that ask for the same training get one.
    """

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=2000, batch=256)
    embedding: Literal["trained", "pixels"] = "trained"

    def __post_init__(self) -> None:
        one_of("embedding", self.embedding, ("trained", "pixels"))

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> Self:
        """An embedding that is trained for about ten passes."""
        steps = 100 if small(like) else 2000
        return cls(ConvNet.defaults(like), Recipe(steps=steps, batch=256))

    @abstractmethod
    def choose_in(self, features: torch.Tensor, count: int, key: Key) -> torch.Tensor:
        """Places [count] of the chosen images of one class among its features [n, d], float64."""

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """One network trained on the real data; nothing where pixels do."""
        if self.embedding == "pixels":
            return {}
        return {
            "embedding": Training(problem.real, self.net, self.recipe, (problem.shared.fold("embedding"),))
        }

    def choose(self, problem: Problem) -> torch.Tensor:
        """Class by class: no more than one class's features are held.

        Raises:
            UserError: a feature is not finite.
        """
        chosen = []
        for c, members in enumerate(problem.by_class):
            features = self._features(problem, members).double()
            if not bool(torch.isfinite(features).all()):
                raise UserError(
                    f"{self.name}: the features of an image are not finite: the training of the embedding diverged",
                    fix="set a smaller --set recipe.lr",
                )
            places = self.choose_in(features, problem.ipc, problem.key.fold("choice", c))
            chosen.append(members[places.to(members.device)])
        return torch.cat(chosen)

    def _features(self, problem: Problem, members: torch.Tensor) -> torch.Tensor:
        """Features [n, d] of some images, in evaluation mode with the network's own buffers."""
        images = problem.real.images
        if self.embedding == "pixels":
            return images[members].flatten(1)
        params, buffers = model(problem.inputs["embedding"], 0)
        with torch.no_grad():
            pieces = torch.split(members, together(problem.real))
            return torch.cat([self.net.features(params, buffers, images[piece])[0] for piece in pieces])

    def work(self, problem: Problem) -> float:
        """One look at every image."""
        return float(len(problem.real)) if self.embedding == "trained" else 0.0

    def memory(self, problem: Problem) -> float:
        """A class's features and their distances to a point, and images that pass through without a graph."""
        largest = max(map(len, problem.by_class))
        if self.embedding == "pixels":
            return 2.0 * largest * math.prod(problem.real.shape) * 8
        return passing(self.net, problem.real, largest) + 2 * largest * _width(self.net, problem.real) * 8


@dataclass(frozen=True)
class Scored(Coreset):
    """A choice by a score that each image has, averaged over ``nets`` networks after or during a short training.

    ``order`` takes of each class the largest scores ("hard", as published), the smallest ("easy"), or those around
    the class's median ("middle"). Equal scores are taken in random order.

    The networks are drawn from the replicate's shared key and observed after every pass over the data, whoever asks:
    methods with the same ``net``, ``recipe`` and ``nets`` share one training. The observation, which the counting of
    forgotten images needs, costs a third of a training more.
    """

    nets: int = 10
    order: Rank = "hard"
    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = AUTHORS.but(steps=7820)

    def __post_init__(self) -> None:
        at_least(1, self.name, nets=self.nets)
        one_of("order", self.order, ("hard", "easy", "middle"))

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> Self:
        """Ten networks after 20 passes, as Paul et al.; on digits' scale five after ten passes."""
        return cls(net=ConvNet.defaults(like), **short_log(like))

    @abstractmethod
    def scores(self, problem: Problem) -> torch.Tensor:
        """The score [n] of every real image, float64: the larger, the harder."""

    def pass_steps(self, data: Dataset) -> int:
        """Training steps in a pass over the data."""
        return lasting(self.recipe, 1, data).steps

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Networks trained on the real data, with the classes that they predict for it after every pass."""
        real = problem.real
        each = self.pass_steps(real)
        moments = tuple(range(each, self.recipe.steps + 1, each))
        observe = Observe(moments, {"train": real}) if moments else None
        keys = problem.shared.fold("log").split(self.nets)
        return {"log": Training(real, self.net, self.recipe, keys, observe=observe)}

    def choose(self, problem: Problem) -> torch.Tensor:
        """The first of each class in the order that is asked for.

        Raises:
            UserError: a score is not finite.
        """
        scores = self.scores(problem)
        if not bool(torch.isfinite(scores).all()):
            raise UserError(
                f"{self.name}: the score of an image is not finite: the training of the networks diverged",
                fix="set a smaller --set recipe.lr",
            )
        return torch.cat(
            [
                ranked(scores, members, self.order, problem.key.fold("ties", c))[: problem.ipc]
                for c, members in enumerate(problem.by_class)
            ]
        )

    def averaged(self, problem: Problem, score: Score, images: int) -> torch.Tensor:
        """The mean [n] over the final networks of a score, of so many images at a time."""
        real = problem.real
        log: Population = problem.inputs["log"]
        total = torch.zeros(len(real), dtype=torch.float64, device=real.device)
        for j in range(len(log)):
            params, buffers = model(log, j)
            for piece in torch.split(torch.arange(len(real), device=real.device), images):
                found = score(params, buffers, real.images[piece].to(log.final), real.labels.hard()[piece])
                total[piece] += found.double()
        return total / len(log)


def short_log(like: Dataset) -> dict[str, Any]:
    """Settings of a short training: Paul et al.'s; on digits' scale fewer networks and passes."""
    if small(like):
        return {"nets": 5, "recipe": lasting(Recipe(batch=64), 10, like)}
    return {"nets": 10, "recipe": lasting(AUTHORS, 20, like)}


def lasting(recipe: Recipe, passes: int, data: Dataset) -> Recipe:
    """The recipe over so many passes over the data."""
    return recipe.but(steps=passes * math.ceil(len(data) / (recipe.batch or len(data))))


def ranked(scores: torch.Tensor, members: torch.Tensor, order: Rank, key: Key) -> torch.Tensor:
    """The images ``members`` of one class in the order in which they are taken; equal scores in random order."""
    mixed = members[key.permutation(len(members)).to(members.device)]
    rising = mixed[scores[mixed].argsort(stable=True)]
    if order == "easy":
        return rising
    if order == "hard":
        return rising.flip(0)
    # From the middle rank outwards: a smaller set is the beginning of a larger one here too.
    away = (2 * torch.arange(len(rising)) - (len(rising) - 1)).abs()
    return rising[away.argsort(stable=True).to(rising.device)]


def model(population: Population, j: int) -> tuple[Params, Buffers]:
    """Parameters and buffers of one trained network."""
    buffers = {name: value[j] for name, value in population.buffers.items()}
    return population.shapes.unflatten(population.final[j]), buffers


def together(like: Dataset) -> int:
    """How many images go through a network at a time."""
    return max(1, AT_ONCE // (like.shape[1] * like.shape[2]))


def passing(net: Net, like: Dataset, images: int) -> float:
    """Bytes while so many images go through a network, some at a time, without a graph.

    Plain kernels hold the largest layer three times (before and after the norm, and rectified): about what a graph would keep.
    """
    return min(images, together(like)) * cost.cost(net, like).first


def _width(net: Net, like: Dataset) -> int:
    """Numbers in the features of an image."""
    params, buffers = net.init(like, Key(0, ("width",)))
    with torch.no_grad():
        return int(net.features(params, buffers, torch.zeros(1, *like.shape))[0].shape[1])

"""Training many models at once: one value in, one population out.

Everything that trains goes through here: the leave-one-out models, the subset models, the evaluation
nets, the experts, the judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch

from distillens import augment
from distillens.augment import Mix
from distillens.core.artefact import DistilledDataset, Order
from distillens.core.checks import UserError
from distillens.core.config import describe
from distillens.core.contracts import Buffers, Mode, Net, Params, Stackable, logits_of_many
from distillens.core.dataset import Dataset
from distillens.core.labels import Labels, Teacher
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.storage import fingerprint
from distillens.core.vector import Shapes
from distillens.engine.plan import Plan
from distillens.engine.traced import traced

TOGETHER = 1 << 18  # pixels of all images and models that are looked at together: what stays in a cache
Progress = Callable[[int], None]  # told how many training steps (of one model) are newly done


@dataclass(frozen=True, eq=False)
class Observe:
    """What to write down while models train: predicted classes on ``data`` after the steps ``moments``."""

    moments: tuple[int, ...]
    data: Mapping[str, Dataset]


@dataclass(frozen=True, eq=False)
class Training:
    """A population to train: m models of one network, recipe and dataset, told apart by their keys.

    A model's key gives its initialisation (``fold("init")``), batches and augmentation, each by name.
    ``subsets[j]`` are the images that model j sees; ``weights`` [m, n] weighs the images in model j's mean
    loss (0 leaves one out) and needs full batches, so that the batches do not depend on the weights.
    ``snapshots`` are steps after which the parameters are kept (0 is the initialisation); the last are
    always kept. ``order`` replays a distilled set's ordered steps in place of the recipe's batches and rate.

    Raises:
        UserError: subsets, weights, order or moments do not fit.
    """

    data: Dataset
    net: Net
    recipe: Recipe
    keys: tuple[Key, ...]
    subsets: tuple[torch.Tensor, ...] | None = None
    weights: torch.Tensor | None = None
    snapshots: tuple[int, ...] = ()
    observe: Observe | None = None
    order: Order | None = None

    def __post_init__(self) -> None:
        m, n = len(self.keys), len(self.data)
        if not m or not n:
            raise UserError("a training needs a model and an image", got=f"{m} models, {n} images")
        augment.parse(self.recipe.augment)
        if self.subsets is not None and len(self.subsets) != m:
            raise UserError("every model needs one subset", got=f"{len(self.subsets)} subsets for {m} models")
        if self.subsets is not None and not all(map(len, self.subsets)):
            empty = next(j for j, subset in enumerate(self.subsets) if not len(subset))
            raise UserError("every model needs an image", got=f"an empty subset for model {empty}")
        if self.order is not None and self.subsets is not None:
            raise UserError(
                "ordered steps name their images: subsets do not go with them",
                fix="leave points out by example weights",
            )
        if self.order is not None and self.recipe.cutmix:
            raise UserError(
                "ordered steps name their images: CutMix does not go with them",
                got=f"cutmix {self.recipe.cutmix:g}",
            )
        if self.order is not None and self.order.steps.numel() and int(self.order.steps.max()) >= n:
            raise UserError(
                "an ordered step names an image that is not there",
                got=str(int(self.order.steps.max())),
                expected=f"0 to {n - 1}",
            )
        if self.weights is not None:
            if tuple(self.weights.shape) != (m, n):
                raise UserError(
                    "example weights do not fit", got=str(tuple(self.weights.shape)), expected=f"[{m}, {n}]"
                )
            batched = self.order is None and self.recipe.batch is not None and self.recipe.batch < n
            if self.subsets is not None or batched:
                raise UserError(
                    "example weights need full batches of the whole set", fix="leave points out by subsets"
                )
            if self.recipe.cutmix:
                raise UserError(
                    "example weights do not go with CutMix, which mixes the images",
                    got=f"cutmix {self.recipe.cutmix:g}",
                    fix="leave points out by subsets",
                )
            if self.net.mixes_examples:
                raise UserError(
                    "example weights need a network that does not mix examples",
                    got=type(self.net).__name__,
                    fix="leave points out by subsets",
                )
            if bool((self.weights < 0).any()) or bool((self.weights.sum(1) <= 0).any()):
                raise UserError("example weights must be from 0 up, with some above 0 in each model")
        moments = (*self.snapshots, *(self.observe.moments if self.observe else ()))
        if moments and max(moments) > self.steps:
            raise UserError(
                "a moment lies after the last step", got=str(max(moments)), expected=f"up to {self.steps}"
            )
        if moments and min(moments) < 0:
            raise UserError("a moment lies before the first step", got=str(min(moments)), expected="from 0")
        for j, subset in enumerate(self.subsets or ()):
            if int(subset.min()) < 0 or int(subset.max()) >= n:
                raise UserError(
                    f"the subset of model {j} names images that are not there",
                    got=f"{int(subset.min())} to {int(subset.max())}",
                    expected=f"0 to {n - 1}",
                )

    @property
    def steps(self) -> int:
        """Optimiser steps of each model."""
        return self.recipe.steps if self.order is None else len(self.order.lr)

    @property
    def sizes(self) -> list[int]:
        """How many images each model has to learn from."""
        return [len(self.data)] * len(self.keys) if self.subsets is None else [len(s) for s in self.subsets]

    @property
    def image_steps(self) -> int:
        """Images seen, summed over steps and models: the measure of the work. A look at two places counts twice."""
        if self.order is not None:
            return len(self.keys) * int((self.order.steps >= 0).sum())
        looks = 2 if self.recipe.rho else 1
        return looks * self.steps * sum(min(size, self.recipe.batch or size) for size in self.sizes)

    def models(self, start: int, stop: int) -> Training:
        """The training of the models from one to before another."""
        return self.some(range(start, min(stop, len(self.keys))))

    def some(self, index: Sequence[int]) -> Training:
        """The training of some of the models."""
        return replace(
            self,
            keys=tuple(self.keys[j] for j in index),
            subsets=None if self.subsets is None else tuple(self.subsets[j] for j in index),
            weights=None if self.weights is None else self.weights[list(index)],
        )

    def identities(self) -> list[str]:
        """For each model a name of what is trained: data, network, recipe, key (not what is kept)."""
        base = [self.data.fingerprint, describe(self.net), describe(self.recipe), *self._order_parts()]
        return [
            fingerprint(
                *base,
                key.to_json(),
                *([] if self.subsets is None else [self.subsets[j]]),
                *([] if self.weights is None else [self.weights[j]]),
            )
            for j, key in enumerate(self.keys)
        ]

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of what is trained and what is kept."""
        seen = [] if self.observe is None else [self.observe.moments]
        watched = {} if self.observe is None else {n: d.fingerprint for n, d in self.observe.data.items()}
        return fingerprint(self.identities(), list(self.snapshots), seen, watched)

    def _order_parts(self) -> list[torch.Tensor]:
        return [] if self.order is None else [self.order.steps, self.order.lr]


@dataclass(frozen=True, eq=False)
class Population:
    """m trained models: parameters [m, P], snapshots [m, t, P], observed classes [m, t, n] by name."""

    net: Net
    shapes: Shapes
    final: torch.Tensor
    moments: tuple[int, ...]
    snapshots: torch.Tensor
    seen_moments: tuple[int, ...] = ()
    seen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.final.shape[0]

    def at(self, moment: int) -> torch.Tensor:
        """The parameters [m, P] after ``moment`` steps."""
        return self.snapshots[:, self.moments.index(moment)]

    def ended(self, step: int, snapshots: Sequence[int]) -> Population:
        """What a training that ends at the moment ``step`` of this one leaves, with some of the moments before."""
        moments = tuple(sorted(set(snapshots)))
        places = [self.moments.index(moment) for moment in moments]
        return replace(
            self, final=self.at(step).clone(), moments=moments, snapshots=self.snapshots[:, places].clone()
        )

    def logits(self, data: Dataset, flat: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [m, n, k] of the final models, or of the parameters ``flat`` [m, P].

        As many models and images at a time as a cache holds; the first layer's work on an image serves all of them.
        """
        flat = self.final if flat is None else flat
        images = data.images.to(flat)
        pixels = images[0, 0].numel()
        models = max(1, min(len(flat), TOGETHER // pixels // min(len(images), 64)))
        batch = max(1, TOGETHER // pixels // models)
        outputs = []
        with torch.no_grad():
            for start in range(0, len(flat), models):
                params = self.shapes.unflatten(flat[start : start + models])
                buffers = {name: value[start : start + models] for name, value in self.buffers.items()}
                pieces = [
                    _logits(self.net, params, buffers, x, "evaluate")[0] for x in torch.split(images, batch)
                ]
                outputs.append(torch.cat(pieces, 1))
        return torch.cat(outputs)

    def features(self, data: Dataset, flat: torch.Tensor | None = None) -> torch.Tensor:
        """What the last layers of the final models, or of the parameters ``flat`` [m, P], are given: [m, n, d], float64 on the CPU."""
        flat = self.final if flat is None else flat
        pieces = torch.split(data.images.to(flat), max(1, 4 * TOGETHER // data.images[0].numel()))
        found = []
        with torch.no_grad():
            for j, one in enumerate(flat):
                params = self.shapes.unflatten(one)
                buffers = {name: value[j] for name, value in self.buffers.items()}
                found.append(torch.cat([self.net.features(params, buffers, x)[0] for x in pieces]))
        return torch.stack(found).double().cpu()

    def losses(self, data: Dataset) -> torch.Tensor:
        """The loss of each image under each final model, [m, n]."""
        return torch.stack([data.labels.loss(logits) for logits in self.logits(data)])

    def predictions(self, data: Dataset) -> torch.Tensor:
        """The class that each final model predicts, [m, n], int64."""
        return self.logits(data).argmax(-1)

    def accuracy(self, data: Dataset) -> torch.Tensor:
        """The share of images that each final model gets right, [m]."""
        return (self.predictions(data) == data.labels.hard()).double().mean(1)

    def taken(self, order: torch.Tensor) -> Population:
        """The models ``order`` [m'] of the population."""
        order = order.to(self.final.device)
        return replace(
            self,
            final=self.final[order],
            snapshots=self.snapshots[order],
            seen={name: value[order] for name, value in self.seen.items()},
            buffers={name: value[order] for name, value in self.buffers.items()},
        )

    @staticmethod
    def joined(parts: Sequence[Population]) -> Population:
        """Populations side by side, as one."""
        first = parts[0]
        return replace(
            first,
            final=torch.cat([p.final for p in parts]),
            snapshots=torch.cat([p.snapshots for p in parts]),
            seen={name: torch.cat([p.seen[name] for p in parts]) for name in first.seen},
            buffers={name: torch.cat([p.buffers[name] for p in parts]) for name in first.buffers},
        )


def on(
    distilled: DistilledDataset,
    net: Net,
    recipe: Recipe,
    keys: tuple[Key, ...],
    *,
    weights: torch.Tensor | None = None,
) -> Training:
    """The training of fresh networks on a distilled set.

    A set of ordered steps is a training by itself: its steps are replayed by its own recipe (plain SGD where it brings
    none), and ``recipe`` does not count.
    """
    if distilled.order is not None:
        recipe = distilled.recipe or Recipe(momentum=0.0)
    return Training(distilled.dataset(), net, recipe, keys, weights=weights, order=distilled.order)


def networks(key: Key, replicate: int, count: int) -> tuple[Key, ...]:
    """The keys of the networks that look at replicate r of every set: shared, so that sets are paired."""
    return key.fold("replicate", replicate, "net").split(count)


def chunks(training: Training, plan: Plan) -> list[Training]:
    """The training cut as the plan says, before any work starts; ``assembled`` puts the populations together again."""
    return [training.some(index) for index in _cut(training, plan)]


def _cut(training: Training, plan: Plan) -> list[list[int]]:
    """Which models train together: in their order and in equal parts, or those whose subsets are about as large.

    A short last part would leave the other workers waiting for the long ones. Short batches are filled up to the longest
    beside them, which nobody looks at: of subsets as they come that is nearly half of the work. A network that mixes
    images would mix those in: it shares a chunk with its like only.
    """
    m, batch, sizes = len(training.keys), training.recipe.batch, training.sizes
    if len(set(sizes)) == 1:
        parts = -(-m // plan.models_together(min(batch or sizes[0], sizes[0])))
        return [part.tolist() for part in torch.arange(m).tensor_split(parts)]
    found: list[list[int]] = []
    for j in sorted(range(len(sizes)), key=sizes.__getitem__):
        together = plan.models_together(min(batch or sizes[j], sizes[j]))
        alike = bool(found) and (sizes[found[-1][0]] == sizes[j] or not training.net.mixes_examples)
        if alike and len(found[-1]) < together:
            found[-1].append(j)
        else:
            found.append([j])
    return found


def assembled(training: Training, plan: Plan, parts: Sequence[Population]) -> Population:
    """The populations of a training's chunks as one, its models in their own order."""
    whole = Population.joined(parts)
    order = [j for index in _cut(training, plan) for j in index]
    return whole if order == sorted(order) else whole.taken(torch.tensor(order).argsort())


def train(training: Training, plan: Plan, progress: Progress | None = None) -> Population:
    """Train all models of a training in this process, chunk by chunk."""
    return assembled(training, plan, [train_chunk(part, plan, progress) for part in chunks(training, plan)])


def train_chunk(training: Training, plan: Plan, progress: Progress | None = None) -> Population:
    """Train the models of one chunk together, with the threads, kernels and precision of the plan."""
    with plan.training():
        return _train_chunk(training, plan, progress)


def _train_chunk(training: Training, plan: Plan, progress: Progress | None) -> Population:
    data = training.data
    images = data.images.to(plan.dtype)
    started = [training.net.init(data, key.fold("init")) for key in training.keys]
    shapes = Shapes.of(started[0][0])
    flat = torch.stack([shapes.flatten(params) for params, _ in started]).to(data.device, plan.dtype)
    buffers: Buffers = {
        name: torch.stack([b[name] for _, b in started]).to(data.device, plan.dtype) for name in started[0][1]
    }
    looked_at = traced(_looked_at) if plan.traced else _looked_at
    optimiser = _Optimiser(training.recipe, flat)
    batches = _Batches(training)
    kept: dict[int, torch.Tensor] = {}
    seen: dict[str, list[torch.Tensor]] = {
        name: [] for name in (training.observe.data if training.observe else ())
    }

    def look(step: int) -> None:
        if step in training.snapshots:
            kept[step] = flat.clone()
        if training.observe is not None and step in training.observe.moments:
            now = Population(training.net, shapes, flat, (), flat[:, None], buffers=buffers)
            with plan.pinned():
                for name, watched in training.observe.data.items():
                    seen[name].append(now.predictions(watched).to(torch.int16))

    def slope(at: torch.Tensor, step: int) -> tuple[torch.Tensor, Buffers]:
        """The gradient [m, P] of each model's own mean loss at the parameters ``at``, and the new buffers."""
        index, weight = batches.at(step)
        mixes = batches.mixes(step)
        if any(mixes) and index is None:
            index = torch.arange(len(data), device=data.device).expand(len(flat), -1)
        # A leaf each: of one whole vector every part would have to be put together from zeros again.
        leaves = {name: part.detach().requires_grad_() for name, part in shapes.unflatten(at).items()}
        labels = data.labels
        if isinstance(labels, Teacher):
            labels = labels.view(step % len(labels.views))
        x = _shown(training, images, batches, index, mixes, step)
        asked = labels if index is None else labels.take(index)
        logits, losses, new = looked_at(training.net, leaves, buffers, x, asked)
        if index is not None and any(mixes):
            pairs = zip(index, mixes, strict=True)
            partners = torch.stack(
                [own if mix is None else own[mix.partner.to(own.device)] for own, mix in pairs]
            )
            shares = [0.0 if mix is None else mix.share(images) for mix in mixes]
            share = torch.tensor(shares, dtype=losses.dtype, device=losses.device)[:, None]
            losses = (1 - share) * losses + share * labels.take(partners).loss(logits)
        if weight is None:
            mean = losses.mean(1)
        else:
            weight = weight.to(losses)
            total = weight.sum(1)
            # An ordered step of which nothing is left has no gradient.
            mean = (losses * weight).sum(1) / torch.where(total > 0, total, 1.0)
        parts = torch.autograd.grad(mean.sum(), list(leaves.values()), materialize_grads=True)
        # Buffers are copied: what a graph gives is written over.
        return shapes.flatten(dict(zip(leaves, parts, strict=True))), {
            name: value.detach().clone() for name, value in new.items()
        }

    look(0)
    for step in range(training.steps):
        gradient, new_buffers = slope(flat, step)
        if training.recipe.rho:
            gradient = _flat_minimum(training.recipe, flat, gradient, partial(slope, step=step))
        buffers = new_buffers
        rate = None if training.order is None else float(training.order.lr[step])
        flat = optimiser.step(flat, gradient, step, rate)
        if progress is not None:
            progress(len(training.keys))
        look(step + 1)

    moments = tuple(sorted(kept))
    observed = training.observe
    return Population(
        training.net,
        shapes,
        flat,
        moments,
        torch.stack([kept[t] for t in moments], 1) if moments else flat.new_empty(len(flat), 0, shapes.size),
        tuple(sorted(set(observed.moments))) if observed is not None else (),
        {name: torch.stack(pieces, 1) for name, pieces in seen.items()},
        buffers,
    )


def _flat_minimum(
    recipe: Recipe,
    flat: torch.Tensor,
    plain: torch.Tensor,
    slope: Callable[[torch.Tensor], tuple[torch.Tensor, Buffers]],
) -> torch.Tensor:
    """The gradient [m, P] of GSAM with the adaptive radius, from the plain one (``recipe`` says more).

    The perturbed gradient sees the same batch under the same augmentation. Buffers keep what the plain pass saw.
    """

    def norm(x: torch.Tensor) -> torch.Tensor:
        length: torch.Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return length

    tiny = 1e-12  # as in the authors' code
    away = flat.square() * plain * (recipe.rho / (norm(flat.abs() * plain) + tiny))
    ahead, _ = slope(flat + away)
    cosine = (plain * ahead).sum(1, keepdim=True) / (norm(plain) * norm(ahead) + tiny)
    across = plain - cosine * norm(plain) * ahead / (norm(ahead) + tiny)
    return ahead - recipe.gsam_alpha * across


def _shown(
    training: Training,
    images: torch.Tensor,
    batches: _Batches,
    index: torch.Tensor | None,
    mixes: Sequence[Mix | None],
    step: int,
) -> torch.Tensor:
    """The images that the models see at a step: [n, c, h, w] where all see the same, else [m, b, c, h, w]."""
    strategy = training.recipe.augment
    labels = training.data.labels

    def batch(j: int) -> torch.Tensor:
        x, mix = shown(j), mixes[j]
        return x if mix is None else mix.images(x)

    def shown(j: int) -> torch.Tensor:
        x = images if index is None else images[index[j].clamp(min=0)]
        if not strategy:
            return x
        place = training.keys[j].fold("augment", step)
        if isinstance(labels, Teacher):  # the label belongs to one view: every model sees that view
            place = Key(labels.seed).fold("view", step % len(labels.views))
            numbers = augment.draw(strategy, place, len(training.data))
            rows = slice(None) if index is None else index[j].clamp(min=0)
            return augment.apply(x, None if numbers is None else numbers.rows(rows))
        return augment.apply(x, augment.draw(strategy, place, len(x)))

    if index is not None and not strategy and not any(mixes):
        return batches.images(images, index)
    if index is None and not strategy:
        return images
    return torch.stack([batch(j) for j in range(len(training.keys))])


def _looked_at(
    net: Net, params: Params, buffers: Buffers, x: torch.Tensor, labels: Labels
) -> tuple[torch.Tensor, torch.Tensor, Buffers]:
    """The logits [m, b, k] and the loss [m, b] of each image under each model in training mode, and the new buffers [m, ...]."""
    logits, new = _logits(net, params, buffers, x, "train")
    return logits, labels.loss(logits), new


def _logits(
    net: Net, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode
) -> tuple[torch.Tensor, Buffers]:
    """Logits [m, n, k] of m models; one alone goes its own way, unless it has one for many, which to the bit is for any number."""
    if len(next(iter(params.values()))) > 1 or isinstance(net, Stackable):
        return logits_of_many(net, params, buffers, x, mode)
    one = {name: value.squeeze(0) for name, value in params.items()}
    own = {name: value.squeeze(0) for name, value in buffers.items()}
    logits, new = net.logits(one, own, x if x.ndim == 4 else x.squeeze(0), mode)
    return logits[None], {name: value[None] for name, value in new.items()}


class _Batches:
    """Which images each model sees at a step: indices [m, b] and weights [m, b], None where all alike."""

    def __init__(self, training: Training) -> None:
        self.training = training
        n = len(training.data)
        every = torch.arange(n)
        self.members = training.subsets or tuple(every for _ in training.keys)
        self.sizes = training.sizes
        self.batch = training.recipe.batch or max(self.sizes)
        self.full = training.subsets is None and self.batch >= n
        self.passes: list[tuple[int, torch.Tensor] | None] = [None] * len(training.keys)
        self.found: tuple[torch.Tensor, torch.Tensor | None] | None = None  # what no step changes
        self.taken: tuple[torch.Tensor, torch.Tensor] | None = None

    def images(self, images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The images ``index`` [m, b], kept while the next step asks for the same."""
        if self.taken is None or self.taken[0] is not index:
            self.taken = index, images[index.clamp(min=0)]
        return self.taken[1]

    def at(self, step: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        training = self.training
        device = training.data.device
        if training.order is not None:
            row = training.order.steps[step].to(device)
            present = row[row >= 0]
            index = (present if len(present) else row[:1]).expand(len(training.keys), -1)
            weight = (index >= 0).double()
            if training.weights is not None:
                weight = weight * training.weights.to(weight).gather(1, index.clamp(min=0))
            return index.clamp(min=0), weight
        if self.full:
            return None, None if training.weights is None else training.weights.to(device)
        if self.found is None or self.batch < max(self.sizes):
            self.found = self._rows(step)
        return self.found

    def _rows(self, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        device = self.training.data.device
        rows = [self._row(j, step) for j in range(len(self.sizes))]
        width = max(len(row) for row in rows)
        if all(len(row) == width for row in rows):
            return torch.stack(rows).to(device), None
        index = torch.zeros(len(rows), width, dtype=torch.int64)
        weight = torch.zeros(len(rows), width)
        for j, row in enumerate(rows):
            index[j, : len(row)] = row
            weight[j, : len(row)] = 1
        return index.to(device), weight.to(device)

    def mixes(self, step: int) -> list[Mix | None]:
        """How CutMix mixes each model's batch; images that fill a short one up keep to themselves."""
        probability, (h, w) = self.training.recipe.cutmix, self.training.data.shape[1:]
        if not probability:
            return [None] * len(self.sizes)
        drawn = []
        lengths = [len(self._row(j, step)) for j in range(len(self.sizes))]
        for key, length in zip(self.training.keys, lengths, strict=True):
            mix = augment.draw_mix(probability, key.fold("cutmix", step), length, (h, w))
            if mix is not None and length < max(lengths):
                mix = replace(mix, partner=torch.cat([mix.partner, torch.arange(length, max(lengths))]))
            drawn.append(mix)
        return drawn

    def _row(self, j: int, step: int) -> torch.Tensor:
        size = self.sizes[j]
        if self.batch >= size:
            return self.members[j]
        a_pass, place = divmod(step, math.ceil(size / self.batch))
        remembered = self.passes[j]
        if remembered is None or remembered[0] != a_pass:
            order = self.training.keys[j].fold("batches", a_pass).permutation(size)
            remembered = self.passes[j] = (a_pass, self.members[j][order])
        return remembered[1][place * self.batch : (place + 1) * self.batch]


class _Optimiser:
    """SGD, Adam and AdamW as PyTorch defines them, on flat parameters [m, P]."""

    def __init__(self, recipe: Recipe, flat: torch.Tensor) -> None:
        self.recipe = recipe
        self.first = torch.zeros_like(flat)
        self.second = torch.zeros_like(flat)
        self.started = 0  # the step at which the moments were last emptied

    def step(self, flat: torch.Tensor, gradient: torch.Tensor, step: int, rate: float | None) -> torch.Tensor:
        """The parameters after a step; ``rate`` overrides the recipe's."""
        recipe = self.recipe
        lr = recipe.rate(step) if rate is None else rate
        if recipe.empties_momentum(step):
            self.first.zero_()
            self.second.zero_()
            self.started = step
        with torch.no_grad():
            if recipe.weight_decay and recipe.optimiser != "adamw":
                gradient = gradient + recipe.weight_decay * flat
            if recipe.optimiser == "sgd":
                if not recipe.momentum:
                    return flat - lr * gradient
                self.first.mul_(recipe.momentum).add_(gradient)
                return flat - lr * self.first
            t = step - self.started + 1
            self.first.mul_(0.9).add_(gradient, alpha=0.1)
            self.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            if recipe.optimiser == "adamw":
                flat = flat * (1 - lr * recipe.weight_decay)
            size = (self.second / (1 - 0.999**t)).sqrt().add_(1e-8)
            return flat - lr / (1 - 0.9**t) * self.first / size

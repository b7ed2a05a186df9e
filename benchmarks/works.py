"""The works whose speed is compared: for each the plain way and ours, at the same sizes.

Large images are random numbers of CIFAR-10's shape, 300 a class: time does not depend on what they show. Neither side
augments. Digits are scikit-learn's real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference import dc, dm, early_stopped, leave_one_out, mtt, subsets
from benchmarks.reference.convnet import convnet, digits_convnet
from benchmarks.reference.step import step
from distillens import Key, Recipe, load
from distillens.analyses.pointwise.leave_one_out import LeaveOneOut
from distillens.analyses.representativeness.early_agreement import EarlyAgreement
from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Problem, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.space import Pixel
from distillens.core.vector import Shapes
from distillens.distillers._gradient import Network, trained
from distillens.distillers.dc import DC
from distillens.distillers.dm import DM
from distillens.distillers.mtt import MTT
from distillens.engine.plan import Plan, cores
from distillens.engine.workers import Engine
from distillens.experts import Trajectories
from distillens.nets import default_net
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.sessions import workers_for
from distillens.train import Observe, Training, train_chunk
from distillens.tuning import plan_for
from distillens.unroll import Mode

KEY = Key(0, ("engine",))
K, EACH, IPC, REAL = 10, 300, 10, 256
STEPS = 5  # training steps of one timed call
PASSES = 5  # passes over the distilled images of one timed call
INNER = 30  # inner steps of MTT, its row for CIFAR-10 at 10 images a class
MODELS = 100  # on subsets
EARLY, UPDATES = 16, 150  # early-stopped models and their updates


@dataclass(frozen=True)
class Side:
    """One side of a work, prepared: ``warm`` runs before the clock, ``timed`` on it."""

    timed: Callable[[], object]
    warm: Callable[[], object]


@dataclass(frozen=True)
class Work:
    """Something that both sides do. A timed call does ``units`` of it; ``flops`` counts one unit."""

    unit: str
    reference: Callable[[], Side]
    ours: Callable[[Plan], Side]
    flops: Callable[[], float]
    large: bool = True  # whether the images are CIFAR-shaped, else digits
    units: int = 1
    calls: int = 1  # timed calls in a process
    # Each named setting is the default plan for such data with these fields changed.
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"float32": {}})
    mode: str = ""


def plan(work: Work, setting: str) -> Plan:
    """The default plan of a study of such data, changed as the setting says."""
    like = random_data(K) if work.large else digits().train
    changed = dict(work.settings[setting])
    precision = changed.pop("precision", "float32")
    jobs = 1 if work.large else cores()
    return replace(plan_for(like, default_net(like), jobs=jobs, precision=precision), **changed)


# ---- data ----


def random_data(images: int) -> Dataset:
    labels = torch.arange(images) % K
    shown = KEY.fold("images").normal(images, 3, 32, 32)
    return Dataset(shown, Hard(labels), tuple(map(str, range(K))), Pixel())


def problem(inputs: Mapping[str, Any] | None = None) -> Problem:
    return Problem(random_data(K * EACH), IPC, KEY.fold("problem"), inputs or {})


def real_by_class() -> list[torch.Tensor]:
    return [torch.randn(EACH, 3, 32, 32) for _ in range(K)]


def distilled() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(K * IPC, 3, 32, 32, requires_grad=True), torch.arange(K).repeat_interleave(IPC)


@cache
def digits() -> Splits:
    return load("digits")


def hundred_digits() -> DistilledDataset:
    """Ten real digits a class, in a distilled set's place."""
    train = digits().train
    chosen = train.take(torch.cat([members[:IPC] for members in train.by_class]))
    return DistilledDataset({"images": chosen.images}, chosen.labels, chosen.classes, chosen.space)


# ---- arithmetic ----


def counted(work: Callable[[], object]) -> float:
    """Floating-point operations of the convolutions and matrix products of a work on tensors without storage."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def of_step(net: Callable[[], nn.Module], images: int, *shape: int) -> float:
    """Of a training step."""

    def once() -> None:
        labels = torch.zeros(images, dtype=torch.long)
        F.cross_entropy(net()(torch.randn(images, *shape)), labels).backward()

    return counted(once)


def of_digits(image_steps: float, predictions: float = 0.0) -> float:
    """Of a training step and of a prediction of so many single digits."""
    forward = counted(lambda: digits_convnet()(torch.randn(1, 1, 8, 8)))
    return image_steps * of_step(digits_convnet, 1, 1, 8, 8) + predictions * forward


def _to_images(loss: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Of a loss and its gradient in the distilled images, and in nothing else."""

    def once() -> None:
        images, _ = distilled()
        torch.autograd.grad(loss(images.clone()), images)  # modules that are counted take no leaf

    return counted(once)


def _real_batches() -> list[torch.Tensor]:
    return [torch.randn(REAL, 3, 32, 32) for _ in range(K)]


# ---- a training step ----


def _step_reference() -> Side:
    net = convnet()
    optimiser = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    images, labels = torch.randn(REAL, 3, 32, 32), torch.randint(K, (REAL,))

    def timed() -> None:
        for _ in range(STEPS):
            step(net, images, labels, optimiser)

    return Side(timed, lambda: step(net, images, labels, optimiser))


def _step_ours(plan: Plan) -> Side:
    training = Training(random_data(REAL), ConvNet(), Recipe(steps=STEPS), (KEY,))
    once = replace(training, recipe=Recipe(steps=1))
    return Side(lambda: train_chunk(training, plan), lambda: train_chunk(once, plan))


# ---- DM ----


def _dm_reference() -> Side:
    real, (images, _) = real_by_class(), distilled()
    optimiser = torch.optim.SGD([images], 1.0, momentum=0.5)

    def timed() -> None:
        dm.step(convnet, real, images, optimiser, REAL)

    return Side(timed, timed)


def _dm_ours(plan: Plan) -> Side:
    given, method = problem(), DM(batch_real=REAL, augment="")
    state = method.start(given)

    def timed() -> None:
        method.step(given, state, 0)

    return Side(timed, timed)


def _dm_flops() -> float:
    return _to_images(lambda images: dm.loss(convnet().requires_grad_(False), _real_batches(), images))


# ---- DC ----


def _dc_reference() -> Side:
    real, (images, _) = real_by_class(), distilled()
    optimiser = torch.optim.SGD([images], 0.1, momentum=0.5)

    def timed() -> None:
        dc.match(convnet(), real, images, optimiser, REAL)

    return Side(timed, timed)


def _dc_ours(plan: Plan) -> Side:
    given, method = problem(), DC(batch_real=REAL)
    state = method.start(given)

    def timed() -> None:
        method.step(given, state, 0)

    return Side(timed, timed)


def _dc_flops() -> float:
    return _to_images(lambda images: dc.loss(convnet(), _real_batches(), images))


def _dc_training_reference() -> Side:
    net, (images, labels) = convnet(), distilled()
    optimiser = torch.optim.SGD(net.parameters(), 0.01)
    return Side(
        lambda: dc.train(net, images, labels, optimiser, PASSES),
        lambda: dc.train(net, images, labels, optimiser, 1),
    )


def _dc_training_ours(plan: Plan) -> Side:
    given, method = problem(), DC(inner_loop=PASSES)
    images, labels = method.start(given).tensors["images"], given.labels()
    network = Network.fresh(method.net, given, KEY)
    # The method's own piece: between two matching steps it cannot be told from them on a clock.
    return Side(
        lambda: trained(network, images, labels, method.training(given), KEY),
        lambda: trained(network, images, labels, replace(method, inner_loop=1).training(given), KEY),
    )


# ---- MTT ----


def _mtt_reference() -> Side:
    net, (images, labels) = convnet(), distilled()
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    target = theta + 0.01 * torch.randn_like(theta)
    rate = torch.tensor(0.001, requires_grad=True)
    optimisers = tuple(torch.optim.SGD([x], lr, momentum=0.5) for x, lr in ((images, 100.0), (rate, 1e-5)))

    def unrolled(steps: int) -> None:
        mtt.step(net, theta, target, images, labels, rate, optimisers, steps)

    return Side(lambda: unrolled(INNER), lambda: unrolled(1))


def mtt_problem() -> Problem:
    """One expert of one pass, which leads from a fresh network to a place nearby."""
    net = ConvNet()
    params, _ = net.init(random_data(K), KEY.fold("expert"))
    shapes = Shapes.of(params)
    theta = shapes.flatten(params)
    target = theta + 0.01 * KEY.fold("target").normal(shapes.size)
    return problem({"experts": Trajectories(net, shapes, 1, (torch.stack([theta, target])[None],), (1,))})


def mtt_method(steps: int, mode: Mode = "adjoint") -> MTT:
    return MTT(syn_steps=steps, augment="", experts=1, max_start_epoch=1, expert_epochs=1, mode=mode)


def mtt_ours(steps: int, mode: Mode = "adjoint") -> Side:
    given, method = mtt_problem(), mtt_method(steps, mode)
    state = method.start(given)
    return Side(
        lambda: method.step(given, state, 0), lambda: replace(method, syn_steps=1).step(given, state, 0)
    )


def _mtt_flops() -> float:
    def loss(images: torch.Tensor) -> torch.Tensor:
        net, (_, labels) = convnet(), distilled()
        theta = nn.utils.parameters_to_vector(net.parameters()).detach()
        return mtt.loss(net, theta, theta + 1, images, labels, torch.tensor(0.001), INNER)

    return _to_images(loss)


# ---- many small models ----


def _through_runs(training: Training, plan: Plan) -> Side:
    """As a study trains: by as many workers as the cores carry, which it starts once for all that it trains."""
    engine = Engine(workers_for(plan, "cpu"), plan.threads)
    once = Training(training.data, training.net, Recipe(steps=1), training.keys[:1])

    def start() -> None:
        """Every worker has a job: it is up, and has its kernels."""
        for _ in engine.map(train_chunk, [(once, plan)] * max(2, 2 * engine.workers)):
            pass

    return Side(lambda: Runs(plan, engine).make([training]), start)


def _leave_one_out_reference() -> Side:
    points = hundred_digits().dataset()
    start = digits_convnet()

    def run(steps: int) -> None:
        leave_one_out.train(start, points.images, points.labels.hard(), steps=steps)

    return Side(lambda: run(300), lambda: run(1))


def _leave_one_out_ours(plan: Plan) -> Side:
    sets = Sets({"digits": (hundred_digits(),)})
    analysis = replace(LeaveOneOut.defaults(digits().train), inits=1)
    training, *_ = analysis.trainings(sets, digits(), key=KEY)  # of the whole set and of all but each point
    return _through_runs(training, plan)


def _subset_training() -> Training:
    sets = Sets({"digits": (hundred_digits(),)})
    analysis = replace(EarlyAgreement.defaults(digits().train), subset=MODELS)
    return analysis.trainings(sets, digits(), key=KEY)[-1]


def _subsets_reference() -> Side:
    training = _subset_training()
    images, labels, recipe = training.data.images, training.data.labels.hard(), training.recipe

    def run(steps: int) -> None:
        subsets.train(digits_convnet, images, labels, training.subsets, steps=steps, batch=recipe.batch)

    return Side(lambda: run(recipe.steps), lambda: run(1))


def _subsets_ours(plan: Plan) -> Side:
    return _through_runs(_subset_training(), plan)


def _early_reference() -> Side:
    train, test = digits().train, digits().test.images

    def run(steps: int) -> None:
        early_stopped.predictions(
            digits_convnet, train.images, train.labels.hard(), test, models=EARLY, steps=steps
        )

    return Side(lambda: run(UPDATES), lambda: run(1))


def _early_training() -> Training:
    train = digits().train
    recipe = EarlyAgreement.defaults(train).early_recipe.but(steps=UPDATES)
    observe = Observe(tuple(range(1, UPDATES + 1)), {"test": digits().test})
    return Training(train, ConvNet.defaults(train), recipe, KEY.split(EARLY), observe=observe)


def _early_ours(plan: Plan) -> Side:
    return _through_runs(_early_training(), plan)


def _early_flops() -> float:
    """A pass ends in a short batch."""
    training = _early_training()
    passes, rest = divmod(UPDATES, -(-len(training.data) // training.recipe.batch))
    image_steps = EARLY * (passes * len(training.data) + rest * training.recipe.batch)
    return of_digits(image_steps, EARLY * UPDATES * len(digits().test))


def _subset_flops() -> float:
    training = _subset_training()
    steps, batch = training.recipe.steps, training.recipe.batch
    total = 0
    for subset in training.subsets:
        passes, rest = divmod(steps, -(-len(subset) // batch))
        total += passes * len(subset) + min(rest * batch, len(subset))
    return of_digits(total)


HALF = {"float32": {}, "bfloat16 targets": {"targets": "bfloat16"}}
WORKERS = "in worker processes that are up, as in a study"

WORKS: dict[str, Work] = {
    "step": Work(
        "a training step, 256 images, ConvNet-D3-W128",
        _step_reference,
        _step_ours,
        lambda: of_step(convnet, REAL, 3, 32, 32),
        units=STEPS,
        calls=2,
        settings={"float32": {}, "bfloat16": {"precision": "bfloat16"}},
    ),
    "dm": Work(
        "a step of DM, 10 classes of 256 real and 10 distilled images",
        _dm_reference,
        _dm_ours,
        _dm_flops,
        calls=2,
        settings=HALF,
    ),
    "dc_matching": Work(
        "a matching step of DC, 10 classes of 256 real and 10 distilled images",
        _dc_reference,
        _dc_ours,
        _dc_flops,
        settings=HALF,
    ),
    "dc_training": Work(
        "a pass of DC's training on 100 distilled images",
        _dc_training_reference,
        _dc_training_ours,
        lambda: of_step(convnet, K * IPC, 3, 32, 32),
        units=PASSES,
        calls=2,
    ),
    "mtt": Work(
        f"a step of MTT, {INNER} inner steps of 100 images",
        _mtt_reference,
        lambda plan: mtt_ours(INNER),
        _mtt_flops,
        mode="adjoint; the reference keeps the whole graph",
    ),
    "mtt_graph": Work(
        f"a step of MTT, {INNER} inner steps of 100 images",
        _mtt_reference,
        lambda plan: mtt_ours(INNER, "graph"),
        _mtt_flops,
        mode="the whole graph, as the reference",
    ),
    "leave_one_out": Work(
        "101 digits models of 300 full-batch steps",
        _leave_one_out_reference,
        _leave_one_out_ours,
        lambda: of_digits(300 * (100 + 100 * 99)),
        large=False,
        mode=WORKERS,
    ),
    "subsets": Work(
        f"{MODELS} digits models of 300 steps, each on its own subset",
        _subsets_reference,
        _subsets_ours,
        _subset_flops,
        large=False,
        mode=WORKERS,
    ),
    "early_stopped": Work(
        f"{EARLY} digits models of {UPDATES} steps, test predictions after each",
        _early_reference,
        _early_ours,
        _early_flops,
        large=False,
        mode=WORKERS,
    ),
}

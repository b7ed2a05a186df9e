"""What a run will cost is known before it: memory by law, time from a few steps, and a refusal with advice."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distillens import cost, forecast, making, pipeline, studies
from distillens.core.checks import DivergedError, UserError
from distillens.core.contracts import Problem
from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.cost import Cost, saved_bytes, size_in_words
from distillens.distillers.bptt import BPTT
from distillens.distillers.mtt import MTT
from distillens.distillers.rat_bptt import RaTBPTT
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.unroll import Mode, Momentum, unroll


@dataclass(frozen=True)
class Images:
    shape: tuple[int, int, int]
    k: int = 10


SMALL, CIFAR = Images((1, 8, 8)), Images((3, 32, 32))


def kept(net: ConvNet, like: Images, images: int, steps: int, mode: Mode = "graph") -> float:
    """Bytes that autograd really keeps at the end of the inner training, by its own hooks."""
    params, _ = net.init(like, Key(0))
    shapes = Shapes.of(params)
    x, y = Key(1).normal(images, *like.shape), torch.arange(images) % like.k
    return saved_bytes(
        lambda: unroll(
            lambda flat, learned, t: F.cross_entropy(
                net.logits(shapes.unflatten(flat), {}, learned[0])[0], y
            ),
            lambda flat: flat.square().sum(),
            shapes.flatten(params),
            [x],
            torch.full((steps,), 0.01),
            rule=Momentum(0.9),
            mode=mode,
        )
    )


@pytest.mark.parametrize(("net", "like"), [(ConvNet(2, 32), SMALL), (ConvNet(3, 16), CIFAR)])
def test_the_law_of_the_graph_is_what_autograd_keeps(net: ConvNet, like: Images) -> None:
    """bytes = steps (images a + p): linear in both, the slope within a tenth."""
    one = cost.cost(net, like)
    for images in (4, 12):
        counted = [kept(net, like, images, steps) for steps in (2, 4, 6)]
        slopes = [(b - a) / 2 for a, b in pairwise(counted)]
        assert slopes[0] == pytest.approx(slopes[1], rel=0.01)
        assert slopes[0] == pytest.approx(one.step(images), rel=0.1)


def test_the_fields_convnet_costs_about_what_others_measured() -> None:
    """3.64 MB an image and step with nothing counted once, and 2 MB a step, for ConvNet-D3-W128 at 32 px."""
    one = cost.cost(ConvNet(), CIFAR)
    assert one.parameters == 320_010
    assert 2.5e6 < one.second < 3.7e6
    assert one.first < one.second
    assert 1.3e6 < one.fixed < 2.7e6


def test_modes_in_closed_form() -> None:
    one = Cost(first=10.0, second=100.0, fixed=50.0, parameters=25)
    assert one.unrolled(3, 7, "graph") == 7 * 350
    assert one.unrolled(3, 7, "tesla") == 350 + 400
    # 16 steps: gradients of all, whole states every fourth and four replayed, of two vectors each.
    assert one.unrolled(3, 16, "adjoint") == 350 + (16 + 2 * 8) * 100
    assert one.unrolled(3, 16, "adjoint", states="recomputed") == 350 + (4 + 2 * 8) * 100
    assert one.unrolled(3, 16, "adjoint", vectors=3) == 350 + (16 + 3 * 8) * 100


def test_methods_differ_as_the_law_says(planted: Splits) -> None:
    problem = Problem(planted.train, 2, Key(0))
    net = ConvNet(2, 8)
    graph = MTT(syn_steps=40, mode="graph", net=net).memory(problem)
    adjoint = MTT(syn_steps=40, mode="adjoint", net=net).memory(problem)
    again = MTT(syn_steps=40, mode="adjoint", states="recomputed", net=net).memory(problem)
    assert graph > 4 * adjoint > 4 * again
    assert MTT(syn_steps=80, mode="graph", net=net).memory(problem) == 2 * graph
    # A longer training costs nothing where only its window is differentiated.
    rat = RaTBPTT(inner_steps=200, window=20, net=net)
    assert replace(rat, inner_steps=400).memory(problem) == rat.memory(problem)
    assert replace(rat, window=40).memory(problem) > rat.memory(problem)


def test_free_memory_is_a_number_of_this_machine() -> None:
    assert 1e6 < cost.free_bytes(torch.device("cpu")) < 1e15


def test_sizes_and_durations_in_words() -> None:
    assert [size_in_words(x) for x in (5e8, 1.24e9, 2e7, 10)] == ["0.5 GB", "1.2 GB", "20 MB", "1 MB"]
    said = [forecast.duration(s) for s in (0.2, 40, 119, 120, 7300, 5e6)]
    assert said == ["1 s", "40 s", "119 s", "2 min", "2 h", "58 days"]


def short_of_memory(monkeypatch: pytest.MonkeyPatch, count: float) -> None:
    monkeypatch.setattr(forecast, "free_bytes", lambda device: count)


def test_what_does_not_fit_is_refused_with_what_would(
    planted: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(planted.train, 2, Key(0))
    method = BPTT(inner_steps=50, batch_real=2, mode="graph", net=ConvNet(2, 8))
    whole = forecast.SLACK * method.memory(problem)
    short_of_memory(monkeypatch, whole)
    assert forecast.check_fits("bptt", method, problem) == whole
    short_of_memory(monkeypatch, 2 * whole)  # two at a time fit, three do not
    assert forecast.check_fits("bptt", method, problem, at_once=2) == 2 * whole
    with pytest.raises(UserError, match="needed by 3 at once"):
        forecast.check_fits("bptt", method, problem, at_once=3)
    short_of_memory(monkeypatch, whole / 2)
    need = size_in_words(forecast.SLACK * replace(method, mode="adjoint").memory(problem))
    with pytest.raises(UserError) as error:
        forecast.check_fits("bptt", method, problem)
    assert str(error.value) == (
        f"bptt does not fit into memory; got about {size_in_words(whole)} needed, "
        f"{size_in_words(whole / 2)} free on cpu; "
        f"use --set mode=adjoint: the same gradient in about {need}"
    )
    with pytest.raises(UserError, match=r"needed by 4 at once, .*--set mode=adjoint"):
        forecast.check_fits("bptt", method, problem, at_once=4)
    short_of_memory(monkeypatch, 1000)
    with pytest.raises(UserError) as error:
        forecast.check_fits("bptt", method, problem, at_once=2)
    assert str(error.value).endswith(
        "use a smaller --set batch_syn, batch_real, inner_steps, net.width or fewer --workers, "
        "or a machine with more memory"
    )


def test_recomputed_states_are_the_second_advice(planted: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(planted.train, 1, Key(0))
    method = MTT(syn_steps=400, mode="graph", net=ConvNet(2, 8))
    fits = forecast.SLACK * replace(method, mode="adjoint", states="recomputed").memory(problem)
    short_of_memory(monkeypatch, fits)
    with pytest.raises(UserError, match="use --set mode=adjoint --set states=recomputed: the same gradient"):
        forecast.check_fits("mtt", method, problem)


def test_a_distillation_that_does_not_fit_leaves_nothing_behind(
    planted: Splits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short_of_memory(monkeypatch, 1000)
    with pytest.raises(UserError, match="does not fit into memory"):
        pipeline.distill("mtt", planted, ipc=1, to=tmp_path / "run")
    with pytest.raises(UserError, match="does not fit into memory"):
        studies.study(planted, tmp_path / "study", methods=["bptt"], preset="smoke")
    # No folder is taken: the same one serves the settings that fit.
    assert list(tmp_path.iterdir()) == []


def test_a_distillation_says_what_it_will_cost_before_it_runs(planted: Splits) -> None:
    said: list[str] = []
    pipeline.distill(
        "mtt", planted, ipc=1, settings=["steps=4", "net.width=4", "experts=2"], announce=said.append
    )
    assert len(said) == 1
    assert said[0].startswith("2 models to train first, about 1 s; 4 steps, about 1 s; memory about 1 MB")
    pipeline.distill("random_subset", planted, ipc=1, announce=said.append)
    assert len(said) == 1  # nothing to wait for


def test_a_step_is_timed_after_the_first_unless_it_is_long(
    planted: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of the test's own: the first step takes 7 s, each later one 2 s."""
    now = [0.0]

    class Slow:
        steps = 50

        def needs(self, problem: Problem) -> dict[str, Any]:
            return {}

        def start(self, problem: Problem) -> int:
            return 0

        def step(self, problem: Problem, state: int, i: int) -> tuple[int, dict[str, float]]:
            now[0] += 2.0 if i else 7.0
            return state + 1, {}

    slow: Any = Slow()
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: now[0])
    problem = Problem(planted.train, 1, Key(0))
    assert forecast.seconds_a_step(slow, problem) == 7.0
    assert now[0] == 7.0  # over the budget at once: no second one
    monkeypatch.setattr(forecast, "BUDGET", 60.0)
    assert forecast.seconds_a_step(slow, problem) == 2.0
    assert now[0] == 7.0 + 7.0 + 2 * 2.0


def test_random_experts_stand_in_for_those_that_are_not_there_yet(planted: Splits) -> None:
    method = MTT(syn_steps=3, experts=5, max_start_epoch=3, net=ConvNet(1, 4), augment="")
    seconds = forecast.seconds_a_step(method, Problem(planted.train, 1, Key(0)))
    assert seconds is not None and 0 < seconds < math.inf
    look = forecast.outlook("mtt", method, Problem(planted.train, 1, Key(0)), Plan())
    assert (look.models, look.steps) == (5, 5000)
    assert look.seconds > 0 and look.seconds_before > 0
    # Those that were brought along are not trained.
    experts = Runs(Plan()).trajectories(
        replace(method, experts=1).needs(Problem(planted.train, 1, Key(0)))["experts"]
    )
    look = forecast.outlook("mtt", method, Problem(planted.train, 1, Key(0), {"experts": experts}), Plan())
    assert (look.models, look.seconds_before) == (0, 0)
    assert look.text().startswith("5,000 steps, about ")


# ---- a run that leaves the finite numbers ----


def test_a_diverging_run_keeps_its_last_good_set(planted: Splits, tmp_path: Path) -> None:
    """The images grow a thousandfold a step: a few steps are good, then no more."""
    to = tmp_path / "run"
    settings = ["steps=50", "net.width=4", "net.norm=none", "lr_img=1e9", "batch_real=4", "momentum=0"]
    with pytest.raises(DivergedError) as error:
        pipeline.distill("dm", planted, ipc=1, settings=settings, to=to)
    good = pipeline.DistilledDataset.load(to / "last_good")
    assert good.provenance is not None
    steps = good.provenance.settings["steps"]
    assert 1 <= steps < 50
    assert str(error.value) == (
        "the distillation diverged: the step of the images is not finite; "
        "the last good state is kept; start again with --force and a smaller --set lr_img; "
        f"the set after {steps} steps: {to / 'last_good'}"
    )
    assert not (to / "provenance.json").exists()
    # Its provenance is true: so many steps give the same bytes.
    fewer = [f"steps={steps}", *settings[1:]]
    again = pipeline.distill("dm", planted, ipc=1, settings=fewer)
    assert again.fingerprint == good.fingerprint
    # The same command goes on from there, and fails in the same way.
    with pytest.raises(DivergedError, match=f"the set after {steps} steps"):
        pipeline.distill("dm", planted, ipc=1, settings=settings, to=to)


def test_an_interrupted_run_goes_on_from_where_it_was(
    planted: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = making.order("dm", planted, 1, settings=["steps=6", "net.width=4", "batch_real=4"])
    problem, about = order.problem(planted.train), order.provenance(planted, Plan())
    whole = making.run(order.distiller, problem, about, None)
    kind, done = type(order.distiller), []
    original = kind.step

    def step(self: Any, problem: Any, state: Any, i: int) -> Any:
        done.append(i)
        if len(done) == 5:
            raise KeyboardInterrupt
        return original(self, problem, state, i)

    monkeypatch.setattr(kind, "step", step)
    with pytest.raises(KeyboardInterrupt):
        making.run(order.distiller, problem, about, tmp_path)
    made = making.run(order.distiller, problem, about, tmp_path)
    assert done == [0, 1, 2, 3, 4, 4, 5]  # nothing that was finished is done again
    assert made.fingerprint == whole.fingerprint

"""Plans by measurement: made once, kept for the machine, taken again whatever the clock says then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distillens import kernels, tuning
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset
from distillens.core.rng import Key
from distillens.data.planted import planted
from distillens.engine import plan as plans
from distillens.engine.plan import Plan
from distillens.kernels import compiled, convolutions, planes
from distillens.nets.convnet import ConvNet

NET = ConvNet(depth=1, width=4)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with nothing in it, and nothing in memory."""
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path)
    monkeypatch.setattr(tuning, "BUDGET", 0.001)
    tuning._measured.cache_clear()
    return tmp_path


@pytest.fixture
def small() -> Dataset:
    return planted(Key(1), shape=(1, 8, 8), per_class=4).train


@pytest.fixture
def large() -> Dataset:
    return planted(Key(1), shape=(1, 20, 20), per_class=4).train


def clock(monkeypatch: pytest.MonkeyPatch, seconds) -> list[Plan]:
    """Let each candidate take the seconds that are told; the candidates asked about."""
    asked: list[Plan] = []

    def take(about, plan: Plan, batch: int, models: int) -> float:
        asked.append(plan)
        return float(seconds(plan, batch, models))

    monkeypatch.setattr(tuning, "_seconds", take)
    return asked


def forget() -> None:
    tuning._measured.cache_clear()


def test_a_real_measurement_gives_a_plan_that_can_be_pinned(small: Dataset) -> None:
    plan = tuning.plan_for(small, NET)
    assert plan.threads == 1 and plan.precision == "float32" and plan.targets == "float32"
    with plan.pinned():
        pass


@pytest.mark.parametrize("can", [True, False])
def test_an_accelerator_has_traced_graphs_where_they_are_faster(
    can: bool, small: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan is its own: neither a CPU's kernels nor what was measured for one."""
    clock(monkeypatch, lambda plan, batch, models: models)
    assert not tuning.plan_for(small, NET).traced

    def seconds(plan: Plan, batch: int, models: int) -> float:
        if plan.traced and not can:
            raise RuntimeError("no compiler")
        return 0.5 if plan.traced else 1.0

    asked = clock(monkeypatch, seconds)
    monkeypatch.setattr(
        Dataset, "__post_init__", lambda self: None
    )  # looks at numbers, of which there are none
    there = small.to(torch.device("meta"))
    assert tuning.plan_for(there, NET) == Plan("stacked", 32, 3200, kernels="plain", traced=can)
    assert {one.kernels for one in asked} == {"plain"}
    asked = clock(monkeypatch, lambda plan, batch, models: 1 + plan.traced)
    for path in folder.glob("plan-*.json"):
        path.unlink()
    forget()
    assert not tuning.plan_for(there, NET).traced


def test_what_was_measured_once_is_taken_again(
    small: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, lambda plan, batch, models: 1.0)  # a stack costs no more than one: the largest wins
    first = tuning.plan_for(small, NET)
    assert (first.layout, first.chunk, first.images) == ("stacked", 32, 3200)
    assert len(list(folder.glob("plan-*.json"))) == 1
    forget()
    asked = clock(monkeypatch, lambda plan, batch, models: float(models))
    assert tuning.plan_for(small, NET) == first
    assert asked == []


def test_other_kernels_are_measured_anew(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, lambda plan, batch, models: 1.0)
    tuning.plan_for(small, NET)
    forget()
    sources = compiled.sources()
    monkeypatch.setattr(compiled, "sources", lambda: sources + b"//")
    asked = clock(monkeypatch, lambda plan, batch, models: float(models))
    assert tuning.plan_for(small, NET).layout == "loop"
    assert asked


def test_all_that_is_compiled_is_among_the_sources() -> None:
    here = Path(compiled.__file__).parent
    written = [one for one in here.iterdir() if one.suffix in {".cpp", ".h"}]
    assert {"planes.cpp", "rings.h", "winograd.h"} <= {one.name for one in written}
    assert sum(one.stat().st_size for one in written) == len(compiled.sources())
    assert all(one.read_bytes() in compiled.sources() for one in written)


def test_of_two_processes_that_measure_at_once_the_first_is_right(
    small: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, lambda plan, batch, models: 1.0)
    first = tuning.plan_for(small, NET)
    (path,) = folder.glob("plan-*.json")
    written = path.read_bytes()
    path.unlink()
    forget()

    def meanwhile(plan: Plan, batch: int, models: int) -> float:
        path.write_bytes(written)
        return float(models)

    clock(monkeypatch, meanwhile)
    assert tuning.plan_for(small, NET) == first
    assert path.read_bytes() == written


def test_a_damaged_measurement_is_made_again(
    small: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, lambda plan, batch, models: 1.0)
    first = tuning.plan_for(small, NET)
    (path,) = folder.glob("plan-*.json")
    for damage in (
        b"",
        b"{}",
        b"[1]",
        b'{"plan": {"is": "os.system"}, "seconds": 1}',
        path.read_bytes()[:40],
    ):
        path.write_bytes(damage)
        forget()
        assert tuning.plan_for(small, NET) == first


@pytest.mark.parametrize("best", kernels.available())
def test_the_fastest_is_taken(small: Dataset, monkeypatch: pytest.MonkeyPatch, best: str) -> None:
    # A stack of 4 costs half of 4 at 10 images; at 100 a stack gains nothing.
    def seconds(plan: Plan, batch: int, models: int) -> float:
        each = 0.5 if batch == 10 and models == 4 else 1.0
        return each * models * (0.7 if plan.kernels == best else 1.0)

    clock(monkeypatch, seconds)
    plan = tuning.plan_for(small, NET)
    assert (plan.layout, plan.chunk, plan.images) == ("stacked", 4, 40)
    assert plan.models_together(10) == 4 and plan.models_together(100) == 1
    assert plan.kernels == best


def test_a_gain_within_the_noise_is_not_worth_a_larger_stack(
    small: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, lambda plan, batch, models: models * (0.99 if models > 1 else 1.0))
    assert tuning.plan_for(small, NET).layout == "loop"


def test_a_gain_beyond_the_noise_is(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, lambda plan, batch, models: models * (0.96 if models >= 8 else 1.0))
    assert tuning.plan_for(small, NET).chunk == 8


def test_the_least_disturbed_of_several_rounds_counts(
    small: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "BUDGET", 60.0)
    calls: list[int] = []

    def disturbed(plan: Plan, batch: int, models: int) -> float:
        calls.append(models)
        return models * (1.0 if models != 4 else 0.8 if calls.count(4) % 5 == 0 else 1.1)

    clock(monkeypatch, disturbed)
    assert tuning.plan_for(small, NET).chunk == 4


def test_beyond_a_stack_that_left_the_caches_none_is_tried(
    small: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "BUDGET", 60.0)
    asked = clock(monkeypatch, lambda plan, batch, models: models * (2.0 if models >= 8 else 1.0))
    assert tuning.plan_for(small, NET).layout == "loop"
    assert max(plan.chunk for plan in asked) == 8


def test_the_threads_of_one_job_alone_are_measured_on_large_images(
    large: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "cores", lambda: 4)
    clock(monkeypatch, lambda plan, batch, models: models / plan.threads)
    assert tuning.plan_for(large, NET).threads == 4
    assert tuning.plan_for(large, NET, jobs=2).threads == 2
    assert tuning.plan_for(large, NET, jobs=4).threads == 1


def test_a_number_of_threads_has_one_plan_however_it_was_come_by(
    large: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "cores", lambda: 4)
    clock(monkeypatch, lambda plan, batch, models: models / plan.threads)
    together = tuning.plan_for(large, NET, jobs=4)
    asked = clock(monkeypatch, lambda plan, batch, models: 1.0 / models)
    assert tuning.plan_for(large, NET, threads=1) == together
    assert asked == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_the_precision_that_is_asked_for_is_taken(
    precision: str, large: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = clock(monkeypatch, lambda plan, batch, models: 1.0)
    plan = tuning.plan_for(large, NET, precision=precision)
    assert {one.precision for one in asked} == {precision} == {plan.precision}
    assert plan.targets == "float32"
    assert tuning.wish(plan, large) == [f"--precision {precision}"]


@pytest.mark.parametrize(("gain", "taken"), [(1.1, "float32"), (1.3, "bfloat16")])
def test_unasked_bfloat16_is_taken_only_where_it_is_clearly_faster(
    gain: float, taken: str, large: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(
        monkeypatch,
        lambda plan, batch, models: models / (gain if plan.precision == "bfloat16" else 1),
    )
    assert tuning.plan_for(large, NET).precision == taken


@pytest.mark.parametrize("side", [8, 16, 40, 64])
def test_on_images_where_it_gains_nothing_or_is_not_shown_bfloat16_is_never_taken_unasked(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = planted(Key(1), shape=(1, side, side), per_class=4).train
    asked = clock(monkeypatch, lambda plan, batch, models: 0.01 if plan.precision == "bfloat16" else 1.0)
    plan = tuning.plan_for(data, NET)
    assert {one.precision for one in asked} == {"float32"} == {plan.precision}
    assert tuning.wish(plan, data) == []
    assert tuning.wish(replace(plan, precision="bfloat16"), data) == ["--precision bfloat16"]


def test_only_training_is_rounded() -> None:
    plan = Plan(precision="bfloat16", targets="bfloat16")
    with plan.training():
        assert kernels.current().products == torch.bfloat16
        with plan.pinned():
            assert kernels.current().products == torch.float32
            with kernels.for_targets():
                assert kernels.current().products == torch.bfloat16
        assert kernels.current().products == torch.bfloat16
    assert kernels.current().products == torch.float32


@pytest.mark.parametrize("compiled_ones", ["fused", "winograd"])
def test_a_plan_of_compiled_kernels_is_refused_where_there_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, compiled_ones: kernels.Kernels
) -> None:
    monkeypatch.setattr(planes, "available", lambda: False)
    with (
        pytest.raises(UserError, match="no C\\+\\+ compiler that makes them here"),
        Plan(kernels=compiled_ones).pinned(),
    ):
        pass
    with replace(Plan(), kernels="plain").pinned():
        pass
    assert Plan.resolve(planted(Key(1), shape=(1, 8, 8), per_class=4).train).kernels == "plain"
    assert kernels.available() == ("plain",)


@pytest.mark.skipif(not planes.available(), reason="no C++ compiler")
def test_a_compiler_that_makes_the_planes_alone_is_enough_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "available", lambda: False)
    assert kernels.available() == ("plain", "fused")
    with pytest.raises(UserError, match="compiled kernels"), Plan(kernels="winograd").pinned():
        pass

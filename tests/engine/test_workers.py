from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distillens.core.checks import UserError
from distillens.core.rng import Key
from distillens.core.storage import fingerprint
from distillens.engine import workers
from distillens.engine.plan import cores
from distillens.engine.workers import Engine, pinned_threads

# ---- jobs ----


def numbers(seed: int) -> torch.Tensor:
    """Work whose last bits depend on the threads and on any generator that was left set."""
    random.random()
    torch.rand(3)
    draws = Key(seed).normal(64, 300)
    return torch.linalg.svdvals(draws).cumsum(0) @ torch.ones(64)


def total(tensor: torch.Tensor, row: int) -> tuple[float, int]:
    return float(tensor[row].sum()), os.getpid()


def large(n: int) -> torch.Tensor:
    return torch.arange(n)


def whose_and_threads(_: int) -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def dies_once(folder: str, number: int) -> int:
    """At the first try job 2 kills its worker while job 1 still runs beside it."""
    here = Path(folder)
    if number == 1 and not (here / "begun").exists():
        (here / "begun").touch()
        time.sleep(60)  # ended by the engine
    if number == 2 and not (here / "died").exists():
        while not (here / "begun").exists():
            time.sleep(0.01)
        (here / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * number


def always_dies(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuses(number: int) -> int:
    if number == 3:
        raise UserError("job 3 cannot be done", got="3", fix="leave it out")
    return number


def crashes(number: int) -> int:
    return 1 // (number - 1)


@pytest.fixture(scope="module")
def two(jobs_can_be_imported: None) -> Iterator[Engine]:
    """Two workers that the tests share."""
    with Engine(2) as engine:
        yield engine


def test_one_worker_is_this_process() -> None:
    found = list(Engine(1).map(whose_and_threads, [(0,), (1,)]))
    assert [index for index, _ in found] == [0, 1]
    assert {who for _, (who, _) in found} == {os.getpid()}


def test_a_single_job_starts_no_worker() -> None:
    with Engine(2) as engine:
        assert list(engine.map(whose_and_threads, [(0,)])) == [(0, (os.getpid(), 1))]
        assert list(engine.map(whose_and_threads, [])) == []
        assert engine._pool is None


def test_workers_are_other_processes_with_their_own_threads(two: Engine) -> None:
    found = dict(two.map(whose_and_threads, [(i,) for i in range(12)]))
    assert sorted(found) == list(range(12))
    assert os.getpid() not in {who for who, _ in found.values()}
    assert {threads for _, threads in found.values()} == {1}


def test_two_workers_give_the_bytes_of_one(two: Engine) -> None:
    jobs = [(seed,) for seed in range(9)]
    inline = dict(Engine(1).map(numbers, jobs))
    torch.manual_seed(3)
    processes = dict(two.map(numbers, jobs))
    assert [fingerprint(processes[i]) for i in range(9)] == [fingerprint(inline[i]) for i in range(9)]


def test_a_caller_who_has_seen_enough_ends_the_workers(two: Engine) -> None:
    waiting = two.map(numbers, [(seed,) for seed in range(6)])
    assert next(waiting)[0] in range(6)
    waiting.close()
    assert two._pool is None
    assert dict(two.map(refuses, [(0,), (1,)])) == {0: 0, 1: 1}


def test_an_error_in_a_job_reaches_the_caller_and_the_engine_goes_on(two: Engine) -> None:
    with pytest.raises(UserError) as error:
        list(two.map(refuses, [(i,) for i in range(6)]))
    assert str(error.value) == "job 3 cannot be done; got 3; leave it out"
    with pytest.raises(ZeroDivisionError):
        list(two.map(crashes, [(0,), (1,), (2,)]))
    assert dict(two.map(refuses, [(0,), (1,)])) == {0: 0, 1: 1}


def test_an_error_here_is_the_same_error() -> None:
    done = []
    with pytest.raises(UserError, match="job 3 cannot be done"):
        done += [result for _, result in Engine(1).map(refuses, [(i,) for i in range(6)])]
    assert torch.get_num_threads() == 1


def test_a_worker_that_is_killed_has_its_jobs_run_again(two: Engine, tmp_path: Path) -> None:
    found = list(two.map(dies_once, [(str(tmp_path), number) for number in range(6)]))
    assert (tmp_path / "died").exists()
    assert sorted(found) == [(i, 10 * i) for i in range(6)]  # each once


def test_a_job_that_always_kills_its_worker_is_given_up(two: Engine) -> None:
    with pytest.raises(UserError, match="a worker process was killed 3 times at the same work"):
        list(two.map(always_dies, [(0,), (1,)]))
    assert dict(two.map(refuses, [(0,), (1,)])) == {0: 0, 1: 1}


def test_a_large_tensor_is_written_once_and_read_by_all(two: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LARGE", 400)
    tensor = Key(0).normal(20, 10)[:, ::2]  # not contiguous
    jobs = [(tensor, row) for row in range(20)]
    found = dict(two.map(total, jobs))
    assert {row: found[row][0] for row in range(20)} == {
        row: pytest.approx(float(tensor[row].sum())) for row in range(20)
    }
    spool = Path(two.spool(tensor)).parent
    assert len(list(spool.iterdir())) == 1
    small = Key(1).normal(3, 5)
    assert dict(two.map(total, [(small, 0), (small, 1)]))[1][0] == float(small[1].sum())
    assert len(list(spool.iterdir())) == 1  # what is small travels with its job
    again = dict(two.map(total, jobs[:2]))
    assert again[1][0] == found[1][0]
    assert len(list(spool.iterdir())) == 1
    two.close()
    assert not spool.exists()


def test_large_results_come_back(two: Engine) -> None:
    found = dict(two.map(large, [(1 << 20,), (3,), (1 << 20,)]))
    assert torch.equal(found[0], torch.arange(1 << 20))
    assert torch.equal(found[1], torch.arange(3))


def test_workers_that_began_early_do_the_jobs() -> None:
    def started() -> set[int | None]:
        return {child.pid for child in multiprocessing.active_children()} - others

    others: set[int | None] = set()
    others = started()
    with Engine(1) as alone:
        alone.begin()
        assert not started()
    with Engine(2) as engine:
        engine.begin()
        begun = started()
        ran = {who for _, (who, _) in engine.map(whose_and_threads, [(i,) for i in range(6)])}
        assert begun & ran


def test_closing_ends_the_workers() -> None:
    others = multiprocessing.active_children()
    engine = Engine(2)
    list(engine.map(whose_and_threads, [(0,), (1,)]))
    mine = [child for child in multiprocessing.active_children() if child not in others]
    assert mine and all(child.is_alive() for child in mine)
    engine.close()
    assert not [child for child in mine if child.is_alive()]
    engine.close()  # once more is harmless


@pytest.mark.parametrize(("given", "message"), [((0, 1), "workers"), ((1, 0), "threads")])
def test_an_engine_has_at_least_one_worker_and_thread(given: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError) as error:
        Engine(*given)
    assert str(error.value) == f"engine: {message} must be at least 1; got 0"


def test_threads_are_pinned_for_a_while() -> None:
    before = torch.get_num_threads()
    with pinned_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        with pinned_threads(before + 1):
            assert torch.get_num_threads() == before + 1
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="on the way"), pinned_threads(before + 1):
        raise RuntimeError("on the way")
    assert torch.get_num_threads() == before


def test_jobs_here_have_the_engines_threads_and_the_caller_its_own() -> None:
    for _, (_, threads) in Engine(1, 3).map(whose_and_threads, [(0,), (1,)]):
        assert threads == 3
        assert torch.get_num_threads() == 1


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


UNGUARDED = """
from distillens import Key, Recipe, load
from distillens.engine.plan import Plan
from distillens.engine.workers import Engine
from distillens.nets.mlp import MLP
from distillens.runs import Runs
from distillens.train import Training

print("the script runs", __name__)
data = load("digits").train
with Engine(2, 1) as engine:
    (made,) = Runs(Plan("loop"), engine).get(Training(data, MLP(width=4), Recipe(steps=2, batch=8), Key(0).split(3)))
print(len(made), __file__.endswith("script.py"), __spec__)
"""

OWN_NETWORK = """
from dataclasses import dataclass

from distillens import Key, Recipe, load
from distillens.engine.plan import Plan
from distillens.engine.workers import Engine
from distillens.nets.mlp import MLP
from distillens.runs import Runs
from distillens.train import Training


@dataclass(frozen=True)
class Mine(MLP):
    pass


def main() -> None:
    data = load("digits").train
    with Engine(2, 1) as engine:
        runs = Runs(Plan("loop"), engine)
        for net in (MLP(width=4), Mine(width=4), MLP(width=5)):  # the pool is started anew for the second
            print(len(runs.get(Training(data, net, Recipe(steps=2, batch=8), Key(0).split(3)))[0]))


if __name__ == "__main__":
    main()
"""


def said_by(script: str, folder: Path) -> list[str]:
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(folder / "script.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """Workers do not run the user's script again."""
    assert said_by(UNGUARDED, tmp_path) == ["the script runs __main__", "3 True None"]


def test_a_network_of_the_users_script_reaches_the_workers(tmp_path: Path) -> None:
    assert said_by(OWN_NETWORK, tmp_path) == ["3", "3", "3"]

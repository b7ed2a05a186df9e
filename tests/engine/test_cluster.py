"""The same jobs on a real Ray cluster of this machine: same bytes, nothing lost, nothing counted twice."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distillens.core.checks import UserError
from distillens.core.contracts import Buffers, Like, Params
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.core.storage import fingerprint
from distillens.engine import cluster as clusters
from distillens.engine import workers
from distillens.engine.cluster import Cluster
from distillens.engine.plan import Plan
from distillens.experts import Experts
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.runs import Runs
from distillens.train import Observe, Training

ray = pytest.importorskip("ray")

PLAN = Plan("stacked", 2)  # five models are three chunks
DRIVER = "DISTILLENS_TEST_DRIVER"

# ---- jobs ----


def numbers(seed: int) -> torch.Tensor:
    """Work whose last bits depend on the threads."""
    draws = Key(seed).normal(64, 300)
    return torch.linalg.svdvals(draws).cumsum(0) @ torch.ones(64)


def whose_and_threads(_: int) -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def about(tensor: torch.Tensor, row: int) -> tuple[str, tuple[int, ...], str]:
    return fingerprint(tensor[row].float()), tuple(tensor.shape), str(tensor.dtype)


def one_of_two(pair: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return pair[0] is pair[1]


def large(n: int) -> torch.Tensor:
    return torch.arange(n)


def refuses(number: int) -> int:
    if number == 3:
        raise UserError("job 3 cannot be done", got="3", fix="leave it out")
    return number


def crashes(number: int) -> int:
    return 1 // (number - 1)


def dies_once(folder: str, number: int) -> int:
    """Job 2 kills its worker at the first try; every job notes each time that it is carried to its end."""
    here = Path(folder)
    if number == 2 and not (here / "died").exists():
        (here / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with (here / f"done-{number}").open("a") as file:
        file.write("x")
    return 10 * number


def always_dies(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@dataclass(frozen=True)
class Mortal(MLP):
    """A network whose first training on a worker kills it."""

    folder: str = ""

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        mark = Path(self.folder) / "died"
        if os.environ.get(DRIVER) != str(os.getpid()) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().init(like, key)


# ---- values ----


def data(place: str = "data", n: int = 9) -> Dataset:
    return Dataset(
        Key(1).fold(place).normal(n, 1, 8, 12), Hard(torch.arange(n) % 3), ("a", "b", "c"), Pixel()
    )


def training(seed: int = 0, net: Any = ConvNet(depth=1, width=4)) -> Training:  # noqa: B008
    return Training(
        data(),
        net,
        Recipe(steps=4, lr=0.1, batch=5),
        Key(seed).split(5),
        snapshots=(0, 2),
        observe=Observe((1, 4), {"watched": data("watched", 7)}),
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def two(jobs_can_be_imported: None, small_cluster: Any) -> Iterator[Cluster]:
    """Two workers of a small cluster that the tests share."""
    with Cluster(2) as cluster:
        yield cluster
    assert ray.is_initialized()  # closing leaves alone what it did not start


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that is put into the object store from here."""
    seen: list[Any] = []
    put = ray.put

    def counted(value: Any) -> Any:
        seen.append(value)
        return put(value)

    monkeypatch.setattr(ray, "put", counted)
    return seen


def test_workers_are_other_processes_with_their_own_threads(two: Cluster) -> None:
    found = dict(two.map(whose_and_threads, [(i,) for i in range(8)]))
    assert sorted(found) == list(range(8))
    assert os.getpid() not in {who for who, _ in found.values()}
    assert {threads for _, threads in found.values()} == {1}
    assert list(two.map(whose_and_threads, [])) == []
    ((index, (who, _)),) = two.map(whose_and_threads, [(0,)])
    assert index == 0 and who != os.getpid()  # one job too: the machine that plans is not one that works


def test_a_cluster_gives_the_bytes_of_this_process(two: Cluster) -> None:
    jobs = [(seed,) for seed in range(6)]
    found = dict(two.map(numbers, jobs))
    assert [fingerprint(found[i]) for i in range(6)] == [fingerprint(numbers(*job)) for job in jobs]


def test_populations_have_the_bytes_of_this_process(two: Cluster, tmp_path: Path) -> None:
    asked = [training(0), training(1, MLP(width=5))]
    Runs(PLAN, folder=tmp_path / "here").make(asked)
    runs = Runs(PLAN, two, tmp_path / "there")
    runs.make(asked)
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert set(runs.trained.values()) == {1} and sum(runs.trained.values()) == 10
    (memory,) = Runs(PLAN, two).get(asked[0])
    assert torch.equal(memory.final, runs.get(asked[0])[0].final)
    memory.final.add_(1)  # what comes back is the caller's own


def test_experts_have_the_bytes_of_this_process(two: Cluster, tmp_path: Path) -> None:
    asked = Experts(data(), ConvNet(depth=1, width=4), Recipe(batch=4, lr=0.1), Key(0).split(3), 2)
    here = Runs(PLAN, folder=tmp_path / "here").trajectories(asked)
    runs = Runs(PLAN, two, tmp_path / "there")
    assert files(tmp_path / "there") == {}
    there = runs.trajectories(asked)
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert all(torch.equal(there.at(e, t), here.at(e, t)) for e in range(3) for t in range(3))


def test_a_part_of_trajectories_travels_once_and_not_as_a_file(
    two: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, puts: list[Any]
) -> None:
    asked = Experts(data(), ConvNet(depth=1, width=4), Recipe(batch=4, lr=0.1), Key(0).split(3), 2)
    runs = Runs(PLAN, two, tmp_path / "store")
    runs.make([asked])
    monkeypatch.setattr(workers, "LARGE", 4000)  # below a part of the experts, above the data
    puts.clear()
    jobs = [(runs.trajectories(asked), e, 1) for e in (0, 1, 2, 0)]
    for file in (tmp_path / "store" / "experts").iterdir():
        file.rename(tmp_path / file.name)  # out of the workers' reach
    found = dict(two.map(type(jobs[0][0]).at, jobs))
    assert all(torch.equal(found[i], job[0].at(*job[1:])) for i, job in enumerate(jobs))
    assert len(puts) == 2  # three experts lie in two parts


def test_a_large_tensor_is_put_once_for_all_jobs(
    two: Cluster, monkeypatch: pytest.MonkeyPatch, puts: list[Any]
) -> None:
    monkeypatch.setattr(workers, "LARGE", 400)
    tensor = Key(0).normal(20, 20)[:, ::2]  # not contiguous
    half = tensor.bfloat16()
    found = dict(two.map(about, [(tensor, row) for row in range(20)]))
    assert found == {row: about(tensor, row) for row in range(20)}
    assert len(puts) == 1
    assert dict(two.map(about, [(half, 3), (tensor, 3)])) == {0: about(half, 3), 1: about(tensor, 3)}
    assert len(puts) == 2
    small = Key(1).normal(3, 5)
    assert dict(two.map(about, [(small, 0)])) == {0: about(small, 0)}
    assert len(puts) == 2  # what is small travels with its job
    assert dict(two.map(one_of_two, [((tensor, tensor),), ((tensor, half),)])) == {0: True, 1: False}
    assert len(puts) == 2


def test_large_results_come_back(two: Cluster) -> None:
    found = dict(two.map(large, [(1 << 20,), (3,), (1 << 20,)]))
    assert torch.equal(found[0], torch.arange(1 << 20))
    assert torch.equal(found[1], torch.arange(3))


def test_an_error_in_a_job_is_raised_as_itself_and_the_cluster_goes_on(two: Cluster) -> None:
    with pytest.raises(UserError) as error:
        list(two.map(refuses, [(i,) for i in range(6)]))
    assert type(error.value) is UserError
    assert str(error.value) == "job 3 cannot be done; got 3; leave it out"
    with pytest.raises(ZeroDivisionError) as crash:
        list(two.map(crashes, [(0,), (1,), (2,)]))
    assert "in crashes" in str(crash.value.__cause__)  # where it happened over there
    assert dict(two.map(refuses, [(0,), (1,)])) == {0: 0, 1: 1}


def test_a_caller_who_has_seen_enough_ends_the_work(two: Cluster) -> None:
    waiting = two.map(numbers, [(seed,) for seed in range(6)])
    assert next(waiting)[0] in range(6)
    waiting.close()
    assert dict(two.map(refuses, [(0,), (1,)])) == {0: 0, 1: 1}


def test_a_worker_that_is_killed_has_its_job_run_again(two: Cluster, tmp_path: Path) -> None:
    found = list(two.map(dies_once, [(str(tmp_path), number) for number in range(6)]))
    assert (tmp_path / "died").exists()
    assert sorted(found) == [(i, 10 * i) for i in range(6)]  # each once
    assert [(tmp_path / f"done-{i}").read_text() for i in range(6)] == [
        "x"
    ] * 6  # only what was lost runs again


def test_a_training_that_is_killed_ends_in_the_same_bytes(
    two: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DRIVER, str(os.getpid()))
    asked = training(3, Mortal(width=4, folder=str(tmp_path)))
    runs = Runs(PLAN, two, tmp_path / "there")
    runs.make([asked])
    assert (tmp_path / "died").exists()
    assert set(runs.trained.values()) == {1} and sum(runs.trained.values()) == 5
    Runs(PLAN, folder=tmp_path / "here").make([asked])
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_a_job_that_always_kills_its_worker_is_given_up(two: Cluster) -> None:
    with pytest.raises(UserError, match="a worker process was killed 3 times at the same work"):
        list(two.map(always_dies, [(0,), (1,)]))
    assert dict(two.map(refuses, [(0,), (1,)])) == {0: 0, 1: 1}


def test_workers_are_as_many_as_the_cluster_carries(two: Cluster) -> None:
    assert two.workers == 2 and two.place == "cluster"
    assert Cluster().workers == 2
    assert Cluster(threads=2).workers == 1
    assert clusters._carried({"CPU": 9.0, "GPU": 2.0}, 2, 0.0) == 4
    assert clusters._carried({"CPU": 9.0, "GPU": 2.0}, 2, 0.5) == 4
    assert clusters._carried({"CPU": 90.0, "GPU": 2.0}, 2, 0.1) == 20
    assert clusters._carried({}, 1, 1.0) == 0


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (
            {"threads": 3},
            "no machine of the cluster carries a job; expected one with 3 cores",
        ),
        (
            {"gpus": 0.5},
            "no machine of the cluster carries a job; expected one with 1 cores and 0.5 of a GPU",
        ),
        ({"workers": 0}, "engine: workers must be at least 1; got 0"),
        ({"gpus": -1}, "engine: gpus must be at least 0; got -1"),
    ],
)
def test_a_cluster_that_carries_no_job_is_refused(two: Cluster, wish: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Cluster(**wish)
    assert str(error.value) == message


def test_a_program_has_one_cluster(two: Cluster) -> None:
    here = ray.get_runtime_context().gcs_address
    assert Cluster(address=here).workers == Cluster(address="auto").workers == 2
    with pytest.raises(UserError) as error:
        Cluster(address="10.0.0.1:6379")
    assert str(error.value) == f"this program is connected to another cluster than 10.0.0.1:6379; got {here}"


def test_another_torch_on_a_machine_is_refused(two: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.__version__
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    with pytest.raises(UserError) as error:
        list(two.map(refuses, [(0,)]))
    assert str(error.value) == (
        f"the machines of the cluster have different versions of torch: {socket.gethostname()}; "
        f"got {there}; expected 0.0.1"
    )


def test_ray_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError) as error:
        Cluster()
    assert str(error.value).startswith("the engine ray needs Ray; got ")
    assert str(error.value).endswith("; pip install 'distillens[cluster]'")


EXPECTED = "expected auto on a machine of the cluster, or the host:port that ray start --head printed"


@pytest.mark.parametrize("address", ["nonsense", "ray://127.0.0.1:10001", "host:port", ":6379", "host:"])
def test_what_is_no_address_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError) as error:
        Cluster(address=address)
    assert str(error.value) == f"there is no Ray cluster at {address}; got no host:port; {EXPECTED}"


def test_an_address_where_nothing_answers_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"there is no Ray cluster at {address}; got .*refused"):
            Cluster(address=address)


def test_an_address_where_something_else_answers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as other:
                other.recv(100)
                other.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no Ray cluster at {address}; got something else answers there"):
            Cluster(address=address)
        thread.join()


def test_auto_without_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: Any, **__: Any) -> None:
        raise ConnectionError(
            "Could not find any running Ray instance. Please specify the one to connect to."
        )

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError) as error:
        Cluster(address="auto")
    assert str(error.value) == (
        f"there is no Ray cluster at auto; got Could not find any running Ray instance; {EXPECTED}"
    )


OWN_NETWORK = """
from dataclasses import dataclass

from distillens import Key, Recipe, load
from distillens.engine.cluster import Cluster
from distillens.engine.plan import Plan
from distillens.nets.mlp import MLP
from distillens.runs import Runs
from distillens.train import Training


@dataclass(frozen=True)
class Mine(MLP):
    pass


print("the script runs", __name__)
data = load("digits").train
with Cluster(2) as cluster:
    runs = Runs(Plan("loop"), cluster)
    (made,) = runs.get(Training(data, Mine(width=4), Recipe(steps=2, batch=8), Key(0).split(3)))
    print(len(made), type(made.net) is Mine)
import ray
print(ray.is_initialized())
"""


def test_a_cluster_of_its_own_serves_a_script_with_a_network_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(OWN_NETWORK)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the script runs __main__", "3 True", "False"]

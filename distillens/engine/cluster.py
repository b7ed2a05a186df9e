"""The same work on the machines of a Ray cluster, with the same bytes."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import FunctionType, TracebackType
from typing import Any, Final, Self

import torch

from distillens.core.checks import UserError, at_least
from distillens.engine.plan import cores
from distillens.engine.workers import TRIES, given_up, is_large, pack, run_packed, settle_process

SECONDS = 5.0  # to reach a cluster's address in


class Cluster:
    """Runs jobs as Ray tasks of ``threads`` threads, and of ``gpus`` of a GPU, each.

    Without ``address`` the cluster is this machine, started and ended here; ``auto`` is the one this machine
    belongs to, and ``host:port`` any other. A program that is connected to a cluster stays so. ``workers`` are as
    many jobs at a time as the cluster carries where no number is given.

    The machines need not share a disk: all that a job takes and gives travels with it, a large tensor once for
    all jobs. They need the same versions of Python, Ray, torch and distillens, and for the same bytes the same
    kind of processor. A job whose worker or machine died is run again.

    Raises:
        UserError: Ray is missing, there is no cluster at the address, or none of its machines carries a job.
    """

    place: Final = "cluster"

    def __init__(
        self, workers: int | None = None, threads: int = 1, gpus: float = 0.0, address: str | None = None
    ) -> None:
        at_least(1, "engine", threads=threads, **({} if workers is None else {"workers": workers}))
        at_least(0, "engine", gpus=gpus)
        self.threads = threads
        self.gpus = gpus
        self._ray = _ray()
        self._sent: dict[int, tuple[torch.Tensor, Any]] = {}
        self._connected = self._connect(address, workers or max(1, cores() // threads))
        carried = sum(
            _carried(node["Resources"], threads, gpus) for node in self._ray.nodes() if node["Alive"]
        )
        if not carried:
            self.close()
            raise UserError(
                "no machine of the cluster carries a job",
                expected=f"one with {threads} cores" + (f" and {gpus:g} of a GPU" if gpus else ""),
            )
        self.workers = workers or carried

    def _connect(self, address: str | None, workers: int) -> bool:
        """Connect this program to a cluster; whether it was not connected before."""
        ray = self._ray
        if ray.is_initialized():
            here = ray.get_runtime_context().gcs_address
            if address not in (None, "auto", here):
                raise UserError(f"this program is connected to another cluster than {address}", got=here)
            return False
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home unless told not to
            ray.init("local", num_cpus=workers * self.threads, include_dashboard=False, **options)
            return True
        try:
            _check_reachable(address)
            ray.init(address, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"there is no Ray cluster at {address}",
                got=str(error).partition(". ")[0],
                expected="auto on a machine of the cluster, or the host:port that ray start --head printed",
            ) from error
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self) -> None:
        """Nothing: Ray starts workers of its own accord."""

    def close(self) -> None:
        """Leave the cluster, and end it where it was started here."""
        self._sent.clear()
        if self._connected:
            self._connected = False
            self._ray.shutdown()

    def map(self, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) as jobs finish; an error in a job is raised here."""
        ray = self._ray
        # Ray itself runs nothing again. A task ends in one result or one error, so that a job stands in exactly
        # one place: to be done, running or yielded. None is lost and none counts twice, whatever died.
        task = ray.remote(_run).options(num_cpus=self.threads, num_gpus=self.gpus, max_retries=0)
        died = (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.LocalRayletDiedError,
            ray.exceptions.ObjectLostError,  # a result that went with the machine it lay on
        )
        todo = list(range(len(jobs)))[::-1]
        tries = [0] * len(jobs)
        running: dict[Any, int] = {}
        try:
            while todo or running:
                # Few jobs wait in the cluster: the rest is packed when its turn comes.
                while todo and len(running) < 2 * self.workers:
                    index = todo.pop()
                    packed, apart = self._pack(function, jobs[index])
                    running[task.remote(torch.__version__, self.threads, packed, *apart)] = index
                (done, *_), _ = ray.wait(list(running))
                index = running.pop(done)
                try:
                    result = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except died:
                    tries[index] += 1
                    if tries[index] >= TRIES:
                        raise given_up() from None
                    todo.append(index)
                else:
                    yield index, result
        finally:
            for left in running:
                ray.cancel(left, force=True)

    def _pack(self, function: Callable[..., Any], job: tuple[Any, ...]) -> tuple[bytes, list[Any]]:
        """A job in bytes, and what travels apart in the order of the numbers that stand for it there."""
        apart: dict[int, Any] = {}

        def send(item: Any) -> int | bytes | None:
            # A device has another number on each machine: no tensor of one goes by its own name.
            if is_large(item) or (isinstance(item, torch.Tensor) and item.device.type != "cpu"):
                apart.setdefault(id(item), self.put(item))
                return list(apart).index(id(item))
            # The machines do not have the user's own script: what it defines travels whole.
            if isinstance(item, type | FunctionType) and item.__module__ == "__main__":
                whole: bytes = self._ray.cloudpickle.dumps(item)
                return whole
            return None

        return pack(function, job, send), list(apart.values())

    def put(self, tensor: torch.Tensor) -> Any:
        """What the cluster knows a large tensor by; it is sent there once."""
        if id(tensor) not in self._sent:
            # Ray shares the memory of numpy's arrays among a machine's workers. In bytes every kind of number is one.
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            known = self._ray.put((data, tensor.dtype, tuple(tensor.shape), tensor.device.type))
            self._sent[id(tensor)] = (tensor, known)  # holding the tensor keeps its id its own
        return self._sent[id(tensor)][1]


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "the engine ray needs Ray", got=str(error), fix="pip install 'distillens[cluster]'"
        ) from error
    return ray


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing answers: Ray tries for minutes, and then ends the whole program."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ValueError("no host:port")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as server:
        # Ray speaks HTTP/2 there: after our greeting and settings (4) its own settings come. The dashboard does not.
        server.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        if server.recv(9)[3:4] != b"\x04":
            raise ValueError("something else answers there")


def _carried(has: Mapping[str, float], threads: int, gpus: float) -> int:
    """How many jobs a machine with such resources carries at a time."""
    by_cores = int(has.get("CPU", 0) // threads)
    return min(by_cores, int(has.get("GPU", 0) / gpus + 1e-6)) if gpus else by_cores


def _run(version: str, threads: int, packed: bytes, *apart: Any) -> Any:
    """One task, in a worker of the cluster."""
    if version != torch.__version__:
        raise UserError(
            f"the machines of the cluster have different versions of torch: {socket.gethostname()}",
            got=str(torch.__version__),
            expected=version,
        )
    _settle_once()
    torch.set_num_threads(threads)
    tensors = [_tensor(*each) for each in apart]

    def fetch(name: int | bytes) -> Any:
        return tensors[name] if isinstance(name, int) else _ray().cloudpickle.loads(name)

    return run_packed(packed, fetch)


@cache
def _settle_once() -> None:
    settle_process()


def _tensor(data: Any, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> torch.Tensor:
    with warnings.catch_warnings():
        # The memory belongs to all workers of the machine. No job of ours writes to what it is given (tested).
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data).view(dtype).view(shape).to(device)

"""The same work in this process or in several, with the same bytes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file

from distillens.core.checks import UserError, at_least
from distillens.core.storage import write_tensors
from distillens.core.threads import pinned_threads as pinned_threads

LARGE = 1 << 22  # bytes from which a tensor travels once, by file, instead of with every job
TRIES = 3  # how often a job whose worker died is tried


class Engine:
    """Runs jobs in ``workers`` processes of ``threads`` threads each; one worker is this process.

    A job is a function of the package and its arguments. Nothing of a job depends on which worker
    runs it, so one worker and many give the same bytes. A worker that dies has its jobs run again.
    """

    def __init__(self, workers: int = 1, threads: int = 1) -> None:
        at_least(1, "engine", workers=workers, threads=threads)
        self.workers = workers
        self.threads = threads
        self._pool: ProcessPoolExecutor | None = None
        self._knows_main = False  # whether the pool's workers have imported the user's own script
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        self._sent: dict[int, tuple[torch.Tensor, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self) -> None:
        """Have the workers start, which takes them seconds, while this process does something else."""
        if self.workers > 1:
            for _ in range(self.workers):
                self._submit(pack(_ready, (), self._send))

    def close(self) -> None:
        """End the workers at once and remove what was passed to them."""
        self._stop()
        self._sent.clear()
        if self._spool is not None:
            self._spool.cleanup()
            self._spool = None

    @property
    def place(self) -> Literal["here", "machine"]:
        """Where jobs run: in this process, or in others that share its disk."""
        return "here" if self.workers == 1 else "machine"

    def map(self, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) as jobs finish; an error in a job is raised here."""
        if self.workers == 1 or len(jobs) < 2:
            for index, job in enumerate(jobs):
                with pinned_threads(self.threads):
                    result = function(*job)
                yield index, result
            return
        yield from self._map_processes(function, jobs)

    def _map_processes(
        self, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        todo = list(range(len(jobs)))[::-1]
        tries = [0] * len(jobs)
        running: dict[Future[Any], int] = {}
        try:
            while todo or running:
                # Few jobs wait in the pool: the rest is packed when its turn comes.
                while todo and len(running) < 2 * self.workers:
                    index = todo.pop()
                    running[self._submit(pack(function, jobs[index], self._send))] = index
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    index = running.pop(future)
                    try:
                        yield index, future.result()
                    except BrokenProcessPool:
                        lost = [index, *running.values()]
                        running.clear()
                        self._stop()
                        for again in lost:
                            tries[again] += 1
                            if tries[again] >= TRIES:
                                raise given_up() from None
                        todo += sorted(lost, reverse=True)
                        break
        except BaseException:
            self._stop()
            raise

    def _submit(self, packed: bytes) -> Future[Any]:
        needs_main = b"__main__" in packed  # a network that the user's script defines, say
        if needs_main and not self._knows_main and self._pool is not None:
            self._pool.shutdown()  # what runs is finished first: its results are in their futures
            self._pool = None
        if self._pool is None:
            self._knows_main = needs_main
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["distillens.train"])  # workers fork with torch at hand
            self._pool = ProcessPoolExecutor(self.workers, context, _begin, (self.threads,))
        try:
            with contextlib.nullcontext() if self._knows_main else _without_main():
                return self._pool.submit(_run, packed)
        except BrokenProcessPool:
            # A worker died between two jobs: nothing was lost, a new pool takes over.
            self._stop()
            return self._submit(packed)

    def _stop(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            processes = list((getattr(pool, "_processes", None) or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            for process in processes:
                process.join()

    def _send(self, item: Any) -> str | None:
        return self.spool(item) if is_large(item) else None

    def spool(self, tensor: torch.Tensor) -> str:
        """The file through which workers read a large tensor; written once."""
        known = self._sent.get(id(tensor))
        if known is not None:
            return known[1]
        if self._spool is None:
            self._spool = tempfile.TemporaryDirectory(prefix="distillens-")
        path = Path(self._spool.name) / f"{len(self._sent)}.safetensors"
        write_tensors(path, {"tensor": tensor})
        self._sent[id(tensor)] = (tensor, str(path))  # holding the tensor keeps its id its own
        return str(path)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start workers that do not import the user's script, which need not be written for that.

    A worker of ``multiprocessing`` runs the main script again on its start; one without the ``__main__`` guard would
    start its whole work anew in each. Our jobs are functions of the package and need none of it.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {
        name: vars(main).pop(name) for name in ("__spec__", "__file__") if name in vars(main)
    }
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def given_up() -> UserError:
    """The error for a job that has ended its worker ``TRIES`` times."""
    return UserError(
        f"a worker process was killed {TRIES} times at the same work",
        fix="most likely for want of memory: use fewer --workers, or smaller settings",
    )


def is_large(item: Any) -> bool:
    """Whether something is a tensor that travels apart from its jobs, once for all of them."""
    return isinstance(item, torch.Tensor) and item.numel() * item.element_size() >= LARGE


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, send: Callable[[Any], Any]) -> None:
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self.send = send

    def persistent_id(self, item: Any) -> Any:
        return self.send(item)


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, fetch: Callable[[Any], Any]) -> None:
        super().__init__(buffer)
        self.fetch = fetch

    def persistent_load(self, name: Any) -> Any:
        return self.fetch(name)


def pack(function: Callable[..., Any], job: tuple[Any, ...], send: Callable[[Any], Any]) -> bytes:
    """A job in bytes. What ``send`` has a name for (not None) travels apart: its name stands in its place."""
    buffer = io.BytesIO()
    _Pickler(buffer, send).dump((function, job))
    return buffer.getvalue()


def run_packed(packed: bytes, fetch: Callable[[Any], Any]) -> Any:
    """The result of a job that ``pack`` wrote; ``fetch`` gives what a name stands for."""
    # These bytes come from the process that plans the work, over its own connection, never from a file.
    function, job = _Unpickler(io.BytesIO(packed), fetch).load()
    return function(*job)


def _run(packed: bytes) -> Any:
    return run_packed(packed, _read)


@lru_cache(maxsize=16)
def _read(name: str) -> torch.Tensor:
    return load_file(name)["tensor"]


def _ready() -> None:
    """What a worker does that has nothing to do yet."""


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    settle_process()
    gc.freeze()  # what is loaded by now stays: the collector would walk over it again and again, a twentieth of the time


def _end_with_parent() -> None:
    """Wait for the parent's end, however it came, and end at once: an orphan would hold its memory for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def settle_process() -> None:
    """Settings for a process that is ours (the command, its workers), never made by an import.

    glibc gives large blocks back to the system and faults them in again at every step, which costs more than
    the arithmetic of a small network; here it keeps them.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block by mmap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never trim

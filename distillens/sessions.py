"""Where work runs and how: the device, the plan, the engine, and a store of runs that uses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from distillens.core.checks import UserError, one_of
from distillens.core.config import restore
from distillens.core.dataset import Splits
from distillens.core.storage import read_json
from distillens.engine.cluster import Cluster
from distillens.engine.plan import Plan, Precision, cores
from distillens.engine.workers import Engine
from distillens.nets import default_net
from distillens.runs import Runs
from distillens.tuning import plan_for


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        has = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(f"there is no device {name!r} here", expected=", ".join(has)) from error
    return device


def check_engine(engine: str, address: str | None) -> None:
    """Refuse an engine that there is not, and an address that it has no use for.

    Raises:
        UserError: either is so.
    """
    one_of("engine", engine, ("processes", "ray"))
    if address is not None and engine != "ray":
        raise UserError(f"{engine} have no address", got=address, fix="add --engine ray for a cluster")


def chosen_plan(
    real: Splits, *, jobs: int = 1, precision: Precision | None = None, threads: int | None = None
) -> Plan:
    """The plan of this machine for such data, ``jobs`` at a time or of so many threads; float32 unless told otherwise."""
    net = default_net(real.train)
    return plan_for(real.train, net, jobs=jobs, precision=precision or "float32", threads=threads)


def recorded_plan(folder: Path | None, force: bool, precision: Precision | None) -> Plan | None:
    """The plan that a run folder was begun with, which goes on with it; None where it is begun now.

    A plan of another precision than the one asked for is none: the folder will be refused for that reason.
    """
    note = None if folder is None or force else folder / "request.json"
    if note is None or not note.is_file():
        return None
    try:
        plan: Plan = restore(read_json(note)["plan"])
    except (UserError, LookupError, TypeError):
        return None  # whatever else it is, ``claim`` says so
    return plan if precision in (None, plan.precision) else None


def workers_for(plan: Plan, device: str) -> int:
    """As many workers as the cores carry; one for an accelerator."""
    return max(1, cores() // plan.threads) if torch.device(device).type == "cpu" else 1


@contextmanager
def session(
    real: Splits,
    store: Path | None = None,
    *,
    plan: Plan | None = None,
    workers: int | None = None,
    device: str = "cpu",
    engine: str = "processes",
    address: str | None = None,
) -> Iterator[Runs]:
    """A store of runs with an engine that fits the data and the machine; ends its workers on the way out.

    The engine is ``processes`` of this machine, or ``ray``: the cluster at ``address``, one of this machine alone
    without (``Cluster``). On an accelerator each job of a cluster has one for itself.
    The plan holds for this process too meanwhile: threads, kernels and precision are part of what settles the last bits.
    """
    plan = plan or chosen_plan(real, jobs=cores())
    check_engine(engine, address)
    with plan.pinned(), _runner(plan, workers, device, engine, address) as runner:
        yield Runs(plan, runner, store)


def _runner(
    plan: Plan, workers: int | None, device: str, engine: str, address: str | None
) -> Engine | Cluster:
    if engine == "ray":
        return Cluster(workers, plan.threads, 0.0 if torch.device(device).type == "cpu" else 1.0, address)
    return Engine(workers or workers_for(plan, device), plan.threads)

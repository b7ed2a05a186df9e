"""One distillation from its order to its folder: what it starts from, its steps, checkpoints, the set with its provenance."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import distillens
from distillens import distillers
from distillens.core.artefact import DistilledDataset, Provenance
from distillens.core.checks import DivergedError, UserError, at_least
from distillens.core.config import describe, override, restore
from distillens.core.contracts import Distiller, Problem, State
from distillens.core.dataset import Dataset, Splits
from distillens.core.rng import Key
from distillens.core.storage import held, write_json
from distillens.engine.plan import Plan
from distillens.experts import Experts, Trajectories
from distillens.folders import claim
from distillens.forecast import check_fits, outlook
from distillens.runs import Runs
from distillens.train import Training

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_SECONDS = 10.0
Tell = Callable[[str, int, int], None]  # (what is being done, done, of how many)


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Order:
    """One distillation to make: method, images a class, replicate, seed; with experts that were brought along."""

    name: str
    distiller: Distiller
    ipc: int
    replicate: int = 0
    seed: int = 0
    experts: Trajectories | None = None

    @property
    def key(self) -> Key:
        """The distillation key: each method, size and replicate has its own."""
        return Key(self.seed, ("distil", self.name, self.ipc, self.replicate))

    def problem(self, real: Dataset, inputs: Mapping[str, Any] | None = None) -> Problem:
        """What the method is asked."""
        return Problem(real, self.ipc, self.key, inputs or {}, Key(self.seed, ("shared", self.replicate)))

    def needs(self, real: Dataset) -> dict[str, Training | Experts]:
        """The trainings that the method starts from, less what was brought along."""
        needed = dict(self.distiller.needs(self.problem(real)))
        if self.experts is not None:
            del needed["experts"]
        return needed

    def provenance(self, real: Splits, plan: Plan) -> Provenance:
        """Where the set will have come from; known before it is made."""
        inputs = {name: need.fingerprint for name, need in self.needs(real.train).items()}
        if self.experts is not None:
            inputs["experts"] = self.experts.fingerprint
        return Provenance(
            method=self.name,
            settings=describe(self.distiller),
            ipc=self.ipc,
            key=self.key,
            data=real.source,
            data_fingerprint=real.fingerprint,
            inputs=inputs,
            plan=describe(plan),
            versions=versions(),
        )


def versions() -> dict[str, str]:
    """The versions that bytes depend on."""
    return {
        "distillens": distillens.__version__,
        "torch": str(torch.__version__),
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def order(
    name: str, real: Splits, ipc: int, *, settings: Sequence[str] = (), seed: int = 0, replicate: int = 0
) -> Order:
    """A distillation with the method's defaults for this data and size, and some settings changed.

    Raises:
        UserError: method or setting is unknown, or a value does not fit.
    """
    at_least(1, name, ipc=ipc)
    defaults = distillers.room.find(name).defaults(real.train, ipc)
    return Order(name, override(defaults, settings, like=real.train), ipc, replicate, seed)


def make(
    wanted: Order,
    real: Splits,
    runs: Runs,
    to: Path | None,
    *,
    force: bool = False,
    tell: Tell = silent,
    announce: Callable[[str], None] | None = None,
) -> DistilledDataset:
    """Make one distilled set, or load it where it is already made."""
    provenance = wanted.provenance(real, runs.plan)
    bare = wanted.problem(real.train, {} if wanted.experts is None else {"experts": wanted.experts})
    if to is None or force or not (to / "provenance.json").is_file():
        # Before the folder is taken: what is refused is asked for again with other settings.
        check_fits(wanted.name, wanted.distiller, bare)
    with held(to) if to is not None else nullcontext():
        if to is not None:
            claim(to, request(provenance, real), force=force)
            if (to / "provenance.json").is_file():
                return DistilledDataset.load(to)
        if announce is not None and wanted.distiller.steps:
            announce(outlook(wanted.name, wanted.distiller, bare, runs.plan, runs.engine.workers).text())
        problem = wanted.problem(real.train, inputs_of([wanted], real, runs, tell)[0])
        return run(wanted.distiller, problem, provenance, to, tell)


def inputs_of(orders: Sequence[Order], real: Splits, runs: Runs, tell: Tell = silent) -> list[dict[str, Any]]:
    """What each method starts from, trained together where it is missing."""
    needs = [one.needs(real.train) for one in orders]
    runs.make(
        [training for each in needs for training in each.values()],
        report=lambda done, total: tell("training what the methods start from", done, total),
    )
    return [
        {
            name: runs.trajectories(need) if isinstance(need, Experts) else runs.get(need)[0]
            for name, need in each.items()
        }
        | ({} if one.experts is None else {"experts": one.experts})
        for one, each in zip(orders, needs, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Made:
    """A finished distillation: the set, what it started from (None where a method selects), a log of its steps.

    It is what comes back from a worker, which need not reach the folder where it belongs.
    """

    distilled: DistilledDataset
    initial: DistilledDataset | None
    log: Mapping[str, list[float]]

    def save(self, to: Path) -> None:
        """Write it all to a folder, the set last: where it is, the rest is; then no checkpoint is needed."""
        if self.initial is not None:
            self.initial.save(to / "initial")
        write_json(to / "log.json", dict(self.log))
        self.distilled.save(to)
        (to / CHECKPOINT).unlink(missing_ok=True)


def run(
    distiller: Distiller,
    problem: Problem,
    provenance: Provenance,
    to: Path | None,
    tell: Tell = silent,
) -> DistilledDataset:
    """The finished set of one distillation, written to the folder ``to`` with all that belongs to it.

    Raises:
        UserError: a step cannot be done, as ``carry_out`` says.
    """
    made = carry_out(distiller, problem, provenance, to, tell)
    if to is not None:
        made.save(to)
    return made.distilled


def carry_out(
    distiller: Distiller,
    problem: Problem,
    provenance: Provenance,
    to: Path | None,
    tell: Tell = silent,
) -> Made:
    """All steps of one distillation by the plan of its provenance, with a checkpoint in ``to`` now and then.

    Raises:
        UserError: a step cannot be done. What was reached is kept in ``to``: as a checkpoint, and as a set of its own
            in ``last_good`` where the numbers left the finite.
    """
    plan: Plan = restore(provenance.plan)
    with plan.pinned():
        return _carry_out(distiller, problem, provenance, to, tell)


def _carry_out(
    distiller: Distiller, problem: Problem, provenance: Provenance, to: Path | None, tell: Tell
) -> Made:
    started = distiller.start(problem)
    state, first = started, 0
    history: dict[str, list[float]] = {}
    checkpoint = None if to is None else to / CHECKPOINT
    if checkpoint is not None and checkpoint.is_file():
        state, first, history = _resume(checkpoint)
    last_saved = time.monotonic()
    for i in range(first, distiller.steps):
        try:
            state, log = distiller.step(problem, state, i)
        except (UserError, KeyboardInterrupt) as error:
            if checkpoint is not None:
                _checkpoint(checkpoint, state, i, history)
            if not isinstance(error, DivergedError):
                raise
            raise DivergedError(
                f"{error}{_last_good(distiller, problem, provenance, state, i, to)}"
            ) from error
        for name, value in log.items():
            history.setdefault(name, []).append(value)
        tell(f"distilling with {provenance.method}", i + 1, distiller.steps)
        if checkpoint is not None and time.monotonic() - last_saved > CHECKPOINT_SECONDS:
            _checkpoint(checkpoint, state, i + 1, history)
            last_saved = time.monotonic()
    done = replace(distiller.finish(problem, state), provenance=provenance)
    begun = None if distiller.selects else replace(distiller.finish(problem, started), provenance=provenance)
    return Made(done, begun, history)


def _last_good(
    distiller: Distiller, problem: Problem, provenance: Provenance, state: State, step: int, to: Path | None
) -> str:
    """Keep the set that a diverging run had reached, and say where.

    It is the set of a run of so many steps, and its provenance says so.
    """
    if to is None or not step:
        return f" (after {step} steps)"
    shorter = {**provenance.settings, "steps": step}
    kept = replace(distiller.finish(problem, state), provenance=replace(provenance, settings=shorter))
    kept.save(to / "last_good")
    return f"; the set after {step} steps: {to / 'last_good'}"


def _checkpoint(path: Path, state: State, step: int, history: Mapping[str, list[float]]) -> None:
    logs = {f"log.{name}": torch.tensor(values, dtype=torch.float64) for name, values in history.items()}
    tensors = {f"state.{name}": value for name, value in state.tensors.items()}
    values = {f"state.{name}": value for name, value in state.values.items()}
    State(tensors | logs, {**values, "step": step}).save(path)


def _resume(path: Path) -> tuple[State, int, dict[str, list[float]]]:
    saved = State.load(path)
    state = State(
        {name[6:]: tensor for name, tensor in saved.tensors.items() if name.startswith("state.")},
        {name[6:]: value for name, value in saved.values.items() if name.startswith("state.")},
    )
    logs = {name[4:]: tensor.tolist() for name, tensor in saved.tensors.items() if name.startswith("log.")}
    return state, int(saved.values["step"]), logs


def request(provenance: Provenance, real: Splits) -> dict[str, Any]:
    """What the folder of one set is locked to: its provenance, and the space by name, for whoever asks for another."""
    return {**provenance.to_json(), "space": real.space.name}

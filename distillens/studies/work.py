"""The work of a study: distil, train for all questions, answer, report; stop and go on anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distillens import distillers, making, pipeline
from distillens.core.artefact import DistilledDataset, Provenance
from distillens.core.config import describe
from distillens.core.contracts import Distiller, Problem, Sets, is_adaptive
from distillens.core.dataset import Splits
from distillens.core.result import Claim, Result
from distillens.core.rng import Key
from distillens.core.storage import held, sweep, write_json
from distillens.engine.plan import Plan
from distillens.engine.workers import Engine
from distillens.folders import claim
from distillens.making import Made, Tell, carry_out, inputs_of, silent
from distillens.paper import beside
from distillens.pipeline import analysis_key, shown_to
from distillens.presets import BASELINES
from distillens.runs import Runs
from distillens.sessions import check_device, check_engine, recorded_plan, session, workers_for
from distillens.studies.about import about, folder_of
from distillens.studies.asked import Study, design
from distillens.studies.outlook import check_fits, forecast


def study(
    real: Splits,
    to: Path,
    *,
    workers: int | None = None,
    force: bool = False,
    device: str = "cpu",
    engine: str = "processes",
    address: str | None = None,
    tell: Tell = silent,
    announce: Callable[[str], None] = lambda line: None,
    **wishes: Any,
) -> Path:
    """Do a whole study in the folder ``to``; the path of its report. ``wishes`` are those of ``design``.

    ``engine`` and ``address`` are those of ``sessions.session``; they are no part of what the folder is locked to.

    An interrupted study goes on where it stopped and ends in the same bytes; a finished one does nothing.

    Raises:
        UserError: a wish does not fit, or the folder was made with others.
    """
    check_engine(engine, address)
    wishes["plan"] = recorded_plan(to, force, wishes.get("precision"))
    wanted = design(real.to(check_device(device)), **wishes)
    carried = workers_for(wanted.plan, device)
    page = to / "report.html"
    if force or not page.is_file():
        # Before the folder is taken: what is refused is asked for again with other settings.
        # The machines of a cluster are taken to be like this one, and to share the work out among them.
        at_once = workers or carried
        check_fits(wanted, min(at_once, carried) if engine == "ray" else at_once)
    with held(to):
        claim(to, wanted.request(), force=force)
        if page.is_file():
            announce(f"nothing to do: {page} is finished (--force does it again)")
            return page
        with session(
            wanted.real,
            to / "store",
            plan=wanted.plan,
            workers=workers,
            device=device,
            engine=engine,
            address=address,
        ) as runs:
            runs.engine.begin()
            cost = forecast(wanted, runs.engine.workers)
            for line in wanted.shrinkage:
                announce(f"scaled by {wanted.scale:g}: {line}")
            announce(f"{cost.text()} ({runs.engine.workers} worker{'s' if runs.engine.workers > 1 else ''})")
            begun, resumed = time.monotonic(), (to / "study.json").is_file()
            write_json(to / "study.json", about(wanted, cost, {}))
            took = Took()
            with took.by("sets"):
                _distil(wanted, to, runs, tell)
            everything = {ipc: _sets(wanted, to, ipc) for ipc in wanted.ipc}
            with took.by("models for all questions"):
                train_for_all(wanted, everything, runs, tell)
            _analyse(wanted, everything, to, runs, tell, took)
            write_json(to / "study.json", about(wanted, cost, everything))
            # Times are not part of what a study ends in: they would change its bytes.
            whole = {"forecast": cost.seconds, "seconds": time.monotonic() - begun, "resumed": resumed}
            write_json(to / "timing.json", whole | {"by": took.seconds, "answers": took.answers})
        sweep(to)
        return pipeline.write_report(to)


@dataclass(frozen=True)
class Took:
    """Seconds by what they went to, and by analysis (summed over sizes and workers): what a session that went on did itself."""

    seconds: dict[str, float] = field(default_factory=dict)
    answers: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def by(self, what: str) -> Iterator[None]:
        """Put what happens within down to ``what``."""
        begun = time.monotonic()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - begun


def _distil(wanted: Study, to: Path, runs: Runs, tell: Tell) -> None:
    for place, brought in wanted.given.folders():
        if not (to / place / "provenance.json").is_file():
            brought.save(to / place)
    orders = wanted.orders
    missing = [one for one in orders if not (to / folder_of(one) / "provenance.json").is_file()]
    inputs = inputs_of(missing, wanted.real, runs, tell)
    jobs: list[tuple[Distiller, Problem, Provenance, Path]] = []
    for one, its in zip(missing, inputs, strict=True):
        provenance = one.provenance(wanted.real, runs.plan)
        claim(to / folder_of(one), making.request(provenance, wanted.real))
        jobs.append((one.distiller, one.problem(wanted.real.train, its), provenance, to / folder_of(one)))
    # Long jobs first: the workers end together.
    jobs.sort(key=lambda job: -job[0].work(job[1]))
    done = len(orders) - len(missing)
    for i, made in _carried_out(jobs, runs, tell):
        made.save(jobs[i][-1])
        done += 1
        tell("distilling the sets", done, len(orders))


def _carried_out(
    jobs: Sequence[tuple[Distiller, Problem, Provenance, Path]], runs: Runs, tell: Tell
) -> Iterator[tuple[int, Made]]:
    if runs.engine.place == "here":
        yield from ((i, carry_out(*job, tell=tell)) for i, job in enumerate(jobs))
    elif runs.engine.place == "machine":
        yield from runs.engine.map(carry_out, jobs)
    else:  # other machines do not reach the folder, which is for checkpoints: what is lost there begins again
        yield from runs.engine.map(carry_out, [(*job[:-1], None) for job in jobs])


def _sets(wanted: Study, to: Path, ipc: int) -> Sets:
    def many(name: str, inner: str = "") -> tuple[DistilledDataset, ...]:
        base = to / "sets" / f"ipc{ipc}" / name
        device = wanted.real.train.device
        count = len(wanted.given.sets.get(name, ())) or wanted.replicates
        return tuple(_moved(DistilledDataset.load(base / str(r) / inner), device) for r in range(count))

    learned = [name for name in wanted.methods if not distillers.room.find(name).selects]
    return Sets(
        {name: many(name) for name in wanted.subjects},
        {name: many(name) for name in BASELINES},
        {name: many(name, "initial") for name in learned},
    )


def _moved(distilled: DistilledDataset, device: Any) -> DistilledDataset:
    if device.type == "cpu":
        return distilled
    stored = {name: tensor.to(device) for name, tensor in distilled.stored.items()}
    return replace(distilled, stored=stored, labels=distilled.labels.to(device))


def train_for_all(wanted: Study, everything: Mapping[int, Sets], runs: Runs, tell: Tell) -> None:
    """Train for all questions of all sizes together: one queue, no model twice. Adaptive ones train as they go."""
    key = analysis_key(wanted.seed)
    trainings = [
        training
        for ipc, sets in everything.items()
        for question in wanted.questions(ipc)
        if not is_adaptive(question)
        for training in question.trainings(
            shown_to(question, sets, wanted.real, runs, key), wanted.real, key=key
        )
    ]
    runs.make(trainings, report=lambda done, total: tell("training models for all questions", done, total))


def _analyse(
    wanted: Study, everything: Mapping[int, Sets], to: Path, runs: Runs, tell: Tell, took: Took
) -> None:
    """Answer all questions, several at a time where workers reach the store; adaptive ones, which train, come last."""
    key = analysis_key(wanted.seed)
    jobs = [
        (
            question,
            shown_to(question, sets, wanted.real, runs, key),
            wanted.real,
            key,
            to / "results" / f"ipc{ipc}",
            {"ipc": ipc, "settings": describe(question)},
        )
        for ipc, sets in everything.items()
        for question in wanted.questions(ipc)
    ]
    found: dict[int, list[tuple[str, Claim]]] = {}

    def answered(i: int, one: Answered) -> None:
        found[i] = [(one.name, claim) for claim in one.claims]
        took.answers[one.name] = took.answers.get(one.name, 0.0) + one.seconds
        tell("answering", len(found), len(jobs))

    alone = [i for i, job in enumerate(jobs) if not is_adaptive(job[0])]
    with took.by("answers"):
        # The machines of a cluster do not reach the store.
        engine = Engine(1, runs.plan.threads) if runs.engine.place == "cluster" else runs.engine
        # The largest sets first, whose answers take longest: the workers end together.
        alone.reverse()
        for place, one in engine.map(_answer_alone, [(runs.plan, runs.folder, *jobs[i]) for i in alone]):
            answered(alone[place], one)
        for i in range(len(jobs)):
            if i not in found:
                answered(i, _answer(runs, *jobs[i]))
    if wanted.preset.published:
        in_order = [one for i in range(len(jobs)) for one in found[i]]
        write_json(to / "paper.json", {"rows": [row.to_json() for row in beside(in_order, wanted.asked)]})


@dataclass(frozen=True, eq=False)
class Answered:
    """What a study needs of an answer that lies in its folder."""

    name: str
    claims: tuple[Claim, ...]
    seconds: float


def _answer(
    runs: Runs, question: Any, sets: Sets, real: Splits, key: Key, to: Path, context: Mapping[str, Any]
) -> Answered:
    begun = time.monotonic()
    result: Result = question(sets, real, runs, key=key)
    result.save(to, context)
    return Answered(result.analysis, tuple(result.claims()), time.monotonic() - begun)


def _answer_alone(plan: Plan, store: Path, *job: Any) -> Answered:
    """The answer of a worker, which trains nothing: all that it asks for is in the store."""
    with plan.pinned():
        return _answer(Runs(plan, folder=store), *job)

"""The main job: distil, evaluate, ask the three questions, write the report; stop and go on anywhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from distillens import analyses, distillers, pipeline
from distillens import forecast as forecasts
from distillens.core.artefact import DistilledDataset, Provenance
from distillens.core.checks import UserError, unknown
from distillens.core.config import describe, override, settings_of, shrunk
from distillens.core.contracts import Distiller, Net, Problem, Sets, is_adaptive
from distillens.core.dataset import Splits
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Result
from distillens.core.rng import Key
from distillens.core.storage import held, sweep, write_json
from distillens.engine.plan import Plan, Precision, cores
from distillens.engine.workers import Engine
from distillens.evaluation import protocol as protocols
from distillens.evaluation.trials import teacher
from distillens.experts import Experts
from distillens.folders import claim
from distillens.given import Given, bring
from distillens.paper import ORDER, beside
from distillens.pipeline import (
    Made,
    Order,
    Tell,
    analysis_key,
    carry_out,
    inputs_of,
    shown_to,
    silent,
    versions,
)
from distillens.presets import BASELINES, PRESETS, Preset
from distillens.runs import Runs, on_the_way
from distillens.sessions import check_device, check_engine, chosen_plan, recorded_plan, session, workers_for
from distillens.train import Training, chunks
from distillens.tuning import wish

NETS_OF_ONE = 5  # networks that look at a set that has no replicates
METHOD_SCALES = ("steps", "experts")  # what a study's scale shrinks of a method


@dataclass(frozen=True, eq=False)
class Study:
    """A study as it was asked for: known in full before any of it runs.

    ``given`` are sets that were brought along, by name, each with its replicates; ``scale`` shrinks steps and pools;
    ``only`` are the analyses to ask where not all of the preset's.
    """

    real: Splits
    methods: tuple[str, ...]
    ipc: tuple[int, ...]
    replicates: int
    preset: Preset
    seed: int
    protocol: str
    settings: tuple[str, ...]
    plan: Plan
    given: Given = field(default_factory=Given)
    scale: float = 1.0
    only: tuple[str, ...] = ()

    @property
    def subjects(self) -> tuple[str, ...]:
        """The distilled sets by name, as they are listed; in the paper's order where it has them."""
        names = (*self.given.sets, *self.methods)
        if not self.preset.published:
            return names
        return tuple(sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)))

    def settings_for(self, name: str, value: Any, scales: Sequence[str]) -> list[str]:
        """The settings of a method or an analysis whose defaults are ``value``: shrunk, and as they were asked for."""
        return [*self._shrunk(name, value, scales), *self._asked_for(name)]

    def _asked_for(self, name: str) -> list[str]:
        leaf = name.rpartition("/")[2]
        return [s.partition(".")[2] for s in self.settings if s.partition(".")[0] == leaf]

    def _shrunk(self, name: str, value: Any, scales: Sequence[str]) -> list[str]:
        """What the scale changes, less what was asked for."""
        if self.scale == 1:
            return []
        asked = {one.partition("=")[0] for one in self._asked_for(name)}
        return [one for one in shrunk(value, scales, self.scale) if one.partition("=")[0] not in asked]

    def settings_of_method(self, name: str, ipc: int) -> list[str]:
        """The settings of a method that are not its defaults."""
        defaults = distillers.room.find(name).defaults(self.real.train, ipc)
        return self.settings_for(name, defaults, METHOD_SCALES)

    @cached_property
    def orders(self) -> list[Order]:
        """Every distilled set and baseline to make."""
        return [
            pipeline.order(
                name,
                self.real,
                ipc,
                settings=self.settings_of_method(name, ipc),
                seed=self.seed,
                replicate=r,
            )
            for ipc in self.ipc
            for name in (*self.methods, *BASELINES)
            for r in range(self.replicates)
        ]

    @property
    def asked(self) -> tuple[str, ...]:
        """The analyses to ask, in the preset's order."""
        known = tuple(analyses.room.names())
        preset = self.preset.analyses or known
        if not self.only:
            return preset
        return tuple(name for name in dict.fromkeys((*preset, *known)) if name in self.only)

    def questions(self, ipc: int) -> list[Any]:
        """The analyses to ask at a size, with their settings."""
        return [self._question(name, ipc) for name in self.asked]

    def _question(self, name: str, ipc: int) -> Any:
        kind: Any = analyses.room.find(name)
        analysis = self._designed(name, ipc)
        return override(analysis, self.settings_for(name, analysis, kind.scales), like=self.real.train)

    def _designed(self, name: str, ipc: int) -> Any:
        """An analysis as the preset asks it, at full size."""
        kind: Any = analyses.room.find(name)
        analysis = (kind.as_published if self.preset.published else kind.defaults)(self.real.train)
        changes: dict[str, Any] = {}
        if hasattr(analysis, "protocol"):
            changes["protocol"] = chosen = protocols.find(self.protocol)
            changes |= {} if chosen.net is None else {"net": chosen.net}
        if self.replicates == 1:  # of one set nothing but training can be repeated
            if "protocol" in changes:
                changes["protocol"] = replace(changes["protocol"], nets=NETS_OF_ONE)
            if "nets" in settings_of(analysis):
                changes["nets"] = NETS_OF_ONE
        if name.startswith("pointwise/") and not self.preset.published:
            whole = self.preset.whole is None or ipc in self.preset.whole
            wanted = {"inits": self.preset.inits, "only": () if whole else self.subjects[:1]}
            changes |= {key: value for key, value in wanted.items() if key in settings_of(analysis)}
        return replace(analysis, **changes)

    @property
    def shrinkage(self) -> list[str]:
        """What the scale changed, as ``OWNER: NAME=VALUE``."""
        found = []
        for ipc in self.ipc:
            for name in self.methods:
                defaults = distillers.room.find(name).defaults(self.real.train, ipc)
                found += [f"{name}: {one}" for one in self._shrunk(name, defaults, METHOD_SCALES)]
        for name in self.asked:
            kind: Any = analyses.room.find(name)
            question = self._designed(name, self.ipc[0])
            found += [f"{name}: {one}" for one in self._shrunk(name, question, kind.scales)]
        return list(dict.fromkeys(found))

    def request(self) -> dict[str, Any]:
        """What the run folder is locked to."""
        return {
            "data": self.real.source,
            "data_fingerprint": self.real.fingerprint,
            "space": self.real.space.name,
            "methods": [describe(one.distiller) | {"name": one.name, "ipc": one.ipc} for one in self.orders],
            "given": {name: [one.fingerprint for one in many] for name, many in self.given.sets.items()},
            "replicates": self.replicates,
            "questions": {str(ipc): [describe(one) for one in self.questions(ipc)] for ipc in self.ipc},
            "seed": self.seed,
            "plan": describe(self.plan),
            "versions": versions(),
        }

    def command(self) -> str:
        """The command that makes this study again (the folder is the caller's)."""
        parts = [
            "distillens study",
            *_data(self.real),
            *([f"--distilled {','.join(self.given.places)}"] if self.given.places else []),
            *([f"--methods {','.join(self.methods)}"] if self.methods else []),
            f"--ipc {','.join(map(str, self.ipc))}",
            f"--replicates {self.replicates}",
            f"--preset {self.preset.name}",
            *([f"--analyses {','.join(self.only)}"] if self.only else []),
            *([f"--scale {self.scale:g}"] if self.scale != 1 else []),
            f"--protocol {self.protocol}",
            f"--seed {self.seed}",
            *wish(self.plan, self.real.train),
            *(f"--set {setting}" for setting in self.settings),
        ]
        return " ".join(parts)


def _data(real: Splits) -> list[str]:
    """The options that load this data again."""
    space = real.space.name
    return [f"--data {real.source}", *([] if space == "standardised" else [f"--space {space}"])]


def design(
    real: Splits,
    *,
    methods: Sequence[str] | None = None,
    ipc: Sequence[int] = (),
    preset: str = "quick",
    replicates: int | None = None,
    distilled: Sequence[str] = (),
    only: Sequence[str] = (),
    scale: float = 1.0,
    seed: int = 0,
    protocol: str = "wddl",
    settings: Sequence[str] = (),
    precision: Precision | None = None,
    plan: Plan | None = None,
) -> Study:
    """A study of some data, checked in full.

    ``distilled`` are sets that are there already: a run folder or somebody's file each, ``NAME=PATH`` to name it; those of
    one name are its replicates. With them no method is run unless ``methods`` names some. ``only`` are analyses, or
    questions, to ask in place of all that the preset asks. ``scale`` below 1 shrinks the
    steps of methods and the steps and pools of analyses. ``settings`` carry the name of a method or an analysis
    first: ``mtt.steps=500``, ``leave_one_out.inits=5``. ``plan`` is one to take as it is; else the machine's in that ``precision``.

    Raises:
        UserError: a name, a setting, a size or a given set does not fit.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    chosen = PRESETS[preset]
    if not 0 < scale <= 1:
        raise UserError(
            "the scale of a study is a share of its size", got=f"{scale:g}", expected="above 0, up to 1"
        )
    brought = bring(distilled, real)
    if methods is None:
        methods = () if brought.sets else chosen.methods
    if not methods and not brought.sets:
        raise UserError("a study needs at least one method", expected=", ".join(distillers.room.names()))
    for name in methods:
        distillers.room.find(name)
    for name in (*methods, *brought.sets):
        if name in BASELINES:
            raise UserError(f"{name} is in every study as a baseline", fix="leave it out")
    if len({*methods, *brought.sets}) != len(methods) + len(brought.sets):
        raise UserError("a method is named twice", got=", ".join([*methods, *brought.sets]))
    if brought.sets and tuple(ipc) not in ((), (brought.ipc,)):
        raise UserError(
            "the given sets are of another size",
            got=f"--ipc {','.join(map(str, ipc))}, sets of {brought.ipc} images a class",
            fix="leave --ipc out",
        )
    owners = [*methods, *BASELINES, *(n.rpartition("/")[2] for n in analyses.room.names())]
    for setting in settings:
        owner = setting.partition("=")[0].partition(".")[0]
        if owner not in owners:
            raise unknown("owner of a setting", owner, owners)
    study = Study(
        real,
        tuple(methods),
        (brought.ipc,) if brought.sets else tuple(ipc) or chosen.ipc,
        replicates or (brought.replicates if brought.sets else chosen.replicates),
        chosen,
        seed,
        protocol,
        tuple(settings),
        plan or chosen_plan(real, jobs=cores(), precision=precision),
        brought,
        scale,
        _analyses(only, chosen),
    )
    for size in study.ipc:
        study.questions(size)
        pipeline.order("random_subset", real, size).distiller.start(
            Problem(real.train, size, analysis_key(seed))
        )
    return study


def _analyses(only: Sequence[str], preset: Preset) -> tuple[str, ...]:
    """The analyses that were asked for by name or by question, each once."""
    names = tuple(dict.fromkeys(one for asked in only for one in pipeline.analyses_of(asked)))
    if not preset.published:
        return names
    published = pipeline.published_analyses()
    for name in only:  # of a question those that the paper has
        if name in names and name not in published:
            raise UserError(
                f"{name} is not an experiment of the paper",
                expected=", ".join(published),
                fix="ask it in a study of another preset",
            )
    return tuple(name for name in names if name in published)


@dataclass(frozen=True)
class Forecast:
    """What a study will cost: sets to distil, models to train, seconds on this machine."""

    sets: int
    models: int
    seconds: float

    def text(self) -> str:
        """One line."""
        return (
            f"{self.sets} sets to distil, {self.models:,} models to train: "
            f"about {forecasts.duration(self.seconds)}"
        )


def check_fits(study: Study, workers: int) -> None:
    """See that as many distillations at a time as there are workers fit into the free memory.

    Raises:
        UserError: they do not; the message says what would.
    """
    for (name, ipc), one in {(one.name, one.ipc): one for one in study.orders}.items():
        alike = sum((other.name, other.ipc) == (name, ipc) for other in study.orders)
        problem = one.problem(study.real.train)
        with study.plan.pinned():
            forecasts.check_fits(name, one.distiller, problem, at_once=min(workers, alike))


def forecast(study: Study, workers: int) -> Forecast:
    """The cost of a whole study: trainings counted exactly, time from a few steps of each method and of one model.

    What each method starts from stands in for the sets that are not there yet.
    """
    real = study.real
    seconds, trainings = 0.0, []
    kinds = {(one.name, one.ipc): one for one in study.orders}
    for one in kinds.values():
        alike = [other for other in study.orders if (other.name, other.ipc) == (one.name, one.ipc)]
        problem = one.problem(real.train)
        with study.plan.pinned():
            each = forecasts.seconds_a_step(one.distiller, problem)
        if each is not None:
            seconds += len(alike) * one.distiller.steps * each
    experts: dict[str, Experts] = {}
    for one in study.orders:
        for need in one.needs(real.train).values():
            if not isinstance(need, Experts):
                trainings.append(need)
                continue
            kind = need.lasting(1).fingerprint  # of experts that differ in length alone the longest serve all
            if kind not in experts or experts[kind].passes < need.passes:
                experts[kind] = need
    trainings += [need.training for need in experts.values()]
    for ipc in study.ipc:
        stand_in = _stand_ins(study, ipc)
        for question in study.questions(ipc):
            trainings += question.trainings(stand_in, real, key=analysis_key(study.seed))
            if hasattr(question, "protocol"):
                trainings += teacher(question.protocol, question.net, real, analysis_key(study.seed))
    distinct = list({part.fingerprint: part for t in trainings for part in chunks(t, study.plan)}.values())
    read_off = {i for those in on_the_way(distinct).values() for i in those}
    trained = [part for i, part in enumerate(distinct) if i not in read_off]
    passes: Counter[Net] = Counter()
    for part in trained:
        passes[part.net] += part.image_steps
    if passes:  # the network that sees the most images stands for all
        ((net, _),) = passes.most_common(1)
        short = Training(real.train, net, Recipe(), (analysis_key(0),))
        seconds += 2.93 * passes.total() * forecasts.seconds_a_pass(short, study.plan)
    models = sum(len(part.keys) for part in trained)
    return Forecast(len(study.orders), models, seconds / workers)


def _stand_ins(study: Study, ipc: int) -> Sets:
    """Sets of the right form: what each method starts from, random subsets for what selects."""
    train = study.real.train

    def begun(name: str, r: int, place: str) -> DistilledDataset:
        order = next(o for o in study.orders if (o.name, o.ipc, o.replicate) == (name, ipc, r))
        key = order.key.fold("stand-in", place)
        asked = forecasts.standing_in(order.distiller, Problem(train, ipc, key))
        distiller: Distiller = distillers.room.find("random_subset").defaults(train, ipc)
        if asked is None:
            asked = Problem(train, ipc, key)
        else:
            distiller = order.distiller
        one = distiller.finish(asked, distiller.start(asked))
        return replace(one, provenance=order.provenance(study.real, study.plan))

    def many(name: str, place: str = "") -> tuple[DistilledDataset, ...]:
        return tuple(begun(name, r, place) for r in range(study.replicates))

    learned = [name for name in study.methods if not distillers.room.find(name).selects]
    return Sets(
        {name: study.given.sets[name] if name in study.given.sets else many(name) for name in study.subjects},
        {name: many(name) for name in BASELINES},
        {name: many(name, "start") for name in learned},
    )


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
            write_json(to / "study.json", _about(wanted, cost, {}))
            took = Took()
            with took.by("sets"):
                _distil(wanted, to, runs, tell)
            everything = {ipc: _sets(wanted, to, ipc) for ipc in wanted.ipc}
            with took.by("models for all questions"):
                _train(wanted, everything, runs, tell)
            _analyse(wanted, everything, to, runs, tell, took)
            write_json(to / "study.json", _about(wanted, cost, everything))
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


def folder_of(order: Order) -> str:
    """Where a set lies in its study's folder."""
    return f"sets/ipc{order.ipc}/{order.name}/{order.replicate}"


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
        claim(to / folder_of(one), pipeline.request(provenance, wanted.real))
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


def _train(wanted: Study, everything: Mapping[int, Sets], runs: Runs, tell: Tell) -> None:
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


def _about(wanted: Study, cost: Forecast, everything: Mapping[int, Sets]) -> dict[str, Any]:
    """``study.json``: what a report says of the whole, with the storage of the sets that are made."""
    real = wanted.real

    # A study shares the cores out; the command of one set would take them all, and end in other last bits.
    alone = chosen_plan(real, precision=wanted.plan.precision).threads
    threads = [] if wanted.plan.threads == alone else [f"--threads {wanted.plan.threads}"]

    def storage(one: Order) -> dict[str, Any]:
        if one.ipc not in everything:
            return {}
        return {"storage": asdict(everything[one.ipc].everything()[one.name][one.replicate].storage())}

    return {
        "title": real.source,
        "command": wanted.command(),
        "data": {
            "source": real.source,
            "classes": list(real.train.classes),
            "train": len(real.train),
            "val": len(real.val),
            "test": len(real.test),
            "space": real.space.name,
            "shape": list(real.train.shape),
            "fingerprint": real.fingerprint,
        },
        "preset": wanted.preset.name,
        "asked": list(wanted.asked),
        "scaled": wanted.shrinkage,
        "versions": versions(),
        "seed": wanted.seed,
        "plan": asdict(wanted.plan),
        "trainings": cost.models,
        "sets": [
            *_about_given(wanted, everything),
            *(
                {
                    "name": one.name,
                    "ipc": one.ipc,
                    "replicate": one.replicate,
                    "folder": folder_of(one),
                    "paper": type(one.distiller).paper,
                    "family": type(one.distiller).family,
                    "command": " ".join(
                        [
                            f"distillens distill {one.name}",
                            *_data(real),
                            f"--ipc {one.ipc}",
                            f"--seed {one.seed} --replicate {one.replicate}",
                            *(f"--set {setting}" for setting in wanted.settings_of_method(one.name, one.ipc)),
                            *wish(wanted.plan, real.train),
                            *threads,
                        ]
                    ),
                    **storage(one),
                }
                for one in wanted.orders
            ),
        ],
    }


def _about_given(wanted: Study, everything: Mapping[int, Sets]) -> list[dict[str, Any]]:
    return [
        {
            "name": Path(place).parent.name,
            "ipc": wanted.given.ipc,
            "replicate": int(Path(place).name),
            "folder": place,
            **({"storage": asdict(one.storage())} if everything else {}),
        }
        for place, one in wanted.given.folders()
    ]

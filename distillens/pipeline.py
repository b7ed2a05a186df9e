"""The verbs as functions: distil, evaluate, ask, report. The one place where provenance is written."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import distillens
from distillens import analyses, distillers, formats, nets
from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.core.artefact import DistilledDataset, Provenance
from distillens.core.checks import DivergedError, UserError, at_least, unknown
from distillens.core.config import describe, override, restore, settings_of
from distillens.core.contracts import Analysis, Distiller, Problem, Sets, State, is_adaptive
from distillens.core.dataset import Dataset, Splits
from distillens.core.result import Result
from distillens.core.rng import Key
from distillens.core.storage import held, write_json
from distillens.data import in_space, load, sources
from distillens.engine.plan import Plan, Precision
from distillens.evaluation import protocol as protocols
from distillens.evaluation.published import PROTOCOLS
from distillens.evaluation.trials import taught
from distillens.experts import Experts, Trajectories
from distillens.folders import claim, remove
from distillens.forecast import check_fits, outlook
from distillens.nets import named
from distillens.presets import BASELINES, PRESETS
from distillens.report import write
from distillens.runs import Runs
from distillens.sessions import check_device, chosen_plan, recorded_plan, session
from distillens.train import Training

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_SECONDS = 10.0
Tell = Callable[[str, int, int], None]  # (what is being done, done, of how many)
Given = DistilledDataset | Sequence[DistilledDataset]


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


def distill(
    method: str,
    data: Splits | str = "digits",
    *,
    space: str = "standardised",
    ipc: int = 1,
    seed: int = 0,
    replicate: int = 0,
    settings: Sequence[str] = (),
    to: Path | None = None,
    force: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    precision: Precision | None = None,
    store: Path | None = None,
    experts: Path | None = None,
    engine: str = "processes",
    address: str | None = None,
    tell: Tell = silent,
    announce: Callable[[str], None] | None = None,
) -> DistilledDataset:
    """Distil a dataset with one method, in a space of its own choice (``data.in_space``): the set stays in it.

    ``threads`` are part of what settles the last bits: what is fastest here where none are named. ``precision`` is
    that of training (``Plan``): float32, float64 or bfloat16; where none is named, what ``tuning.plan_for`` takes. What
    the method starts from is trained into ``store`` and stays there for the next one (experts serve all methods that
    follow them); without one it is thrown away at the end. ``experts`` is a folder of imported ones to follow instead.
    ``engine`` and ``address`` (``session``) say where that is trained: a distillation itself is a chain of steps, and
    runs here. ``announce`` is told what it will cost, before it runs.

    With ``to`` the set is written there with its initialisation and its log; a finished one is loaded, an
    interrupted one goes on, one that was made otherwise is refused unless ``force``.

    >>> distill("random_subset", ipc=2).dataset().images.shape
    torch.Size([20, 1, 8, 8])

    Raises:
        UserError: a name, a setting, the data or the folder does not fit, or the memory does not suffice.
    """
    real = load(data, space=space) if isinstance(data, str) else in_space(data, space)
    real = real.to(check_device(device))
    wanted = order(method, real, ipc, settings=settings, seed=seed, replicate=replicate)
    if experts is not None:
        if not wanted.distiller.needs_experts:
            raise UserError(f"{method} follows no experts", fix="leave --experts out")
        wanted = replace(wanted, experts=Trajectories.load(experts))
    own = to.parent / f".{to.name}.store" if to and not store else None
    plan = recorded_plan(to, force, precision) or chosen_plan(real, precision=precision, threads=threads)
    plan = replace(plan, threads=threads or plan.threads)
    with session(real, store or own, plan=plan, device=device, engine=engine, address=address) as runs:
        done = make(wanted, real, runs, to, force=force, tell=tell, announce=announce)
    if own is not None:
        remove(own)
    return done


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


def gather(sets: Mapping[str, Given], initial: Mapping[str, Given] | None = None) -> Sets:
    """Distilled sets by name as an analysis takes them; a single set is one replicate."""

    def many(given: Given) -> tuple[DistilledDataset, ...]:
        return (given,) if isinstance(given, DistilledDataset) else tuple(given)

    return Sets(
        {name: many(given) for name, given in sets.items()},
        {},
        {name: many(given) for name, given in (initial or {}).items()},
    )


def beside(sets: Sets, data: Splits | str) -> Splits:
    """Real data in the space of the sets, through the very matrix that they carry.

    Raises:
        UserError: there is no such data, the sets do not belong to it, or it cannot be brought out of its space.
    """
    real = load(data) if isinstance(data, str) else data
    sets.check_fits(real)
    return real.to_space(sets.space)


def with_baselines(sets: Sets, real: Splits, runs: Runs, *, seed: int = 0, tell: Tell = silent) -> Sets:
    """The sets beside random subsets and herding of their size, one a replicate."""
    first = next(iter(sets.distilled.values()))
    ipc = max(1, round(first[0].ipc))
    replicates = max(map(len, sets.distilled.values()))
    baselines = {}
    for name in BASELINES:
        orders = [order(name, real, ipc, seed=seed, replicate=r) for r in range(replicates)]
        inputs = inputs_of(orders, real, runs, tell)
        baselines[name] = tuple(
            replace(_selected(one, real, given), provenance=one.provenance(real, runs.plan))
            for one, given in zip(orders, inputs, strict=True)
        )
    return Sets(sets.distilled, baselines, sets.initial)


def _selected(one: Order, real: Splits, inputs: Mapping[str, Any]) -> DistilledDataset:
    problem = one.problem(real.train, inputs)
    return one.distiller.finish(problem, one.distiller.start(problem))


def evaluate(
    sets: Mapping[str, Given],
    data: Splits | str,
    *,
    protocol: str = "wddl",
    nets: int | None = None,
    net: Any = None,
    seed: int = 0,
    initial: Mapping[str, Given] | None = None,
    store: Path | None = None,
    engine: str = "processes",
    address: str | None = None,
    tell: Tell = silent,
) -> Result:
    """Train fresh networks on each set; a random subset, herding and the full data stand beside it.

    All of them are in the space that the sets are in, and have the labels of the protocol's teacher where it has one.
    ``nets`` networks look at each set: as many as the protocol says, five where it says one. ``net`` is the network or its
    name; else the protocol's, else the field's ConvNet. With one set a name the interval covers training only. ``engine`` and
    ``address`` are those of ``session``.

    Raises:
        UserError: the sets do not belong to the data, or are in several spaces; protocol or network is unknown.
    """
    gathered = gather(sets, initial)
    real = beside(gathered, data)
    chosen = protocols.find(protocol)
    chosen = replace(chosen, nets=nets or (chosen.nets if chosen.nets > 1 else 5))
    analysis = Accuracy.defaults(real.train)
    wanted = named(net, real.train) if isinstance(net, str) else net
    analysis = replace(analysis, protocol=chosen, net=wanted or chosen.net or analysis.net)
    opened = session(real, store, engine=engine, address=address)
    return _answer(analysis, gathered, real, opened, seed, tell)


def ask(
    name: str,
    sets: Mapping[str, Given],
    data: Splits | str,
    *,
    settings: Sequence[str] = (),
    as_published: bool = False,
    seed: int = 0,
    store: Path | None = None,
    engine: str = "processes",
    address: str | None = None,
    tell: Tell = silent,
) -> Result:
    """The answer of one analysis (``pointwise/leave_one_out``) about some sets.

    It is asked by its defaults for the data, or ``as_published`` by the paper's protocol to the letter.
    ``engine`` and ``address`` are those of ``session``.

    Raises:
        UserError: the analysis or a setting is unknown, the paper has no such experiment, or the sets do not belong
            to the data.
    """
    gathered = gather(sets)
    real = beside(gathered, data)
    kind: Any = analyses.room.find(name)
    if as_published and not hasattr(kind, "as_published"):
        raise UserError(
            f"{name} is not an experiment of the paper",
            expected=", ".join(published_analyses()),
            fix="leave --as-published out",
        )
    analysis: Any = (kind.as_published if as_published else kind.defaults)(real.train)
    if "nets" in settings_of(analysis) and max(map(len, gathered.distilled.values())) == 1:
        analysis = replace(analysis, nets=5)  # of one set nothing but training can be repeated
    opened = session(real, store, engine=engine, address=address)
    return _answer(override(analysis, settings, like=real.train), gathered, real, opened, seed, tell)


def _answer(
    analysis: Analysis[Any],
    sets: Sets,
    real: Splits,
    opened: AbstractContextManager[Runs],
    seed: int,
    tell: Tell,
) -> Result:
    sets.check_against(real)
    with opened as runs:
        everything = with_baselines(sets, real, runs, seed=seed, tell=tell)
        key = analysis_key(seed)
        everything = shown_to(analysis, everything, real, runs, key)
        if not is_adaptive(analysis):
            runs.make(
                analysis.trainings(everything, real, key=key),
                report=lambda done, total: tell("training models", done, total),
            )
        result: Result = analysis(everything, real, runs, key=key)
    return result


def shown_to(analysis: Any, sets: Sets, real: Splits, runs: Runs, key: Key) -> Sets:
    """The sets as an analysis sees them: with the labels of its protocol's teacher, where it has one."""
    protocol = getattr(analysis, "protocol", None)
    return sets if protocol is None else taught(protocol, analysis.net, sets, real, runs, key)


def analysis_key(seed: int) -> Key:
    """The key of everything that looks at sets: analyses and sizes share judges, pools and network keys."""
    return Key(seed, ("analyse",))


def published_analyses() -> list[str]:
    """The analyses that the paper has too."""
    return [name for name in analyses.room.names() if hasattr(analyses.room.find(name), "as_published")]


def analyses_of(name: str) -> list[str]:
    """The analyses that a name stands for: itself, or all of a question (``behaviour``)."""
    known = analyses.room.names()
    in_room = [one for one in known if one.startswith(f"{name}/")]
    if not in_room and name not in known:
        questions = sorted({one.partition("/")[0] for one in known})
        raise unknown("analysis or question", name, [*known, *questions])
    return in_room or [name]


def import_(
    source: Path,
    kind: str,
    data: Splits | str,
    *,
    to: Path,
    net: str | None = None,
    name: str | None = None,
    settings: Sequence[str] = (),
    force: bool = False,
) -> Trajectories | DistilledDataset:
    """Bring in what others have made: expert trajectories for ``distill(..., experts=to)``, or a distilled set.

    Of experts (``mtt_buffer``) ``net`` with ``settings`` (``width=64``) is the network they are of. A set (``wddl``,
    ``dc``) becomes a run folder of the method ``name``, by default the file's; ``settings`` are the format's
    (``mean=0.5,0.5,0.5``), ``net`` is the network it was distilled on, where that is known.

    Raises:
        UserError: the format is unknown, the file does not fit it, the data or the network, or the folder is taken.
    """
    real = load(data) if isinstance(data, str) else data
    layout: Any = formats.room.find(kind)
    if layout.holds == "experts":
        if name is not None:
            raise UserError("imported experts have no name", got=repr(name), fix="leave --name out")
        network: Any = nets.room.find(net or "convnet")
        chosen = override(network.defaults(real.train), settings)
        experts: Trajectories = layout.read(source, chosen, real.train, to, force=force)
        return experts
    return _import_set(source, override(layout(), settings), real, to, net=net, name=name, force=force)


def imported(
    source: Path, layout: Any, real: Splits, *, net: str | None = None, name: str | None = None
) -> DistilledDataset:
    """The set in a file of a layout. What nobody told of it its provenance does not say.

    Raises:
        UserError: the file does not fit the layout or the data.
    """
    found: DistilledDataset = layout.read(source, real)
    made_with = {} if net is None else {"net": describe(nets.named(net, real.train))}
    provenance = Provenance(
        method=name or source.stem,
        settings={"imported": describe(layout), **made_with},
        ipc=max(1, round(found.ipc)),
        key=Key(0, ("imported",)),
        data=real.source,
        data_fingerprint=real.fingerprint,
        inputs={"file": hashlib.sha256(source.read_bytes()).hexdigest()},
        versions=versions(),
    )
    return replace(found, provenance=provenance)


def _import_set(
    source: Path, layout: Any, real: Splits, to: Path, *, net: str | None, name: str | None, force: bool
) -> DistilledDataset:
    """A foreign set as a run folder."""
    made = imported(source, layout, real, net=net, name=name)
    assert made.provenance is not None
    # Nothing was planned: whoever distils into the folder finds no plan to go on with.
    asked = {name: value for name, value in request(made.provenance, real).items() if name != "plan"}
    with held(to):
        claim(to, asked, force=force)
        if (to / "provenance.json").is_file():
            return DistilledDataset.load(to)
        made.save(to)
    return made


def write_report(folder: Path, *others: Path, to: Path | None = None) -> Path:
    """Write the report of one run folder or several; the path of the page."""
    return write(folder, *others, to=to)


def listed(what: str) -> list[dict[str, Any]]:
    """What there is of a kind: distillers, analyses, nets, data, formats, protocols or presets.

    Raises:
        UserError: there is no such kind.
    """

    def first_line(item: Any) -> str:
        return str(item.__doc__ or "").strip().partition("\n")[0]

    kinds: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "distillers": lambda: [
            {
                "name": name,
                "about": first_line(found := distillers.room.find(name)),
                "family": found.family,
                "paper": found.paper,
            }
            for name in distillers.room.names()
        ],
        "analyses": lambda: [
            {"name": name, "about": analyses.room.find(name).question} for name in analyses.room.names()
        ],
        "nets": lambda: [
            {"name": name, "about": first_line(nets.room.find(name))} for name in nets.room.names()
        ],
        "formats": lambda: [
            {"name": name, "about": first_line(formats.room.find(name))} for name in formats.room.names()
        ],
        "data": lambda: [{"name": name} for name in sources()],
        "protocols": lambda: [{"name": name, "about": one.source} for name, one in PROTOCOLS.items()],
        "presets": lambda: [{"name": name, "about": one.about} for name, one in PRESETS.items()],
    }
    if what not in kinds:
        raise unknown("list", what, kinds)
    return kinds[what]()

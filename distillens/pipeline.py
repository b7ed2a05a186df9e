"""The verbs as functions: distil, evaluate, ask, bring in, report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from distillens import analyses, distillers, formats, nets
from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.core.artefact import DistilledDataset, Provenance
from distillens.core.checks import UserError, unknown
from distillens.core.config import describe, override, settings_of
from distillens.core.contracts import Analysis, Sets, is_adaptive
from distillens.core.dataset import Splits
from distillens.core.result import Result
from distillens.core.rng import Key
from distillens.core.storage import held
from distillens.data import in_space, load, sources
from distillens.engine.plan import Precision
from distillens.evaluation import protocol as protocols
from distillens.evaluation.published import PROTOCOLS
from distillens.evaluation.trials import taught
from distillens.experts import Trajectories
from distillens.folders import claim, remove
from distillens.making import Order, Tell, inputs_of, make, order, request, silent, versions
from distillens.nets import named
from distillens.presets import BASELINES, PRESETS
from distillens.report import write
from distillens.runs import Runs
from distillens.sessions import check_device, chosen_plan, recorded_plan, session

Given = DistilledDataset | Sequence[DistilledDataset]


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

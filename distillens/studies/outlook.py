"""What a study will cost, before it runs: trainings counted, time from a few steps, memory by law."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from distillens import distillers
from distillens import forecast as forecasts
from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Distiller, Net, Problem, Sets
from distillens.core.recipe import Recipe
from distillens.evaluation.trials import teacher
from distillens.experts import Experts
from distillens.pipeline import analysis_key
from distillens.presets import BASELINES
from distillens.runs import on_the_way
from distillens.studies.asked import Study
from distillens.train import Training, chunks


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

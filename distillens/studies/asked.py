"""A study as it is asked for: checked, and known in full before any of it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from distillens import analyses, distillers, making, pipeline
from distillens.core.checks import UserError, unknown
from distillens.core.config import describe, override, settings_of, shrunk
from distillens.core.contracts import Problem
from distillens.core.dataset import Splits
from distillens.engine.plan import Plan, Precision, cores
from distillens.evaluation import protocol as protocols
from distillens.given import Given, bring
from distillens.making import Order, versions
from distillens.paper import ORDER
from distillens.pipeline import analysis_key
from distillens.presets import BASELINES, PRESETS, Preset
from distillens.sessions import chosen_plan
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
            making.order(
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
            *data_options(self.real),
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


def data_options(real: Splits) -> list[str]:
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
        making.order("random_subset", real, size).distiller.start(
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

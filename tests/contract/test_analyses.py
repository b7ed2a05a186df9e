"""What holds for every analysis: it trains what it announced (an adaptive one: no more), no model twice, and its result comes back whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distillens import analyses
from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.analyses.behaviour.cross_net import CrossNet
from distillens.analyses.behaviour.fairness import Fairness
from distillens.analyses.behaviour.feature_map import FeatureMap
from distillens.analyses.behaviour.mixing import Mixing
from distillens.analyses.behaviour.pixels import Pixels
from distillens.analyses.behaviour.ranking import Ranking
from distillens.analyses.behaviour.recognition import Recognition
from distillens.analyses.behaviour.robustness import Robustness
from distillens.analyses.behaviour.sensitivity import Sensitivity
from distillens.analyses.pointwise.estimators import Estimators
from distillens.analyses.pointwise.leave_one_out import LeaveOneOut
from distillens.analyses.pointwise.provenance import Provenance
from distillens.analyses.pointwise.repair import Repair
from distillens.analyses.pointwise.semantics import Semantics
from distillens.analyses.pointwise.shapley import Shapley
from distillens.analyses.representativeness.clock import Clock
from distillens.analyses.representativeness.coverage import Coverage
from distillens.analyses.representativeness.curvature import Curvature
from distillens.analyses.representativeness.early_agreement import EarlyAgreement
from distillens.analyses.representativeness.gradients import Gradients
from distillens.analyses.representativeness.landscape import Landscape
from distillens.analyses.representativeness.recognition_curve import RecognitionCurve
from distillens.core.config import describe, restore
from distillens.core.contracts import Problem, Sets, is_adaptive
from distillens.core.dataset import Splits
from distillens.core.donors import Donors
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.distillers.random_subset import RandomSubset
from distillens.engine.plan import Plan
from distillens.evaluation.protocol import Protocol
from distillens.experts import Experts
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.runs import Report, Request, Runs

KEY = Key(31, ("contract",))
SHORT = Recipe(steps=20, lr=0.03)
NET = ConvNet(depth=2, width=8)

# Every analysis in a setting that takes a second or two.
TINY: dict[str, Any] = {
    "behaviour/accuracy": Accuracy(Protocol("short", "", SHORT), NET, ("a", "random_subset")),
    "behaviour/cross_net": CrossNet((NET, MLP(1, 16)), SHORT, (0.01, 0.1)),
    "behaviour/fairness": Fairness(Protocol("short", "", SHORT), NET),
    "behaviour/feature_map": FeatureMap(NET, SHORT, seeds=2, shown=60),
    "behaviour/mixing": Mixing((0, 1), SHORT, NET),
    "behaviour/pixels": Pixels(),
    "behaviour/ranking": Ranking(NET, SHORT, (0.01, 0.1), augment="crop"),
    "behaviour/recognition": Recognition((NET, MLP(1, 16)), SHORT, (1.0, 0.5), seeds=1),
    "behaviour/robustness": Robustness(
        Protocol("short", "", SHORT), NET, ("contrast", "jpeg"), (3,), (8 / 255,), steps=2, attacked=20
    ),
    "behaviour/sensitivity": Sensitivity((("lr", "x3"), ("steps", "x2")), (), SHORT, NET, full=1),
    "pointwise/estimators": Estimators(
        NET, SHORT, inits=2, subsets=16, images=20, estimators=("trak", "last_layer", "tracin")
    ),
    "pointwise/leave_one_out": LeaveOneOut(NET, SHORT, inits=2),
    "pointwise/provenance": Provenance(NET, views=1, top=2),
    "pointwise/repair": Repair(NET, SHORT, inits=2, fresh=2, draws=3, kept=(0.3, 0.6), pixel_steps=2),
    "pointwise/semantics": Semantics(NET, SHORT, inits=2, top=15, shuffles=100),
    "pointwise/shapley": Shapley(NET, SHORT, permutations=2, strong=2, contexts=2),
    "representativeness/coverage": Coverage(NET, SHORT.but(batch=256), moments=5, trajectories=2),
    "representativeness/clock": Clock(NET, SHORT, SHORT, moments=6, trajectories=2, looks=4, tested=100),
    "representativeness/curvature": Curvature(
        NET, SHORT, moments=5, trajectories=2, most=8, images=16, top=2, sample=20
    ),
    "representativeness/early_agreement": EarlyAgreement(
        NET,
        SHORT,
        early=3,
        early_recipe=Recipe(steps=40, batch=256, lr=0.03),
        subset=6,
        subset_recipe=SHORT,
        least_per_class=1,
        most_per_class=10,
        tolerance=0.2,
    ),
    "representativeness/gradients": Gradients(NET, SHORT, moments=5, trajectories=2, looks=4, sample=10),
    "representativeness/landscape": Landscape(NET, SHORT, SHORT, moments=4, trajectories=2, points=5, grid=4),
    "representativeness/recognition_curve": RecognitionCurve(NET, SHORT, moments=6, trajectories=2),
}

names = analyses.room.names()
every_analysis = pytest.mark.parametrize("name", names)


class Counting(Runs):
    """A store that counts the images that its models have seen."""

    images = 0

    def make(self, requests: Iterable[Request], *, report: Report | None = None) -> None:
        requests = list(requests)
        missing = [part.training if isinstance(part, Experts) else part for part in self.missing(requests)]
        self.images += sum(part.image_steps for part in missing)
        super().make(requests, report=report)


def sets_of(real: Splits) -> Sets:
    """Two replicates of a random subset in a distilled set's place, beside two others."""
    method = RandomSubset()

    def many(name: str) -> Any:
        problems = [Problem(real.train, 1, KEY.fold(name, r)) for r in range(2)]
        return tuple(method.finish(problem, method.start(problem)) for problem in problems)

    # As if its method had written down its donors: some analyses read them, to others they are nothing.
    n = len(real.train)
    record = Donors(KEY.fold("parts").uniform(2, 1, n), torch.ones(2, n, dtype=torch.int64))
    recorded = tuple(replace(one, donors=record) for one in many("a"))
    return Sets({"a": recorded}, {"random_subset": many("base")})


def test_every_analysis_has_a_tiny_setting() -> None:
    assert sorted(TINY) == names


@every_analysis
def test_it_trains_what_it_announced_and_its_result_comes_back(
    name: str, digits: Splits, tmp_path: Path
) -> None:
    sets, store = sets_of(digits), Counting(Plan())
    announced = TINY[name].trainings(sets, digits, key=KEY)
    result = TINY[name](sets, digits, store, key=KEY)
    distinct = {identity for training in announced for identity in training.identities()}
    if is_adaptive(TINY[name]):
        assert 0 < len(store.trained) <= len(distinct)
        assert store.images <= sum(training.image_steps for training in announced)
    else:
        assert set(store.trained) == distinct
    assert set(store.trained.values()) <= {1}, "a model was trained twice"
    assert result.analysis == name
    again = type(result).load(result.save(tmp_path))
    assert again.headline() == result.headline()
    assert again.claims() == result.claims()
    first = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    result.save(tmp_path)
    assert first == {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert any(path.endswith(".png") for path in first)


@every_analysis
def test_its_claims_name_null_and_plant(name: str, digits: Splits) -> None:
    result = TINY[name](sets_of(digits), digits, Runs(Plan()), key=KEY)
    claims = result.claims()
    assert len({(claim.subject, claim.name) for claim in claims}) == len(claims)
    assert all(claim.null and claim.plant and claim.statement for claim in claims)


@every_analysis
def test_its_settings_come_back_from_json(name: str, digits: Splits) -> None:
    kind = analyses.room.find(name)
    ways = [kind.defaults(digits.train)]
    if hasattr(kind, "as_published"):
        ways.append(kind.as_published(digits.train))
    for one in ways:
        assert restore(describe(one)) == one
        assert one.question

"""The paper as one object: its experiments on given sets, scaled down, and its findings on the report's first page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distillens import pipeline, studies
from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.core.dataset import Splits
from distillens.paper import ORDER, PAIRS
from distillens.studies import work


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, digits: Splits) -> list[str]:
    """Two replicates of two of the paper's methods, hardly distilled."""
    base = tmp_path_factory.mktemp("sets")
    made = []
    for method in ("dm", "dc"):
        for replicate in (0, 1):
            to = base / f"{method}-{replicate}"
            pipeline.distill(method, digits, settings=["steps=1", "net.width=8"], replicate=replicate, to=to)
            made.append(str(to))
    return made


def test_the_papers_experiments_on_given_sets(distillens, sets: list[str], tmp_path: Path) -> None:
    to = tmp_path / "paper"
    done = distillens(
        "study", "--preset", "wddl", "--distilled", ",".join(sets), "--scale", "0.01", "--to", to,
        "--analyses", "behaviour/pixels,behaviour/mixing,behaviour/accuracy",
        "--set", "mixing.net.width=8", "--set", "mixing.net.depth=2", "--set", "mixing.real_per_class=0,1",
        "--set", "accuracy.net.width=8", "--set", "accuracy.net.depth=2",
        "--set", "herding.net.width=8", "--set", "herding.recipe.steps=10",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "scaled by 0.01: behaviour/mixing: recipe.steps=3" in done.stderr
    rows = json.loads((to / "paper.json").read_text())["rows"]
    found = {(row["name"], row["subject"]): row for row in rows}
    # In the paper's order, whatever order they were named in.
    assert [subject for name, subject in found if name == "T4"] == ["dc", "dm"]
    assert found["T4", "dc"]["published"] == -0.023
    change = found["T4", "dc"]["estimate"]["value"]
    assert found["T4", "dc"]["deviation"] == pytest.approx(change + 0.023)
    assert found["T3", "dc than dm"]["verdict"] in ("supported", "not supported", "inconclusive")
    assert found["T10", "dm"]["verdict"] in ("supported", "not supported", "inconclusive")
    assert found["T1", ""]["verdict"] == found["T8", ""]["verdict"] == "not asked"
    page = (to / "report.html").read_text()
    assert page.index('id="paper"') < page.index('id="overview"') < page.index('id="behaviour-pixels"')
    assert page.index('id="behaviour-pixels"') < page.index('id="behaviour-mixing"')
    assert "settings are smaller than published" in page


def test_the_preset_asks_by_the_papers_protocol(digits: Splits) -> None:
    study = studies.design(digits, preset="wddl")
    assert study.methods == ORDER == study.subjects and study.ipc == (10,)
    questions = dict(zip(study.asked, study.questions(10), strict=True))
    assert questions["behaviour/recognition"].pairs == PAIRS
    assert questions["behaviour/recognition"].seeds == 1
    assert questions["behaviour/mixing"].recipe.batch is None
    assert questions["behaviour/accuracy"].order[:4] == ORDER
    assert questions["representativeness/early_agreement"].subset == 520
    assert set(study.asked) == set(pipeline.published_analyses())
    assert study.shrinkage == []


def test_scaling_leaves_alone_what_was_asked_for(digits: Splits) -> None:
    study = studies.design(
        digits, preset="wddl", scale=0.1, settings=("mixing.recipe.steps=77", "dm.steps=9"), methods=("dm",)
    )
    questions = dict(zip(study.asked, study.questions(10), strict=True))
    assert questions["behaviour/mixing"].recipe.steps == 77
    assert questions["representativeness/early_agreement"].subset == 52
    assert study.orders[0].distiller.steps == 9
    assert "representativeness/early_agreement: subset=52" in study.shrinkage
    assert not [
        one for one in study.shrinkage if "mixing: recipe.steps" in one or one.startswith("dm: steps")
    ]


def test_one_analysis_can_be_asked_as_published(digits: Splits, sets: list[str], distillens) -> None:
    done = distillens("ask", "behaviour/pixels", sets[0], "--as-published")
    assert done.returncode == 0, done.stderr
    refused = distillens("ask", "behaviour/sensitivity", sets[0], "--as-published")
    assert refused.returncode == 2
    assert "behaviour/sensitivity is not an experiment of the paper" in refused.stderr


def test_a_study_under_a_teachers_labels_trains_what_it_forecast(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = []
    original = work.train_for_all

    def remember(wanted, everything, runs, tell):  # type: ignore[no-untyped-def]
        stores.append(runs)
        original(wanted, everything, runs, tell)

    monkeypatch.setattr(work, "train_for_all", remember)
    wishes = {
        "methods": ("dm",),
        "preset": "smoke",
        "only": ("behaviour/accuracy",),
        "protocol": "dd_ranking_soft",
        "settings": (
            "dm.steps=1", "dm.net.width=8", "herding.net.width=8", "herding.recipe.steps=10",
            "accuracy.net.width=8", "accuracy.protocol.passes=2", "accuracy.protocol.nets=1",
            "accuracy.protocol.teaching.passes=1",
        ),
    }  # fmt: skip
    planned = studies.forecast(studies.design(digits, **wishes), 1)
    studies.study(digits, tmp_path / "study", workers=1, **wishes)
    (store,) = stores
    assert set(store.trained.values()) == {1}
    assert sum(store.trained.values()) == planned.models
    saved = json.loads((tmp_path / "study/results/ipc1/behaviour.accuracy.json").read_text())
    assert saved["analysis"] == Accuracy.__module__.removeprefix("distillens.analyses.").replace(".", "/")

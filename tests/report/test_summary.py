from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillens.core.checks import UserError
from distillens.report import summarise, to_json

Change = Callable[..., None]


def test_claims_are_grouped_method_by_method_with_sizes_beside(run: Path) -> None:
    summary = summarise(run)
    assert [subject.name for subject in summary.subjects] == ["dm", "mtt", "random_subset"]
    assert [subject.family for subject in summary.subjects] == ["distribution", "trajectory", "coreset"]
    for subject in summary.subjects:
        assert [claim.name for claim in subject.claims] == ["above_random", "falls_when_mixed"]
        assert all([finding.ipc for finding in claim.findings] == [1, 10] for claim in subject.claims)
    assert summary.verdicts == {"supported": 4, "not supported": 4, "inconclusive": 4}
    assert summary.ipcs == (1, 10)


def test_a_claim_that_changes_its_words_between_sizes_is_two_claims(run: Path) -> None:
    path = run / "results/ipc1/behaviour.mixing.json"
    path.write_text(path.read_text().replace("lower accuracy", "lower validation accuracy"))
    claims = summarise(run).subjects[0].claims
    assert [len(claim.findings) for claim in claims] == [2, 1, 1]


def test_sets_show_the_first_replicate_and_list_all(run: Path) -> None:
    small, large = summarise(run).sizes
    assert (small.ipc, large.ipc) == (1, 10)
    dm = large.sets[0]
    assert dm.preview and dm.initial and (dm.preview.width, dm.preview.height) == (14, 6)
    assert dm.preview.file == "sets/ipc10/dm/0/preview.png"
    assert [copy.replicate for copy in dm.copies] == [0, 1]
    assert dm.copies[1].command == "distillens distill dm --data digits --ipc 10 --seed 1"
    assert dm.storage == {"floats": 6400}
    assert large.sets[2].initial is None


def test_questions_stand_in_the_order_of_the_paper(run: Path) -> None:
    summary = summarise(run)
    assert [question.name for question in summary.questions] == ["behaviour"]
    answers = summary.questions[0].analyses[1].answers
    assert [answer.ipc for answer in answers] == [1, 10]
    assert answers[0].figures[0].picture is not None
    assert answers[0].notes == ("A note on Mixing with real data.",)


def test_an_infinite_interval_is_read_back(run: Path) -> None:
    estimate = summarise(run).subjects[1].claims[1].findings[0].estimate
    assert (estimate.low, estimate.high, estimate.n) == (-math.inf, math.inf, 1)


def test_a_lone_set_is_a_run_folder(run: Path, tmp_path: Path) -> None:
    lone = tmp_path / "dm-10"
    shutil.copytree(run / "sets/ipc10/dm/0", lone)
    path = lone / "results" / "behaviour.mixing.json"
    shutil.copytree(run / "results/ipc10", path.parent)
    path.write_text(path.read_text().replace('"ipc": 10, ', ""))
    summary = summarise(lone)
    assert summary.title == "dm-10"
    assert [(size.ipc, size.sets[0].name) for size in summary.sizes] == [(10, "dm")]
    assert {finding.ipc for finding in summary.findings} == {10}
    assert summary.runs[0].data and summary.runs[0].data.source == "digits"
    assert summary.runs[0].seed == 0


def test_several_runs_lie_side_by_side(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "digits"
    shutil.copytree(run, other)
    summary = summarise(run, other)
    assert [r.title for r in summary.runs] == ["digits", "digits (2)"]
    assert len(summary.subjects) == 3
    assert [(f.run, f.ipc) for f in summary.subjects[0].claims[0].findings] == [
        ("digits", 1),
        ("digits (2)", 1),
        ("digits", 10),
        ("digits (2)", 10),
    ]
    assert len(summary.sizes[0].sets) == 6


@pytest.mark.parametrize("gone", ["study.json", "results", "sets", "results/ipc1/figures", "sets/ipc1/dm/0"])
def test_a_missing_part_is_left_out(run: Path, gone: str) -> None:
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    summary = summarise(run)
    assert summary.title == "digits"
    assert bool(summary.findings) == (gone != "results")
    if gone == "study.json":
        assert [(size.ipc, len(size.sets)) for size in summary.sizes] == [(1, 3), (10, 3)]


def test_without_a_study_replicates_stand_in_their_order(tmp_path: Path) -> None:
    for replicate in range(12):
        place = tmp_path / f"sets/ipc1/dm/{replicate}"
        place.mkdir(parents=True)
        (place / "provenance.json").write_text('{"method": "dm", "ipc": 1}')
    (dm,) = summarise(tmp_path).sizes[0].sets
    assert [copy.replicate for copy in dm.copies] == list(range(12))


def test_an_empty_folder_says_what_to_run_first(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        summarise(tmp_path)
    assert str(error.value) == (
        f"there is nothing to report in {tmp_path}; "
        f"run this first: distillens study --data digits --to {tmp_path}"
    )


def test_a_folder_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*absent; give the folder that --to named"):
        summarise(tmp_path / "absent")


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("study.json", {"sets": [{"name": "dm"}]}, "study.json has an unknown form; got KeyError"),
        ("study.json", {"data": {"source": "digits", "train": "many"}}, "study.json has an unknown form"),
        (
            "results/ipc1/behaviour.mixing.json",
            {"title": None, "claims": [{}]},
            "mixing.json has an unknown form",
        ),
        (
            "results/ipc1/behaviour.mixing.json",
            {"headline": 3},
            "mixing.json has an unknown form; got TypeError",
        ),
        ("sets/ipc1/dm/0/provenance.json", {"ipc": []}, "unknown form"),
    ],
)
def test_a_damaged_file_is_named(
    run: Path, change: Change, file: str, changes: dict[str, Any], reason: str
) -> None:
    if file.startswith("sets"):
        (run / "study.json").unlink()
    change(run / file, **changes)
    with pytest.raises(UserError, match=reason):
        summarise(run)


def test_an_unknown_verdict_is_refused(run: Path) -> None:
    path = run / "results/ipc1/behaviour.mixing.json"
    path.write_text(path.read_text().replace('"not supported"', '"proven"'))
    with pytest.raises(UserError, match=r"unknown form; got ValueError\(\"verdict 'proven'"):
        summarise(run)


@pytest.mark.parametrize("name", ["../../../secret.png", "/etc/secret.png"])
def test_a_figure_from_elsewhere_is_refused(run: Path, change: Change, name: str) -> None:
    path = run / "results/ipc1/behaviour.mixing.json"
    change(path, figures=[{"file": name, "caption": "mine"}])
    with pytest.raises(UserError, match="leads outside of it"):
        summarise(run)


def test_a_figure_that_is_no_picture_is_refused(run: Path) -> None:
    (run / "results/ipc1/figures/behaviour.mixing.png").write_text("root:x:0:0")
    with pytest.raises(UserError, match=r"mixing\.png is not a PNG picture; make it again"):
        summarise(run)


def test_the_json_holds_everything_but_the_bytes_of_pictures(run: Path) -> None:
    text = to_json(summarise(run))
    value = json.loads(text)
    assert value["verdicts"] == {"supported": 4, "not supported": 4, "inconclusive": 4}
    assert value["sizes"][0]["sets"][0]["preview"] == {
        "file": "sets/ipc1/dm/0/preview.png",
        "height": 6,
        "width": 5,
    }
    finding = value["subjects"][1]["claims"][1]["findings"][0]
    assert finding["estimate"] == {
        "high": "inf",
        "level": 0.95,
        "low": "-inf",
        "n": 1,
        "unit": "replicate",
        "value": -0.0456,
    }
    assert text == json.dumps(value, indent=1, sort_keys=True) + "\n"

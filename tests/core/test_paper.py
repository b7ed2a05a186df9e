"""The paper's findings beside claims made by hand."""

from __future__ import annotations

import pytest

from distillens.core.result import Claim, Estimate
from distillens.paper import FINDINGS, ORDER, PAIRS, beside


def claim(name: str, subject: str, value: float) -> Claim:
    estimate = Estimate(value, value - 0.01, value + 0.01, 3, "replicate")
    return Claim(name, subject, "", estimate, "less", 0.0, "null", "plant")


def test_a_claim_stands_beside_the_papers_value_with_the_deviation() -> None:
    rows = beside([("behaviour/mixing", claim("real data hurts", "bptt", -0.05))], [])
    (row,) = (row for row in rows if row.estimate is not None)
    assert (row.finding.name, row.subject, row.published, row.verdict) == ("T4", "bptt", -0.089, "supported")
    assert row.deviation == pytest.approx(0.039)
    saved = row.to_json()
    assert saved["estimate"]["value"] == -0.05 and saved["deviation"] == pytest.approx(0.039)


def test_a_pair_is_found_by_both_names() -> None:
    rows = beside([("behaviour/recognition", claim("recognised better than dm", "mtt", 0.3))], [])
    (row,) = (row for row in rows if row.estimate is not None)
    assert (row.subject, row.published) == ("mtt than dm", 0.44)


def test_a_set_that_the_paper_does_not_have_has_no_published_value() -> None:
    rows = beside([("behaviour/mixing", claim("real data hurts", "ncfm", -0.05))], [])
    (row,) = (row for row in rows if row.estimate is not None)
    assert row.published is None and row.deviation is None


def test_what_was_not_asked_is_said() -> None:
    rows = beside([], [])
    assert [row.finding for row in rows] == list(FINDINGS)
    assert {row.verdict for row in rows} == {"not asked"}
    assert (rows[0].finding.name, rows[-1].finding.name) == ("T1", "T10")
    assert all(row.to_json()["estimate"] is None for row in rows)


def test_what_was_asked_and_not_answered_is_told_apart() -> None:
    rows = beside([], ["behaviour/mixing"])
    assert {row.verdict for row in rows if row.finding.name in ("T4", "T5")} == {"not answered"}
    assert {row.verdict for row in rows if row.finding.name == "T1"} == {"not asked"}
    assert (
        next(row for row in rows if row.finding.name == "T4").to_json()["published"].startswith("bptt -0.089")
    )


def test_every_finding_has_values_or_words() -> None:
    assert all(finding.values or finding.said for finding in FINDINGS)
    names = [*(f"T{i}" for i in range(1, 10)), "Semantics", "T10"]
    assert sorted({finding.name for finding in FINDINGS}, key=names.index) == names
    assert {name for pair in PAIRS for name in pair} == set(ORDER)

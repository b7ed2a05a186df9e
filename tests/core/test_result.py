"""Intervals against closed forms and simulations, verdicts against a truth table, files that come back."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pytest
import torch
from scipy import stats

from distillens.analyses.behaviour.accuracy import AccuracyResult
from distillens.core.checks import UserError
from distillens.core.result import Claim, Estimate, Result, Table, paired
from distillens.core.rng import Key

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INF = math.inf
KEY = Key(20260101)


# Estimates


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("values", [[0.1, 0.4], [1.0, 2.0, 4.0, 8.0, -3.0], [5, 6, 7]])
def test_mean_is_students_interval(values: list[float], level: float) -> None:
    got = Estimate.mean(values, "replicate", level)
    centre = sum(values) / len(values)
    spread = math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1))
    low, high = stats.t.interval(level, len(values) - 1, centre, spread / math.sqrt(len(values)))
    assert (got.value, got.low, got.high) == pytest.approx((centre, low, high), rel=1e-12)
    assert (got.n, got.unit, got.level) == (len(values), "replicate", level)


def test_one_value_has_an_infinite_interval() -> None:
    assert Estimate.mean([0.3], "set") == Estimate(0.3, -INF, INF, 1, "set")


def test_no_values_have_no_estimate() -> None:
    with pytest.raises(ValueError, match="an estimate needs at least one value"):
        Estimate.mean([], "set")


def test_the_mean_does_not_lose_small_numbers_beside_large_ones() -> None:
    assert Estimate.mean([1e16, 1.0, -1e16], "u").value == pytest.approx(1 / 3, rel=1e-12)


def test_paired_is_the_interval_of_the_differences() -> None:
    assert paired([3.0, 5.0, 9.0], [1.0, 1.0, 2.0], "pair") == Estimate.mean([2.0, 4.0, 7.0], "pair")
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0], "pair")


def test_share_is_students_interval_cut_to_a_share() -> None:
    inside = [0.4, 0.5, 0.45]
    assert Estimate.share(inside, 20, "set") == Estimate.mean(inside, "set")
    wide = Estimate.share([0.0, 1.0], 20, "set")
    assert (wide.value, wide.low, wide.high) == (0.5, 0.0, 1.0)


def test_share_of_one_unit_rests_on_its_trials_and_says_so() -> None:
    alone = Estimate.share([0.7], 20, "set")
    assert (alone.value, alone.n, alone.unit) == (0.7, 20, "image of one set")
    assert (alone.low, alone.high) == pytest.approx(clopper_pearson(14, 20, 0.95), rel=1e-9)


def clopper_pearson(successes: int, trials: int, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("successes", [0, 1, 2, 3, 5, 7, 9, 10])
@pytest.mark.parametrize("n", [2, 3, 5, 6, 7])
def test_share_without_spread_is_clopper_and_pearsons(n: int, successes: int, level: float) -> None:
    got = Estimate.share([successes / 10] * n, 10, "set", level)
    expected = clopper_pearson(n * successes, 10 * n, level)
    assert (got.low, got.high) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert got.value == pytest.approx(successes / 10)


def test_components_of_one_factor_are_students_interval() -> None:
    values = [0.3, 0.5, 0.9, 0.4]
    expected = Estimate.mean(values, "u")
    got = Estimate.components(expected.value, {"set": values}, "u")
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert got.n == 4


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_components_add_the_variances_of_the_margins_means(level: float) -> None:
    rows, columns = [1.0, 2.0, 4.0], [2.0, 2.5, 2.0, 3.0, 2.1]
    va = stats.tvar(rows) / 3
    vb = stats.tvar(columns) / 5
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 4)
    half = stats.t.ppf(0.5 + level / 2, freedom) * math.sqrt(va + vb)
    got = Estimate.components(7.0, {"rows": rows, "columns": columns}, "u", level)
    assert (got.value, got.low, got.high) == pytest.approx((7.0, 7.0 - half, 7.0 + half), rel=1e-9)
    assert (got.n, got.unit, got.level) == (3, "u", level)


def test_components_with_one_level_have_no_interval() -> None:
    got = Estimate.components(1.0, {"rows": [1.0, 2.0], "columns": [1.5]}, "u")
    assert got == Estimate(1.0, -INF, INF, 1, "u")


def test_components_without_spread_have_no_width() -> None:
    got = Estimate.components(1.0, {"rows": [1.0, 1.0], "columns": [1.0, 1.0]}, "u")
    assert (got.low, got.high) == (1.0, 1.0)


def test_text_shows_the_interval_or_says_that_there_is_none() -> None:
    assert Estimate(0.6834, 0.661, 0.7051, 5, "u").text() == "0.683 [0.661, 0.705]"
    assert Estimate(0.6834, 0.661, 0.7051, 5, "u").text(1) == "0.7 [0.7, 0.7]"
    assert Estimate.mean([0.5], "u").text() == "0.500 [no interval: n = 1]"
    assert Estimate(0.5, 0.0, INF, 2, "u").text(2) == "0.50 [0.00, inf]"


# Simulations; each seed stands here before its first run


def test_students_interval_of_five_covers_the_truth() -> None:
    draws = 0.3 + 2.0 * KEY.fold("t").normal(100, 5).double()
    estimates = [Estimate.mean(row, "u") for row in draws.tolist()]
    covered = sum(e.low <= 0.3 <= e.high for e in estimates)
    assert covered >= 88
    assert covered < 100  # an interval that always covers says nothing


@pytest.mark.parametrize(
    ("rows", "columns", "cells"), [(1.0, 1.0, 1.0), (1.0, 0.2, 0.5), (0.2, 1.0, 0.0), (0.0, 0.0, 1.0)]
)
def test_components_cover_the_truth_of_a_crossed_design(rows: float, columns: float, cells: float) -> None:
    covered = 0
    for run in KEY.fold("crossed").split(100):
        effects = (
            0.3
            + rows * run.fold("rows").normal(5, 1).double()
            + columns * run.fold("columns").normal(1, 4).double()
            + cells * run.fold("cells").normal(5, 4).double()
        )
        parts = {"rows": effects.mean(1).tolist(), "columns": effects.mean(0).tolist()}
        got = Estimate.components(float(effects.mean()), parts, "u")
        covered += got.low <= 0.3 <= got.high
    assert covered >= 88


def test_one_margin_alone_would_not_cover_a_crossed_design() -> None:
    """The simulation can fail: the interval over rows ignores what all rows share."""
    covered = 0
    for run in KEY.fold("crossed").split(100):
        effects = 0.3 + run.fold("rows").normal(5, 1) * 0.2 + run.fold("columns").normal(1, 4)
        got = Estimate.mean(effects.double().mean(1).tolist(), "u")
        covered += got.low <= 0.3 <= got.high
    assert covered < 70


# Claims


def claim(low: float, high: float, direction: str, bound: float) -> Claim:
    value = 0.0 if math.isinf(low) or math.isinf(high) else (low + high) / 2
    chosen: Any = direction
    return Claim("c", "dm", "is so", Estimate(value, low, high, 5, "u"), chosen, bound, "null", "plant")


YES, NO, OPEN = "supported", "not supported", "inconclusive"
TRUTH = [
    # above 0.1
    ("greater", 0.1, 0.2, 0.3, YES),
    ("greater", 0.1, 0.1, 0.3, OPEN),
    ("greater", 0.1, 0.0, 0.3, OPEN),
    ("greater", 0.1, -0.3, 0.1, NO),
    ("greater", 0.1, -0.3, 0.05, NO),
    ("greater", 0.1, -0.3, -0.2, NO),
    ("greater", 0.1, 0.1, 0.1, NO),
    ("greater", 0.0, 0.0, 0.1, OPEN),
    ("greater", 0.0, 0.0, 0.0, NO),
    ("greater", 0.0, 1e-12, 0.1, YES),
    ("greater", 0.1, -INF, INF, OPEN),
    ("greater", 0.1, -INF, 0.0, NO),
    ("greater", 0.1, 0.2, INF, YES),
    ("greater", 0.1, math.nan, math.nan, OPEN),
    # below -0.1
    ("less", 0.1, -0.3, -0.2, YES),
    ("less", 0.1, -0.3, -0.1, OPEN),
    ("less", 0.1, -0.3, 0.0, OPEN),
    ("less", 0.1, -0.1, 0.3, NO),
    ("less", 0.1, -0.05, 0.3, NO),
    ("less", 0.1, 0.2, 0.3, NO),
    ("less", 0.0, -0.1, 0.0, OPEN),
    ("less", 0.0, 0.0, 0.1, NO),
    ("less", 0.1, -INF, INF, OPEN),
    ("less", 0.1, -INF, -0.2, YES),
    ("less", 0.1, 0.0, INF, NO),
    ("less", 0.1, math.nan, math.nan, OPEN),
    # within +- 0.1
    ("same", 0.1, -0.05, 0.05, YES),
    ("same", 0.1, 0.02, 0.09, YES),
    ("same", 0.1, -0.09, -0.02, YES),
    ("same", 0.1, -0.1, 0.05, OPEN),
    ("same", 0.1, -0.05, 0.1, OPEN),
    ("same", 0.1, -0.2, 0.2, OPEN),
    ("same", 0.1, 0.0, 0.3, OPEN),
    ("same", 0.1, 0.1, 0.3, NO),
    ("same", 0.1, 0.2, 0.3, NO),
    ("same", 0.1, -0.3, -0.1, NO),
    ("same", 0.1, -0.3, -0.2, NO),
    ("same", 0.1, -INF, INF, OPEN),
    ("same", 0.1, 0.2, INF, NO),
    ("same", 0.1, -INF, -0.2, NO),
    ("same", 0.1, math.nan, math.nan, OPEN),
]


@pytest.mark.parametrize(("direction", "bound", "low", "high", "verdict"), TRUTH)
def test_verdicts(direction: str, bound: float, low: float, high: float, verdict: str) -> None:
    assert claim(low, high, direction, bound).verdict == verdict


@pytest.mark.parametrize("bound", [0.0, 0.1])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.3), (-0.05, 0.3), (-0.3, -0.2), (0.1, 0.1), (-INF, INF)])
def test_less_is_the_mirror_of_greater(low: float, high: float, bound: float) -> None:
    assert claim(low, high, "less", bound).verdict == claim(-high, -low, "greater", bound).verdict


def verdicts(draws: torch.Tensor, direction: Literal["greater", "less", "same"], bound: float) -> list[str]:
    return [
        Claim("c", "s", "", Estimate.mean(row, "u"), direction, bound, "", "").verdict
        for row in draws.tolist()
    ]


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    """1,000 draws of five standard normal numbers."""
    return KEY.fold("null").normal(1000, 5).double()


@pytest.mark.parametrize(
    ("direction", "bound", "shift"),
    [
        ("greater", 0.0, 0.0),
        ("less", 0.0, 0.0),
        ("greater", 0.5, 0.5),
        ("less", 0.5, -0.5),
        ("same", 3.0, 3.0),
    ],
)
def test_where_nothing_is_there_alarms_are_rare(
    noise: torch.Tensor, direction: Literal["greater", "less", "same"], bound: float, shift: float
) -> None:
    found = verdicts(noise + shift, direction, bound)
    assert found.count("supported") <= 70
    assert found.count("not supported") <= 70


@pytest.mark.parametrize(("direction", "shift"), [("greater", 3.0), ("less", -3.0)])
def test_a_planted_effect_of_three_deviations_is_found(
    noise: torch.Tensor, direction: Literal["greater", "less"], shift: float
) -> None:
    assert verdicts(noise + shift, direction, 0.0).count("supported") > 900


def test_planted_sameness_is_found_and_a_planted_difference_is_not_called_sameness(
    noise: torch.Tensor,
) -> None:
    assert verdicts(noise, "same", 5.0).count("supported") > 900
    assert verdicts(noise + 10, "same", 5.0).count("not supported") > 900


# Results


@dataclass(frozen=True, eq=False)
class Planted(Result):
    """A result with a field of every kind, some under the words that the file uses itself."""

    analysis: ClassVar[str] = "behaviour/planted"
    title: ClassVar[str] = "Planted"
    question: ClassVar[str] = "Does it come back?"

    tensor: torch.Tensor
    map: Mapping[str, Mapping[int, torch.Tensor]]
    float: float
    numbers: tuple[Any, ...]
    estimate: Estimate
    claimed: Claim
    inner: Any = None
    shade: str = "black"

    def headline(self) -> dict[str, Estimate]:
        return {"one": self.estimate, "alone": Estimate.mean([0.5], "set")}

    def claims(self) -> tuple[Claim, ...]:
        return (self.claimed,)

    def tables(self) -> tuple[Table, ...]:
        return (Table("All", ("name", "n", "share"), (("dm", 3, self.estimate),)),)

    def notes(self) -> tuple[str, ...]:
        return ("a note",)

    def plot(self, ax: Axes) -> None:
        ax.plot(self.tensor.flatten().tolist(), color=self.shade)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        return {"First.": self.plot, "Second.": lambda ax: ax.bar([0, 1], [1, 2])}


Planted.__module__ = "distillens.planted"


@pytest.fixture(autouse=True)
def home() -> Iterator[None]:
    """A module of the package in which a reader finds the class above."""
    module = ModuleType("distillens.planted")
    vars(module)["Planted"] = Planted
    sys.modules["distillens.planted"] = module
    yield
    del sys.modules["distillens.planted"]


ESTIMATE = Estimate(0.25, 0.125, 0.5, 4, "replicate", 0.9)
CLAIM = Claim("c", "dm", "is above", ESTIMATE, "greater", 0.1, "no effect", "an effect", "figure 3")


def result(**changes: Any) -> Planted:
    parts: dict[str, Any] = {
        "tensor": KEY.fold("tensor").normal(3, 2),
        "map": {"a": {1: torch.arange(3), 2: torch.zeros(0)}, "b": {}},
        "float": 1 / 3,
        "numbers": (INF, -INF, math.nan, 1e-300, -0.0, 3, True, None, "text", ("nested", (1.5,))),
        "estimate": ESTIMATE,
        "claimed": CLAIM,
    }
    return Planted(**{**parts, **changes})


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in kind and content; nan is equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Result | Estimate | Claim):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))  # type: ignore[arg-type]
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b) and repr(a) == repr(b)


def test_a_result_comes_back_with_every_kind_of_field(tmp_path: Path) -> None:
    one = result(inner=result(estimate=Estimate.mean([0.5], "set")))
    path = one.save(tmp_path)
    assert path == tmp_path / "behaviour.planted.json"
    again = Planted.load(path)
    assert same(one, again)
    assert not same(one, result())  # the comparison can fail
    assert same(Result.load(path), again)


def accuracy() -> AccuracyResult:
    values = {
        "dm": torch.tensor([[0.8, 0.9], [0.7, 0.75]]),
        "random_subset": torch.tensor([[0.6, 0.7], [0.5, 0.6]]),
    }
    return AccuracyResult(
        "wddl",
        "a paper",
        "ConvNet",
        ("dm",),
        ("random_subset",),
        values,
        torch.tensor([0.95, 0.96]),
        {"dm": ("", ""), "random_subset": ("", "")},
        {"dm": "64 floats", "random_subset": "64 floats"},
    )


def test_a_result_of_the_package_comes_back(tmp_path: Path) -> None:
    one = accuracy()
    again = AccuracyResult.load(one.save(tmp_path))
    assert same(one, again)
    assert one.headline() == again.headline()
    assert one.claims() == again.claims()


@pytest.mark.parametrize("make", [result, accuracy])
def test_the_same_result_is_the_same_bytes(make: Callable[[], Result], tmp_path: Path) -> None:
    for folder in ("first", "second"):
        make().save(tmp_path / folder, {"data": "digits"})
    first = [p for p in sorted((tmp_path / "first").rglob("*")) if p.is_file()]
    assert {p.suffix for p in first} == {".json", ".png", ".safetensors"}
    for path in first:
        other = tmp_path / "second" / path.relative_to(tmp_path / "first")
        assert path.read_bytes() == other.read_bytes()


def test_another_result_is_another_picture(tmp_path: Path) -> None:
    result().save(tmp_path / "first")
    result(shade="red").save(tmp_path / "second")
    name = "figures/behaviour.planted.png"
    assert (tmp_path / "first" / name).read_bytes() != (tmp_path / "second" / name).read_bytes()


def test_the_file_tells_a_reader_all_without_our_code(tmp_path: Path) -> None:
    path = result().save(tmp_path, {"data": "digits", "ipc": 10})
    saved = json.loads(path.read_text())
    del saved["result"]
    estimate = {"value": 0.25, "low": 0.125, "high": 0.5, "level": 0.9, "n": 4, "unit": "replicate"}
    assert saved == {
        "analysis": "behaviour/planted",
        "title": "Planted",
        "question": "Does it come back?",
        "context": {"data": "digits", "ipc": 10},
        "headline": [
            {"name": "one", **estimate},
            {
                "name": "alone",
                "value": 0.5,
                "low": "-inf",
                "high": "inf",
                "level": 0.95,
                "n": 1,
                "unit": "set",
            },
        ],
        "claims": [
            {
                "name": "c",
                "subject": "dm",
                "statement": "is above",
                "estimate": estimate,
                "direction": "greater",
                "smallest_effect": 0.1,
                "null": "no effect",
                "plant": "an effect",
                "source": "figure 3",
                "verdict": "supported",
            }
        ],
        "tables": [{"title": "All", "columns": ["name", "n", "share"], "rows": [["dm", 3, estimate]]}],
        "notes": ["a note"],
        "figures": [
            {"file": "figures/behaviour.planted.png", "caption": "First."},
            {"file": "figures/behaviour.planted.1.png", "caption": "Second."},
        ],
    }
    for figure in ("behaviour.planted.png", "behaviour.planted.1.png"):
        assert (tmp_path / "figures" / figure).read_bytes().startswith(b"\x89PNG")


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a result cannot hold a set \(at .numbers.0\)"):
        result(numbers=({1},)).save(tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_a_missing_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*nothing.json"):
        Planted.load(tmp_path / "nothing.json")


def test_another_kind_of_result_is_refused(tmp_path: Path) -> None:
    path = result().save(tmp_path)
    with pytest.raises(
        UserError, match=r"planted.json holds another result; got Planted; expected AccuracyResult"
    ):
        AccuracyResult.load(path)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a saved result; got .*; make it again"),
        ("{}", "is not a saved result; got KeyError"),
        ('{"result": null}', "holds another result; got NoneType; expected Planted"),
        ('{"result": {"nothing": 1}}', "is not a saved result"),
        ('{"result": {"map": [1]}}', "is not a saved result"),
        ('{"result": {"map": [[1, 2, 3]]}}', "is not a saved result"),
        ('{"result": {"float": "x"}}', "is not a saved result"),
        ('{"result": {"tensor": "x"}}', "is not a saved result"),
        ('{"result": {"is": "distillens.planted.Planted"}}', "is not a saved result; got TypeError"),
        (
            '{"result": {"is": "distillens.planted.Planted", "odd": 1}}',
            "is not a saved result; got TypeError",
        ),
    ],
)
def test_a_damaged_result_is_refused(tmp_path: Path, saved: str, message: str) -> None:
    path = tmp_path / "behaviour.planted.json"
    path.write_text(saved)
    with pytest.raises(UserError, match=message):
        Planted.load(path)


@pytest.mark.parametrize(
    "name",
    [
        "subprocess.Popen",
        "planted_code.Result",
        "distillens.nowhere.Result",
        "distillens.core.recipe.Recipe",
        "distillens.core.result.Path",
        "distillens.core.result._picture",
        "distillensx.Result",
        "",
    ],
)
def test_loading_a_result_runs_no_code(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("planted_code", "distillensx"):
        (tmp_path / f"{module}.py").write_text("class Result: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"result": {"is": name, "args": "true"}}))
    with pytest.raises(UserError, match=r"^unknown result; got .*; expected a (class|result) of distillens$"):
        Planted.load(path)
    assert not {"planted_code", "distillensx"} & sys.modules.keys()


def test_a_result_whose_tensors_are_gone_is_refused(tmp_path: Path) -> None:
    path = result().save(tmp_path)
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(UserError, match=r"is not a saved result; got KeyError"):
        Planted.load(path)

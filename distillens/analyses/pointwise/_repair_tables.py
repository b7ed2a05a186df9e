"""The tables of a repair: what each brings, the orders, and the weak points one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillens.analyses.pointwise._orders import ORDERS
from distillens.analyses.pointwise._repair_estimates import DRAW, INIT
from distillens.core.result import Estimate, Table, paired

if TYPE_CHECKING:
    from distillens.analyses.pointwise.repair import RepairResult


def tables(result: RepairResult) -> tuple[Table, ...]:
    """The repairs, the orders, the weak points."""
    found = [_repairs(result)] if result.policies else []
    return (*found, _orders(result), _sizes(result), *(_weak(result, name) for name in result.distilled))


def _repairs(result: RepairResult) -> Table:
    rows: list[tuple[str | int | Estimate, ...]] = []
    for name, repaired in result.repaired.items():
        points, weak = len(result.labels[name]), len(result.weak[name])
        for p, policy in enumerate(result.policies):
            rows.append(
                (
                    name,
                    policy,
                    points - weak if policy == "drop" else points,
                    Estimate.mean(result.untouched[name].tolist(), INIT),
                    Estimate.mean(repaired[p, 0].tolist(), INIT),
                    result.gain(name, policy),
                    result.beyond_random(name, policy),
                )
            )
    columns = (
        "set",
        "repair of the weakest",
        "points kept",
        "test accuracy untouched",
        "repaired",
        "gain",
        "beyond the repair of random points",
    )
    return Table("What mending the weakest points brings", columns, tuple(rows))


def _orders(result: RepairResult) -> Table:
    rows: list[tuple[str | int | Estimate, ...]] = []
    for name in result.curves:
        areas = result.areas(name)
        between = paired(areas[0].tolist(), areas[1].tolist(), INIT)
        means = (Estimate.mean(areas[o].tolist(), INIT) for o in range(len(ORDERS)))
        rows.append((name, *means, result.ahead(name), result.ahead(name, 1), between, result.repeats(name)))
    columns = (
        "set",
        "mean accuracy along the order by ridge regression",
        "by influence",
        "ridge regression beyond random orders",
        "influence beyond random orders",
        "ridge regression beyond influence",
        "agreement of initialisations on weakness",
    )
    return Table("Orders of the points, every class once before any twice", columns, tuple(rows))


def _sizes(result: RepairResult) -> Table:
    rows: list[tuple[str | int | Estimate, ...]] = []
    for name, curves in result.curves.items():
        random = curves[len(ORDERS) :].mean(2)
        for s, size in enumerate(result.sizes[name]):
            tried = (Estimate.mean(curves[o, s].tolist(), INIT) for o in range(len(ORDERS)))
            rows.append((name, size, *tried, Estimate.mean(random[:, s].tolist(), DRAW)))
        whole = Estimate.mean(result.untouched[name].tolist(), INIT)
        rows.append((name, len(result.labels[name]), whole, whole, whole))
    columns = ("set", "points kept", *ORDERS, "random orders")
    return Table("Test accuracy on the first points", columns, tuple(rows))


def _weak(result: RepairResult, name: str) -> Table:
    rows = []
    for j, said in zip(result.weak[name].tolist(), result.said[name], strict=True):
        own = result.helped[name][:, j]
        rows.append(
            (
                j,
                result.classes[int(result.labels[name][j])],
                Estimate.mean(own.tolist(), "initialisation"),
                result.classes[int(said.argmax())],
            )
        )
    columns = ("point", "class", "lowers the validation loss by", "networks without it say")
    return Table(f"{name}: the weakest points", columns, tuple(rows))

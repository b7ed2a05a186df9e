"""``study.json``: what a report says of the whole of a study, and where its sets lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distillens.core.contracts import Sets
from distillens.making import Order, versions
from distillens.sessions import chosen_plan
from distillens.studies.asked import Study, data_options
from distillens.studies.outlook import Forecast
from distillens.tuning import wish


def folder_of(order: Order) -> str:
    """Where a set lies in its study's folder."""
    return f"sets/ipc{order.ipc}/{order.name}/{order.replicate}"


def about(wanted: Study, cost: Forecast, everything: Mapping[int, Sets]) -> dict[str, Any]:
    """``study.json``: what a report says of the whole, with the storage of the sets that are made."""
    real = wanted.real

    # A study shares the cores out; the command of one set would take them all, and end in other last bits.
    alone = chosen_plan(real, precision=wanted.plan.precision).threads
    threads = [] if wanted.plan.threads == alone else [f"--threads {wanted.plan.threads}"]

    def storage(one: Order) -> dict[str, Any]:
        if one.ipc not in everything:
            return {}
        return {"storage": asdict(everything[one.ipc].everything()[one.name][one.replicate].storage())}

    return {
        "title": real.source,
        "command": wanted.command(),
        "data": {
            "source": real.source,
            "classes": list(real.train.classes),
            "train": len(real.train),
            "val": len(real.val),
            "test": len(real.test),
            "space": real.space.name,
            "shape": list(real.train.shape),
            "fingerprint": real.fingerprint,
        },
        "preset": wanted.preset.name,
        "asked": list(wanted.asked),
        "scaled": wanted.shrinkage,
        "versions": versions(),
        "seed": wanted.seed,
        "plan": asdict(wanted.plan),
        "trainings": cost.models,
        "sets": [
            *_about_given(wanted, everything),
            *(
                {
                    "name": one.name,
                    "ipc": one.ipc,
                    "replicate": one.replicate,
                    "folder": folder_of(one),
                    "paper": type(one.distiller).paper,
                    "family": type(one.distiller).family,
                    "command": " ".join(
                        [
                            f"distillens distill {one.name}",
                            *data_options(real),
                            f"--ipc {one.ipc}",
                            f"--seed {one.seed} --replicate {one.replicate}",
                            *(f"--set {setting}" for setting in wanted.settings_of_method(one.name, one.ipc)),
                            *wish(wanted.plan, real.train),
                            *threads,
                        ]
                    ),
                    **storage(one),
                }
                for one in wanted.orders
            ),
        ],
    }


def _about_given(wanted: Study, everything: Mapping[int, Sets]) -> list[dict[str, Any]]:
    return [
        {
            "name": Path(place).parent.name,
            "ipc": wanted.given.ipc,
            "replicate": int(Path(place).name),
            "folder": place,
            **({"storage": asdict(one.storage())} if everything else {}),
        }
        for place, one in wanted.given.folders()
    ]

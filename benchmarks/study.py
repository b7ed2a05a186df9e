"""A study's figures as committed JSON.

    python benchmarks/study.py digits                 # the quick preset, made in runs/digits where it is missing
    python benchmarks/study.py trajectories           # on digits too: the methods that follow or differentiate training
    python benchmarks/study.py matching               # on digits too: those that match gradients or distributions, or regress
    python benchmarks/study.py coresets               # on digits too: the methods that choose real images
    python benchmarks/study.py paper                  # on digits too: the paper's first question, as published
    python benchmarks/study.py representativeness     # on digits too: the second question, every analysis
    python benchmarks/study.py pointwise              # on digits too: the third question, which estimators can be trusted
    python benchmarks/study.py cifar10 runs/cifar10   # from a folder that a study has finished: cifar10.sh
    python benchmarks/study.py paper_cifar10 study    # likewise: paper_cifar10.sh
    python benchmarks/study.py representativeness_cifar10 study    # likewise: representativeness_cifar10.sh
    python benchmarks/study.py pointwise_cifar10 pointwise         # likewise: pointwise_cifar10.sh

The JSON is what README and docs quote: docs/render.py writes it into them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from distillens import load, study
from distillens.core.storage import write_json

STUDIES: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("digits", {}),
    "trajectories": (
        "digits",
        {"methods": ("mtt", "tesla", "ftd", "datm", "wang2018", "bptt", "rtp", "rat_bptt")},
    ),
    "matching": ("digits", {"methods": ("dsa", "idc", "m3d", "ncfm", "kip", "frepo")}),
    # Herding and a random subset stand beside every study.
    "paper": ("digits", {"preset": "wddl", "replicates": 5, "only": ("behaviour",)}),
    "representativeness": (
        "digits",
        {"preset": "full", "replicates": 5, "ipc": (10,), "only": ("representativeness",)},
    ),
    # Points of replicate 0 are looked at, so there is no other. Half the steps of the defaults, alike so that networks are shared.
    "pointwise": (
        "digits",
        {
            "preset": "full",
            "replicates": 1,
            "ipc": (10,),
            "only": ("pointwise/leave_one_out", "pointwise/estimators", "pointwise/semantics"),
            "settings": (
                *(f"{name}.recipe.steps=150" for name in ("leave_one_out", "estimators", "semantics")),
                *(f"{name}.inits=3" for name in ("leave_one_out", "estimators", "semantics")),
                "estimators.images=200",
            ),
        },
    ),
    "coresets": ("digits", {"methods": ("k_center", "k_means", "el2n", "grand", "forgetting")}),
}
TABLES = (
    "behaviour/accuracy",
    "pointwise/estimators",
    "pointwise/semantics",
)  # the others are in the study's report
RESULTS = Path(__file__).parent / "results"


def collect(folder: Path) -> dict[str, Any]:
    """Accuracies and claims of every size of a finished study, and what made them."""
    about = json.loads((folder / "study.json").read_text())
    timing = json.loads((folder / "timing.json").read_text())
    sizes: dict[str, Any] = {}
    for path in sorted((folder / "results").glob("ipc*/*.json")):
        saved = json.loads(path.read_text())
        size = sizes.setdefault(
            path.parent.name.removeprefix("ipc"), {"tables": {}, "claims": [], "headline": {}}
        )
        size["headline"][saved["analysis"]] = saved["headline"]
        if saved["analysis"] in TABLES:
            size["tables"][saved["analysis"]] = saved["tables"]
        kept = (
            "name",
            "subject",
            "statement",
            "estimate",
            "verdict",
            "direction",
            "smallest_effect",
            "source",
        )
        size["claims"] += [{key: claim[key] for key in kept} for claim in saved["claims"]]
    sets = {
        one["name"]: {"paper": one.get("paper", ""), "family": one.get("family", "")} for one in about["sets"]
    }
    beside = folder / "paper.json"
    return {
        "command": about["command"],
        "data": about["data"],
        "trainings": about["trainings"],
        # A study that was stopped and went on has no time of its own.
        "seconds": None if timing.get("resumed") else round(timing["seconds"]),
        "forecast_seconds": round(timing["forecast"]),
        "seconds_by": {what: round(took, 1) for what, took in timing["by"].items()},
        "seconds_by_answer": {what: round(took, 1) for what, took in timing["answers"].items()},
        "sets": sets,
        "sizes": sizes,
        "scaled": about["scaled"],
        "paper": json.loads(beside.read_text())["rows"] if beside.is_file() else [],
        "environment": environment(),
    }


def main(name: str, folder: Path) -> None:
    if not (folder / "timing.json").is_file():  # new, or stopped: it goes on
        data, wishes = STUDIES[name]
        study(load(data), folder, announce=print, **wishes)
    write_json(RESULTS / f"{name}.json", collect(folder))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else f"runs/{sys.argv[1]}"))

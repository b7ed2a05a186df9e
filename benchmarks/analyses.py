"""What the default of each analysis costs on digits, from an empty store.

    python -m benchmarks.analyses                     # writes benchmarks/results/analyses.json
    python -m benchmarks.analyses --only behaviour    # puts new rows in the place of these analyses' old ones
    python -m benchmarks.analyses --only behaviour/sensitivity --methods 1   # of one method, as a row of its own
    python -m benchmarks.analyses --only pointwise/leave_one_out --methods 1 --set inits=5 --set only=bptt   # one set, 505 models

Sets as a study has them: four methods, five replicates, 10 images a class, beside random subsets and herding. Real subsets
stand in the methods' places: what an analysis costs does not depend on what the images show. Herding is made before the
clock. Each analysis trains all it needs itself; in a study many share their models.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from distillens import analyses, load, making, pipeline
from distillens.core.config import override
from distillens.core.contracts import Sets
from distillens.core.rng import Key
from distillens.core.storage import write_json
from distillens.engine.workers import settle_process
from distillens.sessions import session

RESULT = Path(__file__).parent / "results" / "analyses.json"
NAMES, REPLICATES, IPC = ("bptt", "mtt", "dc", "dm"), 5, 10


def stand_ins(real: Any, runs: Any, methods: int) -> Sets:
    """Real subsets under the methods' names, with their baselines."""
    made = {}
    for i, name in enumerate(NAMES[:methods]):
        orders = [
            making.order("random_subset", real, IPC, seed=100 + i, replicate=r) for r in range(REPLICATES)
        ]
        made[name] = tuple(
            replace(pipeline._selected(one, real, {}), provenance=one.provenance(real, runs.plan))
            for one in orders
        )
    return pipeline.with_baselines(Sets(made), real, runs)


def main(only: str, methods: int, settings: Sequence[str]) -> None:
    settle_process()
    real, key = load("digits"), Key(0, ("analyses",))
    old = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    rows = {row["name"]: row for row in old}
    names = pipeline.analyses_of(only) if only else analyses.room.names()
    for name in names:
        with tempfile.TemporaryDirectory() as folder, session(real, Path(folder) / "store") as runs:
            sets = stand_ins(real, runs, methods)
            runs.engine.map(len, [("warm",)] * runs.engine.workers)
            before = sum(runs.trained.values())
            question: Any = override(analyses.room.find(name).defaults(real.train), settings, like=real.train)
            begun = time.perf_counter()
            result = question(sets, real, runs, key=key)
            answered = time.perf_counter()
            result.save(Path(folder) / "results")
            saved = time.perf_counter()
            few = [] if methods == len(NAMES) else ["one method"]
            label = ", ".join([name, *few, *settings])
            rows[label] = {
                "name": label,
                "models": sum(runs.trained.values()) - before,
                "seconds": answered - begun,
                "saving": saved - answered,
                "environment": environment(),
            }
        print(json.dumps({k: v for k, v in rows[label].items() if k != "environment"}), flush=True)
        write_json(RESULT, {"rows": [rows[each] for each in sorted(rows)]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="")
    parser.add_argument("--methods", type=int, choices=(1, len(NAMES)), default=len(NAMES))
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="settings of the analysis"
    )
    asked = parser.parse_args()
    main(asked.only, asked.methods, asked.set)

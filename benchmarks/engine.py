"""The engine's speed: works beside the plain way to do them, as ratios within one run.

    python -m benchmarks.engine                         # writes benchmarks/results/engine.json
    python -m benchmarks.engine --only step,dm          # puts new rows in the place of these works' old ones
    python -m benchmarks.engine --repeats 1

Each round runs the reference, then ours, each in a process of its own: our processes change the allocator, which the
reference must not profit from. A ratio is the reference's median time over ours in the same round; the figure is the
median over rounds, with quartiles. ``share_of_peak`` sets a work's arithmetic (convolutions and matrix products, as
the reference needs them for the gradients that are asked for) over its time against the best float32 matrix product
that this machine showed in the same run, with all cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import works
from benchmarks.environment import environment, forget, memory
from benchmarks.reference import mtt
from benchmarks.reference.convnet import convnet
from benchmarks.works import WORKS, Side
from distillens.core.checks import UserError
from distillens.core.config import describe
from distillens.core.storage import read_json, write_json
from distillens.engine.plan import Plan
from distillens.engine.workers import pinned_threads, settle_process
from distillens.sessions import workers_for

PATH = Path(__file__).parent / "results" / "engine.json"
SIZE = 2048  # of the matrices whose product is the machine's peak
LENGTHS = (10, 20, 40, 80)  # inner steps of the adjoint
SHORT = 5  # inner steps over which the two gradients of MTT are compared
OTHERS = ("adjoint", "agreement")


# ---- what a child does ----


@contextlib.contextmanager
def settled(plan: Plan) -> Iterator[None]:
    """This process as the command and its workers are for a plan."""
    settle_process()
    pinned = plan.pinned() if hasattr(plan, "pinned") else pinned_threads(plan.threads)
    with pinned:
        yield


def timed(side: Side, calls: int, units: int) -> dict[str, Any]:
    """Seconds a unit of each call, and the bytes by which this process grew."""
    forget()
    before = memory("VmRSS")
    side.warm()
    seconds = []
    for _ in range(calls):
        begun = time.perf_counter()
        side.timed()
        seconds.append((time.perf_counter() - begun) / units)
    grown = memory("VmHWM") - before
    return {"seconds": seconds, "bytes": grown}


def reference(name: str) -> dict[str, Any]:
    work = WORKS[name]
    found = timed(work.reference(), work.calls, work.units)
    return found | {"flops": work.flops()}


def ours(name: str, setting: str) -> dict[str, Any]:
    work = WORKS[name]
    plan = works.plan(work, setting)
    with settled(plan):
        found = timed(work.ours(plan), work.calls, work.units)
    workers = 1 if work.large else workers_for(plan, "cpu")
    return found | {"plan": describe(plan), "workers": workers}


def adjoint(steps: str) -> dict[str, Any]:
    plan = works.plan(WORKS["mtt"], "float32")
    with settled(plan):
        return timed(works.mtt_ours(int(steps)), 1, 1) | {"plan": describe(plan)}


def agreement() -> dict[str, Any]:
    """Our adjoint's gradient in the images beside that of the reference's full graph, from the same start."""
    given, method = works.mtt_problem(), works.mtt_method(SHORT)
    state = method.start(given)
    plan = works.plan(WORKS["mtt"], "float32")
    with settled(plan):
        after, _ = method.step(given, state, 0)
    found = after.tensors["velocity"].flatten().double()  # from rest, the velocity is the gradient
    experts = given.inputs["experts"]
    theta, target = experts.at(0, 0), experts.at(0, 1)
    net = convnet()
    nn.utils.vector_to_parameters(theta, net.parameters())
    images = state.tensors["images"].clone().requires_grad_()
    rate = torch.tensor(method.lr_start)
    loss = mtt.loss(net, theta, target, images, given.labels(), rate, SHORT)
    expected = torch.autograd.grad(loss, images)[0].flatten().double()
    return {
        "steps": SHORT,
        "cosine": float(found @ expected / (found.norm() * expected.norm())),
        "length": float(found.norm() / expected.norm()),
        "plan": describe(plan),
    }


def peak() -> dict[str, Any]:
    """The best rate of ten products, in operations a second."""
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    seconds = []
    for _ in range(10):
        begun = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begun)
    return {"flops_a_second": 2 * SIZE**3 / min(seconds), "threads": torch.get_num_threads()}


CHILDREN = {
    "reference": reference,
    "ours": ours,
    "adjoint": adjoint,
    "agreement": agreement,
    "peak": peak,
}


# ---- what the parent does: no arithmetic, so that no child competes with it ----


def child(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.engine", "--child", *words]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def possible(name: str) -> list[str]:
    """The settings of a work that a plan can have."""
    found = []
    for setting in WORKS[name].settings:
        try:
            works.plan(WORKS[name], setting)
        except (UserError, TypeError) as error:
            print(f"{name}, {setting}: left out ({error})", flush=True)
        else:
            found.append(setting)
    return found


def rows_of(name: str, repeats: int) -> list[dict[str, Any]]:
    """A row a setting."""
    work, settings = WORKS[name], possible(name)
    peaks, theirs = [], []
    rounds: dict[str, list[dict[str, Any]]] = {setting: [] for setting in settings}
    for _ in range(repeats):
        peaks.append(child("peak"))
        theirs.append(child("reference", name))
        for setting in settings:
            rounds[setting].append(child("ours", name, setting))
    rate = statistics.median(one["flops_a_second"] for one in peaks)
    flops = theirs[0]["flops"]
    reference_s = _median(theirs)
    rows = []
    for setting, own in rounds.items():
        ours_s = _median(own)
        ratios = [_median([a]) / _median([b]) for a, b in zip(theirs, own, strict=True)]
        row = {
            "work": name,
            "unit": work.unit,
            "setting": setting,
            "mode": work.mode,
            "reference_s": _rounded(reference_s),
            "ours_s": _rounded(ours_s),
            "ratio": _quartiles(ratios),
            "n": repeats,
            "gflop": _rounded(flops / 1e9),
            "peak_gflops": _rounded(rate / 1e9),
            "share_of_peak": {
                "reference": round(flops / reference_s / rate, 3),
                "ours": round(flops / ours_s / rate, 3),
            },
            "plan": own[0]["plan"],
            "workers": own[0]["workers"],
            "reference_threads": peaks[0]["threads"],
            "commit": environment()["commit"],
        }
        if work.large:  # what workers take is not this process's
            row["peak_mb"] = {"reference": _megabytes(theirs), "ours": _megabytes(own)}
        rows.append(row)
        print(
            f"{name}, {setting}: {row['reference_s']} s, ours {row['ours_s']} s, ratio {row['ratio']}",
            flush=True,
        )
    return rows


def _median(children: Sequence[dict[str, Any]]) -> float:
    return statistics.median(seconds for one in children for seconds in one["seconds"])


def _megabytes(children: Sequence[dict[str, Any]]) -> int:
    return round(statistics.median(one["bytes"] for one in children) / 1e6)


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"value": round(statistics.median(values), 2), "low": round(low, 2), "high": round(high, 2)}


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def adjoint_rows(repeats: int) -> list[dict[str, Any]]:
    """Time and memory of MTT's adjoint by number of inner steps: medians, and the least and most memory."""
    rows = []
    for steps in LENGTHS:
        found = [child("adjoint", str(steps)) for _ in range(repeats)]
        memory = [_megabytes([one]) for one in found]
        row = {"steps": steps, "seconds": round(_median(found), 2), "peak_mb": _megabytes(found)}
        row |= {"lowest_mb": min(memory), "highest_mb": max(memory), "n": repeats}
        rows.append(row | {"plan": found[0]["plan"], "commit": environment()["commit"]})
        print(row, flush=True)
    return rows


def main(only: Sequence[str], repeats: int) -> None:
    saved = read_json(PATH) if PATH.is_file() else {"rows": []}
    for name in only:
        if name == "adjoint":
            saved["adjoint"] = adjoint_rows(repeats)
        elif name == "agreement":
            saved["agreement"] = child("agreement") | {"commit": environment()["commit"]}
            print(saved["agreement"], flush=True)
        else:
            kept = [row for row in saved["rows"] if row["work"] != name]
            saved["rows"] = sorted(kept + rows_of(name, repeats), key=lambda row: [*WORKS].index(row["work"]))
        saved["environment"] = environment()
        write_json(PATH, saved)  # a run that is cut off keeps its rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join([*WORKS, *OTHERS]))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        kind, *words = asked.child
        print(json.dumps(CHILDREN[kind](*words)))
    else:
        named = asked.only.split(",")
        unknown = [name for name in named if name not in (*WORKS, *OTHERS)]
        if unknown:
            parser.error(f"no such work: {', '.join(unknown)}")
        main(named, asked.repeats)

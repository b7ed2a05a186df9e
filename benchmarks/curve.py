"""Accuracy along one distillation, as a committed curve that later runs add to.

    python -m benchmarks.curve NAME METHOD --data parquet:FOLDER --ipc 10 --at 0,10,50 --set net.width=32 ...

At each of the steps ``--at`` the set as it stands is judged by the protocol (wddl by default), beside a random subset
and the full data under the same recipe. The test split chooses nothing: every point is shown. A curve is known by
its method, settings (but for ``steps``), data and seed: one that is run further replaces itself in
benchmarks/results/curve-NAME.json, others stay.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from distillens import load, making, pipeline
from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.core.config import describe, settings_of
from distillens.core.contracts import Sets
from distillens.core.result import Estimate
from distillens.core.storage import write_json
from distillens.engine.plan import Plan
from distillens.engine.workers import settle_process
from distillens.evaluation import protocol as protocols
from distillens.nets.convnet import ConvNet
from distillens.sessions import session
from distillens.train import networks

RESULTS = Path(__file__).parent / "results"


def curve(asked: argparse.Namespace) -> None:
    real = load(asked.data)
    at = sorted({int(step) for step in asked.at.split(",")})
    order = making.order(
        asked.method, real, asked.ipc, settings=[*asked.set, f"steps={at[-1]}"], seed=asked.seed
    )
    plan = replace(Plan.resolve(real.train), threads=asked.threads)
    accuracy = replace(
        Accuracy.defaults(real.train), protocol=replace(protocols.find(asked.protocol), nets=asked.nets)
    )
    width = settings_of(order.distiller).get("net.width", ConvNet.defaults(real.train).width)
    accuracy = replace(accuracy, net=replace(accuracy.net, width=width))
    with session(real, asked.store, plan=plan, workers=max(1, 2 // plan.threads)) as runs:
        made = about(asked, order, accuracy, real, runs)
        problem = order.problem(real.train, making.inputs_of([order], real, runs, tell)[0])
        method, loss = order.distiller, None
        state = method.start(problem)
        for step in range(at[-1] + 1):
            if step in at:
                now = replace(method.finish(problem, state), provenance=order.provenance(real, plan))
                point = {"step": step, "loss": loss}
                made["points"].append(point | {"accuracy": judged(now, real, accuracy, runs)})
                print(made["points"][-1], flush=True)
                keep(asked.name, made)  # a run that is cut off keeps its points
            if step < at[-1]:
                state, log = method.step(problem, state, step)
                loss = log["loss"]


def about(asked: argparse.Namespace, order: Any, accuracy: Accuracy, real: Any, runs: Any) -> dict[str, Any]:
    """What a curve is known by, and what stands beside it."""
    chosen = making.order("random_subset", real, asked.ipc, seed=asked.seed)
    random = replace(pipeline._selected(chosen, real, {}), provenance=chosen.provenance(real, runs.plan))
    whole = accuracy._full(Sets({"random_subset": (random,)}), real, pipeline.analysis_key(asked.seed))
    settings = describe(order.distiller)
    del settings["steps"]
    return {
        "method": order.name,
        "settings": settings,
        "changed": asked.set,
        "data": real.source.partition(":")[0],
        "data_fingerprint": real.fingerprint,
        "ipc": asked.ipc,
        "seed": asked.seed,
        "protocol": asked.protocol,
        "net": describe(accuracy.net),
        "points": [],
        "random_subset": judged(random, real, accuracy, runs),
        "full": asdict(Estimate.mean([float(p.accuracy(real.test)) for p in runs.get(*whole)], "network")),
        "threads": asked.threads,
        "environment": environment(),
    }


def keep(name: str, made: dict[str, Any]) -> None:
    """Put a curve beside the others, in the place of an earlier one of its kind."""
    path = RESULTS / f"curve-{name}.json"
    kept = json.loads(path.read_text())["curves"] if path.is_file() else []
    known = ("method", "settings", "data_fingerprint", "ipc", "seed", "protocol")
    others = [one for one in kept if any(one[key] != made[key] for key in known)]
    curves = sorted([*others, made], key=lambda one: (one["data"], one["ipc"], one["method"]))
    write_json(path, {"curves": curves})


def judged(made: Any, real: Any, accuracy: Accuracy, runs: Any) -> dict[str, Any]:
    """Test accuracy of the networks that look at one set."""
    keys = networks(pipeline.analysis_key(0), 0, accuracy.protocol.nets)
    (training,) = accuracy._candidates(made, made, keys)
    scores = [float(a) for a in runs.get(training)[0].accuracy(real.test)]
    return asdict(Estimate.mean(scores, "network (one set: training only)"))


def tell(what: str, done: int, total: int) -> None:
    print(f"{what}: {done} of {total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("method")
    parser.add_argument("--data", required=True)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--at", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nets", type=int, default=3)
    parser.add_argument("--protocol", default="wddl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--store", type=Path, default=None)
    asked = parser.parse_args()
    settle_process()
    curve(asked)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

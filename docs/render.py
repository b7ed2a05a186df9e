"""Write the committed figures into README and docs.

    python docs/render.py

Text between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced; a test checks that nothing is stale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _estimate(e: dict[str, Any], digits: int = 3, sign: bool = False) -> str:
    def number(x: float | str) -> str:
        if isinstance(x, str):
            return x
        return f"{x:+.{digits}f}" if sign else f"{x:.{digits}f}"

    return f"{number(e['value'])} [{number(e['low'])}, {number(e['high'])}]"


def accuracy_table(name: str) -> str:
    """Accuracy by size, with the paired gains over random and over the start."""
    saved = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [
        "| set | images a class | test accuracy | gain over random | gain over its start |",
        "| --- | --- | --- | --- | --- |",
    ]
    replicates = 0
    for ipc, size in saved["sizes"].items():
        table = size["tables"]["behaviour/accuracy"][0]
        for row in table["rows"]:
            label, accuracy, gain, start, *_ = row
            cells = [_estimate(accuracy)]
            cells += [_estimate(x, sign=True) if isinstance(x, dict) else "" for x in (gain, start)]
            lines.append(f"| {label} | {ipc} | {' | '.join(cells)} |")
            replicates = max(replicates, accuracy["n"])
    e = saved["environment"]
    took = "" if saved["seconds"] is None else f" in {saved['seconds'] / 60:.1f} min"
    lines.append("")
    lines.append(
        f"Means with 95 % intervals over n = {replicates} replicates (own distillation, subset and network keys); "
        f"`{saved['command']}`; {saved['trainings']:,} models{took} on {e['cores']} cores "
        f"({e['machine']}, torch {e['torch']}), commit {e['commit']}."
    )
    return "\n".join(lines)


def claims_table(name: str) -> str:
    """Every claim with its estimate and verdict."""
    saved = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [
        "| claim | set | images a class | estimate | n | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ipc, size in saved["sizes"].items():
        for claim in size["claims"]:
            e = claim["estimate"]
            cells = (
                claim["name"],
                claim["subject"],
                ipc,
                _estimate(e, sign=True),
                str(e["n"]),
                claim["verdict"],
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paper_table(name: str) -> str:
    """The paper's findings beside a study's, set by set."""
    saved = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [
        "| finding | set | paper | ours | n | deviation | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in saved["paper"]:
        published, e = row["published"], row["estimate"]
        cells = (
            row["name"],
            row["subject"],
            published if isinstance(published, str) else f"{published:+.3f}",
            "" if e is None else _estimate(e, sign=True),
            "" if e is None else str(e["n"]),
            "" if row["deviation"] is None else f"{row['deviation']:+.3f}",
            row["verdict"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", _made_by(saved)]
    if saved["scaled"]:
        lines += ["", "Smaller than published: " + "; ".join(f"`{one}`" for one in saved["scaled"]) + "."]
    return "\n".join(lines)


def trust_table(name: str) -> str:
    """For every set its estimators against both truths, with ceilings and cost; then what the study was."""
    saved = json.loads((RESULTS / f"{name}.json").read_text())
    lines: list[str] = []
    for size in saved["sizes"].values():
        for table in size["tables"]["pointwise/estimators"]:
            if not lines:
                columns = ["set", *table["columns"]]
                lines += [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
            subject = table["title"].partition(":")[0]
            lines += [f"| {' | '.join([subject, *map(_cell, row)])} |" for row in table["rows"]]
    return "\n".join([*lines, "", _made_by(saved)])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return _estimate(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _made_by(saved: dict[str, Any]) -> str:
    e = saved["environment"]
    took = "" if saved["seconds"] is None else f" in {saved['seconds'] / 60:.1f} min"
    return (
        f"`{saved['command']}`; {saved['trainings']:,} models{took} on {e['cores']} cores ({e['machine']}, torch {e['torch']}), "
        f"commit {e['commit']}."
    )


def cost_table() -> str:
    """What each analysis costs on digits."""
    rows = json.loads((RESULTS / "analyses.json").read_text())["rows"]
    lines = ["| analysis | models trained | s |", "| --- | --- | --- |"]
    lines += [f"| {row['name']} | {row['models']} | {row['seconds'] + row['saving']:.1f} |" for row in rows]
    e = rows[0]["environment"]
    commits = ", ".join(sorted({row["environment"]["commit"] for row in rows}))
    lines += [
        "",
        f"`python -m benchmarks.analyses`, one run, figures included; {e['cores']} cores ({e['machine']}, torch {e['torch']}), "
        f"commit {commits}; rows of different commits may be of different machines.",
    ]
    return "\n".join(lines)


def curvature_table() -> str:
    """Estimators at equal products, then the paper's curve and one moment of large data."""
    saved = json.loads((RESULTS / "curvature.json").read_text())
    anchor, curve, moment = saved["anchor"], saved["curve"], saved["moment"]
    lines = ["| estimator | products | root mean square error | median error |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {row['products']:.0f} | {row['rmse']:.1%} | {row['median']:.1%} |"
        for name, row in anchor["estimators"].items()
    ]
    e = anchor["environment"]
    lines += [
        "",
        f"On the exact Hessian of a ConvNet of {anchor['parameters']:,} parameters trained on 512 digits to {anchor['accuracy']:.1%} "
        f"(trace {anchor['trace']:.2f}, largest eigenvalues {', '.join(f'{x:.2f}' for x in anchor['largest'])}), "
        f"n = {anchor['repeats']} repetitions.",
        "",
        f"The curve of the paper on digits, {curve['moments']} moments of one training, real data and four sets of 100 images: "
        + ", ".join(
            f"{ours:,} example-products at a stated standard error of {error:.0%} ({curve['published'] / ours:.0f} times fewer)"
            for error, ours in zip(curve["errors"], curve["ours"], strict=True)
        )
        + f" in place of {curve['published']:,} by the published estimator.",
        "",
        "| update | data | reference | "
        + " | ".join(f"off by, at {error:.0%}" for error in curve["errors"])
        + " | our errors | error of the published 35 probes |",
        "| --- | --- | --- | " + "--- | " * len(curve["errors"]) + "--- | --- |",
    ]
    for row in curve["rows"]:
        label = "real" if row["set"] == "real" else "a set"
        lines.append(
            f"| {row['update']} | {label} | {row['reference']:.0f} +- {row['reference_error']:.1%} | "
            + " | ".join(f"{off:+.1%}" for off in row["ours"])
            + f" | {', '.join(f'{error:.1%}' for error in row['our_error'])} | {row['published_error']:.1%} |"
        )
    for row in curve["few"]:
        errors = ", ".join(f"{name} {error:.1%}" for name, error in row["errors"].items())
        lines += [
            "",
            f"At update {row['update']} on a set, of 12 products: {errors} (standard deviation of 20, of the trace). A probe spreads by "
            f"{row['spread']:.1%} of the trace, by {row['spread_beside_gauss_newton']:.1%} once the Gauss-Newton matrix, "
            f"{row['gauss_newton_share']:.0%} of the trace, is taken off.",
        ]
    lines += [
        "",
        f"Where there are {moment['training_images']:,} training images ({moment['net']} after {moment['updates']} updates): the published "
        f"error, {moment['published_error']:.1%} of the trace, takes {moment['products']:,} example-products in place of "
        f"{moment['published_products']:,} ({moment['published_products'] / moment['products']:.0f} times fewer). A probe spreads by "
        f"{moment['spread_of_probes']:.1%} on 2,000 images and by {moment['spread_of_probes_with_images']:.1%} on "
        f"{moment['images_a_probe']} of its own; means of twelve spread by {moment['spread_of_twelve']:.1%} "
        f"({moment['expected_of_twelve']:.1%} expected).",
        "",
        f"`python -m benchmarks.curvature`; {e['cores']} cores ({e['machine']}, torch {e['torch']}), commit "
        + ", ".join(dict.fromkeys(part["environment"]["commit"] for part in (anchor, curve, moment)))
        + ".",
    ]
    return "\n".join(lines)


def tesla_table() -> str:
    """TESLA's gradient against the exact one, by number of inner steps."""
    saved = json.loads((RESULTS / "tesla.json").read_text())
    lines = [
        "| data | images a class | inner steps | cosine | length, TESLA / exact | step size's gradient, TESLA / exact |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in saved["rows"]:
        name = f"{row['data']}, ConvNet width {row['width']}, rate {row['lr']:g}"
        figures = [_estimate(row[key], 2 if key == "rate" else 3) for key in ("cosine", "length", "rate")]
        lines.append(f"| {name} | {row['ipc']} | {row['steps']} | {' | '.join(figures)} |")
    n = saved["rows"][0]["cosine"]["n"]
    lines += ["", f"Means with 95 % intervals over n = {n} experts; commit {saved['environment']['commit']}."]
    return "\n".join(lines)


def curve_table(name: str) -> str:
    """Accuracy along distillations, with what stands beside each."""
    saved = json.loads((RESULTS / f"curve-{name}.json").read_text())
    lines = [
        "| method | step | test accuracy | loss | random subset | full data |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    for one in saved["curves"]:
        for point in one["points"]:
            loss = "" if point["loss"] is None else f"{point['loss']:.3f}"
            cells = (
                one["method"],
                str(point["step"]),
                _estimate(point["accuracy"]),
                loss,
                f"{one['random_subset']['value']:.3f}",
                f"{one['full']['value']:.3f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        width, depth = one["net"]["width"], one["net"]["depth"]
        notes.append(
            f"{one['method']}: {one['ipc']} images a class, ConvNet D{depth} **W{width}**, protocol {one['protocol']}, "
            f"{' '.join(f'`{s}`' for s in one['changed'])}; n = {one['points'][0]['accuracy']['n']} networks of one set: "
            "intervals cover training only; "
            f"{one['environment']['device']}, commit {one['environment']['commit']}."
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def speed_table() -> str:
    """Each work's time beside the plain way's, and its share of the machine's peak."""
    saved = json.loads((RESULTS / "engine.json").read_text())
    lines = [
        "| work | precision | plain, s | ours, s | ratio | share of peak, plain and ours | memory, plain and ours, GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in saved["rows"]:
        unit = f"{row['unit']} ({row['mode']})" if row["mode"] else row["unit"]
        share, memory = row["share_of_peak"], row.get("peak_mb")
        taken = "" if memory is None else f"{memory['reference'] / 1e3:.1f} and {memory['ours'] / 1e3:.1f}"
        cells = (
            unit,
            row["setting"],
            f"{row['reference_s']:.3g}",
            f"{row['ours_s']:.3g}",
            # Quartiles of one round would look like a figure without error.
            _estimate(row["ratio"], 2) if row["n"] > 1 else f"{row['ratio']['value']:.2f}, one round",
            f"{share['reference']:.0%} and {share['ours']:.0%}",
            taken,
        )
        lines.append(f"| {' | '.join(cells)} |")
    rounds = sorted({row["n"] for row in saved["rows"]})
    rates = [row["peak_gflops"] for row in saved["rows"]]
    counts = " or ".join(map(str, rounds))
    commits = ", ".join(sorted({row["commit"] for row in saved["rows"]}))
    e = saved["environment"]
    lines += [
        "",
        f"Medians with quartiles of the ratio over n = {counts} round{'' if rounds == [1] else 's'}; peak "
        f"{min(rates):.0f} to {max(rates):.0f} GFLOP/s; {e['cores']} cores ({e['machine']}, torch {e['torch']}), "
        f"commit {commits}.",
    ]
    return "\n".join(lines)


def adjoint_table() -> str:
    """Time and memory of the exact adjoint by number of inner steps, and its agreement with the full graph."""
    saved = json.loads((RESULTS / "engine.json").read_text())
    lines = ["| inner steps | s | memory, GB | n |", "| --- | --- | --- | --- |"]
    for row in saved["adjoint"]:
        memory = [f"{row[name] / 1e3:.2f}" for name in ("peak_mb", "lowest_mb", "highest_mb")]
        lines.append(
            f"| {row['steps']} | {row['seconds']:.3g} | {memory[0]} [{memory[1]}, {memory[2]}] | {row['n']} |"
        )
    same = saved["agreement"]
    lines += [
        "",
        f"Medians over n processes; of memory the least and the most too. Over {same['steps']} inner steps from the same start the gradient in the images has a "
        f"cosine with that of the plain way's full graph that differs from 1 by {abs(1 - same['cosine']):.0e}, and "
        f"{same['length']:.6f} times its length.",
    ]
    return "\n".join(lines)


def scaling_table() -> str:
    """The slope of log time on log size, by what grows."""
    saved = json.loads((RESULTS / "scaling.json").read_text())
    lines = [
        "| what grows | sizes | shortest and longest, s | slope over the upper half | no worse than linear |",
        "| --- | --- | --- | --- | --- |",
    ]
    for law in saved["laws"]:
        seconds = law["seconds"]
        cells = (
            law["about"],
            f"{law['sizes'][0]} to {law['sizes'][-1]}",
            f"{seconds[0]:.3g} and {seconds[-1]:.3g}",
            _estimate(law["slope"], 2),
            {True: "yes", False: "no", None: "not settled"}[law["linear"]],
        )
        lines.append(f"| {' | '.join(cells)} |")
    n = saved["laws"][0]["n"]
    e = saved["environment"]
    lines += [
        "",
        f"Slopes with 95 % intervals, n = {n} times a size; {e['cores']} cores ({e['machine']}, torch {e['torch']}), "
        f"commit {e['commit']}.",
    ]
    return "\n".join(lines)


def precision_table() -> str:
    """Validation accuracy in bfloat16 less that in float32, by what is in bfloat16."""
    saved = json.loads((RESULTS / "precision.json").read_text())
    lines = [
        "| in bfloat16 | data | settings | float32 | bfloat16 | difference, 90 % interval | n pairs | same |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in saved["rows"]:
        means = (f"{sum(row[kind]) / len(row[kind]):.4f}" for kind in ("float32", "bfloat16"))
        same = {True: "yes", False: "no", None: "not settled"}[row["same"]]
        about = "training" if row["question"] == "training" else f"what {row['question']} follows"
        if row["environment"].get("multiplies") == "float32":
            about += " *"
        difference = _estimate(row["difference"], 4, sign=True)
        settings = " ".join(f"`{one}`" for one in row["settings"])
        cells = (about, row["data"], settings, *means, difference, str(len(row["float32"])), same)
        lines.append(f"| {' | '.join(cells)} |")
    e = saved["rows"][-1]["environment"]
    commits = ", ".join(sorted({row["environment"]["commit"] for row in saved["rows"]}))
    lines += [
        "",
        f"Margin {saved['margin']}, fixed beforehand; torch {e['torch']}, commit {commits}. A star: on a processor that does not "
        "multiply bfloat16, where what is rounded is multiplied in float32: the same but for the order of sums.",
    ]
    return "\n".join(lines)


def whitening_table() -> str:
    """What a whitened space costs by image size, and a forecast for 64 px."""
    rows = json.loads((RESULTS / "whitening.json").read_text())["rows"]
    largest = rows[-1]
    d, n = 3 * 64 * 64, 100_000  # Tiny ImageNet
    far = d / largest["d"]
    eigenvectors = largest["eigenvectors"] * far**3
    sums = (largest["fit"] - largest["eigenvectors"]) * far**2 * n / largest["images"]
    forecast = {
        "shape": [3, 64, 64],
        "d": d,
        "images": n,
        "fit": eigenvectors + sums,
        "eigenvectors": eigenvectors,
        "map": largest["map"] * far**2,
        "inverse": largest["inverse"] * far**3,
        "fit_bytes": largest["fit_bytes"] * far**2,
        "set_bytes": largest["set_bytes"] * far**2,
    }

    def size(count: float) -> str:
        return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.2g} MB"

    def time(seconds: float) -> str:
        return f"{seconds / 60:.0f} min" if seconds >= 180 else f"{seconds:.2g} s"

    lines = [
        "| images | numbers in one | training images | fit | of it eigenvectors | memory of a fit | mapping 10,000 | "
        "inverse | bytes in a set |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in [*rows, forecast]:
        name = " x ".join(map(str, one["shape"])) + (", forecast" if one is forecast else "")
        times = [time(one[key]) for key in ("fit", "eigenvectors")]
        rest = [size(one["fit_bytes"]), time(one["map"]), time(one["inverse"]), size(one["set_bytes"])]
        lines.append(
            f"| {name} | {one['d']:,} | {one['images']:,} | {' | '.join(times)} | {' | '.join(rest)} |"
        )
    e = largest["environment"]
    lines += [
        "",
        "`python -m benchmarks.whitening`, one thread, one run; the forecast by d^3 (eigenvectors, inverse) and n d^2; "
        f"{e['machine']}, torch {e['torch']}, commit {e['commit']}.",
    ]
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "engine speed": speed_table,
    "engine adjoint": adjoint_table,
    "engine scaling": scaling_table,
    "engine precision": precision_table,
    "whitening": whitening_table,
    "tesla": tesla_table,
    "curvature": curvature_table,
    "representativeness digits": lambda: claims_table("representativeness"),
    "representativeness cifar10": lambda: claims_table("representativeness_cifar10"),
    "pointwise trust": lambda: trust_table("pointwise"),
    "pointwise claims": lambda: claims_table("pointwise"),
    "pointwise cifar10": lambda: claims_table("pointwise_cifar10"),
    "analyses cost": cost_table,
    "paper digits": lambda: paper_table("paper"),
    "paper cifar10": lambda: paper_table("paper_cifar10"),
    "trajectories accuracy": lambda: accuracy_table("trajectories"),
    "matching accuracy": lambda: accuracy_table("matching"),
    "coresets accuracy": lambda: accuracy_table("coresets"),
    "cifar10 curves": lambda: curve_table("cifar10"),
    "digits accuracy": lambda: accuracy_table("digits"),
    "digits claims": lambda: claims_table("digits"),
    "cifar10 accuracy": lambda: accuracy_table("cifar10"),
    "cifar10 claims": lambda: claims_table("cifar10"),
}


def rendered(text: str) -> str:
    """The text with every block written anew."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text):
            block = make()
            text = pattern.sub(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text)
    return text


def pages() -> list[Path]:
    """Every page that may hold figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


if __name__ == "__main__":
    for page in pages():
        page.write_text(rendered(page.read_text()))

"""A run folder as a study leaves it, written by hand: the report must need none of our code to read one."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

METHODS = {
    "dm": ("Zhao & Bilen 2023", "distribution"),
    "mtt": ("Cazenavette et al. 2022", "trajectory"),
    "random_subset": ("", "coreset"),
}
ANALYSES = {
    "behaviour/mixing": ("Mixing with real data", "Does accuracy fall when real images are added?"),
    "behaviour/accuracy": ("Accuracy", "How accurate is a network trained on the distilled images?"),
}


def png(width: int = 4, height: int = 6, shade: int = 90) -> bytes:
    """A grey PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes([shade] * width)) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value) if isinstance(value, bytes) else path.write_text(json.dumps(value))


def estimate(value: float, half: float | None, n: int = 5, unit: str = "replicate") -> dict[str, Any]:
    ends = ("-inf", "inf") if half is None else (value - half, value + half)
    return {"value": value, "low": ends[0], "high": ends[1], "n": n, "unit": unit, "level": 0.95}


def claim(subject: str, value: float, half: float | None, verdict: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": "falls_when_mixed",
        "subject": subject,
        "statement": f"Real images added to {subject} lower accuracy.",
        "direction": "less",
        "smallest_effect": 0.02,
        "null": "real images added to a random subset",
        "plant": "images with permuted labels",
        "source": "Yang et al. 2024, figure 3",
        "estimate": estimate(value, half, 1 if half is None else 5),
        "verdict": verdict,
        **changes,
    }


def result(analysis: str, ipc: int | None, claims: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    title, question = ANALYSES[analysis]
    return {
        "analysis": analysis,
        "title": title,
        "question": question,
        "context": {} if ipc is None else {"ipc": ipc, "data": "digits"},
        "headline": [
            {"name": "dm", **estimate(0.883, 0.022)},
            {"name": "full data", **estimate(0.975, None, 1)},
        ],
        "claims": claims,
        "tables": [
            {
                "title": f"All of {title}",
                "columns": ["set", "models", "figure"],
                "rows": [["dm", 20, estimate(0.4567, 0.01)], ["mtt", 21, estimate(0.5678, 0.01)]],
            }
        ],
        "notes": [f"A note on {title}."],
        "figures": [{"file": f"figures/{analysis.replace('/', '.')}.png", "caption": f"Figure of {title}"}],
        "result": {},
        **changes,
    }


def make_run(folder: Path, ipcs: tuple[int, ...] = (1, 10), replicates: int = 2) -> Path:
    """A whole run folder: three methods, two analyses, six findings a size."""
    sets = []
    for ipc in ipcs:
        for name, (paper, family) in METHODS.items():
            for replicate in range(replicates):
                place = f"sets/ipc{ipc}/{name}/{replicate}"
                provenance = {"method": name, "ipc": ipc, "key": [0, name, replicate], "data": "digits"}
                write(folder / place / "provenance.json", {**provenance, "settings": {"steps": 500}})
                write(folder / place / "preview.png", png(4 + ipc))
                if family != "coreset":
                    write(folder / place / "initial" / "provenance.json", provenance)
                    write(folder / place / "initial" / "preview.png", png(4 + ipc, shade=200))
                entry = {"name": name, "ipc": ipc, "replicate": replicate, "folder": place, "paper": paper}
                command = f"distillens distill {name} --data digits --ipc {ipc} --seed {replicate}"
                sets.append({**entry, "family": family, "command": command, "storage": {"floats": 640 * ipc}})
        above = {"name": "above_random", "direction": "greater", "smallest_effect": 0.05}
        results = {
            "behaviour/accuracy": [
                claim("dm", 0.123, 0.03, "supported", **above, statement="dm beats random."),
                claim("mtt", 0.051, 0.03, "inconclusive", **above, statement="mtt beats random."),
                claim(
                    "random_subset", 0.001, 0.03, "not supported", **above, statement="random beats random."
                ),
            ],
            "behaviour/mixing": [
                claim("dm", -0.087, 0.011, "supported"),
                claim("mtt", -0.0456, None, "inconclusive"),
                claim("random_subset", 0.037, 0.011, "not supported"),
            ],
        }
        for analysis, claims in results.items():
            stem = analysis.replace("/", ".")
            write(folder / f"results/ipc{ipc}/{stem}.json", result(analysis, ipc, claims))
            write(folder / f"results/ipc{ipc}/figures/{stem}.png", png(40, 20))
    study = {
        "title": "digits",
        "command": "distillens study --data digits --to runs/digits",
        "data": {
            "source": "digits",
            "classes": [f"class {c}" for c in range(10)],
            "train": 1078,
            "val": 270,
            "test": 449,
            "shape": [1, 8, 8],
            "fingerprint": "9f2c41d7",
        },
        "preset": "quick",
        "versions": {"distillens": "0.1.0", "python": "3.11", "torch": "2.6"},
        "seed": 0,
        "plan": {"layout": "stacked"},
        "trainings": 1234,
        "seconds": 321.0,
        "sets": sets,
    }
    write(folder / "study.json", study)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run folder."""
    return make_run(tmp_path / "runs" / "digits")


@pytest.fixture
def change() -> Callable[..., None]:
    """Changes keys at the top of a JSON file."""

    def apply(path: Path, **changes: Any) -> None:
        write(path, {**json.loads(path.read_text()), **changes})

    return apply

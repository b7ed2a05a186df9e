"""What a committed figure was measured on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from distillens import pipeline
from distillens.engine.plan import cores


def environment() -> dict[str, Any]:
    """Versions, machine and commit of a benchmark."""
    root = Path(__file__).parents[1]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        **pipeline.versions(),
        "machine": platform.machine(),
        "cores": cores(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "commit": commit,
    }

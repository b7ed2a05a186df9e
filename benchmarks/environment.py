"""What a committed figure was measured on, and the memory of a process."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from distillens import making
from distillens.engine.plan import cores


def environment() -> dict[str, Any]:
    """Versions, machine and commit of a benchmark."""
    root = Path(__file__).parents[1]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        **making.versions(),
        "machine": platform.machine(),
        "cores": cores(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "commit": commit,
    }


def memory(which: str) -> int:
    """Bytes that this process has now (``VmRSS``), or had at most since the last ``forget`` (``VmHWM``); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])


def forget() -> None:
    """Give free memory back, and let the largest so far be the present one: getting ready may have taken more."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

"""What the tests of whole commands look at: the folder that is left, the processes that are gone."""

from __future__ import annotations

import os
import time
from pathlib import Path


def settled(folder: Path) -> dict[str, bytes]:
    """All that a study ends in, but for the time that it took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timing.json"
    }


def gone(group: int, seconds: float = 60) -> bool:
    """Whether every process of a group ends in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)
    return False

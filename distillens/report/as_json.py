"""The summary for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from distillens.report.summary import Picture, Summary


def to_json(summary: Summary) -> str:
    """The whole summary as JSON with sorted keys; pictures by file name, infinite numbers as text."""
    value = {**_plain(summary), "verdicts": summary.verdicts}
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Picture):
        return {"file": value.file, "width": value.width, "height": value.height}
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value

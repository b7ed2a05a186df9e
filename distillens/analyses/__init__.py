"""Questions about distilled data. The folder is the question, the file is the analysis."""

from __future__ import annotations

from typing import Any

from distillens.core.contracts import Analysis
from distillens.core.registry import Room

room: Room[type[Analysis[Any]]] = Room("distillens.analyses", "analysis")

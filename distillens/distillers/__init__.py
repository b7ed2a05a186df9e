"""Distillation methods. A method is a file here; its class has the file's name."""

from __future__ import annotations

from distillens.core.contracts import Distiller
from distillens.core.registry import Room

room: Room[type[Distiller]] = Room("distillens.distillers", "method")

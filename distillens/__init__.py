"""Distils image datasets and shows what the distilled data has learned.

Names are looked up on first use, so that ``import distillens`` costs nothing and
changes nothing in the host program.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distillens.core.artefact import DistilledDataset as DistilledDataset
    from distillens.core.dataset import Dataset as Dataset
    from distillens.core.dataset import Splits as Splits
    from distillens.core.recipe import Recipe as Recipe
    from distillens.core.result import Claim as Claim
    from distillens.core.result import Estimate as Estimate
    from distillens.core.rng import Key as Key
    from distillens.data import load as load
    from distillens.pipeline import ask as ask
    from distillens.pipeline import distill as distill
    from distillens.pipeline import evaluate as evaluate
    from distillens.pipeline import write_report as write_report
    from distillens.studies import study as study

_HOMES = {
    "Claim": "core.result",
    "Dataset": "core.dataset",
    "DistilledDataset": "core.artefact",
    "Estimate": "core.result",
    "Key": "core.rng",
    "Recipe": "core.recipe",
    "Splits": "core.dataset",
    "load": "data",
    "ask": "pipeline",
    "distill": "pipeline",
    "evaluate": "pipeline",
    "study": "studies",
    "write_report": "pipeline",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distillens' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"distillens.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

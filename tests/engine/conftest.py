from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillens.engine.workers import pinned_threads


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes, and far more when cores are shared."""
    with pinned_threads(1):
        yield


@pytest.fixture(autouse=True, scope="module")
def jobs_can_be_imported() -> Iterator[None]:
    """Workers find the jobs in these files by their names, from the project's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])
        # Importing torch once, before the workers part, spares each of them two seconds.
        multiprocessing.get_context("forkserver").set_forkserver_preload(["distillens.train"])
        yield

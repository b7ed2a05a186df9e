from __future__ import annotations

from collections.abc import Iterator

import pytest

from distillens.engine.workers import pinned_threads


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes, and far more when cores are shared."""
    with pinned_threads(1):
        yield

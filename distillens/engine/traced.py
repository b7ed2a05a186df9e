"""Functions as graphs: traced once a shape by ``torch.compile``, and replayed on a GPU without being told each operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch

BACKEND: Any = "inductor"  # what makes programs of graphs
GRAPHS = (
    1 << 20
)  # as many as are asked for: the compiler's own bound would let what comes late go untraced, in other last bits


@cache
def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its operations and those of its gradient one graph each (on a GPU: CUDA graphs).

    Each shape has a graph of its own. One graph for several would depend on which came first, and so would last bits. What a
    graph gives lies in memory of its own, which the next call writes over: it is copied, or used up before.
    """
    from torch._dynamo import config  # takes a second: whoever traces nothing need not wait for it

    mode = "reduce-overhead" if BACKEND == "inductor" else None  # the compiler's name for CUDA graphs
    graph = torch.compile(function, backend=BACKEND, dynamic=False, mode=mode)
    kind = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before 2.7
    unbounded = {kind: GRAPHS, f"accumulated_{kind}": GRAPHS}

    @wraps(function)
    def call(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # PyTorch has not typed it
        with config.patch(unbounded):
            return graph(*args)

    return call

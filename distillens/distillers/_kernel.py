"""What methods that solve a kernel regression share: labels, the solve, LAMB, the price in passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from distillens.core.contracts import Like, Net, State
from distillens.core.rng import Key
from distillens.distillers._pixels import check_finite
from distillens.unroll import Adam

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def centred(index: torch.Tensor, k: int) -> torch.Tensor:
    """Class indices [n] as regression targets [n, k], float64: 1 - 1/k for the own class, -1/k for the others."""
    return F.one_hot(index, k).double() - 1 / k


def ridged(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """K + ridge trace(K) / n I: a ridge relative to the mean of the diagonal."""
    n = len(gram)
    return gram + ridge * gram.trace() / n * torch.eye(n, dtype=gram.dtype, device=gram.device)


def dual(gram: torch.Tensor, labels: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weights [n, k] of ridge regression on labels [n, k]: predictions are (kernel to the n items) @ weights."""
    weights: torch.Tensor = torch.linalg.solve(ridged(gram, ridge), labels)
    return weights


def share_right(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """The share of rows whose largest entry stands where the target's does."""
    return float((outputs.argmax(-1) == targets.argmax(-1)).double().mean())


def lamb_moved(state: State, gradient: torch.Tensor, lr: float, i: int, name: str) -> State:
    """The state after step ``i`` of LAMB on the tensor ``name``, whose moments it keeps.

    Adam's direction, made as long as the tensor itself, times ``lr``: a step changes the tensor by the share ``lr`` of
    its length. A tensor or direction of zeros has no length to go by: the direction is taken as it is.

    Source: You et al. 2020, algorithm 2, without weight decay; epsilon 1e-6 as in optax.

    Raises:
        DivergedError: the gradient is not finite; the state before the step is kept.
    """
    check_finite(gradient, f"the gradient of the {name}", "lr")
    rule, one = Adam(epsilon=1e-6), gradient.new_ones(())
    moments = (f"{name}.first", f"{name}.second")
    now = state.tensors[name]
    # Adam's step at rate 1 from the origin is minus its direction.
    to, first, second = rule.step(
        (torch.zeros_like(now), *(state.tensors[m] for m in moments)), gradient, one, i
    )
    length, own = to.norm(), now.norm()
    ratio = torch.where((length > 0) & (own > 0), own / length, one)
    after = now + lr * ratio * to
    return State({**state.tensors, name: after, moments[0]: first, moments[1]: second}, state.values)


def flops_a_pass(net: Net, like: Like) -> float:
    """Floating-point operations of one image's forward pass: what the work of kernels is weighed against."""
    from torch.utils.flop_counter import FlopCounterMode

    params, buffers = net.init(like, Key(0))
    counter: FlopCounterMode = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net.logits(params, buffers, torch.zeros(1, *like.shape))
    return max(1.0, float(counter.get_total_flops()))

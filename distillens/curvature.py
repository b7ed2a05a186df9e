"""The curvature of the loss in the parameters: quadratic forms, products, traces, extreme eigenvalues, spectral density.

All in evaluation mode: what a network remembers between steps stays as it is. Work is counted in *example-products*: one
image's Hessian times one vector.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.func import jvp

from distillens.core.contracts import Buffers, Net
from distillens.core.dataset import Dataset
from distillens.core.vector import Shapes

TOGETHER = 1 << 18  # pixels that one pass takes: derivatives of both orders travel with every activation
PILOT = 6  # probes from which the number of probes is chosen


def quadratic_forms(
    net: Net,
    shapes: Shapes,
    flat: torch.Tensor,
    data: Dataset,
    probes: torch.Tensor,
    buffers: Buffers | None = None,
) -> torch.Tensor:
    """``v' H_i v`` [probes, n] of each image's own loss at the parameters ``flat`` [P], for each v of ``probes`` [q, P].

    Two directional derivatives, one in the other: all images at once, exact but for rounding. The mean over images and over
    probes with independent signs estimates the trace of the mean loss's Hessian.
    """
    pieces = _pieces(data)
    return torch.stack(
        [torch.cat([_form(net, shapes, flat, data, at, v, buffers) for at in pieces]) for v in probes]
    )


def _form(
    net: Net,
    shapes: Shapes,
    flat: torch.Tensor,
    data: Dataset,
    at: torch.Tensor,
    direction: torch.Tensor,
    buffers: Buffers | None,
) -> torch.Tensor:
    images, labels = data.images[at].to(flat), data.labels.take(at)

    def losses(parameters: torch.Tensor) -> torch.Tensor:
        return labels.loss(net.logits(shapes.unflatten(parameters), buffers or {}, images)[0])

    def slopes(parameters: torch.Tensor) -> torch.Tensor:
        return jvp(losses, (parameters,), (direction,))[1]  # type: ignore[no-any-return]

    with torch.no_grad(), warnings.catch_warnings():
        # Forward mode compiles its decompositions at its first use, with a call that torch itself has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        return jvp(slopes, (flat,), (direction,))[1]  # type: ignore[no-any-return]


def _pieces(data: Dataset) -> tuple[torch.Tensor, ...]:
    size = max(1, TOGETHER // data.images[0].numel())
    return torch.split(torch.arange(len(data), device=data.device), size)


class Curved:
    """The Hessian of the mean loss on some data at given parameters, as products with vectors.

    The gradient is taken once and its graph kept, a piece of the data at a time; a product is one pass back through it. For
    several vectors on the same images that is four times as fast as ``quadratic_forms``, and gives the product itself.
    """

    def __init__(
        self, net: Net, shapes: Shapes, flat: torch.Tensor, data: Dataset, buffers: Buffers | None = None
    ) -> None:
        self.images = len(data)
        self._leaf = flat.detach().requires_grad_()
        self._gradients = []
        for at in _pieces(data):
            logits, _ = net.logits(shapes.unflatten(self._leaf), buffers or {}, data.images[at].to(flat))
            loss = data.labels.take(at).loss(logits).sum() / len(data)
            self._gradients.append(torch.autograd.grad(loss, self._leaf, create_graph=True)[0])

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """The Hessian times a vector [P]."""
        total = torch.zeros_like(self._leaf)
        for gradient in self._gradients:
            total += torch.autograd.grad(gradient, self._leaf, vector.to(total), retain_graph=True)[0]
        return total

    def form(self, vector: torch.Tensor) -> float:
        """``v' H v``."""
        return float(self.product(vector) @ vector.to(self._leaf))


@dataclass(frozen=True)
class Trace:
    """An estimated trace, its standard error, how many probes it took and how many example-products."""

    value: float
    error: float
    probes: int
    products: int


def trace(form: Callable[[int], float], images: int, error: float, most: int) -> Trace:
    """A trace from independent measurements ``form(i)`` of it, each of which meets ``images`` images.

    As many as bring the standard error down to ``error`` times the trace, from ``PILOT`` to ``most``, chosen from the spread of
    the first ``PILOT`` (two stages, Stein 1945). The pilot counts in the mean too, which leans by less than a hundredth of the
    trace where the spread is lopsided. The published estimator (PyHessian 0.1) stops when its running mean has moved by less
    than a thousandth, which a lucky small change can end.
    """
    return _measured(form, images, lambda mean: error * abs(mean), PILOT, most)


def bridge(
    form: Callable[[int, int], float],
    moments: Sequence[int],
    first: Trace,
    last: Trace,
    images: int,
    error: float,
    most: int,
) -> list[Trace]:
    """Traces at the moments between two at which they are known, by measurements of what lies beside the straight line.

    ``form(i, t)`` is measurement i at moment t: the same probe and the same ``images`` images at all moments. Of a measurement
    only its distance from the line between its own ends is taken, which spreads less than the measurement itself (docs/representativeness.md),
    for the loss bends smoothly along training. ``moments`` holds the ends too. As many as bring what the bridge adds to the error
    down to half of ``error`` times the trace, from ``PILOT`` to ``most``.

    The errors of the two ends are taken to be the same in sign: those of common probes are nearly so.
    """
    start, end = moments[0], moments[-1]
    ends: dict[int, tuple[float, float]] = {}
    found: list[Trace] = []
    for t in moments[1:-1]:
        share = (end - t) / (end - start)
        line = share * first.value + (1 - share) * last.value
        before = len(ends)

        def beside(i: int, t: int = t, share: float = share) -> float:
            if i not in ends:
                ends[i] = form(i, start), form(i, end)
            return form(i, t) - share * ends[i][0] - (1 - share) * ends[i][1]

        def wanted(mean: float, line: float = line) -> float:
            return error * abs(line + mean) / 2

        own = _measured(beside, images, wanted, PILOT, most)
        both = share * first.error + (1 - share) * last.error
        # Each measurement's ends are met once for all moments between them.
        products = own.products + 2 * (len(ends) - before) * images
        found.append(Trace(line + own.value, math.hypot(both, own.error), own.probes, products))
    return found


def _measured(
    form: Callable[[int], float], images: int, wanted: Callable[[float], float], least: int, most: int
) -> Trace:
    """The mean of measurements, as many as bring its error down to what is wanted of such a mean."""
    values = [form(i) for i in range(least)]
    mean, spread = _moments(values)
    goal = wanted(mean)
    # A goal of nothing cannot be reached: the trace is about nothing itself.
    count = math.ceil(min(most, (spread / goal) ** 2)) if goal else most if spread else least
    values += [form(i) for i in range(least, min(max(count, least), most))]
    mean, spread = _moments(values)
    return Trace(mean, spread / math.sqrt(len(values)), len(values), len(values) * images)


def _moments(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def largest_eigenvalues(curved: Curved, count: int, start: torch.Tensor) -> torch.Tensor:
    """The algebraically largest eigenvalues, descending, to four digits; ``start`` [P] is a random vector of the caller's.

    Source: the implicitly restarted Lanczos method (ARPACK, through scipy).
    """
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    def product(vector: np.ndarray) -> np.ndarray:
        on = torch.from_numpy(np.ascontiguousarray(vector).reshape(-1)).to(start)
        found: np.ndarray = curved.product(on).double().cpu().numpy()
        return found

    size = len(start)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    values = eigsh(
        operator, count, which="LA", tol=1e-4, v0=start.double().cpu().numpy(), return_eigenvectors=False
    )
    return torch.from_numpy(np.sort(values)[::-1].copy())


def lanczos(curved: Curved, start: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights [steps'] of a quadrature of the spectrum as the vector ``start`` sees it.

    Fully reorthogonalised, for without it the largest eigenvalue comes back again and again; fewer than ``steps`` where the
    space is exhausted. Averaged over random starts the weights are the spectral density.

    Source: Golub and Meurant 2009; Ghorbani et al. 2019 for networks.
    """
    basis = [start.double() / start.double().norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(min(steps, len(start))):
        image = curved.product(basis[-1].to(start)).double()
        diagonal.append(float(image @ basis[-1]))
        for _ in range(2):  # once is not enough where vectors are nearly parallel
            stacked = torch.stack(basis)
            image = image - stacked.T @ (stacked @ image)
        length = float(image.norm())
        if length < 1e-8 * max(1.0, abs(diagonal[0])) or step == steps - 1:
            break
        beside.append(length)
        basis.append(image / length)
    off = beside[: len(diagonal) - 1]
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off:
        matrix = matrix + torch.diag(torch.tensor(off, dtype=torch.float64), 1)
        matrix = matrix + torch.diag(torch.tensor(off, dtype=torch.float64), -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes, vectors[0].square()


def signs(uniform: torch.Tensor) -> torch.Tensor:
    """Rademacher vectors from numbers that are uniform in [0, 1)."""
    return torch.where(uniform < 0.5, -1.0, 1.0)

"""The curvature of the loss in the parameters: quadratic forms, products, traces, extreme eigenvalues, spectral density.

All in evaluation mode: what a network remembers between steps stays as it is. Work is counted in *example-products*: one
image's Hessian times one vector.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.func import jvp

from distillens.core.contracts import Buffers, Net
from distillens.core.dataset import Dataset
from distillens.core.vector import Shapes

TOGETHER = 1 << 18  # pixels that one pass takes: derivatives of both orders travel with every activation
FIRST = 4  # measurements of each moment before their number is chosen
GROWTH = 2  # times as many measurements at most, from one choice to the next
REACH = 8.0  # updates over which a trace bends: about what momentum of 0.9 remembers
NEAR = 9  # moments whose measurements together tell the noise of the one in their middle


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
    """An estimated trace, its standard error, how many measurements it took and how many example-products."""

    value: float
    error: float
    measurements: int
    products: int


def curve(
    measure: Callable[[int, int], float], moments: Sequence[int], images: int, error: float, most: int
) -> list[Trace]:
    """The trace along training, from independent measurements ``measure(i, t)`` of it, each of which meets ``images`` images.

    A measurement alone is rough, but the trace bends smoothly along training, so neighbours help each other: all are joined by a
    Gaussian process (``joined``). From ``FIRST`` measurements a moment on, moments whose standard error is above ``error`` times
    the trace get more, up to ``most``, until none is. Measurements have a long upper tail, so a low mean comes with a small spread and counts for
    more: along digits' training the curve leans by about -2 % (docs/representativeness.md). The published estimator (PyHessian 0.1) measures each moment anew, and
    stops when its running mean has moved by less than a thousandth, which a lucky small change can end.
    """
    values = [[measure(i, t) for i in range(FIRST)] for t in moments]
    while True:
        mean, spread = joined(moments, values)
        wanted = [
            min(most, max(len(own) + 1, math.ceil(len(own) * min(GROWTH, (sd / (error * abs(m))) ** 2))))
            if m and sd > error * abs(m)
            else len(own)
            for own, m, sd in zip(values, mean, spread, strict=True)
        ]
        if all(len(own) >= count for own, count in zip(values, wanted, strict=True)):
            break
        for t, own, count in zip(moments, values, wanted, strict=True):
            own += [measure(i, t) for i in range(len(own), count)]
    return [
        Trace(m, sd, len(own), len(own) * images) for own, m, sd in zip(values, mean, spread, strict=True)
    ]


def joined(moments: Sequence[int], values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """The curve at each moment and its standard error, by a Gaussian process through measurements ``values`` of it (two or more each).

    Its kernel is Matern's of smoothness 5/2 over the updates, ``REACH`` long and as high as maximum likelihood says. A longer reach, which the
    likelihood would often choose, takes the small waves that momentum makes for noise: stated errors would be too small. The noise
    of a moment's mean is that of its own measurements and of those of the ``NEAR`` nearest moments, which count as ``FIRST`` more.

    Source: Rasmussen and Williams 2006, chapters 2 and 5.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    means = np.array([math.fsum(own) / len(own) for own in values])
    squares = np.array([math.fsum((v - m) ** 2 for v in own) for own, m in zip(values, means, strict=True)])
    counts = np.array([len(own) for own in values])
    places = np.arange(len(values))
    starts = (places - NEAR // 2).clip(0, max(0, len(values) - NEAR))
    near = (places >= starts[:, None]) & (places < starts[:, None] + NEAR)
    pooled = (near @ squares) / (near @ (counts - 1))
    noise = (squares + FIRST * pooled) / (counts - 1 + FIRST) / counts
    scale = float(np.abs(means).max()) or 1.0
    # A kernel matrix of close moments is all but singular: a millionth of the scale stands for rounding.
    process = GaussianProcessRegressor(
        ConstantKernel(1.0, (1e-2, 1e2)) * Matern(REACH, "fixed", nu=2.5), alpha=noise / scale**2 + 1e-12
    )
    at = np.array(moments, dtype=float)[:, None]
    with warnings.catch_warnings():
        # Where measurements leave the height open, it stops at a bound: so it should.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mean, spread = process.fit(at, means / scale).predict(at, return_std=True)
    return (mean * scale).tolist(), (spread * scale).tolist()


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

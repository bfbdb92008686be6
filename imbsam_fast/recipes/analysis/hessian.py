"""The Hessian of a loss: largest eigenvalue, trace and spectral density, without forming it.

Everything here needs products of the Hessian with vectors only, which automatic differentiation
gives exactly for about the price of two more backward passes (Pearlmutter, "Fast exact
multiplication by the Hessian", 1994). The estimators are those of PyHessian (Yao et al., 2020),
which the paper uses for its Fig. 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .modes import check_batch_norm, looked_at

Products = Callable[[Tensor], Tensor]  # vectors (m, n) -> the Hessian times each of them (m, n)
LossSum = Callable[[Any, Tensor], Tensor]  # outputs, targets -> sum of the rows' losses ()


class Tridiagonal(NamedTuple):
    """What k steps of Lanczos leave: T = Q^T H Q, float64, and what Q does not reach.

    H Q = Q T + residual * q e_k^T, where q is a unit vector. A residual of 0 means that Q spans
    an invariant subspace, in which T is exact.
    """

    diagonal: Tensor  # (k,)
    off_diagonal: Tensor  # (k - 1,)
    residual: float

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Ritz values (k,), ascending, and the eigenvectors of T in columns (k, k)."""
        off = torch.diag(self.off_diagonal, 1)
        return torch.linalg.eigh(torch.diag(self.diagonal) + off + off.T)


class Eigenvalue(NamedTuple):
    """An eigenvalue of H lies within `error` of `value`."""

    value: float
    error: float
    steps: int


class Trace(NamedTuple):
    """The trace and its standard error, not-a-number for a single probe."""

    value: float
    error: float
    probes: int


class Spectrum(NamedTuple):
    """Quadrature nodes and weights, one list a probe; the weights of a probe add up to 1."""

    values: list[list[float]]
    weights: list[list[float]]


class Hessian:
    """The Hessian of the mean loss over the rows of `batches`, in the model's trainable weights.

    Args:
        model: any module whose operations can be differentiated twice.
        loss_sum: (outputs, targets) -> the sum of the rows' losses, ().
        batches: inputs and targets (N,), on the model's device or not.
        batch_norm: "running" takes the loss of the model in eval mode, "batch" lets BatchNorm
            normalise by each batch (`looked_at`).

    The mode of the model is left as it was.

    Raises ValueError for another `batch_norm`, where there is no row or no trainable weight.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_sum: LossSum,
        batches: Sequence[tuple[Any, Tensor]],
        batch_norm: str = "running",
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.rows = sum(len(targets) for _, targets in batches)
        check_batch_norm(batch_norm)
        if not self.parameters:
            raise ValueError("model has no trainable parameter, expected at least one")
        if self.rows == 0:
            raise ValueError("batches hold no row, expected at least one")
        self.model = model
        self.loss_sum = loss_sum
        self.batches = batches
        self.batch_norm = batch_norm
        self.size = sum(p.numel() for p in self.parameters)

    def products(self, vectors: Tensor) -> Tensor:
        """H v for each row v of `vectors`, (m, n) -> (m, n); n is `size`.

        The graph of the gradient is made once for all vectors.
        """
        products = torch.zeros_like(vectors)
        with looked_at(self.model, self.batch_norm), _twice_differentiable():
            for inputs, targets in self.batches:
                gradient = self._gradient(inputs, targets)
                last = len(vectors) - 1
                for i, vector in enumerate(vectors):
                    product = torch.autograd.grad(
                        gradient,
                        self.parameters,
                        vector,
                        retain_graph=i < last,
                        materialize_grads=True,
                    )
                    products[i] += _flat(product)
        return products

    def _gradient(self, inputs: Any, targets: Tensor) -> Tensor:
        """The batch's part of the gradient of the mean loss, (n,), with its graph."""
        device = self.parameters[0].device
        outputs = self.model(inputs.to(device))
        loss = self.loss_sum(outputs, targets.to(device)) / self.rows
        return _flat(
            torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
        )

    def random_signs(self, number: int, generator: torch.Generator) -> Tensor:
        """Rademacher vectors (number, n); the same on every device."""
        signs = torch.randint(0, 2, (number, self.size), generator=generator)
        like = self.parameters[0]
        return (2 * signs - 1).to(like.device, like.dtype)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Attention by the one implementation that has a second derivative; no TF32."""
    tf32_off = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), tf32_off:
        yield


# ---------------------------------------------------------------- estimators


def lanczos(
    products: Products,
    start: Tensor,
    steps: int,
    converged: Callable[[Tridiagonal], bool] = lambda tridiagonal: False,
    on_step: Callable[[], None] = lambda: None,
) -> Tridiagonal:
    """At most `steps` steps of Lanczos from `start` (n,), with full reorthogonalisation.

    Without it rounding makes copies of the outer eigenvalues ("ghosts"), which would be counted
    twice in a density. Takes `steps` * n numbers of memory. Ends early where `converged` says so
    or where the subspace is invariant. Golub and Van Loan, Matrix Computations, section 10.3.
    """
    steps = min(steps, len(start))
    basis = start.new_empty(steps, len(start))
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        known = basis[: len(diagonal) + 1]
        w = products(known[-1:])[0]
        diagonal.append(float(known[-1] @ w))
        for _ in range(2):  # "twice is enough": once leaves what cancellation brought back
            w = w - known.T @ (known @ w)
        residual = float(w.norm())
        on_step()
        scale = max(map(abs, diagonal + off_diagonal))
        if residual <= 10 * torch.finfo(start.dtype).eps * scale:
            residual = 0.0
        tridiagonal = Tridiagonal(_float64(diagonal), _float64(off_diagonal), residual)
        if residual == 0.0 or len(diagonal) == steps or converged(tridiagonal):
            return tridiagonal
        off_diagonal.append(residual)
        basis[len(diagonal)] = w / residual


def _float64(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def largest_eigenvalue(
    products: Products,
    start: Tensor,
    steps: int = 100,
    tolerance: float = 1e-3,
    on_step: Callable[[], None] = lambda: None,
) -> Eigenvalue:
    """The largest (not the largest absolute) eigenvalue, by Lanczos from a random `start` (n,).

    Ends where the error is at most `tolerance` times the value, or after `steps`. The error is
    the residual norm |H y - value y| of the Ritz vector y: some eigenvalue is that close
    (Parlett, The Symmetric Eigenvalue Problem, section 4.5). That it is the largest one is
    certain only in the limit: the value approaches it from below.
    """

    def top(tridiagonal: Tridiagonal) -> Eigenvalue:
        values, vectors = tridiagonal.eigen()
        error = tridiagonal.residual * abs(float(vectors[-1, -1]))
        return Eigenvalue(float(values[-1]), error, len(values))

    def converged(tridiagonal: Tridiagonal) -> bool:
        value, error, _ = top(tridiagonal)
        return error <= tolerance * abs(value)

    return top(lanczos(products, start, steps, converged, on_step))


def hutchinson_trace(quadratic_forms: Sequence[float]) -> Trace:
    """The trace of H from v^T H v for random vectors v of signs (Hutchinson, 1990).

    Unbiased; the variance of one of them is 2 (|H|_F^2 - sum of H_ii^2), so that off-diagonal
    entries alone make it vary. The error is the standard error of the mean.
    """
    number = len(quadratic_forms)
    error = stdev(quadratic_forms) / math.sqrt(number) if number > 1 else math.nan
    return Trace(fmean(quadratic_forms), error, number)


def quadratic_forms(products: Products, vectors: Tensor) -> list[float]:
    """v^T H v for each row v of `vectors` (m, n)."""
    return (vectors.double() * products(vectors).double()).sum(dim=1).tolist()


def quadrature(tridiagonal: Tridiagonal) -> tuple[list[float], list[float]]:
    """Nodes and weights of the Gauss quadrature that k steps of Lanczos from v are.

    sum_i weights_i p(nodes_i) = v^T p(H) v / v^T v for every polynomial p of degree up to
    2 k - 1. With random signs v that is on average the mean of p over the spectrum: stochastic
    Lanczos quadrature (Ubaru, Chen and Saad, 2017).
    """
    values, vectors = tridiagonal.eigen()
    return values.tolist(), vectors[0].square().tolist()


def density(spectrum: Spectrum, at: Tensor, width: float) -> Tensor:
    """The spectral density at the points `at` (m,), per unit of the eigenvalue, float64.

    Every node counts as a normal density of standard deviation `width`; the integral is 1.
    """
    total = torch.zeros(len(at), dtype=torch.float64)
    for values, weights in zip(spectrum.values, spectrum.weights, strict=True):
        distance = (at.double()[:, None] - _float64(values)) / width
        total += torch.exp(-(distance**2) / 2) @ _float64(weights)
    return total / (len(spectrum.values) * width * math.sqrt(2 * math.pi))

"""Eigenvalues, spectral densities, traces and diagonals of matrices known by their products."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class SymmetricOperator(Protocol):
    """A symmetric matrix known by its product with a vector, e.g. a `HessianOperator`."""

    @property
    def numel(self) -> int:
        """Number of rows."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its products."""
        ...

    @property
    def device(self) -> torch.device:
        """Of its products."""
        ...

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """The product with `(P,)`."""
        ...


@dataclass(frozen=True)
class Tridiagonal:
    """What Lanczos leaves: Qᵀ A Q = T with orthonormal Q.

    Args:
        diagonal: of T, `(m,)`, float64.
        off_diagonal: of T, `(m − 1,)`, float64.
        residual: norm of the next, not normalised Lanczos vector.
        basis: Q as rows, `(m, P)`.

    Example:
        >>> import torch
        >>> from assay.functional import DenseOperator, lanczos
        >>> T = lanczos(DenseOperator(torch.diag(torch.tensor([1.0, 2.0]))), 2)
        >>> torch.allclose(T.eigh()[0], torch.tensor([1.0, 2.0], dtype=torch.float64))
        True
    """

    diagonal: Float[Tensor, " m"]
    off_diagonal: Float[Tensor, " k"]
    residual: float
    basis: Float[Tensor, "m p"]

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Ritz values, ascending, and the eigenvectors of T as columns."""
        off = torch.diag(self.off_diagonal, 1)
        return torch.linalg.eigh(torch.diag(self.diagonal) + off + off.T)


class DenseOperator:
    """A symmetric matrix given as one.

    Args:
        matrix: `(P, P)`.

    Raises:
        ValueError: if it is not square and symmetric.

    Example:
        >>> import torch
        >>> from assay.functional import DenseOperator
        >>> DenseOperator(torch.eye(2)) @ torch.tensor([3.0, 4.0])
        tensor([3., 4.])
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {tuple(matrix.shape)}")
        if not torch.allclose(matrix, matrix.T, rtol=1e-4, atol=1e-6):
            raise ValueError("matrix must be symmetric")
        self.matrix = matrix

    @property
    def numel(self) -> int:
        """Number of rows."""
        return len(self.matrix)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """Of the matrix."""
        return self.matrix.device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with `(P,)` or `(P, K)`."""
        return self.matrix @ vectors


class ScaledOperator:
    """D A D for a diagonal matrix D: a curvature in other units of the parameters.

    With D = diag(|θ|) the Hessian is that in relative changes of the weights. A rescaling of
    layers or neurons that leaves a network's function alone multiplies θ_i by some a_i and
    divides ∇²L's entry (i, j) by a_i a_j, so it leaves D A D alone.

    Args:
        operator: symmetric, A.
        scale: the diagonal of D, `(P,)`.

    Raises:
        ValueError: if `scale` does not have one entry a row.

    Example:
        >>> import torch
        >>> from assay.functional import DenseOperator, ScaledOperator
        >>> ScaledOperator(DenseOperator(torch.eye(2)), torch.tensor([2.0, 3.0])) @ torch.ones(2)
        tensor([4., 9.])

    Reference:
        Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
        Learning of Deep Neural Networks", ICML 2021.
    """

    def __init__(self, operator: SymmetricOperator, scale: Tensor) -> None:
        if scale.shape != (operator.numel,):
            raise ValueError(f"scale must have shape ({operator.numel},), got {tuple(scale.shape)}")
        self.operator = operator
        self.scale = scale.detach().to(dtype=operator.dtype, device=operator.device)

    @property
    def numel(self) -> int:
        """Number of rows."""
        return self.operator.numel

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """Of the products."""
        return self.operator.device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with `(P,)`."""
        return self.scale * (self.operator @ (self.scale * vectors))


def lanczos(
    operator: SymmetricOperator,
    steps: int,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tridiagonal:
    """Lanczos' three-term recursion with full reorthogonalisation (no ghost eigenvalues).

    Stops early when the Krylov space is exhausted.

    Args:
        operator: symmetric.
        steps: at most so many products; memory is steps × P.
        start: first vector, `(P,)`; default a random one.
        generator: source of the random start, on the CPU.

    Returns:
        The tridiagonal matrix and the basis.

    Raises:
        ValueError: if `steps` < 1 or `start` is zero.
        FloatingPointError: if a product is not finite.

    Example:
        >>> import torch
        >>> from assay.functional import DenseOperator, lanczos
        >>> A = torch.diag(torch.arange(1.0, 6.0))
        >>> values, _ = lanczos(DenseOperator(A), 5, generator=torch.Generator()).eigh()
        >>> torch.allclose(values, torch.arange(1.0, 6.0, dtype=torch.float64), atol=1e-5)
        True

    Reference:
        Golub, Van Loan, "Matrix Computations", chapter 10.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if start is None:
        start = torch.randn(operator.numel, generator=generator, dtype=torch.float64)
    recursion = _Recursion(operator, start)
    with _held(operator):
        recursion.go_on(steps)
    return recursion.found()


class _Recursion:
    """Lanczos' recursion, which can go on where it stopped."""

    def __init__(self, operator: SymmetricOperator, start: Tensor) -> None:
        norm = float(start.norm())
        if norm == 0:
            raise ValueError("start must not be the zero vector")
        self.operator = operator
        work = torch.float64 if operator.device.type != "mps" else torch.float32
        self.basis = (start.to(operator.device, work) / norm).unsqueeze(0)
        self.diagonal: list[float] = []
        self.off_diagonal: list[float] = []
        self.residual = 0.0
        self.following: Tensor | None = self.basis[0]

    @property
    def exhausted(self) -> bool:
        """Whether the Krylov space holds no further direction."""
        return self.following is None

    def go_on(self, steps: int) -> None:
        """Until there are so many steps in all, or the space is exhausted."""
        steps = min(steps, self.operator.numel)
        self._make_room(steps)
        for k in range(len(self.diagonal), steps):
            if self.following is None:
                break
            self.basis[k] = self.following
            product = (self.operator @ self.basis[k].to(self.operator.dtype)).to(self.basis)
            self.diagonal.append(float(self.basis[k] @ product))
            if not math.isfinite(self.diagonal[-1]):  # as it is if any entry is not
                raise FloatingPointError(f"product {k + 1} with the operator is not finite")
            if k:
                self.off_diagonal.append(self.residual)
                product.sub_(self.basis[k - 1], alpha=self.residual)
            product.sub_(self.basis[k], alpha=self.diagonal[-1])
            self.residual = self._orthogonalise(product, k + 1)
            scale = max(map(abs, [*self.diagonal, *self.off_diagonal]))
            scale = max(scale, torch.finfo(self.basis.dtype).tiny)
            over = k + 1 == self.operator.numel or self.residual <= 1e-12 * scale
            self.following = None if over else product / self.residual

    def _make_room(self, steps: int) -> None:
        """For so many basis vectors, or twice as many as before: few copies of what is there."""
        if steps > len(self.basis):
            room = min(max(steps, 2 * len(self.basis)), self.operator.numel)
            grown = self.basis.new_empty(room, self.basis.shape[1])
            done = len(self.diagonal)
            grown[:done] = self.basis[:done]
            self.basis = grown

    def _orthogonalise(self, vector: Tensor, count: int) -> float:
        """Make a vector orthogonal to the basis, in place; its norm.

        A second pass is needed where the first took most of it away, and is enough (Kahan).
        """
        basis = self.basis[:count]
        norm = float(vector.norm())
        for _ in range(3):
            vector.addmv_(basis.T, basis @ vector, alpha=-1)
            before, norm = norm, float(vector.norm())
            if norm > 0.7 * before:
                break
        return norm

    def found(self) -> Tridiagonal:
        return Tridiagonal(
            torch.tensor(self.diagonal, dtype=torch.float64),
            torch.tensor(self.off_diagonal, dtype=torch.float64),
            self.residual,
            self.basis[: len(self.diagonal)],
        )


def _held(operator: SymmetricOperator) -> contextlib.AbstractContextManager[object]:
    """What an operator can share between products, kept meanwhile."""
    hold = getattr(operator, "hold", None)
    return contextlib.nullcontext() if hold is None else hold()


def top_eigenvalues(
    operator: SymmetricOperator,
    k: int = 1,
    *,
    tol: float = 1e-3,
    max_steps: int = 200,
    which: str = "magnitude",
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k p"]]:
    """The outermost eigenvalues with their eigenvectors.

    Args:
        operator: symmetric.
        k: how many.
        tol: largest residual norm ‖Av − λv‖ relative to |λ_1|.
        max_steps: products to spend at most; memory is so many vectors of 8 P bytes, if they are
            needed.
        which: `"magnitude"`, `"largest"` or `"smallest"`.
        generator: source of the random start, on the CPU.

    Returns:
        Eigenvalues `(k,)`, outermost first, and unit eigenvectors as rows `(k, P)`.

    Raises:
        ValueError: for `k` outside 1…P or an unknown `which`.
        RuntimeError: if `max_steps` products do not reach `tol`.

    Example:
        >>> import torch
        >>> from assay.functional import DenseOperator, top_eigenvalues
        >>> A = DenseOperator(torch.diag(torch.tensor([1.0, -7.0, 3.0])))
        >>> top_eigenvalues(A, 2, generator=torch.Generator())[0].tolist()
        [-7.0, 3.0]
    """
    if not 1 <= k <= operator.numel:
        raise ValueError(f"k must be in 1…{operator.numel}, got {k}")
    if which not in ("magnitude", "largest", "smallest"):
        raise ValueError(f"which must be 'magnitude', 'largest' or 'smallest', got {which!r}")
    steps = min(max(2 * k + 8, 16), max_steps, operator.numel)
    start = torch.randn(operator.numel, generator=generator, dtype=torch.float64)
    recursion = _Recursion(operator, start)
    with _held(operator):
        while True:
            recursion.go_on(steps)
            found = recursion.found()
            values, vectors = found.eigh()
            order = {
                "magnitude": values.abs().argsort(descending=True),
                "largest": values.argsort(descending=True),
                "smallest": values.argsort(),
            }[which][:k]
            errors = found.residual * vectors[-1, order].abs()
            if recursion.exhausted or bool((errors <= tol * values.abs().max()).all()):
                break
            if steps >= max_steps:
                raise RuntimeError(
                    f"{max_steps} products leave a relative residual of "
                    f"{float(errors.max() / values.abs().max()):.1e}, tol is {tol:g}: raise "
                    "max_steps"
                )
            steps = min(steps + max(2, steps // 16), max_steps, operator.numel)
    chosen = vectors[:, order].T.to(found.basis) @ found.basis
    dtype = operator.dtype
    return values[order].to(dtype).to(operator.device), chosen.to(dtype)


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of a matrix's eigenvalues, estimated by stochastic Lanczos quadrature.

    Args:
        nodes: Ritz values of all probes, `(probes, m)`; padded with NaN.
        weights: of the nodes; each probe's sum to 1.
        numel: number of eigenvalues P.

    Example:
        >>> import torch
        >>> from assay.functional import DenseOperator, spectral_density
        >>> A = DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
        >>> round(spectral_density(A, probes=1, steps=3).moment(1), 4)  # the mean eigenvalue
        2.0
    """

    nodes: Float[np.ndarray, "probes m"]
    weights: Float[np.ndarray, "probes m"]
    numel: int

    @classmethod
    def pooled(cls, parts: Sequence["SpectralDensity"]) -> "SpectralDensity":
        """One density of the probes of several estimates of the same spectrum.

        Args:
            parts: at least one; their numbers of steps may differ.
        """
        length = max(part.nodes.shape[1] for part in parts)

        def stacked(arrays: Iterable[np.ndarray]) -> np.ndarray:
            padded = [
                np.pad(a, ((0, 0), (0, length - a.shape[1])), constant_values=np.nan)
                for a in arrays
            ]
            return np.concatenate(padded)

        nodes, weights = (stacked(part.nodes for part in parts),
                          stacked(part.weights for part in parts))  # fmt: skip
        return cls(nodes, weights, parts[0].numel)

    def draws(self, function: Callable[[np.ndarray], np.ndarray]) -> Float[np.ndarray, " probes"]:
        """Each probe's estimate of the mean of f(λ) over the spectrum.

        Args:
            function: f, of an array of eigenvalues.
        """
        return np.nansum(self.weights * function(self.nodes), axis=1)

    def moment(self, order: int) -> float:
        """Mean of λ^order over the spectrum; `order=1` times P is the trace."""
        return float(self.draws(lambda nodes: nodes**order).mean())

    def grid(
        self, points: int = 1000, sigma: float | None = None, margin: float = 0.05
    ) -> tuple[np.ndarray, np.ndarray]:
        """Abscissas and a Gaussian-smoothed density that integrates to 1.

        Args:
            points: number of abscissas.
            sigma: width of the Gaussians; default 1 % of the spectrum's width.
            margin: room beyond the outermost nodes, relative to the width.
        """
        low, high = float(np.nanmin(self.nodes)), float(np.nanmax(self.nodes))
        width = (high - low) or max(abs(high), 1.0)
        sigma = 0.01 * width if sigma is None else sigma
        reach = max(margin * width, 6 * sigma)
        x = np.linspace(low - reach, high + reach, points)
        nodes, weights = self.nodes.ravel(), self.weights.ravel()
        kept = ~np.isnan(nodes)
        bells = np.exp(-0.5 * ((x[:, None] - nodes[kept]) / sigma) ** 2)
        density = bells @ weights[kept] / len(self.nodes)
        return x, density / np.trapezoid(density, x)


def spectral_density(
    operator: SymmetricOperator,
    *,
    probes: int = 8,
    steps: int = 64,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Stochastic Lanczos quadrature with Rademacher probes.

    Args:
        operator: symmetric.
        probes: number of random vectors.
        steps: Lanczos steps a probe; probes × steps products in all.
        generator: source of the probes, on the CPU.

    Returns:
        Nodes and weights of the quadrature.

    Raises:
        ValueError: if `probes` < 1 or `steps` < 1.

    Example:
        >>> import torch
        >>> from assay.functional import DenseOperator, spectral_density
        >>> x, density = spectral_density(DenseOperator(torch.eye(4)), probes=2).grid()
        >>> bool(abs(x[density.argmax()] - 1) < 0.01)
        True

    Reference:
        Ghorbani, Krishnan, Xiao, "An Investigation into Neural Net Optimization via Hessian
        Eigenvalue Density", ICML 2019.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    nodes, weights = [], []
    for _ in range(probes):
        signs = torch.randint(2, (operator.numel,), generator=generator)
        values, vectors = lanczos(operator, steps, start=2.0 * signs.double() - 1).eigh()
        nodes.append(values.numpy())
        weights.append(vectors[0].square().numpy())
    length = max(map(len, nodes))
    padded = np.full((2, probes, length), np.nan)
    for row, (node, weight) in enumerate(zip(nodes, weights, strict=True)):
        padded[0, row, : len(node)], padded[1, row, : len(node)] = node, weight
    return SpectralDensity(padded[0], padded[1], operator.numel)


@dataclass(frozen=True)
class Estimate:
    """A mean of random draws with its standard error.

    Args:
        mean: the estimate.
        standard_error: of the mean, same shape.

    Example:
        >>> import torch
        >>> from assay.functional import DenseOperator, hutchinson_trace
        >>> A = DenseOperator(torch.eye(3))
        >>> float(hutchinson_trace(A, probes=2).mean)
        3.0
    """

    mean: Tensor
    standard_error: Tensor


def hutchinson_trace(
    operator: SymmetricOperator, *, probes: int = 16, generator: torch.Generator | None = None
) -> Estimate:
    """Unbiased estimate of the trace, E[vᵀAv] over random signs v.

    Args:
        operator: symmetric.
        probes: products to spend, at least 2.
        generator: source of the signs, on the CPU.

    Raises:
        ValueError: if `probes` < 2, from which no standard error can be had.

    Example:
        >>> import torch
        >>> from assay.functional import DenseOperator, hutchinson_trace
        >>> A = DenseOperator(torch.diag(torch.tensor([1.0, 5.0])))  # exact for diagonal matrices
        >>> hutchinson_trace(A).mean.item()
        6.0
    """
    return _hutchinson(operator, probes, generator, lambda v, product: (v * product).sum())


def hutchinson_block_draws(
    operator: SymmetricOperator,
    sizes: Sequence[int],
    *,
    probes: int = 16,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "probes blocks"]:
    """Draws of the traces of the diagonal blocks: v_b · (Av)_b over random signs v.

    Each column is unbiased for the trace of its block, and the sum of a row for the whole trace.

    Args:
        operator: symmetric.
        sizes: rows of each block, in order.
        probes: products to spend.
        generator: source of the signs, on the CPU.

    Raises:
        ValueError: if the sizes do not add up to the operator's, or `probes` < 1.

    Example:
        >>> import torch
        >>> from assay.functional import DenseOperator, hutchinson_block_draws
        >>> A = DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        >>> hutchinson_block_draws(A, [2, 1], probes=1)
        tensor([[3., 4.]])
    """
    if sum(sizes) != operator.numel:
        raise ValueError(f"sizes must add up to {operator.numel}, got {sum(sizes)}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    draws = []
    for _ in range(probes):
        signs = torch.randint(2, (operator.numel,), generator=generator)
        v = (2 * signs - 1).to(operator.dtype).to(operator.device)
        draws.append(torch.stack([part.sum() for part in (v * (operator @ v)).split(list(sizes))]))
    return torch.stack(draws)


def hutchinson_diagonal(
    operator: SymmetricOperator, *, probes: int = 16, generator: torch.Generator | None = None
) -> Estimate:
    """Unbiased estimate of the diagonal, E[v ⊙ Av] over random signs v.

    Args:
        operator: symmetric.
        probes: products to spend, at least 2.
        generator: source of the signs, on the CPU.

    Raises:
        ValueError: if `probes` < 2, from which no standard error can be had.

    Example:
        >>> import torch
        >>> from assay.functional import DenseOperator, hutchinson_diagonal
        >>> hutchinson_diagonal(DenseOperator(torch.diag(torch.tensor([1.0, 5.0])))).mean
        tensor([1., 5.])

    Reference:
        Bekas, Kokiopoulou, Saad, "An Estimator for the Diagonal of a Matrix", 2007.
    """
    return _hutchinson(operator, probes, generator, lambda v, product: v * product)


def _hutchinson(operator, probes, generator, statistic) -> Estimate:
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}")
    draws = []
    for _ in range(probes):
        signs = torch.randint(2, (operator.numel,), generator=generator)
        v = (2 * signs - 1).to(operator.dtype).to(operator.device)
        draws.append(statistic(v, operator @ v))
    stacked = torch.stack(draws)
    return Estimate(stacked.mean(0), stacked.std(0) / probes**0.5)

"""Smooth convex objectives with gradients and Hessian determinants of many points at once.

All but `NormPower` are averages of a convex function of a residual, with an optional ridge,

    f(x) = 1/n Σ_i φ(aᵢᵀx − bᵢ) + r/2 ‖x‖²,

where aᵢ is the i-th row of A. Points are the last dimension of a tensor: value, gradient and
Hessian of a whole sample `(..., d)` cost a few matrix products. float64 throughout.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Bounds the memory of intermediate `(points, n)` matrices at 32 MB.
_CHUNK_ELEMENTS = 4_000_000


def _matrix(A: Any, name: str = "A") -> Tensor:
    matrix = torch.as_tensor(A, dtype=torch.float64)
    if matrix.ndim != 2 or matrix.numel() == 0 or not bool(matrix.isfinite().all()):
        raise ValueError(f"{name} must be a non-empty finite matrix, got {tuple(matrix.shape)}")
    return matrix


def _rows_like(A: Tensor, b: Any, name: str) -> Tensor:
    vector = torch.as_tensor(b, dtype=torch.float64)
    if vector.shape != A.shape[:1] or not bool(vector.isfinite().all()):
        raise ValueError(
            f"{name} must be a finite vector with one entry a row of A, ({len(A)},), "
            f"got {tuple(vector.shape)}"
        )
    return vector


class Objective(ABC):
    """A smooth convex function of d variables; points are the last dimension."""

    dim: int

    @abstractmethod
    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Values f(x)."""

    @abstractmethod
    def gradient(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Gradients ∇f(x)."""

    @abstractmethod
    def hessian(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d d"]:
        """Hessians ∇²f(x)."""

    @abstractmethod
    def hessian_logdet(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Log-determinants of the Hessians, −∞ where singular."""

    def minimizer(self, start: Tensor | None = None, *, max_iter: int = 200) -> Float[Tensor, " d"]:
        """Find argmin f by damped Newton steps until they change nothing any more.

        Args:
            start: Where to begin; default the origin.
            max_iter: Largest number of steps.

        Returns:
            The minimiser, to rounding where the Hessian there is well-conditioned.
        """
        x = torch.zeros(self.dim, dtype=torch.float64) if start is None else start.double()
        value = self(x)
        for _ in range(max_iter):
            step = torch.linalg.lstsq(self.hessian(x), -self.gradient(x), driver="gelsd").solution
            scale = 1.0
            while not bool((trial := self(x + scale * step)) < value):
                scale /= 2
                if scale < 1e-10:
                    return x
            x, value = x + scale * step, trial
        return x


class NormPower(Objective):
    """A power of a norm, f(x) = ‖Ax − c‖^a / a.

    For A = s·I its conjugate has the gradient of the `Power` preconditioner of `assay.optim` up to
    a factor and a shift, so that a step of size s^(−q), q = a/(a − 1), reaches the minimiser.

    Args:
        A: `(m, d)`.
        c: `(m,)`.
        a: The power, more than 1. Gradients grow like ‖x‖^(a − 1): a = 50 needs float64.

    Raises:
        ValueError: If the shapes do not fit, an entry is not finite, or a ≤ 1.

    Example:
        >>> import torch
        >>> f = NormPower([[2.0]], [6.0], a=4)
        >>> f(torch.tensor([[3.0], [4.0]]).double()), f.gradient(torch.tensor([4.0]).double())
        (tensor([0., 4.], dtype=torch.float64), tensor([16.], dtype=torch.float64))
    """

    def __init__(self, A: Any, c: Any, a: float) -> None:
        self.A = _matrix(A)
        self.c = _rows_like(self.A, c, "c")
        if not 1 < a < math.inf:
            raise ValueError(f"a must be more than 1, got {a}")
        self.a = float(a)
        self.dim = self.A.shape[1]

    def _residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = x @ self.A.T - self.c
        return u, u.norm(dim=-1)

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Values ‖Ax − c‖^a / a."""
        return self._residual(x)[1] ** self.a / self.a

    def gradient(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Gradients ‖u‖^(a−2) Aᵀu, u = Ax − c; 0 where u = 0."""
        u, norm = self._residual(x)
        unit = u / norm.where(norm > 0, 1.0)[..., None]
        return norm[..., None] ** (self.a - 1) * (unit @ self.A)

    def hessian(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d d"]:
        """Hessians ‖u‖^(a−2) Aᵀ(I + (a − 2) ûûᵀ)A, û = u/‖u‖."""
        return self._residual(x)[1][..., None, None] ** (self.a - 2) * self._shape(x)

    def _shape(self, x: Tensor) -> Tensor:
        """The Hessian without its power of ‖u‖, which may overflow."""
        u, norm = self._residual(x)
        along = (u / norm.where(norm > 0, 1.0)[..., None]) @ self.A
        return self.A.T @ self.A + (self.a - 2) * along[..., :, None] * along[..., None, :]

    def hessian_logdet(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """d (a − 2) log‖u‖ plus that of the bounded factor."""
        power = self.dim * (self.a - 2)
        log_norm = self._residual(x)[1].log()
        scale = power * log_norm if power else torch.zeros_like(log_norm)
        return scale + torch.linalg.slogdet(self._shape(x)).logabsdet


class ResidualObjective(Objective):
    """An average of φ(aᵢᵀx − bᵢ) and a ridge; a subclass gives φ and its two derivatives."""

    def __init__(self, A: Any, b: Any, ridge: float = 0.0) -> None:
        self.A = _matrix(A)
        self.b = _rows_like(self.A, b, "b")
        if not 0 <= ridge < math.inf:
            raise ValueError(f"ridge must be at least 0, got {ridge}")
        self.ridge = float(ridge)
        self.dim = self.A.shape[1]

    @abstractmethod
    def phi(self, u: Tensor) -> Tensor:
        """The function φ, entry by entry."""

    @abstractmethod
    def phi_prime(self, u: Tensor) -> Tensor:
        """Its derivative φ'."""

    @abstractmethod
    def phi_second(self, u: Tensor) -> Tensor:
        """Its second derivative φ''."""

    def _residual(self, x: Tensor) -> Tensor:
        return x @ self.A.T - self.b

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Values 1/n Σ φ(aᵢᵀx − bᵢ) + r/2 ‖x‖²."""
        return self.phi(self._residual(x)).mean(-1) + self.ridge / 2 * x.square().sum(-1)

    def gradient(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Gradients 1/n Aᵀφ'(Ax − b) + r x."""
        return self.phi_prime(self._residual(x)) @ self.A / len(self.A) + self.ridge * x

    def hessian(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d d"]:
        """Hessians 1/n Aᵀ diag φ''(Ax − b) A + r I."""
        n, d = self.A.shape
        # One product with the n outer products aᵢaᵢᵀ instead of one product of matrices a point.
        rows, columns = torch.triu_indices(d, d)
        outer = self.A[:, rows] * self.A[:, columns] / n
        upper = self.phi_second(self._residual(x)) @ outer
        hessian = x.new_zeros(*x.shape[:-1], d, d)
        hessian[..., rows, columns] = upper
        hessian[..., columns, rows] = upper
        return hessian + self.ridge * torch.eye(d, dtype=x.dtype)

    def hessian_logdet(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Log-determinants, in chunks of points that keep the memory small."""
        size = max(1, _CHUNK_ELEMENTS // max(len(self.A), self.dim**2))
        parts = [torch.linalg.slogdet(self.hessian(part)).logabsdet for part in x.split(size)]
        return torch.cat(parts)


class LogisticRegression(ResidualObjective):
    """Logistic loss, f(x) = 1/n Σ log(1 + exp(−yᵢ aᵢᵀx)) + r/2 ‖x‖².

    Args:
        A: Features, `(n, d)`.
        y: Labels −1 or 1, `(n,)`.
        ridge: r ≥ 0.

    Raises:
        ValueError: If the shapes do not fit, an entry is not finite, a label is neither −1 nor 1,
            or r < 0.

    Example:
        >>> import torch
        >>> f = LogisticRegression([[1.0], [2.0]], [1, -1], ridge=0.5)
        >>> round(f(torch.zeros(1).double()).item(), 4), round(f.smoothness, 4)
        (0.6931, 1.125)
    """

    def __init__(self, A: Any, y: Any, ridge: float = 0.0) -> None:
        matrix = _matrix(A)
        labels = _rows_like(matrix, y, "y")
        if not bool((labels.abs() == 1).all()):
            raise ValueError(f"y must hold −1 and 1 only, got {labels.unique().tolist()[:5]}")
        super().__init__(labels[:, None] * matrix, torch.zeros_like(labels), ridge)

    @property
    def smoothness(self) -> float:
        """L = λ_max(AᵀA)/(4n) + r, a bound on every eigenvalue of every Hessian."""
        top = torch.linalg.matrix_norm(self.A, 2).square().item()
        return top / (4 * len(self.A)) + self.ridge

    def phi(self, u: Tensor) -> Tensor:
        """Return log(1 + e^(−u))."""
        return F.softplus(-u)

    def phi_prime(self, u: Tensor) -> Tensor:
        """Return −1/(1 + e^u)."""
        return -torch.sigmoid(-u)

    def phi_second(self, u: Tensor) -> Tensor:
        """Return e^u/(1 + e^u)²."""
        return torch.sigmoid(u) * torch.sigmoid(-u)


class PNormRegression(ResidualObjective):
    """Regression in the p-norm, f(x) = 1/(pn) ‖Ax − b‖_p^p.

    Args:
        A: `(n, d)`.
        b: `(n,)`.
        p: The power, at least 2.

    Raises:
        ValueError: If the shapes do not fit, an entry is not finite, or p < 2.

    Example:
        >>> import torch
        >>> f = PNormRegression([[1.0], [1.0]], [0.0, 2.0], p=4)
        >>> f.minimizer(torch.tensor([5.0]))
        tensor([1.0000], dtype=torch.float64)
    """

    def __init__(self, A: Any, b: Any, p: float) -> None:
        super().__init__(A, b)
        if not 2 <= p < math.inf:
            raise ValueError(f"p must be at least 2, got {p}")
        self.p = float(p)

    def phi(self, u: Tensor) -> Tensor:
        """Return |u|^p / p."""
        return u.abs() ** self.p / self.p

    def phi_prime(self, u: Tensor) -> Tensor:
        """Return |u|^(p−1) sign u."""
        return u.sign() * u.abs() ** (self.p - 1)

    def phi_second(self, u: Tensor) -> Tensor:
        """Return (p − 1) |u|^(p−2)."""
        return (self.p - 1) * u.abs() ** (self.p - 2)


class ExponentialPenalty(ResidualObjective):
    """Penalties that grow exponentially, f(x) = 1/n Σ φ(aᵢᵀx − bᵢ).

    Args:
        A: `(n, d)`.
        b: `(n,)`.
        penalty: `"cosh"`, φ(u) = cosh u − 1, whose conjugate has the derivative arcsinh; or
            `"exp"`, φ(u) = e^|u| − |u| − 1, whose conjugate has sign(g) log(1 + |g|).

    Raises:
        ValueError: If the shapes do not fit, an entry is not finite, or the penalty is unknown.

    Example:
        >>> import torch
        >>> f = ExponentialPenalty([[1.0]], [2.0], penalty="exp")
        >>> f.gradient(torch.tensor([3.0]).double())
        tensor([1.7183], dtype=torch.float64)
    """

    def __init__(self, A: Any, b: Any, penalty: Literal["cosh", "exp"] | str = "cosh") -> None:
        super().__init__(A, b)
        if penalty not in ("cosh", "exp"):
            raise ValueError(f"penalty must be 'cosh' or 'exp', got {penalty!r}")
        self.penalty = penalty

    def phi(self, u: Tensor) -> Tensor:
        """Return the penalty; both as a small difference without cancellation."""
        if self.penalty == "cosh":
            return 2 * torch.sinh(u / 2).square()
        return torch.expm1(u.abs()) - u.abs()

    def phi_prime(self, u: Tensor) -> Tensor:
        """Return sinh u, or sign(u) (e^|u| − 1)."""
        return torch.sinh(u) if self.penalty == "cosh" else u.sign() * torch.expm1(u.abs())

    def phi_second(self, u: Tensor) -> Tensor:
        """Return cosh u, or e^|u|."""
        return torch.cosh(u) if self.penalty == "cosh" else u.abs().exp()


def synthetic_logistic(
    n: int, d: int, ridge: float, *, decay: bool, generator: torch.Generator
) -> LogisticRegression:
    """Draw a logistic regression with Gaussian features and labels from a logistic model.

    Args:
        n: Number of rows.
        d: Number of variables.
        ridge: r.
        decay: Whether the i-th feature has the standard deviation 4/i instead of 1.
        generator: CPU generator.

    Returns:
        The objective. With n = 1000 and d = 50, L/r is about 0.4/r + 1, and 4/r + 1 with `decay`.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> f = synthetic_logistic(1000, 50, 0.05, decay=True, generator=g)
        >>> 70 < f.smoothness / f.ridge < 95
        True
    """
    scales = 4 / torch.arange(1, d + 1, dtype=torch.float64) if decay else torch.ones(d).double()
    A = torch.randn(n, d, generator=generator, dtype=torch.float64) * scales
    truth = torch.randn(d, generator=generator, dtype=torch.float64)
    chance = torch.sigmoid(A @ truth)
    y = torch.where(torch.rand(n, generator=generator, dtype=torch.float64) < chance, 1.0, -1.0)
    return LogisticRegression(A, y, ridge)


def breast_cancer_logistic(ridge: float) -> LogisticRegression:
    """Return the logistic regression of scikit-learn's breast cancer data, standardised.

    Args:
        ridge: r.

    Returns:
        The objective of 569 rows and 30 features of mean 0 and variance 1, without intercept.

    Example:
        >>> tuple(breast_cancer_logistic(0.05).A.shape)
        (569, 30)
    """
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    return LogisticRegression(
        _standardized(torch.as_tensor(features)), 2.0 * torch.as_tensor(labels) - 1, ridge
    )


def diabetes_regression(p: float) -> PNormRegression:
    """Return the p-norm regression of scikit-learn's diabetes data, standardised.

    Args:
        p: The power.

    Returns:
        The objective of 442 rows and 10 features; features and target have mean 0 and variance 1.

    Example:
        >>> tuple(diabetes_regression(4).A.shape)
        (442, 10)
    """
    from sklearn.datasets import load_diabetes

    features, target = load_diabetes(return_X_y=True)
    return PNormRegression(
        _standardized(torch.as_tensor(features)), _standardized(torch.as_tensor(target)), p
    )


def _standardized(x: Tensor) -> Tensor:
    x = x.double()
    return (x - x.mean(0)) / x.std(0, correction=0)

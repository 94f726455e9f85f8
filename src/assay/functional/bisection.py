"""Bracket and bisect: roots of many scalar functions at once, in lock-step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

RowFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Bracket:
    """Where the functions of a batch change sign along their rays.

    Args:
        low: the last parameter at which the function was negative, `(K,)`.
        high: the first at which it was not, `(K,)`; infinite where none was found, NaN where the
            function gave NaN.
        iterations: evaluations of each row, `(K,)`.

    Example:
        >>> import torch
        >>> from assay.functional import Bracket
        >>> ends = torch.tensor([1.0, 8.0]), torch.tensor([2.0, float("inf")])
        >>> Bracket(*ends, iterations=torch.tensor([2, 4])).found
        tensor([ True, False])
    """

    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]
    iterations: Int[Tensor, " k"]

    @property
    def found(self) -> Tensor:
        """Which rows have a change of sign between `low` and `high`, `(K,)` bool."""
        return self.high.isfinite()


@dataclass(frozen=True, eq=False)
class Bisection:
    """What `bisect` found, row by row.

    Args:
        point: the parameter evaluated last, `(K,)`; infinite for an `UNBOUNDED` row.
        value: the function there, `(K,)`; NaN for a row that was never evaluated.
        low: end of the remaining bracket where the function is negative, `(K,)`.
        high: the other end, `(K,)`.
        status: `CONVERGED`, `STOPPED` (the function gave NaN), `EXHAUSTED` (`max_iter`, or no
            floating-point number left between the ends) or `UNBOUNDED` (an end was infinite), an
            integer `(K,)`.
        iterations: evaluations of each row, `(K,)`; the bracket was halved as many times, or once
            less if the row `STOPPED`.

    Example:
        >>> import torch
        >>> from assay.functional import bisect
        >>> found = bisect(lambda t, rows: t**2 - 2, torch.tensor([0.0]), torch.tensor([2.0]))
        >>> found.status == found.EXHAUSTED  # no tolerance: down to neighbouring floats
        tensor([True])
    """

    CONVERGED: ClassVar[int] = 0
    STOPPED: ClassVar[int] = 1
    EXHAUSTED: ClassVar[int] = 2
    UNBOUNDED: ClassVar[int] = 3

    point: Float[Tensor, " k"]
    value: Float[Tensor, " k"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]
    status: Int[Tensor, " k"]
    iterations: Int[Tensor, " k"]

    @property
    def converged(self) -> Tensor:
        """Which rows reached a tolerance, `(K,)` bool."""
        return self.status == self.CONVERGED


@torch.no_grad()
def bracket(
    function: RowFunction,
    step: Tensor,
    *,
    start: Tensor | None = None,
    factor: float = 2.0,
    max_iter: int = 60,
) -> Bracket:
    """Walk along K rays in growing strides until each function is no longer negative.

    Row k is evaluated at t = start + step, start + factor · step, start + factor² · step, …; it
    ends at the first t where the function is ≥ 0. Rows that have ended are not evaluated again.

    Args:
        function: `(t, rows) -> values`: parameters `(R,)` of the rows `(R,)` (int64 indices) still
            walking, to values `(R,)`. It is negative at `start`, which is not checked.
        step: first stride of each row, `(K,)`, floating point; a negative one walks backwards.
        start: where each row begins, `(K,)`; default 0.
        factor: growth of the stride, > 1.
        max_iter: evaluations after which a row counts as never crossing.

    Returns:
        A `Bracket`, as `bisect` takes it.

    Raises:
        ValueError: if the shapes do not fit, a step is zero or not finite, `factor` ≤ 1 or
            `max_iter` < 1, or the function returns another shape than that of `t`.

    Example:
        >>> import torch
        >>> from assay.functional import bracket
        >>> curvature = torch.tensor([1.0, 0.01, 0.0])
        >>> def excess(t, rows):
        ...     return curvature[rows] * t**2 - 1
        >>> found = bracket(excess, torch.full((3,), 0.75))
        >>> found.low, found.high
        (tensor([7.5000e-01, 6.0000e+00, 4.3235e+17]), tensor([ 1.5000, 12.0000,     inf]))
    """
    origin = torch.zeros_like(step) if start is None else start
    _check_rows("start", origin, "step", step)
    if not bool((step.isfinite() & (step != 0)).all()):
        raise ValueError("step must be finite and not zero in every row")
    if not factor > 1:
        raise ValueError(f"factor must be greater than 1, got {factor}")
    _check_max_iter(max_iter)
    low, high = origin.clone(), torch.full_like(step, math.inf)
    iterations = torch.zeros(step.shape, dtype=torch.int64, device=step.device)
    stride = step.clone()
    rows = torch.arange(len(step), device=step.device)
    for _ in range(max_iter):
        if len(rows) == 0:
            break
        t = origin[rows] + stride[rows]
        stride *= factor
        value = _evaluate(function, t, rows)
        iterations[rows] += 1
        inside = value < 0
        high[rows[~inside]] = torch.where(value.isnan(), value.to(t), t)[~inside]
        low[rows[inside]] = t[inside]
        rows = rows[inside]
    return Bracket(low, high, iterations)


@torch.no_grad()
def bisect(
    function: RowFunction,
    low: Tensor,
    high: Tensor,
    *,
    ftol: float = 0.0,
    xtol: float = 0.0,
    rtol: float = 0.0,
    max_iter: int = 60,
) -> Bisection:
    """Halve K brackets in lock-step until each function is near zero or its bracket is narrow.

    Every iteration evaluates the middles of all brackets that are still open in one call. A row
    has converged when |f(t)| < `ftol` or |high − low| ≤ max(`xtol`, `rtol` · |t|). A function says
    that there is nothing more to look for in a row by returning NaN.

    Args:
        function: `(t, rows) -> values`: parameters `(R,)` of the rows `(R,)` (int64 indices) still
            open, to values `(R,)`. Negative at `low` and not at `high`, which is not checked.
        low: one end of each bracket, `(K,)`, floating point; its precision is that of the search.
        high: the other end, `(K,)`; it may be the smaller one. Rows with an infinite end are
            `UNBOUNDED`, rows with a NaN `STOPPED`; neither is evaluated.
        ftol: tolerance in the value.
        xtol: absolute tolerance in the parameter.
        rtol: tolerance in the parameter relative to itself.
        max_iter: largest number of evaluations of a row.

    Returns:
        A `Bisection`.

    Raises:
        ValueError: if the shapes or types do not fit, a tolerance is negative, `max_iter` < 1, or
            the function returns another shape than that of `t`.

    Example:
        >>> import torch
        >>> from assay.functional import bisect
        >>> squares = torch.tensor([2.0, 9.0]).double()
        >>> def excess(t, rows):
        ...     return t**2 - squares[rows]
        >>> low, high = torch.zeros(2).double(), torch.full((2,), 10.0).double()
        >>> bisect(excess, low, high, xtol=1e-9).point
        tensor([1.4142, 3.0000], dtype=torch.float64)
    """
    _check_rows("low", low, "high", high)
    for name, tolerance in (("ftol", ftol), ("xtol", xtol), ("rtol", rtol)):
        if not tolerance >= 0:
            raise ValueError(f"{name} must not be negative, got {tolerance}")
    _check_max_iter(max_iter)
    low, high = low.clone(), high.clone()
    point, value = high.clone(), torch.full_like(high, math.nan)
    status = torch.full(low.shape, Bisection.EXHAUSTED, dtype=torch.int64, device=low.device)
    status[low.isinf() | high.isinf()] = Bisection.UNBOUNDED
    status[low.isnan() | high.isnan()] = Bisection.STOPPED
    iterations = torch.zeros_like(status)
    rows = (low.isfinite() & high.isfinite()).nonzero().squeeze(1)
    for _ in range(max_iter):
        middle = low[rows] + (high[rows] - low[rows]) / 2
        fresh = (middle != low[rows]) & (middle != high[rows])
        rows, middle = rows[fresh], middle[fresh]
        if len(rows) == 0:
            break
        found = _evaluate(function, middle, rows)
        iterations[rows] += 1
        point[rows], value[rows] = middle, found.to(middle)
        low[rows] = torch.where(found < 0, middle, low[rows])
        high[rows] = torch.where(found >= 0, middle, high[rows])
        width = (high[rows] - low[rows]).abs()
        near = (found.abs() < ftol) | (width <= (rtol * middle.abs()).clamp(min=xtol))
        stopped = found.isnan()
        status[rows[near]] = Bisection.CONVERGED
        status[rows[stopped]] = Bisection.STOPPED
        rows = rows[~(near | stopped)]
    return Bisection(point, value, low, high, status, iterations)


def _evaluate(function: RowFunction, t: Tensor, rows: Tensor) -> Tensor:
    value = function(t, rows)
    if value.shape != t.shape:
        raise ValueError(
            f"the function must return one value a row, {tuple(t.shape)}, got {tuple(value.shape)}"
        )
    return value


def _check_rows(one: str, a: Tensor, other: str, b: Tensor) -> None:
    if a.ndim != 1 or a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        raise ValueError(
            f"{one} and {other} must be floating-point vectors of one length and dtype, got "
            f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
        )


def _check_max_iter(max_iter: int) -> None:
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")

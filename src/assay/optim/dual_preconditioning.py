"""Dual space preconditioning: gradient descent through a non-linear function of the gradient.

For a convex f with conjugate f* the inverse of x ↦ ∇f(x) is ∇f*. A step

    x⁺ = x − γ [∇p(∇f(x)) − ∇p(0)]

with p = f* and γ = 1 lands on the minimiser ∇f*(0). With another convex p it converges linearly if
μ ∇²f* ⪯ ∇²p ⪯ L ∇²f* and γ = 1/L, however badly conditioned f itself may be.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

Preconditioner = Callable[[Tensor], Tensor]


def _unit(g: Tensor) -> tuple[Tensor, Tensor]:
    """Norms `(..., 1)` over the last dimension and unit vectors, without overflow; 0 for 0."""
    largest = g.abs().amax(-1, keepdim=True) if g.shape[-1] else g.new_zeros(*g.shape[:-1], 1)
    scale = largest.where(largest > 0, 1.0)
    scaled = g / scale
    norm = scaled.norm(dim=-1, keepdim=True)
    return norm * scale, scaled / norm.where(norm > 0, 1.0)


class Power(nn.Module):
    r"""For functions that grow like a power a, ∇p(g) = (‖g‖² + ε²)^((q−2)/2) g, q = a/(a − 1).

    With ε = 0 it is ∇f* of f(x) = ‖x‖^a / a. With ε > 0 it is linear near g = 0, for objectives
    that grow like a power far away and like a quadratic near their minimiser: with ε = 0 and a > 2
    a step would never become small there.

    Args:
        a: The power, more than 1.
        eps: ε ≥ 0.

    Raises:
        ValueError: If a ≤ 1 or ε < 0.

    Example:
        >>> import torch
        >>> x = torch.tensor([3.0, -4.0])
        >>> gradient = x.norm() ** 2 * x  # of ‖x‖⁴/4
        >>> preconditioner = Power(4)
        >>> preconditioner(gradient)
        tensor([ 3., -4.])

    Reference:
        Maddison, Paulin, Teh, Doucet, "Dual Space Preconditioning for Gradient Descent", 2019.
    """

    vanishes_at_zero = True

    def __init__(self, a: float = 4.0, eps: float = 0.0) -> None:
        super().__init__()
        if not 1 < a < math.inf:
            raise ValueError(f"a must be more than 1, got {a}")
        _check_eps(eps)
        self.a = float(a)
        self.eps = float(eps)

    def forward(self, g: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return ∇p(g)."""
        norm, unit = _unit(g)
        q = self.a / (self.a - 1)
        if self.eps == 0:
            return norm ** (q - 1) * unit
        # hypot does not square, so that norms up to the largest float pass.
        smooth = torch.hypot(norm, torch.full_like(norm, self.eps))
        return norm / smooth * smooth ** (q - 1) * unit

    def extra_repr(self) -> str:
        """Return the options."""
        return f"a={self.a:g}, eps={self.eps:g}"


class Normalized(nn.Module):
    """Steps of bounded length, ∇p(g) = g / √(‖g‖² + ε²).

    Args:
        eps: ε > 0; gradients much longer give steps of length 1, shorter ones g/ε.

    Raises:
        ValueError: If ε ≤ 0.

    Example:
        >>> import torch
        >>> preconditioner = Normalized(eps=4.0)
        >>> preconditioner(torch.tensor([3.0, 0.0]))
        tensor([0.6000, 0.0000])
    """

    vanishes_at_zero = True

    def __init__(self, eps: float = 1.0) -> None:
        super().__init__()
        _check_positive("eps", eps)
        self.eps = float(eps)

    def forward(self, g: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return ∇p(g)."""
        norm, unit = _unit(g)
        return norm / torch.hypot(norm, torch.full_like(norm, self.eps)) * unit

    def extra_repr(self) -> str:
        """Return the options."""
        return f"eps={self.eps:g}"


class Clip(nn.Module):
    """Gradient clipping, ∇p(g) = g min(1, c/‖g‖).

    Args:
        max_norm: c > 0.

    Raises:
        ValueError: If c ≤ 0.

    Example:
        >>> import torch
        >>> preconditioner = Clip(max_norm=1.0)
        >>> preconditioner(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    vanishes_at_zero = True

    def __init__(self, max_norm: float = 1.0) -> None:
        super().__init__()
        _check_positive("max_norm", max_norm)
        self.max_norm = float(max_norm)

    def forward(self, g: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return ∇p(g)."""
        norm, unit = _unit(g)
        return torch.where(norm > self.max_norm, self.max_norm * unit, g)

    def extra_repr(self) -> str:
        """Return the options."""
        return f"max_norm={self.max_norm:g}"


class Arcsinh(nn.Module):
    """For penalties like cosh x − 1, ∇p(g) = arcsinh g, entry by entry.

    Example:
        >>> import torch
        >>> preconditioner = Arcsinh()
        >>> preconditioner(torch.sinh(torch.tensor([-2.0, 3.0])))
        tensor([-2.,  3.])
    """

    vanishes_at_zero = True

    def forward(self, g: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return ∇p(g)."""
        return torch.arcsinh(g)


class SignedLog(nn.Module):
    """For penalties like e^|x| − |x| − 1, ∇p(g) = sign(g) log(1 + |g|), entry by entry.

    Example:
        >>> import torch
        >>> preconditioner = SignedLog()
        >>> preconditioner(torch.tensor([0.0, torch.e - 1, 1 - torch.e]))
        tensor([ 0.,  1., -1.])
    """

    vanishes_at_zero = True

    def forward(self, g: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return ∇p(g)."""
        return g.sign() * torch.log1p(g.abs())


class Diagonal(nn.Module):
    """The linear preconditioner ∇p(g) = s ⊙ g.

    Args:
        scale: s, positive, `(d,)`; for a quadratic the inverse of the Hessian's diagonal.

    Raises:
        ValueError: If s is not a vector of positive numbers.

    Example:
        >>> import torch
        >>> preconditioner = Diagonal(torch.tensor([1.0, 0.01]))
        >>> preconditioner(torch.tensor([2.0, 200.0]))
        tensor([2., 2.])
    """

    vanishes_at_zero = True
    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        finite = scale.ndim == 1 and bool((scale.isfinite() & (scale > 0)).all())
        if not finite:
            raise ValueError(
                f"scale must be a vector of positive numbers, got a tensor of shape "
                f"{tuple(scale.shape)}" + (" with others" if scale.ndim == 1 else "")
            )
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, g: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return ∇p(g)."""
        if g.shape[-1] != len(self.scale):
            raise ValueError(f"scale has {len(self.scale)} entries, the gradient {g.shape[-1]}")
        return self.scale * g


def _check_eps(eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0, got {eps}")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value}")


PRECONDITIONERS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "power": Power,
    "normalized": Normalized,
    "clip": Clip,
    "arcsinh": Arcsinh,
    "signed_log": SignedLog,
}


class DualPreconditionedGD(Optimizer):
    r"""Gradient descent preconditioned in the dual space, x⁺ = x − γ [∇p(∇f(x)) − ∇p(0)].

    With the exact conjugate, p = f*, and γ = 1, one step reaches the minimiser. Shifting the
    objective shifts every iterate by as much.

    A learned ∇p is no gradient of a convex function, and its steps need not descend. The line
    search halves γ from `lr` on until the loss falls. Where −[∇p(g) − ∇p(0)] is no direction of
    descent, the step is −`fallback_lr` g instead, under the line search too.

    Args:
        params: Parameters or parameter groups; a group may have its own `lr`.
        lr: γ; 1 for a conjugate.
        preconditioner: ∇p, a callable from gradients `(..., d)` to steps `(..., d)`, e.g. `Power`
            or a fitted `LearnedPreconditioner`; or a name, with the class's defaults:
            `"identity"`, `"power"` (a = 4), `"normalized"`, `"clip"`, `"arcsinh"`, `"signed_log"`.
        line_search: None, or `"backtracking"`, with which `step` needs a closure.
        per: What the preconditioner sees as one vector: all gradients (`"global"`), those of a
            parameter (`"param"`) or each number (`"element"`).
        fallback_lr: Step size along −g where the preconditioned step is no descent, 1/L if a bound
            L on the curvature is known. None: `lr` with a line search, and no fallback without.
        max_halvings: Trials of the line search; where none descends the parameters stay.

    Raises:
        ValueError: If an option is out of its range or a name unknown.
        TypeError: If the preconditioner is neither a name nor callable.

    Example:
        >>> import torch
        >>> from assay.optim import DualPreconditionedGD, Power
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> optimizer = DualPreconditionedGD([x], preconditioner=Power(4))
        >>> (x.norm() ** 4 / 4).backward()
        >>> optimizer.step()  # Power(4) is the gradient of the conjugate: one step
        >>> x
        Parameter containing:
        tensor([0., 0.], requires_grad=True)

    Reference:
        "Learning to Optimize via Dual Space Preconditioning", submitted to ICLR 2020; Maddison,
        Paulin, Teh, Doucet, "Dual Space Preconditioning for Gradient Descent", 2019.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        preconditioner: Any = "power",
        *,
        line_search: str | None = None,
        per: str = "global",
        fallback_lr: float | None = None,
        max_halvings: int = 30,
    ) -> None:
        _check_positive("lr", lr)
        if fallback_lr is not None:
            _check_positive("fallback_lr", fallback_lr)
        if line_search not in (None, "backtracking"):
            raise ValueError(f"line_search must be None or 'backtracking', got {line_search!r}")
        if per not in ("global", "param", "element"):
            raise ValueError(f"per must be 'global', 'param' or 'element', got {per!r}")
        if max_halvings < 0:
            raise ValueError(f"max_halvings must be at least 0, got {max_halvings}")
        if isinstance(preconditioner, str):
            if preconditioner not in PRECONDITIONERS:
                known = ", ".join(map(repr, PRECONDITIONERS))
                raise ValueError(f"preconditioner must be one of {known}, got {preconditioner!r}")
            preconditioner = PRECONDITIONERS[preconditioner]()
        if not callable(preconditioner):
            raise TypeError(f"preconditioner must be a name or callable, got {preconditioner!r}")
        self.preconditioner = cast(Preconditioner, preconditioner)
        self.line_search = line_search
        self.per = per
        self.fallback_lr = fallback_lr
        self.max_halvings = max_halvings
        super().__init__(params, {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only what has state of its own; a copy has to take the same steps.
        own = ("preconditioner", "line_search", "per", "fallback_lr", "max_halvings")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: Clears the gradients, computes the loss, calls `backward` and returns the loss.
                The line search calls it again for each step that it tries, and leaves the
                gradients of the last.

        Returns:
            What the first call of the closure returned, or None.

        Raises:
            ValueError: If the line search has no closure, a gradient is sparse, or the
                preconditioner returns another shape than that of the gradients.
        """
        if self.line_search is not None and closure is None:
            raise ValueError("line_search='backtracking' needs a closure: step(closure)")
        loss: Any = None if closure is None else _evaluate(closure)
        params = [(p, g["lr"]) for g in self.param_groups for p in g["params"] if _has_grad(p)]
        if not params:
            return loss
        grads = [p.grad for p, _ in params]
        directions = self._directions(grads)
        slope = _inner(directions, grads)
        if self.line_search is None:
            falls_back = self.fallback_lr is not None and not slope > 0
            for (p, lr), d, g in zip(params, directions, grads, strict=True):
                p.sub_(g, alpha=self.fallback_lr) if falls_back else p.sub_(d, alpha=lr)
            return loss
        assert closure is not None
        lrs = [lr for _, lr in params]
        gradients = [g.clone() for g in grads]  # the closure overwrites them
        fallback = lrs if self.fallback_lr is None else [self.fallback_lr] * len(lrs)
        trials = [(directions, lrs)] if slope > 0 else []
        for steps, scales in (*trials, (gradients, fallback)):
            if self._search(closure, float(loss), [p for p, _ in params], steps, scales):
                break
        return loss

    def _search(
        self,
        closure: Callable[[], Any],
        loss: float,
        params: list[Tensor],
        steps: list[Tensor],
        lrs: list[float],
    ) -> bool:
        """Halve the step until the loss falls; whether it did. If not, nothing has moved."""
        origin = [p.clone() for p in params]
        scale = 1.0
        for _ in range(self.max_halvings + 1):
            for p, start, step, lr in zip(params, origin, steps, lrs, strict=True):
                p.copy_(start).sub_(step, alpha=scale * lr)
            if all(map(torch.equal, params, origin)):
                return False
            if float(_evaluate(closure)) < loss:
                return True
            scale /= 2
        for p, start in zip(params, origin, strict=True):
            p.copy_(start)
        return False

    def _directions(self, grads: list[Tensor]) -> list[Tensor]:
        """∇p(g) − ∇p(0) in the shapes of the gradients."""
        if self.per == "param":
            return [self._apply(g.flatten()).reshape(g.shape) for g in grads]
        if self.per == "element":
            return [self._apply(g.flatten()[:, None]).reshape(g.shape) for g in grads]
        flat = self._apply(torch.cat([g.flatten() for g in grads]))
        parts = flat.split([g.numel() for g in grads])
        return [part.reshape(g.shape) for part, g in zip(parts, grads, strict=True)]

    def _apply(self, g: Tensor) -> Tensor:
        if getattr(self.preconditioner, "vanishes_at_zero", False):
            step = self.preconditioner(g)
        else:
            at_both = self.preconditioner(torch.stack([g, torch.zeros_like(g)]))
            if at_both.shape != (2, *g.shape):
                raise ValueError(_wrong_shape((2, *g.shape), at_both))
            step = at_both[0] - at_both[1]
        if step.shape != g.shape:
            raise ValueError(_wrong_shape(g.shape, step))
        return step.to(g.dtype)


def _wrong_shape(expected: tuple[int, ...], got: Tensor) -> str:
    return (
        f"preconditioner must return a tensor of the gradient's shape {tuple(expected)}, "
        f"got {tuple(got.shape)}"
    )


def _evaluate(closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        return closure()


def _has_grad(p: Tensor) -> bool:
    if p.grad is not None and p.grad.layout != torch.strided:
        raise ValueError(f"sparse gradients are not supported (parameter of {tuple(p.shape)})")
    return p.grad is not None


def _inner(a: list[Tensor], b: list[Tensor]) -> float:
    """Inner product up to a positive factor, so that gradients of 10^200 do not overflow."""
    largest = max((float(y.abs().max()) for y in b if y.numel()), default=0.0)
    scale = largest if 0 < largest < math.inf else 1.0
    return sum(float((x * (y / scale)).sum()) for x, y in zip(a, b, strict=True))

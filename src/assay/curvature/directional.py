"""How convex a loss is along the direction of travel (Littwin and Wolf, 2020)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.functional import GGNOperator, repeatable
from assay.functional.products import Batch, Selection


@dataclass(frozen=True)
class DirectionalCurvature:
    """The curvature of a loss along one direction d, and the two parts it is made of.

    Args:
        total: κ = dᵀ(∇²L)d / dᵀd.
        gauss_newton: κ_G, the part through the loss's curvature; not negative if it is convex.
        residual: κ_H = κ − κ_G, the part through the model's second derivative; carries all
            negative curvature.
        ratio: |κ_H| / κ_G.
        cos_residual: cosine of the angle between d and Hd; 0 where d is orthogonal to what H makes
            of it, NaN where Hd is zero.

    Example:
        >>> from assay.curvature import DirectionalCurvature
        >>> DirectionalCurvature(2.0, 1.5, 0.5, 1 / 3, 0.1).total
        2.0
    """

    total: float
    gauss_newton: float
    residual: float
    ratio: float
    cos_residual: float


def directional_curvature(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Batch | Iterable[Batch],
    *,
    direction: object = "grad",
    params: Selection = None,
) -> DirectionalCurvature:
    r"""Curvature of the loss along a direction, split into Gauss-Newton and residual part.

    With ∇²L = G + H, G = (1/N) Σ Jᵀ(∇²ℓ)J and H = (1/N) Σ_n Σ_k (∂ℓ_n/∂f_k) ∇²f_k(x_n), this is
    κ_G = dᵀGd/dᵀd and κ_H = dᵀHd/dᵀd. Both come from one linearisation of the model, a pass with
    dual numbers; κ_H is no difference of two large figures, so nothing cancels. Operators without
    a forward-mode derivative fall back to reverse passes.

    The model is evaluated in its present mode. In training mode dropout has one mask, the same in
    all passes, and G of a batch-normalised model is that of the function of the whole batch. Over
    several batches the direction is the gradient over all of them.

    Args:
        model: any module.
        loss_fn: `(output, target) -> scalar`, a mean over the batch, twice differentiable.
        data: one pair `(inputs, targets)`, or an iterable of such that can be iterated again.
        direction: `"grad"`, a vector `(P,)` in the order of `params`, or a mapping from parameter
            names to tensors.
        params: names or a predicate; default all that require a gradient.

    Returns:
        The curvature and its parts.

    Raises:
        ValueError: if the direction is zero (a stationary point has no gradient to follow), not
            finite, or of the wrong size.

    Example:
        >>> import torch
        >>> from assay.curvature import directional_curvature
        >>> line = torch.nn.Linear(1, 1, bias=False)
        >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> found = directional_curvature(line, torch.nn.functional.mse_loss, data)
        >>> found.total, found.residual  # a linear model: all of it is Gauss-Newton
        (10.0, 0.0)

    Reference:
        Littwin, Wolf, "On the Convex Behavior of Deep Neural Networks in Relation to the Layers'
        Width", 2020, arXiv:2001.04878.
    """
    operator = _Split(model, loss_fn, data, params=params)
    if isinstance(direction, str) and direction == "grad" and operator.single:
        unit, gauss_newton, product = operator.split_along_gradient()
    else:
        unit = _unit(_as_vector(operator, direction))
        gauss_newton, product = operator.split(unit)
    residual = float(unit.double() @ product.double())
    length = float(product.double().norm())
    return DirectionalCurvature(
        total=gauss_newton + residual,
        gauss_newton=gauss_newton,
        residual=residual,
        ratio=abs(residual) / gauss_newton if gauss_newton > 0 else float("inf"),
        cos_residual=residual / length if length > 0 else float("nan"),
    )


class CurvatureProbe:
    """Follows the curvature along the gradient while the user's own loop trains.

    Args:
        model: the model that is being trained.
        loss_fn: `(output, target) -> scalar`.
        every: measure at every so many calls of `step`.
        params: see `directional_curvature`.

    Raises:
        ValueError: if `every` < 1.

    Example:
        >>> import torch
        >>> from assay.curvature import CurvatureProbe
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh())
        >>> loss = torch.nn.functional.cross_entropy
        >>> probe = CurvatureProbe(model, loss, every=2)
        >>> for step in range(4):
        ...     probe.step(torch.randn(8, 2), torch.tensor([0, 1] * 4))
        >>> [step for step, _ in probe.history]
        [0, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        every: int = 1,
        params: Selection = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.model = model
        self.loss_fn = loss_fn
        self.every = every
        self.params = params
        self.history: list[tuple[int, DirectionalCurvature]] = []
        self._calls = 0

    def step(self, inputs: Any, targets: Any) -> None:
        """Call once a training step, before the optimizer moves the weights."""
        if self._calls % self.every == 0:
            found = directional_curvature(
                self.model, self.loss_fn, (inputs, targets), params=self.params
            )
            self.history.append((self._calls, found))
        self._calls += 1


class _Split(GGNOperator):
    """Gauss-Newton form and residual product along one direction, from one linearisation."""

    def split(self, d: Tensor) -> tuple[float, Tensor]:
        v = list(self.layout.unflatten(d.to(self.dtype)).values())
        both = self._mean(lambda inputs, targets: self._both(inputs, targets, v))
        return float(both[0]), both[1:]

    def split_along_gradient(self) -> tuple[Tensor, float, Tensor]:
        """The unit gradient of the only batch with its form and product: one pass less."""
        found: list[Tensor] = []

        def one(inputs: Any, targets: Any) -> list[Tensor]:
            params = list(self.params.values())
            outputs, rebuild = self.outputs(inputs)
            # ∂ℓ/∂z held fixed: differentiating once more gives the residual part alone.
            gradient = self.pulled_back(outputs, rebuild, targets)
            unit = _unit(torch.cat([g.detach().reshape(-1) for g in gradient]))
            v = list(self.layout.unflatten(unit).values())
            found.append(unit)
            product = self._pull(gradient, params, v)
            with repeatable(self.model):  # the same dropout masks as in the pass above
                primals, tangents, rebuild = self.linearize(inputs, v)
            bent = self.output_hessian_product(primals, tangents, rebuild, targets)
            return [_inner(tangents, bent), *product]

        both = self._mean(one)
        return found[0], float(both[0]), both[1:]

    def _both(self, inputs: Any, targets: Any, v: list[Tensor]) -> list[Tensor]:
        # Reverse mode through a forward-mode tangent would need one backward pass less, but torch's
        # forward-mode formulas of fused norms take their statistics for constants: its derivative
        # is silently wrong. So the tangent is only read, and H comes from two reverse passes.
        outputs, tangents, rebuild = self.linearize(inputs, v)
        bent = self.output_hessian_product(outputs, tangents, rebuild, targets)
        return [_inner(tangents, bent), *self.residual_product(outputs, rebuild, targets, v)]


def _inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _unit(d: Tensor) -> Tensor:
    norm = float(d.norm())
    if norm == 0:
        raise ValueError("the direction is zero: at a stationary point there is no gradient")
    if not norm < float("inf"):
        raise ValueError(f"the direction is not finite, its norm is {norm}")
    return d / norm


def _as_vector(operator: GGNOperator, direction: object) -> Tensor:
    if isinstance(direction, str):
        if direction != "grad":
            raise ValueError(f"direction must be 'grad', a vector or a mapping, got {direction!r}")
        return operator.gradient()
    if isinstance(direction, Mapping):
        return operator.layout.flatten(direction)
    if isinstance(direction, Tensor) and direction.shape == (operator.numel,):
        return direction.to(operator.device)
    shape = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
    raise ValueError(f"direction must have shape ({operator.numel},), got {shape}")

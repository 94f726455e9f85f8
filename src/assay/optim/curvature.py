"""Optimizers that divide the gradient by curvature: DiagGGN and KFAC."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from assay.curvature import KroneckerFactors, all_reduce_quantities, extend
from assay.curvature.engine import unwrapped
from assay.functional import select_parameters

LR, KL_CLIP = 0.1, 1e-3
"""What steps are without a learning rate of the user's: so long, unless that moves too far."""


class _CurvatureOptimizer(Optimizer):
    """θ ← θ − α [G(θ) + (λ + η) I]⁻¹ (∇L + η θ)."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        lr: float | None,
        damping: float,
        l2: float,
        update_freq: int,
        mc_samples: int | None,
        generator: torch.Generator | None,
        kl_clip: float | None,
        params: Iterable[Any] | None,
    ) -> None:
        if lr is None:
            lr, kl_clip = LR, KL_CLIP if kl_clip is None else kl_clip
        if update_freq < 1:
            raise ValueError(f"update_freq must be at least 1, got {update_freq}")
        if mc_samples is not None and mc_samples < 1:
            raise ValueError(f"mc_samples must be at least 1 or None, got {mc_samples}")
        if kl_clip is not None and not kl_clip > 0:
            raise ValueError(f"kl_clip must be positive or None, got {kl_clip}")
        self.model = model
        self.loss_fn = loss_fn
        self.update_freq = update_freq
        self.mc_samples = mc_samples
        self.generator = generator
        self.kl_clip = kl_clip
        defaults = {"lr": lr, "damping": damping, "l2": l2}
        super().__init__(select_parameters(model).values() if params is None else params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, with settings of their own.

        Args:
            param_group: as of any optimizer: `params`, and perhaps `lr`, `damping`, `l2`.

        Raises:
            ValueError: if a setting is out of its range.
        """
        settings = {**self.defaults, **param_group}
        for name in ("lr", "l2"):
            if not settings[name] >= 0:
                raise ValueError(f"{name} must not be negative, got {settings[name]}")
        if not settings["damping"] > 0:
            raise ValueError(f"damping must be positive, got {settings['damping']}")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """With the model, whose parameters these are."""
        state = super().__getstate__()
        kept = ("model", "loss_fn", "update_freq", "mc_samples", "generator", "kl_clip")
        return {**state, **{name: getattr(self, name) for name in kept}}

    def _quantity(self) -> str:
        raise NotImplementedError

    def _remember(self, state: dict[str, Any], entry: Any, damping: float) -> None:
        raise NotImplementedError

    def _divide(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: clears the gradients, computes the loss from the model, calls `backward()` on
                it, and returns it. Of several backward passes the last gives the curvature.

        Returns:
            The loss.

        Raises:
            TypeError: if there is no closure.
            RuntimeError: if the closure made no backward pass through the model, or a parameter is
                no longer the model's.
        """
        if closure is None:
            raise TypeError("step needs a closure that computes the loss, whose curvature it takes")
        group = self.param_groups[0]
        first = group["params"][0]
        count = int(self.state[first].get("step", 0)) if first in self.state else 0
        if count % self.update_freq == 0 or not self._known_everywhere():
            loss = self._with_curvature(closure)
        else:
            with torch.enable_grad():
                loss = closure()
        self._update(count)
        return loss

    def _names(self) -> dict[Tensor, str]:
        """The parameters that are trained now: those frozen since have no curvature."""
        names = {p: name for name, p in unwrapped(self.model).named_parameters()}
        trained = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        if any(p not in names for p in trained):
            raise RuntimeError(
                "a parameter of the optimizer is not one of the model's: make a new optimizer for "
                "a model whose parameters were replaced"
            )
        return {p: names[p] for p in trained}

    def _known_everywhere(self) -> bool:
        """Whether each state has more than the number of steps."""
        return all(len(self.state.get(p, ())) > 1 for p in self._names())

    def _with_curvature(self, closure: Callable[[], Tensor]) -> Tensor:
        quantity, names = self._quantity(), self._names()
        with (
            torch.enable_grad(),
            extend(
                self.model,
                self.loss_fn,
                [quantity],
                mc_samples=self.mc_samples or 1,
                generator=self.generator,
                params=list(names.values()),
            ) as quantities,
        ):
            loss = closure()
        if quantity not in quantities:
            raise RuntimeError("the closure did not call backward() on a loss of the model")
        found = quantities
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            found = all_reduce_quantities(quantities, self.model.process_group)
        for group in self.param_groups:
            for p in group["params"]:
                if p in names:
                    damping = group["damping"] + group["l2"]
                    self._remember(self.state[p], found[quantity][names[p]], damping)
        return loss

    @torch.no_grad()
    def _update(self, count: int) -> None:
        steps: list[tuple[Tensor, Tensor, float]] = []
        moved = 0.0
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = count + 1
                if p.grad is None:
                    continue
                gradient = p.grad.add(p, alpha=group["l2"]) if group["l2"] else p.grad
                direction = self._divide(state, gradient)
                steps.append((p, direction, group["lr"]))
                if self.kl_clip is not None:
                    moved += group["lr"] ** 2 * float((gradient * direction).sum())
        shortened = 1.0
        if self.kl_clip is not None and moved > self.kl_clip:
            shortened = math.sqrt(self.kl_clip / moved)
        for p, direction, lr in steps:
            p.add_(direction, alpha=-lr * shortened)


class DiagGGN(_CurvatureOptimizer):
    r"""Divide the gradient by the diagonal of the Gauss-Newton matrix.

    θ ← θ − α (∇L + η θ) / (diag G(θ) + λ + η).

    With an `lr` this is the paper's rule, for which it searches a grid: α from 1e-4 to 1, λ from
    1e-4 to 10. No α serves many problems: a diagonal leaves out that parameters act together, so
    that their steps add up to one too far, the further the more they are. So without an `lr` a step
    Δ is shortened until Δᵀ(diag G + λ + η)Δ ≤ κ: as far as this matrix is right, it moves the
    model's distribution by κ/2 nats at most (KL clipping, Ba et al., 2017; κ = 1e-3 as is usual in
    implementations of KFAC). For a loss that is a sum, that is the sum over samples.

    Args:
        model: any module that `assay.curvature` takes; BatchNorm in evaluation mode. Of a
            `DistributedDataParallel`, which closures then call, curvature is averaged as gradients
            are.
        loss_fn: the loss that closures use.
        lr: α; without it 0.1, and `kl_clip`.
        damping: λ.
        l2: η.
        update_freq: steps for which a diagonal serves; the paper computes it at each.
        mc_samples: draws for an unbiased estimate; None for the exact diagonal.
        generator: of the draws.
        kl_clip: κ; 1e-3 if there is no `lr` either, None for whole steps.
        params: parameters or groups, as other optimizers take; default all of the model that
            require a gradient.

    Raises:
        ValueError: if an argument is out of its range, or the model has no parameter to train.

    Example:
        >>> import torch
        >>> from assay.optim import DiagGGN
        >>> model, loss_fn = torch.nn.Linear(1, 1, bias=False), torch.nn.MSELoss()
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> optimizer = DiagGGN(model, loss_fn, lr=1.0, damping=1e-8, mc_samples=None)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = loss_fn(model(x), 3 * x)
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)  # one weight, a quadratic: solved in a step
        >>> abs(model.weight.item() - 3) < 1e-5
        True

    Reference:
        Dangel, Kunstner, Hennig, "BackPACK: Packing more into Backprop", ICLR 2020; Ba, Grosse,
        Martens, "Distributed Second-Order Optimization using Kronecker-Factored Approximations",
        ICLR 2017 (clipping).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        lr: float | None = None,
        damping: float = 1e-2,
        l2: float = 0.0,
        update_freq: int = 1,
        mc_samples: int | None = 1,
        generator: torch.Generator | None = None,
        kl_clip: float | None = None,
        params: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(
            model, loss_fn, lr, damping, l2, update_freq, mc_samples, generator, kl_clip, params
        )

    def _quantity(self) -> str:
        return "diag_ggn" if self.mc_samples is None else "diag_ggn_mc"

    def _remember(self, state: dict[str, Any], entry: Tensor, damping: float) -> None:
        state["inverse"] = 1 / (entry + damping)

    def _divide(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        return gradient * state["inverse"]


class KFAC(_CurvatureOptimizer):
    r"""Divide the gradient by a Kronecker-factored Gauss-Newton matrix.

    For the weight of a layer with factors B ⊗ A,
    θ ← θ − α [(B + √(λ + η)/π I) ⊗ (A + π √(λ + η) I)]⁻¹ (∇L + η θ), with
    π² = (tr A / dim A) / (tr B / dim B); biases and scales have an exact block.

    With an `lr` this is the rule of the BackPACK paper, for which it searches a grid: α from 1e-4
    to 1, λ from 1e-4 to 10. No α serves many problems: blocks leave out that layers act together,
    and B of one draw a sample says nothing in most directions when samples are few or the model is
    sure of its classes; there a step is up to α/λ times the gradient. So without an `lr` a step Δ
    is shortened until ΔᵀĜΔ ≤ κ, with Ĝ the damped blocks: as far as they are right, it moves the
    model's distribution by κ/2 nats at most (KL clipping, Ba et al., 2017; κ = 1e-3 as is usual in
    implementations). For a loss that is a sum, that is the sum over samples.

    Args:
        model: any module that `assay.curvature` takes; BatchNorm in evaluation mode. Of a
            `DistributedDataParallel`, which closures then call, curvature is averaged as gradients
            are.
        loss_fn: the loss that closures use.
        lr: α; without it 0.1, and `kl_clip`.
        damping: λ.
        l2: η.
        update_freq: steps for which factors serve; the paper computes them at each.
        mc_samples: draws for the gradients' factor; None for the exact one (KFLR).
        generator: of the draws.
        kl_clip: κ; 1e-3 if there is no `lr` either, None for whole steps.
        params: parameters or groups, as other optimizers take; default all of the model that
            require a gradient.

    Raises:
        ValueError: if an argument is out of its range, or the model has no parameter to train.

    Example:
        >>> import torch
        >>> from assay.optim import KFAC
        >>> model, loss_fn = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
        >>> x, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> optimizer = KFAC(model, loss_fn, lr=0.5, damping=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = loss_fn(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> first = optimizer.step(closure).item()
        >>> min(optimizer.step(closure).item() for _ in range(20)) < first
        True

    Reference:
        Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", ICML 2015; Botev, Ritter, Barber, "Practical Gauss-Newton Optimisation for Deep
        Learning", ICML 2017 (KFLR); Ba, Grosse, Martens, "Distributed Second-Order Optimization
        using Kronecker-Factored Approximations", ICLR 2017 (clipping).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        lr: float | None = None,
        damping: float = 1e-2,
        l2: float = 0.0,
        update_freq: int = 1,
        mc_samples: int | None = 1,
        generator: torch.Generator | None = None,
        kl_clip: float | None = None,
        params: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(
            model, loss_fn, lr, damping, l2, update_freq, mc_samples, generator, kl_clip, params
        )

    def _quantity(self) -> str:
        return "kflr" if self.mc_samples is None else "kfac"

    def _remember(self, state: dict[str, Any], entry: KroneckerFactors, damping: float) -> None:
        inverse = entry.inv(damping)
        state["left"], state["right"] = inverse.left, inverse.right

    def _divide(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        factors = KroneckerFactors(tuple(gradient.shape), state["left"], state["right"])
        return factors.matmul(gradient)

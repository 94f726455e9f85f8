"""AMSGrad and AdamNC: Adam-type methods whose step sizes cannot grow.

Adam fails on simple convex problems because Γ_t = √V_t/α_t − √V_{t−1}/α_{t−1} can be negative: an
informative large gradient is forgotten faster than the learning rate decays. AMSGrad takes the
running maximum of the second moment; AdamNC lets β2 grow with t. Either keeps Γ_t non-negative.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from assay.optim.projected_adam import (
    Coefficients,
    Options,
    ProjectedAdam,
    Projection,
    check_beta,
    decayed_lr,
    decayed_momentum,
    momentum_mass,
    options_of,
    plain_lr,
    update_,
)

Schedule = Literal["1/t"] | Callable[[Any], Any]


def _amsgrad_coefficients(
    step: Any,
    *,
    lr: Any,
    lr_decay: str | None,
    beta1: float,
    beta1_decay: float | str | None,
    beta2: float,
    corrected: bool,
) -> Coefficients:
    now = decayed_lr(lr, lr_decay, step)
    momentum = decayed_momentum(beta1, beta1_decay, step)
    if not corrected:
        return Coefficients(now, now, momentum, beta2, None)
    mass = momentum_mass(beta1, beta1_decay, step)
    return Coefficients(now, now / mass, momentum, beta2, 1 - beta2**step)


def _adamnc_coefficients(
    step: Any,
    *,
    lr: Any,
    lr_decay: str | None,
    beta1: float,
    beta1_decay: float | str | None,
    schedule: Schedule,
) -> Coefficients:
    beta2 = 1 - 1 / step if schedule == "1/t" else schedule(step)
    if not isinstance(beta2, Tensor) and not 0 <= beta2 <= 1:
        raise ValueError(f"schedule must return β2 in [0, 1], got {beta2} at step {step:.0f}")
    now = decayed_lr(lr, lr_decay, step)
    return Coefficients(now, now, decayed_momentum(beta1, beta1_decay, step), beta2, None)


def amsgrad(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    bias_correction: bool | str = False,
    beta1_decay: float | str | None = None,
    lr_decay: str | None = "sqrt",
    projection: Projection | None = None,
    foreach: bool | None = None,
    fused: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    maximize: bool = False,
) -> None:
    """Functional form of `AMSGrad`: one step, everything updated in place.

    As the functions of `torch.optim` do, it trusts its input and leaves `torch.no_grad` to the
    caller.

    Args:
        params: Parameters.
        grads: Their gradients, dense, same shapes.
        exp_avgs: First moments m.
        exp_avg_sqs: Second moments v, before any bias correction.
        max_exp_avg_sqs: Running maxima v̂.
        state_steps: 0-d tensors, steps made so far; increased by one here.
        lr: α.
        beta1: β1.
        beta2: β2.
        eps: Added to √v̂; with 0, a coordinate whose v̂ is 0 does not move.
        weight_decay: See `AMSGrad`, as for the arguments below.
        decoupled: See `AMSGrad`.
        bias_correction: See `AMSGrad`.
        beta1_decay: See `AMSGrad`.
        lr_decay: See `AMSGrad`.
        projection: See `AMSGrad`.
        foreach: See `AMSGrad`.
        fused: See `AMSGrad`.
        capturable: See `AMSGrad`.
        differentiable: See `AMSGrad`.
        maximize: See `AMSGrad`.

    Example:
        >>> import torch
        >>> x, g = torch.tensor([1.0]), torch.tensor([2.0])
        >>> m, v, highest, step = (torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(()))
        >>> amsgrad([x], [g], [m], [v], [highest], [step], lr=0.1, beta1=0.0, beta2=0.0, eps=0.0)
        >>> x
        tensor([0.9000])

    Reference:
        Reddi, Kale, Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, Algorithm 2.
    """
    symbolic = capturable or torch.compiler.is_compiling()
    coefficients = partial(
        _amsgrad_coefficients,
        lr=plain_lr(lr, symbolic, differentiable),
        lr_decay=lr_decay,
        beta1=beta1,
        beta1_decay=beta1_decay,
        beta2=beta2,
        corrected=bool(bias_correction),
    )
    update_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
        Options(coefficients, eps, weight_decay, decoupled, symbolic, differentiable, maximize),
        projection=projection,
        foreach=foreach,
        fused=fused,
    )


def adamnc(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    schedule: Schedule = "1/t",
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    beta1_decay: float | str | None = None,
    lr_decay: str | None = "sqrt",
    projection: Projection | None = None,
    foreach: bool | None = None,
    fused: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    maximize: bool = False,
) -> None:
    """Functional form of `AdamNC`: one step, everything updated in place.

    Args:
        params: Parameters.
        grads: Their gradients, dense, same shapes.
        exp_avgs: First moments m.
        exp_avg_sqs: Second moments v.
        state_steps: 0-d tensors, steps made so far; increased by one here.
        lr: α.
        beta1: β1.
        schedule: β2_t; see `AdamNC`, as for the arguments below.
        eps: See `AdamNC`.
        weight_decay: See `AdamNC`.
        decoupled: See `AdamNC`.
        beta1_decay: See `AdamNC`.
        lr_decay: See `AdamNC`.
        projection: See `AdamNC`.
        foreach: See `AdamNC`.
        fused: See `AdamNC`.
        capturable: See `AdamNC`.
        differentiable: See `AdamNC`.
        maximize: See `AdamNC`.

    Raises:
        ValueError: If the schedule leaves [0, 1].

    Example:
        >>> import torch
        >>> x, step = torch.tensor([1.0]), torch.zeros(())
        >>> m, v = torch.zeros(1), torch.zeros(1)
        >>> for g in (3.0, 4.0):
        ...     adamnc([x], [torch.tensor([g])], [m], [v], [step], lr=0.1, beta1=0.0)
        >>> v  # the mean of the squares
        tensor([12.5000])

    Reference:
        Reddi, Kale, Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, Algorithm 3.
    """
    symbolic = capturable or torch.compiler.is_compiling()
    coefficients = partial(
        _adamnc_coefficients,
        lr=plain_lr(lr, symbolic, differentiable),
        lr_decay=lr_decay,
        beta1=beta1,
        beta1_decay=beta1_decay,
        schedule=schedule,
    )
    update_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        state_steps,
        Options(coefficients, eps, weight_decay, decoupled, symbolic, differentiable, maximize),
        projection=projection,
        foreach=foreach,
        fused=fused,
    )


class AMSGrad(ProjectedAdam):
    """AMSGrad as the theory has it: the second moment used never decreases.

    With `α_t = lr/√t` (or `lr`), `β1_t` by `beta1_decay`, per coordinate

        m ← β1_t m + (1 − β1_t) g
        v ← β2 v + (1 − β2) g²
        v̂ ← max(v̂, v)
        x ← Π_{F, √v̂}( x − α_t m / (√v̂ + eps) )

    Two differences from `torch.optim.Adam(amsgrad=True)` matter. There the maximum is divided by
    1 − β2^t *after* it was taken, so what divides the step can fall as t grows; here it cannot.
    And α_t decays as 1/√t by default, as in the theorem; pass `lr_decay=None` for a constant rate
    or to leave the rate to a scheduler.

    State per parameter: `step`, `exp_avg` (m), `exp_avg_sq` (v), `max_exp_avg_sq` (v̂), the names
    torch uses, so checkpoints of `torch.optim.Adam` load; they go on without decay, as Adam does.

    Args:
        params: Parameters or parameter groups.
        lr: α, at least 0. A one-element tensor is allowed.
        betas: (β1, β2), each in [0, 1). The theory needs β1 < √β2.
        eps: Added to √v̂ (outside the root). 0 is allowed: a coordinate with v̂ = 0 does not move.
        weight_decay: Coefficient of the L2 penalty, added to the gradient (so it enters m and v).
        decoupled: Apply weight decay to the parameter itself, x ← (1 − α_t·weight_decay) x.
        bias_correction: False (the paper), or "before_max": m is divided by 1 − Π β1_t, and v by
            1 − β2^t *before* the maximum.
        beta1_decay: None (β1 constant), a factor λ (β1_t = β1 λ^(t−1)), or "1/t" (β1_t = β1/t).
        lr_decay: "sqrt" (α_t = lr/√t) or None.
        projection: A `Box`, or a callable `(param, scale) -> Tensor` that returns the point of F
            nearest to `param` in the norm with weights `scale` = √v̂ + eps. The Euclidean projection
            is a different algorithm unless F is a box. Not part of `state_dict`.
        foreach: Use multi-tensor operations; None: on CUDA and XPU only.
        fused: Use one pass over memory: a kernel compiled at its first use on the CPU (float32 and
            float64), torch's own kernel on other devices (not run on GPU here).
        capturable: Keep the step count on the parameter's device, for CUDA graphs (not run on GPU
            here).
        differentiable: Let autograd record the step.
        maximize: Ascend.

    Raises:
        ValueError: If an option is out of range, options exclude each other, or a parameter is
            complex.
        TypeError: If `projection` is not callable.

    Warns:
        UserWarning: If β1 ≥ √β2, where the regret bound is undefined.

    Example:
        >>> import torch
        >>> from assay.optim import AMSGrad, Box
        >>> x = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
        >>> optimizer = AMSGrad([x], lr=1.0, betas=(0.9, 0.99), projection=Box(0.5, 4.0))
        >>> for _ in range(400):
        ...     optimizer.zero_grad()
        ...     (x**2).sum().backward()
        ...     optimizer.step()
        >>> x.detach()  # the minimum of ‖x‖² over the box
        tensor([0.5000, 0.5000])

    Reference:
        Reddi, Kale, Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, Algorithm 2,
        https://arxiv.org/abs/1904.09237.
    """

    _keeps_maximum = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: Sequence[Any] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
        bias_correction: bool | str = False,
        beta1_decay: float | str | None = None,
        lr_decay: str | None = "sqrt",
        projection: object = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "bias_correction": bias_correction,
            "beta1_decay": beta1_decay,
            "lr_decay": lr_decay,
            "projection": projection,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if len(group["betas"]) != 2:
            raise ValueError(f"AMSGrad: betas must be a pair, got {group['betas']!r}")
        beta1, beta2 = group["betas"]
        check_beta(beta1, "AMSGrad: betas[0]")
        check_beta(beta2, "AMSGrad: betas[1]")
        if group["bias_correction"] not in (False, "before_max"):
            raise ValueError(
                "AMSGrad: bias_correction must be False or 'before_max', got "
                f"{group['bias_correction']!r}"
            )
        if beta1 >= math.sqrt(beta2):
            warnings.warn(
                f"AMSGrad: the convergence theory needs β1 < √β2, got β1={beta1}, "
                f"√β2={math.sqrt(beta2):.4g}",
                UserWarning,
                stacklevel=5,
            )

    def _update_group(self, group: dict[str, Any], tensors: tuple[list[Tensor], ...]) -> None:
        beta1, beta2 = group["betas"]
        amsgrad(*tensors, beta1=beta1, beta2=beta2, **options_of(group, "bias_correction"))


class AdamNC(ProjectedAdam):
    """Adam with a β2 that grows with t, so that its step sizes cannot.

    With `α_t = lr/√t` (or `lr`), per coordinate

        m ← β1_t m + (1 − β1_t) g
        v ← β2_t v + (1 − β2_t) g²
        x ← Π_{F, √v}( x − α_t m / (√v + eps) )

    The default β2_t = 1 − 1/t makes v the mean of all squared gradients, hence
    α_t/√v_t = lr/√(Σ g²): Adagrad with momentum. For another schedule the theory asks that √v_t/α_t
    be non-decreasing and at least √(Σ_{j≤t} g_j²)/ζ for some ζ; `assay.analysis.StepSizeMonitor`
    watches the first. A constant schedule is Adam without bias correction, the algorithm of the
    paper's counter-examples.

    There is no bias to correct under 1 − 1/t: v is a plain mean from the first step on.

    Its groups have one `beta1` and neither `betas` nor `momentum`, which torch's cyclic schedulers
    look for: give `OneCycleLR` and `CyclicLR` `cycle_momentum=False`. (The regret bound wants a β1
    that does not rise.)

    Args:
        params: Parameters or parameter groups.
        lr: α, at least 0. A one-element tensor is allowed.
        beta1: β1 in [0, 1).
        eps: Added to √v. 0 is allowed: a coordinate with v = 0 does not move.
        weight_decay: Coefficient of the L2 penalty, added to the gradient.
        schedule: "1/t", or a callable from t = 1, 2, … to β2_t in [0, 1]. With `capturable` and
            under `torch.compile` it is given a 0-d tensor.
        decoupled: Apply weight decay to the parameter itself, x ← (1 − α_t·weight_decay) x.
        beta1_decay: None (β1 constant), a factor λ (β1_t = β1 λ^(t−1)), or "1/t" (β1_t = β1/t).
        lr_decay: "sqrt" (α_t = lr/√t) or None.
        projection: As in `AMSGrad`.
        foreach: As in `AMSGrad`.
        fused: As in `AMSGrad`.
        capturable: As in `AMSGrad`.
        differentiable: As in `AMSGrad`.
        maximize: Ascend.

    Raises:
        ValueError: If an option is out of range, options exclude each other, or a parameter is
            complex.
        TypeError: If `projection` or `schedule` is of the wrong kind.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = AdamNC([x], lr=0.5, beta1=0.0)
        >>> for g in (3.0, 4.0):
        ...     x.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> round(x.item(), 4)  # 1 − 0.5·(3/3 + 4/5)
        0.1

    Reference:
        Reddi, Kale, Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, Algorithm 3,
        https://arxiv.org/abs/1904.09237.
    """

    _keeps_maximum = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        beta1: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        schedule: object = "1/t",
        decoupled: bool = False,
        beta1_decay: float | str | None = None,
        lr_decay: str | None = "sqrt",
        projection: object = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "eps": eps,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "decoupled": decoupled,
            "beta1_decay": beta1_decay,
            "lr_decay": lr_decay,
            "projection": projection,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_beta(group["beta1"], "AdamNC: beta1")
        schedule = group["schedule"]
        if schedule != "1/t" and not callable(schedule):
            raise TypeError(
                f"AdamNC: schedule must be '1/t' or a callable from t to β2_t, got {schedule!r}"
            )

    def _update_group(self, group: dict[str, Any], tensors: tuple[list[Tensor], ...]) -> None:
        params, grads, exp_avgs, exp_avg_sqs, _, steps = tensors
        options = options_of(group, "beta1", "schedule")
        adamnc(params, grads, exp_avgs, exp_avg_sqs, steps, **options)

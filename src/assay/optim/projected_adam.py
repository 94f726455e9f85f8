"""What AMSGrad and AdamNC share: the step in three implementations, state and checkpoints.

Both follow the generic adaptive method with projection. With gradients g_t, a first moment m_t, a
diagonal second moment V_t and a convex set F,

    x_{t+1} = Π_{F, √V_t}( x_t − α_t m_t / √V_t )
    Π_{F, √V}(y) = argmin_{x ∈ F} Σ_i √V_i (x_i − y_i)²

Everything that depends on t alone comes in as `Coefficients`; the implementations (one tensor at a
time, multi-tensor, fused) differ in nothing but speed.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from assay.kernels.adam import SUPPORTED_DTYPES, AdamUpdate, adam_updates_

Projection = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Box:
    """The set `{x : lower ≤ x ≤ upper}`, coordinate by coordinate.

    For a box the projection in any diagonally weighted norm is the clamp, so the weights do not
    matter.

    Args:
        lower: Lower bound, a number or a tensor that broadcasts against the parameter.
        upper: Upper bound, likewise.

    Raises:
        ValueError: If a lower bound exceeds its upper bound.

    Example:
        >>> import torch
        >>> Box(-1.0, 1.0)(torch.tensor([-3.0, 0.5, 2.0]), torch.ones(3))
        tensor([-1.0000,  0.5000,  1.0000])
    """

    lower: float | Tensor
    upper: float | Tensor

    def __post_init__(self) -> None:
        if not bool((torch.as_tensor(self.lower) <= torch.as_tensor(self.upper)).all()):
            raise ValueError(
                f"Box: lower must not exceed upper, got lower={self.lower}, upper={self.upper}"
            )

    def __call__(self, point: Tensor, scale: Tensor) -> Tensor:
        """Return the point of the box nearest to `point`; `scale` plays no part."""
        return point.clamp(self.lower, self.upper)


def decayed_lr(lr: Any, lr_decay: str | None, step: Any) -> Any:
    """Return α_t: `lr` or `lr`/√t. Numbers or tensors, `step` counts from 1."""
    return lr if lr_decay is None else lr / step**0.5


def decayed_momentum(beta1: float, beta1_decay: float | str | None, step: Any) -> Any:
    """Return β1_t: β1, β1·λ^(t−1) or β1/t. `step` counts from 1."""
    if beta1_decay is None:
        return beta1
    if beta1_decay == "1/t":
        return beta1 / step
    return beta1 * beta1_decay ** (step - 1)


def momentum_mass(beta1: float, beta1_decay: float | str | None, step: Any) -> Any:
    """Return 1 − Π_{k≤t} β1_k, the total weight that m_t gives to the gradients."""
    if beta1_decay is None:
        return 1 - beta1**step
    if beta1_decay == "1/t":
        if isinstance(step, Tensor):
            return 1 - beta1**step * torch.exp(-torch.lgamma(step + 1))
        return 1 - beta1**step * math.exp(-math.lgamma(step + 1))
    return 1 - beta1**step * beta1_decay ** (step * (step - 1) / 2)


class Coefficients(NamedTuple):
    """What depends on t alone; numbers, or 0-d tensors where the host must not read t."""

    lr: Any  # α_t
    step_size: Any  # α_t, divided by the mass of m_t if the bias is corrected
    beta1: Any
    beta2: Any
    second_correction: Any  # what v_t is divided by before the maximum is taken


class Options(NamedTuple):
    """What every implementation needs beside the tensors and the coefficients."""

    coefficients: Callable[[Any], Coefficients]
    eps: float
    weight_decay: float
    decoupled: bool
    symbolic: bool  # t stays a tensor: CUDA graphs, torch.compile
    differentiable: bool
    maximize: bool


def _advance(step: Tensor, param: Tensor, options: Options) -> Coefficients:
    """Count one step and return its coefficients."""
    step += 1
    if not options.symbolic:
        return options.coefficients(step.item())
    precise = param.dtype == torch.float64
    return options.coefficients(step.to(param.dtype) if precise else step)


def _average_(average: Tensor, value: Tensor, beta: Any) -> None:
    """Exponential moving average in place: average ← β average + (1 − β) value."""
    if isinstance(beta, Tensor):
        average.mul_(beta).add_(value * (1 - beta))
    else:
        average.mul_(beta).add_(value, alpha=1 - beta)


def _raise_maximum_(maximum: Tensor, candidate: Tensor, differentiable: bool) -> Tensor:
    """Raise the running maximum in place and return a tensor that autograd may keep."""
    if not differentiable:
        return torch.maximum(maximum, candidate, out=maximum)
    highest = torch.maximum(maximum.clone(), candidate.clone())
    maximum.copy_(highest)
    return highest


def _root(second: Tensor, differentiable: bool) -> Tensor:
    """Square root; with autograd its slope at 0 is taken as 0 instead of infinity."""
    if not differentiable:
        return second.sqrt()
    zero = second == 0
    return second.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _single(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    options: Options,
) -> None:
    differentiable = options.differentiable
    for i, param in enumerate(params):
        now = _advance(steps[i], param, options)
        grad = -grads[i] if options.maximize else grads[i]
        if options.weight_decay != 0:
            if options.decoupled:
                param.mul_(1 - now.lr * options.weight_decay)
            else:
                grad = grad.add(param, alpha=options.weight_decay)
        _average_(exp_avgs[i], grad, now.beta1)
        _average_(exp_avg_sqs[i], grad * grad, now.beta2)
        second = exp_avg_sqs[i]
        if max_exp_avg_sqs:
            unbiased = now.second_correction is None
            candidate = second if unbiased else second / now.second_correction
            second = _raise_maximum_(max_exp_avg_sqs[i], candidate, differentiable)
        scale = _root(second, differentiable).add_(options.eps)
        first = exp_avgs[i].clone() if differentiable else exp_avgs[i]
        if options.eps == 0:
            at_rest = scale == 0
            update = (first / scale.masked_fill(at_rest, 1)).masked_fill(at_rest, 0)
        else:
            update = first / scale
        if isinstance(now.step_size, Tensor):
            param.sub_(update * now.step_size)
        else:
            param.sub_(update, alpha=now.step_size)


def _by_kind(params: Sequence[Tensor], steps: Sequence[Tensor], symbolic: bool) -> list[list[int]]:
    """Positions of the parameters, grouped by device, dtype and (where it can be read) step."""
    kinds: dict[tuple[torch.device, torch.dtype, float], list[int]] = {}
    for i, param in enumerate(params):
        step = -1.0 if symbolic else steps[i].item()
        kinds.setdefault((param.device, param.dtype, step), []).append(i)
    return list(kinds.values())


def _foreach(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    options: Options,
) -> None:
    for members in _by_kind(params, steps, options.symbolic):
        now = [_advance(steps[i], params[i], options) for i in members]
        x, g, m, v = (
            [tensors[i] for i in members] for tensors in (params, grads, exp_avgs, exp_avg_sqs)
        )
        if options.maximize:
            g = torch._foreach_neg(g)
        if options.weight_decay != 0:
            if options.decoupled:
                torch._foreach_mul_(x, [1 - c.lr * options.weight_decay for c in now])
            else:
                g = torch._foreach_add(g, x, alpha=options.weight_decay)
        _foreach_average_(m, v, g, now)
        if max_exp_avg_sqs:
            highest = [max_exp_avg_sqs[i] for i in members]
            if now[0].second_correction is not None:
                v = torch._foreach_div(v, [c.second_correction for c in now])
            torch._foreach_maximum_(highest, v)
            v = highest
        scale = torch._foreach_sqrt(v)
        if options.eps == 0:
            # An infinite scale makes the step zero.
            for s in scale:
                s.masked_fill_(s == 0, math.inf)
        else:
            torch._foreach_add_(scale, options.eps)
        torch._foreach_div_(scale, [-c.step_size for c in now])
        torch._foreach_addcdiv_(x, m, scale)


def _foreach_average_(
    m: list[Tensor], v: list[Tensor], g: Sequence[Tensor], now: list[Coefficients]
) -> None:
    """Bring both moments up to date in place."""
    beta1, beta2 = now[0].beta1, now[0].beta2
    if not (isinstance(beta1, Tensor) or isinstance(beta2, Tensor)):
        # Parameters of one group have made the same number of steps: plain numbers serve all.
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        return
    torch._foreach_mul_(m, [c.beta1 for c in now])
    torch._foreach_add_(m, torch._foreach_mul(g, [1 - c.beta1 for c in now]))
    squares = torch._foreach_mul(g, g)
    torch._foreach_mul_(squares, [1 - c.beta2 for c in now])
    torch._foreach_mul_(v, [c.beta2 for c in now])
    torch._foreach_add_(v, squares)


def _fused(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    options: Options,
) -> None:
    """One pass over memory: Assay's kernel on the CPU, torch's own elsewhere."""
    on_cpu: list[tuple[Tensor, Tensor, Moments, Coefficients]] = []
    for i, param in enumerate(params):
        maximum = max_exp_avg_sqs[i] if max_exp_avg_sqs else None
        now = _advance(steps[i], param, options)
        moments = (exp_avgs[i], exp_avg_sqs[i], maximum)
        if param.device.type == "cpu":
            on_cpu.append((param, grads[i], moments, now))
        else:
            _fused_by_torch(param, grads[i], moments, now, options)
    if on_cpu:
        _fused_on_cpu(on_cpu, options)


Moments = tuple[Tensor, Tensor, Tensor | None]


def _fused_on_cpu(
    members: Sequence[tuple[Tensor, Tensor, Moments, Coefficients]], options: Options
) -> None:
    updates, copied = [], []
    for param, grad, moments, now in members:
        if param.dtype not in SUPPORTED_DTYPES:
            raise ValueError(
                "fused=True supports float32 and float64 parameters on the CPU, got "
                f"{param.dtype}; use fused=False"
            )
        tensors = (param, grad, *moments)
        aligned = _aligned(tensors)
        copied += [
            (original, used)
            for original, used in zip((param, *moments), (aligned[0], *aligned[2:]), strict=True)
            if original is not None and used is not original
        ]
        updates.append(
            AdamUpdate(
                *aligned,
                step_size=now.step_size,
                beta1=now.beta1,
                beta2=now.beta2,
                second_correction=1.0 if now.second_correction is None else now.second_correction,
                eps=options.eps,
                weight_decay=0.0 if options.decoupled else options.weight_decay,
                shrink=1 - now.lr * options.weight_decay if options.decoupled else 1.0,
                maximize=options.maximize,
            )
        )
    adam_updates_(updates)
    for original, used in copied:
        original.copy_(used)


def _aligned(tensors: tuple[Tensor | None, ...]) -> Sequence[Any]:
    """The tensors, or copies where one has another layout: the kernel walks memory."""
    if all(t is None or t.is_contiguous() for t in tensors):
        return tensors
    # All need one dense layout, the one torch gives to a copy.
    like = tensors[2]
    assert like is not None
    layout = torch.empty_like(like, device="meta").stride()
    return [
        t if t is None or t.stride() == layout else torch.empty_like(like).copy_(t) for t in tensors
    ]


def _fused_by_torch(
    param: Tensor, grad: Tensor, moments: Moments, now: Coefficients, options: Options
) -> None:
    """Drive torch's fused Adam; not run on GPU here, tested with CPU tensors.

    At step infinity β^t is 0, so torch's own bias correction divides by exactly one.
    """
    if now.second_correction is not None or options.eps == 0:
        raise ValueError(
            f"fused=True on {param.device.type} needs bias_correction=False and eps > 0, got "
            f"eps={options.eps}; use fused=False"
        )
    exp_avg, exp_avg_sq, maximum = moments
    update = torch._fused_adamw_ if options.decoupled else torch._fused_adam_
    update(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [] if maximum is None else [maximum],
        [torch.full((), math.inf, device=param.device)],
        amsgrad=maximum is not None,
        lr=now.step_size,
        beta1=now.beta1,
        beta2=now.beta2,
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=options.maximize,
    )


def update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    options: Options,
    *,
    projection: Projection | None,
    foreach: bool | None,
    fused: bool | None,
) -> None:
    """Make one step in place with the chosen implementation, then project onto F."""
    if foreach is None and fused is None and not options.differentiable:
        foreach = all(param.device.type in ("cuda", "xpu") for param in params)
    if fused and torch.compiler.is_compiling():  # the compiler fuses by itself, and sees no kernel
        foreach, fused = True, False
    implementation = _fused if fused else _foreach if foreach else _single
    implementation(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, options)
    if projection is None:
        return
    for param, second in zip(params, max_exp_avg_sqs or exp_avg_sqs, strict=True):
        if isinstance(projection, Box):
            param.clamp_(projection.lower, projection.upper)
            continue
        scale = _root(second, options.differentiable).add_(options.eps)
        projected = projection(param.clone() if options.differentiable else param, scale)
        if not isinstance(projected, Tensor) or projected.shape != param.shape:
            found = tuple(projected.shape) if isinstance(projected, Tensor) else projected
            raise ValueError(
                f"projection must return a tensor of the parameter's shape {tuple(param.shape)}, "
                f"got {found}"
            )
        param.copy_(projected)


def plain_lr(lr: float | Tensor, symbolic: bool, differentiable: bool) -> float | Tensor:
    """Read a tensor `lr` on the host unless a graph has to keep it."""
    if isinstance(lr, Tensor) and not (symbolic or differentiable):
        return float(lr)
    return lr


def _check_shared(group: dict[str, Any], name: str) -> None:
    """Validate what AMSGrad and AdamNC have in common."""
    lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{name}: lr as a tensor must have one element, got {tuple(lr.shape)}")
    if not lr >= 0:
        raise ValueError(f"{name}: lr must be at least 0, got {lr}")
    if not eps >= 0:
        raise ValueError(f"{name}: eps must be at least 0, got {eps}")
    if not decay >= 0:
        raise ValueError(f"{name}: weight_decay must be at least 0, got {decay}")
    beta1_decay = group["beta1_decay"]
    number = isinstance(beta1_decay, int | float) and 0 < beta1_decay <= 1
    if not (beta1_decay is None or beta1_decay == "1/t" or number):
        raise ValueError(
            f"{name}: beta1_decay must be None, '1/t' or a factor in (0, 1], got {beta1_decay!r}"
        )
    if group["lr_decay"] not in (None, "sqrt"):
        raise ValueError(f"{name}: lr_decay must be None or 'sqrt', got {group['lr_decay']!r}")
    projection = group["projection"]
    if projection is not None and not callable(projection):
        raise TypeError(
            f"{name}: projection must be a Box or a callable (param, scale) -> Tensor, "
            f"got {projection!r}"
        )
    if group["fused"]:
        for other in ("foreach", "differentiable", "capturable"):
            if group[other]:
                raise ValueError(f"{name}: fused=True and {other}=True exclude each other")
    if group["foreach"] and group["differentiable"]:
        raise ValueError(f"{name}: foreach=True and differentiable=True exclude each other")
    for param in group["params"]:
        if not param.is_floating_point():
            raise ValueError(
                f"{name}: parameters must be real floating-point tensors, got {param.dtype}"
                + ("; optimise torch.view_as_real(param)" if param.is_complex() else "")
            )


def check_beta(value: Any, label: str) -> None:
    """Raise a ValueError unless `value` can weigh a moving average."""
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{label} must be a number in [0, 1), got {value!r}")


class ProjectedAdam(Optimizer):
    """Steps, state and checkpoints shared by AMSGrad and AdamNC."""

    _keeps_maximum: bool

    def _check_group(self, group: dict[str, Any]) -> None:
        _check_shared(group, type(self).__name__)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own options if it names any."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> None:
        """Collect what has a gradient; make the state of what is seen for the first time."""
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                raise ValueError(
                    f"{type(self).__name__}: sparse gradients are not supported (parameter of "
                    f"shape {tuple(param.shape)}, layout {param.grad.layout}); "
                    "make them dense, or use torch.optim.SparseAdam"
                )
            state = self.state[param]
            if not state:
                device = param.device if group["capturable"] else "cpu"
                state["step"] = torch.zeros((), dtype=_step_dtype(), device=device)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
                if self._keeps_maximum:
                    state["max_exp_avg_sq"] = torch.zeros_like(param)
            params.append(param)
            grads.append(param.grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            if self._keeps_maximum:
                max_exp_avg_sqs.append(state["max_exp_avg_sq"])
            state_steps.append(state["step"])

    @abstractmethod
    def _update_group(self, group: dict[str, Any], tensors: tuple[list[Tensor], ...]) -> None:
        """Make one step with what `_init_group` collected."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: Clears the gradients, computes the loss, calls `backward` and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: If a gradient is sparse, or the options need another device or dtype.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                tensors: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
                self._init_group(group, *tensors)
                if tensors[0]:
                    self._update_group(group, tensors)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data.

        Callables (`projection`, a `schedule` that is not a name) belong to the program, not to the
        checkpoint: they are left out, and `load_state_dict` keeps the optimizer's own.
        """
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            for key in [key for key, value in group.items() if callable(value)]:
                del group[key]
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, its own or that of `torch.optim.Adam` or `AdamW`.

        From torch's optimizers the moments, the step count, `lr`, `betas`, `eps`, `weight_decay`
        and `maximize` are taken, and `lr_decay=None`: the rate goes on as it was, and does not drop
        to lr/√t at whatever step t the checkpoint is of. Set `lr_decay` of a group afterwards if it
        is to decay. Everything else that torch does not know (`bias_correction`, `projection`, …)
        stays as constructed. Without `amsgrad=True` the running maximum starts at the current
        second moment.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            ValueError: If the groups or the number of parameters differ, or the state is that of
                an optimizer of another kind.
        """
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            super().load_state_dict(state_dict)  # raises, in torch's words
        state = dict(state_dict["state"])
        groups, callables = [], []
        for own, saved in zip(self.param_groups, saved_groups, strict=True):
            foreign = "beta1_decay" not in saved
            self._check_origin(saved, state, foreign)
            known = _from_torch(saved, own) if foreign else saved
            kept = {key: value for key, value in own.items() if key != "params"}
            callables.append({key: value for key, value in kept.items() if callable(value)})
            groups.append({**kept, **known, "params": saved["params"]})
            if foreign:
                for key in saved["params"]:
                    if key in state:
                        state[key] = self._adopt(state[key], groups[-1])
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})
        for group, own in zip(self.param_groups, callables, strict=True):
            group.update(own)  # themselves, not the copies torch makes

    def _check_origin(
        self, saved: dict[str, Any], state: dict[Any, dict[str, Any]], foreign: bool
    ) -> None:
        fits = "betas" in saved if foreign else ("beta1" in saved) == ("beta1" in self.defaults)
        kept = {name for key in saved["params"] for name in state.get(key, ())}
        if not fits or (kept and not kept >= {"step", "exp_avg", "exp_avg_sq"}):
            options = sorted(key for key in saved if key != "params")
            raise ValueError(
                f"state_dict must be of {type(self).__name__} or of torch's Adam or AdamW, got "
                f"that of another optimizer: its state has {sorted(kept) or 'nothing'}, its "
                f"groups have {options}"
            )

    def _adopt(self, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """Translate the state that torch's Adam keeps of one parameter."""
        state = {key: saved[key] for key in ("exp_avg", "exp_avg_sq")}
        step = torch.as_tensor(saved["step"], dtype=_step_dtype())
        state["step"] = step
        if self._keeps_maximum:
            maximum = saved.get("max_exp_avg_sq", saved["exp_avg_sq"])
            if group["bias_correction"] and step > 0:
                # torch divides after the maximum; what it divided by then is v̂ now.
                maximum = maximum / (1 - group["betas"][1] ** step.item())
            state["max_exp_avg_sq"] = maximum.clone()
        return state


def _step_dtype() -> torch.dtype:
    """As torch.optim: float32 unless the default is float64."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _from_torch(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Options of torch's Adam under the names of the group `own`."""
    names = ("lr", "betas", "eps", "weight_decay", "maximize", "initial_lr", "param_names")
    known = {name: saved[name] for name in names if name in saved}
    if "beta1" in own:
        known["beta1"] = known.pop("betas")[0]
    if "decoupled_weight_decay" in saved:
        known["decoupled"] = saved["decoupled_weight_decay"]
    return known | {"lr_decay": None}


_SHARED_OPTIONS = (
    "lr",
    "eps",
    "weight_decay",
    "decoupled",
    "beta1_decay",
    "lr_decay",
    "projection",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "maximize",
)


def options_of(group: dict[str, Any], *more: str) -> dict[str, Any]:
    """Pick the options of a group that the functional forms take: the shared ones and `more`."""
    return {name: group[name] for name in (*_SHARED_OPTIONS, *more)}

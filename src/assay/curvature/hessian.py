"""The diagonal of the Hessian, exact or estimated."""

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from assay.curvature.capture import Step
from assay.curvature.plan import Plan, Source
from assay.curvature.second_order import output_columns
from assay.curvature.steps import LINEAR, PIECEWISE, SCALING, SMOOTH
from assay.curvature.uses import CallUse, MergedUse
from assay.functional import Estimate

HESSIAN = ("diag_hessian", "diag_hessian_mc")
FEWEST_PROBES = 2
"""Random signs for an estimate: one has no standard error."""

LARGEST = 20_000
"""Backward passes that an exact diagonal may cost."""


def hessian_diagonals(
    plan: Plan,
    steps: list[Step],
    inputs: list[Tensor],
    quantities: frozenset[str],
    *,
    probes: int,
    generator: torch.Generator | None,
) -> dict[str, dict]:
    """`diag_hessian` and `diag_hessian_mc`.

    Args:
        plan: of the pass.
        steps: every call between inputs and loss.
        inputs: of the model.
        quantities: some of `HESSIAN`.
        probes: random signs for the estimate.
        generator: of the signs.

    Raises:
        ValueError: if the exact diagonal would cost more than `LARGEST` backward passes, or an
            estimate has fewer than two probes.
    """
    found: dict[str, dict] = {}
    if "diag_hessian" in quantities:
        found["diag_hessian"] = exact_diagonal(plan, steps, inputs)
    if "diag_hessian_mc" in quantities:
        if probes < FEWEST_PROBES:
            raise ValueError(
                f"diag_hessian_mc needs mc_samples of at least {FEWEST_PROBES} for a standard "
                f"error, got {probes}"
            )
        found["diag_hessian_mc"] = _hutchinson(plan, probes, generator)
    return found


def exact_diagonal(plan: Plan, steps: list[Step], inputs: list[Tensor]) -> dict[str, Tensor]:
    """From signed square roots where the graph allows it, else one Hessian column a parameter."""
    size = sum(source.parameter.numel() for source in plan.sources.values())
    bends = _bends(plan, steps, inputs)
    passes = size
    if bends is not None:
        passes = 2 * sum(step.inputs[0].numel() // plan.objective.samples for step in bends)
    if min(passes, size) > LARGEST:
        raise ValueError(
            f"the exact Hessian diagonal would cost {min(passes, size)} backward passes, the limit "
            f"is {LARGEST}: select fewer parameters or estimate it with 'diag_hessian_mc'"
        )
    if bends is not None and passes <= size:
        return _signed_roots(plan, bends)
    return _column_by_column(plan)


def _bends(plan: Plan, steps: list[Step], inputs: list[Tensor]) -> list[Step] | None:
    """The non-linear steps, if all are entry by entry and everything else is linear."""
    if plan.objective.likelihood is None or plan.objective.call is None:
        return None
    for source in plan.sources.values():
        part = source.single
        if source.unused:
            continue
        # Not affine in a parameter that is used twice, one use after the other.
        if part is None or isinstance(part.use, CallUse | MergedUse):
            return None
    known = {id(tensor) for tensor in inputs}
    bends = []
    for step in steps:
        if any(id(t) not in known for t in step.inputs if t.requires_grad):
            return None  # something between was not seen
        known.add(id(step.output))
        if step.function in LINEAR or step.function in PIECEWISE:
            continue
        if step.function in SCALING and len(step.inputs) == 1 and _scales(step):
            continue
        alone = len(step.inputs) == 1 and not step.weights
        if step.function not in SMOOTH or not alone or not step.intact:
            return None
        if step.bottom[0] is not None:
            bends.append(step)
    reached = id(plan.objective.call.output) in known
    return bends if reached else None


def _scales(step: Step) -> bool:
    """Whether a product or quotient is linear in its only sampled argument."""
    name = getattr(step.function, "__name__", "")
    return "div" not in name or step.args[0] is step.inputs[0]


def _signed_roots(plan: Plan, bends: list[Step]) -> dict[str, Tensor]:
    """∇²L = G + Σ over bends of Jᵀ diag(φ''(z) ∂L/∂φ) J, each as a difference of squares."""
    likelihood, output, target, layout, scale = plan.objective.curvature()
    totals = {name: torch.zeros_like(s.parameter) for name, s in plan.sources.items()}
    for column in output_columns(likelihood, output, target, layout):
        _add_squares(plan, totals, get_gradient_edge(output), column, scale)
    if not bends:
        return totals
    slopes = torch.autograd.grad(
        plan.objective.loss,
        [step.top for step in bends],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    samples = plan.objective.samples
    for step, slope in zip(bends, slopes, strict=True):
        z, bottom = step.inputs[0], step.bottom[0]
        assert bottom is not None
        bend = _second_derivative(step) * slope.detach()
        for sign in (1.0, -1.0):
            root = (sign * bend).clamp_min(0).sqrt().reshape(samples, -1)
            for unit in root.any(0).nonzero().flatten().tolist():
                column = torch.zeros_like(root)
                column[:, unit] = root[:, unit]
                _add_squares(plan, totals, bottom, column.view_as(z), sign)
    return totals


def _add_squares(
    plan: Plan,
    totals: dict[str, Tensor],
    output: GradientEdge,
    column: Tensor,
    factor: float,
) -> None:
    gradients = plan.gradients([output], [column])
    for name, source in plan.sources.items():
        part = source.single
        if part is None:
            continue
        V = part.gather(gradients).unsqueeze(0)
        totals[name].add_(part.use.sum_squares(part.slot, V), alpha=factor)


def _second_derivative(step: Step) -> Tensor:
    z = step.inputs[0].detach().requires_grad_()
    args = tuple(z if arg is step.inputs[0] else arg for arg in step.args)
    kwargs = {k: z if arg is step.inputs[0] else arg for k, arg in step.kwargs.items()}
    (first,) = torch.autograd.grad(step.function(*args, **kwargs).sum(), z, create_graph=True)
    if not first.requires_grad:
        return torch.zeros_like(z)
    (second,) = torch.autograd.grad(first.sum(), z, allow_unused=True, materialize_grads=True)
    return second


def _gradient(plan: Plan) -> tuple[list[Source], list[Tensor]]:
    """Parameters and ∇L with a graph of its own."""
    sources = list(plan.sources.values())
    gradient = torch.autograd.grad(
        plan.objective.loss,
        [s.parameter for s in sources],
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return sources, list(gradient)


def _product(sources: list[Source], gradient: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    pairs = [(g, w) for g, w in zip(gradient, v, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(s.parameter) for s in sources]
    outputs, directions = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(
            outputs,
            [s.parameter for s in sources],
            directions,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _column_by_column(plan: Plan) -> dict[str, Tensor]:
    sources, gradient = _gradient(plan)
    found = {}
    for source, slope in zip(sources, gradient, strict=True):
        diagonal = torch.zeros_like(source.parameter).flatten()
        if slope.requires_grad:
            for i, entry in enumerate(slope.flatten()):
                (column,) = torch.autograd.grad(
                    entry,
                    source.parameter,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                diagonal[i] = column.flatten()[i]
        found[source.name] = diagonal.view(source.parameter.shape)
    return found


def _hutchinson(plan: Plan, probes: int, generator: torch.Generator | None) -> dict[str, Estimate]:
    """v ⊙ Hv with random signs v, at the price of one gradient of the gradient each."""
    sources, gradient = _gradient(plan)
    means = [torch.zeros_like(s.parameter) for s in sources]
    squares = [torch.zeros_like(s.parameter) for s in sources]
    for count in range(1, probes + 1):
        signs = [
            torch.randint(2, s.parameter.shape, generator=generator).mul_(2).sub_(1).to(g)
            for s, g in zip(sources, gradient, strict=True)
        ]
        products = _product(sources, gradient, signs)
        for mean, q, v, hv in zip(means, squares, signs, products, strict=True):
            draw = v * hv  # Welford's updates, which do not cancel
            step = draw - mean
            mean.add_(step, alpha=1 / count)
            q.addcmul_(step, draw - mean)
    return {
        source.name: Estimate(mean, (q / (probes * (probes - 1))).sqrt())
        for source, mean, q in zip(sources, means, squares, strict=True)
    }

"""KFRA: the Gauss-Newton matrix averaged over the batch at every layer of a chain."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from assay.curvature.capture import Step, place
from assay.curvature.kronecker import KroneckerFactors
from assay.curvature.plan import Part, Plan
from assay.curvature.second_order import output_columns
from assay.curvature.steps import PIECEWISE_ENTRYWISE, SHAPE_ONLY, SMOOTH
from assay.curvature.uses import ConvUse, LinearUse


def kfra(
    plan: Plan, steps: list[Step], inputs: list[Tensor], *, max_features: int
) -> dict[str, KroneckerFactors]:
    """B = Ḡ at each linear map, with Ḡ ← (1/N) Σ_n J_nᵀ Ḡ J_n from the loss to the input.

    Args:
        plan: of the pass.
        steps: every call between inputs and loss.
        inputs: of the model.
        max_features: largest layer, whose matrix is so many squared.

    Raises:
        ValueError: if the model is no chain of calls with weights in linear maps and convolutions,
            or a layer is too large.

    Reference:
        Botev, Ritter, Barber, "Practical Gauss-Newton Optimisation for Deep Learning", ICML 2017.
    """
    likelihood, output, target, layout, scale = plan.objective.curvature()
    chain = _chain(plan, steps, inputs, output)
    parts = _parts_by_place(plan)
    columns = output_columns(likelihood, output, target, layout)
    samples = plan.objective.samples
    # Under autocast outputs are less precise than parameters, in whose dtype factors are.
    dtypes = [source.parameter.dtype for source in plan.sources.values()]
    flat = columns.reshape(len(columns) * samples, -1).to(max(dtypes, key=lambda d: d.itemsize))
    _check_size(flat.shape[1], max_features)
    G = (flat.T @ flat) * scale
    found: dict[str, KroneckerFactors] = {}
    for depth, step in enumerate(reversed(chain), start=1):
        for part in parts.get(place(step.top), []):
            found[part.weight.roots[0]] = _factors(part, G.to(part.use.dtype))
        if depth == len(chain) or step.bottom[0] is None:
            break
        _check_size(step.inputs[0].numel() // samples, max_features)
        G = _back(step, G, samples)
    for name, source in plan.sources.items():
        if name in found:
            continue
        if not source.unused:
            raise ValueError(f"kfra knows linear maps and convolutions of a chain, not {name!r}")
        size = source.parameter.numel()
        found[name] = KroneckerFactors(
            tuple(source.parameter.shape), source.parameter.new_zeros(1, size)
        )
    return {name: found[name] for name in plan.sources}


def _check_size(features: int, max_features: int) -> None:
    if features > max_features:
        raise ValueError(
            f"kfra needs a matrix of {features} x {features} for a layer with {features} features; "
            f"max_features is {max_features}"
        )


def _chain(plan: Plan, steps: list[Step], inputs: list[Tensor], output: Tensor) -> list[Step]:
    chain: list[Step] = []
    starts = {id(tensor) for tensor in inputs}
    by_place = {place(step.top): step for step in steps}
    current = get_gradient_edge(output)
    while current is not None:
        step = by_place.get(place(current))
        if step is None:
            raise ValueError(
                "kfra needs a chain of calls; what it saw is cut off by a call it did not see or "
                "by one that changed a view in place"
            )
        if len(step.inputs) != 1:
            name = getattr(step.function, "__name__", "a call")
            raise ValueError(f"kfra needs a chain of calls with one input each; {name} is no link")
        chain.append(step)
        current = None if id(step.inputs[0]) in starts else step.bottom[0]
    consumed = [place(edge) for step in steps for edge in step.bottom if edge is not None]
    if len(set(consumed)) != len(consumed):
        raise ValueError("kfra needs a chain: an intermediate result is used more than once")
    return chain[::-1]


def _parts_by_place(plan: Plan) -> dict[tuple[Any, int], list[Part]]:
    found: dict[tuple[Any, int], list[Part]] = {}
    for source in plan.sources.values():
        part = source.single
        if source.unused:
            continue
        if part is None or not isinstance(part.use, LinearUse | ConvUse):
            raise ValueError(
                f"kfra knows linear maps and convolutions of a chain, not {source.name!r}"
            )
        found.setdefault(place(part.use.edge), []).append(part)
    return found


def _factors(part: Part, G: Tensor) -> KroneckerFactors:
    use, shape = part.use, tuple(part.weight.tensor.shape)
    assert isinstance(use, LinearUse | ConvUse)
    features = use.shape[1] if isinstance(use, ConvUse) else use.shape[-1]
    channels_first = isinstance(use, ConvUse)
    positions = len(G) // features
    # Ḡ between (channel, position) pairs.
    split = (features, positions) if channels_first else (positions, features)
    four = G.view(*split, *split)
    if not channels_first:
        four = four.permute(1, 0, 3, 2)
    if part.slot == "bias":
        return KroneckerFactors(shape, four.sum((1, 3)).unsqueeze(0))
    if isinstance(use, ConvUse) and (use.transposed or use.groups > 1):
        raise ValueError("kfra does not know transposed and grouped convolutions")
    same = four.diagonal(dim1=1, dim2=3).sum(-1) / positions
    a = use.activation_covariance("expand")
    left, right = (same.unsqueeze(0), a) if use.grads_left else (a, same.unsqueeze(0))
    return KroneckerFactors(shape, left, right, grads_left=use.grads_left)


def _back(step: Step, G: Tensor, samples: int) -> Tensor:
    z = step.inputs[0]
    if step.function in SHAPE_ONLY:
        return G
    if step.function is F.linear and z.ndim == 2 and len(step.args) > 1:
        weight = step.args[1].detach().to(G.dtype)
        return weight.T @ G @ weight
    if step.function in SMOOTH or step.function in PIECEWISE_ENTRYWISE:
        slope = _row(step, torch.ones_like(step.output)).reshape(samples, -1).to(G.dtype)
        return G * (slope.T @ slope / samples)
    # Row j of every sample's Jacobian at once: output j of all samples.
    size = math.prod(step.output.shape) // samples
    rows = []
    for j in range(size):
        column = torch.zeros_like(step.output).view(samples, -1)
        column[:, j] = 1
        rows.append(_row(step, column.view_as(step.output)).reshape(samples, -1))
    J = torch.stack(rows, 1).to(G.dtype)
    total = G.new_zeros(J.shape[2], J.shape[2])
    for one in J:
        total.addmm_(one.T @ G, one)
    return total / samples


def _row(step: Step, cotangent: Tensor) -> Tensor:
    """Jᵀv of one call."""
    (bottom,) = step.bottom
    assert bottom is not None
    (found,) = torch.autograd.grad(
        [step.top], [bottom], [cotangent], retain_graph=True, allow_unused=True
    )
    if found is None:
        name = getattr(step.function, "__name__", "a call")
        raise ValueError(f"kfra needs a chain; {name} changes a view in place, past what it saw")
    return found

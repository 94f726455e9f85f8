"""Quantities of the samples' gradients: all from one backward pass."""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from assay.curvature.objective import Objective
from assay.curvature.plan import Plan, Source, behind_one
from assay.curvature.uses import MatrixUse, square_norms
from assay.kernels.variance import variance

FIRST_ORDER = ("grad", "grad_batch", "batch_l2", "second_moment", "variance")

CANCELLED = 1 / 64
"""Share of E g² that E g² − (E g)² has to keep: with less of it, too many digits were lost."""

AT_ONCE = 1 << 16
"""Entries of differences that are taken together: few calls, and they stay in the cache."""


def first_order(
    plan: Plan,
    gradients: list[Tensor],
    quantities: frozenset[str],
    buffer: Callable[[str, str, Tensor, int], Tensor | None],
    *,
    consume: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """The quantities asked for, by parameter.

    Args:
        plan: of the pass.
        gradients: ∂ℓ_n at every recorded output.
        quantities: some of `FIRST_ORDER`.
        buffer: `(quantity, parameter, its tensor, samples) -> tensor` to write into, or None.
        consume: whether to let go of each layer's activations and gradients once they have served.
    """
    found: dict[str, dict[str, Tensor]] = {q: {} for q in FIRST_ORDER if q in quantities}
    left = Counter(id(part.use) for source in plan.sources.values() for part in source.parts)
    # Convolutions first, while few results lie beside their unfolded inputs. Else from the last
    # layer to the first, whose activations are the model's inputs and so take no memory.
    order = list(reversed(plan.sources.items()))
    order.sort(key=lambda item: not item[1].unfolds)
    for name, source in order:
        buffers = {q: buffer(q, name, source.parameter, plan.objective.samples) for q in found}
        compute = _from_rows if source.single is None else _from_rules
        own = compute(plan, source, gradients, quantities, buffers)
        for quantity in found:
            found[quantity][name] = own[quantity]
        del own, buffers
        for part in source.parts if consume else ():
            left[id(part.use)] -= 1
            if not left[id(part.use)]:
                part.use.release()
                for place in part.where:
                    gradients[place] = gradients[place].new_empty(0)
    return {q: {name: values[name] for name in plan.sources} for q, values in found.items()}


def _from_rows(
    plan: Plan,
    source: Source,
    gradients: list[Tensor],
    quantities: frozenset[str],
    buffers: dict[str, Tensor | None],
) -> dict[str, Tensor]:
    """Shared and unusual parameters: gradients of all uses are summed before anything else."""
    objective = plan.objective
    outputs, tangents = [], []
    if source.opaque is not None:
        outputs = [tensor for tensor, _ in objective.sources]
        tangents = _output_gradients(plan)
    rows = plan.columns(source, gradients, outputs, tangents)
    own: dict[str, Tensor] = {}
    if "grad_batch" in quantities:
        buffer = buffers["grad_batch"]
        own["grad_batch"] = rows if buffer is None else buffer.copy_(rows)
    if "batch_l2" in quantities:
        own["batch_l2"] = square_norms(rows)
    if {"second_moment", "variance"} & quantities:
        own["second_moment"] = _mean_square(rows)
    mean = rows.mean(0)
    return _finish(own, mean, lambda: (rows,), objective, quantities, buffers)


def _output_gradients(plan: Plan) -> list[Tensor]:
    objective = plan.objective
    tensors = [tensor for tensor, _ in objective.sources]
    found = torch.autograd.grad(
        objective.loss, tensors, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return [g.detach() * objective.per_sample_scale for g in found]


def _from_rules(
    plan: Plan,
    source: Source,
    gradients: list[Tensor],
    quantities: frozenset[str],
    buffers: dict[str, Tensor | None],
) -> dict[str, Tensor]:
    part = source.single
    assert part is not None
    use, slot, samples = part.use, part.slot, plan.objective.samples
    G = part.gather(gradients)
    own: dict[str, Tensor] = {}
    rows: Tensor | None = None
    squares = bool({"second_moment", "variance"} & quantities)
    # An outer product's norm, sum and squares cost less than reading it again.
    outer = isinstance(use, MatrixUse) and use.single_position
    if "grad_batch" in quantities:
        own["grad_batch"] = use.per_sample(slot, G, buffers["grad_batch"])
        rows = None if outer else own["grad_batch"]
    elif squares and "batch_l2" in quantities and not outer and use.cheap_rows(slot):
        rows = use.per_sample(slot, G)
    if "batch_l2" in quantities:
        own["batch_l2"] = use.norms(slot, G) if rows is None else square_norms(rows)
    if squares:
        if rows is None:
            out = buffers.get("second_moment")
            own["second_moment"] = use.sum_squares(slot, behind_one(G), 1 / samples, out)
        else:
            own["second_moment"] = _mean_square(rows)
    mean = source.parameter
    if {"grad", "variance"} & quantities:
        if rows is not None:
            mean = rows.mean(0)
        else:
            mean = use.total(slot, G, 1 / samples, buffers.get("grad"))

    def blocks() -> Iterable[Tensor]:
        kept = own.get("grad_batch", rows)
        return use.blocks(slot, G) if kept is None else (kept,)

    return _finish(own, mean, blocks, plan.objective, quantities, buffers)


def _finish(
    own: dict[str, Tensor],
    mean: Tensor,
    blocks: Callable[[], Iterable[Tensor]],
    objective: Objective,
    quantities: frozenset[str],
    buffers: dict[str, Tensor | None],
) -> dict[str, Tensor]:
    if "variance" in quantities:
        own["variance"], kept = variance(own["second_moment"], mean, CANCELLED, buffers["variance"])
        if not kept:
            own["variance"].copy_(_spread(blocks))
    own["grad"] = mean if objective.reduction == "mean" else mean.mul(objective.samples)
    return own


def _spread(blocks: Callable[[], Iterable[Tensor]]) -> Tensor:
    """(1/N) Σ (g_n − mean)² in two passes, for gradients that differ by less than they measure.

    The mean is that of differences from one of them: exact if all are equal.

    Args:
        blocks: the samples' gradients, some at a time.
    """
    first: Tensor | None = None
    shift, total, samples = torch.zeros(()), torch.zeros(()), 0
    for rows in blocks():
        if first is None:
            first = rows[0].clone()
            shift, total = torch.zeros_like(first), torch.zeros_like(first)
        for some in _split(rows):
            shift += (some - first).sum(0)
        samples += len(rows)
    assert first is not None
    centre = first + shift / samples
    for rows in blocks():
        for some in _split(rows):
            total += (some - centre).square_().sum(0)
    return total / samples


def _split(rows: Tensor) -> Iterable[Tensor]:
    return rows.split(max(1, AT_ONCE // rows[0].numel()))


def _mean_square(rows: Tensor) -> Tensor:
    flat = rows.reshape(len(rows), -1)
    total = torch.zeros_like(flat[0])
    for row in flat:
        total.addcmul_(row, row)
    return total.div_(len(flat)).view(rows.shape[1:])

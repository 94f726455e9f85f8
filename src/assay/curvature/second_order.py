"""Gauss-Newton quantities: the loss's square root, column by column, sent back like a gradient."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from assay.curvature.kronecker import KroneckerFactors
from assay.curvature.layout import Layout
from assay.curvature.plan import ByPlace, Part, Plan, Source
from assay.curvature.uses import EmbeddingUse, LinearUse, MatrixUse, OuterSum, Use
from assay.functional import Likelihood

EXACT = ("diag_ggn", "kflr")
MONTE_CARLO = ("diag_ggn_mc", "kfac")


def second_order(
    plan: Plan,
    quantities: frozenset[str],
    *,
    mc_samples: int,
    generator: torch.Generator | None,
    kfac_approx: str,
    max_features: int,
    buffer: Callable[[str, str], Any],
) -> dict[str, dict]:
    """The Gauss-Newton quantities asked for, by parameter.

    Args:
        plan: of the pass.
        quantities: some of `EXACT` and `MONTE_CARLO`.
        mc_samples: draws from the model's likelihood.
        generator: of the draws.
        kfac_approx: `"expand"` or `"reduce"`.
        max_features: largest dense block of a parameter that is no matrix of a linear map.
        buffer: `(quantity, parameter) -> ` an earlier result to write into, or None.
    """
    found: dict[str, dict] = {}
    for family, exact in ((EXACT, True), (MONTE_CARLO, False)):
        wanted = [quantity for quantity in family if quantity in quantities]
        if not wanted:
            continue
        likelihood, output, target, layout, scale = plan.objective.curvature()
        draws = None if exact else mc_samples
        columns = output_columns(
            likelihood, output, target, layout, draws=draws, generator=generator
        )
        common = _Common(plan.objective.samples, scale, kfac_approx, max_features)
        makers = {
            name: [_maker(q, source, common, buffer(q, name)) for q in wanted]
            for name, source in plan.sources.items()
        }
        for tangents, gradients in plan.column_gradients(output, columns):
            for name, source in plan.sources.items():
                if source.reached(gradients):
                    _add_columns(plan, source, makers[name], gradients, output, tangents)
        for place, quantity in enumerate(wanted):
            found[quantity] = {name: made[place].finish() for name, made in makers.items()}
    return found


def output_columns(
    likelihood: Likelihood,
    output: Tensor,
    target: Tensor,
    layout: Layout,
    *,
    draws: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Columns of the loss's Hessian root at the output, `(K, *output.shape)`.

    Args:
        likelihood: of the loss.
        output: of the model.
        target: of the loss.
        layout: of the output.
        draws: None for the exact root.
        generator: of the draws.
    """
    z = output.detach().to(torch.promote_types(output.dtype, torch.float32))
    if layout.axis:
        z, target = z.movedim(layout.axis, 0), target.movedim(layout.axis, 0)
    if draws is not None:
        columns = likelihood.draw(z, target, draws, generator=generator)
    else:
        columns = likelihood.factor(z, target)
    if layout.axis:
        columns = columns.movedim(1, 1 + layout.axis)
    columns = columns.to(output.dtype)
    if layout.fold == 1 or draws is not None:
        return columns
    # The positions folded into the samples' axis are independent terms of one sample's loss: each
    # gets columns of its own, for the squares must not mix them.
    separate = columns.new_zeros(layout.fold, *columns.shape)
    target_rows, rows = layout.split(separate, 2), layout.split(columns, 1)
    for position in range(layout.fold):
        target_rows[position, :, :, position] = rows[:, :, position]
    return separate.flatten(0, 1)


def _add_columns(
    plan: Plan,
    source: Source,
    makers: list,
    gradients: ByPlace,
    output: Tensor,
    tangents: Tensor,
) -> None:
    rows: Tensor | None = None
    for maker in makers:
        if maker.part is not None:
            maker.add(maker.part.gather(gradients))
            continue
        if rows is None:
            assert isinstance(gradients, list)  # of one column, for the graph is no chain
            rows = plan.columns(source, [g[0] for g in gradients], [output], [tangents[0]])
        maker.add_rows(rows)


@dataclass(frozen=True)
class _Common:
    """What all makers of one family need; `sums` are those that several parameters share."""

    samples: int
    scale: float
    approx: str
    max_features: int
    sums: dict[int, OuterSum] = field(default_factory=dict)
    squares: dict[int, list[Tensor]] = field(default_factory=dict)


def _maker(quantity: str, source: Source, common: _Common, out: Any):
    if quantity in ("diag_ggn", "diag_ggn_mc"):
        return _Diagonal(source, common, out)
    if _is_linear_map(source):
        return _Product(source, common, out)
    return _Block(source, common, out)


def _is_linear_map(source: Source) -> bool:
    part = source.single
    return part is not None and part.use.is_matrix(part.slot)


class _Diagonal:
    """Σ over columns and samples of the squared entries of Jᵀv."""

    def __init__(self, source: Source, common: _Common, out: Tensor | None) -> None:
        self.part = source.single
        self.source = source
        self.scale = common.scale
        self.out = out
        self.total: Tensor | None = None
        self.outer: LinearUse | None = None
        if self.part is not None and isinstance(self.part.use, LinearUse):
            use: Any = self.part.use
            if use.single_position and use.layout.fold == 1:
                # (Σ_k V²)ᵀ A²: one sum over columns and one product for weight and bias.
                self.outer = use
                self.owner = id(use) not in common.squares
                self.squares = common.squares.setdefault(id(use), [])

    def add(self, V) -> None:
        part = self.part
        assert part is not None
        if self.outer is None:
            self._add(part.use.sum_squares(part.slot, V))
        elif self.owner:
            for v in V:
                if self.squares:
                    self.squares[0].addcmul_(v, v)
                else:
                    self.squares.append(v.square())

    def add_rows(self, rows: Tensor) -> None:
        self._add(rows.square().sum(0))

    def _add(self, squares: Tensor) -> None:
        self.total = squares if self.total is None else self.total + squares

    def finish(self) -> Tensor:
        shape = self.source.parameter.shape
        if self.outer is not None and self.squares:
            assert self.part is not None
            squares = self.squares[0]
            if self.part.slot == "bias":
                return self.outer.bias_gradients(squares, 0).sum(0).mul_(self.scale)
            left = self.outer.gradients(squares, 0)
            return self.outer.outer_squares(left, self.scale, self.out).view(shape)
        if self.total is None:
            return torch.zeros_like(self.source.parameter, requires_grad=False)
        return self.total.view(shape).mul_(self.scale)


class _Product:
    """B ⊗ A of the matrix of a linear map."""

    def __init__(self, source: Source, common: _Common, out: KroneckerFactors | None) -> None:
        self.part: Part | None = source.single
        self.source = source
        self.common = common
        self.out = out
        self.sum: OuterSum | None = None
        self.owner = True

    def add(self, V) -> None:
        assert self.part is not None
        use: Any = self.part.use
        if isinstance(use, EmbeddingUse):
            x = use.rows(V, 1).flatten(0, 1).mT.unsqueeze(1)
        else:
            x = use.gradients(V, 1).flatten(0, 1)
            if self.common.approx == "reduce":
                x = x.sum(-1, keepdim=True)
        if self.sum is None:
            self._start(use, x.shape[-1])
        if self.owner and self.sum is not None:
            self.sum.add(x)

    def _start(self, use: Use, positions: int) -> None:
        out = None
        if self.out is not None:
            out = self.out.left if self.out.grads_left else self.out.right
        self.owner = id(use) not in self.common.sums
        fresh = OuterSum(self.common.scale / max(1, positions), out)
        # With one position the bias has the same block: it is computed once.
        self.sum = self.common.sums.setdefault(id(use), fresh) if positions == 1 else fresh
        self.owner = self.owner or positions > 1

    def finish(self) -> KroneckerFactors:
        assert self.part is not None
        use: Any = self.part.use
        shape = tuple(self.source.parameter.shape)
        if isinstance(use, EmbeddingUse):
            a, grads_left = self._token_counts(use) / self.common.samples, False
        else:
            grads_left = use.grads_left
            out = None
            if self.out is not None:
                out = self.out.right if grads_left else self.out.left
            a = use.activation_covariance(self.common.approx, out)
        B = None if self.sum is None else self.sum.finish()
        if B is None:  # a loss without columns, such as one class
            features = math.prod(shape) // (a.shape[0] * a.shape[1])
            B = a.new_zeros(len(a), features, features)
        left, right = (B, a) if grads_left else (a, B)
        return KroneckerFactors(shape, left, right, grads_left=grads_left)

    def _token_counts(self, use: EmbeddingUse) -> Tensor:
        tokens = use.tokens().flatten()
        counts = torch.bincount(tokens, minlength=len(self.source.parameter))
        if use.padding_idx is not None:
            counts[use.padding_idx] = 0
        return counts.to(self.source.parameter.dtype).unsqueeze(0)


class _Block:
    """The exact block of a bias, a scale, or whatever is no matrix; its diagonal if it is large."""

    def __init__(self, source: Source, common: _Common, out: KroneckerFactors | None) -> None:
        self.part = source.single
        self.source = source
        self.common = common
        self.out = out
        self.dense = source.parameter.numel() <= common.max_features
        self.sum: OuterSum | None = None
        self.owner = True
        self.diagonal: Tensor | None = None

    def add(self, V) -> None:
        assert self.part is not None
        use, slot = self.part.use, self.part.slot
        if not self.dense:
            self._add_diagonal(use.sum_squares(slot, V).flatten())
            return
        if self.sum is None and isinstance(use, MatrixUse) and _shares(use, slot):
            self.owner = id(use) not in self.common.sums
            fresh = OuterSum(self.common.scale, None if self.out is None else self.out.left)
            self.sum = self.common.sums.setdefault(id(use), fresh)
        if self.owner:
            self.add_rows(use.columns(slot, V).flatten(0, 1))

    def add_rows(self, rows: Tensor) -> None:
        rows = rows.reshape(len(rows), -1)
        if not self.dense:
            self._add_diagonal(rows.square().sum(0))
            return
        if self.sum is None:
            out = None if self.out is None else self.out.left
            self.sum = OuterSum(self.common.scale, out)
        self.sum.add(rows[:, None, :, None])

    def _add_diagonal(self, squares: Tensor) -> None:
        self.diagonal = squares if self.diagonal is None else self.diagonal + squares

    def finish(self) -> KroneckerFactors:
        parameter = self.source.parameter.detach()
        if self.dense:
            block = None if self.sum is None else self.sum.finish()
            if block is None:
                block = parameter.new_zeros(1, parameter.numel(), parameter.numel())
        elif self.diagonal is None:
            block = parameter.new_zeros(1, parameter.numel())
        else:
            block = self.diagonal.mul(self.common.scale).unsqueeze(0)
        return KroneckerFactors(tuple(parameter.shape), block)


def _shares(use: MatrixUse, slot: str) -> bool:
    """Whether the bias's columns are the gradients that the weight's factor is made of."""
    return (
        slot == "bias"
        and "weight" in use.slots
        and use.slots["weight"].direct
        and use.groups == 1
        and use.single_position
    )

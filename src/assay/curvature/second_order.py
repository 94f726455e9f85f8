"""Gauss-Newton quantities: the loss's square root, column by column, sent back like a gradient."""

import math

import torch
from torch import Tensor

from assay.curvature.kronecker import KroneckerFactors
from assay.curvature.layout import Layout
from assay.curvature.plan import Part, Plan, Source
from assay.curvature.uses import EmbeddingUse, MatrixUse, outer_sum, summed_products

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
) -> dict[str, dict]:
    """The Gauss-Newton quantities asked for, by parameter.

    Args:
        plan: of the pass.
        quantities: some of `EXACT` and `MONTE_CARLO`.
        mc_samples: draws from the model's likelihood.
        generator: of the draws.
        kfac_approx: `"expand"` or `"reduce"`.
        max_features: largest dense block of a parameter that is no matrix of a linear map.
    """
    found: dict[str, dict] = {}
    for family, exact in ((EXACT, True), (MONTE_CARLO, False)):
        wanted = [quantity for quantity in family if quantity in quantities]
        if not wanted:
            continue
        likelihood, output, target, layout, scale = plan.objective.curvature()
        z = output.detach().to(torch.promote_types(output.dtype, torch.float32))
        if exact:
            columns = separate_positions(likelihood.factor(z, target), layout)
        else:
            columns = likelihood.draw(z, target, mc_samples, generator=generator)
        makers = {
            name: [_maker(quantity, source, plan, kfac_approx, max_features) for quantity in wanted]
            for name, source in plan.sources.items()
        }
        for column in columns:
            tangent = column.to(output.dtype)
            gradients = plan.gradients([output], [tangent])
            for name, source in plan.sources.items():
                _add_column(plan, source, makers[name], gradients, output, tangent)
        for place, quantity in enumerate(wanted):
            found[quantity] = {name: made[place].finish(scale) for name, made in makers.items()}
    return found


def separate_positions(columns: Tensor, layout: Layout) -> Tensor:
    """One column for each position of a sample, if the output has several.

    The loss's Hessian has a block for each position (token, pixel) of a sample. A column that is
    non-zero at several of them would, once squared, mix them.

    Args:
        columns: `(K, *output.shape)`, with S Sᵀ right for each position by itself.
        layout: of the output; the classes are its dimension 1 unless it is folded.
    """
    rest = layout.split(columns, 1)
    # (K, N, fold, C) or (K, N, C, positions...)
    where = (2,) if layout.fold > 1 else tuple(range(3, rest.ndim))
    positions = math.prod(rest.shape[d] for d in where)
    if positions <= 1:
        return columns
    occupied = rest.ne(0).any(1)  # columns of a likelihood that are separate already stay so
    flat = occupied.movedim([d - 1 for d in where], range(1, 1 + len(where)))
    if bool((flat.flatten(1, len(where)).flatten(2).any(2).sum(1) <= 1).all()):
        return columns
    out = columns.new_zeros(positions, *columns.shape)
    target = layout.split(out, 2).movedim([d + 1 for d in where], range(1, 1 + len(where)))
    source = rest.movedim(where, range(len(where)))
    target = target.flatten(1, len(where)) if len(where) > 1 else target
    source = source.flatten(0, len(where) - 1) if len(where) > 1 else source
    for position in range(positions):
        target[position, position] = source[position]
    return out.flatten(0, 1)


def _add_column(
    plan: Plan,
    source: Source,
    makers: list,
    gradients: list[Tensor],
    output: Tensor,
    tangent: Tensor,
) -> None:
    rows: Tensor | None = None
    for maker in makers:
        if maker.part is not None:
            maker.add(maker.part.gather(gradients))
            continue
        if rows is None:
            rows = plan.columns(source, gradients, [output], [tangent])
        maker.add_rows(rows)


def _maker(quantity: str, source: Source, plan: Plan, approx: str, max_features: int):
    if quantity in ("diag_ggn", "diag_ggn_mc"):
        return _Diagonal(source)
    if _is_linear_map(source):
        return _Product(source, plan, approx)
    return _Block(source, max_features)


def _is_linear_map(source: Source) -> bool:
    part = source.single
    return part is not None and part.use.is_matrix(part.slot)


class _Diagonal:
    """Σ over columns and samples of the squared entries of Jᵀv."""

    def __init__(self, source: Source) -> None:
        self.part = source.single
        self.source = source
        self.total: Tensor | None = None
        use = None if self.part is None else self.part.use
        matrix = isinstance(use, MatrixUse) and use.is_matrix(self.part.slot)  # type: ignore[union-attr]
        self.outer = use if matrix and use.single_position else None  # type: ignore[union-attr]

    def add(self, V) -> None:
        part = self.part
        assert part is not None
        if self.outer is not None:  # (Σ_k V²)ᵀ A²: one product for all columns
            square = self.outer.gradients(V, 0).square()
            self.total = square if self.total is None else self.total.add_(square)
            return
        lead = [v.unsqueeze(0) for v in V] if isinstance(V, list) else V.unsqueeze(0)
        self._add(part.use.sum_squares(part.slot, lead))

    def add_rows(self, rows: Tensor) -> None:
        self._add(rows.square().sum(0))

    def _add(self, squares: Tensor) -> None:
        self.total = squares if self.total is None else self.total.add_(squares)

    def finish(self, scale: float) -> Tensor:
        if self.total is None:
            return torch.zeros_like(self.source.parameter)
        if self.outer is not None:
            a = self.outer.activations().square()
            left, right = (self.total, a) if self.outer.grads_left else (a, self.total)
            total = summed_products(left, right)
        else:
            total = self.total
        return total.view(self.source.parameter.shape) * scale


class _Product:
    """B ⊗ A of the matrix of a linear map."""

    def __init__(self, source: Source, plan: Plan, approx: str) -> None:
        self.part: Part | None = source.single
        self.source = source
        self.samples = plan.objective.samples
        self.approx = approx
        self.total: Tensor | None = None
        self.positions = 1

    def add(self, V) -> None:
        assert self.part is not None
        use = self.part.use
        if isinstance(use, EmbeddingUse):
            x = use.rows(V, 0).mT.unsqueeze(1)
        else:
            x = use.gradients(V, 0)  # type: ignore[attr-defined]
        if self.approx == "reduce" and not isinstance(use, EmbeddingUse):
            x = x.sum(-1, keepdim=True)
        self.positions = x.shape[-1]
        outer = outer_sum(x)
        self.total = outer if self.total is None else self.total.add_(outer)

    def finish(self, scale: float) -> KroneckerFactors:
        assert self.part is not None
        use = self.part.use
        shape = tuple(self.source.parameter.shape)
        if isinstance(use, EmbeddingUse):
            counts = self._token_counts(use)
            width = shape[1]
            total = counts.new_zeros(1, width, width) if self.total is None else self.total
            return KroneckerFactors(shape, counts / self.samples, total * (scale / self.positions))
        a = use.activation_covariance(self.approx)  # type: ignore[attr-defined]
        if self.total is None:
            features = math.prod(shape) // (a.shape[0] * a.shape[1])
            self.total = a.new_zeros(len(a), features, features)
        B = self.total * (scale / self.positions)
        left, right = (B, a) if use.grads_left else (a, B)  # type: ignore[attr-defined]
        return KroneckerFactors(shape, left, right)

    def _token_counts(self, use: EmbeddingUse) -> Tensor:
        tokens = use.tokens().flatten()
        counts = torch.bincount(tokens, minlength=len(self.source.parameter))
        if use.padding_idx is not None:
            counts[use.padding_idx] = 0
        return counts.to(self.source.parameter.dtype).unsqueeze(0)


class _Block:
    """The exact block of a bias, a scale, or whatever is no matrix; its diagonal if it is large."""

    def __init__(self, source: Source, max_features: int) -> None:
        self.part = None
        self.source = source
        self.dense = source.parameter.numel() <= max_features
        self.bias = source.single
        if self.bias is not None:
            self.part = self.bias
        size = source.parameter.numel()
        shape = (1, size, size) if self.dense else (1, size)
        self.total = source.parameter.detach().new_zeros(shape)

    def add(self, V) -> None:
        assert self.bias is not None
        lead = [v.unsqueeze(0) for v in V] if isinstance(V, list) else V.unsqueeze(0)
        if not self.dense:
            self.total += self.bias.use.sum_squares(self.bias.slot, lead).flatten()
            return
        self.add_rows(self.bias.use.columns(self.bias.slot, lead)[0])

    def add_rows(self, rows: Tensor) -> None:
        rows = rows.flatten(1)
        if self.dense:
            self.total[0].addmm_(rows.T, rows)
        else:
            self.total += rows.square().sum(0)

    def finish(self, scale: float) -> KroneckerFactors:
        return KroneckerFactors(tuple(self.source.parameter.shape), self.total * scale)

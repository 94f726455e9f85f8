"""Gauss-Newton quantities: the loss's square root, column by column, sent back like a gradient."""

import math

import torch
from torch import Tensor

from assay.curvature.kronecker import KroneckerFactors
from assay.curvature.layout import Layout
from assay.curvature.plan import Part, Plan, Source
from assay.curvature.uses import EmbeddingUse, MatrixUse, OuterSum, summed_products
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
        draws = None if exact else mc_samples
        columns = output_columns(
            likelihood, output, target, layout, draws=draws, generator=generator
        )
        makers = {
            name: [_maker(quantity, source, plan, kfac_approx, max_features, scale) for quantity in wanted]
            for name, source in plan.sources.items()
        }
        for tangent in columns:
            gradients = plan.gradients([output], [tangent])
            for name, source in plan.sources.items():
                _add_column(plan, source, makers[name], gradients, output, tangent)
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


def _maker(
    quantity: str, source: Source, plan: Plan, approx: str, max_features: int, scale: float
):
    if quantity in ("diag_ggn", "diag_ggn_mc"):
        return _Diagonal(source, scale)
    if _is_linear_map(source):
        return _Product(source, plan, approx, scale)
    return _Block(source, max_features, scale)


def _is_linear_map(source: Source) -> bool:
    part = source.single
    return part is not None and part.use.is_matrix(part.slot)


class _Diagonal:
    """Σ over columns and samples of the squared entries of Jᵀv."""

    def __init__(self, source: Source, scale: float) -> None:
        self.part = source.single
        self.source = source
        self.scale = scale
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

    def finish(self) -> Tensor:
        if self.total is None:
            return torch.zeros_like(self.source.parameter, requires_grad=False)
        if self.outer is not None:
            return self.outer.outer_squares(self.total, self.scale).view(
                self.source.parameter.shape
            )
        return self.total.view(self.source.parameter.shape).mul_(self.scale)


class _Product:
    """B ⊗ A of the matrix of a linear map."""

    def __init__(self, source: Source, plan: Plan, approx: str, scale: float) -> None:
        self.part: Part | None = source.single
        self.source = source
        self.samples = plan.objective.samples
        self.approx = approx
        self.scale = scale
        self.sum: OuterSum | None = None

    def add(self, V) -> None:
        assert self.part is not None
        use = self.part.use
        if isinstance(use, EmbeddingUse):
            x = use.rows(V, 0).mT.unsqueeze(1)
        else:
            x = use.gradients(V, 0)  # type: ignore[attr-defined]
        if self.approx == "reduce" and not isinstance(use, EmbeddingUse):
            x = x.sum(-1, keepdim=True)
        positions = x.shape[-1]
        if self.sum is None:
            self.sum = OuterSum(self.scale / positions)
        self.sum.add(x)

    def finish(self) -> KroneckerFactors:
        assert self.part is not None
        use = self.part.use
        shape = tuple(self.source.parameter.shape)
        if isinstance(use, EmbeddingUse):
            a, grads_left = self._token_counts(use) / self.samples, False
        else:
            a = use.activation_covariance(self.approx)  # type: ignore[attr-defined]
            grads_left = use.grads_left  # type: ignore[attr-defined]
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

    def __init__(self, source: Source, max_features: int, scale: float) -> None:
        self.part = source.single
        self.source = source
        self.scale = scale
        self.dense = source.parameter.numel() <= max_features
        size = source.parameter.numel()
        shape = (1, size, size) if self.dense else (1, size)
        self.total = source.parameter.detach().new_zeros(shape)

    def add(self, V) -> None:
        assert self.part is not None
        lead = [v.unsqueeze(0) for v in V] if isinstance(V, list) else V.unsqueeze(0)
        if not self.dense:
            self.total += self.part.use.sum_squares(self.part.slot, lead).flatten()
            return
        self.add_rows(self.part.use.columns(self.part.slot, lead)[0])

    def add_rows(self, rows: Tensor) -> None:
        rows = rows.flatten(1)
        if self.dense:
            self.total[0].addmm_(rows.T, rows)
        else:
            self.total += rows.square().sum(0)

    def finish(self) -> KroneckerFactors:
        return KroneckerFactors(tuple(self.source.parameter.shape), self.total.mul_(self.scale))

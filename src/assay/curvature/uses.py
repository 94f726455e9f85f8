"""What a parameter does in one call of a torch function, and the derivatives that follow."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from assay.curvature.layout import Layout
from assay.kernels.outer_products import outer_products

SCRATCH = 1 << 22
"""Entries of the temporary tensors that are reduced at once; 16 MB of float32."""


Gradients = Any
"""A tensor; for a use that was merged from several a list, one tensor for each."""


@dataclass(frozen=True)
class Weight:
    """A selected parameter, or a tensor computed from such alone (a transpose, a masked copy).

    Args:
        tensor: itself.
        roots: names of the parameters it comes from.
        direct: whether it is the parameter.
    """

    tensor: Tensor
    roots: tuple[str, ...]
    direct: bool


@dataclass(eq=False)
class Use:
    """One call `z = function(..., weights, ...)`.

    For a slot (an argument that is a weight w) and gradients or columns V at the output z, the
    methods give what belongs to w. G has z's shape; V has it behind a leading K. A result may be
    written into `out`, but need not be.
    """

    slots: dict[str, Weight]
    shape: torch.Size
    edge: GradientEdge
    feature_dims: int = 1
    probe: bool = False
    layout: Layout = field(default_factory=lambda: Layout(1))
    saved: list[tuple[Tensor, int]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """In which derivatives are computed: the weights', whatever autocast made of them."""
        return next(iter(self.slots.values())).tensor.dtype

    @property
    def intact(self) -> bool:
        """Whether no saved input was changed in place since."""
        return all(tensor._version == version for tensor, version in self.saved)

    def release(self) -> None:
        """Let go of what the call was given: the use has served."""
        self.saved = []

    def fits(self, layout: Layout) -> bool:
        """Whether the rule holds if the samples sit there."""
        return True

    def is_matrix(self, slot: str) -> bool:
        """Whether the weight is the matrix of a linear map, possibly repeated over positions."""
        return False

    def columns(self, slot: str, V: Gradients) -> Tensor:
        """Jᵀv of each column and sample, `(K, N, *w.shape)`."""
        raise NotImplementedError

    def per_sample(self, slot: str, G: Gradients, out: Tensor | None = None) -> Tensor:
        """The gradient of each sample, `(N, *w.shape)`."""
        result = self.columns(slot, G.unsqueeze(0))[0]
        return result if out is None else out.copy_(result)

    def blocks(self, slot: str, G: Gradients) -> Iterator[Tensor]:
        """The same, some samples at a time, `(n, *w.shape)`."""
        yield self.per_sample(slot, G)

    def total(
        self, slot: str, G: Gradients, scale: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """The sum of the samples' gradients, times `scale`."""
        return self.per_sample(slot, G).sum(0).mul_(scale)

    def sum_squares(
        self, slot: str, V: Gradients, scale: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """The squares of `columns`, summed over columns and samples, times `scale`."""
        total = torch.zeros_like(self.slots[slot].tensor, requires_grad=False)
        for v in V:
            total += self.columns(slot, v.unsqueeze(0)).square().sum((0, 1))
        return total.mul_(scale)

    def cheap_rows(self, slot: str) -> bool:
        """Whether all samples' gradients at once are small enough to be kept for a while."""
        return self.layout.samples * self.slots[slot].tensor.numel() <= SCRATCH

    def norms(self, slot: str, G: Gradients) -> Tensor:
        """‖gradient‖² of each sample, `(N,)`."""
        return square_norms(self.per_sample(slot, G))


def square_norms(rows: Tensor) -> Tensor:
    """‖·‖² of each entry of the first dimension."""
    rows = rows.reshape(len(rows), -1)
    return torch.linalg.vector_norm(rows, dim=1).square_()


# -- linear maps ---------------------------------------------------------------------------------


@dataclass(eq=False)
class MatrixUse(Use):
    """A linear map that meets the sample at T positions: z_t = W a_t + b, convolutions included.

    A sample's gradient is Σ_t g_t a_tᵀ. Activations are `(N, groups, a, T)`, gradients
    `(..., N, groups, b, T)`.
    """

    input: Tensor = field(default_factory=lambda: torch.empty(0))
    grads_left: bool = True
    groups: int = 1
    _activations: Tensor | None = None
    _squares: Tensor | None = None
    _covariances: dict[str, Tensor] = field(default_factory=dict)

    def release(self) -> None:
        """See `Use`."""
        self.saved, self.input = [], self.input.new_empty(0)
        self._activations = self._squares = None
        self._covariances = {}

    def is_matrix(self, slot: str) -> bool:
        """See `Use`."""
        return slot == "weight"

    def activations(self) -> Tensor:
        """What the matrix is multiplied with, computed once."""
        if self._activations is None:
            self._activations = self._compute_activations()
        return self._activations

    @property
    def single_position(self) -> bool:
        """Whether a sample's gradient is an outer product."""
        return self.activations().shape[-1] == 1

    def activation_covariance(self, approx: str, out: Tensor | None = None) -> Tensor:
        """A = (1/N) Σ aaᵀ over samples and positions, or of positions' means; computed once."""
        if approx not in self._covariances:
            a = self.activations()
            if approx == "reduce":
                a = a.mean(-1, keepdim=True)
            total = OuterSum(1 / len(a), out)
            total.add(a)
            covariance = total.finish()
            assert covariance is not None
            self._covariances[approx] = covariance
        return self._covariances[approx]

    def _compute_activations(self) -> Tensor:
        raise NotImplementedError

    def gradients(self, V: Gradients, lead: int) -> Tensor:
        """What the activations are paired with."""
        raise NotImplementedError

    def bias_gradients(self, V: Gradients, lead: int) -> Tensor:
        """`(*lead, N, features)`: summed over positions."""
        gradients = self.gradients(V, lead)
        if gradients.shape[-1] == 1:
            return gradients.squeeze(-1).flatten(lead + 1)
        return gradients.sum(-1).flatten(lead + 1)

    def _pair(self, V: Gradients, lead: int) -> tuple[Tensor, Tensor]:
        """Left and right factor of Σ_t left_t right_tᵀ; one of them has the leading dimensions."""
        a, g = self.activations(), self.gradients(V, lead)
        return (g, a) if self.grads_left else (a, g)

    def columns(self, slot: str, V: Gradients) -> Tensor:
        """See `Use`."""
        if slot == "bias":
            return self.bias_gradients(V, 1)
        left, right = self._pair(V, 1)
        product = torch.matmul(left, right.mT)
        return product.reshape(*product.shape[:2], *self.slots[slot].tensor.shape)

    def per_sample(self, slot: str, G: Gradients, out: Tensor | None = None) -> Tensor:
        """See `Use`."""
        if slot == "bias":
            rows = self.bias_gradients(G, 0)
            return rows if out is None else out.copy_(rows)
        left, right = self._pair(G, 0)
        samples, groups, m, positions = left.shape
        n = right.shape[2]
        used_before = out is not None
        if out is None:
            out = left.new_empty((samples, *self.slots[slot].tensor.shape))
        target = out.view(samples * groups, m, n)
        left = left.reshape(len(target), m, positions)
        right = right.reshape(len(target), n, positions)
        if positions == 1 and used_before:
            outer_products(left.squeeze(2), right.squeeze(2), target)
        else:
            torch.bmm(left, right.mT, out=target)
        return out

    def blocks(self, slot: str, G: Gradients) -> Iterator[Tensor]:
        """See `Use`."""
        if slot == "bias":
            yield self.bias_gradients(G, 0)
            return
        left, right = self._pair(G, 0)
        shape = self.slots[slot].tensor.shape
        size = max(1, SCRATCH // shape.numel())
        for some, others in zip(left.split(size), right.split(size), strict=True):
            yield torch.matmul(some, others.mT).view(-1, *shape)

    def total(
        self, slot: str, G: Gradients, scale: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """See `Use`."""
        if slot == "bias":
            return self.bias_gradients(G, 0).sum(0).mul_(scale)
        left, right = self._pair(G, 0)
        return summed_products(left, right, scale, out).view(self.slots[slot].tensor.shape)

    def sum_squares(
        self, slot: str, V: Gradients, scale: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """See `Use`."""
        shape = self.slots[slot].tensor.shape
        if slot == "bias":
            return self.bias_gradients(V, 1).square().sum((0, 1)).mul_(scale).view(shape)
        a, g = self.activations(), self.gradients(V, 1)
        if a.shape[-1] == 1:  # the square of an outer product is that of the squares
            return self.outer_squares(g.square().sum(0), scale, out).view(shape)
        return self._sum_squares_over_positions(a, g).mul_(scale).view(shape)

    def outer_squares(self, squares: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """Σ_n of gradients' squares ⊗ activations' squares, for single positions."""
        if self._squares is None:
            self._squares = self.activations().square()
        a = self._squares
        left, right = (squares, a) if self.grads_left else (a, squares)
        return summed_products(left, right, scale, out)

    def _sum_squares_over_positions(self, a: Tensor, g: Tensor) -> Tensor:
        columns, samples, groups, b, _ = g.shape
        m, n = (b, a.shape[2]) if self.grads_left else (a.shape[2], b)
        total = a.new_zeros(groups * m * n)
        block = max(1, min(columns, SCRATCH // max(1, groups * m * n)))
        scratch = a.new_empty(block * groups, m, n)
        for sample in range(samples):
            for start in range(0, columns, block):
                part = g[start : start + block, sample]
                rows = part.flatten(0, 1)
                acts = a[sample].expand(len(part), *a.shape[1:]).flatten(0, 1)
                target = scratch[: len(rows)]
                if self.grads_left:
                    torch.bmm(rows, acts.mT, out=target)
                else:
                    torch.bmm(acts, rows.mT, out=target)
                flat = target.view(len(part), -1)
                if len(flat) == 1:
                    total.addcmul_(flat[0], flat[0])
                else:
                    total += flat.square_().sum(0)
        return total

    def norms(self, slot: str, G: Gradients) -> Tensor:
        """See `Use`."""
        if slot == "bias":
            return self.bias_gradients(G, 0).square().sum(1)
        left, right = self._pair(G, 0)
        _, _, m, positions = left.shape
        n = right.shape[2]
        if positions == 1:
            return (square_norms(left.flatten(0, 1)) * square_norms(right.flatten(0, 1))).view(
                -1, left.shape[1]
            ).sum(1)  # fmt: skip
        if positions * (m + n) < m * n:
            # ‖Σ_t l_t r_tᵀ‖² = ⟨LᵀL, RᵀR⟩: T × T matrices instead of the gradient.
            return (left.mT @ left).mul_(right.mT @ right).sum((1, 2, 3))
        return torch.cat([square_norms(rows) for rows in self.blocks(slot, G)])

    def merge_key(self) -> object:
        """Uses with equal keys may be taken as one use at the positions of all."""
        return None


@dataclass(eq=False)
class LinearUse(MatrixUse):
    """`linear(x, W, b)`, or `x @ W` with the matrix on the right."""

    def _rows(self, tensor: Tensor, lead: int) -> Tensor:
        """`(*lead, N, T, d)`."""
        tensor = self.layout.split(tensor, lead)
        return tensor.reshape(*tensor.shape[: lead + 1], -1, tensor.shape[-1])

    def _compute_activations(self) -> Tensor:
        return self._rows(self.input.to(self.dtype), 0).mT.unsqueeze(1)

    def gradients(self, V: Gradients, lead: int) -> Tensor:
        """See `MatrixUse`."""
        return self._rows(V, lead).mT.unsqueeze(lead + 1)

    def merge_key(self) -> object:
        """See `MatrixUse`."""
        return (type(self), self.grads_left, *((k, id(w.tensor)) for k, w in self.slots.items()))


@dataclass(eq=False)
class MergedUse(MatrixUse):
    """Several uses of one matrix (the steps of a recurrence) as one use at all their positions.

    Its gradients are a list, one tensor a use.
    """

    parts: list[LinearUse] = field(default_factory=list)

    @classmethod
    def of(cls, parts: list[LinearUse]) -> "MergedUse":
        """One use of many."""
        first = parts[0]
        return cls(first.slots, first.shape, first.edge, grads_left=first.grads_left, parts=parts)

    def _compute_activations(self) -> Tensor:
        return torch.cat([part.activations() for part in self.parts], -1)

    def gradients(self, V: Any, lead: int) -> Tensor:
        """See `MatrixUse`."""
        pairs = zip(self.parts, V, strict=True)
        return torch.cat([part.gradients(v, lead) for part, v in pairs], -1)


@dataclass(eq=False)
class ConvUse(MatrixUse):
    """A convolution in one, two or three dimensions, or a transposed one."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    transposed: bool = False

    def _arrange(self, images: Tensor, lead: int, unfold: bool) -> Tensor:
        """`(*lead, N, groups, features, T)` of `(*lead, B, C, *spatial)`."""
        before = images.shape[:lead]
        spatial = len(self.kernel)
        images = images.reshape(-1, *images.shape[-spatial - 1 :])
        if unfold:
            columns = patches(images, self.kernel, self.stride, self.padding, self.dilation)
        else:
            columns = images.flatten(2)
        columns = columns.view(*before, -1, *columns.shape[1:])
        columns = self.layout.split(columns, lead)
        if self.layout.fold > 1:  # (*lead, N, fold, features, T) to (*lead, N, features, fold·T)
            columns = columns.movedim(lead + 1, -2).flatten(-2)
        return columns.unflatten(lead + 1, (self.groups, -1))

    def _compute_activations(self) -> Tensor:
        return self._arrange(self.input.to(self.dtype), 0, unfold=not self.transposed)

    def gradients(self, V: Gradients, lead: int) -> Tensor:
        """See `MatrixUse`."""
        return self._arrange(V, lead, unfold=self.transposed)

    def bias_gradients(self, V: Gradients, lead: int) -> Tensor:
        """See `MatrixUse`."""
        if not self.transposed:
            return MatrixUse.bias_gradients(self, V, lead)
        return self._arrange(V, lead, unfold=False).sum(-1).flatten(lead + 1)


def patches(
    images: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """The patches that a convolution sees, `(B, C · kernel, positions)`, in any dimension."""
    if all(k == 1 for k in kernel) and not any(padding) and all(s == 1 for s in stride):
        return images.flatten(2)
    # A copy of a view, which all threads share; `F.unfold` is several times slower.
    if any(padding):
        images = F.pad(images, [p for p in reversed(padding) for _ in range(2)])
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        span = d * (k - 1) + 1
        images = images.unfold(dim, span, s)[..., ::d]
    spatial = len(kernel)
    order = (0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))
    return images.permute(order).flatten(2 + spatial).flatten(1, 1 + spatial)


def summed_products(
    left: Tensor, right: Tensor, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """scale · Σ_n left_n right_nᵀ, `(groups, m, n)`, of `(N, groups, m | n, T)`."""
    _, groups, m, positions = left.shape
    n = right.shape[2]
    total = left.new_empty(groups, m, n) if out is None else out.view(groups, m, n)
    if groups == 1 and (positions == 1 or _rows_are_free(left, right)):
        flat_left, flat_right = left[:, 0].mT.reshape(-1, m), right[:, 0].mT.reshape(-1, n)
        torch.addmm(total[0], flat_left.T, flat_right, beta=0, alpha=scale, out=total[0])
        return total
    total.zero_()
    for a, b in zip(left, right, strict=True):
        if groups == 1:
            total[0].addmm_(a[0], b[0].T, alpha=scale)
        else:
            total.baddbmm_(a, b.mT, alpha=scale)
    return total


def _rows_are_free(*tensors: Tensor) -> bool:
    return all(tensor[:, 0].mT.is_contiguous() for tensor in tensors)


BLOCK = 128
"""Rows of a symmetric product that are computed at once; what lies right of them is left out."""

POSITIONS = 512
"""Terms of a sum of outer products that are collected: fewer mostly read and write the sum."""


class OuterSum:
    """scale · Σ x xᵀ over samples and positions, `(groups, b, b)`, collected over several calls.

    Args:
        scale: factor of the sum.
        out: a tensor to use.
    """

    def __init__(self, scale: float, out: Tensor | None = None) -> None:
        self.scale = scale
        self.out = out
        self.total: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._half = False

    def add(self, x: Tensor) -> None:
        """Add what `x` gives, `(M, groups, b, T)`."""
        if x.shape[1] == 1 and (x.shape[-1] == 1 or _rows_are_free(x)):
            # One large product is faster than many that each read and write the matrix.
            self._waiting.append(x[:, 0].mT.reshape(-1, x.shape[2]))
            if sum(rows.numel() for rows in self._waiting) > SCRATCH:
                self._flush()
            return
        total = self._start(x)
        if x.shape[1] > 1:
            for one in x:
                total.baddbmm_(one, one.mT, alpha=self.scale)
            return
        self._half = x.shape[2] >= 2 * BLOCK
        for some in x[:, 0].split(math.ceil(POSITIONS / max(1, x.shape[-1]))):
            self._add(total[0], some.movedim(1, 0).flatten(1))

    def _start(self, x: Tensor) -> Tensor:
        if self.total is None:
            self.total = self._new(x, x.shape[1], x.shape[2]).zero_()
        return self.total

    def _new(self, like: Tensor, groups: int, features: int) -> Tensor:
        shape = (groups, features, features)
        if self.out is not None and self.out.shape == shape and self.out.dtype == like.dtype:
            return self.out
        return like.new_empty(shape)

    def _flush(self) -> None:
        rows = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting.clear()
        features = rows.shape[1]
        if self.total is None and (len(rows) < 512 or features < 2 * BLOCK):
            self.total = self._new(rows, 1, features)
            torch.addmm(
                self.total[0], rows.T, rows, beta=0, alpha=self.scale, out=self.total[0]
            )  # fmt: skip
            return
        fresh = self.total is None
        total = self._start(rows.view(-1, 1, features, 1))
        self._half = self._half or (fresh and features >= 2 * BLOCK)
        self._add(total[0], rows.T)

    def _add(self, total: Tensor, x: Tensor) -> None:
        if not self._half:
            total.addmm_(x, x.T, alpha=self.scale)
            return
        # The matrix is symmetric: only its lower block triangle is computed.
        features = len(x)
        for start in range(0, features, BLOCK):
            end = min(start + BLOCK, features)
            total[start:end, :end].addmm_(x[start:end], x[:end].T, alpha=self.scale)

    def finish(self) -> Tensor | None:
        """The sum, None if there was nothing to add; nothing may be added afterwards."""
        if self._waiting:
            self._flush()
        if self._half and self.total is not None:
            total, features = self.total[0], self.total.shape[-1]
            for start in range(0, features, BLOCK):
                end = min(start + BLOCK, features)
                total[:end, start:end] = total[start:end, :end].T
            self._half = False
        return self.total


# -- everything that acts entry by entry ---------------------------------------------------------


@dataclass(eq=False)
class ElementUse(Use):
    """z = x ∘ w with w broadcast, and ∘ a sum or product: biases, scales, norms, expansions.

    `factors[slot]` is ∂z/∂w: a tensor of z's shape, or a number.
    """

    factors: dict[str, Callable[[], Tensor] | float] = field(default_factory=dict)
    alignment: tuple[int, ...] | None = None
    _values: dict[str, Tensor | float] = field(default_factory=dict)

    def _factor(self, slot: str) -> Tensor | float:
        if slot not in self._values:
            factor = self.factors[slot]
            self._values[slot] = factor() if callable(factor) else factor
        return self._values[slot]

    def _aligned(self, slot: str) -> tuple[int, ...]:
        """The weight's shape as broadcasting sees it: as many dimensions as z."""
        shape = tuple(self.slots[slot].tensor.shape)
        if self.alignment is None:
            return (1,) * (len(self.shape) - len(shape)) + shape
        where = dict(zip(self.alignment, shape, strict=True))
        return tuple(where.get(dim, 1) for dim in range(len(self.shape)))

    def fits(self, layout: Layout) -> bool:
        """See `Use`."""
        return all(self._aligned(slot)[layout.axis] == 1 for slot in self.slots)

    def columns(self, slot: str, V: Gradients) -> Tensor:
        """See `Use`."""
        factor = self._factor(slot)
        if isinstance(factor, Tensor) or factor != 1:
            V = V * factor
        shape, aligned = self.slots[slot].tensor.shape, self._aligned(slot)
        columns = self.layout.split(V, 1)
        rest = list(aligned[: self.layout.axis] + aligned[self.layout.axis + 1 :])
        if self.layout.fold > 1:
            rest.insert(0, 1)
        reduced = [2 + i for i, size in enumerate(rest) if size == 1 and columns.shape[2 + i] != 1]
        if reduced:
            columns = columns.sum(reduced)
        return columns.reshape(*columns.shape[:2], *shape)

    def sum_squares(
        self, slot: str, V: Gradients, scale: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """See `Use`."""
        return self.columns(slot, V).square().sum((0, 1)).mul_(scale)


# -- tables --------------------------------------------------------------------------------------


@dataclass(eq=False)
class EmbeddingUse(Use):
    """z = W[indices]: rows of a table, a linear map of one-hot vectors."""

    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    padding_idx: int | None = None

    def is_matrix(self, slot: str) -> bool:
        """See `Use`."""
        return True

    def rows(self, V: Gradients, lead: int) -> Tensor:
        """`(*lead, N, T, d)`, zero where the index is that of the padding."""
        if self.padding_idx is not None:
            V = V * (self.indices != self.padding_idx).unsqueeze(-1)
        V = self.layout.split(V, lead)
        return V.reshape(*V.shape[: lead + 1], -1, V.shape[-1])

    def tokens(self) -> Tensor:
        """The indices, `(N, T)`."""
        return self.layout.split(self.indices).reshape(self.layout.samples, -1)

    def columns(self, slot: str, V: Gradients) -> Tensor:
        """See `Use`."""
        rows, tokens = self.rows(V, 1), self.tokens()
        vocabulary, width = self.slots[slot].tensor.shape
        out = rows.new_zeros(*rows.shape[:2], vocabulary, width)
        where = tokens[None, :, :, None].expand_as(rows)
        return out.scatter_add_(2, where, rows)

    def blocks(self, slot: str, G: Gradients) -> Iterator[Tensor]:
        """See `Use`."""
        shape = self.slots[slot].tensor.shape
        size = max(1, SCRATCH // shape.numel())
        rows, tokens = self.rows(G, 0).split(size), self.tokens().split(size)
        for some, where in zip(rows, tokens, strict=True):
            out = some.new_zeros(len(some), *shape)
            yield out.scatter_add_(1, where.unsqueeze(-1).expand_as(some), some)

    def total(
        self, slot: str, G: Gradients, scale: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """See `Use`."""
        vocabulary, width = self.slots[slot].tensor.shape
        rows = self.rows(G, 0).reshape(-1, width)
        total = rows.new_zeros(vocabulary, width)
        return total.index_add_(0, self.tokens().flatten(), rows, alpha=scale)

    def _distinct(self, V: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        """Of each sample the distinct tokens: sample, token, and the summed rows `(K, M, d)`."""
        tokens = self.tokens()
        vocabulary = len(self.slots["weight"].tensor)
        offset = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * vocabulary
        pairs, inverse = torch.unique((tokens + offset).flatten(), return_inverse=True)
        rows = self.rows(V, 1).flatten(1, 2)
        summed = rows.new_zeros(len(rows), len(pairs), rows.shape[-1])
        summed.index_add_(1, inverse, rows)
        return pairs // vocabulary, pairs % vocabulary, summed

    def sum_squares(
        self, slot: str, V: Gradients, scale: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """See `Use`."""
        _, token, summed = self._distinct(V)
        out = torch.zeros_like(self.slots[slot].tensor, requires_grad=False)
        return out.index_add_(0, token, summed.square_().sum(0), alpha=scale)

    def norms(self, slot: str, G: Gradients) -> Tensor:
        """See `Use`."""
        sample, _, summed = self._distinct(G.unsqueeze(0))
        out = summed.new_zeros(self.layout.samples)
        return out.index_add_(0, sample, summed[0].square_().sum(-1))


# -- anything else -------------------------------------------------------------------------------


@dataclass(eq=False)
class CallUse(Use):
    """A function without a rule: its vector-Jacobian product, sample by sample.

    `args` holds tensors in place of weights and samples; `batched` lists the places of the latter.
    """

    function: Callable = torch.add
    args: list[Any] = field(default_factory=list)
    spec: Any = None
    places: dict[str, int] = field(default_factory=dict)
    batched: list[int] = field(default_factory=list)

    def fits(self, layout: Layout) -> bool:
        """See `Use`."""
        return layout.axis == 0 and layout.fold == 1

    def _held(self) -> list[Any]:
        """The arguments, no less precise than the weights: autocast is off when they serve."""
        return [
            arg.to(torch.promote_types(arg.dtype, self.dtype))
            if isinstance(arg, Tensor) and arg.is_floating_point()
            else arg
            for arg in self.args
        ]

    def columns(self, slot: str, V: Gradients) -> Tensor:
        """See `Use`."""
        place, held = self.places[slot], self._held()

        def one(v: Tensor, *samples: Tensor) -> Tensor:
            def call(weight: Tensor) -> Tensor:
                filled = list(held)
                for where, sample in zip(self.batched, samples, strict=True):
                    filled[where] = sample.unsqueeze(0)
                filled[place] = weight
                args, kwargs = pytree.tree_unflatten(filled, self.spec)
                return self.function(*args, **kwargs)

            pull: Any = torch.func.vjp(call, self.slots[slot].tensor.detach())[1]
            return torch.func.vmap(lambda column: pull(column.unsqueeze(0))[0])(v)

        rows = [held[where] for where in self.batched]
        lanes = torch.func.vmap(one, in_dims=(1,) + (0,) * len(rows), out_dims=1)
        return lanes(V, *rows)

    def agrees(self, slot: str, G: Gradients) -> bool:
        """Whether the samples' gradients add up to that of the whole call.

        They do not if the function mixes samples, or a first axis of length N counts other things.
        """
        weight = self.slots[slot].tensor.detach().requires_grad_()
        filled = self._held()
        filled[self.places[slot]] = weight
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        with torch.enable_grad():
            z = self.function(*args, **kwargs)
            (whole,) = torch.autograd.grad(z, weight, G, allow_unused=True, materialize_grads=True)
        try:
            parts = self.total(slot, G)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        scale = math.sqrt(torch.finfo(whole.dtype).eps) * float(whole.abs().max())
        return bool(((parts - whole).abs() <= scale + torch.finfo(whole.dtype).tiny).all())

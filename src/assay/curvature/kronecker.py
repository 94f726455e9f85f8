"""Blocks of a curvature matrix as Kronecker products."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class KroneckerFactors:
    r"""The block of one parameter, left ⊗ right, or one matrix alone.

    For the weight W of a linear map the block acts as vec(W) ↦ vec(left · W · right), with W
    row by row: a weight `(out, in)` has `left` of size `out` and `right` of size `in`. A
    convolution's weight is the matrix `(out, in · kernel)`; one with groups has a product for each
    group. A factor may be a diagonal, given as a vector (the token counts of an embedding). Biases
    and scales have one factor.

    Args:
        shape: of the parameter.
        left: `(groups, m, m)`, or `(groups, m)` for a diagonal.
        right: `(groups, n, n)` or `(groups, n)`; None if `left` is the whole block.
        grads_left: whether `left` comes from gradients and `right` from activations, or the other
            way round (embeddings, transposed convolutions, matrices multiplied from the right).

    Raises:
        ValueError: if the factors do not fit the shape.

    Example:
        >>> import torch
        >>> from assay.curvature import KroneckerFactors
        >>> B, A = torch.diag(torch.tensor([1.0, 2.0])), torch.eye(3)
        >>> factors = KroneckerFactors((2, 3), B[None], A[None])
        >>> torch.equal(factors.to_dense(), torch.kron(B, A))
        True
        >>> factors.inv(damping=1e-8).matmul(factors.matmul(torch.ones(2, 3))).round().sum().item()
        6.0

    Reference:
        Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", ICML 2015.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        left: Tensor,
        right: Tensor | None = None,
        *,
        grads_left: bool = True,
    ) -> None:
        sizes = [len(left), left.shape[-1]] + ([] if right is None else [right.shape[-1]])
        if math.prod(sizes) != math.prod(shape) or (right is not None and len(right) != len(left)):
            raise ValueError(
                f"factors of shapes {tuple(left.shape)} and "
                f"{None if right is None else tuple(right.shape)} do not fit a parameter of shape "
                f"{tuple(shape)}"
            )
        self.shape = tuple(shape)
        self.left = left
        self.right = right
        self.grads_left = grads_left

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors there are."""
        return (self.left,) if self.right is None else (self.left, self.right)

    def __repr__(self) -> str:
        """Shapes of parameter and factors."""
        shapes = ", ".join(str(tuple(factor.shape)) for factor in self.factors)
        return f"{type(self).__name__}(shape={self.shape}, factors={shapes})"

    def to_dense(self) -> Float[Tensor, "p p"]:
        """The block itself."""
        blocks = []
        for group in range(len(self.left)):
            left = _dense(self.left[group])
            right = None if self.right is None else _dense(self.right[group])
            blocks.append(left if right is None else torch.kron(left, right))
        return torch.block_diag(*blocks)

    def diagonal(self) -> Tensor:
        """Its diagonal, in the parameter's shape."""
        left = self.left if self.left.ndim == 2 else self.left.diagonal(dim1=1, dim2=2)
        if self.right is None:
            return left.reshape(self.shape)
        right = self.right if self.right.ndim == 2 else self.right.diagonal(dim1=1, dim2=2)
        return (left.unsqueeze(2) * right.unsqueeze(1)).reshape(self.shape)

    def matmul(self, v: Tensor) -> Tensor:
        """The block times a tensor of the parameter's shape.

        Args:
            v: as the parameter.

        Returns:
            As `v`.

        Raises:
            ValueError: if `v` has another shape.
        """
        if tuple(v.shape) != self.shape:
            raise ValueError(f"expected shape {self.shape}, got {tuple(v.shape)}")
        groups, m = self.left.shape[:2]
        rows = v.reshape(groups, m, -1)
        rows = self.left.unsqueeze(2) * rows if self.left.ndim == 2 else self.left @ rows
        if self.right is not None:
            right = self.right
            rows = rows * right.unsqueeze(1) if right.ndim == 2 else rows @ right
        return rows.reshape(self.shape)

    def inv(self, damping: float) -> "KroneckerFactors":
        """The inverse with damping λ split between the factors.

        (left + √λ/π I)⁻¹ ⊗ (right + π√λ I)⁻¹ with π² = (tr right / n) / (tr left / m), as in
        Martens and Grosse, section 6.3; a lone factor gets λ.

        Args:
            damping: λ > 0.

        Returns:
            The factors of the inverse.

        Raises:
            ValueError: if `damping` is not positive, or too small for the precision of the factors.
        """
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping}")
        if self.right is None:
            return KroneckerFactors(self.shape, _inverse(self.left, self.left.new_tensor(damping)))
        pi = self._balance()
        root = math.sqrt(damping)
        left, right = _inverse(self.left, root / pi), _inverse(self.right, root * pi)
        return KroneckerFactors(self.shape, left, right, grads_left=self.grads_left)

    def _balance(self) -> Tensor:
        """π of each group; 1 where a factor is zero."""
        means = [(f if f.ndim == 2 else f.diagonal(dim1=1, dim2=2)).mean(1) for f in self.factors]
        pi = (means[1] / means[0]).sqrt()
        return torch.where(torch.isfinite(pi) & (pi > 0), pi, torch.ones_like(pi))

    def state_dict(self) -> dict[str, Any]:
        """Shape and factors."""
        return {
            "shape": self.shape,
            "left": self.left,
            "right": self.right,
            "grads_left": self.grads_left,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take shape and factors from `state_dict`.

        Args:
            state: from `state_dict`.
        """
        self.shape = tuple(state["shape"])
        self.left, self.right = state["left"], state["right"]
        self.grads_left = state["grads_left"]

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "KroneckerFactors":
        """New factors from `state_dict`."""
        return cls(
            tuple(state["shape"]), state["left"], state["right"], grads_left=state["grads_left"]
        )

    def scaled(self, left: float, right: float = 1.0) -> "KroneckerFactors":
        """With each factor multiplied by a number."""
        other = None if self.right is None else self.right * right
        return KroneckerFactors(self.shape, self.left * left, other, grads_left=self.grads_left)

    def plus(self, other: "KroneckerFactors") -> "KroneckerFactors":
        """Factor by factor; an average over batches, not the sum of the blocks."""
        right = None if self.right is None or other.right is None else self.right + other.right
        return KroneckerFactors(
            self.shape, self.left + other.left, right, grads_left=self.grads_left
        )


def _dense(factor: Tensor) -> Tensor:
    return torch.diag(factor) if factor.ndim == 1 else factor


def _inverse(factor: Tensor, damping: Tensor) -> Tensor:
    """(factor + damping)⁻¹ of each group."""
    damping = damping.reshape(-1, 1)
    if factor.ndim == 2:
        return 1 / (factor + damping)
    damped = factor + torch.diag_embed(damping.expand(factor.shape[:2]))
    cholesky, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        try:
            return torch.linalg.inv(damped)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"a factor cannot be inverted in {factor.dtype}, its damping is too small beside "
                f"its largest entry {float(factor.abs().max()):.3g}; if a model is being trained, "
                "look whether it diverges"
            ) from error
    return torch.cholesky_inverse(cholesky)

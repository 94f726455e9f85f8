"""Spectra of a model: its Jacobian, its Hessian by layer, its neural tangent kernel."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from assay.functional import (
    Estimate,
    GGNOperator,
    HessianOperator,
    ParameterLayout,
    SpectralDensity,
    evaluating,
    lanczos,
    plain_attention,
    repeatable,
    select_parameters,
    spectral_density,
    top_eigenvalues,
)

__all__ = [
    "BlockSharpness",
    "GGNOperator",
    "HessianOperator",
    "JacobianOperator",
    "LinearOperator",
    "Sharpness",
    "SpectralDensity",
    "block_sharpness",
    "lanczos",
    "mean_square_singular_value",
    "ntk",
    "ntk_condition_number",
    "ntk_drift",
    "sharpness",
    "singular_values",
    "spectral_density",
    "top_eigenvalues",
]

Batch = tuple[Any, Any]
Selection = Iterable[str] | Callable[[str], bool] | None


@runtime_checkable
class LinearOperator(Protocol):
    """A matrix known by its products and its transpose's, e.g. a `JacobianOperator`."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its products."""
        ...

    @property
    def device(self) -> torch.device:
        """Of its products."""
        ...

    @property
    def T(self) -> "LinearOperator":
        """The transpose."""
        ...

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """The product with `(columns,)`."""
        ...


class JacobianOperator:
    """The Jacobian ∂f/∂x of a module's output in its input, at one input.

    Outputs and inputs are flattened. `J @ v` is a forward-mode product (two reverse passes where an
    operation of the model has no forward mode), `J.T @ u` a reverse-mode one. For the Jacobian from
    one layer to another, give the layers between as the model and an activation as the input.

    Args:
        model: maps one tensor to one tensor; passes are made in its present mode, see `repeatable`.
        x: the input. Rows of a batch do not mix in most models: pass a single one, `x[:1]`.

    Raises:
        ValueError: in products, for a vector of another length.
        TypeError: if `x` is not a floating-point tensor, or the output not a tensor.

    Example:
        >>> import torch
        >>> from assay.analysis import JacobianOperator
        >>> line = torch.nn.Linear(3, 2)
        >>> J = JacobianOperator(line, torch.zeros(1, 3))
        >>> J.shape
        (2, 3)
        >>> torch.allclose(J @ torch.ones(3), line.weight.sum(1))
        True
        >>> torch.allclose(J.T @ torch.ones(2), line.weight.sum(0))
        True

    Reference:
        Pennington, Schoenholz, Ganguli, "Resurrecting the Sigmoid in Deep Learning through
        Dynamical Isometry", NeurIPS 2017.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
        self.model = model
        self.x = x.detach()
        with repeatable(model), torch.no_grad():
            output = model(self.x)
        if not isinstance(output, Tensor):
            raise TypeError(f"the model must return a tensor, got {type(output).__name__}")
        self._output = output

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of outputs and inputs."""
        return self._output.numel(), self.x.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the input."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """Of the input."""
        return self.x.device

    @property
    def T(self) -> "_Transposed":
        """The transpose."""
        return _Transposed(self)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product Jv with `(columns,)` or the columns of `(columns, K)`."""
        return _columnwise(self._product, vectors, self.shape[1])

    def to_dense(self) -> Float[Tensor, "rows columns"]:
        """The matrix itself, row by row: for small outputs."""
        eye = torch.eye(self.shape[0], dtype=self._output.dtype, device=self.device)
        with repeatable(self.model), torch.enable_grad():
            x = self.x.clone().requires_grad_()
            y = self.model(x).flatten()
            rows = [self._pull(y, x, u) for u in eye]
        return torch.stack(rows) if rows else self.x.new_zeros(self.shape)

    def _product(self, v: Tensor) -> Tensor:
        v = v.to(self.dtype).view_as(self.x)
        with repeatable(self.model):
            try:
                with forward_ad.dual_level():
                    along = forward_ad.unpack_dual(
                        self.model(forward_ad.make_dual(self.x, v))
                    ).tangent
                    return self._flat(along)
            except (NotImplementedError, RuntimeError) as error:
                if not any(words in str(error) for words in ("forward AD", "forward mode AD")):
                    raise
            # Jv is the derivative of u ↦ Jᵀu along v.
            with torch.enable_grad():
                x = self.x.clone().requires_grad_()
                y = self.model(x)
                u = torch.zeros_like(y, requires_grad=True)
                (pulled,) = torch.autograd.grad(y, x, u, create_graph=True)
                (along,) = torch.autograd.grad(pulled, u, v)
        return along.flatten()

    def _flat(self, tangent: Tensor | None) -> Tensor:
        if tangent is None:  # an output that does not depend on the input
            return torch.zeros_like(self._output).flatten()
        return tangent.detach().flatten()

    def _transposed_product(self, u: Tensor) -> Tensor:
        with repeatable(self.model), torch.enable_grad():
            x = self.x.clone().requires_grad_()
            return self._pull(self.model(x).flatten(), x, u.to(self._output.dtype))

    @staticmethod
    def _pull(y: Tensor, x: Tensor, u: Tensor) -> Tensor:
        if not y.requires_grad:  # an output that does not depend on the input
            return torch.zeros_like(x).flatten()
        (g,) = torch.autograd.grad(
            y, x, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return g.flatten()


class _Transposed:
    def __init__(self, operator: JacobianOperator) -> None:
        self.T = operator

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.T.shape
        return columns, rows

    @property
    def dtype(self) -> torch.dtype:
        return self.T.dtype

    @property
    def device(self) -> torch.device:
        return self.T.device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return _columnwise(self.T._transposed_product, vectors, self.shape[1])


def _columnwise(product: Callable[[Tensor], Tensor], vectors: Tensor, length: int) -> Tensor:
    if vectors.ndim not in (1, 2) or len(vectors) != length:
        raise ValueError(
            f"expected a vector ({length},) or columns ({length}, K), got {tuple(vectors.shape)}"
        )
    if vectors.ndim == 1:
        return product(vectors)
    return torch.stack([product(column) for column in vectors.T], dim=1)


def singular_values(
    operator: LinearOperator,
    k: int = 1,
    *,
    which: str = "largest",
    tol: float = 1e-3,
    max_steps: int = 500,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " k"]:
    """Extreme singular values of a matrix known by its products.

    Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation in float64. The largest
    appear after few steps; the smallest of a large matrix may need as many as its shorter side.

    Args:
        operator: with `shape`, `@` and `.T`, e.g. a `JacobianOperator`.
        k: how many.
        which: `"largest"` or `"smallest"` of the min(rows, columns) singular values.
        tol: largest residual relative to the largest singular value.
        max_steps: products with the matrix to spend at most, and as many with its transpose.
        generator: source of the random start, on the CPU.

    Returns:
        `(k,)`, float64 on the CPU, outermost first.

    Raises:
        ValueError: for `k` outside 1…min(rows, columns) or an unknown `which`.
        RuntimeError: if `max_steps` products do not reach `tol`.

    Example:
        >>> import torch
        >>> from assay.analysis import JacobianOperator, singular_values
        >>> line = torch.nn.Linear(30, 20).double()
        >>> J = JacobianOperator(line, torch.zeros(1, 30).double())
        >>> largest = singular_values(J, tol=1e-8, generator=torch.Generator())
        >>> torch.allclose(largest, torch.linalg.matrix_norm(line.weight, 2))
        True

    Reference:
        Golub, Kahan, "Calculating the Singular Values and Pseudo-Inverse of a Matrix", 1965.
    """
    rows, columns = operator.shape
    short = min(rows, columns)
    if not 1 <= k <= short:
        raise ValueError(f"k must be in 1…{short}, got {k}")
    if which not in ("largest", "smallest"):
        raise ValueError(f"which must be 'largest' or 'smallest', got {which!r}")
    # Start on the shorter side: after that many steps its whole space is spanned.
    matrix = operator if columns <= rows else operator.T
    steps = min(max(2 * k + 10, 20), short, max_steps)
    run = _Bidiagonalization(matrix, generator)
    while True:
        values, errors = run.extend(steps)
        order = slice(0, k) if which == "largest" else slice(len(values) - k, None)
        if run.complete or bool((errors[order] <= tol * values[0]).all()):
            chosen = values[order]
            return chosen if which == "largest" else chosen.flip(0)
        if steps >= max_steps:
            raise RuntimeError(
                f"{max_steps} products leave a relative residual of "
                f"{float(errors[order].max() / values[0]):.1e}, tol is {tol:g}: raise max_steps"
            )
        steps = min(2 * steps, short, max_steps)


class _Bidiagonalization:
    """A V = U B, Aᵀ U = V Bᵀ + r e_kᵀ with B upper bidiagonal; grows step by step."""

    def __init__(self, matrix: LinearOperator, generator: torch.Generator | None) -> None:
        self.matrix, self.generator = matrix, generator
        self.v: list[Tensor] = []  # right vectors, one more than left ones until complete
        self.u: list[Tensor] = []
        self.diagonal: list[float] = []
        self.off: list[float] = []
        self.next, self.residual = self._random(matrix.shape[1], self.v), 0.0

    @property
    def complete(self) -> bool:
        return len(self.u) == self.matrix.shape[1]

    def extend(self, steps: int) -> tuple[Tensor, Tensor]:
        """Go on to `steps` steps; singular values of B, descending, and their residuals."""
        while len(self.u) < steps:
            self._step()
        B = torch.diag(torch.tensor(self.diagonal, dtype=torch.float64))
        if self.off:
            B = B + torch.diag(torch.tensor(self.off, dtype=torch.float64), 1)
        left, values, _ = torch.linalg.svd(B)
        return values, self.residual * left[-1].abs()

    def _step(self) -> None:
        if self.u:
            self.off.append(self.residual)
        self.v.append(self.next)
        u = self._finite(self.matrix @ self.next.to(self.matrix.dtype))
        u, alpha = self._unit(u, self.u)
        self.diagonal.append(alpha)
        self.u.append(u)
        if self.complete:
            self.residual = 0.0
            return
        v = self._finite(self.matrix.T @ u.to(self.matrix.dtype))
        self.next, self.residual = self._unit(v, self.v)

    def _unit(self, vector: Tensor, basis: list[Tensor]) -> tuple[Tensor, float]:
        """The part orthogonal to a basis, normalised, and its norm; a random one if it is none."""
        before = float(vector.norm())
        vector = _orthogonalized(vector, basis)
        norm = float(vector.norm())
        if norm <= 1e-14 * max(before, *map(abs, self.diagonal), 1e-300):
            return self._random(len(vector), basis), 0.0
        # What little cancellation leaves is mostly rounding: take its part in the basis out again.
        vector = _orthogonalized(vector / norm, basis)
        return vector / vector.norm(), norm

    def _random(self, length: int, basis: list[Tensor]) -> Tensor:
        vector = torch.randn(length, generator=self.generator, dtype=torch.float64)
        vector = _orthogonalized(vector.to(self.matrix.device), basis)
        return vector / vector.norm()

    @staticmethod
    def _finite(product: Tensor) -> Tensor:
        if not torch.isfinite(product).all():
            raise FloatingPointError("a product with the operator is not finite")
        return product.double()


def _orthogonalized(vector: Tensor, basis: list[Tensor]) -> Tensor:
    if basis:
        Q = torch.stack(basis)
        for _ in range(2):  # twice is enough (Kahan)
            vector = vector - Q.T @ (Q @ vector)
    return vector


def mean_square_singular_value(
    operator: LinearOperator, *, probes: int = 16, generator: torch.Generator | None = None
) -> Estimate:
    """Unbiased estimate of ‖J‖²_F/n, the factor by which a random direction's square grows.

    Hutchinson's E ‖Jv‖²/n over random signs v, n the number of columns. It is 1 for an isometry and
    falls or grows exponentially with the depth of a net off the edge of chaos.

    Args:
        operator: with `shape` and `@`, e.g. a `JacobianOperator`.
        probes: products to spend, at least 2.
        generator: source of the signs, on the CPU.

    Returns:
        The mean and its standard error, float64.

    Raises:
        ValueError: if `probes` < 2, from which no standard error can be had.

    Example:
        >>> import torch
        >>> from assay.analysis import JacobianOperator, mean_square_singular_value
        >>> J = JacobianOperator(torch.nn.Identity(), torch.zeros(1, 5))
        >>> float(mean_square_singular_value(J, probes=2).mean)
        1.0
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}")
    draws = []
    for _ in range(probes):
        signs = 2 * torch.randint(2, (operator.shape[1],), generator=generator) - 1
        product = operator @ signs.to(operator.dtype).to(operator.device)
        draws.append(product.double().square().sum() / operator.shape[1])
    stacked = torch.stack(draws)
    return Estimate(stacked.mean(), stacked.std() / math.sqrt(probes))


@dataclass(frozen=True)
class Sharpness:
    """The largest curvature of a loss and what it allows.

    Args:
        lambda_max: largest eigenvalue of the Hessian.
        max_lr: 2/λ_max, above which gradient descent moves away from a minimum of this curvature;
            infinite where no direction curves upwards.
        advice: the same in words.

    Example:
        >>> from assay.analysis import Sharpness
        >>> Sharpness(lambda_max=4.0, max_lr=0.5, advice="keep the learning rate below 0.5").max_lr
        0.5
    """

    lambda_max: float
    max_lr: float
    advice: str


def sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Batch | Iterable[Batch],
    *,
    lr: float | None = None,
    params: Selection = None,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Sharpness:
    """Measure λ_max of the loss's Hessian and say which learning rates it allows.

    Args:
        model: any module; passes are made in its present mode. With BatchNorm in training mode each
            batch has a Hessian of its own: use one batch.
        loss_fn: `(output, target) -> scalar`, a mean over the batch.
        data: one pair `(inputs, targets)`, or an iterable of such that can be iterated again.
        lr: the rate in use, for the advice.
        params: see `assay.functional.select_parameters`.
        tol: relative residual of the eigenvalue.
        generator: source of the random start, on the CPU.

    Returns:
        The eigenvalue, the bound and the advice.

    Raises:
        ValueError: for an empty selection of parameters, or a rate that is not positive.

    Example:
        >>> import torch
        >>> from assay.analysis import sharpness
        >>> line = torch.nn.Linear(1, 1, bias=False)
        >>> data = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
        >>> found = sharpness(line, torch.nn.functional.mse_loss, data, lr=0.5)
        >>> round(found.lambda_max, 3), round(found.max_lr, 3)
        (5.0, 0.4)
        >>> found.advice.partition(": ")[2]
        'gradient descent is unstable here, lower it'

    Reference:
        Cohen, Kaur, Li, Kolter, Talwalkar, "Gradient Descent on Neural Networks Typically Occurs at
        the Edge of Stability", ICLR 2021.
    """
    if lr is not None and not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    operator = HessianOperator(model, loss_fn, data, params=params)
    values, _ = top_eigenvalues(operator, which="largest", tol=tol, generator=generator)
    top = float(values[0])
    if top <= 0:
        return Sharpness(top, math.inf, f"λ_max = {top:.3g}: no direction curves upwards here")
    bound = 2 / top
    limit = f"2/λ_max = {bound:.3g} (λ_max = {top:.3g})"
    if lr is None:
        return Sharpness(top, bound, f"keep the learning rate of plain SGD below {limit}")
    share = f"lr = {lr:g} is {lr / bound:.3g} × the bound {limit}"
    if lr > bound:
        return Sharpness(top, bound, f"{share}: gradient descent is unstable here, lower it")
    if lr > 0.5 * bound:
        return Sharpness(top, bound, f"{share}: close to the edge of stability")
    return Sharpness(top, bound, f"{share}: stable")


@dataclass(frozen=True)
class BlockSharpness:
    """The largest curvature along the parameters of one layer.

    Args:
        layer: name of the module that owns them; `""` is the model itself.
        lambda_max: largest eigenvalue of its diagonal block of the Hessian.
        numel: number of its parameters.

    Example:
        >>> from assay.analysis import BlockSharpness
        >>> BlockSharpness(layer="fc", lambda_max=2.0, numel=10).layer
        'fc'
    """

    layer: str
    lambda_max: float
    numel: int


def block_sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Batch | Iterable[Batch],
    *,
    tol: float = 1e-2,
    generator: torch.Generator | None = None,
) -> tuple[BlockSharpness, ...]:
    """λ_max of the Hessian's diagonal block of each layer: where a common rate is too high first.

    Args:
        model: any module; passes are made in its present mode.
        loss_fn: `(output, target) -> scalar`, a mean over the batch.
        data: one pair `(inputs, targets)`, or an iterable of such that can be iterated again.
        tol: relative residual of each eigenvalue.
        generator: source of the random starts, on the CPU.

    Returns:
        One entry for each module with trainable parameters of its own, in the model's order.

    Raises:
        ValueError: if no parameter is trainable.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from assay.analysis import block_sharpness
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> data = torch.randn(32, 4), torch.randint(3, (32,))
        >>> [block.layer for block in block_sharpness(model, nn.functional.cross_entropy, data)]
        ['0', '2']
    """
    owners: dict[str, list[str]] = {}
    for name in select_parameters(model):
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    blocks = []
    for layer, names in owners.items():
        operator = HessianOperator(model, loss_fn, data, params=names)
        values, _ = top_eigenvalues(operator, which="largest", tol=tol, generator=generator)
        blocks.append(BlockSharpness(layer, float(values[0]), operator.numel))
    return tuple(blocks)


def ntk(
    model: nn.Module,
    x: Tensor,
    x2: Tensor | None = None,
    *,
    params: Selection = None,
    chunk_size: int = 8,
    vectorize: bool = True,
) -> Float[Tensor, "n m c c"]:
    """The empirical neural tangent kernel Θ(x, x') = J(x) J(x')ᵀ.

    J is the Jacobian of the outputs in the parameters. The rows of J(x') are made for a few samples
    at a time, and each is pushed through all of x by a forward-mode product: the Jacobian is never
    held as a whole, and its product with itself never taken.

    Passes are made in evaluation mode, in which samples do not mix.

    Args:
        model: maps `(N, ...)` to `(N, C)` or `(N,)`; its mode is restored.
        x: inputs `(n, ...)`.
        x2: further inputs `(m, ...)`; default `x`.
        params: see `assay.functional.select_parameters`.
        chunk_size: samples of `x2` at a time; memory is about `chunk_size` × C × P numbers.
        vectorize: whether the products of a chunk run at once (`torch.func.vmap`). False runs them
            in a loop, for models that `vmap` cannot run; models with recurrent layers always do.

    Returns:
        `(n, m, C, C)`, `[i, j, a, b]` belonging to output a at x_i and b at x'_j.

    Raises:
        ValueError: if `chunk_size` < 1, there are no inputs, or outputs are neither `(N, C)` nor
            `(N,)`.

    Example:
        >>> import torch
        >>> from assay.analysis import ntk
        >>> line = torch.nn.Linear(3, 1, bias=False)  # Θ = ⟨x, x'⟩
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(ntk(line, x)[..., 0, 0], x @ x.T, atol=1e-6)
        True

    Reference:
        Jacot, Gabriel, Hongler, "Neural Tangent Kernel: Convergence and Generalization in Neural
        Networks", NeurIPS 2018; Novak, Sohl-Dickstein, Schoenholz, "Fast Finite Width Neural
        Tangent Kernel", ICML 2022.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    x2 = x if x2 is None else x2
    if not len(x) or not len(x2):
        raise ValueError(f"expected inputs, got {len(x)} and {len(x2)}")
    chosen = {name: p.detach() for name, p in select_parameters(model, params).items()}
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with _evaluating(model), repeatable(model):
        kernel = _Kernel(model, chosen, x)
        columns = kernel.vectorized if vectorize and not recurrent else kernel.looped
        parts = [columns(part) for part in x2.split(chunk_size)]
    return torch.cat(parts).permute(2, 0, 3, 1).contiguous()


class _Kernel:
    """Columns of Θ: for samples x' and outputs b, the outputs at all x along ∂f_b(x')/∂θ."""

    def __init__(self, model: nn.Module, params: dict[str, Tensor], x: Tensor) -> None:
        self.model, self.params, self.x = model, params, x
        self.layout = ParameterLayout.of(model)
        # functional_call leaves substitutes behind in a module that is registered twice unless each
        # place is named.
        self.places = {name: name for name in params} | {
            place: name for place, name in self.layout.aliases if name in params
        }
        with torch.no_grad():
            self.classes = self._outputs(params, x[:1]).shape[1]

    def _outputs(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        tensors = {place: params[name] for place, name in self.places.items()}
        output = torch.func.functional_call(self.model, tensors, (x,), tie_weights=False)
        if not isinstance(output, Tensor) or output.ndim not in (1, 2):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"outputs must be of shape (N, C) or (N,), got {shape}")
        return output[:, None] if output.ndim == 1 else output

    def _along(self, directions: dict[str, Tensor]) -> Tensor:
        return torch.func.jvp(
            lambda params: self._outputs(params, self.x), (self.params,), (directions,)
        )[1]

    def vectorized(self, chunk: Tensor) -> Tensor:
        """`(m, C, n, C)`."""
        rows = torch.func.vmap(
            torch.func.jacrev(lambda params, sample: self._outputs(params, sample[None])[0]),
            in_dims=(None, 0),
        )(self.params, chunk)
        with torch.no_grad():
            return torch.func.vmap(torch.func.vmap(self._along))(rows)

    def looped(self, chunk: Tensor) -> Tensor:
        """`(m, C, n, C)`, by plain reverse mode: Jv as the derivative of u ↦ Jᵀu along v."""
        leaves = {name: p.detach().requires_grad_() for name, p in self.params.items()}
        columns = []
        with torch.enable_grad():
            outputs = self._outputs(leaves, self.x)
            u = torch.zeros_like(outputs, requires_grad=True)
            pulled = self._grad(outputs, leaves, u, create_graph=True)
            theirs = self._outputs(leaves, chunk)
            for entry in theirs.flatten():
                row = self._grad(entry, leaves, None)
                pairs = [(p, r) for p, r in zip(pulled, row, strict=True) if p.requires_grad]
                moving, along = zip(*pairs, strict=True)
                columns.append(torch.autograd.grad(moving, u, along, retain_graph=True)[0])
        return torch.stack(columns).view(*theirs.shape, *outputs.shape).detach()

    @staticmethod
    def _grad(output: Tensor, leaves: dict[str, Tensor], u: Tensor | None, **kwargs: Any) -> Any:
        return torch.autograd.grad(
            output, list(leaves.values()), u, retain_graph=True, allow_unused=True,
            materialize_grads=True, **kwargs,
        )  # fmt: skip


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    with evaluating(model), plain_attention():
        yield


def ntk_condition_number(kernel: Float[Tensor, "n n c c"]) -> float:
    """λ_max/λ_min of a kernel as an (nC × nC) matrix: how unevenly errors are learnt.

    Args:
        kernel: from `ntk` with one set of inputs.

    Returns:
        The ratio; infinite if the kernel is singular to rounding.

    Example:
        >>> import torch
        >>> from assay.analysis import ntk_condition_number
        >>> ntk_condition_number(torch.diag(torch.tensor([4.0, 1.0]))[..., None, None])
        4.0
    """
    n, _, c, _ = kernel.shape
    matrix = kernel.permute(0, 2, 1, 3).reshape(n * c, n * c).double()
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    rounding = len(values) * torch.finfo(kernel.dtype).eps * float(values[-1])
    return float(values[-1] / values[0]) if values[0] > rounding else math.inf


def ntk_drift(kernel: Float[Tensor, "n m c c"], start: Float[Tensor, "n m c c"]) -> float:
    """How far a kernel has moved, ‖Θ_t − Θ_0‖/‖Θ_0‖ in the Frobenius norm.

    Args:
        kernel: Θ_t.
        start: Θ_0.

    Raises:
        ValueError: if Θ_0 is zero.

    Example:
        >>> import torch
        >>> from assay.analysis import ntk_drift
        >>> start = torch.ones(2, 2, 1, 1)
        >>> ntk_drift(1.5 * start, start)
        0.5
    """
    norm = float(start.double().norm())
    if norm == 0:
        raise ValueError("start is zero: its drift has no scale")
    return float((kernel.double() - start.double()).norm()) / norm

"""Curvature as linear operators on parameter space: Hessian, Gauss-Newton, their difference."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from assay.functional.batches import BatchWeights, batch_size
from assay.functional.graph import nodes_behind
from assay.functional.likelihood import per_sample_loss
from assay.functional.parameters import ParameterLayout

Batch = tuple[Any, Any]
Selection = Iterable[str] | Callable[[str], bool] | None


def select_parameters(model: nn.Module, params: Selection = None) -> dict[str, nn.Parameter]:
    """The parameters that a curvature is about, by name; tied ones once.

    Args:
        model: any module.
        params: names, or a predicate on names; None takes all that require a gradient.

    Returns:
        Names and parameters, in the order of `named_parameters()`.

    Raises:
        ValueError: if a name is unknown, a named parameter requires no gradient, or none is left.

    Example:
        >>> import torch
        >>> from assay.functional import select_parameters
        >>> list(select_parameters(torch.nn.Linear(2, 2), ["weight"]))
        ['weight']
    """
    known = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in known.items() if p.requires_grad}
    elif callable(params):
        chosen = {name: p for name, p in known.items() if p.requires_grad and params(name)}
    else:
        chosen = {}
        for name in params:
            if name not in known:
                raise ValueError(f"the model has no parameter {name!r}; it has {list(known)}")
            if not known[name].requires_grad:
                raise ValueError(f"parameter {name!r} is frozen (requires_grad is False)")
            chosen[name] = known[name]
    if not chosen:
        raise ValueError("no parameters selected: all are frozen, or `params` matches none")
    return chosen


def call_model(model: Callable, inputs: Any) -> Any:
    """`model(inputs)`; a tuple or list of inputs is spread, a mapping becomes keyword arguments.

    Args:
        model: a module or function.
        inputs: what it takes.

    Example:
        >>> from assay.functional import call_model
        >>> call_model(lambda a, b: a + b, {"a": 1, "b": 2})
        3
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as plain products and a softmax, and by its own sub-modules, inside the block.

    Torch's fused kernels have no second derivative, no forward mode and no rule for `vmap`, and
    the fused path of its transformer layers calls no sub-module, so that no hook sees any.

    Example:
        >>> import torch
        >>> from assay.functional import plain_attention
        >>> q = torch.randn(2, 1, 3, 4)
        >>> with plain_attention():
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> out.shape
        torch.Size([2, 1, 3, 4])
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def repeatable(model: nn.Module) -> Iterator[None]:
    """Make passes inside the block alike and leave no trace of them.

    The same dropout masks in each block, buffers (BatchNorm's running statistics) put back,
    torch's random state put back, and only kernels that can be differentiated twice.

    Args:
        model: whose passes these are.

    Example:
        >>> import torch
        >>> from assay.functional import repeatable
        >>> drop, x = torch.nn.Dropout(0.5), torch.ones(8)
        >>> with repeatable(drop): a = drop(x)
        >>> with repeatable(drop): b = drop(x)
        >>> torch.equal(a, b)
        True
    """
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if model.training else []
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(plain_attention())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN's recurrent kernels have no second derivative.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    if not torch.equal(buffer, saved):  # a copy invalidates graphs that hold it
                        buffer.copy_(saved)


def as_batches(data: Any) -> Iterable[Any]:
    """Data as an iterable of batches `(inputs, targets)`: one such pair is one batch.

    Args:
        data: a pair as a tuple, or as a list that begins with a tensor; or an iterable of pairs.

    Returns:
        A list of one for a single pair, else `data` itself.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> import torch
        >>> from assay.functional.products import as_batches
        >>> x, y = torch.ones(2, 3), torch.zeros(2)
        >>> len(as_batches((x, y))), len(as_batches([(x, y), (x, y), (x, y)]))
        (1, 3)
    """
    if isinstance(data, tuple | list):
        if len(data) == 2 and (isinstance(data, tuple) or isinstance(data[0], Tensor)):
            return [tuple(data)]
        for batch in data:
            pair_of(batch)
    elif isinstance(data, Tensor | Mapping):
        raise ValueError(
            "batches must be one pair (x, y) or an iterable of such pairs, got a "
            f"{type(data).__name__}"
        )
    return data


def pair_of(batch: object) -> tuple[Any, Any]:
    """One batch as `(inputs, targets)`.

    Args:
        batch: what an iterable of batches yields.

    Raises:
        ValueError: if it is no pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        found = f"{len(batch)} items" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"every batch must be a pair (x, y), got {found}")
    return batch[0], batch[1]


class LossOperator(ABC):
    """A symmetric matrix on parameter space that belongs to a loss over data.

    Products are exact means over all batches; a batch counts by its number of samples.

    Args:
        model: any module; passes are made in its present mode, see `repeatable`.
        loss_fn: `(output, target) -> scalar`, a mean over the batch; over several batches one of
            torch's counts classes by their weights, no ignored targets, and adds up if it is a sum.
        data: one pair `(inputs, targets)`, or an iterable of such that can be iterated again.
            Inputs may be a tensor, a tuple, or a mapping of keyword arguments.
        params: see `select_parameters`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Batch | Iterable[Batch],
        *,
        params: Selection = None,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.params = select_parameters(model, params)
        self.layout = ParameterLayout.over(self.params)
        self._data = as_batches(data)
        self.single = self._data is not data
        self._known_twice = False
        self._weights = BatchWeights(loss_fn)

    @property
    def numel(self) -> int:
        """Number of parameters P; the operator is P × P."""
        return self.layout.numel

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(iter(self.params.values())).dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(iter(self.params.values())).device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with `(P,)` or with the columns of `(P, K)`."""
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.numel:
            raise ValueError(
                f"expected a vector ({self.numel},) or columns ({self.numel}, K), got shape "
                f"{tuple(vectors.shape)}"
            )
        if vectors.ndim == 2:
            return torch.stack([self @ column for column in vectors.T], dim=1)
        return self._times(list(self.layout.unflatten(vectors.to(self.dtype)).values()))

    def _times(self, v: list[Tensor]) -> Tensor:
        """The product with a vector in parts."""
        return self._mean(lambda inputs, targets: self._product(inputs, targets, v))

    def to_dense(self) -> Float[Tensor, "p p"]:
        """The matrix itself; P products, for small P."""
        eye = torch.eye(self.numel, dtype=self.dtype, device=self.device)
        dense = self @ eye
        return (dense + dense.T) / 2

    def gradient(self) -> Float[Tensor, " p"]:
        """The gradient of the loss over all data."""

        def one(inputs: Any, targets: Any) -> list[Tensor]:
            return self._grad(self._loss(inputs, targets), list(self.params.values()))

        return self._mean(one)

    def residual_product(
        self, outputs: list[Tensor], rebuild: Any, targets: Any, v: list[Tensor]
    ) -> list[Tensor]:
        """(∇²L − G) v from the model's outputs with their graph.

        It is the Hessian of θ ↦ ⟨∂ℓ/∂z, f(θ)⟩ with ∂ℓ/∂z held fixed: no cancellation, in contrast
        to the difference of two products.
        """
        gradient = self.pulled_back(outputs, rebuild, targets)
        return self._pull(gradient, list(self.params.values()), v)

    def outputs(self, inputs: Any) -> tuple[list[Tensor], Any]:
        """The output's tensors with their graph, and how to rebuild the output from tensors."""
        return _differentiable(call_model(self.model, inputs))

    def pulled_back(self, outputs: list[Tensor], rebuild: Any, targets: Any) -> list[Tensor]:
        """The gradient Jᵀ ∂ℓ/∂z, with a graph in which ∂ℓ/∂z is a constant."""
        z = [out.detach().requires_grad_() for out in outputs]
        # With a gradient of its own, so that what has no second derivative is seen (see `_pull`).
        fixed = [g.requires_grad_() for g in self._grad(self.loss_fn(rebuild(z), targets), z)]
        return self._grad(outputs, list(self.params.values()), fixed, create_graph=True)

    def _pull(self, tensors: list[Tensor], inputs: list, directions: list[Tensor]) -> list:
        """Gradient of ⟨tensors, directions⟩; zeros where nothing depends on anything."""
        pairs = [(t, d) for t, d in zip(tensors, directions, strict=True) if t.requires_grad]
        if not pairs:
            return [torch.zeros_like(i) for i in inputs]
        moving, along = zip(*pairs, strict=True)
        if not self._known_twice:
            _check_twice_differentiable(moving)
            self._known_twice = True
        return self._grad(list(moving), inputs, list(along), retain_graph=True)

    @abstractmethod
    def _product(self, inputs: Any, targets: Any, v: list[Tensor]) -> list[Tensor]:
        """The product for one batch."""

    def _loss(self, inputs: Any, targets: Any) -> Tensor:
        loss = self.loss_fn(call_model(self.model, inputs), targets)
        if loss.ndim != 0:
            raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
        return loss

    def _mean(self, one: Callable[[Any, Any], list[Tensor]], *, by_samples: bool = False) -> Tensor:
        """Over batches: as the loss averages, or by their numbers of samples."""
        adds = self._weights.is_sum and not by_samples
        total: Tensor | None = None
        whole, seen = 0.0, False
        for inputs, targets in self._data:
            if batch_size(inputs) == 0:
                continue
            seen = True
            weight = batch_size(inputs) if by_samples else self._weights(inputs, targets)
            if weight == 0:
                continue
            with repeatable(self.model), torch.enable_grad():
                parts = one(inputs, targets)
            flat = torch.cat([part.detach().reshape(-1) for part in parts])
            share = 1.0 if adds else weight
            total = share * flat if total is None else total.add_(flat, alpha=share)
            whole += weight
        if not seen:
            raise ValueError(
                "data yields no samples: expected a pair (inputs, targets), or an iterable of such "
                "that can be read again for each product, not an iterator"
            )
        if total is None:
            raise self._weights.no_target_counts()
        return total if adds else total / whole

    @staticmethod
    def _grad(output: Any, inputs: list[Any], grad_outputs: Any = None, **kwargs: Any) -> list:
        return list(
            torch.autograd.grad(
                output, inputs, grad_outputs, allow_unused=True, materialize_grads=True, **kwargs
            )
        )


class HessianOperator(LossOperator):
    """The Hessian ∇²L of a loss, by differentiating the gradient's product with a vector.

    Args:
        model: any module; passes are made in its present mode, see `repeatable`.
        loss_fn: `(output, target) -> scalar`, a mean over the batch; over several batches one of
            torch's counts classes by their weights, no ignored targets, and adds up if it is a sum.
        data: one pair `(inputs, targets)`, or an iterable of such that can be iterated again.
        params: see `select_parameters`.

    Raises:
        ValueError: for an empty selection; in products, for a vector of another length.

    Example:
        >>> import torch
        >>> from assay.functional import HessianOperator
        >>> line = torch.nn.Linear(1, 1, bias=False)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
        >>> HessianOperator(line, torch.nn.functional.mse_loss, (x, y)) @ torch.ones(1)
        tensor([5.])

    Reference:
        Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994.
    """

    _held: list[Tensor] | None = None

    def _times(self, v: list[Tensor]) -> Tensor:
        if self._held is None:
            return super()._times(v)
        parts = self._pull(self._held, list(self.params.values()), v)
        return torch.cat([part.reshape(-1) for part in parts])

    def _product(self, inputs: Any, targets: Any, v: list[Tensor]) -> list[Tensor]:
        gradient = self._differentiable_gradient(inputs, targets)
        return self._pull(gradient, list(self.params.values()), v)

    def _differentiable_gradient(self, inputs: Any, targets: Any) -> list[Tensor]:
        params = list(self.params.values())
        return self._grad(self._loss(inputs, targets), params, create_graph=True)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the gradient with its graph for all products inside the block, which share it.

        For an operator over one pair of inputs and targets, whose graph each product builds anyway;
        over several batches nothing is kept. Parameters and buffers may not change meanwhile.
        """
        if not self.single or self._held is not None:
            yield
            return
        with repeatable(self.model):
            with torch.enable_grad():
                for inputs, targets in self._data:
                    if batch_size(inputs):
                        self._held = self._differentiable_gradient(inputs, targets)
            try:
                yield
            finally:
                self._held = None


class GGNOperator(LossOperator):
    """The generalised Gauss-Newton matrix G = (1/N) Σ Jᵀ(∇²ℓ)J.

    Positive semi-definite if ℓ is convex in the output.

    J is the Jacobian of the model's output in the parameters; for the losses of exponential
    families (cross-entropy, squared error) G is the Fisher information.

    Args:
        model: any module; its output may be any structure of tensors that `loss_fn` takes.
        loss_fn: `(output, target) -> scalar`, a mean over the batch; over several batches one of
            torch's counts classes by their weights, no ignored targets, and adds up if it is a sum.
        data: one pair `(inputs, targets)`, or an iterable of such that can be iterated again.
        params: see `select_parameters`.

    Raises:
        ValueError: for an empty selection; in products, for a vector of another length.

    Example:
        >>> import torch
        >>> from assay.functional import GGNOperator, HessianOperator
        >>> line = torch.nn.Linear(2, 3)  # a linear model: the two are the same
        >>> data = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss = torch.nn.functional.cross_entropy
        >>> v = torch.ones(9)
        >>> torch.allclose(GGNOperator(line, loss, data) @ v, HessianOperator(line, loss, data) @ v,
        ...                atol=1e-6)
        True

    Reference:
        Schraudolph, "Fast Curvature Matrix-Vector Products", Neural Computation 2002.
    """

    def _product(self, inputs: Any, targets: Any, v: list[Tensor]) -> list[Tensor]:
        outputs, tangents, rebuild = self.linearize(inputs, v)
        bent = self.output_hessian_product(outputs, tangents, rebuild, targets)
        return self._grad(outputs, list(self.params.values()), bent)

    def linearize(self, inputs: Any, v: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Any]:
        """The output's tensors (with graph), their derivative along `v`, and how to rebuild it."""
        try:
            return self._linearize_forward(inputs, v)
        except (NotImplementedError, RuntimeError) as error:
            if not any(words in str(error) for words in ("forward AD", "forward mode AD")):
                raise
        return self._linearize_backward(inputs, v)

    def _linearize_forward(self, inputs: Any, v: list[Tensor]) -> tuple[list, list, Any]:
        # A checkpoint made of dual numbers cannot be recomputed when the dual level is left.
        hooks = torch.autograd.graph.disable_saved_tensors_hooks("no hooks in forward AD")
        with hooks, forward_ad.dual_level():
            outputs, rebuild = self._dual_outputs(inputs, v)
            pairs = [forward_ad.unpack_dual(out) for out in outputs]
            tangents = [
                torch.zeros_like(p.primal) if p.tangent is None else p.tangent.detach()
                for p in pairs
            ]
        return [p.primal for p in pairs], tangents, rebuild

    def _dual_outputs(self, inputs: Any, v: list[Tensor]) -> tuple[list[Tensor], Any]:
        """The output's tensors as dual numbers over θ + εv; inside a `dual_level`."""
        names = {id(p): name for name, p in self.params.items()}
        duals = {
            name: forward_ad.make_dual(p, d)
            for (name, p), d in zip(self.params.items(), v, strict=True)
        }
        substitute = {
            place: duals[names[id(p)]]
            for place, p in self.model.named_parameters(remove_duplicate=False)
            if id(p) in names
        }

        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(
                self.model, substitute, args, kwargs, tie_weights=False
            )

        return _differentiable(call_model(call, inputs))

    def _linearize_backward(self, inputs: Any, v: list[Tensor]) -> tuple[list, list, Any]:
        # J v is the derivative of w ↦ Jᵀw along v: two reverse passes, for operators that know no
        # forward mode.
        outputs, rebuild = self.outputs(inputs)
        w = [torch.zeros_like(out, requires_grad=True) for out in outputs]
        pulled = self._grad(outputs, list(self.params.values()), w, create_graph=True)
        return outputs, self._pull(pulled, w, v), rebuild

    def output_hessian_product(
        self, outputs: list[Tensor], tangents: list[Tensor], rebuild: Any, targets: Any
    ) -> list[Tensor]:
        """The loss's Hessian in the outputs, times a direction there."""
        z = [out.detach().requires_grad_() for out in outputs]
        gradient = self._grad(self.loss_fn(rebuild(z), targets), z, create_graph=True)
        return self._pull(gradient, z, tangents)


class ResidualOperator(LossOperator):
    """H = ∇²L − G: the part of the Hessian that comes from the model's own second derivative.

    Args:
        model: any module; passes are made in its present mode, see `repeatable`.
        loss_fn: `(output, target) -> scalar`, a mean over the batch; over several batches one of
            torch's counts classes by their weights, no ignored targets, and adds up if it is a sum.
        data: one pair `(inputs, targets)`, or an iterable of such that can be iterated again.
        params: see `select_parameters`.

    Raises:
        ValueError: for an empty selection; in products, for a vector of another length.

    Example:
        >>> import torch
        >>> from assay.functional import ResidualOperator
        >>> line = torch.nn.Linear(2, 1)
        >>> data = torch.randn(4, 2), torch.randn(4, 1)
        >>> residual = ResidualOperator(line, torch.nn.functional.mse_loss, data)
        >>> (residual @ torch.ones(3)).abs().max().item() < 1e-6  # a linear model has none
        True
    """

    def _product(self, inputs: Any, targets: Any, v: list[Tensor]) -> list[Tensor]:
        outputs, rebuild = self.outputs(inputs)
        return self.residual_product(outputs, rebuild, targets, v)


class EmpiricalFisherOperator(LossOperator):
    """The uncentred covariance (1/N) Σ g_n g_nᵀ of the samples' gradients.

    Args:
        model: any module; passes are made in its present mode, see `repeatable`.
        loss_fn: a loss that can be taken apart, see `per_sample_loss`.
        data: one pair `(inputs, targets)`, or an iterable of such that can be iterated again.
        params: see `select_parameters`.

    Raises:
        ValueError: if the loss cannot be taken apart, or for an empty selection.

    Example:
        >>> import torch
        >>> from assay.functional import EmpiricalFisherOperator
        >>> line = torch.nn.Linear(1, 1, bias=False)
        >>> torch.nn.init.ones_(line.weight).shape
        torch.Size([1, 1])
        >>> data = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)  # gradients 2 and 8
        >>> EmpiricalFisherOperator(line, torch.nn.functional.mse_loss, data) @ torch.ones(1)
        tensor([34.])
    """

    def _times(self, v: list[Tensor]) -> Tensor:
        def one(inputs: Any, targets: Any) -> list[Tensor]:
            return self._product(inputs, targets, v)

        return self._mean(one, by_samples=True)

    def _product(self, inputs: Any, targets: Any, v: list[Tensor]) -> list[Tensor]:
        params = list(self.params.values())
        terms = per_sample_loss(self.loss_fn)(call_model(self.model, inputs), targets)
        w = torch.zeros_like(terms, requires_grad=True)
        pulled = self._grad(terms, params, w, create_graph=True)
        (along,) = self._grad(pulled, [w], v, retain_graph=True)
        return self._grad(terms, params, along / len(terms))


def _check_twice_differentiable(tensors: Iterable[Tensor]) -> None:
    """Raise where autograd would leave out, in silence, what has no second derivative.

    A backward pass marked `once_differentiable` ends in a node that raises when it is reached; but
    no path leads from it to the parameters, so it never is, and their derivative would be zero.
    """
    if any(node.name() == "torch::autograd::Error" for node in nodes_behind(tensors)):
        raise RuntimeError(
            "a function of the model is marked once_differentiable: it has no second derivative"
        )


def _differentiable(output: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of an output that depend on parameters, and how to put others in their place."""
    leaves, spec = pytree.tree_flatten(output)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not places:
        raise ValueError("the model's output does not depend on the selected parameters")

    def rebuild(tensors: list[Tensor]) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return pytree.tree_unflatten(filled, spec)

    return [leaves[i] for i in places], rebuild

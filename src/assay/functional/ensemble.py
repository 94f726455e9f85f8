"""Many models of one architecture, trained and evaluated at once."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from assay.functional.batches import IGNORED
from assay.functional.batchnorm import running_norms
from assay.functional.modes import evaluating
from assay.functional.products import plain_attention
from assay.functional.training import Record, fit

Loss = Callable[[Tensor, Tensor], Tensor]

# Layers that treat every number by itself: they need not know which member a number belongs to.
ELEMENTWISE = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Softplus,
    nn.Sigmoid,
    nn.Tanh,
    nn.Dropout,
)
# Attributes of a module that say how it computes.
SETTINGS = (bool, int, float, complex, str, tuple, type(None), Tensor)


class Ensemble(nn.Module):
    """M models of one architecture as one module, each with its own weights.

    Every parameter and buffer of the architecture is stored once with a leading dimension M, in
    `stacked`, a module of the models' own class. The forward pass runs all members at once
    (`torch.func.vmap`; chains of linear and elementwise layers as batched matrix products), so
    small models cost little more than the arithmetic. Members do not see each other: BatchNorm
    statistics, dropout masks and gradients are per member. With `EnsembleLoss` and any optimizer
    that treats each weight by itself (SGD, momentum, Adam, weight decay, ...), training the
    ensemble is training its members one after another. What mixes the weights of a whole tensor,
    as clipping by the global norm or LARS does, would mix the members.

    Args:
        models: at least one model; all of one structure. They are copied.
        vectorize: whether all members run at once. False runs them in a loop: for models that
            `vmap` cannot run (control flow that depends on data). Recurrent layers and BatchNorm
            with a cumulative average are recognised and always run in a loop.

    Raises:
        ValueError: if there are no models, or they differ in more than the values of parameters and
            buffers: in layers, shapes, dtypes, or a setting such as a number of heads or a tensor
            that is not registered as a buffer.
        TypeError: in a forward pass, if the models return something else than a tensor.

    Example:
        >>> import torch
        >>> from assay.functional import Ensemble
        >>> models = [torch.nn.Linear(3, 2) for _ in range(4)]
        >>> ensemble = Ensemble(models)
        >>> x = torch.randn(4, 5, 3)  # five inputs for each member
        >>> ensemble(x).shape
        torch.Size([4, 5, 2])
        >>> torch.allclose(ensemble(x)[1], models[1](x[1]), atol=1e-6)
        True
        >>> ensemble.broadcast(x[0]).shape  # the same five for all
        torch.Size([4, 5, 2])
        >>> torch.equal(ensemble.member(1).weight, models[1].weight)
        True

    Reference:
        Horace He, Richard Zou, "functorch: JAX-like composable function transforms for PyTorch",
        2021 (model ensembling).
    """

    def __init__(self, models: Iterable[nn.Module], *, vectorize: bool = True) -> None:
        super().__init__()
        models = list(models)
        if not models:
            raise ValueError("models is empty: expected at least one model")
        for number, model in enumerate(models):
            _check_same_structure(models[0], model, number)
            _check_same_settings(models[0], model, number)
        self.num_models = len(models)
        self.vectorize = vectorize
        self.stacked = _combined(models, torch.stack)
        self.train(models[0].training)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of all members, each for its own inputs.

        Args:
            x: inputs `(M, B, ...)`.

        Returns:
            Outputs `(M, B, ...)`.

        Raises:
            ValueError: if the first dimension is not M.
        """
        if x.ndim < 2 or len(x) != self.num_models:
            raise ValueError(
                f"x must have shape ({self.num_models}, B, ...), one batch for each of the "
                f"{self.num_models} members, got {tuple(x.shape)}; for one batch that all share "
                "use broadcast"
            )
        return self._outputs(x, shared=False)

    def broadcast(self, x: Tensor) -> Tensor:
        """Outputs of all members for one batch of inputs.

        Args:
            x: inputs `(B, ...)`.

        Returns:
            Outputs `(M, B, ...)`.
        """
        return self._outputs(x, shared=True)

    @torch.no_grad()
    def predict(self, x: Tensor, *, batch_size: int = 1024) -> Tensor:
        """Outputs of all members for one set of inputs, in evaluation mode, without gradients.

        Args:
            x: inputs `(N, ...)`, on any device.
            batch_size: inputs a forward pass.

        Returns:
            Outputs `(M, N, ...)`; the mode of the ensemble is as before.
        """
        device = next((p.device for p in self.parameters()), x.device)
        with evaluating(self):
            parts = [self.broadcast(part.to(device)) for part in x.split(batch_size)]
        return torch.cat(parts, dim=1)

    def member(self, index: int) -> nn.Module:
        """One member as a model of its own: a copy, of the class that the ensemble was made of.

        Args:
            index: from 0 to M - 1, or from the end if negative.

        Raises:
            IndexError: if there is no such member.
        """
        if not -self.num_models <= index < self.num_models:
            raise IndexError(f"index {index} is out of range for {self.num_models} members")
        return _combined([self.stacked], lambda tensors: tensors[0][index].clone())

    def extra_repr(self) -> str:
        """What stands first in `repr`."""
        return f"num_models={self.num_models}" + ("" if self.vectorize else ", vectorize=False")

    def _outputs(self, x: Tensor, *, shared: bool) -> Tensor:
        layers = plain_layers(self.stacked) if self.vectorize else None
        if layers is not None and x.ndim >= (2 if shared else 3):
            weights = dict(self.stacked.named_parameters(remove_duplicate=False))
            return run_chain(layers, weights, x, self.num_models, shared=shared)
        tensors = dict(self.stacked.named_parameters()) | dict(self.stacked.named_buffers())
        if self.vectorize and not _needs_loop(self.stacked):
            run = torch.func.vmap(
                self._one, in_dims=(0, None if shared else 0), randomness="different"
            )
            try:
                with plain_attention():
                    outputs, rebound = run(tensors, x)
            except RuntimeError as error:
                error.add_note("If vmap cannot run this model: Ensemble(models, vectorize=False)")
                raise
        else:
            # unbind, not indexing: its derivative is one stack instead of M padded tensors.
            split = {name: tensor.unbind() for name, tensor in tensors.items()}
            found = [
                self._one({name: parts[i] for name, parts in split.items()}, x if shared else x[i])
                for i in range(self.num_models)
            ]
            outputs = torch.stack([output for output, _ in found])
            rebound = {k: torch.stack([new[k] for _, new in found]) for k in found[0][1]}
        for name, value in rebound.items():
            tensors[name].copy_(value.detach())
        return outputs

    def _one(self, tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One member's output, and the buffers that its forward pass replaced by new tensors."""
        before = dict(tensors)
        output = torch.func.functional_call(self.stacked, tensors, (x,))
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the models must return a tensor, got {type(output).__name__}: wrap each in a "
                "module that returns the one that is needed, e.g. its logits"
            )
        return output, {name: new for name, new in tensors.items() if new is not before[name]}


def _combined(models: Sequence[nn.Module], combine: Callable[[list[Tensor]], Tensor]) -> nn.Module:
    """A copy of the first model; each tensor is made of those at its place in all of them."""
    result = copy.deepcopy(models[0])
    made: dict[Tensor, Tensor] = {}  # tied tensors stay tied
    for place, *places in zip(
        result.modules(), *(model.modules() for model in models), strict=True
    ):
        for kind in ("_parameters", "_buffers"):
            for name, old in getattr(place, kind).items():
                if old is None:
                    continue
                if old not in made:
                    with torch.no_grad():
                        new = combine([getattr(other, kind)[name] for other in places])
                    trained = isinstance(old, nn.Parameter)
                    made[old] = nn.Parameter(new, old.requires_grad) if trained else new
                getattr(place, kind)[name] = made[old]
    return result


def _check_same_structure(first: nn.Module, model: nn.Module, number: int) -> None:
    here, there = _structure(first), _structure(model)
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            raise ValueError(
                "models must be of one structure, but they differ at "
                f"{name or 'the model itself'!r}: {here.get(name, 'nothing')} in model 0, "
                f"{there.get(name, 'nothing')} in model {number}"
            )


def _check_same_settings(first: nn.Module, model: nn.Module, number: int) -> None:
    for (name, here), there in zip(first.named_modules(), model.modules(), strict=True):
        if here._forward_pre_hooks:  # they make attributes anew, as old-style weight norm does
            continue
        for key, value in vars(here).items():
            other = vars(there).get(key)
            if key == "training" or _same(value, other):
                continue
            raise ValueError(
                "members may differ in their parameters and buffers only, but "
                f"{f'{name}.{key}' if name else key!r} of model {number} is another than that of "
                "model 0; register it as a buffer if each member has its own"
            )


def _same(one: object, other: object) -> bool:
    """Whether two attributes are the same, as far as that can be told."""
    if not isinstance(one, SETTINGS):
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _structure(model: nn.Module) -> dict[str, str]:
    layers = {name: type(module).__name__ for name, module in model.named_modules()}
    tensors = {
        name: f"{tuple(tensor.shape)} {tensor.dtype}"
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }
    return layers | tensors


def _needs_loop(model: nn.Module) -> bool:
    """Whether the model has layers that are known not to run under vmap."""
    cumulative = any(norm.momentum is None for norm in running_norms(model))
    return cumulative or any(isinstance(module, nn.RNNBase) for module in model.modules())


def plain_layers(model: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The layers of a chain of linear and elementwise layers; None of any other model.

    Args:
        model: any module.

    Returns:
        Their names and themselves, in the order in which they run; a layer that runs several times
        keeps its first name.

    Example:
        >>> import torch
        >>> from assay.functional.ensemble import plain_layers
        >>> plain_layers(torch.nn.Sequential(torch.nn.ReLU()))
        [('0', ReLU())]
    """
    layers = _flat_chain(model)
    if layers is None:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return [(names[id(layer)], layer) for layer in layers]


def _flat_chain(model: nn.Module) -> list[nn.Module] | None:
    if model._forward_hooks or model._forward_pre_hooks or model._backward_hooks:
        return None
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        layers: list[nn.Module] = []
        for child in model:
            found = _flat_chain(child)
            if found is None:
                return None
            layers += found
        return layers
    flatten = type(model) is nn.Flatten and (model.start_dim, model.end_dim) == (1, -1)
    return [model] if flatten or type(model) in (nn.Linear, *ELEMENTWISE) else None


def run_chain(
    layers: Sequence[tuple[str, nn.Module]],
    weights: Mapping[str, Tensor],
    x: Tensor,
    num_models: int,
    *,
    shared: bool,
) -> Tensor:
    """Outputs of a chain with M sets of weights, as batched matrix products.

    Args:
        layers: from `plain_layers`.
        weights: of the linear layers, `(M, *shape)`, by name.
        x: inputs, `(M, B, ...)` or, if they are `shared` by all sets, `(B, ...)`.
        num_models: M.
        shared: see `x`.

    Returns:
        Outputs `(M, B, ...)`.

    Example:
        >>> import torch
        >>> from assay.functional.ensemble import plain_layers, run_chain
        >>> layers = plain_layers(torch.nn.Linear(1, 1, bias=False))
        >>> weights = {"weight": torch.tensor([[[2.0]], [[3.0]]])}
        >>> run_chain(layers, weights, torch.ones(1, 1), 2, shared=True).flatten()
        tensor([2., 3.])
    """
    fresh = False  # whether nobody else has seen x
    for name, layer in layers:
        if isinstance(layer, nn.Linear):
            prefix = f"{name}." if name else ""
            linear = _shared_linear if shared else _own_linear
            x = linear(weights[prefix + "weight"], weights.get(prefix + "bias"), x)
            shared, fresh = False, True
        elif fresh and type(layer) is nn.ReLU and not x.requires_grad:
            x = x.relu_()
        elif isinstance(layer, nn.Flatten):
            x = x.flatten(1 if shared else 2)
        else:
            if shared and isinstance(layer, nn.Dropout):  # each member has a mask of its own
                x, shared = x.expand(num_models, *x.shape).clone(), False
            x = layer(x)
    return x.expand(num_models, *x.shape) if shared else x


def _own_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A linear layer with stacked weights `(M, out, in)` on the members' own `(M, ..., in)`."""
    flat = x.flatten(1, -2)
    # W xᵀ rather than x Wᵀ: its derivative by W comes out in the memory layout of W, and the
    # optimizer gets it without a copy.
    if bias is None:
        out = torch.bmm(weight, flat.mT)
    else:
        out = torch.baddbmm(bias.unsqueeze(-1), weight, flat.mT)
    return out.mT.unflatten(1, x.shape[1:-1])


def _shared_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The same on inputs `(..., in)` that all members share: one matrix product."""
    out = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return out.unflatten(-1, weight.shape[:2]).movedim(-2, 0)


class EnsembleLoss(nn.Module):
    """The loss of all members at once: each gets the gradient of its own loss, and no other.

    The value is the mean over the members, so that learning curves read like a single model's. The
    gradient is that of the *sum*: for each member's weights it is the gradient of that member's own
    loss, and a learning rate means what it means for a single model. (The gradient of the value
    itself would be M times smaller.)

    Args:
        loss_fn: `(output, target) -> scalar` for one member, e.g. a mean over its batch.

    Example:
        >>> import torch
        >>> from assay.functional import EnsembleLoss
        >>> loss_fn = EnsembleLoss(torch.nn.functional.mse_loss)
        >>> outputs = torch.tensor([[[1.0]], [[2.0]]], requires_grad=True)  # (M, B, 1)
        >>> loss = loss_fn(outputs, torch.zeros(2, 1, 1))
        >>> loss.item()  # (1 + 4) / 2
        2.5
        >>> torch.autograd.grad(loss, outputs)[0].flatten()  # 2 · 1 and 2 · 2
        tensor([2., 4.])
    """

    def __init__(self, loss_fn: Loss = F.cross_entropy) -> None:
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        """The mean of the members' losses, with the gradient of their sum.

        Args:
            outputs: `(M, B, ...)`.
            targets: `(M, B, ...)`.
        """
        losses = self.of_members(outputs, targets)
        total = losses.sum()
        return total - total.detach() + losses.detach().mean()

    def of_members(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " m"]:
        """The loss of each member.

        Args:
            outputs: `(M, B, ...)`.
            targets: `(M, B, ...)`.

        Returns:
            Losses `(M,)`, differentiable.

        Raises:
            ValueError: if the two have different numbers of members.
        """
        if outputs.ndim == 0 or targets.ndim == 0 or len(outputs) != len(targets):
            raise ValueError(
                "outputs and targets must have the members as their first dimension, got shapes "
                f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
            )
        if self.loss_fn is F.cross_entropy and not targets.is_floating_point():
            samples = F.cross_entropy(
                outputs.flatten(0, 1), targets.flatten(0, 1), reduction="none"
            )
            counted = (targets != IGNORED).flatten(1).sum(dim=1)
            return samples.unflatten(0, targets.shape[:2]).flatten(1).sum(dim=1) / counted
        try:
            return torch.func.vmap(self.loss_fn, randomness="different")(outputs, targets)
        except RuntimeError:  # what vmap cannot run, e.g. a mask that selects samples
            pairs = zip(outputs, targets, strict=True)
            return torch.stack([self.loss_fn(output, target) for output, target in pairs])


class EnsembleBatches:
    """Mini-batches for an ensemble: every member goes through the data in an order of its own.

    A pass draws one permutation for each member. The k-th batch stacks the members' k-th batches.
    All randomness comes from `generator`: saving its state between two passes and restoring it
    later continues with the same batches.

    Args:
        x: inputs `(N, ...)`.
        y: targets `(N, ...)`.
        batch_size: examples a batch for each member.
        num_models: number M of members.
        indices: the examples that each member is trained on, `(M, n)`, e.g. bootstrap samples;
            None for all of them.
        generator: source of randomness; None makes one, seeded from torch's global generator.
        drop_last: leave out a last batch that is smaller than `batch_size`.
        transform: called as `transform(x_batch, generator)` on each stacked batch.

    Raises:
        ValueError: if `x` and `y` differ in length, `batch_size` or `num_models` is not positive,
            `indices` does not have M rows, or `drop_last` would leave no batch.

    Example:
        >>> import torch
        >>> from assay.functional import EnsembleBatches
        >>> x, y = torch.arange(10.0).view(10, 1), torch.arange(10)
        >>> batches = EnsembleBatches(x, y, 4, num_models=3)
        >>> [tuple(inputs.shape) for inputs, _ in batches]
        [(3, 4, 1), (3, 4, 1), (3, 2, 1)]
        >>> seen = torch.cat([targets for _, targets in batches], dim=1)
        >>> torch.equal(seen.sort().values, y.expand(3, 10))
        True
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        num_models: int,
        *,
        indices: Int[Tensor, "_ _"] | None = None,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        transform: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            raise ValueError(
                "x and y must hold the same number of examples along their first dimension, "
                f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if batch_size < 1 or num_models < 1:
            raise ValueError(
                "batch_size and num_models must be positive, got "
                f"batch_size={batch_size} and num_models={num_models}"
            )
        if indices is not None and len(indices) != num_models:
            raise ValueError(
                f"indices must have one row for each of the {num_models} members, "
                f"got shape {tuple(indices.shape)}"
            )
        size = len(x) if indices is None else indices.shape[1]
        if drop_last and 0 < size < batch_size:
            raise ValueError(
                f"drop_last=True leaves no batch: batch_size is {batch_size} "
                f"and there are only {size} examples"
            )
        if generator is None:
            seed = int(torch.randint(2**62, ()).item())
            generator = torch.Generator().manual_seed(seed)
        self.x, self.y = x, y
        self.batch_size = batch_size
        self.num_models = num_models
        self.indices = indices
        self.generator = generator
        self.drop_last = drop_last
        self.transform = transform
        self.num_samples = size - size % batch_size if drop_last else size
        self._size = size

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.stack(
            [
                torch.randperm(self._size, generator=self.generator, device=self.generator.device)
                for _ in range(self.num_models)
            ]
        )
        if self.indices is not None:
            order = self.indices.to(order.device).gather(1, order)
        for start in range(0, self.num_samples, self.batch_size):
            index = order[:, start : start + self.batch_size]
            x, y = _gather(self.x, index), _gather(self.y, index)
            yield (x if self.transform is None else self.transform(x, self.generator)), y

    def member(self, index: int) -> "MemberBatches":
        """What one member will see from now on, as batches `(B, ...)` for a single model.

        Args:
            index: of the member.
        """
        return MemberBatches(self, index)


class MemberBatches:
    """One member's share of `EnsembleBatches`, with a copy of its generator.

    Args:
        batches: of the ensemble; later passes over them do not change this object.
        index: of the member.
    """

    def __init__(self, batches: EnsembleBatches, index: int) -> None:
        self._batches = copy.copy(batches)
        self._batches.generator = torch.Generator(batches.generator.device)
        self._batches.generator.set_state(batches.generator.get_state())
        self._index = index

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self._batches:
            yield x[self._index], y[self._index]


def _gather(values: Tensor, index: Int[Tensor, "m b"]) -> Tensor:
    flat = index.reshape(-1).to(values.device)
    return values.index_select(0, flat).unflatten(0, index.shape)


def train_many(
    make_model: Callable[[], nn.Module],
    num_models: int,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    loss_fn: Loss = F.cross_entropy,
    generator: torch.Generator | None = None,
    evaluate: Callable[[Ensemble], Mapping[str, float]] | None = None,
    after_step: Callable[[Ensemble, int], None] | None = None,
) -> tuple[Ensemble, list[Record]]:
    """Train M models of one architecture at once, each from its own weights in its own order.

    The models are the same, up to rounding, as if each had been trained alone. To train under other
    circumstances (a scheduler, checkpoints), put `Ensemble`, `EnsembleBatches` and `EnsembleLoss`
    together yourself, as this function does; the three work with any training loop.

    Args:
        make_model: makes a freshly initialised model from torch's global generator; called M times.
        num_models: M.
        x: inputs `(N, ...)`.
        y: targets `(N, ...)`.
        epochs: passes over the data.
        batch_size: examples a batch for each member.
        make_optimizer: called with the ensemble's parameters.
        loss_fn: `(output, target) -> scalar` for one member.
        generator: source of the initialisations and the orders; None makes one, seeded from torch's
            global generator.
        evaluate: called with the ensemble after each epoch; what it returns is added to the record.
        after_step: called with the ensemble (in training mode) and the number of steps done.

    Returns:
        The ensemble, in evaluation mode, and one record an epoch as `assay.functional.fit` gives;
        `loss` is the mean over the members.

    Raises:
        ValueError: if `num_models` is not positive, or from `EnsembleBatches` or `fit`.

    Example:
        >>> import torch
        >>> from assay.functional import train_many
        >>> x = torch.linspace(-1, 1, 32).unsqueeze(1)
        >>> ensemble, history = train_many(
        ...     lambda: torch.nn.Linear(1, 1), 5, x, 3 * x, epochs=50, batch_size=8,
        ...     make_optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        ...     loss_fn=torch.nn.functional.mse_loss)
        >>> bool((ensemble.stacked.weight.flatten() - 3).abs().max() < 1e-2)
        True
    """
    if num_models < 1:
        raise ValueError(f"num_models must be at least 1, got {num_models}")
    batches = EnsembleBatches(x, y, batch_size, num_models, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=batches.generator)))
        ensemble = Ensemble(make_model() for _ in range(num_models)).train()
    history = fit(
        ensemble,
        make_optimizer(ensemble.parameters()),
        batches,
        epochs=epochs,
        loss_fn=EnsembleLoss(loss_fn),
        evaluate=None if evaluate is None else lambda: evaluate(ensemble),
        after_step=None if after_step is None else lambda step: after_step(ensemble, step),
    )
    return ensemble, history

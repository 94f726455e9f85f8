"""Loss and accuracy at combinations of a few weight vectors: planes, lines, curves."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from assay.functional import ParameterLayout, call_model, evaluating, running_norms
from assay.functional.batches import batch_size
from assay.functional.ensemble import plain_layers, run_chain
from assay.functional.products import as_batches, pair_of
from assay.landscape.evaluation import (
    CPU_SAMPLES_OF_CHAIN,
    Answers,
    Batches,
    Evaluation,
    Outputs,
    Totals,
    at_points,
    call_with_tensors,
    evaluate,
    fitting_chunk,
    joined,
    on_device,
)


@torch.no_grad()
def evaluate_span(
    model: nn.Module,
    basis: Float[Tensor, "b p"],
    coefficients: Float[Tensor, "k b"],
    batches: Mapping[str, Batches],
    *,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    chunk_size: int = 64,
    update_bn: bool = True,
    bn_batches: Iterable[object] | None = None,
) -> dict[str, Evaluation]:
    """`evaluate` at K combinations of a few weight vectors, such as the points of a plane.

    A linear layer or convolution that sees the data themselves is linear in its weights: its output
    at every combination is that combination of its outputs at the B basis vectors, so it is run B
    times instead of K times. That is most of the work in small nets.

    Args:
        model: any module; what it returns is up to `loss_fn`.
        basis: B weight vectors, or directions, in the order of
            `assay.functional.parameters_to_vector`; rounded to the precision of the model.
        coefficients: the points are `coefficients @ basis`.
        batches: batches `(x, y)`, or one pair `(x, y)`, by the name of the set, as `evaluate` takes
            them.
        loss_fn: `(output, target) -> scalar`, a mean over the batch; see `evaluate`.
        chunk_size: points whose weights and outputs are held at once, at most. With 1, `vmap` is
            not used: for models that it cannot run (recurrent ones are recognised).
        update_bn: whether to recompute running statistics at each point; a model that has any is
            then evaluated point by point.
        bn_batches: the data to take them of; default the set named `"train"`.

    Returns:
        An `Evaluation` for each set, in the order of `coefficients`; equal to that of `evaluate` up
        to rounding.

    Raises:
        ValueError: as `evaluate`, or if there are no coefficients.

    Example:
        >>> import torch
        >>> from assay.landscape import evaluate_span
        >>> line = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> weights = torch.tensor([[1.0], [3.0]])
        >>> half_way = torch.tensor([[0.5, 0.5]])
        >>> mse, sets = torch.nn.functional.mse_loss, {"train": [(x, 2 * x)]}
        >>> evaluate_span(line, weights, half_way, sets, loss_fn=mse)["train"].loss
        tensor([0.], dtype=torch.float64)
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    if len(coefficients) == 0:
        raise ValueError("coefficients is empty: expected at least one point")
    basis = basis.to(next(model.parameters(), basis))
    coefficients = coefficients.to(basis)
    if (update_bn and running_norms(model)) or recurrent:
        points = (row @ basis for row in coefficients)
        return evaluate(
            model, points, batches, loss_fn=loss_fn, update_bn=update_bn, bn_batches=bn_batches
        )
    model = copy.deepcopy(model).eval()
    chunk_size = fitting_chunk(chunk_size, basis.shape[1])
    tensors = ParameterLayout.of(model).unflatten(basis, aliases=True)
    results = {}
    for name, of_set in batches.items():
        total = Totals(loss_fn)
        of_set = as_batches(of_set)
        total.add(_outputs(model, tensors, coefficients, of_set, chunk_size))
        results[name] = total.evaluation()
    return results


def _outputs(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    coefficients: Tensor,
    batches: Batches,
    chunk_size: int,
) -> Iterator[Answers]:
    """Outputs at all combinations batch by batch, with inputs and targets."""
    shared: list[str] | None = None
    for x, y in map(pair_of, batches):
        samples = batch_size(x)
        if samples == 0:
            continue
        x, y = on_device(x, coefficients.device), on_device(y, coefficients.device)
        shared = layers_at_the_input(model, x) if shared is None else shared
        at_once = chunk_size
        if coefficients.device.type == "cpu":
            at_once = min(chunk_size, max(1, CPU_SAMPLES_OF_CHAIN // samples))
        run = functools.partial(_at_parts, model, tensors, x, shared, at_once, {})
        yield map(run, coefficients.split(chunk_size)), x, y


def _at_parts(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    x: Any,
    shared: Sequence[str],
    at_once: int,
    memory: dict[str, Tensor],
    coefficients: Tensor,
) -> Outputs:
    parts = coefficients.split(at_once)
    return joined(span_outputs(model, tensors, part, x, shared, memory) for part in parts)


def span_outputs(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    coefficients: Float[Tensor, "k b"],
    x: Any,
    shared: Sequence[str],
    memory: dict[str, Tensor] | None = None,
) -> Outputs:
    """Outputs at combinations of weights, in one batched pass if possible; differentiable.

    Args:
        model: any module. Recurrent layers, and norms that update running statistics, which `vmap`
            cannot run, are run at one combination after the other.
        tensors: every parameter at the B basis vectors, `(B, *shape)`, by name.
        coefficients: of the combinations.
        x: the model's inputs, as `assay.functional.call_model` takes them.
        shared: names from `layers_at_the_input`.
        memory: keeps what these layers answer at the basis vectors, for further calls with the same
            input and weights.

    Returns:
        `(K, N, ...)`, or a list of K outputs if the model does not return a tensor.
    """
    chain = plain_layers(model)
    if chain is not None and isinstance(x, Tensor) and x.ndim >= 2:
        return _chain_outputs(chain, tensors, coefficients, x, shared, memory)
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    at_once = not recurrent and not any(norm.training for norm in running_norms(model))
    layers = {name: model.get_submodule(name) for name in shared if at_once}
    rest = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in layers}

    def output(c: Tensor) -> Any:
        substitute = {name: torch.tensordot(c, t, dims=1) for name, t in rest.items()}
        with contextlib.ExitStack() as stack:
            for name, layer in layers.items():
                stack.enter_context(_mixing(name, layer, tensors, c, memory))
            return call_with_tensors(model, substitute, x)

    return at_points(output, coefficients, at_once=at_once)


def _chain_outputs(
    layers: list[tuple[str, nn.Module]],
    tensors: Mapping[str, Tensor],
    coefficients: Tensor,
    x: Tensor,
    shared: Sequence[str],
    memory: dict[str, Tensor] | None,
) -> Tensor:
    """The same of a chain of linear and elementwise layers, by batched products without `vmap`."""
    names = [name for name, _ in layers]
    before = layers[: names.index(shared[0])] if shared else []
    alike = bool(shared) and not any(isinstance(layer, nn.Dropout) for _, layer in before)
    if alike:  # the first linear layer runs at the basis vectors, what follows at the points
        for _, layer in before:
            x = layer(x)
        first, known = layers[len(before)], {} if memory is None else memory
        if first[0] not in known:
            basis = len(coefficients.T)
            own = x.expand(basis, *x.shape)
            known[first[0]] = run_chain([first], tensors, own, basis, shared=False)
        x = _mix(coefficients, known[first[0]].mT).mT  # in memory samples come last
        layers = layers[len(before) + 1 :]
    moving = {name for name, _ in layers}
    weights = {
        name: _mix(coefficients, t)
        for name, t in tensors.items()
        if name.rpartition(".")[0] in moving
    }
    return run_chain(layers, weights, x, len(coefficients), shared=not alike)


def _mix(coefficients: Float[Tensor, "k b"], tensors: Tensor) -> Tensor:
    """Combinations of B tensors `(B, ...)`, `(K, ...)`."""
    return (coefficients @ tensors.flatten(1)).unflatten(1, tensors.shape[1:])


def layers_at_the_input(model: nn.Module, x: Any) -> list[str]:
    """Names of linear layers and convolutions whose input does not depend on any weight.

    Args:
        model: any module; a pass is made, with one sample if the input is a tensor.
        x: its inputs.
    """
    calls: dict[str, list[bool]] = {}
    handles = []
    owners = [id(p) for m in model.modules() for p in m._parameters.values() if p is not None]
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for name, layer in model.named_modules():
        if type(layer) not in kinds or any(owners.count(id(p)) > 1 for p in layer.parameters()):
            continue  # subclasses may do anything; tied weights are also used elsewhere

        def note(_: nn.Module, inputs: tuple, name: str = name) -> None:
            calls.setdefault(name, []).append(inputs[0].requires_grad if inputs else True)

        handles.append(layer.register_forward_pre_hook(note))
    tracked = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    tracked |= {place: tracked[name] for place, name in ParameterLayout.of(model).aliases}
    try:
        with torch.enable_grad(), evaluating(model):
            call_with_tensors(model, tracked, x.detach()[:1] if isinstance(x, Tensor) else x)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, dependent in calls.items() if dependent == [False]]


@contextlib.contextmanager
def _mixing(
    name: str,
    layer: nn.Module,
    tensors: Mapping[str, Tensor],
    c: Tensor,
    memory: dict[str, Tensor] | None,
) -> Iterator[None]:
    """Let a layer answer with the combination `c` of its answers at the basis vectors.

    Under `vmap` its input is the same at all points, so that the answers are computed once.
    """
    prefix = f"{name}." if name else ""
    weights, biases = tensors[prefix + "weight"], tensors.get(prefix + "bias")

    def forward(inputs: Tensor) -> Tensor:
        known = {} if memory is None else memory
        if name not in known:
            answers = [
                _apply(layer, inputs, weight, None if biases is None else biases[b])
                for b, weight in enumerate(weights)
            ]
            known[name] = torch.stack(answers)
        return torch.tensordot(c, known[name], dims=1)

    with _forward_replaced(layer, forward):
        yield


@contextlib.contextmanager
def _forward_replaced(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer)["forward"]


def answering(layer: nn.Module, answer: Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside the block a layer gives a known answer, whatever it is asked.

    Args:
        layer: of a model that runs inside the block.
        answer: its output.
    """
    return _forward_replaced(layer, lambda _: answer)


@torch.no_grad()
def outputs_of(model: nn.Module, names: Sequence[str], x: Any) -> dict[str, Tensor]:
    """What some layers of a model say in a pass.

    Args:
        model: runs on `x`.
        names: of the layers, each called once.
        x: the inputs.
    """
    found: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def keep(_: nn.Module, __: tuple, output: Tensor, name: str = name) -> None:
            found[name] = output

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        if names:
            call_model(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _apply(layer: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(inputs, weight, bias)
    convolution: Any = layer
    return convolution._conv_forward(inputs, weight, bias)

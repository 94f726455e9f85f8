"""Loss and accuracy at many weight vectors of one model."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from assay.functional.batches import BatchWeights, batch_size, is_whole
from assay.functional.batchnorm import running_norms
from assay.functional.batchnorm import update_bn as recompute_bn
from assay.functional.ensemble import plain_layers, run_chain
from assay.functional.parameters import ParameterLayout, vector_to_parameters
from assay.functional.products import as_batches, call_model, pair_of, plain_attention

Batches = Iterable[Any]  # of pairs (x, y); or one such pair, see `as_batches`
Outputs = Tensor | list[Any]  # at K points: stacked, or one by one if they are no tensors
# Of a batch: outputs at some points after the other, only those held at once; inputs; targets.
Answers = tuple[Iterable[Outputs], Any, Any]

# On a CPU, running several weight vectors at once saves the overhead of small batches; beyond about
# so many samples (vectors times batch) activations leave the cache: under `vmap`, and for chains of
# linear layers.
CPU_SAMPLES, CPU_SAMPLES_OF_CHAIN = 1024, 8192
WEIGHTS_AT_ONCE = 2**24  # numbers: small networks gain by running at once, large ones fill memory


def logits_of(output: object, *, user: str) -> Tensor:
    """A model's output, which must be logits.

    Args:
        output: what the model returned.
        user: what needs the logits, for the message.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it has no dimension of classes.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{user} needs a model that returns its logits (N, C, ...) as a tensor, this one "
            f"returns {type(output).__name__}: wrap it in a module that returns the logits alone"
        )
    if output.ndim < 2:
        raise ValueError(
            f"{user} needs logits (N, C, ...), the model returns shape {tuple(output.shape)}"
        )
    return output


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured on one set of batches, at each of K weight vectors.

    Args:
        loss: mean loss over the samples, `(K,)`, float64; where targets are classes, the mean over
            those that are not ignored (see `evaluate`).
        accuracy: share of targets that are the largest output, `(K,)`, in [0, 1], of those that are
            not ignored. None where the targets are no classes or the outputs no logits; or where
            the logits of several targets a sample may be read in two ways, classes second as torch
            has them or last, and the loss is none of torch's.

    Example:
        >>> import torch
        >>> from assay.landscape import Evaluation
        >>> Evaluation(torch.zeros(2).double(), torch.tensor([1.0, 0.75]).double()).error
        tensor([0.0000, 0.2500], dtype=torch.float64)
    """

    loss: Float[Tensor, " k"]
    accuracy: Float[Tensor, " k"] | None

    @property
    def error(self) -> Float[Tensor, " k"]:
        """Share of samples that are misclassified, `(K,)`."""
        if self.accuracy is None:
            raise ValueError("the targets were not class indices: there is no error rate")
        return 1 - self.accuracy


@torch.no_grad()
def evaluate(
    model: nn.Module,
    points: Iterable[Tensor],
    batches: Mapping[str, Batches],
    *,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    chunk_size: int = 64,
    update_bn: bool = True,
    bn_batches: Iterable[object] | None = None,
) -> dict[str, Evaluation]:
    """Mean loss and accuracy of a model at K weight vectors.

    Chunks of weight vectors run at once, as batched matrix products in an `nn.Sequential` of linear
    and elementwise layers, else under `torch.func.vmap`, with the same results as one after the
    other up to rounding. The model is in evaluation mode (no dropout) and left as it was. At points
    that are combinations of a few vectors, `evaluate_span` is faster.

    Running statistics of BatchNorm belong to one weight vector: at another one they show a false
    picture. A model that has them is evaluated point by point, with the statistics recomputed from
    `bn_batches` at each.

    The mean is the same however the samples are divided into batches: a batch counts by its number
    of samples. Where targets are integers, it counts by the number of those that are not ignored:
    not `loss_fn.ignore_index` if it has one, else not −100, as in
    `torch.nn.functional.cross_entropy`; if that has class weights, by the sum of theirs. Ignored
    targets do not enter the accuracy, and batches with nothing else are left out. A loss whose
    `reduction` is `"sum"` is divided by what its batches count.

    Args:
        model: any module; what it returns is up to `loss_fn`.
        points: weight vectors `(P,)` in the order of `assay.functional.parameters_to_vector`; a
            tensor `(K, P)` or any iterable, which is read `chunk_size` vectors at a time. They are
            rounded to the precision of the model.
        batches: batches `(x, y)`, or one pair `(x, y)`, by the name of the set, e.g.
            `{"train": ..., "test": ...}`; iterated once a chunk. x is a tensor, a tuple of
            arguments or a mapping of keyword arguments.
        loss_fn: `(output, target) -> scalar`, a mean over the batch.
        chunk_size: weight vectors held at once, at most; fewer if they have more than 2²⁴ entries
            in all. On a CPU as many of them run together as is fast with the size of the batch, on
            other devices all. With 1, `vmap` is not used: for models that it cannot run (recurrent
            ones are recognised).
        update_bn: whether to recompute running statistics at each point; without effect on models
            that have none.
        bn_batches: the data to take the statistics of, batches of inputs or of `(x, y)`; default
            the set named `"train"`.

    Returns:
        An `Evaluation` for each set, in the order of `points`.

    Raises:
        ValueError: if there are no points, or a set has no batches when a chunk begins (an iterator
            instead of an iterable), or all its targets are ignored, or it holds no pairs `(x, y)`;
            if `chunk_size < 1`, or `loss_fn` returns no scalar; if the model has running statistics
            and there is neither `bn_batches` nor a set named `"train"`.

    Example:
        >>> import torch
        >>> from assay.functional import parameters_to_vector
        >>> from assay.landscape import evaluate
        >>> line = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> weights = torch.tensor([[1.0], [2.0], [3.0]])
        >>> mse = torch.nn.functional.mse_loss
        >>> evaluate(line, weights, {"train": [(x, 2 * x)]}, loss_fn=mse)["train"].loss
        tensor([2.5000, 0.0000, 2.5000], dtype=torch.float64)
    """
    layout = ParameterLayout.of(model)
    chunk_size = fitting_chunk(chunk_size, layout.numel)
    sets = {name: as_batches(of_set) for name, of_set in batches.items()}
    recompute = update_bn and bool(running_norms(model))
    bn_batches = sets.get("train") if bn_batches is None else _for_statistics(bn_batches)
    if recompute and bn_batches is None:
        raise ValueError(
            "the model has running statistics (BatchNorm), which do not fit other weights: give "
            'bn_batches= (training data) or a set named "train" to recompute them, or '
            "update_bn=False to keep them"
        )
    if recompute or any(isinstance(module, nn.RNNBase) for module in model.modules()):
        chunk_size = 1
    # A copy, so that an interrupted evaluation leaves no trace in the user's model.
    model = copy.deepcopy(model).eval()
    totals = {name: Totals(loss_fn) for name in sets}
    remaining = iter(points)
    while chunk := list(islice(remaining, chunk_size)):
        if recompute:
            vector_to_parameters(chunk[0], model)
            recompute_bn(model, bn_batches if bn_batches is not None else ())
        for name, total in totals.items():
            total.add(_outputs(model, chunk, sets[name], layout))
    results = {name: total.evaluation() for name, total in totals.items()}
    if any(len(result.loss) == 0 for result in results.values()):
        raise ValueError("points is empty: expected at least one weight vector")
    return results


def _for_statistics(data: Iterable[object]) -> Iterable[object]:
    """Batches to take statistics of; two tensors of one kind are two batches of inputs."""
    if isinstance(data, tuple | list) and len(data) == 2:
        x, y = data
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            alike = x.dtype == y.dtype and x.shape[1:] == y.shape[1:]
            return data if alike else [data]
    return data


def _outputs(
    model: nn.Module, chunk: list[Tensor], batches: Batches, layout: ParameterLayout
) -> Iterator[Answers]:
    """Outputs of a chunk of weight vectors batch by batch, with inputs and targets."""
    vectors = torch.stack(chunk)
    vectors = vectors.to(next(model.parameters(), vectors))
    chain = plain_layers(model)
    for x, y in map(pair_of, batches):
        samples = batch_size(x)
        if samples == 0:
            continue
        x, y = on_device(x, vectors.device), on_device(y, vectors.device)
        run = functools.partial(at_points, functools.partial(_output, model, layout, x))
        samples_at_once = CPU_SAMPLES
        if chain is not None and isinstance(x, Tensor) and x.ndim >= 2:
            run = functools.partial(_chain_outputs, chain, layout, x)
            samples_at_once = CPU_SAMPLES_OF_CHAIN
        at_once = len(chunk)
        if vectors.device.type == "cpu":
            at_once = min(at_once, max(1, samples_at_once // samples))
        yield [joined(map(run, vectors.split(at_once)))], x, y


def fitting_chunk(chunk_size: int, numel: int) -> int:
    """How many weight vectors to hold at once.

    Args:
        chunk_size: at most so many.
        numel: length of a vector.

    Raises:
        ValueError: if `chunk_size` < 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    return min(chunk_size, max(1, WEIGHTS_AT_ONCE // max(1, numel)))


def joined(parts: Iterable[Outputs]) -> Outputs:
    """The outputs at several parts of the points as those at all: losses are faster of many.

    Args:
        parts: from `at_points`.
    """
    found = list(parts)
    if isinstance(found[0], Tensor):
        return torch.cat([part for part in found if isinstance(part, Tensor)])
    return [output for part in found for output in part]


def _output(model: nn.Module, layout: ParameterLayout, x: Any, vector: Tensor) -> Any:
    return call_with_tensors(model, layout.unflatten(vector, aliases=True), x)


def _chain_outputs(
    chain: list[tuple[str, nn.Module]], layout: ParameterLayout, x: Tensor, vectors: Tensor
) -> Tensor:
    weights = layout.unflatten(vectors, aliases=True)
    return run_chain(chain, weights, x, len(vectors), shared=True)


def call_with_tensors(model: nn.Module, tensors: dict[str, Tensor], inputs: Any) -> Any:
    """`call_model` as if a model's parameters were others.

    Args:
        model: any module.
        tensors: by name, for every place of a tied parameter (`ParameterLayout.unflatten`): where
            torch ties them itself, a sub-module registered twice keeps the substitutes.
        inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, tensors, args, kwargs, tie_weights=False)

    with plain_attention():
        return call_model(call, inputs)


def on_device(values: Any, device: torch.device) -> Any:
    """Inputs or targets of a batch on a device; a mapping of any class becomes a dict."""
    values = dict(values) if isinstance(values, Mapping) else values
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), values)


class _OpaqueOutputError(Exception):
    """An output holds objects that `vmap` cannot see into."""


def at_points(
    run: Callable[[Tensor], Any], points: Float[Tensor, "k _"], *, at_once: bool = True
) -> Outputs:
    """What a model says at each of K points.

    Args:
        run: from a point to what the model returns there: a tensor, a structure (a dict, tuple,
            ...) of tensors, or anything else, which is found point by point.
        points: one a row.
        at_once: whether `vmap` may run all of them in one pass.

    Returns:
        `(K, N, ...)` if the model returns a tensor, else a list of what it returns at each point.
    """
    if at_once and len(points) > 1:
        try:
            return _at_points_at_once(run, points)
        except _OpaqueOutputError:
            pass
    outputs = [run(point) for point in points]
    return torch.stack(outputs) if isinstance(outputs[0], Tensor) else outputs


def _at_points_at_once(run: Callable[[Tensor], Any], points: Tensor) -> Outputs:
    leaves: list[Any] = []
    structure: Any = None

    def tensors(point: Tensor) -> tuple[Tensor, ...]:
        nonlocal leaves, structure
        leaves, structure = pytree.tree_flatten(run(point))
        if not all(isinstance(leaf, Tensor | int | float | str | None) for leaf in leaves):
            raise _OpaqueOutputError
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    stacked = torch.func.vmap(tensors, randomness="different")(points)
    if structure.is_leaf() and stacked:
        return stacked[0]
    outputs = []
    for k in range(len(points)):
        own = iter([tensor[k] for tensor in stacked])
        filled = [next(own) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        outputs.append(pytree.tree_unflatten(filled, structure))
    return outputs


class Totals:
    """Sums over batches, one chunk of weight vectors after the other."""

    def __init__(self, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        self.loss_fn = loss_fn
        self.weights = BatchWeights(loss_fn)
        self.losses: list[Tensor] = []
        self.accuracies: list[Tensor] = []

    def add(self, answers: Iterator[Answers]) -> None:
        """Add what the model says at one chunk of weight vectors, batch by batch."""
        seen, count, targets = False, 0.0, 0
        loss: Tensor | None = None
        right: Tensor | None = None
        for parts, x, y in answers:
            seen = True
            weight = self.weights(x, y)
            if weight == 0:
                continue
            found = [(losses_at_points(self.loss_fn, out, y), self._hits(out, y)) for out in parts]
            batch = self.weights.sums(torch.cat([losses for losses, _ in found]), weight)
            loss = batch if loss is None else loss + batch
            count += weight
            hits = [of_part for _, of_part in found if of_part is not None]
            counted = self.weights.counted(y)
            if hits and counted is not None:
                right = torch.cat(hits) if right is None else right + torch.cat(hits)
                targets += int(counted.sum())
        if not seen:
            raise ValueError(
                "batches yields no samples: expected an iterable that can be read again for each "
                "chunk of points, not an iterator"
            )
        if loss is None:
            raise self.weights.no_target_counts()
        self.losses.append(loss.cpu() / count)
        if right is not None:
            self.accuracies.append(right.cpu() / targets)

    def _hits(self, outputs: Outputs, targets: Any) -> Tensor | None:
        """How many targets are the largest output, at each point; None where that means nothing."""
        counted = self.weights.counted(targets)
        if counted is None or not isinstance(outputs, Tensor):
            return None
        dim = self._class_dim(outputs.shape, targets.shape)
        if dim is None:
            return None
        return ((outputs.argmax(dim) == targets) & counted).flatten(1).sum(1).double()

    def _class_dim(self, outputs: torch.Size, targets: torch.Size) -> int | None:
        """Where the classes are: `(K, N, C, ...)` as in torch, or last."""
        if len(outputs) != len(targets) + 2:
            return None
        dims = {2} if outputs[1:2] + outputs[3:] == targets else set()
        if outputs[1:-1] == targets and not (dims and self.weights.of_classes):
            dims.add(len(outputs) - 1)
        return dims.pop() if len(dims) == 1 else None

    def evaluation(self) -> Evaluation:
        """The means over all that was added."""
        empty = torch.zeros(0, dtype=torch.float64)
        loss = torch.cat(self.losses) if self.losses else empty
        return Evaluation(loss, torch.cat(self.accuracies) if self.accuracies else None)


def losses_at_points(
    loss_fn: Callable[[Any, Any], Tensor], outputs: Outputs, targets: Tensor
) -> Float[Tensor, " k"]:
    """The loss at each of K weight vectors.

    Args:
        loss_fn: `(output, target) -> scalar`, a mean over the batch.
        outputs: `(K, N, ...)`, or a list of K outputs.
        targets: `(N, ...)`, the same for all.

    Raises:
        ValueError: if `loss_fn` does not return a scalar.
    """
    flat = targets.ndim == 1 and is_whole(targets) and not bool((targets < 0).any())
    if loss_fn is F.cross_entropy and flat and isinstance(outputs, Tensor) and outputs.ndim == 3:
        # Samples innermost: torch is several times slower along rows of a few classes.
        by_class, repeated = outputs.mT.contiguous(), targets.expand(len(outputs), -1)
        return F.cross_entropy(by_class, repeated, reduction="none").mean(1)
    losses = [loss_fn(out, targets) for out in outputs]
    if losses[0].ndim != 0:
        raise ValueError(
            "loss_fn must return a scalar, a mean over the batch, got shape "
            f"{tuple(losses[0].shape)}"
        )
    return torch.stack(losses)

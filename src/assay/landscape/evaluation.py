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

from assay.functional.batchnorm import running_norms
from assay.functional.batchnorm import update_bn as recompute_bn
from assay.functional.ensemble import IGNORED
from assay.functional.parameters import ParameterLayout, call_with_vector, vector_to_parameters
from assay.functional.products import as_batches, pair_of, plain_attention

Batches = Iterable[Any]  # of pairs (x, y); or one such pair, see `as_batches`
Outputs = Tensor | list[Any]  # at K points: stacked, or one by one if they are no tensors

# On a CPU, running several weight vectors at once saves the overhead of small batches; beyond about
# this many samples (vectors times batch) activations leave the cache, and it is slower than a loop.
CPU_SAMPLES = 1024


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
            not ignored; None where the outputs are not logits or the targets not classes.

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
    chunk_size: int = 8,
    update_bn: bool = True,
    bn_batches: Iterable[object] | None = None,
) -> dict[str, Evaluation]:
    """Mean loss and accuracy of a model at K weight vectors.

    Chunks of weight vectors run at once through `torch.func.functional_call` under
    `torch.func.vmap`, with the same results as one after the other up to rounding. The model is in
    evaluation mode (no dropout) and left as it was.

    Running statistics of BatchNorm belong to one weight vector: at another one they show a false
    picture. A model that has them is evaluated point by point, with the statistics recomputed from
    `bn_batches` at each.

    A batch counts by its number of samples. Where targets are classes, it counts by the number of
    those that are not ignored: not `loss_fn.ignore_index` if it has one, else not −100, as in
    `torch.nn.functional.cross_entropy`. Ignored targets do not enter the accuracy, and batches with
    nothing else are left out.

    Args:
        model: its forward takes one tensor; what it returns is up to `loss_fn`.
        points: weight vectors `(P,)` in the order of `assay.functional.parameters_to_vector`; a
            tensor `(K, P)` or any iterable, which is read `chunk_size` vectors at a time.
        batches: batches `(x, y)`, or one pair `(x, y)`, by the name of the set, e.g.
            `{"train": ..., "test": ...}`; iterated once a chunk.
        loss_fn: `(output, target) -> scalar`, a mean over the batch.
        chunk_size: weight vectors held at once. On a CPU as many of them run together as make about
            1,000 samples with the batch, on other devices all. With 1, `vmap` is not used: for
            models that it cannot run (recurrent ones are recognised).
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
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
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
    layout = ParameterLayout.of(model)
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
) -> Iterator[tuple[Outputs, Tensor]]:
    """Outputs of a chunk of weight vectors, with the targets, batch by batch."""
    vectors = torch.stack(chunk)
    for x, y in map(pair_of, batches):
        if len(x) == 0:
            continue
        x, y = x.to(vectors.device), y.to(vectors.device)
        at_once = len(chunk)
        if vectors.device.type == "cpu":
            at_once = min(at_once, max(1, CPU_SAMPLES // len(x)))
        run = functools.partial(_output, model, layout, x)
        with plain_attention():
            parts = [at_points(run, part) for part in vectors.split(at_once)]
        yield joined(parts), y


def _output(model: nn.Module, layout: ParameterLayout, x: Tensor, vector: Tensor) -> Any:
    return call_with_vector(model, vector, x, layout=layout)


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


def joined(parts: list[Outputs]) -> Outputs:
    """The outputs at several parts of the points as those at all.

    Args:
        parts: from `at_points`.
    """
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return [output for part in parts for output in part]


class Totals:
    """Sums over batches, one chunk of weight vectors after the other."""

    def __init__(self, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        self.loss_fn = loss_fn
        self.ignored = _ignored_target(loss_fn)
        self.losses: list[Tensor] = []
        self.accuracies: list[Tensor] = []

    def add(self, outputs: Iterator[tuple[Outputs, Tensor]]) -> None:
        """Add the outputs of one chunk of weight vectors, with targets, all batches."""
        samples = count = 0
        loss = right = None
        for out, y in outputs:
            samples += len(y)
            counted = self._counted(out, y)
            weight = len(y) if counted is None else int(counted.sum())
            if weight == 0:
                continue
            count += weight
            batch = losses_at_points(self.loss_fn, out, y).double() * weight
            loss = batch if loss is None else loss + batch
            if counted is not None and isinstance(out, Tensor):
                hits = ((out.argmax(dim=2) == y) & counted).flatten(1).sum(dim=1).double()
                right = hits if right is None else right + hits
        if samples == 0:
            raise ValueError(
                "batches yields no samples: expected an iterable that can be read again for each "
                "chunk of points, not an iterator"
            )
        if loss is None:
            raise ValueError(f"all targets are ignored (they are {self.ignored}): no loss is left")
        self.losses.append(loss.cpu() / count)
        if right is not None:
            self.accuracies.append(right.cpu() / count)

    def _counted(self, outputs: Outputs, targets: Tensor) -> Tensor | None:
        """Which targets are classes that count; None where they are not classes."""
        logits = _are_classes(outputs, targets) if isinstance(outputs, Tensor) else _whole(targets)
        # Not as bytes, of which -100 is 156.
        return targets.long() != self.ignored if logits else None

    def evaluation(self) -> Evaluation:
        """The means over all that was added."""
        empty = torch.zeros(0, dtype=torch.float64)
        loss = torch.cat(self.losses) if self.losses else empty
        return Evaluation(loss, torch.cat(self.accuracies) if self.accuracies else None)


def _ignored_target(loss_fn: Any) -> int:
    """The class that a loss leaves out: torch's default unless it says another."""
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords.get("ignore_index", _ignored_target(loss_fn.func))
    return getattr(loss_fn, "ignore_index", IGNORED)


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
    flat = targets.ndim == 1 and _whole(targets) and not bool((targets < 0).any())
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


def _whole(targets: Tensor) -> bool:
    return not (targets.is_floating_point() or targets.is_complex())


def _are_classes(outputs: Tensor, targets: Tensor) -> bool:
    return _whole(targets) and outputs.ndim >= 3 and outputs.ndim == targets.ndim + 2

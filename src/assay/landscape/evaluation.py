"""Loss and accuracy at many weight vectors of one model."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from assay.functional.batchnorm import running_norms
from assay.functional.batchnorm import update_bn as recompute_bn
from assay.functional.parameters import ParameterLayout, call_with_vector, vector_to_parameters
from assay.functional.products import plain_attention

Batches = Iterable[tuple[Tensor, Tensor]]

# On a CPU, running several weight vectors at once saves the overhead of small batches; beyond about
# this many samples (vectors times batch) activations leave the cache, and it is slower than a loop.
CPU_SAMPLES = 1024


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured on one set of batches, at each of K weight vectors.

    Args:
        loss: mean loss over the samples, `(K,)`, float64.
        accuracy: share of samples whose largest output is their target, `(K,)`, in [0, 1]; None
            where the targets are not classes.

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
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
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

    Args:
        model: its forward takes one tensor.
        points: weight vectors `(P,)` in the order of `assay.functional.parameters_to_vector`; a
            tensor `(K, P)` or any iterable, which is read `chunk_size` vectors at a time.
        batches: batches `(x, y)` by the name of the set, e.g. `{"train": ..., "test": ...}`;
            iterated once a chunk.
        loss_fn: `(output, target) -> scalar`, a mean over the batch.
        chunk_size: weight vectors held at once. On a CPU as many of them run together as make about
            1,000 samples with the batch, on other devices all. With 1, `vmap` is not used: for
            models that it cannot run (recurrent ones are recognised).
        update_bn: whether to recompute running statistics at each point; without effect on models
            that have none.
        bn_batches: the data to take the statistics of, normally the training set.

    Returns:
        An `Evaluation` for each set, in the order of `points`.

    Raises:
        ValueError: if there are no points, or a set has no batches when a chunk begins (an iterator
            instead of an iterable), or `chunk_size < 1`, or the model has running statistics and
            `bn_batches` is missing.

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
    recompute = update_bn and bool(running_norms(model))
    if recompute and bn_batches is None:
        raise ValueError(
            "the model has running statistics (BatchNorm), which do not fit other weights: give "
            "bn_batches= (training data) to recompute them, or update_bn=False to keep them"
        )
    if recompute or any(isinstance(module, nn.RNNBase) for module in model.modules()):
        chunk_size = 1
    # A copy, so that an interrupted evaluation leaves no trace in the user's model.
    model = copy.deepcopy(model).eval()
    layout = ParameterLayout.of(model)
    totals = {name: Totals(loss_fn) for name in batches}
    remaining = iter(points)
    while chunk := list(islice(remaining, chunk_size)):
        if recompute:
            vector_to_parameters(chunk[0], model)
            recompute_bn(model, bn_batches if bn_batches is not None else ())
        for name, total in totals.items():
            total.add(_outputs(model, chunk, batches[name], layout))
    results = {name: total.evaluation() for name, total in totals.items()}
    if any(len(result.loss) == 0 for result in results.values()):
        raise ValueError("points is empty: expected at least one weight vector")
    return results


def _outputs(
    model: nn.Module, chunk: list[Tensor], batches: Batches, layout: ParameterLayout
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs `(k, N, ...)` of a chunk of weight vectors, with the targets, batch by batch."""

    def outputs(vector: Tensor, x: Tensor) -> Tensor:
        result = call_with_vector(model, vector, x, layout=layout)
        assert isinstance(result, Tensor)
        return result

    vectors = torch.stack(chunk)
    batched = torch.func.vmap(outputs, in_dims=(0, None))
    for x, y in batches:
        if len(x) == 0:
            continue
        x, y = x.to(vectors.device), y.to(vectors.device)
        at_once = len(chunk)
        if vectors.device.type == "cpu":
            at_once = min(at_once, max(1, CPU_SAMPLES // len(x)))
        with plain_attention():
            parts = [
                batched(part, x) if len(part) > 1 else outputs(part[0], x).unsqueeze(0)
                for part in vectors.split(at_once)
            ]
        yield torch.cat(parts), y


class Totals:
    """Sums over batches, one chunk of weight vectors after the other."""

    def __init__(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss_fn = loss_fn
        self.losses: list[Tensor] = []
        self.accuracies: list[Tensor] = []

    def add(self, outputs: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Add outputs `(k, N, ...)` of one chunk of weight vectors, with targets, all batches."""
        samples = 0
        loss = right = None
        for out, y in outputs:
            batch = losses_at_points(self.loss_fn, out, y).double() * len(y)
            loss = batch if loss is None else loss + batch
            samples += len(y)
            if _are_classes(out, y):
                hits = (out.argmax(dim=2) == y).flatten(1).double().mean(dim=1) * len(y)
                right = hits if right is None else right + hits
        if loss is None or samples == 0:
            raise ValueError(
                "batches yields no samples: expected an iterable that can be read again for each "
                "chunk of points, not an iterator"
            )
        self.losses.append(loss.cpu() / samples)
        if right is not None:
            self.accuracies.append(right.cpu() / samples)

    def evaluation(self) -> Evaluation:
        """The means over all that was added."""
        empty = torch.zeros(0, dtype=torch.float64)
        loss = torch.cat(self.losses) if self.losses else empty
        return Evaluation(loss, torch.cat(self.accuracies) if self.accuracies else None)


def losses_at_points(
    loss_fn: Callable[[Any, Any], Tensor], outputs: Tensor, targets: Tensor
) -> Float[Tensor, " k"]:
    """The loss at each of K weight vectors.

    Args:
        loss_fn: `(output, target) -> scalar`, a mean over the batch.
        outputs: `(K, N, ...)`.
        targets: `(N, ...)`, the same for all.
    """
    plain = loss_fn is F.cross_entropy and outputs.ndim == 3 and targets.ndim == 1
    if plain and not targets.is_floating_point() and not bool((targets < 0).any()):
        # Samples innermost: torch is several times slower along rows of a few classes.
        by_class, repeated = outputs.mT.contiguous(), targets.expand(len(outputs), -1)
        return F.cross_entropy(by_class, repeated, reduction="none").mean(1)
    return torch.stack([loss_fn(out, targets) for out in outputs])


def _are_classes(outputs: Tensor, targets: Tensor) -> bool:
    integers = not (targets.is_floating_point() or targets.is_complex())
    return integers and outputs.ndim >= 3 and outputs.ndim == targets.ndim + 2

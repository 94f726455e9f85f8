"""Walking through autograd's graph."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes_behind(tensors: Iterable[Tensor], *, past: Iterable[Tensor] = ()) -> Iterator[Any]:
    """Every node of the graph on which some tensors depend, once.

    Args:
        tensors: of any shapes; those without a graph are passed over.
        past: tensors through which the walk does not go.

    Example:
        >>> import torch
        >>> from assay.functional.graph import nodes_behind
        >>> x = torch.ones(2, requires_grad=True)
        >>> [node.name() for node in nodes_behind([x.exp()])]
        ['ExpBackward0', 'torch::autograd::AccumulateGrad']
    """
    seen: set[Any] = {tensor.grad_fn for tensor in past}
    stack: list[Any] = [tensor.grad_fn for tensor in tensors]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [child for child, _ in node.next_functions]

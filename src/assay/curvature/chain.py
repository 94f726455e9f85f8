"""Chains of matrix products and entrywise functions: all columns in one product, layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

_PRODUCTS = {"AddmmBackward0", "MmBackward0"}
_ENTRYWISE = {
    "ReluBackward0", "LeakyReluBackward0", "TanhBackward0", "SigmoidBackward0", "GeluBackward0",
    "SiluBackward0", "EluBackward0", "SoftplusBackward0", "ViewBackward0", "UnsafeViewBackward0",
}  # fmt: skip
_LEAF = "torch::autograd::AccumulateGrad"


@dataclass(frozen=True)
class _Product:
    """x ↦ x Wᵀ + b."""

    matrix: Tensor

    def pull_back(self, V: Tensor, *, fresh: bool) -> Tensor:
        return (V.reshape(-1, V.shape[-1]) @ self.matrix).view(*V.shape[:-1], -1)


@dataclass(frozen=True)
class _Relu:
    """x ↦ max(x, 0), whose result says where its slope is 1."""

    result: Tensor

    def pull_back(self, V: Tensor, *, fresh: bool) -> Tensor:
        if len(V) == 1:
            v = V.reshape(self.result.shape)
            return torch.ops.aten.threshold_backward(v, self.result, 0).unsqueeze(0)
        return _scaled(V, (self.result > 0).to(V.dtype), fresh=fresh)


@dataclass(frozen=True)
class _Entrywise:
    """Consecutive functions of each entry alone, from an edge of the graph down to another."""

    top: GradientEdge
    bottom: GradientEdge

    def pull_back(self, V: Tensor, *, fresh: bool) -> Tensor:
        if len(V) == 1:
            return self._gradient(V[0]).unsqueeze(0)
        # The Jacobian is diagonal.
        return _scaled(V, self._gradient(torch.ones_like(V[0])), fresh=fresh)

    def _gradient(self, v: Tensor) -> Tensor:
        return torch.autograd.grad([self.top], [self.bottom], [v], retain_graph=True)[0]


def _scaled(V: Tensor, slope: Tensor, *, fresh: bool) -> Tensor:
    V = V.reshape(-1, *slope.shape)
    return V.mul_(slope) if fresh else V * slope


_Step = _Product | _Relu | _Entrywise


class Chain:
    """The way from an output back through all recorded uses, where it never branches.

    Autograd sends columns back one by one, or in a batch that it holds at all layers at once. In a
    chain the columns at a layer are needed for the next one alone: all of them are one product,
    and two layers' are alive at a time.

    Args:
        steps: from the output down; a number says that the columns there are those of a use.
    """

    def __init__(self, steps: list[int | _Step]) -> None:
        self.steps = steps

    def columns(self, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Place of each use and the columns at its output, `(K, *shape)`, from last to first.

        Args:
            columns: `(K, *output.shape)`.
        """
        V, fresh = columns, False
        for step in self.steps:
            if isinstance(step, int):
                yield step, V
                fresh = False  # whoever has it may keep it
            else:
                V = step.pull_back(V, fresh=fresh)
                fresh = True


def find_chain(output: Tensor, edges: Sequence[GradientEdge]) -> Chain | None:
    """The chain behind a tensor, None if the graph is none.

    Args:
        output: where the columns start.
        edges: all places where they are wanted.
    """
    places = {edge.node: place for place, edge in enumerate(edges)}
    if len(places) < len(edges):
        return None
    steps: list[int | _Step] = []
    node: Any = output.grad_fn  # its saved tensors are known to no stub
    while node is not None:
        if node in places:
            steps.append(places.pop(node))
            if not places:
                return Chain(steps)
        if node.name() in _PRODUCTS:
            *added, inner, matrix = (child for child, _ in node.next_functions)
            scaled = getattr(node, "_saved_alpha", 1) != 1
            if inner is None or scaled or not all(map(_is_parameter, (*added, matrix))):
                return None
            steps.append(_Product(node._saved_mat2.detach().T))
            node = inner
        elif node.name() in _ENTRYWISE:
            top = node
            node = node.next_functions[0][0]
            while node is not None and node.name() in _ENTRYWISE and node not in places:
                node = node.next_functions[0][0]
            if node is None:
                return None
            if top.name() == "ReluBackward0" and top.next_functions[0][0] is node:
                steps.append(_Relu(top._saved_result.detach()))
            else:
                steps.append(_Entrywise(GradientEdge(top, 0), GradientEdge(node, 0)))
        else:
            return None
    return None


def _is_parameter(node: Node | None) -> bool:
    """Whether nothing but a leaf, or its transpose, or a constant is behind this place."""
    if node is not None and node.name() == "TBackward0":
        node = node.next_functions[0][0]
    return node is None or node.name() == _LEAF

"""From what was captured to how each parameter's derivatives are computed."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from assay.curvature.capture import Record
from assay.curvature.chain import find_chain
from assay.curvature.layout import Layout, candidates
from assay.curvature.objective import Objective
from assay.curvature.uses import CallUse, ConvUse, LinearUse, MergedUse, Use, Weight
from assay.functional.graph import nodes_behind

ROWS_AT_ONCE = 2048
"""Rows (samples times columns) of one matrix product; beyond that it gains no more."""

ByPlace = list[Tensor] | dict[int, Tensor]
"""Gradients at recorded outputs, by the place of the use: a list of all, or some."""


@dataclass(eq=False)
class Part:
    """One argument of one use (or of several merged ones)."""

    use: Use
    slot: str
    where: list[int]

    @property
    def weight(self) -> Weight:
        """What the argument was."""
        return self.use.slots[self.slot]

    def gather(self, gradients: ByPlace) -> Any:
        """What the use's methods take, from the gradients at recorded outputs."""
        if isinstance(self.use, MergedUse):
            return [gradients[i] for i in self.where]
        return gradients[self.where[0]]


@dataclass(eq=False)
class Source:
    """Everything that one parameter does in the graph."""

    name: str
    parameter: Tensor
    parts: list[Part] = field(default_factory=list)
    opaque: str | None = None

    @property
    def single(self) -> Part | None:
        """The only part, if the parameter itself has just one."""
        if self.opaque is None and len(self.parts) == 1 and self.parts[0].weight.direct:
            return self.parts[0]
        return None

    @property
    def unused(self) -> bool:
        """Whether the loss does not depend on it."""
        return self.opaque is None and not self.parts

    @property
    def unfolds(self) -> bool:
        """Whether it is used in convolutions, whose activations are larger than their inputs."""
        return any(isinstance(part.use, ConvUse) for part in self.parts)

    def reached(self, gradients: ByPlace) -> bool:
        """Whether these are the gradients at its uses, or some of them."""
        return isinstance(gradients, list) or any(
            place in gradients for part in self.parts for place in part.where
        )


class Plan:
    """Who needs which gradient.

    Args:
        record: of the forward pass.
        objective: the loss.
        params: the selected parameters.
    """

    def __init__(self, record: Record, objective: Objective, params: dict[str, Tensor]) -> None:
        self.objective = objective
        opaque = dict(record.opaque)
        opaque.update(_unseen(record, objective.loss, params))
        uses = [use for use in record.uses if not _covers_only(use, opaque)]
        self.uses = self._with_layouts(uses, opaque)
        self.edges = [use.edge for use in self.uses]
        self.sources = self._sources(params, opaque)

    # -- gradients -------------------------------------------------------------------------------

    def gradients(
        self,
        outputs: Sequence[Tensor] | Sequence[GradientEdge],
        cotangents: list[Tensor],
        *,
        retain_graph: bool = True,
    ) -> list[Tensor]:
        """At every recorded output, in the dtype of the use's weights."""
        if not self.edges:
            return []
        found = torch.autograd.grad(
            outputs, self.edges, cotangents, retain_graph=retain_graph, allow_unused=True
        )
        return self._complete(found)

    def column_gradients(self, output: Tensor, columns: Tensor) -> Iterator[tuple[Tensor, ByPlace]]:
        """Some columns, and what they are at recorded outputs, behind a leading dimension as well.

        The latter are in the dtype of the use's weights. In a chain it is all columns (or as many
        as memory should hold) at one use after the other, in any other graph one column at all
        uses.

        Args:
            output: of the model.
            columns: `(K, *output.shape)`.
        """
        chain = find_chain(output, self.edges) if self.simple and not self.merged else None
        if chain is None or not len(columns):
            for column in columns.split(1):
                gradients = self.gradients([output], [column[0]])
                yield column, [g.unsqueeze(0) for g in gradients]
            return
        rows = max(1, columns[0, ..., 0].numel())
        at_once = max(1, ROWS_AT_ONCE // rows)
        for some in columns.chunk(math.ceil(len(columns) / at_once)):
            for place, reached in chain.columns(some):
                yield some, {place: reached.to(self.uses[place].dtype)}

    def _complete(self, found: Sequence[Tensor | None]) -> list[Tensor]:
        return [
            torch.zeros(use.shape, dtype=use.dtype, device=_device(use))
            if g is None
            else g.detach().to(use.dtype)
            for use, g in zip(self.uses, found, strict=True)
        ]

    def columns(
        self, source: Source, gradients: ByPlace, outputs: list[Tensor], tangents: list[Tensor]
    ) -> Tensor:
        """Jᵀv of each sample for a parameter with any number of uses, `(N, *shape)`.

        Args:
            source: the parameter.
            gradients: from `gradients`.
            outputs: where they started.
            tangents: with what.
        """
        if source.opaque is not None:
            return self._loop(source, outputs, tangents)
        total: Tensor | None = None
        for part in source.parts:
            rows = part.use.columns(part.slot, behind_one(part.gather(gradients)))[0]
            rows = _pull_back(part.weight, rows, source)
            total = rows if total is None else total + rows  # may be views of gradients
        if total is None:
            return source.parameter.new_zeros(self.objective.samples, *source.parameter.shape)
        return total

    def _loop(self, source: Source, outputs: list[Tensor], tangents: list[Tensor]) -> Tensor:
        """One backward pass a sample: slow, and right for every graph."""
        samples = self.objective.samples
        layouts = {id(tensor): layout for tensor, layout in self.objective.sources}
        if not all(id(output) in layouts for output in outputs):
            raise ValueError(
                f"parameter {source.name!r}: {source.opaque}; its samples' gradients cannot be "
                "separated because the loss is computed inside the model: return the output too"
            )
        if id(source.parameter) in _reached(self.objective.loss, outputs):
            raise ValueError(
                f"parameter {source.name!r} is in the loss beside the model's output (a penalty, a "
                "scale of the loss), which therefore does not tell the samples' gradients: return "
                "one value a sample from the loss, or leave the parameter out of params"
            )
        rows = source.parameter.new_empty(samples, *source.parameter.shape)
        for n in range(samples):
            only = []
            for output, tangent in zip(outputs, tangents, strict=True):
                masked = torch.zeros_like(tangent)
                layouts[id(output)].split(masked)[n] = layouts[id(output)].split(tangent)[n]
                only.append(masked)
            (rows[n],) = torch.autograd.grad(
                outputs, source.parameter, only, retain_graph=True, materialize_grads=True,
                allow_unused=True,
            )  # fmt: skip
        return rows

    # -- setting up ------------------------------------------------------------------------------

    def _with_layouts(self, uses: list[Use], opaque: dict[str, str]) -> list[Use]:
        samples = self.objective.samples
        folded = any(layout.fold > 1 for _, layout in self.objective.sources)
        open_: list[tuple[Use, list[Layout]]] = []
        kept: list[Use] = []
        for use in uses:
            options = [
                layout
                for layout in candidates(use.shape, samples, use.feature_dims)
                if use.fits(layout)
            ]
            if not options:
                _give_up(use, opaque, f"no axis of {tuple(use.shape)} can be that of the samples")
                continue
            kept.append(use)
            plain = [option for option in options if option.fold == 1]
            sure = samples == 1 or (len(plain) == 1 and plain[0].axis == 0)
            if sure and not use.probe and (not folded or samples == 1):
                use.layout = options[0]
            else:
                open_.append((use, options))
        if open_:
            self._probe(open_, opaque)
        return [use for use in kept if not _covers_only(use, opaque)]

    def _probe(self, open_: list[tuple[Use, list[Layout]]], opaque: dict[str, str]) -> None:
        """Find the rows of a sample from where the gradient of its output lives."""
        samples = self.objective.samples
        sources = self.objective.sources
        if not sources:
            raise ValueError(
                f"cannot tell which axis of shape {tuple(open_[0][0].shape)} counts the samples: "
                "the loss is computed inside the model and its output is not returned"
            )
        edges = [use.edge for use, _ in open_]
        generator = torch.Generator().manual_seed(0)
        left = [list(options) for _, options in open_]
        for sample in sorted({0, samples - 1, samples // 2}):
            cotangents = []
            for tensor, layout in sources:
                v = torch.zeros_like(tensor)
                part = layout.split(v)[sample]
                noise = torch.rand(part.shape, generator=generator, dtype=torch.float32)
                part.copy_(noise.to(part) + 0.5)
                cotangents.append(v)
            found = torch.autograd.grad(
                [tensor for tensor, _ in sources], edges, cotangents, retain_graph=True,
                allow_unused=True,
            )  # fmt: skip
            for i, gradient in enumerate(found):
                if gradient is not None:
                    left[i] = [option for option in left[i] if option.holds_only(gradient, sample)]
            if all(len(options) == 1 for options in left):
                break
        for (use, _), options in zip(open_, left, strict=True):
            if options:
                use.layout = options[0]
            else:
                _give_up(use, opaque, "its use mixes samples or has no axis for them")

    def _sources(self, params: dict[str, Tensor], opaque: dict[str, str]) -> dict[str, Source]:
        sources = {name: Source(name, p, opaque=opaque.get(name)) for name, p in params.items()}
        groups: dict[object, list[int]] = defaultdict(list)
        for place, use in enumerate(self.uses):
            key = use.merge_key() if isinstance(use, LinearUse) else None
            groups[place if key is None else key].append(place)
        for places in groups.values():
            use = self.uses[places[0]]
            if len(places) > 1:
                use = MergedUse.of([self.uses[i] for i in places])  # type: ignore[misc]
            for slot, weight in use.slots.items():
                for root in weight.roots:
                    if sources[root].opaque is None:
                        sources[root].parts.append(Part(use, slot, places))
        return sources

    @property
    def simple(self) -> bool:
        """Whether one backward pass is all that first order needs of the graph."""
        return not self.doubtful and all(
            source.single is not None or source.unused for source in self.sources.values()
        )

    @property
    def merged(self) -> bool:
        """Whether a use needs the gradients of several places at once."""
        return any(len(part.where) > 1 for s in self.sources.values() for part in s.parts)

    @property
    def doubtful(self) -> bool:
        """Whether a rule needs `check`."""
        return any(isinstance(use, CallUse) or not use.intact for use in self.uses)

    def check(self, gradients: list[Tensor]) -> None:
        """Give up rules that do not hold: changed inputs, functions that mix samples.

        Args:
            gradients: of the loss.
        """
        for source in self.sources.values():
            for part in source.parts:
                use = part.use
                fine = use.intact
                if fine and isinstance(use, CallUse):
                    fine = use.agrees(part.slot, part.gather(gradients))
                if not fine:
                    source.opaque = "no rule holds for one of its uses"
            if source.opaque is not None:
                source.parts = []


def behind_one(gradients: Any) -> Any:
    """Gradients of a use (a list, if it was merged) as a single column's."""
    if isinstance(gradients, list):
        return [g.unsqueeze(0) for g in gradients]
    return gradients.unsqueeze(0)


def _pull_back(weight: Weight, rows: Tensor, source: Source) -> Tensor:
    """From a tensor made of parameters to the parameter, for each sample."""
    if weight.direct:
        return rows
    (pulled,) = torch.autograd.grad(
        weight.tensor, source.parameter, rows.to(weight.tensor.dtype), retain_graph=True,
        is_grads_batched=True, allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return pulled.clone() if pulled._is_view() else pulled


def _give_up(use: Use, opaque: dict[str, str], why: str) -> None:
    for weight in use.slots.values():
        for root in weight.roots:
            opaque.setdefault(root, why)


def _covers_only(use: Use, opaque: dict[str, str]) -> bool:
    return all(root in opaque for weight in use.slots.values() for root in weight.roots)


def _device(use: Use) -> torch.device:
    return next(iter(use.slots.values())).tensor.device


def _reached(loss: Tensor, outputs: list[Tensor]) -> set[int]:
    """Leaves of the graph that the loss depends on other than through these outputs, by id."""
    behind = nodes_behind([loss], past=outputs)
    return {id(getattr(node, "variable", None)) for node in behind}


def _unseen(record: Record, loss: Tensor, params: dict[str, Tensor]) -> dict[str, str]:
    """Parameters with more places in the autograd graph than the recorded uses account for.

    Custom autograd functions, for one, take tensors past every torch function. And what changes a
    view in place cuts the recorded output off: the gradient takes another way past it.
    """
    names = {id(p): name for name, p in params.items()}
    places: Counter[Any] = Counter()
    leaves: dict[str, Any] = {}
    seen = set()
    for node in nodes_behind([loss]):
        seen.add(node)
        for child, _ in node.next_functions:
            if child is None:
                continue
            places[child] += 1
            variable = getattr(child, "variable", None)
            if id(variable) in names:
                leaves[names[id(variable)]] = child
    known = Counter(record.appearances)
    found = {}
    for use in record.uses:
        if use.edge.node in seen:
            continue
        for weight in use.slots.values():
            if weight.direct:
                known[weight.roots[0]] -= 1
            elif places[weight.tensor.grad_fn]:
                found |= dict.fromkeys(weight.roots, "one of its uses is cut off from the loss")
    unknown = [name for name, leaf in leaves.items() if places[leaf] > known[name]]
    return found | dict.fromkeys(unknown, "it is used by something that is no torch function")

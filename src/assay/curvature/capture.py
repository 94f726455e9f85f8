"""Watching a forward pass: every use of the selected parameters, whatever the model looks like."""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from assay.curvature.calls import RULES
from assay.curvature.unrolled import UNROLLED
from assay.curvature.uses import CallUse, ElementUse, Use, Weight

SAMPLE = "sample"
"""Mark of a tensor that depends on the inputs."""

_MARK = "_curvature_mark"
"""Attribute of a tensor: `SAMPLE`, or the names of the parameters that it is made of."""

_LOSSES = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
_REPEATS = {
    Tensor.expand, Tensor.expand_as, Tensor.repeat, Tensor.tile, torch.tile,
    torch.broadcast_to, Tensor.broadcast_to, Tensor.repeat_interleave, torch.repeat_interleave,
}  # fmt: skip
_IN_PLACE_WITHOUT_RESULT = {Tensor.__setitem__}


@dataclass(frozen=True)
class LossCall:
    """One call of a loss whose second derivative is known.

    Args:
        loss: the module that describes it.
        output: what the model predicted.
        target: of it.
        value: what the call returned.
    """

    loss: nn.Module
    output: Tensor
    target: Tensor
    value: Tensor


@dataclass(frozen=True)
class Step:
    """One call that depends on the inputs, for recursions that follow the whole graph.

    A call in place returns its input, so that tensors do not tell one call from the next: places
    in the graph do.

    Args:
        function: that was called.
        args: of the call.
        kwargs: of the call.
        inputs: those arguments that depend on the model's inputs.
        output: of the call.
        weights: names of the parameters among the arguments.
        bottom: places of `inputs` as they were before the call; None for one without a gradient.
        top: place of `output` right after the call.
        versions: of `inputs` before the call.
    """

    function: Callable
    args: tuple
    kwargs: dict
    inputs: tuple[Tensor, ...]
    output: Tensor
    weights: tuple[str, ...]
    bottom: tuple[GradientEdge | None, ...]
    top: GradientEdge
    versions: tuple[int, ...]

    @property
    def intact(self) -> bool:
        """Whether the inputs still have the values that the call saw."""
        return all(t._version == v for t, v in zip(self.inputs, self.versions, strict=True))


@dataclass
class Record:
    """What a forward pass left: the uses of the parameters and the calls of losses."""

    uses: list[Use] = field(default_factory=list)
    losses: list[LossCall] = field(default_factory=list)
    appearances: Counter = field(default_factory=Counter)
    opaque: dict[str, str] = field(default_factory=dict)
    steps: list[Step] | None = None

    def clear(self) -> None:
        """Let go of the graph."""
        self.uses.clear()
        self.losses.clear()
        self.appearances.clear()
        self.opaque.clear()
        if self.steps is not None:
            self.steps.clear()


class Capture(TorchFunctionMode):
    """Sees every torch function that is called inside the block.

    A parameter's use is found where it happens, in whatever module or function: that is what makes
    tied weights, functional calls, parametrizations and bare parameters alike. Tensors made of
    parameters alone are `Weight`s too; tensors that depend on the inputs are marked.

    Args:
        params: the selected parameters by name.
        others: parameters that are constants here.
        buffers: of the model: what a pass writes to them is forgotten with it.
        trace: also record every call that depends on the inputs.
        per_sample: whether samples must not be mixed.
    """

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        others: Iterable[Tensor] = (),
        buffers: Iterable[Tensor] = (),
        *,
        trace: bool = False,
        per_sample: bool = True,
    ) -> None:
        super().__init__()
        self.record = Record(steps=[] if trace else None)
        self.per_sample = per_sample
        self._weights = {id(p): Weight(p, (name,), True) for name, p in params.items()}
        self._constants = {id(p) for p in others} - set(self._weights)
        self._buffers = list(buffers)
        self._inputs: dict[int, Tensor] = {}
        self.samples = 0

    def mark_inputs(self, inputs: Any, samples: int) -> None:
        """Tell which tensors the samples are in."""
        self.samples = samples
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        self._inputs |= {id(leaf): leaf for leaf in leaves if samples in leaf.shape}

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that the samples came in."""
        return list(self._inputs.values())

    def start_again(self) -> None:
        """Let go of the graph and the inputs."""
        self.record.clear()
        for tensor in (*self._inputs.values(), *self._buffers):
            vars(tensor).pop(_MARK, None)
        self._inputs = {}

    def forget(self) -> None:
        """Let go of everything: nothing of the graph outlives the call."""
        self.start_again()
        self._weights = {}

    def _mark_of(self, tensor: Tensor) -> Any:
        """A `Weight`, `SAMPLE`, or None for a constant."""
        weight = self._weights.get(id(tensor))
        if weight is not None:
            return weight
        if id(tensor) in self._inputs:
            return SAMPLE
        mark = vars(tensor).get(_MARK)
        if isinstance(mark, tuple):
            return Weight(tensor, mark, False)
        if mark is None and tensor.requires_grad and id(tensor) not in self._constants:
            return SAMPLE  # what no rule explains is taken to depend on the samples
        return mark

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weights: list[Weight] = []
        sampled = False
        for tensor in _tensors(args, kwargs):
            mark = self._mark_of(tensor)
            if mark is SAMPLE:
                sampled = True
            elif mark is not None:
                weights.append(mark)
        if not weights and not sampled:
            return func(*args, **kwargs)
        if self.per_sample and func is F.batch_norm and sampled:
            _refuse_batch_statistics(args, kwargs)
        guessed = False
        if weights and not sampled and func in RULES:
            # A constant with one entry a sample, e.g. an initial state; the gradients will tell.
            guessed = sampled = self._one_each(args)
        if weights and sampled and torch.is_grad_enabled():
            unrolled = UNROLLED.get(func)
            if unrolled is not None and unrolled.accepts(*args, **kwargs):
                with self:
                    return unrolled(*args, **kwargs)
        pending = None
        if weights and sampled and torch.is_grad_enabled():
            pending = self._prepare(func, args, kwargs)
        before = self._places(args, kwargs) if self.record.steps is not None else {}
        out = func(*args, **kwargs)
        if func in _IN_PLACE_WITHOUT_RESULT:
            self._assigned(args, weights, sampled)
            return out
        tensors = [leaf for leaf in _leaves(out) if isinstance(leaf, Tensor)]
        if not tensors:
            return out
        if weights and any(t.requires_grad for t in tensors):
            sampled = self._used(func, args, kwargs, out, tensors, weights, sampled, pending)
            if guessed and self.record.uses:
                self.record.uses[-1].probe = True
        self._mark_results(tensors, weights, sampled)
        if sampled and isinstance(out, Tensor):
            self._note(func, args, kwargs, out, weights, before)
        return out

    def _one_each(self, args: tuple) -> bool:
        return any(
            isinstance(arg, Tensor) and arg.ndim > 0 and self._mark_of(arg) is None
            and len(arg) == self.samples > 1
            for arg in args
        )  # fmt: skip

    # -- parameters ------------------------------------------------------------------------------

    def _prepare(self, func: Callable, args: tuple, kwargs: dict) -> Callable | None:
        """A rule for the call, bound to its inputs as they are before the call."""
        rule = RULES.get(func)
        if rule is None:
            return None

        def weight_of(tensor: Any) -> Weight | None:
            mark = self._mark_of(tensor) if isinstance(tensor, Tensor) else None
            return mark if isinstance(mark, Weight) else None

        return rule(weight_of, *args, **kwargs)

    def _used(self, func, args, kwargs, out, tensors, weights, sampled, pending) -> bool:
        """Record the use; returns whether the result depends on the samples."""
        roots = {root for weight in weights for root in weight.roots}
        for weight in weights:
            if weight.direct:
                self.record.appearances[weight.roots[0]] += 1
        if not sampled:
            repeated = (
                func in _REPEATS
                and isinstance(out, Tensor)
                and len(weights) == 1
                and _gains_axis(weights[0].tensor, out, self.samples)
            )
            if repeated:
                use = ElementUse(
                    {"weight": weights[0]}, out.shape, get_gradient_edge(out), feature_dims=0,
                    probe=True, factors={"weight": 1.0},
                )  # fmt: skip
                self.record.uses.append(use)
                return True
            for tensor in tensors:
                # Its roots alone: a tensor that held itself would live, with its graph, until
                # garbage is collected.
                vars(tensor)[_MARK] = tuple(sorted(roots))
            return False
        if not isinstance(out, Tensor):
            self._make_opaque(roots, f"{_name(func)} returns several tensors")
            return True
        use = pending(out) if pending is not None else None
        if use is None:
            use = self._call_use(func, args, kwargs, out)
        covered = {weight.roots for weight in use.slots.values()} if use is not None else set()
        missing = {root for w in weights if w.roots not in covered for root in w.roots}
        if missing:
            self._make_opaque(missing, f"no rule for its use in {_name(func)}")
        if use is not None:
            self.record.uses.append(use)
        return True

    def _call_use(self, func: Callable, args: tuple, kwargs: dict, out: Tensor) -> Use | None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        held: list[Any] = []
        slots: dict[str, Weight] = {}
        places: dict[str, int] = {}
        batched: list[int] = []
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                held.append(leaf)
                continue
            mark = self._mark_of(leaf)
            if isinstance(mark, Weight):
                if any(mark.tensor is weight.tensor for weight in slots.values()):
                    return None  # one tensor twice in a call: its gradient is not one slot's
                slots[f"weight{place}"] = mark
                places[f"weight{place}"] = place
            elif mark is SAMPLE:
                if leaf.ndim == 0 or leaf.shape[0] != self.samples:
                    return None
                batched.append(place)
            held.append(leaf.detach())
        if out.ndim == 0 or out.shape[0] != self.samples or any(out is leaf for leaf in leaves):
            return None
        use = CallUse(
            slots, out.shape, get_gradient_edge(out), feature_dims=out.ndim - 1,
            function=func, args=held, spec=spec, places=places, batched=batched,
        )  # fmt: skip
        use.saved = [(held[place], held[place]._version) for place in batched]
        return use

    def _make_opaque(self, roots: Iterable[str], why: str) -> None:
        for root in roots:
            self.record.opaque.setdefault(root, why)

    # -- marks -----------------------------------------------------------------------------------

    def _mark_results(self, tensors: list[Tensor], weights: list[Weight], sampled: bool) -> None:
        for tensor in tensors:
            if sampled and id(tensor) not in self._weights:
                vars(tensor)[_MARK] = SAMPLE
            elif weights and not tensor.requires_grad:
                vars(tensor).pop(_MARK, None)

    def _assigned(self, args: tuple, weights: list[Weight], sampled: bool) -> None:
        target = args[0]
        if weights:
            roots = {root for weight in weights for root in weight.roots}
            self._make_opaque(roots, "it is assigned to a part of a tensor")
        if sampled or weights:
            target.__dict__[_MARK] = SAMPLE

    def _places(self, args: tuple, kwargs: dict) -> dict[int, tuple[GradientEdge | None, int]]:
        """Place in the graph and version of each argument that depends on the inputs."""
        return {
            id(t): (get_gradient_edge(t) if t.requires_grad else None, t._version)
            for t in _tensors(args, kwargs)
            if self._mark_of(t) is SAMPLE
        }

    def _note(self, func, args, kwargs, out: Tensor, weights: list[Weight], before: dict) -> None:
        """Remember calls of losses, and every step if asked to."""
        kind = _LOSSES.get(func)
        if kind is not None:
            call = _loss_call(kind, out, *args, **kwargs)
            if call is not None:
                self.record.losses.append(call)
                return
        if self.record.steps is None or not out.requires_grad:
            return
        inputs = tuple(t for t in _tensors(args, kwargs) if id(t) in before)
        bottom, versions = (
            zip(*(before[id(t)] for t in inputs), strict=True) if inputs else ((), ())
        )
        top = get_gradient_edge(out)
        if place(top) in [place(edge) for edge in bottom]:
            return  # it returned its input as it was: a dropout in evaluation mode
        names = tuple(root for weight in weights for root in weight.roots)
        self.record.steps.append(
            Step(func, args, kwargs, inputs, out, names, bottom, top, versions)
        )


def place(edge: GradientEdge | None) -> tuple[Any, int]:
    """What tells a place in the graph from others.

    Args:
        edge: the place; None for a tensor without a gradient.
    """
    return (None, 0) if edge is None else (edge.node, edge.output_nr)


def _loss_call(kind: type[nn.Module], value: Tensor, *args: Any, **kwargs: Any) -> LossCall | None:
    names = ("input", "target", "weight")
    given = dict(zip(names, args, strict=False)) | kwargs
    if len(args) > len(names):
        return None
    for legacy in ("size_average", "reduce"):
        if given.pop(legacy, None) is not None:
            return None
    output, target, weight = given.pop("input"), given.pop("target"), given.pop("weight", None)
    if kind is nn.MSELoss:
        if weight is not None:
            return None
        loss = nn.MSELoss(**given)
    else:
        loss = kind(weight=weight, **given)
    return LossCall(loss, output, target, value)


def _refuse_batch_statistics(args: tuple, kwargs: dict) -> None:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    if (dict(zip(names, args, strict=False)) | kwargs).get("training", False):
        raise ValueError(
            "F.batch_norm(training=True) mixes the samples of a batch, so that a sample has no "
            "gradient of its own: evaluate with running statistics"
        )


def _gains_axis(weight: Tensor, out: Tensor, samples: int) -> bool:
    """Whether a repetition made an axis as long as the batch out of nothing or of a 1."""
    aligned = (1,) * (out.ndim - weight.ndim) + tuple(weight.shape)
    return (
        any(new == samples and old == 1 for new, old in zip(out.shape, aligned, strict=True))
        and samples != 1
    )


def _tensors(args: tuple, kwargs: dict) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (item for item in arg if isinstance(item, Tensor))
    for arg in kwargs.values():
        if isinstance(arg, Tensor):
            yield arg


def _leaves(out: Any) -> Iterable[Any]:
    if isinstance(out, Tensor):
        return (out,)
    if isinstance(out, list | tuple):
        return pytree.tree_leaves(out)
    return ()


def _name(func: Callable) -> str:
    return getattr(func, "__name__", repr(func))


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Eager code and the ordinary kernels, where the single operations can be seen."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # Importing the compiler takes a second and 50 MB; nothing is compiled before that.
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        with eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)

"""Does the signal get through? Activations forward and gradients backward, module by module."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from assay.functional import call_model, repeatable

# Functions that can switch units off: a unit whose output is 0 for every sample of a batch is dead.
_RECTIFYING = ("relu", "relu6", "leaky_relu", "hardtanh", "threshold")
# Functions with flat ends: their slope relative to the steepest, from their output.
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda y: 1 - y.square(),
    "sigmoid": lambda y: 4 * y * (1 - y),
    "softsign": lambda y: (1 - y.abs()).square(),
    "hardsigmoid": lambda y: ((y > 0) & (y < 1)).to(y),
}
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Threshold: "threshold",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Softsign: "softsign",
    nn.Hardsigmoid: "hardsigmoid",
}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "relu"),
    F.relu6: "relu6",
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_), "tanh"),
    **dict.fromkeys(
        (F.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_), "sigmoid"
    ),
    F.softsign: "softsign",
    F.hardsigmoid: "hardsigmoid",
}
_WEIGHTED = (nn.Linear, _ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)

FLAT = 0.05  # a unit is saturated where its slope is below this share of the steepest
MANY = 0.5  # share of dead or saturated units from which advice names a layer
FAR = 1e3  # factor by which a norm has to change through the depth of a model to be named


@dataclass(frozen=True)
class ModuleSignal:
    """What passes through one module.

    Args:
        name: of the module; an activation that its parent calls as a function has the parent's name
            and its own, e.g. `"block.relu()"`.
        kind: class of the module, or name of the function.
        calls: how often the pass calls it; the figures are over all calls.
        second_moment: mean square q of its outputs.
        gradient_norm: ‖δ‖ of the loss's gradient in its outputs; 0 where none arrives, NaN where
            none can (no parameter or input in front of it to be differentiated).
        dead: share of its units that are 0 for all samples and positions; None if it is no
            rectifier.
        saturated: share of its outputs where its slope is below 5 % of the steepest; None if it has
            no flat ends.
        has_weights: whether it is a layer of the kind that growth is measured over (linear,
            convolution, recurrent, attention).

    Example:
        >>> from assay.analysis import ModuleSignal
        >>> ModuleSignal("fc", "Linear", 1, 1.0, 0.1).has_weights
        False
    """

    name: str
    kind: str
    calls: int
    second_moment: float
    gradient_norm: float
    dead: float | None = None
    saturated: float | None = None
    has_weights: bool = False


Trouble = Literal[
    "overflow",
    "no gradient",
    "vanishing gradient",
    "exploding gradient",
    "silent",
    "vanishing signal",
    "exploding signal",
    "dead",
    "saturated",
]


@dataclass(frozen=True)
class Advice:
    """What is wrong with a model's signals, and what to do.

    Args:
        kind: of trouble.
        text: one or two sentences that name the module.

    Example:
        >>> from assay.analysis import Advice
        >>> print(Advice("dead", "Dead units: all of '3' (ReLU)."))
        Dead units: all of '3' (ReLU).
    """

    kind: Trouble
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class PropagationReport:
    """How a signal goes forward and a gradient backward through a model.

    Args:
        loss: of the batch.
        modules: in the order in which they first run.
        forward_growth: slope of log q over the layers with weights, a layer; 0 keeps the signal,
            −1.8 is a factor 1/6. NaN with fewer than two such layers.
        backward_growth: slope of log ‖δ‖ over the same layers, from the input to the output:
            positive where gradients vanish on their way back. NaN likewise.
        advice: what is wrong and what to do, the worst first; empty if nothing is.

    Example:
        >>> from assay.analysis import PropagationReport
        >>> PropagationReport(0.5, (), float("nan"), float("nan"), ()).healthy
        True
    """

    loss: float
    modules: tuple[ModuleSignal, ...]
    forward_growth: float
    backward_growth: float
    advice: tuple[Advice, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is nothing to advise."""
        return not self.advice

    @property
    def layers(self) -> tuple[ModuleSignal, ...]:
        """The modules with weights."""
        return tuple(module for module in self.modules if module.has_weights)

    def rows(self) -> list[dict[str, str | int | float | None]]:
        """The modules as flat rows of a table."""
        return [
            {
                "module": m.name,
                "kind": m.kind,
                "second moment": m.second_moment,
                "gradient norm": m.gradient_norm,
                "dead": m.dead,
                "saturated": m.saturated,
            }
            for m in self.modules
        ]

    def __str__(self) -> str:
        width = max((len(m.name) for m in self.modules), default=6)
        lines = [f"{'module':<{width}}  second moment  gradient norm   dead  saturated"]
        for m in self.modules:
            dead = "" if m.dead is None else f"{m.dead:.0%}"
            saturated = "" if m.saturated is None else f"{m.saturated:.0%}"
            lines.append(
                f"{m.name:<{width}}  {m.second_moment:13.3g}  {m.gradient_norm:13.3g}  "
                f"{dead:>5}  {saturated:>9}"
            )
        return "\n".join(
            [*lines, *(map(str, self.advice or ("Signals and gradients get through.",)))]
        )


def propagation_report(
    model: nn.Module, batch: tuple[Any, Any], loss_fn: Callable[[Any, Any], Tensor]
) -> PropagationReport:
    """Measure what one batch and its gradient look like at every module, and say what is wrong.

    One forward and one backward pass. Seen are the outputs of all modules without children, of
    attention and recurrent layers, and of activations that are called as functions. Weights,
    gradients, buffers, modes, hooks and random state are as before afterwards.

    Args:
        model: any module; its outputs may be any structure. Passes are made in its present mode: in
            training mode with dropout and BatchNorm of this batch, as in training.
        batch: `(inputs, targets)`; inputs may be a tensor, a tuple, or a mapping of keyword
            arguments.
        loss_fn: `(output, targets) -> scalar`.

    Returns:
        The report; `print` it, or use its figures.

    Raises:
        ValueError: if the inputs are empty, the inputs or targets are not finite and so is what
            comes of them, or the loss is not a scalar tensor or depends on no parameter or input.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from assay.analysis import propagation_report
        >>> layers = [m for _ in range(20) for m in (nn.Linear(64, 64), nn.ReLU())]
        >>> model = nn.Sequential(*layers, nn.Linear(64, 3))
        >>> batch = torch.randn(32, 64), torch.randint(3, (32,))
        >>> report = propagation_report(model, batch, nn.functional.cross_entropy)
        >>> report.backward_growth > 0.5  # gradients vanish with torch's default initialisation
        True
        >>> report.advice[0].text.split(":")[0]
        "Gradients vanish on their way back to '0' (Linear)"

    Reference:
        Sun, "Optimization for Deep Learning: Theory and Algorithms", 2019, section 4.
    """
    inputs, targets = batch
    sizes = [leaf.numel() for leaf in _tensors(inputs)]
    if sizes and not any(sizes):
        raise ValueError("inputs must hold at least one sample, got an empty batch")
    recorder = _Recorder(model)
    with _undisturbed(model), repeatable(model), torch.enable_grad():
        leaves, passed = _differentiable(inputs)
        with recorder.recording():
            output = call_model(model, passed)
            loss = loss_fn(output, targets)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, got {shape}")
        sources = leaves + [p for p in model.parameters() if p.requires_grad]
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on any trainable parameter or input")
        torch.autograd.grad(loss, sources, allow_unused=True)
    modules = tuple(record.summary() for record in recorder.records.values())
    layers = [m for m in modules if m.has_weights]
    forward = _slope([0.5 * _log(m.second_moment) for m in layers]) * 2
    backward = _slope([_log(m.gradient_norm) for m in layers])
    value = float(loss.detach())
    if not all(map(math.isfinite, [value, *(m.second_moment for m in modules)])):
        _check_finite("inputs", inputs)  # nothing is wrong with the model then
        _check_finite("targets", targets)
    advice = tuple(_advise(value, modules, forward, backward))
    return PropagationReport(value, modules, forward, backward, advice)


@dataclass
class _Record:
    """Sums over the calls of one module."""

    name: str
    kind: str
    function: str
    has_weights: bool
    calls: int = 0
    squares: float = 0.0
    numbers: int = 0
    reached: bool = False
    gradient_square: float = 0.0
    flat: float = 0.0
    alive: Tensor | None = field(default=None, repr=False)

    def add(self, tensor: Tensor, unit_dim: int) -> None:
        values = tensor.detach()
        exact = values.double() if values.dtype == torch.float64 else values.float()
        self.squares += float(exact.square().sum(dtype=torch.float64))
        self.numbers += values.numel()
        if self.function in _SLOPES:
            self.flat += float((_SLOPES[self.function](exact) < FLAT).sum())
        if self.function in _RECTIFYING:
            dim = unit_dim % values.ndim if values.ndim else 0
            moving = (values != 0).movedim(dim, 0).flatten(1).any(1) if values.ndim else values != 0
            if self.alive is not None and self.alive.shape == moving.shape:
                moving = moving | self.alive
            self.alive = moving
        if tensor.requires_grad:
            self.reached = True
            tensor.register_hook(self._add_gradient)

    def _add_gradient(self, gradient: Tensor) -> None:
        self.gradient_square += float(gradient.detach().double().square().sum())

    def summary(self) -> ModuleSignal:
        numbers = max(self.numbers, 1)
        return ModuleSignal(
            self.name,
            self.kind,
            self.calls,
            self.squares / numbers,
            math.sqrt(self.gradient_square) if self.reached else math.nan,
            None if self.alive is None else 1 - float(self.alive.double().mean()),
            self.flat / numbers if self.function in _SLOPES else None,
            self.has_weights,
        )


class _Recorder(TorchFunctionMode):
    """Listens to a model's modules by hooks, and to activation functions by the function mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {m: name or type(m).__name__ for name, m in model.named_modules()}
        self.records: dict[str, _Record] = {}
        self.stack: list[nn.Module] = []
        self.unit_dim = 1

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks and mode are on inside the block only: a recomputation in backward is not heard."""
        handles = []
        try:
            for module in self.names:
                handles += [
                    module.register_forward_pre_hook(self._enter),
                    module.register_forward_hook(self._leave, always_call=True),
                ]
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.stack.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()
        # Units are channels behind a convolution or BatchNorm, the last dimension otherwise.
        if isinstance(module, _ConvNd | _NormBase):
            self.unit_dim = 1
        elif isinstance(module, (nn.Linear, nn.LayerNorm, nn.RNNBase, nn.Embedding)):
            self.unit_dim = -1
        if self._is_layer(module):
            kind = type(module).__name__
            function = next((f for c, f in _MODULES.items() if isinstance(module, c)), "")
            self._record(self.names[module], kind, function, _has_weights(module), output)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record an activation that no module of its own makes."""
        output = func(*args, **(kwargs or {}))
        function = _FUNCTIONS.get(func)
        if function and self.stack and not self._is_layer(self.stack[-1]):
            name = f"{self.names[self.stack[-1]]}.{function}()"
            self._record(name, function, function, False, output)
        return output

    def _record(self, name: str, kind: str, function: str, weights: bool, output: Any) -> None:
        tensors = _floating(output)
        if isinstance(output, tuple) and _floating(output[0]):
            tensors = _floating(output[0])  # of a recurrent layer its outputs, not its state
        if not tensors:
            return
        record = self.records.setdefault(name, _Record(name, kind, function, weights))
        record.calls += 1
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                record.add(tensor, self.unit_dim)

    @staticmethod
    def _is_layer(module: nn.Module) -> bool:
        return isinstance(module, _WEIGHTED) or next(module.children(), None) is None


def _has_weights(module: nn.Module) -> bool:
    if isinstance(module, _WEIGHTED):
        return True
    # Layers of somebody else's, e.g. the Conv1D of Hugging Face: a matrix and more than a table.
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim > 1 and not isinstance(module, nn.Embedding)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put buffers back whatever the modes of single modules are, as `repeatable` does not."""
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _differentiable(inputs: Any) -> tuple[list[Tensor], Any]:
    """Floating-point inputs as leaves, and what the model gets: not leaves, it may change them."""
    flat, spec = pytree.tree_flatten(inputs)
    leaves = []
    for place, item in enumerate(flat):
        if isinstance(item, Tensor) and item.is_floating_point():
            leaf = item.detach().clone().requires_grad_()
            leaves.append(leaf)
            flat[place] = leaf.clone()
    return leaves, pytree.tree_unflatten(flat, spec)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _floating(output: Any) -> list[Tensor]:
    return [leaf for leaf in _tensors(output) if leaf.is_floating_point() and leaf.numel()]


def _check_finite(name: str, values: Any) -> None:
    for leaf in _floating(values):
        wrong = int((~leaf.isfinite()).sum())
        mask = bool((leaf[~leaf.isneginf()] == 0).all())  # to be added to attention's scores
        if wrong and not mask:
            raise ValueError(
                f"{name} must be finite, got {wrong} of {leaf.numel()} values that are NaN or "
                f"infinite in a tensor of shape {tuple(leaf.shape)}"
            )


def _log(value: float) -> float:
    return math.log(value) if 0 < value < math.inf else math.nan


def _slope(values: list[float]) -> float:
    """Least-squares slope over the index; what is not a number is left out."""
    points = [(i, v) for i, v in enumerate(values) if math.isfinite(v)]
    if len(points) < 2:
        return math.nan
    x, y = np.array(points, dtype=np.float64).T
    return float(np.polyfit(x, y, 1)[0])


def _advise(
    loss: float, modules: tuple[ModuleSignal, ...], forward: float, backward: float
) -> Iterator[Advice]:
    """The worst first."""
    broken = next((m for m in modules if not math.isfinite(m.second_moment)), None)
    if broken is not None:
        yield Advice(
            "overflow",
            f"Activations overflow: {_named(broken)} is the first module whose output is not "
            "finite. Use a smaller initialisation or learning rate, or a wider dtype.",
        )
        return
    if not math.isfinite(loss):
        yield Advice(
            "overflow",
            f"The loss is {loss:g} although all outputs are finite: loss_fn overflows or leaves "
            "its domain, as a logarithm does at 0.",
        )
    layers = [m for m in modules if m.has_weights]
    yield from _advise_on_gradients(loss, layers, backward)
    yield from _advise_on_signals(layers, forward)
    yield from _advise_on_units(modules)


def _advise_on_gradients(
    loss: float, layers: list[ModuleSignal], growth: float
) -> Iterator[Advice]:
    silent = [m for m in layers if m.gradient_norm == 0]
    if silent and math.isfinite(loss):
        names = ", ".join(_named(m) for m in silent[:3]) + (", …" if len(silent) > 3 else "")
        yield Advice(
            "no gradient",
            f"No gradient arrives at {names}: units behind are dead or saturated to rounding, or "
            "the loss does not use the output.",
        )
    heard = [m for m in layers if 0 < m.gradient_norm < math.inf]
    if len(heard) < 2:
        return
    first, last = heard[0], heard[-1]
    ratio = first.gradient_norm / last.gradient_norm
    pace = _pace(growth)
    if ratio < 1 / FAR and growth > 0:
        yield Advice(
            "vanishing gradient",
            f"Gradients vanish on their way back to {_named(first)}: ‖δ‖ falls from "
            f"{last.gradient_norm:.2g} at {_named(last)} to {first.gradient_norm:.2g}{pace}. "
            f"{_REMEDY}",
        )
    elif ratio > FAR and growth < 0:
        yield Advice(
            "exploding gradient",
            f"Gradients explode on their way back to {_named(first)}: ‖δ‖ grows from "
            f"{last.gradient_norm:.2g} at {_named(last)} to {first.gradient_norm:.2g}{pace}. "
            f"{_REMEDY} Clipping the gradient's norm treats the symptom.",
        )


def _advise_on_signals(layers: list[ModuleSignal], growth: float) -> Iterator[Advice]:
    heard = [m for m in layers if m.second_moment > 0]
    for m in layers:
        if m.second_moment == 0:
            yield Advice("silent", f"The output of {_named(m)} is zero for the whole batch.")
            break
    if len(heard) < 2:
        return
    # Not the last layer, whose bias may be all that is left.
    first, last = heard[0], (min if growth < 0 else max)(heard, key=lambda m: m.second_moment)
    ratio = math.sqrt(last.second_moment / first.second_moment)
    if ratio < 1 / FAR and growth < 0:
        yield Advice(
            "vanishing signal",
            f"Activations vanish: the root mean square falls from "
            f"{math.sqrt(first.second_moment):.2g} at {_named(first)} to "
            f"{math.sqrt(last.second_moment):.2g} at {_named(last)}{_pace(growth / 2)}. {_REMEDY}",
        )
    elif ratio > FAR and growth > 0:
        yield Advice(
            "exploding signal",
            f"Activations explode: the root mean square grows from "
            f"{math.sqrt(first.second_moment):.2g} at {_named(first)} to "
            f"{math.sqrt(last.second_moment):.2g} at {_named(last)}{_pace(growth / 2)}. {_REMEDY}",
        )


def _advise_on_units(modules: tuple[ModuleSignal, ...]) -> Iterator[Advice]:
    dead = [m for m in modules if m.dead is not None and m.dead >= MANY]
    if dead:
        worst = max(dead, key=lambda m: m.dead or 0)
        share = 100 * (worst.dead or 0)
        yield Advice(
            "dead",
            f"Dead units: {share:.0f} % of the units of {_named(worst)} are zero for every "
            f"sample{_others(dead)}. A lower learning rate, smaller biases or a leaky activation "
            "keeps them alive; this batch may also be too small to wake them.",
        )
    saturated = [m for m in modules if m.saturated is not None and m.saturated >= MANY]
    if saturated:
        worst = max(saturated, key=lambda m: m.saturated or 0)
        share = 100 * (worst.saturated or 0)
        yield Advice(
            "saturated",
            f"Saturation: {share:.0f} % of the outputs of {_named(worst)} lie where its "
            f"slope is almost zero{_others(saturated)}. The pre-activations are too large: use "
            "smaller weights in front of it, or normalise them.",
        )


_REMEDY = "Initialise with assay.optim.critical_ (or lsuv_), or add normalisation or shortcuts."


def _pace(slope: float) -> str:
    return f", a factor {math.exp(abs(slope)):.2g} a layer"


def _named(module: ModuleSignal) -> str:
    return f"{module.name!r} ({module.kind})"


def _others(found: list[ModuleSignal]) -> str:
    return f", and {len(found) - 1} more such modules" if len(found) > 1 else ""

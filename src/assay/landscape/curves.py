"""Curves of low loss between two trained networks."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from assay.functional.parameters import ParameterLayout
from assay.functional.products import as_batches
from assay.functional.training import Record, fit
from assay.landscape.evaluation import Batches, Evaluation, evaluate
from assay.optim.lr_scheduler import HoldDecayLR

Endpoint = nn.Module | Mapping[str, Tensor]
Scalar = Any  # a Python number or a tensor: the formulas are the same


class Curve(nn.Module):
    r"""A path φ(t), 0 ≤ t ≤ 1, in the weight space of any module; base of the two kinds.

    φ(t) = Σ_j c_j(t) w_j, with the n control points ("bends") w_0 … w_{n−1}. The ends w_0 and
    w_{n−1} are two trained networks and stay; the inner points are the curve's only parameters. The
    wrapped module is untouched: φ(t) is computed as one vector over all its parameters, and the
    module runs on views of it through `torch.func.functional_call`. Tied parameters remain tied.

    The curve holds the buffers of the first network: integer ones, and running statistics of norms,
    which a training of the curve changes like any other. At no t are they those of φ(t):
    `evaluate_curve` recomputes them, and so should you for a network from `export`
    (`assay.functional.update_bn`). Frozen parameters take part like all others.

    Args:
        endpoints: the two networks, as modules or state dicts of one architecture.
        num_bends: n, the number of control points, ends included.
        model: the architecture, needed if both endpoints are state dicts.

    Raises:
        ValueError: if there are not two endpoints, they do not match (the message names the first
            tensor that differs), or `num_bends < 3`: with fixed ends there is nothing to train.
        TypeError: if both endpoints are state dicts and `model` is missing.
    """

    ends: Tensor

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        num_bends: int = 3,
        *,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_bends < 3:
            raise ValueError(
                f"num_bends must be at least 3, got {num_bends}: the two ends are fixed, so that "
                "fewer leave nothing to train"
            )
        if len(endpoints) != 2:
            raise ValueError(f"expected two endpoints, got {len(endpoints)}")
        modules = [end for end in (model, *endpoints) if isinstance(end, nn.Module)]
        if not modules:
            raise TypeError(
                "both endpoints are state dicts: give the architecture, a module, as model="
            )
        states = [dict(e.state_dict() if isinstance(e, nn.Module) else e) for e in endpoints]
        layout = ParameterLayout.of(modules[0])
        _check_match(modules[0], states, layout)
        first, last = (layout.flatten(state).detach() for state in states)

        self.num_bends = num_bends
        self.layout = layout
        self.register_buffer("ends", torch.stack([first, last]))
        inner = [torch.lerp(first, last, j / (num_bends - 1)) for j in range(1, num_bends - 1)]
        self.inner = nn.ParameterList(inner)
        network = copy.deepcopy(modules[0])
        network.load_state_dict(states[0])
        self._frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
        self.network = _without_parameters(network)
        self._point: Tensor | None = None

    def coefficients(self, t: Float[Tensor, "*k"]) -> Float[Tensor, "*k n"]:
        """The weights c_j(t) of the control points; they are non-negative and sum to 1.

        Args:
            t: positions on the curve, in [0, 1].

        Returns:
            One coefficient a control point.
        """
        return torch.stack(self._coefficients(t), dim=-1)

    def _coefficients(self, t: Scalar) -> list[Scalar]:
        raise NotImplementedError

    def point(self, t: float | Tensor) -> Float[Tensor, " p"]:
        """φ(t) as one vector, in the order of `assay.functional.parameters_to_vector`.

        Args:
            t: position; at 0 and 1 the result equals the endpoint bit for bit. A scalar tensor may
                require a gradient, and is not checked for its range.

        Returns:
            The vector `(P,)`, differentiable in the inner points.

        Raises:
            ValueError: if `t` is not in [0, 1] or not a scalar.
        """
        if not isinstance(t, Tensor):
            if not 0 <= t <= 1:
                raise ValueError(f"t must be in [0, 1], got {t}")
            if t in (0, 1):
                return self.ends[int(t)].clone()
        elif t.ndim:
            raise ValueError(f"t must be a scalar, got shape {tuple(t.shape)}")
        c = self._coefficients(t)
        point = _add_scaled(self.ends[0] * c[0], c[-1], self.ends[1])
        for coefficient, bend in zip(c[1:-1], self.inner, strict=True):
            point = _add_scaled(point, coefficient, bend)
        return point

    def weights(self, t: float | Tensor) -> dict[str, Tensor]:
        """φ(t) by parameter name: what `torch.func.functional_call` takes.

        Args:
            t: position, as for `point`.

        Returns:
            Views of one vector, a tied parameter under its first name.
        """
        return self.layout.unflatten(self.point(t))

    def l2(self, t: float | Tensor | None = None) -> Float[Tensor, ""]:
        """The squared norm ‖φ(t)‖², for the penalty ½ · weight_decay · ‖φ(t)‖².

        Weight decay of the optimizer would shrink the inner control points, which is another thing.

        Args:
            t: position; default that of the last forward pass in training mode, whose φ is reused.

        Returns:
            A scalar, differentiable in the inner points.

        Raises:
            ValueError: if `t` is None before any forward pass in training mode.
        """
        point = self._point if t is None else self.point(t)
        if point is None:
            raise ValueError("t is missing, and there was no forward pass in training mode yet")
        return _SquaredNorm.apply(point)

    def forward(self, *inputs: object, t: float | Tensor | None = None) -> object:
        """The network at φ(t).

        Args:
            *inputs: what the wrapped module takes.
            t: position; default, in training mode only, uniform on [0, 1) from torch's global CPU
                generator, a new one each call: the paper's stochastic gradient of the mean loss.

        Returns:
            What the wrapped module returns.

        Raises:
            ValueError: if `t` is None in evaluation mode.
        """
        if t is None:
            if not self.training:
                raise ValueError("in evaluation mode a curve needs a position: give t=")
            t = torch.rand((), dtype=torch.float64)
            # Arithmetic on one number is much faster in Python, but the compiler wants a tensor.
            t = t if torch.compiler.is_compiling() else t.item()
        point = self.point(t)
        if self.training:
            self._point = point
        tensors = self.layout.unflatten(point, aliases=True)
        return torch.func.functional_call(self.network, tensors, inputs, tie_weights=False)

    def export(self, t: float) -> nn.Module:
        """The network at φ(t) as a module of its own, independent of the curve.

        Args:
            t: position in [0, 1].

        Returns:
            A copy of the wrapped module with the parameters φ(t) and the buffers of the curve: use
            `assay.functional.update_bn` if it has BatchNorm.
        """
        network = copy.deepcopy(self.network)
        parameters = {
            name: nn.Parameter(tensor.detach().clone(), requires_grad=name not in self._frozen)
            for name, tensor in self.weights(t).items()
        }
        places = {name: name for name in self.layout.names} | dict(self.layout.aliases)
        for place, name in places.items():
            prefix, _, attribute = place.rpartition(".")
            owner = network.get_submodule(prefix)
            owner._buffers.pop(attribute, None)
            setattr(owner, attribute, parameters[name])
        return network

    def extra_repr(self) -> str:
        """What `print` shows of the curve."""
        return f"num_bends={self.num_bends}, parameters_per_point={self.layout.numel}"

    def __getstate__(self) -> dict[str, Any]:
        # φ(t) of the last step belongs to its autograd graph, which neither copies nor pickles.
        return self.__dict__ | {"_point": None}


class BezierCurve(Curve):
    r"""A Bezier curve between two networks, φ(t) = Σ_j C(n−1, j) t^j (1−t)^{n−1−j} w_j.

    With the default three control points φ(t) = (1−t)² w_0 + 2t(1−t) θ + t² w_2. See `Curve` for
    what all curves have in common.

    Args:
        endpoints: the two networks, as modules or state dicts of one architecture.
        num_bends: n, the number of control points, ends included.
        model: the architecture, needed if both endpoints are state dicts.

    Raises:
        ValueError: if there are not two endpoints, they do not match (the message names the first
            tensor that differs), or `num_bends < 3`.
        TypeError: if both endpoints are state dicts and `model` is missing.

    Example:
        >>> import torch
        >>> from assay.landscape import BezierCurve
        >>> first, second = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> curve = BezierCurve([first, second])
        >>> [tuple(p.shape) for p in curve.parameters()]
        [(10,)]
        >>> torch.equal(curve.weights(1)["weight"], second.weight)
        True
        >>> curve(torch.ones(3, 4), t=0.5).shape
        torch.Size([3, 2])

    Reference:
        Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, "Loss Surfaces, Mode Connectivity, and Fast
        Ensembling of DNNs", NeurIPS 2018.
    """

    def _coefficients(self, t: Scalar) -> list[Scalar]:
        degree = self.num_bends - 1
        return [math.comb(degree, j) * t**j * (1 - t) ** (degree - j) for j in range(degree + 1)]


class PolyChain(Curve):
    r"""A chain of straight segments between two networks, c_j(t) = max(0, 1 − |t(n−1) − j|).

    It passes through w_j at t = j/(n−1). A new one lies on the straight line between the networks.
    See `Curve` for what all curves have in common.

    Args:
        endpoints: the two networks, as modules or state dicts of one architecture.
        num_bends: n, the number of control points, ends included.
        model: the architecture, needed if both endpoints are state dicts.

    Raises:
        ValueError: if there are not two endpoints, they do not match (the message names the first
            tensor that differs), or `num_bends < 3`.
        TypeError: if both endpoints are state dicts and `model` is missing.

    Example:
        >>> import torch
        >>> from assay.landscape import PolyChain
        >>> chain = PolyChain([torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)], num_bends=5)
        >>> chain.coefficients(torch.tensor([0.25, 0.375]))
        tensor([[0.0000, 1.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.5000, 0.5000, 0.0000, 0.0000]])

    Reference:
        Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, "Loss Surfaces, Mode Connectivity, and Fast
        Ensembling of DNNs", NeurIPS 2018.
    """

    def _coefficients(self, t: Scalar) -> list[Scalar]:
        hats = (1 - abs(t * (self.num_bends - 1) - j) for j in range(self.num_bends))
        return [(hat + abs(hat)) / 2 for hat in hats]  # max(0, hat), of a number or a tensor


def fit_curve(
    curve: Curve,
    batches: Batches,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
) -> list[Record]:
    """Train the inner points of a curve: minimise the mean of loss(φ(t)) over t ~ U(0, 1).

    One t is drawn a step. SGD with momentum under `HoldDecayLR` (constant for half of the epochs,
    linear to 1 % at 90 %), with the penalty ½ · weight_decay · ‖φ(t)‖² in the loss and no weight
    decay in the optimizer.

    Args:
        curve: trained in place.
        batches: yields `(x, y)`, or is one pair `(x, y)`; iterated once an epoch.
        epochs: number of epochs.
        lr: learning rate of the first half.
        weight_decay: that of the endpoints' training is the natural choice.
        momentum: of SGD.
        loss_fn: `(output, target) -> scalar`, a mean over the batch.

    Returns:
        One record an epoch, `{"epoch": ..., "loss": ...}`.

    Raises:
        ValueError: if `epochs` is below 1, or `batches` yields nothing or holds no pairs `(x, y)`.

    Example:
        >>> import torch
        >>> from assay.landscape import BezierCurve, fit_curve
        >>> first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> x, y = torch.randn(32, 2), torch.randint(2, (32,))
        >>> curve = BezierCurve([first, second])
        >>> history = fit_curve(curve, [(x, y)] * 4, epochs=5, lr=0.1)
        >>> history[-1]["loss"] < history[0]["loss"]
        True

    Reference:
        Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, "Loss Surfaces, Mode Connectivity, and Fast
        Ensembling of DNNs", NeurIPS 2018.
    """
    optimizer = torch.optim.SGD(curve.parameters(), lr=lr, momentum=momentum)
    return fit(
        curve,
        optimizer,
        as_batches(batches),
        epochs=epochs,
        loss_fn=loss_fn,
        scheduler=HoldDecayLR(optimizer, total_steps=epochs),
        penalty=(lambda: 0.5 * weight_decay * curve.l2()) if weight_decay else None,
    )


@dataclass(frozen=True)
class CurveEvaluation:
    """Loss and error along a curve.

    Args:
        t: T positions from 0 to 1.
        squared_norm: ‖φ(t)‖² at each.
        distances: Euclidean lengths of the T−1 steps between neighbouring points.
        sets: an `Evaluation` by the name of the set of batches.

    Example:
        >>> import torch
        >>> from assay.landscape import CurveEvaluation, Evaluation
        >>> loss = torch.tensor([0.0, 2.0, 1.0]).double()
        >>> t, steps = torch.tensor([0.0, 0.5, 1.0]).double(), torch.tensor([1.0, 3.0]).double()
        >>> sets = {"train": Evaluation(loss, None)}
        >>> along = CurveEvaluation(t, torch.ones(3).double(), steps, sets)
        >>> along.summary(loss)
        {'min': 0.0, 'max': 2.0, 'mean': 1.0, 'integral': 1.375}
        >>> along.barrier("train")
        1.5
    """

    t: Float[Tensor, " n"]
    squared_norm: Float[Tensor, " n"]
    distances: Float[Tensor, " m"]
    sets: Mapping[str, Evaluation]

    @property
    def length(self) -> float:
        """Length of the polygon through the points."""
        return self.distances.sum().item()

    def summary(self, values: Float[Tensor, " n"]) -> dict[str, float]:
        """Minimum, maximum, mean over t, and mean over the arc length (trapezoidal rule).

        Args:
            values: one a point, e.g. `self.sets["test"].error`.

        Returns:
            `{"min", "max", "mean", "integral"}`; on a curve of length 0 the integral is the mean.
        """
        steps = self.distances.to(values)
        integral = values.mean()
        if self.length > 0:
            integral = ((values[1:] + values[:-1]) / 2 * steps).sum() / steps.sum()
        return {
            "min": values.min().item(),
            "max": values.max().item(),
            "mean": values.mean().item(),
            "integral": integral.item(),
        }

    def barrier(self, name: str) -> float:
        """Largest excess of the loss over the linear interpolation of the two ends' losses.

        Args:
            name: the set.

        Returns:
            max_t L(φ(t)) − [(1−t) L(φ(0)) + t L(φ(1))], which is at least 0.
        """
        loss = self.sets[name].loss
        return (loss - torch.lerp(loss[0], loss[-1], self.t)).max().item()


def evaluate_curve(
    curve: Curve,
    batches: Mapping[str, Batches],
    *,
    num_points: int = 61,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    chunk_size: int = 8,
    update_bn: bool = True,
    bn_batches: Iterable[object] | None = None,
) -> CurveEvaluation:
    """Loss and error at equally spaced points of a curve, in evaluation mode.

    A network with BatchNorm gets its running statistics recomputed at every point by one pass over
    the training data. One without is evaluated at many points at once.

    Args:
        curve: left as it was.
        batches: batches `(x, y)`, or one pair `(x, y)`, by the name of the set; iterated several
            times, without shuffling best.
        num_points: T, the ends included; the paper's is 61.
        loss_fn: `(output, target) -> scalar`, a mean over the batch.
        chunk_size: points at once, as for `evaluate`.
        update_bn: whether to recompute running statistics; the stored ones fit no point.
        bn_batches: the data to take them of; default the set named `"train"`.

    Returns:
        The measurements; `summary` and `barrier` condense them.

    Raises:
        ValueError: if `num_points < 2`, or what `evaluate` raises.

    Example:
        >>> import torch
        >>> from assay.landscape import BezierCurve, evaluate_curve
        >>> curve = BezierCurve([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        >>> x, y = torch.randn(32, 2), torch.randint(2, (32,))
        >>> along = evaluate_curve(curve, {"train": [(x, y)]}, num_points=5)
        >>> along.sets["train"].loss.shape
        torch.Size([5])

    Reference:
        Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, "Loss Surfaces, Mode Connectivity, and Fast
        Ensembling of DNNs", NeurIPS 2018.
    """
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, got {num_points}")
    t = torch.linspace(0, 1, num_points, dtype=torch.float64)
    squared_norms: list[Tensor] = []
    distances: list[Tensor] = []

    def points() -> Iterable[Tensor]:
        previous = None
        for position in t.tolist():
            point = curve.point(position).detach()
            squared_norms.append(point.dot(point).double().cpu())
            if previous is not None:
                distances.append((point - previous).norm().double().cpu())
            previous = point
            yield point

    sets = evaluate(
        curve.export(0.0),
        points(),
        batches,
        loss_fn=loss_fn,
        chunk_size=chunk_size,
        update_bn=update_bn,
        bn_batches=bn_batches,
    )
    return CurveEvaluation(t, torch.stack(squared_norms), torch.stack(distances), sets)


def linear_barrier(
    first: Endpoint,
    second: Endpoint,
    batches: Batches,
    *,
    num_points: int = 21,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    model: nn.Module | None = None,
    update_bn: bool = True,
    bn_batches: Iterable[object] | None = None,
) -> float:
    """Height of the loss barrier on the straight line between two networks.

    Args:
        first: a network, as module or state dict.
        second: another of the same architecture.
        batches: the data of the loss, batches `(x, y)` or one pair; iterated several times.
        num_points: points on the line, ends included.
        loss_fn: `(output, target) -> scalar`, a mean over the batch.
        model: the architecture, needed if both networks are state dicts.
        update_bn: whether to recompute running statistics at each point.
        bn_batches: the data to take them of; default `batches`.

    Returns:
        max_t L(t) − [(1−t) L(0) + t L(1)]; 0 where the line never rises above its ends.

    Raises:
        ValueError: if the networks do not match (the message names the first tensor that differs),
            `num_points < 2`, or `batches` yields nothing or holds no pairs `(x, y)`.

    Example:
        >>> import torch
        >>> from assay.landscape import linear_barrier
        >>> first = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)).double()
        >>> second = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)).double()
        >>> for model, sign in ((first, 1), (second, -1)):  # both compute x: (±1)(±1) = 1
        ...     for p in model.parameters():
        ...         _ = torch.nn.init.constant_(p, sign if p.ndim == 2 else 0)
        >>> x = torch.tensor([[1.0]]).double()  # the mean of the two computes 0, with loss 1
        >>> linear_barrier(first, second, [(x, x)], loss_fn=torch.nn.functional.mse_loss)
        1.0
    """
    # A chain that has not been trained yet is the straight line.
    line = PolyChain([first, second], model=model)
    batches = as_batches(batches)
    along = evaluate_curve(
        line,
        {"line": batches},
        num_points=num_points,
        loss_fn=loss_fn,
        update_bn=update_bn,
        bn_batches=batches if bn_batches is None else bn_batches,
    )
    return along.barrier("line")


class _SquaredNorm(torch.autograd.Function):
    """‖x‖² with one pass over x backwards, where that of `x.dot(x)` takes three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.dot(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (2 * grad)


def _add_scaled(total: Tensor, scale: Scalar, x: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return torch.addcmul(total, x, scale.to(x))
    return torch.add(total, x, alpha=scale)


def _check_match(
    model: nn.Module, states: list[dict[str, Tensor]], layout: ParameterLayout
) -> None:
    reference = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    for end, state in enumerate(states):
        for name, tensor in reference.items():
            if name not in state:
                raise ValueError(f"endpoint {end} has no tensor {name!r}, the architecture has")
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(state[name].shape)} in endpoint {end}, "
                    f"expected {tuple(tensor.shape)}"
                )
            if state[name].dtype != states[0][name].dtype:
                raise ValueError(
                    f"{name!r} has dtype {state[name].dtype} in endpoint {end}, "
                    f"expected {states[0][name].dtype} as in endpoint 0"
                )
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and name not in reference:
                raise ValueError(f"endpoint {end} has a tensor {name!r}, the architecture has none")
        for place, name in layout.aliases:
            if place in state and not torch.equal(state[place], state[name]):
                raise ValueError(
                    f"{place!r} and {name!r} are one tied parameter, but differ in endpoint {end}"
                )


def _without_parameters(network: nn.Module) -> nn.Module:
    """Empty every parameter slot; `functional_call` fills them for the time of a call."""
    for owner in network.modules():
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[attribute] = None
        if isinstance(owner, nn.RNNBase):
            # It notices substituted weights only in slots that hold a tensor.
            for attribute in list(owner._parameters):
                del owner._parameters[attribute]
                owner.register_buffer(attribute, torch.empty(0), persistent=False)
    return network

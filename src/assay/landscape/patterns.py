"""Patterns planted in loss surfaces, or found there (Czarnecki et al.; Skorokhodov and Burtsev)."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from assay.functional import (
    ParameterLayout,
    bisect,
    bracket,
    call_with_vector,
    evaluating,
    filter_normalize,
    parameters_to_vector,
    random_direction,
    select_parameters,
)
from assay.functional.labels import class_indices
from assay.functional.products import Selection
from assay.landscape.evaluation import Batches, Evaluation, call_with_tensors, logits_of
from assay.landscape.span import evaluate_span, layers_at_the_input, span_outputs

Pattern = Callable[[Tensor], Any]  # from points (m, z) to losses (m,), as tensor or array

KNOT_SPREAD = 8.0  # slope of the random features: how fine a pattern they can follow
RIDGE = 1e-10  # relative to the largest singular value of the features
Axis = Tensor | np.ndarray | Sequence[float]
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")  # of masks
CELLS = {"#": 1, ".": -1, " ": 0}  # of a mask in text: good, bad, ignored


# -- the loss of a constant prediction ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LogitLoss:
    """The mean cross-entropy as a function σ(c) of a number c that is added to one logit.

    It is convex; on its increasing branch, c ≥ c*, it takes every value from σ(c*) upwards exactly
    once.

    Args:
        logits: what the model says without c, `(N, C)`, float64.
        labels: class indices `(N,)`.
        weights: share of each row, `(N,)`, sum 1.
        logit: the class k whose logit c is added to.

    Raises:
        ValueError: if `logit` is no class of `logits`.

    Example:
        >>> import torch
        >>> from assay.landscape import LogitLoss
        >>> sigma = LogitLoss.constant(torch.tensor([0, 1, 1, 1]), classes=2)
        >>> c = sigma.inverse(torch.tensor([1.0]).double())
        >>> torch.allclose(sigma(c), torch.tensor([1.0]).double())
        True
    """

    logits: Float[Tensor, "n c"]
    labels: Int[Tensor, " n"]
    weights: Float[Tensor, " n"]
    logit: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.logit < self.logits.shape[1]:
            raise ValueError(f"logit must be in 0…{self.logits.shape[1] - 1}, got {self.logit}")

    @classmethod
    def constant(cls, labels: Tensor, *, classes: int, logit: int = 0) -> "LogitLoss":
        """σ_k of a model whose other logits are all zero: only the labels' marginal counts.

        Args:
            labels: class indices `(N,)`.
            classes: number of classes C.
            logit: the class k.

        Raises:
            ValueError: if `labels` are no class indices, or there are none.
        """
        labels = class_indices(labels, classes, name="labels").cpu()
        marginal = torch.bincount(labels, minlength=classes).double() / len(labels)
        zeros = torch.zeros(classes, classes, dtype=torch.float64)
        return cls(zeros, torch.arange(classes), marginal, logit)

    def __call__(self, c: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """σ(c)."""
        others = self.logits.clone()
        others[:, self.logit] = -math.inf
        rest = others.logsumexp(1)
        own = self.logits[:, self.logit] + c.unsqueeze(1)
        total = torch.logaddexp(own, rest.expand_as(own))
        hit = self.labels == self.logit
        said = torch.where(hit, own, self.logits.gather(1, self.labels[:, None]).squeeze(1))
        return (total - said) @ self.weights

    def minimum(self) -> tuple[float, float]:
        """c* and σ(c*), the least loss that a pattern may ask for."""

        def slope(c: Tensor, rows: Tensor) -> Tensor:
            rest = self.logits.clone()
            rest[:, self.logit] = -math.inf
            own = self.logits[:, self.logit] + c.unsqueeze(1)
            p = torch.sigmoid(own - rest.logsumexp(1))
            return p @ self.weights - self.weights[self.labels == self.logit].sum()

        one = torch.ones(1, dtype=torch.float64)
        share = float(self.weights[self.labels == self.logit].sum())
        if share == 0:  # the class does not occur: σ rises from −∞ on
            return -math.inf, float(self(-1e3 * one))
        if share == 1:
            raise ValueError(f"all labels are {self.logit}: its logit only lowers the loss")
        lowest = -float(bracket(lambda t, rows: -slope(-t, rows), one).high)
        found = bisect(slope, lowest * one, bracket(slope, one, start=lowest * one).high)
        at = float(found.point)
        return at, float(self(found.point))

    def inverse(self, values: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """c with σ(c) = value, on the increasing branch.

        Args:
            values: losses to be had.

        Raises:
            ValueError: if one of them is not finite, or below the minimum; the message gives it.
        """
        if not bool(values.isfinite().all()):
            raise ValueError("values must be finite, got NaN or infinity among them")
        at, least = self.minimum()
        if float(values.min()) < least:
            raise ValueError(
                f"the pattern asks for a loss of {float(values.min()):.6g}, but adding to logit "
                f"{self.logit} gives at least {least:.6g}: shift the pattern up"
            )
        start = torch.full_like(values, max(at, -1e3))

        def excess(c: Tensor, rows: Tensor) -> Tensor:
            return self(c) - values[rows]

        upper = bracket(excess, torch.ones_like(values), start=start).high
        return bisect(excess, start, upper, max_iter=100).point


# -- patterns by construction ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PlantedPattern:
    """Weights and directions along which a loss shows a given pattern.

    L(origin + Σ h_i direction_i) ≈ T(h) for h in the unit cube [0, 1]^z.

    Args:
        model: the model, with the weights of the origin.
        directions: `(z, P)`, each one entry of a bias.
        sup_error: largest |L − T| on a dense check off the fitting points, L being the loss of what
            the model itself says there in evaluation mode.
        loss: the exact relation between the planted logit and the loss.
        planted: the logit c(h) that the weights realise, as a function of `(m, z)`.

    Example:
        >>> import torch
        >>> from assay.landscape import embed_pattern
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 128), torch.nn.ReLU(),
        ...     torch.nn.Linear(128, 2))
        >>> found = embed_pattern(net, lambda h: 1 + h[:, 0], torch.tensor([0, 1]), z=1)
        >>> found.sup_error < 0.01
        True
    """

    model: nn.Module
    directions: Float[Tensor, "z p"]
    sup_error: float
    loss: LogitLoss
    planted: Callable[[Tensor], Tensor]


def embed_pattern(
    model: nn.Module,
    pattern: Pattern,
    labels: Tensor,
    *,
    z: int = 2,
    logit: int = 0,
    tries: int = 3,
    inputs: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> PlantedPattern:
    """Write weights into a ReLU net so that its loss surface shows any pattern one likes.

    The first layer's weights become 0 and z entries of its bias the coordinates h; layers between
    pass h on; the last hidden layer makes random ReLU features of h and the output weights fit
    c(h) = σ⁻¹(T(h)) by least squares in float64. The prediction is the same for every input, so
    the loss depends on the data through the labels' marginal alone.

    Args:
        model: a feed-forward ReLU net of at least two hidden `nn.Linear` layers with bias, e.g.
            `nn.Sequential`; its weights are overwritten. The last hidden layer's width sets how
            well the pattern is met. Its forward pass must be the chain of its linear layers, each
            used once, with ReLU between and nothing after: that is tried out with random weights.
        pattern: T: points `(m, z)` of the unit cube to losses `(m,)`, in nats.
        labels: class indices `(n,)` of the data whose mean cross-entropy is meant.
        z: number of dimensions.
        logit: the class whose logit carries the pattern.
        tries: draws of the random features, of which the best is kept.
        inputs: a few of the model's inputs, to run it on; default random `(4, in_features)`.
        generator: source of the random features.

    Returns:
        The weights' directions and how well the pattern is met.

    Raises:
        ValueError: if the model or its forward pass is no such net, a layer is narrower than z, two
            layers share a parameter, or it does not run on the inputs; if `labels` are empty or no
            class indices; if the pattern does not give one finite loss a point, or asks for less
            loss than a constant prediction can have; if `z` or `tries` is below 1. A model that is
            refused keeps its weights.
        TypeError: if `pattern` is not callable, or the model does not return a tensor.

    Example:
        >>> import torch
        >>> from assay.landscape import embed_pattern
        >>> from assay.models import MLP
        >>> waves = lambda h: 1.5 + 0.3 * torch.sin(6 * h[:, 0]) * torch.cos(6 * h[:, 1])
        >>> g = torch.Generator().manual_seed(0)
        >>> found = embed_pattern(MLP((4, 8, 256, 3)), waves, torch.arange(3), generator=g)
        >>> found.directions.shape[0], found.sup_error < 0.1
        (2, True)

    Reference:
        Czarnecki, Osindero, Pascanu, Jaderberg, "A Deep Neural Network's Loss Surface Contains
        Every Low-dimensional Pattern", 2019, arXiv:1912.07559.
    """
    layers, inputs = _relu_chain(model, z, inputs)
    sigma = LogitLoss.constant(labels, classes=layers[-1].out_features, logit=logit)
    planted = _write_pattern(layers, sigma, pattern, z, tries, generator)
    directions = _bias_directions(model, layers[0], z)

    def losses(logits: Tensor) -> Tensor:  # one prediction a row, the labels' marginal for each
        return logits.logsumexp(1) - logits @ sigma.weights

    dense = _dense_error(model, layers[0], inputs, losses, pattern, z, generator)
    direct = _direct_error(model, directions, inputs, losses, pattern)
    return PlantedPattern(model, directions, max(dense, direct), sigma, planted)


class PatternBeside(nn.Module):
    """A trained net with a pattern net beside it, sharing the output: N*(x) + c(h) e_k.

    What `embed_pattern_beside` makes; a widened network, block-diagonal but for the output.

    Args:
        trained: returns logits `(N, C)`.
        beside: returns `(N, C)`, only logit k differs from zero.

    Example:
        >>> import torch
        >>> from assay.landscape import PatternBeside
        >>> both = PatternBeside(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3))
        >>> both(torch.ones(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, trained: nn.Module, beside: nn.Module) -> None:
        super().__init__()
        self.trained = trained
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both outputs."""
        first = next(self.beside.parameters(), x)
        return self.trained(x) + self.beside(x.flatten(1).to(first.dtype))


def embed_pattern_beside(
    trained: nn.Module,
    pattern: Pattern,
    x: Tensor,
    labels: Tensor,
    *,
    width: int = 1024,
    z: int = 2,
    logit: int = 0,
    tries: int = 3,
    generator: torch.Generator | None = None,
) -> PlantedPattern:
    """Plant a pattern whose lowest point is a trained network.

    The net is widened by a pattern net that adds c(h) to one logit, with
    σ*(c) = (1/N) Σ ℓ(N*(x_n) + c e_k, y_n) and c(h) = σ*⁻¹(T(h)). σ* at its minimum is at most the
    trained loss. This construction is Assay's own; transfer to other data is approximate.

    Args:
        trained: any classifier returning logits; not changed, evaluated in evaluation mode.
        pattern: T, at least min σ* everywhere.
        x: inputs of the data whose loss is meant, `(N, ...)`.
        labels: their classes.
        width: random features of the pattern net.
        z: number of dimensions.
        logit: the class whose logit carries the pattern.
        tries: draws of the random features, of which the best is kept.
        generator: source of the random features.

    Returns:
        A `PatternBeside` with its directions.

    Raises:
        ValueError: if the pattern does not give one finite loss a point, or asks for less loss than
            min σ*; if `x` is empty, `labels` are no class indices or not as many, or the output is
            not `(N, C)`; if `z`, `tries` or `width` is too small.
        TypeError: if `pattern` is not callable, or the model does not return a tensor.

    Example:
        >>> import torch
        >>> from assay.landscape import embed_pattern_beside
        >>> net, x, y = torch.nn.Linear(2, 3), torch.randn(6, 2), torch.arange(6) % 3
        >>> found = embed_pattern_beside(net, lambda h: 4 + h[:, 0], x, y, width=64, z=1)
        >>> found.model(x).shape
        torch.Size([6, 3])

    Reference:
        Czarnecki, Osindero, Pascanu, Jaderberg, 2019, arXiv:1912.07559, theorem 2, whose own
        construction may differ.
    """
    if len(x) == 0:
        raise ValueError("x is empty: expected at least one input")
    if width < z:
        raise ValueError(f"width must be at least z = {z}, got {width}")
    with evaluating(trained), torch.no_grad():
        said = logits_of(trained(x), user="embed_pattern_beside")
    if said.ndim != 2 or len(said) != len(x):
        raise ValueError(
            f"the model must return logits ({len(x)}, C), it returns shape {tuple(said.shape)}"
        )
    logits = said.double().cpu()
    labels = class_indices(labels, logits.shape[1], name="labels").cpu()
    if len(labels) != len(x):
        raise ValueError(f"labels must be as many as x, {len(x)}, got {len(labels)}")
    share = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
    sigma = LogitLoss(logits, labels, share, logit)
    first = next(trained.parameters(), said)
    sizes = (x[0].numel(), z, width, logits.shape[1])
    beside = nn.Sequential(
        nn.Linear(sizes[0], z), nn.ReLU(), nn.Linear(z, width), nn.ReLU(),
        nn.Linear(width, sizes[3]),
    ).to(first)  # fmt: skip
    model = PatternBeside(trained, beside)
    layers, inputs = _relu_chain(beside, z, None)
    planted = _write_pattern(layers, sigma, pattern, z, tries, generator)
    directions = _bias_directions(model, layers[0], z)

    def losses(added: Tensor) -> Tensor:
        return sigma(added[:, logit])

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    dense = _dense_error(beside, layers[0], inputs, losses, pattern, z, generator)
    direct = _direct_error(model, directions, x, loss, pattern)
    return PlantedPattern(model, directions, max(dense, direct), sigma, planted)


def _relu_chain(model: nn.Module, z: int, inputs: Tensor | None) -> tuple[list[nn.Linear], Tensor]:
    """The linear layers in the order in which they run, and inputs that the model takes.

    That the forward pass is Linear, ReLU, ..., Linear is seen from what it makes of random weights:
    modules tell nothing of functions that a forward method calls.
    """
    leaves = [m for m in model.modules() if not list(m.children())]
    allowed = (nn.Linear, nn.ReLU, nn.Flatten, nn.Identity)
    strange = [type(m).__name__ for m in leaves if not isinstance(m, allowed)]
    known = [m for m in leaves if isinstance(m, nn.Linear)]
    if strange or len(known) < 3:
        raise ValueError(
            "a pattern is embedded in a feed-forward net of Linear and ReLU with at least two "
            f"hidden layers, got {len(known)} Linear layers and {strange or 'ReLU'}"
        )
    weights = _random_weights(model)
    layers, seen, inputs, output = _trial(model, known, weights, inputs)
    if len(set(layers)) < len(layers) or len(layers) < 3:
        raise ValueError(
            "a pattern is embedded in a net of at least three Linear layers that runs each of them "
            f"once, the forward pass of {type(model).__name__} runs {len(set(layers))} of them in "
            f"{len(layers)} calls"
        )
    narrow = [layer.out_features for layer in layers[:-1] if layer.out_features < z]
    if z < 1 or narrow or any(layer.bias is None for layer in layers):
        raise ValueError(
            f"z must be at least 1, every layer needs a bias and at least z = {z} units"
        )
    owners = {id(p) for layer in layers for p in layer.parameters()}
    if len(owners) < 2 * len(layers):
        raise ValueError("a pattern cannot be embedded where two layers share a parameter")
    names = {id(module): name for name, module in model.named_modules()}
    with torch.no_grad():
        expected = seen
        for layer in layers:
            own = {kind: weights[f"{names[id(layer)]}.{kind}"] for kind in ("weight", "bias")}
            expected = F.linear(expected, own["weight"], own["bias"])
            expected = expected if layer is layers[-1] else expected.relu()
    if output.shape != (len(inputs), layers[-1].out_features):
        raise ValueError(
            f"the model must return logits ({len(inputs)}, {layers[-1].out_features}) for "
            f"{len(inputs)} inputs, it returns shape {tuple(output.shape)}"
        )
    difference = float((output - expected).abs().max() / expected.abs().max())
    if not difference < torch.finfo(expected.dtype).eps ** 0.5:
        raise ValueError(
            f"the forward pass of {type(model).__name__} is not Linear, ReLU, ..., Linear (but has "
            "another activation, a residual connection, dropout, a scaled output?): with random "
            f"weights it differs from that chain of its layers by {difference:.2g} of its size"
        )
    return layers, inputs


def _random_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights with which every layer's units are of size 1, by name."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, p in model.named_parameters():
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        scale = (2 / p.shape[-1]) ** 0.5 if p.ndim == 2 else 0.5
        weights[name] = (scale * drawn).to(p)
    return weights


@torch.no_grad()
def _trial(
    model: nn.Module,
    known: Sequence[nn.Linear],
    weights: Mapping[str, Tensor],
    inputs: Tensor | None,
) -> tuple[list[nn.Linear], Tensor, Tensor, Tensor]:
    """A pass with other weights: the layers called, what the first one got, inputs and output."""
    tensors = dict(weights)
    tensors |= {place: weights[name] for place, name in ParameterLayout.of(model).aliases}
    generator = torch.Generator().manual_seed(1)
    first = known[0].weight
    candidates = [inputs] if inputs is not None else [
        torch.randn(4, width, generator=generator, dtype=torch.float64).to(first)
        for width in dict.fromkeys(layer.in_features for layer in known)
    ]  # fmt: skip
    calls: list[tuple[nn.Linear, Tensor]] = []
    refusal: Exception | None = None

    def note(layer: Any, args: tuple[Any, ...]) -> None:
        calls.append((layer, args[0]))

    handles = [layer.register_forward_pre_hook(note) for layer in known]
    try:
        for candidate in candidates:
            calls.clear()
            try:
                with evaluating(model):
                    output = call_with_tensors(model, tensors, candidate)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                refusal = refusal or error
                continue
            if not calls:
                raise ValueError("the forward pass calls none of the model's Linear layers")
            layers = [layer for layer, _ in calls]
            return layers, calls[0][1], candidate, logits_of(output, user="embed_pattern")
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(
        f"{type(model).__name__} does not run on inputs of shape "
        f"{' or '.join(str(tuple(c.shape)) for c in candidates)}: give a few as inputs= ({refusal})"
    ) from refusal


@torch.no_grad()
def _write_pattern(
    layers: Sequence[nn.Linear],
    sigma: LogitLoss,
    pattern: Pattern,
    z: int,
    tries: int,
    generator: torch.Generator | None,
) -> Callable[[Tensor], Tensor]:
    if tries < 1:
        raise ValueError(f"tries must be at least 1, got {tries}")
    *passing, features, output = layers
    h = _cube(max(4 * features.out_features, 2048), z, generator)
    target = sigma.inverse(_losses_of(pattern, h))
    fits = [_fit_features(features, h, target, generator) for _ in range(tries)]
    slopes, knots, solution, _ = min(fits, key=lambda fit: fit[3])
    if not bool(solution.to(output.weight.dtype).isfinite().all()):
        raise ValueError(
            f"the weights that fit the pattern overflow {output.weight.dtype}: use a model in "
            "float32 or float64"
        )
    for layer in layers:
        layer.weight.zero_()
        layer.bias.zero_()
    for layer in passing[1:]:
        # h ≥ 0 passes a ReLU unchanged.
        layer.weight[:z, :z] = torch.eye(z)
    features.weight[:, :z] = slopes.to(features.weight)
    features.bias.copy_(knots)
    output.weight[sigma.logit] = solution[:-1].to(output.weight)
    output.bias[sigma.logit] = solution[-1].to(output.bias)
    row = output.weight[sigma.logit], output.bias[sigma.logit]
    written = [t.detach().double().cpu() for t in row]

    def planted(points: Tensor) -> Tensor:
        hidden = (points.double() @ slopes.T + knots).relu()
        return hidden @ written[0] + written[1]

    return planted


def _losses_of(pattern: object, h: Tensor) -> Tensor:
    """The losses that a pattern asks for at points of the cube, checked."""
    if not callable(pattern):
        raise TypeError(
            f"pattern must be a function of points (m, z), got {type(pattern).__name__}"
        )
    losses: Any = pattern(h)
    losses = torch.from_numpy(losses) if isinstance(losses, np.ndarray) else losses
    if not isinstance(losses, Tensor) or losses.shape != (len(h),):
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"pattern must return one loss a point, ({len(h)},) for points {tuple(h.shape)}, got "
            f"{found}"
        )
    bad = ~losses.isfinite()
    if bool(bad.any()):
        where = int(bad.int().argmax())
        raise ValueError(
            f"pattern must be finite on the unit cube, got {float(losses[where])} at "
            f"h = {h[where].tolist()}"
        )
    return losses.detach().double().cpu()


def _fit_features(
    features: nn.Linear, h: Tensor, target: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Random slopes and knots, the output weights that fit them best, and their largest error."""
    width, z = features.out_features, h.shape[1]
    d = torch.randn(width, z, generator=generator, dtype=torch.float64)
    slopes = KNOT_SPREAD * d / d.norm(dim=1, keepdim=True)
    # The kinks go through points that fill the cube evenly.
    knots = -(slopes * _sobol(width, z, generator)).sum(1)
    # The model computes in its own precision: fit what it will see.
    slopes, knots = (t.to(features.weight.dtype).double() for t in (slopes, knots))
    design = torch.cat([(h @ slopes.T + knots).relu(), torch.ones(len(h), 1).double()], dim=1)
    solution = torch.linalg.lstsq(design, target[:, None], rcond=RIDGE, driver="gelsy").solution
    return slopes, knots, solution[:, 0], float((design @ solution - target[:, None]).abs().max())


def _cube(points: int, z: int, generator: torch.Generator | None) -> Tensor:
    """Points that fill the unit cube and its edges."""
    spread = _sobol(points, z, generator)
    edges = torch.cartesian_prod(*[torch.linspace(0, 1, 17).double()] * z).reshape(-1, z)
    on_edge = ((edges == 0) | (edges == 1)).any(1)
    return torch.cat([spread, edges[on_edge]])


def _sobol(points: int, z: int, generator: torch.Generator | None) -> Tensor:
    """A Sobol sequence, shifted at random."""
    shift = torch.rand(z, generator=generator, dtype=torch.float64)
    return (torch.quasirandom.SobolEngine(z).draw(points, dtype=torch.float64) + shift) % 1


@torch.no_grad()
def _dense_error(
    net: nn.Module,
    first: nn.Linear,
    inputs: Tensor,
    losses: Callable[[Tensor], Tensor],
    pattern: Pattern,
    z: int,
    generator: torch.Generator | None,
) -> float:
    """Largest |L − T| on many points, each a row of a batch of inputs through the net.

    The first layer's bias is moved by h in each row on its own; its weights are zero.
    """
    h = _cube({1: 10_001, 2: 40_000}.get(z, 60_000), z, generator)
    moves: Tensor = h[:0]

    def move(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        return output + F.pad(moves, (0, output.shape[1] - z)).to(output)

    worst = torch.zeros((), dtype=torch.float64)
    handle = first.register_forward_hook(move)
    try:
        with evaluating(net):
            for moves in h.split(4096):
                rows = inputs[torch.arange(len(moves)) % len(inputs)]
                error = losses(net(rows).double().cpu()) - _losses_of(pattern, moves)
                worst = torch.maximum(worst, error.abs().max())
    finally:
        handle.remove()
    return float(worst.nan_to_num(nan=math.inf))


@torch.no_grad()
def _direct_error(
    model: nn.Module,
    directions: Tensor,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    pattern: Pattern,
) -> float:
    """Largest |L − T| on a few points, at the very weights origin + Σ h_i direction_i."""
    h = _cube(8, len(directions), torch.Generator().manual_seed(0))[:8]
    origin = parameters_to_vector(model)
    worst = torch.zeros((), dtype=torch.float64)
    with evaluating(model):
        for point, wanted in zip(h, _losses_of(pattern, h), strict=True):
            vector = origin + point.to(origin) @ directions
            error = loss(call_with_vector(model, vector, x).double().cpu()) - wanted
            worst = torch.maximum(worst, error.abs().max())
    return float(worst.nan_to_num(nan=math.inf))


def _bias_directions(model: nn.Module, first: nn.Linear, z: int) -> Tensor:
    layout = ParameterLayout.of(model)
    owner = {id(p): name for name, p in model.named_parameters()}[id(first.bias)]
    rows = []
    for i in range(z):
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        zeros[owner][i] = 1
        rows.append(layout.flatten(zeros))
    return torch.stack(rows)


# -- patterns by multi-point optimisation ------------------------------------------------------


def load_mask(source: object, *, size: tuple[int, int] | None = None) -> np.ndarray:
    r"""A pattern of good (+1), bad (−1) and ignored (0) cells.

    Args:
        source: an array; text with one row a line, in which `#` is good, `.` is bad and a blank is
            ignored; or a path to such text, to a `.npy` file, or to an image (`.png`, `.jpg`,
            `.gif`, `.bmp`, `.webp`), of which what is dark is good, bright bad and transparent
            ignored.
        size: rows and columns of the result, by the nearest cell; default those of the source.

    Returns:
        An integer array; row 0 is the top.

    Raises:
        ValueError: if it is not two-dimensional, holds other values, or lacks good or bad cells; if
            `size` is not positive, or a file is neither text nor an image.
        FileNotFoundError: if there is no file at the path.
        ModuleNotFoundError: for an image, if pillow is not installed.

    Example:
        >>> from assay.landscape import load_mask
        >>> load_mask("#.\n.#").tolist()
        [[1, -1], [-1, 1]]
    """
    if isinstance(source, str) and ("\n" in source or not set(source) - set(CELLS)):
        mask = _parse_mask(source)
    elif isinstance(source, str | Path):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(
                f"there is no file {str(source)!r} (and as text a mask has only '#', '.' and ' ')"
            )
        mask = _read_mask(path)
    else:
        mask = np.asarray(source)
    if mask.ndim != 2 or not np.isin(mask, (-1, 0, 1)).all():
        raise ValueError(f"a mask is two-dimensional with values −1, 0, 1, got shape {mask.shape}")
    if size is not None:
        if min(size) < 1:
            raise ValueError(f"size must be positive, (rows, columns), got {size}")
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(int)
            for new, old in zip(size, mask.shape, strict=True)
        )
        mask = mask[np.ix_(rows, columns)]
    if not (mask == 1).any() or not (mask == -1).any():
        raise ValueError("a mask needs at least one good (+1) and one bad (−1) cell")
    return mask.astype(np.int64)


def _read_mask(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix.lower() not in IMAGES:
        return _parse_mask(path.read_text(encoding="utf-8", errors="replace"))
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a mask from an image needs pillow: pip install pillow", name=error.name
        ) from error
    with Image.open(path) as image:
        grey, alpha = (np.asarray(band) for band in image.convert("LA").split())
    return np.where(alpha < 128, 0, np.where(grey < 128, 1, -1))


def _parse_mask(text: str) -> np.ndarray:
    rows = [line for line in text.splitlines() if line]
    if not rows or set("".join(rows)) - set(CELLS):
        raise ValueError("a mask in text has only '#' (good), '.' (bad) and ' ' (ignored)")
    width = max(map(len, rows))
    return np.array([[CELLS[c] for c in row.ljust(width)] for row in rows])


class PlaneModel(nn.Module):
    """A plane of weight vectors, w(α, β) = O + s (α u + β r), trained at many points at once.

    O, R and U are three weight vectors; r = R − O, and u is U made orthogonal to r (in float64) and
    as long. Rows of the mask run along −u (row 0 is on top), columns along r, its centre is O.

    Models with recurrent layers, and in training mode those with BatchNorm, run at one point after
    the other. The running statistics of a norm are at no point those of the network there: after
    `export`, recompute them (`assay.functional.update_bn`).

    Args:
        models: three initialisations of one architecture: origin, right, up. A copy of the first
            provides the forward pass.
        scale: initial s, learned.
        orthogonal: whether u is made orthogonal to r and of its length.

    Raises:
        ValueError: if there are not three models of one architecture.

    Example:
        >>> import torch
        >>> from assay.landscape import PlaneModel
        >>> plane = PlaneModel([torch.nn.Linear(2, 3) for _ in range(3)])
        >>> plane(torch.ones(5, 2), torch.tensor([[0.0, 0.0], [1.0, -1.0]])).shape
        torch.Size([2, 5, 3])

    Reference:
        Skorokhodov, Burtsev, "Loss Landscape Sightseeing with Multi-Point Optimization", 2019,
        arXiv:1910.03867.
    """

    def __init__(
        self, models: Sequence[nn.Module], *, scale: float = 0.1, orthogonal: bool = True
    ) -> None:
        super().__init__()
        if len(models) != 3:
            raise ValueError(f"models must be origin, right and up, got {len(models)}")
        layouts = [ParameterLayout.of(model) for model in models]
        if any(layout != layouts[0] for layout in layouts):
            raise ValueError(
                "models must be of one architecture, with parameters of the same names and shapes"
            )
        vectors = [parameters_to_vector(model) for model in models]
        self.origin, self.right, self.up = (nn.Parameter(v.clone()) for v in vectors)
        self.scale = nn.Parameter(torch.tensor(scale).to(vectors[0]))
        self.orthogonal = orthogonal
        self.layout = layouts[0]
        # Not a sub-module: its parameters are not trained and belong to no state_dict.
        object.__setattr__(self, "_template", copy.deepcopy(models[0]))
        self._shared: list[str] | None = None

    def axes(self) -> tuple[Tensor, Tensor]:
        """The directions u and r, `(P,)` each."""
        _, r, up = self._basis()
        tilt, stretch = self._tilt_and_stretch(r, up)
        return stretch * (up - tilt * r), r

    def skewness(self) -> Tensor:
        """(u·r)² + (‖u‖ − ‖r‖)², to be added to the loss where axes are not made orthogonal.

        Returns:
            A scalar, differentiable in all three weight vectors; Skorokhodov and Burtsev, 2019,
            multiply it by 10.
        """
        u, r = self.axes()
        return (u @ r).square() + (u.norm() - r.norm()).square()

    def weights(self, coordinates: Float[Tensor, "k 2"]) -> Float[Tensor, "k p"]:
        """The weight vectors at points (α, β)."""
        basis = self._basis()
        return self._coefficients(coordinates, *basis[1:]) @ torch.stack(basis)

    def _basis(self) -> tuple[Tensor, Tensor, Tensor]:
        """O, r and U (or U − O), whose combinations are all points of the plane."""
        up = self.up if self.orthogonal else self.up - self.origin
        return self.origin, self.right - self.origin, up

    def _coefficients(
        self, coordinates: Float[Tensor, "k 2"], r: Float[Tensor, " p"], up: Float[Tensor, " p"]
    ) -> Float[Tensor, "k 3"]:
        """Of the points (α, β) in the basis: u itself need not be formed, nor its gradient."""
        tilt, stretch = self._tilt_and_stretch(r, up)
        alpha, beta = (self.scale * coordinates.to(r)).unbind(1)
        alpha = stretch * alpha
        return torch.stack([torch.ones_like(beta), beta - tilt * alpha, alpha], dim=1)

    def _tilt_and_stretch(self, r: Tensor, up: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Numbers a and b with u = b (U − a r)."""
        if not self.orthogonal:
            return 0.0, 1.0
        rr, ru, uu = _Products.apply(r, up)
        tilt = ru / rr
        return tilt.to(r), (rr / (uu - tilt * ru)).sqrt().to(r)

    def coordinates(self, mask: np.ndarray) -> Float[Tensor, "rows columns 2"]:
        """(α, β) of every cell of a mask: unit steps, the mask's centre at the origin."""
        rows, columns = mask.shape
        alpha = (rows - 1) / 2 - torch.arange(rows)
        beta = torch.arange(columns) - (columns - 1) / 2
        return torch.stack(torch.meshgrid(alpha, beta, indexing="ij"), dim=-1).to(self.origin)

    def forward(self, x: Tensor, coordinates: Float[Tensor, "k 2"]) -> Any:
        """Outputs at K points, `(K, N, ...)`, in one batched pass if possible.

        Args:
            x: inputs `(N, ...)`.
            coordinates: (α, β) of the points.

        Returns:
            A tensor, or if the model returns a structure of tensors, the same of stacked ones.

        Raises:
            ValueError: if there are no points.
        """
        if len(coordinates) == 0:
            raise ValueError("coordinates is empty: expected at least one point (α, β)")
        template: Any = self._template
        template.train(self.training)
        if self._shared is None:
            self._shared = layers_at_the_input(template, x)
        basis = self._basis()
        tensors = self.layout.unflatten(torch.stack(basis), aliases=True)
        c = self._coefficients(coordinates, *basis[1:])
        outputs = span_outputs(template, tensors, c, x, self._shared)
        if isinstance(outputs, list):
            return pytree.tree_map(lambda *at: _stacked(at), *outputs)
        return outputs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PlaneModel":
        template: Any = self._template
        template._apply(fn, recurse)  # no sub-module: its buffers would stay behind
        return super()._apply(fn, recurse)

    def export(self, alpha: float, beta: float) -> Mapping[str, Tensor]:
        """The parameters at (α, β), by name, for `load_state_dict(..., strict=False)`."""
        with torch.no_grad():
            vector = self.weights(torch.tensor([[alpha, beta]]))[0]
        return {name: t.clone() for name, t in self.layout.unflatten(vector).items()}


def _stacked(values: Sequence[Any]) -> Any:
    return torch.stack(list(values)) if isinstance(values[0], Tensor) else values[0]


class _Products(torch.autograd.Function):
    """r·r, r·u and u·u in float64; their gradients are formed without vectors in float64."""

    @staticmethod
    def forward(r: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, u = r.double(), u.double()
        return r @ r, r @ u, u @ u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: object) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        r, u = ctx.saved_tensors
        rr, ru, uu = (grad.to(r) for grad in grads)
        return torch.addcmul(r * (2 * rr), u, ru), torch.addcmul(u * (2 * uu), r, ru)


class MultiPointLoss(nn.Module):
    """Low loss at good points, high loss at bad ones: mean CE(good) − c · mean min(CE(bad), τ).

    Args:
        clip: τ, above which a bad point is bad enough, in nats.
        negative_weight: c.

    Raises:
        ValueError: if `clip` is not positive.

    Example:
        >>> import torch
        >>> from assay.landscape import MultiPointLoss
        >>> criterion = MultiPointLoss(clip=2.5)
        >>> logits = torch.zeros(4, 6, 3)  # four points, six samples
        >>> good = torch.tensor([True, True, False, False])
        >>> round(criterion(logits, torch.zeros(6, dtype=torch.long), good).item(), 6)
        0.0
    """

    def __init__(self, clip: float = 2.5, negative_weight: float = 1.0) -> None:
        super().__init__()
        if not clip > 0:
            raise ValueError(f"clip must be positive, got {clip}")
        self.clip = clip
        self.negative_weight = negative_weight

    def forward(self, logits: Tensor, target: Tensor, good: Tensor) -> Tensor:
        """The loss of outputs `(K, N, C)` at points that are `good` `(K,)` or bad."""
        # Samples innermost: torch is several times slower along rows of a few classes.
        losses = F.cross_entropy(logits.mT, target.expand(len(logits), -1), reduction="none")
        means = losses.mean(1)
        pull = torch.where(good, means, 0).sum() / good.sum().clamp(min=1)
        push = torch.where(good, 0, means.clamp(max=self.clip)).sum() / (~good).sum().clamp(min=1)
        return pull - self.negative_weight * push


# -- looking at a plane ------------------------------------------------------------------------


@torch.no_grad()
def random_plane(
    model: nn.Module, *, params: Selection = None, generator: torch.Generator | None = None
) -> Float[Tensor, "2 p"]:
    """Two random directions, each filter as long as the model's own.

    Args:
        model: at whose weights the plane starts.
        params: names or a predicate, see `assay.functional.select_parameters`; default all, frozen
            ones too.
        generator: source of randomness.

    Returns:
        The directions `(2, P)`, in the space of the selected parameters.

    Raises:
        ValueError: if the selection is empty, or the parameters are of several dtypes.

    Example:
        >>> import torch
        >>> from assay.landscape import random_plane
        >>> random_plane(torch.nn.Linear(3, 2)).shape
        torch.Size([2, 8])

    Reference:
        Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets",
        NeurIPS 2018.
    """
    drawn = [random_direction(model, generator=generator) for _ in range(2)]
    plane = torch.stack([filter_normalize(d, model) for d in drawn])
    if params is None:
        return plane
    pieces = ParameterLayout.of(model).unflatten(plane)
    return torch.cat([pieces[name].flatten(1) for name in select_parameters(model, params)], dim=1)


def scan_plane(
    model: nn.Module,
    directions: Float[Tensor, "2 p"],
    batches: Mapping[str, Batches],
    *,
    first: Axis,
    second: Axis,
    origin: Tensor | None = None,
    params: Selection = None,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    update_bn: bool = True,
    bn_batches: Iterable[object] | None = None,
    chunk_size: int = 64,
) -> dict[str, Evaluation]:
    """Loss and accuracy on a grid of a plane, origin + a · d₁ + b · d₂.

    Of some parameters alone, e.g. of the layer whose trajectory was recorded, with `params`: then
    `directions` and `origin` are vectors of these, and the others stay as they are.

    BatchNorm statistics are recomputed at every point, see `evaluate`: with those of one point the
    picture of the others is false.

    Args:
        model: left as it was.
        directions: d₁ and d₂.
        batches: batches `(x, y)`, or one pair `(x, y)`, by the name of the set.
        first: values of a, `(A,)`, a tensor, array or list of numbers.
        second: values of b, `(B,)`.
        origin: `(P,)`; default the model's weights.
        params: the selection in whose order directions and origin are; default all parameters of
            the model, frozen ones too.
        loss_fn: `(output, target) -> scalar`, a mean over the batch; see `evaluate`.
        update_bn: whether to recompute running statistics at each point.
        bn_batches: the data to take them of; default the set named `"train"`.
        chunk_size: points at a time, at most; see `evaluate_span`.

    Returns:
        For each set an `Evaluation` with A · B entries, b running fastest: `.loss.view(A, B)`.

    Raises:
        ValueError: if `directions` is not `(2, P)` or `origin` not `(P,)`, `first` or `second` is
            no vector of finite numbers or empty, or what `evaluate` raises.

    Example:
        >>> import torch
        >>> from assay.landscape import random_plane, scan_plane
        >>> net = torch.nn.Linear(2, 3)
        >>> data = {"train": [(torch.randn(8, 2), torch.arange(8) % 3)]}
        >>> axis = torch.linspace(-1, 1, 3)
        >>> found = scan_plane(net, random_plane(net), data, first=axis, second=axis)
        >>> found["train"].loss.view(3, 3).shape
        torch.Size([3, 3])
    """
    start = parameters_to_vector(model)
    layout = ParameterLayout.of(model)
    chosen = layout if params is None else ParameterLayout.over(select_parameters(model, params))
    if directions.shape != (2, chosen.numel):
        raise ValueError(
            f"directions must have shape (2, {chosen.numel}), got {tuple(directions.shape)}"
        )
    if origin is not None and origin.shape != (chosen.numel,):
        raise ValueError(f"origin must have shape ({chosen.numel},), got {tuple(origin.shape)}")
    directions = _widened(chosen, directions.to(start), layout, torch.zeros_like(start))
    if origin is not None:
        start = _widened(chosen, origin.to(start)[None], layout, start)[0]
    axes = _axis("first", first).to(start), _axis("second", second).to(start)
    a, b = torch.meshgrid(*axes, indexing="ij")
    coefficients = torch.stack([torch.ones_like(a), a, b], dim=-1).flatten(0, 1)
    basis = torch.cat([start[None], directions])
    return evaluate_span(
        model, basis, coefficients, batches,
        loss_fn=loss_fn, update_bn=update_bn, bn_batches=bn_batches, chunk_size=chunk_size,
    )  # fmt: skip


def _widened(
    chosen: ParameterLayout, vectors: Tensor, layout: ParameterLayout, others: Tensor
) -> Tensor:
    """Vectors of chosen parameters as vectors of all, in which the others are given."""
    wide = others.repeat(len(vectors), 1)
    pieces = layout.unflatten(wide)
    for name, values in chosen.unflatten(vectors).items():
        pieces[name].copy_(values)
    return wide


def _axis(name: str, values: object) -> Tensor:
    """Values along a direction of a plane."""
    try:
        axis = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a vector of numbers, got {values!r}") from error
    if axis.ndim != 1 or len(axis) == 0 or axis.is_complex() or not bool(axis.isfinite().all()):
        raise ValueError(f"{name} must be a vector of finite numbers, at least one, got {values!r}")
    return axis

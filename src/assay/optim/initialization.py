"""Initialisations that let signals through: mean-field critical, delta-orthogonal, LSUV, Fixup."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from assay.functional import call_model, repeatable

Activation = str | Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "elu": nn.functional.elu,
    "selu": nn.functional.selu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}
# Gauss-Legendre rule on panels of [0, 12] and, mirrored, of [−12, 0]; beyond, the normal
# distribution has 4e-33 of its mass. Panels end at 0, where ReLU and its kin have their kink, which
# a Gauss-Hermite rule would smear over many nodes.
_PANELS, _NODES, _REACH = 24, 16, 12.0
# Where a fixed point q* is looked for; softplus and its like approach one at infinity only.
_SMALLEST, _LARGEST, _GRID = 1e-10, 1e4, 300
_RTOL: Any = 1e-14  # SciPy's stubs want a NumPy float
_ALMOST_ZERO = 1e-24  # a q at which only the slopes at 0, left and right, matter
_ELEMENTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
)  # fmt: skip


class EdgeOfChaos(NamedTuple):
    """Where signals neither die out nor explode in a deep random network.

    Args:
        sigma_w2: σ_w², the variance of weights times the fan-in.
        q: q*, the second moment of pre-activations that depth does not change.

    Example:
        >>> from assay.optim import EdgeOfChaos
        >>> EdgeOfChaos(sigma_w2=2.0, q=1.0).sigma_w2
        2.0
    """

    sigma_w2: float
    q: float


class MeanField(NamedTuple):
    """What becomes of a signal in an infinitely wide random network.

    Args:
        q: q*, the fixed point of the second moment of pre-activations.
        chi: χ, by which the squared norm of a gradient is multiplied a layer.
        depth_scale: ξ = −1/log χ, in layers: gradients fall e-fold in so many, grow where it is
            negative, and neither where it is infinite.

    Example:
        >>> from assay.optim import MeanField
        >>> MeanField(q=1.0, chi=1.0, depth_scale=float("inf")).chi
        1.0
    """

    q: float
    chi: float
    depth_scale: float


def edge_of_chaos(activation: Activation, sigma_b2: float = 0.0) -> EdgeOfChaos:
    r"""Find the weight variance at which gradients keep their size through depth.

    With z ~ N(0, 1), a wide random layer maps the second moment q of its pre-activations to

        q ← σ_w² E φ(√q z)² + σ_b²,

    and gradients change by χ = σ_w² E φ'(√q* z)² at the fixed point q*. Solved are both equations
    with χ = 1.

    Args:
        activation: φ, entry by entry: a name (`"relu"`, `"leaky_relu"`, `"elu"`, `"selu"`,
            `"gelu"`, `"silu"`, `"softplus"`, `"sigmoid"`, `"tanh"`, `"identity"`), a function or a
            module.
        sigma_b2: σ_b², the variance of biases.

    Returns:
        σ_w² and q*. For a positively homogeneous φ (ReLU) every q is a fixed point, and q* is given
        as 1; for σ_b² = 0 and φ(0) = 0 otherwise, q* = 0.

    Raises:
        ValueError: if the activation is unknown, σ_b² < 0, or there is no such point (ReLU with
            σ_b² > 0).

    Example:
        >>> from assay.optim import edge_of_chaos
        >>> edge_of_chaos("relu")
        EdgeOfChaos(sigma_w2=2.0, q=1.0)
        >>> sigma_w2, q = edge_of_chaos("tanh", sigma_b2=0.05)
        >>> round(sigma_w2, 3), round(q, 2)
        (1.761, 0.57)

    Reference:
        Poole, Lahiri, Raghu, Sohl-Dickstein, Ganguli, "Exponential Expressivity in Deep Neural
        Networks through Transient Chaos", NeurIPS 2016; Schoenholz, Gilmer, Ganguli,
        Sohl-Dickstein, "Deep Information Propagation", ICLR 2017.
    """
    _check_variance("sigma_b2", sigma_b2)
    phi = _Moments(activation)
    if sigma_b2 == 0 and phi.at_zero() == 0:
        slope = phi.derivative(_ALMOST_ZERO)
        if slope == 0:
            raise ValueError(f"{phi.name} has no slope at 0: no weights make up for that")
        return EdgeOfChaos(1 / slope, 1.0 if phi.homogeneous() else 0.0)

    def excess(q: float) -> float:
        # What q is too large by if σ_w² is chosen such that χ = 1 there.
        slope = phi.derivative(q)
        return q - phi.value(q) / slope - sigma_b2 if slope > 0 else -math.inf

    q = _crossing(excess, rising=True)
    if q is None:
        raise ValueError(
            f"{phi.name} with sigma_b2={sigma_b2:g} has no edge of chaos: no weight variance makes "
            "both the activations' and the gradients' size a fixed point; try sigma_b2=0"
        )
    return EdgeOfChaos(1 / phi.derivative(q), q)


def mean_field(activation: Activation, sigma_w2: float, sigma_b2: float = 0.0) -> MeanField:
    """Say what a wide random network with these variances does to signals and gradients.

    Args:
        activation: see `edge_of_chaos`.
        sigma_w2: σ_w², the variance of weights times the fan-in.
        sigma_b2: σ_b², the variance of biases.

    Returns:
        Fixed point, χ and depth scale. Where every q is a fixed point (ReLU with σ_w² = 2), q* is
        given as 1.

    Raises:
        ValueError: if the activation is unknown, a variance is negative, or activations grow
            without bound.

    Example:
        >>> from assay.optim import mean_field
        >>> default = mean_field("relu", sigma_w2=1 / 3)  # torch's default initialisation
        >>> round(default.chi, 3), round(default.depth_scale, 2)
        (0.167, 0.56)

    Reference:
        Schoenholz, Gilmer, Ganguli, Sohl-Dickstein, "Deep Information Propagation", ICLR 2017.
    """
    _check_variance("sigma_w2", sigma_w2)
    _check_variance("sigma_b2", sigma_b2)
    phi = _Moments(activation)

    def growth(q: float) -> float:
        change = sigma_w2 * phi.value(q) + sigma_b2 - q
        return 0.0 if abs(change) <= 1e-12 * q else change

    if growth(1.0) == growth(7.0) == 0:
        q = 1.0
    elif growth(_SMALLEST) < 0:
        q = 0.0
    else:
        found = _crossing(growth, rising=False)
        if found is None:
            raise ValueError(
                f"activations of {phi.name} grow without bound for sigma_w2={sigma_w2:g}, "
                f"sigma_b2={sigma_b2:g}"
            )
        q = found
    chi = sigma_w2 * phi.derivative(max(q, _ALMOST_ZERO))
    if chi == 0 or abs(chi - 1) < 1e-12:
        return MeanField(q, chi, math.inf if chi else 0.0)
    return MeanField(q, chi, -1 / math.log(chi))


class _Moments:
    """E φ(√q z)² and E φ'(√q z)² for z ~ N(0, 1), by quadrature in float64."""

    def __init__(self, activation: Activation) -> None:
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                known = ", ".join(map(repr, ACTIVATIONS))
                raise ValueError(
                    f"activation must be one of {known} or a function, got {activation!r}"
                )
            self.name, self._phi = activation, ACTIVATIONS[activation]
        elif callable(activation):
            self.name = getattr(activation, "__name__", type(activation).__name__)
            self._phi = activation
        else:
            raise TypeError(f"activation must be a name or a function, got {activation!r}")
        x, w = np.polynomial.legendre.leggauss(_NODES)
        width = _REACH / _PANELS
        z = (np.arange(_PANELS)[:, None] + (x + 1) / 2).ravel() * width
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        weights = np.tile(w * width / 2, _PANELS) * density
        self._z = torch.from_numpy(np.concatenate([z, -z]))
        self._w = torch.from_numpy(np.concatenate([weights, weights]) / (2 * weights.sum()))

    def _at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.clone().requires_grad_()
            value = self._phi(z)
            (slope,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), slope

    def value(self, q: float) -> float:
        return float(self._w @ self._at(math.sqrt(q) * self._z)[0].square())

    def derivative(self, q: float) -> float:
        return float(self._w @ self._at(math.sqrt(q) * self._z)[1].square())

    def at_zero(self) -> float:
        return self._at(torch.zeros(1, dtype=torch.float64))[0].item()

    def homogeneous(self) -> bool:
        """Whether φ(cz) = c φ(z) for c > 0, as far as a few c tell."""
        one = self._at(self._z)[0]
        return all(torch.allclose(self._at(c * self._z)[0], c * one) for c in (0.01, 3.0, 100.0))


def _crossing(function: Callable[[float], float], *, rising: bool) -> float | None:
    """The smallest q at which the function goes through 0 in that direction, on a fine grid."""
    sign = 1 if rising else -1
    grid = np.geomspace(_SMALLEST, _LARGEST, _GRID).tolist()
    for low, high in pairwise(grid):
        if sign * function(low) < 0 <= sign * function(high):
            while function(low) == -math.inf:
                low = math.sqrt(low * high)
            root: Any = scipy.optimize.brentq(function, low, high, xtol=1e-300, rtol=_RTOL)
            return float(root)
    return None


@torch.no_grad()
def critical_(
    module: nn.Module,
    activation: Activation,
    *,
    sigma_b2: float = 0.0,
    orthogonal: bool = True,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Initialise every linear and convolutional layer of a module at the edge of chaos.

    Weights get the variance σ_w²/fan_in of `edge_of_chaos`: orthogonal ones scaled by σ_w, or
    Gaussian ones. Orthogonal convolutions are delta-orthogonal; those that cannot be (fewer outputs
    than inputs, a kernel without a middle, transposed) get Gaussian weights. Biases are drawn from
    N(0, σ_b²). Other layers stay as they are.

    Args:
        module: any module; changed in place.
        activation: the one between its layers, see `edge_of_chaos`.
        sigma_b2: σ_b².
        orthogonal: whether weights are orthogonal.
        generator: source of randomness; default torch's own for each tensor's device.

    Returns:
        The module.

    Raises:
        ValueError: if there is no edge of chaos, see `edge_of_chaos`, or no such layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from assay.optim import critical_
        >>> model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(50)))
        >>> x = torch.randn(16)
        >>> ratio = critical_(model, "identity")(x).norm() / x.norm()
        >>> bool(abs(ratio - 1) < 1e-4)  # an isometry, however deep
        True

    Reference:
        Pennington, Schoenholz, Ganguli, "Resurrecting the Sigmoid in Deep Learning through
        Dynamical Isometry", NeurIPS 2017.
    """
    sigma_w2, _ = edge_of_chaos(activation, sigma_b2)
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | _ConvNd)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear or convolutional layer")
    gain = math.sqrt(sigma_w2)
    done: set[int] = set()
    for layer in layers:
        if id(layer.weight) not in done:
            done.add(id(layer.weight))
            if not orthogonal or (isinstance(layer, _ConvNd) and not _has_delta(layer)):
                _normal_(layer.weight, gain / math.sqrt(_fan_in(layer)), generator)
            elif isinstance(layer, _ConvNd):
                delta_orthogonal_(layer.weight, gain, groups=layer.groups, generator=generator)
            else:
                _orthogonal_(layer.weight, gain, generator)
        if layer.bias is not None:
            _normal_(layer.bias, math.sqrt(sigma_b2), generator)
    return module


@torch.no_grad()
def delta_orthogonal_(
    tensor: Tensor,
    gain: float = 1.0,
    *,
    groups: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill the weight of a convolution such that it is an isometry.

    All taps of the kernel are zero but the middle one, a matrix with orthonormal columns times
    `gain`. (Orthogonal weights after flattening the kernel, as `torch.nn.init.orthogonal_` makes
    them, are not an isometry: neighbouring positions share inputs.)

    Args:
        tensor: weight `(C_out, C_in / groups, *kernel)`, kernel sizes odd.
        gain: scale of all singular values.
        groups: of the convolution, each an isometry of its own.
        generator: source of randomness; default torch's own.

    Returns:
        The tensor.

    Raises:
        ValueError: if the tensor has no kernel dimension or one of even size, or a group has fewer
            outputs than inputs.

    Example:
        >>> import torch
        >>> from assay.optim import delta_orthogonal_
        >>> conv = torch.nn.Conv2d(4, 8, 3, padding=1, bias=False)
        >>> weight = delta_orthogonal_(conv.weight)
        >>> x = torch.randn(1, 4, 10, 10)
        >>> torch.allclose(conv(x).norm(), x.norm())
        True

    Reference:
        Xiao, Bahri, Sohl-Dickstein, Schoenholz, Pennington, "Dynamical Isometry and a Mean Field
        Theory of CNNs: How to Train 10,000-Layer Vanilla Convolutional Neural Networks", ICML 2018.
    """
    shape = tuple(tensor.shape)
    if tensor.ndim < 3 or any(size % 2 == 0 for size in shape[2:]):
        raise ValueError(
            f"tensor must be the weight of a convolution with a kernel of odd size, got {shape}"
        )
    if groups < 1 or shape[0] % groups or shape[0] // groups < shape[1]:
        raise ValueError(
            f"each group needs at least as many outputs as inputs, got {shape[0]} outputs in "
            f"{groups} groups of {shape[1]} inputs"
        )
    middle = tuple(size // 2 for size in shape[2:])
    tensor.zero_()
    for block in tensor.chunk(groups):
        _orthogonal_(block[(slice(None), slice(None), *middle)], gain, generator)
    return tensor


@torch.no_grad()
def lsuv_(
    model: nn.Module,
    batch: Any,
    *,
    tol: float = 0.02,
    max_iter: int = 10,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Scale the weights of a model, layer by layer, until a batch leaves each with variance 1.

    Layer-sequential unit variance: every linear and convolutional layer gets orthogonal weights and
    zero biases, and then, in the order in which they run,

        while |Var(out) − 1| > tol:  W ← W / √Var(out).

    One pass through the model is all it takes: a layer is scaled when the pass gets there, on the
    inputs that the layers before it, already scaled, have made.

    A layer, or a weight that layers share, is scaled where it runs first. A weight that something
    before it holds too, as an embedding tied to the output layer, changes what was scaled already:
    where modules share weights, further passes follow until one has nothing left to scale. An
    attention
    (`nn.MultiheadAttention`) is scaled through its output projection. Layers that the pass does not
    reach, and weights that are computed by a parametrization, stay as they are.

    Args:
        model: any module; the pass is made in its present mode, and leaves no trace of itself in
            buffers or random state.
        batch: what it takes; a tuple or list is spread, a mapping becomes keyword arguments.
        tol: largest distance of a layer's output variance from 1.
        max_iter: largest number of scalings of a layer in a pass, and of further passes.
        generator: source of the orthogonal weights; default torch's own.

    Returns:
        The variance of each layer's output, by the layer's name, in the order in which they ran, as
        it is at the end. Where it is farther from 1 than `tol`, `max_iter` was not enough.

    Raises:
        ValueError: if `tol` or `max_iter` is not positive, a layer's output does not vary or is not
            finite (the message names it), or no layer was reached.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from assay.optim import lsuv_
        >>> model = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 5))
        >>> variances = lsuv_(model, 10 * torch.randn(64, 20))
        >>> all(abs(v - 1) <= 0.02 for v in variances.values())
        True

    Reference:
        Mishkin, Matas, "All You Need Is a Good Init", ICLR 2016.
    """
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    chosen: dict[int, nn.Module] = {}  # by the weight
    waiting: set[nn.Module] = set()
    changed: set[int] = set()
    variances: dict[str, float] = {}

    def start(layer: Any, args: tuple) -> None:
        if id(_scalable(layer)) not in chosen:
            chosen[id(_scalable(layer))] = layer
            changed.add(id(_scalable(layer)))
            waiting.add(layer)
            _orthogonal_layer_(layer, generator)

    def scale(layer: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        if layer not in waiting:
            return None
        waiting.discard(layer)
        for iteration in range(limit + 1):
            variance = float(_first(output).var(correction=0))
            if not 0 < variance < math.inf:
                raise ValueError(
                    f"the output of layer {names[layer]!r} has variance {variance:g} on this "
                    "batch: its inputs are constant (dead units before it?) or not finite"
                )
            if abs(variance - 1) <= tol or iteration == limit:
                break
            changed.add(id(_scalable(layer)))
            _scalable(layer).div_(math.sqrt(variance))
            output = layer.forward(*args, **kwargs)
        variances[names[layer]] = variance
        return output

    layers = [module for module in model.modules() if _can_scale(module)]
    handles = [layer.register_forward_pre_hook(start) for layer in layers]
    handles += [layer.register_forward_hook(scale, with_kwargs=True) for layer in layers]
    try:
        for further in range(max_iter + 1):
            limit = max_iter if further < max_iter else 0  # the last one measures only
            changed.clear()
            waiting.update(chosen.values())
            with repeatable(model):
                call_model(model, batch)
            # Nothing before a layer holds its weight too: what was measured there is so still.
            if all(holders[weight] == 1 for weight in changed):
                break
    finally:
        for handle in handles:
            handle.remove()
    if not variances:
        raise ValueError(f"the pass reaches no layer of {type(model).__name__} that has weights")
    return variances


@torch.no_grad()
def fixup_(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    head: nn.Module | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Initialise the branches of a residual net such that it trains without normalisation.

    Each of the L branches has m layers with weights. Its first m − 1 get He's initialisation times
    L^(−1/(2m−2)), its last becomes zero, and so does the head. Biases become zero. New parameters
    join the model: a scalar `fixup_bias` (0) added to the input of each layer with weights and of
    each activation of a branch, and a scalar `fixup_multiplier` (1) of the branch's output with a
    `fixup_output_bias` (0). Make the optimizer after the call.

    Args:
        model: any module; the layers outside the branches stay as they are.
        blocks: the residual branches, sub-modules of `model` whose output is added to the shortcut
            (not the blocks with the addition in them). Norms should have been left out.
        head: the layer that makes the outputs, to become zero.
        generator: source of the weights; default torch's own.

    Returns:
        The model.

    Raises:
        ValueError: if there are no branches, one of them is not in the model, has no linear or
            convolutional layer, or has been initialised like this before.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from assay.optim import fixup_
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        ...     def forward(self, x):
        ...         return x + self.branch(x)
        >>> model = nn.Sequential(*(Residual() for _ in range(100)))
        >>> _ = fixup_(model, [block.branch for block in model])
        >>> x = torch.randn(2, 8)
        >>> torch.equal(model(x), x)  # branches start at zero
        True

    Reference:
        Zhang, Dauphin, Ma, "Fixup Initialization: Residual Learning Without Normalization",
        ICLR 2019.
    """
    branches = list(blocks)
    if not branches:
        raise ValueError("blocks is empty: expected the residual branches of the model")
    inside = set(model.modules())
    layers_of: list[list[Any]] = []
    for number, branch in enumerate(branches):
        layers = [m for m in branch.modules() if isinstance(m, nn.Linear | _ConvNd)]
        if branch not in inside:
            raise ValueError(f"blocks[{number}] is not a sub-module of the model")
        if not layers:
            raise ValueError(f"blocks[{number}] has no linear or convolutional layer")
        if hasattr(branch, "fixup_multiplier"):
            raise ValueError(f"blocks[{number}] has been initialised by fixup_ before")
        layers_of.append(layers)
    for branch, layers in zip(branches, layers_of, strict=True):
        m = len(layers)
        for layer in layers[:-1]:
            shrink = len(branches) ** (-1 / (2 * m - 2))
            _normal_(layer.weight, shrink * math.sqrt(2 / _fan_in(layer)), generator)
        layers[-1].weight.zero_()
        for layer in layers:
            if layer.bias is not None:
                layer.bias.zero_()
        _add_scalars(branch, layers[0].weight)
    if head is not None:
        for parameter in head.parameters():
            parameter.zero_()
    return model


def _add_scalars(branch: nn.Module, like: Tensor) -> None:
    for module in branch.modules():
        if isinstance(module, (nn.Linear, _ConvNd, *_ELEMENTWISE)):
            module.register_parameter("fixup_bias", nn.Parameter(like.new_zeros(())))
            module.register_forward_pre_hook(_add_bias)
    branch.register_parameter("fixup_multiplier", nn.Parameter(like.new_ones(())))
    branch.register_parameter("fixup_output_bias", nn.Parameter(like.new_zeros(())))
    branch.register_forward_hook(_scale_output)


# Functions of the module, not closures: models with these hooks can be copied and pickled.
def _add_bias(module: Any, args: tuple) -> tuple:
    return (args[0] + module.fixup_bias, *args[1:])


def _scale_output(module: Any, args: tuple, output: Tensor) -> Tensor:
    return output * module.fixup_multiplier + module.fixup_output_bias


def _check_variance(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0, got {value}")


def _has_delta(layer: _ConvNd) -> bool:
    return (
        not isinstance(layer, _ConvTransposeNd)
        and all(size % 2 for size in layer.kernel_size)
        and layer.out_channels >= layer.in_channels
    )


def _fan_in(layer: nn.Linear | _ConvNd) -> float:
    """Number of inputs that an output is a sum of."""
    weight = layer.weight
    if isinstance(layer, _ConvTransposeNd):
        # (C_in, C_out / groups, *kernel): with a stride, a pixel gets a share of the kernel only.
        return weight.shape[0] // layer.groups * weight[0, 0].numel() / math.prod(layer.stride)
    return weight[0].numel()


def _normal_(tensor: Tensor, std: float, generator: torch.Generator | None) -> None:
    tensor.copy_(std * _gaussian(tensor.shape, tensor, generator))


def _orthogonal_(
    tensor: Float[Tensor, "rows *columns"], gain: float, generator: torch.Generator | None
) -> None:
    """Uniformly distributed orthonormal rows or columns, the fewer of the two."""
    flat = _gaussian((len(tensor), tensor[0].numel()), tensor, generator)
    wide = flat.shape[0] < flat.shape[1]
    q, r = torch.linalg.qr(flat.T if wide else flat)
    q = q * r.diagonal().sgn()  # makes the distribution uniform
    tensor.copy_(gain * (q.T if wide else q).reshape(tensor.shape))


def _gaussian(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers from the generator's device; float32 for the half precisions."""
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=dtype, device=device).to(like.device)


def _can_scale(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    return isinstance(module, nn.Linear | _ConvNd) and "weight" in module._parameters


def _scalable(layer: Any) -> Tensor:
    """The weight in which the output of a layer is linear."""
    return layer.out_proj.weight if isinstance(layer, nn.MultiheadAttention) else layer.weight


def _orthogonal_layer_(layer: Any, generator: torch.Generator | None) -> None:
    weights = [layer.weight] if not isinstance(layer, nn.MultiheadAttention) else []
    biases = [layer.bias] if not isinstance(layer, nn.MultiheadAttention) else []
    if isinstance(layer, nn.MultiheadAttention):
        if layer.in_proj_weight is not None:
            weights += layer.in_proj_weight.chunk(3)
        else:
            weights += [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
        weights.append(layer.out_proj.weight)
        biases += [layer.in_proj_bias, layer.out_proj.bias]
    for weight in weights:
        _orthogonal_(weight, 1.0, generator)
    for bias in biases:
        if bias is not None:
            bias.zero_()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

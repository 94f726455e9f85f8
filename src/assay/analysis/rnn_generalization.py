"""Norms and generalisation bounds of ReLU recurrent nets, term by term.

The net reads L vectors and answers after the last one, without biases,

    h_t = ReLU(U x_t + W h_{t−1}),  h_0 = 0,  y = V h_L.

Its generalisation bound has a term of the gradients (the Fisher–Rao norm over the smallest
eigenvalue of the inputs' second moment) and one of the weights (row sums of V, W, U). All sums of
powers are kept as logarithms in float64; what overflows is reported as such.

The bound is never informative. The mean size of an output is at most Q Λ with
Q = β_V β_U ‖X'‖_1 / n, by the same row sums that the term of the weights is made of; a margin is at
most the sum of two outputs, so by Markov's inequality at most a share k Q Λ / a of the samples has
a margin above a, and

    (1/n) #{margin ≤ a} + (4k/a) Q Λ ≥ 1 + 3 k Q Λ / a > 1

for every net, every data set and every margin. The same holds with input noise. The terms are
useful to compare nets, not to certify one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import scipy
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from assay.functional.labels import class_indices

_LARGEST_DENSE = 2000  # size of a second-moment matrix whose spectrum is still computed densely
_CHECKED_SAMPLES = 16


class ReLURNN(nn.Module):
    """The net y = V h_L, h_t = ReLU(U x_t + W h_{t−1}), to which the theory applies.

    It is an `nn.RNN` and an `nn.Linear`, both without biases: `net.recurrent` and `net.readout`
    can be taken out and used, and `ReLURNN.of` takes such a pair from your own model.

    Args:
        input_size: d, features of a step.
        hidden_size: m, hidden units.
        num_classes: k, outputs.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> import torch
        >>> net = ReLURNN(8, 64, 10)
        >>> net(torch.rand(5, 20, 8)).shape  # five sequences of 20 steps
        torch.Size([5, 10])
        >>> tuple(net.recurrent.weight_hh_l0.shape)
        (64, 64)

    Reference:
        Tu, He, Tao, "Understanding Generalization in Recurrent Neural Networks", ICLR 2020.
    """

    def __init__(self, input_size: int, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        for name, size in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_classes", num_classes),
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.recurrent = nn.RNN(
            input_size, hidden_size, nonlinearity="relu", bias=False, batch_first=True
        )
        self.readout = nn.Linear(hidden_size, num_classes, bias=False)

    @property
    def U(self) -> Tensor:
        """Input weights, (m, d)."""
        return self.recurrent.all_weights[0][0]

    @property
    def W(self) -> Tensor:
        """Recurrent weights, (m, m)."""
        return self.recurrent.all_weights[0][1]

    @property
    def V(self) -> Tensor:
        """Output weights, (k, m)."""
        return self.readout.weight

    def forward(self, x: Float[Tensor, "n steps d"]) -> Float[Tensor, "n k"]:
        """Outputs after the last step."""
        return self.readout(self.recurrent(x)[0][:, -1])

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, x: Tensor | None = None) -> "ReLURNN":
        """Copy the weights of a model that computes y = V h_L, or say why the theory does not fit.

        Args:
            model: a `ReLURNN`, or any module with one `nn.RNN` and one `nn.Linear`.
            x: some inputs, (n, steps, d); if given, the model's answers to them have to be those
                of the copy (a model without `batch_first` may take them transposed).

        Returns:
            A copy in float64 on the CPU.

        Raises:
            TypeError: If the model has other parts, another non-linearity, several layers or
                directions, or biases, or computes something else than V h_L.
        """
        recurrent, readout = _parts(model)
        copy = cls(recurrent.input_size, recurrent.hidden_size, readout.out_features).double()
        copy.recurrent.load_state_dict(
            {name: getattr(recurrent, name) for name in copy.recurrent.state_dict()}
        )
        copy.readout.load_state_dict({"weight": readout.weight})
        if x is not None and not isinstance(model, ReLURNN):
            _check_answers(model, copy, _inputs(copy, x)[:_CHECKED_SAMPLES])
        return copy


def _parts(model: nn.Module) -> tuple[nn.RNN, nn.Linear]:
    """The recurrent and the linear layer of a model; TypeError if the theory does not fit them."""
    recurrents = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if len(recurrents) != 1 or len(linears) != 1:
        raise TypeError(
            "model must have one nn.RNN and one nn.Linear, got "
            f"{len(recurrents)} recurrent and {len(linears)} linear layers"
        )
    recurrent, readout = recurrents[0], linears[0]
    if not isinstance(recurrent, nn.RNN) or recurrent.nonlinearity != "relu":
        kind = f"{type(recurrent).__name__}({getattr(recurrent, 'nonlinearity', 'gated')})"
        raise TypeError(
            f"the recurrent layer must be nn.RNN(nonlinearity='relu'), got {kind}: the theory "
            "rests on ReLU(z) = ReLU'(z) z, which tanh and gates do not have"
        )
    if recurrent.num_layers != 1 or recurrent.bidirectional:
        raise TypeError(
            "the recurrent layer must have one layer and one direction, got "
            f"num_layers={recurrent.num_layers}, bidirectional={recurrent.bidirectional}"
        )
    biases = [p for n, p in recurrent.named_parameters() if n.startswith("bias")]
    biases += [] if readout.bias is None else [readout.bias]
    if any(bool(bias.detach().any()) for bias in biases):
        raise TypeError(
            "model must have no biases (bias=False, or all of them zero): with biases the outputs "
            "are no longer homogeneous in the weights"
        )
    if readout.in_features != recurrent.hidden_size:
        raise TypeError(
            f"the linear layer must read the {recurrent.hidden_size} hidden units, got "
            f"in_features={readout.in_features}"
        )
    return recurrent, readout


def _check_answers(model: nn.Module, copy: ReLURNN, x: Tensor) -> None:
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    try:
        inputs = x.to(parameter.device, parameter.dtype)
        expected = copy(inputs.cpu().double())
        for candidate in (inputs, inputs.transpose(0, 1)):
            try:
                answers = model(candidate)
            except (RuntimeError, ValueError):
                continue  # the wrong one of the two layouts
            if isinstance(answers, Tensor) and answers.shape == expected.shape:
                size = max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)
                error = (answers.cpu().double() - expected).abs().max().item()
                if error <= 1000 * torch.finfo(parameter.dtype).eps * size:
                    return
    finally:
        model.train(training)
    raise TypeError(
        "model must compute V h_L from the last hidden state of its nn.RNN, and its answers are "
        "different: a sum over the steps, another step, or further operations violate the theory"
    )


def _inputs(net: ReLURNN, x: Tensor) -> Tensor:
    if x.ndim != 3 or x.shape[2] != net.recurrent.input_size or 0 in x.shape:
        raise ValueError(
            f"x must be (n, steps, {net.recurrent.input_size}) with at least one sample and one "
            f"step, got shape {tuple(x.shape)}"
        )
    return x.detach().to("cpu", torch.float64)


class InputNoise(nn.Module):
    """Adds Gaussian noise to its input in training mode, nothing in evaluation mode.

    Args:
        std: σ, standard deviation of the noise, at least 0.

    Raises:
        ValueError: If `std` is negative or not finite.

    Example:
        >>> import torch
        >>> noise = InputNoise(0.1)
        >>> x = torch.zeros(1000)
        >>> 0.08 < noise(x).std().item() < 0.12, noise.eval()(x) is x
        (True, True)

    Reference:
        Tu, He, Tao, "Understanding Generalization in Recurrent Neural Networks", ICLR 2020.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"std must be a finite number of at least 0, got {std}")
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """`x`, with noise in training mode."""
        return x + self.std * torch.randn_like(x) if self.training and self.std > 0 else x

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"std={self.std:g}"


@dataclass(frozen=True)
class MatrixNorms:
    """Largest sums of absolute values of a row of V, W and U: the paper's ‖V'‖_1, ‖W'‖_1, ‖U'‖_1.

    Args:
        beta_v: of the output weights V.
        beta_w: of the recurrent weights W; below 1 the net forgets, above 1 the bounds explode.
        beta_u: of the input weights U.

    Example:
        >>> MatrixNorms(1.0, 0.9, 2.0).beta_w
        0.9
    """

    beta_v: float
    beta_w: float
    beta_u: float


def matrix_norms(model: nn.Module) -> MatrixNorms:
    """Return the largest absolute row sums of V, W and U.

    Args:
        model: a `ReLURNN`, or a module that `ReLURNN.of` takes.

    Returns:
        β_V, β_W and β_U.

    Raises:
        TypeError: If the theory does not apply to the model.

    Example:
        >>> import torch
        >>> net = ReLURNN(2, 3, 2)
        >>> _ = torch.nn.init.eye_(net.W)
        >>> matrix_norms(net).beta_w
        1.0

    Reference:
        Tu, He, Tao, "Understanding Generalization in Recurrent Neural Networks", ICLR 2020.
    """
    net = ReLURNN.of(model)
    v, w, u = (m.detach().abs().sum(1).max().item() for m in (net.V, net.W, net.U))
    return MatrixNorms(beta_v=v, beta_w=w, beta_u=u)


def log_lambda(beta: float, steps: int) -> float:
    """Return log Λ with Λ = Σ_{j<L} (j + 1) β^j, without overflow.

    Args:
        beta: β ≥ 0.
        steps: L, at least 1.

    Returns:
        The natural logarithm of Λ.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import math
        >>> round(math.exp(log_lambda(1.0, 4)), 9)  # L(L+1)/2
        10.0
        >>> log_lambda(5.0, 10_000) > 709  # Λ itself overflows
        True
    """
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return _log_series(beta, torch.arange(1, steps + 1, dtype=torch.float64))


def _log_series(beta: float, coefficients: Tensor) -> float:
    """log Σ_j c_j β^j for positive c_j."""
    if beta == 0:
        return math.log(coefficients[0].item())
    powers = torch.arange(len(coefficients), dtype=torch.float64) * math.log(beta)
    return torch.logsumexp(coefficients.log() + powers, 0).item()


def _exp(logarithm: float) -> float:
    return math.exp(logarithm) if logarithm < 709 else math.inf


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


@torch.no_grad()
def linearized_output(model: nn.Module, x: Float[Tensor, "n steps d"]) -> Float[Tensor, "n k"]:
    """Return Σ_i V W^{L−i} U x_i: the net without its ReLUs.

    Args:
        model: a `ReLURNN`, or a module that `ReLURNN.of` takes.
        x: inputs, (n, steps, d).

    Returns:
        Outputs in float64, (n, k).

    Raises:
        TypeError: If the theory does not apply to the model.
        ValueError: If `x` has the wrong shape.

    Example:
        >>> import torch
        >>> net = ReLURNN(2, 3, 2)
        >>> x = torch.rand(4, 1, 2)
        >>> expected = x[:, 0] @ (net.V @ net.U).T
        >>> torch.allclose(linearized_output(net, x), expected.double())
        True
    """
    net = ReLURNN.of(model, x)
    inputs = _inputs(net, x)
    state = inputs.new_zeros(len(inputs), len(net.W))
    for step in inputs.unbind(1):
        state = state @ net.W.T + step @ net.U.T
    return state @ net.V.T


@torch.no_grad()
def scaling_derivative(
    model: nn.Module, x: Float[Tensor, "n steps d"], *, linearized: bool = False
) -> Float[Tensor, "n k"]:
    """Return ⟨θ, ∂y/∂θ⟩, how the outputs change as all weights grow in proportion.

    That is η(θ) c with c = (L+1, L, …, 2) and columns η_i = V D_L W D_{L−1} … W D_i U x_i, where
    D_t = diag(ReLU'(g_t)). It is carried along with the forward pass: the tangent of the
    preactivation g_t = U x_t + W h_{t−1} is g_t + W ḣ_{t−1}, and no gradient is formed.

    Args:
        model: a `ReLURNN`, or a module that `ReLURNN.of` takes.
        x: inputs, (n, steps, d).
        linearized: with all D_t replaced by the identity: τ(θ) c = Σ_i (L+2−i) V W^{L−i} U x_i.

    Returns:
        One value an output, float64, (n, k).

    Raises:
        TypeError: If the theory does not apply to the model.
        ValueError: If `x` has the wrong shape.

    Example:
        >>> import torch
        >>> net = ReLURNN(2, 3, 2)
        >>> x = torch.rand(4, 1, 2)  # one step: y has degree 2 in the weights
        >>> torch.allclose(scaling_derivative(net, x), 2 * net(x).double())
        True

    Reference:
        Tu, He, Tao, "Understanding Generalization in Recurrent Neural Networks", ICLR 2020,
        Lemma 1.
    """
    net = ReLURNN.of(model, x)
    inputs = _inputs(net, x)
    # Both recursions at once: one product with W a step.
    both = inputs.new_zeros(2, len(inputs), len(net.W))
    drive = inputs @ net.U.T
    for t in range(inputs.shape[1]):
        both = both @ net.W.T
        both[0] += drive[:, t]
        both[1] += both[0]
        if not linearized:
            both *= both[0] > 0
    return both.sum(0) @ net.V.T


def fisher_rao_norm(
    model: nn.Module,
    x: Float[Tensor, "n steps d"],
    y: Tensor | None = None,
    *,
    kind: Literal["fs", "fr"] = "fs",
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> float:
    """Return the Fisher–Rao norm of the weights, or its bound's form, on a sample.

    * `"fr"`: ‖θ‖_fr² = E ⟨θ, ∇_θ ℓ⟩² = E ⟨η c, ∂ℓ/∂y⟩², the norm itself;
    * `"fs"`: ‖θ‖_fs² = E max_i (τ c)_i², the form in the bound: no labels, no ReLUs.

    The expectation over the population is replaced by the mean over the sample (plug-in).

    Args:
        model: a `ReLURNN`, or a module that `ReLURNN.of` takes.
        x: inputs, (n, steps, d).
        y: targets, (n,); for `"fr"`.
        kind: which of the two.
        loss_fn: `(outputs, y) -> scalar`, a mean over the samples; for `"fr"`.

    Returns:
        The norm (not squared).

    Raises:
        TypeError: If the theory does not apply to the model.
        ValueError: If `x` has the wrong shape, `kind` is unknown, or `"fr"` has no `y`.

    Example:
        >>> import torch
        >>> net = ReLURNN(2, 3, 2)
        >>> x, y = torch.rand(4, 5, 2), torch.tensor([0, 1, 1, 0])
        >>> fisher_rao_norm(net, x) > 0, fisher_rao_norm(net, x, y, kind="fr") > 0
        (True, True)

    Reference:
        Tu, He, Tao, "Understanding Generalization in Recurrent Neural Networks", ICLR 2020,
        Lemma 2. The norm: Liang, Poggio, Rakhlin, Stokes, AISTATS 2019.
    """
    if kind == "fs":
        return _fs_norm(scaling_derivative(model, x, linearized=True))
    if kind != "fr":
        raise ValueError(f"kind must be 'fs' or 'fr', got {kind!r}")
    if y is None or len(y) != len(x):
        raise ValueError(f"kind 'fr' needs y with one target a sample ({len(x)}), got {y!r:.60}")
    net = ReLURNN.of(model, x)
    with torch.no_grad():
        outputs = net(_inputs(net, x))
    outputs.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(outputs, y.cpu()) * len(x), outputs)
    return (scaling_derivative(net, x) * gradient).sum(1).square().mean().sqrt().item()


def _fs_norm(values: Tensor) -> float:
    return values.abs().amax(1).square().mean().sqrt().item()


def fisher_rao_bound(model: nn.Module, steps: int, input_bound: float) -> float:
    """Bound ‖θ‖_fs by the weights alone: β_V β_U B Σ_{j<L} (j + 2) β_W^j.

    For β_W < 1 and any length that is at most β_V β_U B (1/(1−β_W)² + 1/(1−β_W)).

    Args:
        model: a `ReLURNN`, or a module that `ReLURNN.of` takes.
        steps: L.
        input_bound: B, the largest size of an entry of x.

    Returns:
        The bound; `inf` if it overflows.

    Raises:
        TypeError: If the theory does not apply to the model.
        ValueError: If `steps` or `input_bound` is out of its range.

    Example:
        >>> import torch
        >>> net = ReLURNN(2, 3, 2)
        >>> fisher_rao_norm(net, torch.rand(4, 5, 2)) <= fisher_rao_bound(net, 5, 1.0)
        True
    """
    if steps < 1 or not input_bound >= 0:
        raise ValueError(
            f"steps must be at least 1 and input_bound at least 0, got {steps} and {input_bound}"
        )
    norms = matrix_norms(model)
    series = _log_series(norms.beta_w, torch.arange(2, steps + 2, dtype=torch.float64))
    return _exp(_log(norms.beta_v) + _log(norms.beta_u) + _log(input_bound) + series)


def smallest_moment(x: Tensor) -> float:
    """Return λ_min of the second moment (1/n) Σ x x' of sequences seen as long vectors.

    Fewer samples than entries of a vector give 0, and so does what rounding cannot tell from it.
    This is the sample's eigenvalue; it underestimates the population's.

    Args:
        x: inputs, (n, steps, d) or (n, d).

    Returns:
        The eigenvalue, at least 0.

    Raises:
        ValueError: If `x` is empty or not finite.

    Example:
        >>> import torch
        >>> round(smallest_moment(torch.eye(4)), 9), smallest_moment(torch.eye(4)[:3])
        (0.25, 0.0)
    """
    if x.ndim < 2 or x.numel() == 0 or not bool(x.isfinite().all()):
        raise ValueError(f"x must be finite and not empty, got shape {tuple(x.shape)}")
    rows = x.detach().flatten(1).to("cpu", torch.float64)
    n, size = rows.shape
    largest = torch.linalg.matrix_norm(rows).square().item() / n
    if n < size:
        return 0.0
    if size <= _LARGEST_DENSE:
        smallest = torch.linalg.eigvalsh(rows.T @ rows / n)[0].item()
    else:
        operator = scipy.sparse.linalg.aslinearoperator(rows.numpy())
        moment = operator.T @ operator * (1 / n)
        smallest = float(
            scipy.sparse.linalg.eigsh(moment, k=1, which="SA", return_eigenvectors=False)[0]
        )
    return smallest if smallest > size * torch.finfo(torch.float64).eps * largest else 0.0


@dataclass(frozen=True)
class BoundReport:
    """The bound on the probability of an error, term by term.

    Args:
        empirical: share of samples with a margin of at most a; with noise the ramp loss instead.
        gradients: (4k/a) r ‖X‖_F / (2n √λ_min), the term of gradients and input covariance.
        weights: (4k/a) β_V β_U Λ ‖X'‖_1 / n, the term of the weights; does not fall with n.
        noise: (2/a) β_V β_U σ √(2 log 2d) Σ_i β_W^{L−i}, the price of noise; 0 without.
        confidence: 3 √(log(2/δ) / (2n)).
        margin: a; of a grid the best one.
        delta: the probability with which the bound may fail.
        r: the radius that was used, ≥ ‖θ‖_fs.
        lambda_min: smallest eigenvalue of the inputs' second moment, plus σ².
        norms: β_V, β_W and β_U.
        log10_weights: decimal logarithm of `weights`, which may overflow.

    Example:
        >>> report = BoundReport(0.1, 0.2, 0.3, 0.0, 0.1, 1.0, 0.05, 1.0, 0.01,
        ...                      MatrixNorms(1.0, 0.5, 1.0), -0.52)
        >>> round(report.total, 6), report.vacuous, report.dominant
        (0.7, False, 'weights')
    """

    empirical: float
    gradients: float
    weights: float
    noise: float
    confidence: float
    margin: float
    delta: float
    r: float
    lambda_min: float
    norms: MatrixNorms
    log10_weights: float

    @property
    def terms(self) -> dict[str, float]:
        """The five terms by name."""
        names = ("empirical", "gradients", "weights", "noise", "confidence")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> float:
        """The bound itself, the sum of the terms; may be `inf`."""
        return math.fsum(self.terms.values())

    @property
    def vacuous(self) -> bool:
        """Whether the bound is 1 or more and says nothing."""
        return self.total >= 1

    @property
    def dominant(self) -> str:
        """Name of the largest term."""
        return max(self.terms, key=self.terms.__getitem__)


@torch.no_grad()
def rnn_bound(
    model: nn.Module,
    x: Float[Tensor, "n steps d"],
    y: Tensor,
    *,
    margin: float | None = None,
    delta: float = 0.05,
    noise_std: float | None = None,
    margin_grid: Sequence[float] | None = None,
    r: float | None = None,
    generator: torch.Generator | None = None,
) -> BoundReport:
    """Evaluate the generalisation bound of a ReLU RNN, with or without input noise.

    With probability at least 1 − δ, for X the (Ld) × n matrix of inputs,

        P(margin ≤ 0) ≤ (1/n) #{margin ≤ a} + 3 √(log(2/δ)/(2n))
            + (4k/a) [r ‖X‖_F / (2n) λ_min^{−1/2} + β_V β_U ‖X'‖_1 Λ / n].

    For a net trained with noise N(0, σ²) on its inputs λ_min becomes λ_min + σ², X the noisy
    inputs, the first term the mean ramp loss on them, and the noise's own price is added.
    Expectations over the population (in r and λ_min) are replaced by means over the sample:
    plug-in figures. The sum is never below 1, see the module's text; the terms tell what dominates.

    Args:
        model: a `ReLURNN`, or a module that `ReLURNN.of` takes.
        x: training inputs, (n, steps, d), without noise.
        y: class indices, (n,).
        margin: a > 0, chosen before the data are seen.
        delta: δ in (0, 1).
        noise_std: σ; None for the theorem without noise.
        margin_grid: margins of which the best is taken, at δ divided by their number; instead of
            `margin`.
        r: radius of the class, at least ‖θ‖_fs; None for ‖θ‖_fs itself on the sample.
        generator: for the noise; None for torch's own.

    Returns:
        The bound, term by term.

    Raises:
        TypeError: If the theory does not apply to the model.
        ValueError: If shapes do not fit, `y` does not hold indices of classes, an argument is out
            of its range, both or neither of `margin` and `margin_grid` are given, `r` is below
            ‖θ‖_fs, or outputs are not finite.

    Example:
        >>> import torch
        >>> net = ReLURNN(2, 3, 2)
        >>> x, y = torch.rand(50, 5, 2), torch.randint(0, 2, (50,))
        >>> report = rnn_bound(net, x, y, margin=0.5)
        >>> report.vacuous, sorted(report.terms)
        (True, ['confidence', 'empirical', 'gradients', 'noise', 'weights'])

    Reference:
        Tu, He, Tao, "Understanding Generalization in Recurrent Neural Networks", ICLR 2020,
        Theorems 2 and 3.
    """
    grid = _margins(margin, margin_grid)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if noise_std is not None and not (math.isfinite(noise_std) and noise_std > 0):
        raise ValueError(f"noise_std must be a positive number or None, got {noise_std}")
    net = ReLURNN.of(model, x)
    inputs = _inputs(net, x)
    classes = len(net.V)
    if classes < 2 or y.shape != (len(inputs),):
        raise ValueError(
            f"y must be ({len(inputs)},) class indices of at least two classes, got shape "
            f"{tuple(y.shape)} and {classes} outputs"
        )
    y = class_indices(y.cpu(), classes, samples=len(inputs))
    smallest = smallest_moment(inputs)
    if noise_std is not None:
        noise = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
        inputs, smallest = inputs + noise_std * noise, smallest + noise_std**2
    norm = _fs_norm(scaling_derivative(net, inputs, linearized=True))
    if r is not None and not r >= norm * (1 - 1e-12):
        raise ValueError(f"r must be at least ‖θ‖_fs = {norm:.6g} on the sample, got {r}")
    common = _Common(net, inputs, y, norm if r is None else r, smallest, noise_std)
    reports = [common.report(a, delta / len(grid)) for a in grid]
    return min(reports, key=lambda report: (report.total, report.log10_weights))


def _margins(margin: float | None, grid: Sequence[float] | None) -> list[float]:
    if (margin is None) == (grid is None):
        raise ValueError("give either margin or margin_grid, not both or neither")
    margins = [margin] if margin is not None else list(grid or ())
    if not margins or not all(math.isfinite(a) and a > 0 for a in margins):
        raise ValueError(f"margins must be positive numbers, at least one, got {margins}")
    return margins


class _Common:
    """What the bounds at all margins share."""

    def __init__(
        self,
        net: ReLURNN,
        x: Tensor,
        y: Tensor,
        r: float,
        lambda_min: float,
        noise_std: float | None,
    ) -> None:
        self.r, self.lambda_min, self.noise_std = r, lambda_min, noise_std
        self.n, self.steps, self.features = x.shape
        self.classes = len(net.V)
        self.norms = matrix_norms(net)
        outputs = net(x)
        if not bool(outputs.isfinite().all()):
            raise ValueError("the outputs of model on x are not finite in float64")
        right = outputs.gather(1, y.unsqueeze(1)).squeeze(1)
        others = outputs.scatter(1, y.unsqueeze(1), -math.inf).amax(1)
        self.sample_margins = right - others
        self.frobenius = x.square().sum().sqrt().item()
        self.largest_feature = x.abs().mean(0).max().item()  # ‖X'‖_1 / n

    def report(self, margin: float, delta: float) -> BoundReport:
        if self.noise_std is None:
            empirical = (self.sample_margins <= margin).double().mean().item()
        else:
            empirical = (1 - self.sample_margins / margin).clamp(0, 1).mean().item()
        log_factor = math.log(4 * self.classes / margin)
        log_product = _log(self.norms.beta_v) + _log(self.norms.beta_u)
        log_weights = log_factor + log_product + _log(self.largest_feature)
        log_weights += log_lambda(self.norms.beta_w, self.steps)
        ratio = self.r * self.frobenius / (2 * self.n)
        gradients = 0.0
        if ratio > 0:
            root = math.sqrt(self.lambda_min)
            gradients = _exp(log_factor) * ratio / root if root > 0 else math.inf
        noise = 0.0
        if self.noise_std is not None:
            size = self.noise_std * math.sqrt(2 * math.log(2 * self.features))
            series = _log_series(self.norms.beta_w, torch.ones(self.steps, dtype=torch.float64))
            noise = _exp(math.log(2 / margin) + log_product + math.log(size) + series)
        return BoundReport(
            empirical=empirical,
            gradients=gradients,
            weights=_exp(log_weights),
            noise=noise,
            confidence=3 * math.sqrt(math.log(2 / delta) / (2 * self.n)),
            margin=margin,
            delta=delta,
            r=self.r,
            lambda_min=self.lambda_min,
            norms=self.norms,
            log10_weights=log_weights / math.log(10),
        )

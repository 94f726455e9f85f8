"""Understanding generalization in recurrent neural networks (Tu, He, Tao, 2020)."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from assay.analysis import (
    InputNoise,
    ReLURNN,
    fisher_rao_norm,
    linearized_output,
    log_lambda,
    matrix_norms,
    rnn_bound,
    scaling_derivative,
    smallest_moment,
)
from assay.data import Batches, Dataset
from assay.functional import evaluate_classifier
from assay.lab import Claim, Lab, Paper, at_least, at_most, between

PAPER = Paper(
    slug="rnn-generalization",
    title="Understanding Generalization in Recurrent Neural Networks",
    authors=("Z. Tu", "F. He", "D. Tao"),
    year=2020,
    url="https://openreview.net/forum?id=rkgg6xBYDH",
    topic="analysis",
    summary=(
        "Norms of the weights and of their gradients for ReLU recurrent nets, and a bound on the "
        "error made of them, term by term; noise on the inputs as a regulariser."
    ),
    components=(
        "assay.analysis.ReLURNN",
        "assay.analysis.matrix_norms",
        "assay.analysis.fisher_rao_norm",
        "assay.analysis.scaling_derivative",
        "assay.analysis.rnn_bound",
        "assay.analysis.InputNoise",
        "assay.analysis.linearized_output",
    ),
)

_TRAINING = "digits as sequences of pixel rows, 150 for training, m = 64, W = 0.9 I at the start"

CLAIMS = (
    Claim(
        "gradient-identity",
        "Weights times gradients of the outputs add up to η(θ) c",
        paper="Lemma 1",
        expect=at_most(1e-10),
        kind="exact",
        how="one forward recursion against the derivative of y(sθ) by autograd; relative, float64",
    ),
    Claim(
        "fisher-rao-identity",
        "The Fisher–Rao norm follows from η c and the gradient of the loss at the outputs",
        paper="Lemma 2",
        expect=at_most(1e-8),
        kind="exact",
        how="against the gradients of each sample (vmap), cross-entropy; relative, float64",
    ),
    Claim(
        "decomposition",
        "The output is its linear part and what the ReLUs cut off",
        paper="V H_L − ψX = Σ V W^{L−i} (H_i − G_i)",
        expect=at_most(1e-10),
        kind="exact",
        how="against dense matrix powers; relative, float64",
    ),
    Claim(
        "lambda-closed-form",
        "Λ has a closed form",
        paper="[(1 − β^L)/(1 − β) − Lβ^L]/(1 − β)",
        expect=at_most(1e-12),
        kind="exact",
        how="against exact rational arithmetic, β from 0 to 8 and 1 ± 1e-6, L to 200; relative",
    ),
    Claim(
        "rademacher-bound",
        "The Rademacher complexity lies below its bound",
        paper="r‖X‖_F λ_min^{−1/2}/(2n) + β_V β_U ‖X'‖_1 Λ / n",
        expect=at_most(1.0),
        kind="exact",
        how="complexity / bound; m = 3, d = 2, L = 3, n = 8; 2000 random nets, all 2⁸ signs",
    ),
    Claim(
        "width-free",
        "The bound does not depend on the number of hidden units",
        expect=at_most(1e-9),
        kind="exact",
        how="each unit doubled with half the outgoing weights: largest relative change of a term",
    ),
    Claim(
        "never-informative",
        "The bounds are above 1 for every net, data set and margin",
        paper="a bound on the probability of an error",
        expect=at_least(1.0),
        kind="exact",
        how=(
            "smallest (total − 3/4 of the term of the weights), with and without noise, nets that "
            "label their own inputs, margins 0.001–1000, and all trained nets below"
        ),
    ),
    Claim(
        "second-term-constant",
        "The term of the weights does not fall with the number of samples",
        paper="O(1/n) in the text",
        expect=between(0.95, 1.05),
        over_seeds="every",
        unit="term at 1000 samples / at 250",
        how="one trained net, digits; also at 500 (table)",
        discussion=(
            "‖X'‖_1 / n is the mean size of the largest feature: it tends to a constant, so the "
            "term is of order 1 in n, not 1/n."
        ),
    ),
    Claim(
        "inputs-are-degenerate",
        "Without noise the bound is infinite on digits",
        paper="λ_min ≈ 4e-4 on IMDB",
        expect=at_most(0.0),
        over_seeds="every",
        unit="λ_min",
        how="smallest eigenvalue of the second moment of 1000 digits: some pixels are constant",
    ),
    Claim(
        "noisy-bound",
        "With noise it is finite and still says nothing",
        over_seeds="every",
        unit="log₁₀ of the bound",
        how=f"{_TRAINING}, σ = 0.2 in training and in the bound, best of margins 0.1–100; reported",
    ),
    Claim(
        "noise-helps",
        "Noise on the inputs lowers the test error where λ_min ≈ 0",
        paper="improves up to σ ≈ 0.3",
        expect=at_most(-0.05),
        unit="clean test error, σ = 0.2 − σ = 0",
        how=f"{_TRAINING}, Adam 2e-3, gradients clipped at 1, 150 epochs",
    ),
    Claim(
        "noise-closes-gap",
        "Noise on the inputs narrows the generalisation gap",
        paper="worst at σ = 0",
        expect=at_most(0.6),
        unit="gap at σ = 0.2 / gap at σ = 0",
        how="gap = clean test error − noisy training error, on the same nets",
    ),
    Claim(
        "noise-too-much",
        "Beyond an optimum more noise hurts",
        paper="the gap rises again",
        unit="clean test error, largest σ − σ = 0.2",
        how="the same nets; the gap itself cannot rise, as the training error has the noise in it",
    ),
    *(
        Claim(
            f"{kind}-lowers-{symbol}",
            f"{name} lowers {what}",
            paper="smaller norms, smaller bound",
            expect=at_most(1.0),
            over_seeds="every",
            unit="ratio to training without",
            how=f"{_TRAINING}; {setting}; sign test: five of five seeds give p = 0.03",
            discussion=discussion,
        )
        for kind, name, setting, discussion in (
            (
                "decay",
                "Weight decay",
                "AdamW with a decay of 0.5 against 0, no clipping",
                "β_W is the largest row sum: it falls in four of five seeds, by some per cent, "
                "while ‖θ‖_fs, which sees all weights, falls to less than half in every one.",
            ),
            (
                "clipping",
                "Clipping of gradients",
                "Adam, gradients clipped at 1 against not at all",
                "β_W comes out larger in most seeds. A likely reason, not tested: Adam divides by "
                "the running size of the gradients, so clipping does not shorten its steps, and "
                "large gradients that are cut weigh less against the later ones.",
            ),
        )
        for symbol, what in (("beta", "β_W"), ("r", "the norm ‖θ‖_fs"))
    ),
    *(
        Claim(
            f"{kind}-gap",
            f"{name} changes the generalisation gap",
            unit="gap with − gap without",
            how="test error − training error of the same nets; reported",
        )
        for kind, name in (("decay", "Weight decay"), ("clipping", "Clipping of gradients"))
    ),
    Claim(
        "imdb-gap",
        "On IMDB reviews the gap is worst without noise",
        paper="σ ∈ {0, 0.1, 0.2, 0.3, 0.4}, L = 100, GloVe-50",
        expect=at_most(0.0),
        kind="paper",
        unit="gap at σ = 0.2 − gap at σ = 0",
        how=(
            "needs IMDB with GloVe vectors, which `assay.data` does not have: `rnn_bound` and "
            "`InputNoise` take any (n, L, d); the paper preset runs rows of MNIST images instead"
        ),
    ),
)


@dataclass(frozen=True)
class Config:
    """Settings; counts of images, units and epochs; noise on pixels in [0, 1]."""

    data: str = "digits"
    train: int = 150
    hidden: int = 64
    identity: float = 0.9
    stds: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    lr: float = 2e-3
    clip: float = 1.0
    weight_decay: float = 0.5
    epochs: int = 150
    batch_size: int = 32
    nets: int = 2000
    vacuous_nets: int = 300


PRESETS = {
    "smoke": Config(stds=(0.0, 0.2, 0.4), epochs=4, nets=200, vacuous_nets=30),
    "small": Config(),
    "paper": Config(data="mnist", train=10_000, hidden=128, epochs=100, batch_size=128),
}
SEEDS = {"smoke": 1, "small": 5, "paper": 5}

SIGMA = 0.2  # the noise that the gates are about
GRID = tuple(10.0**e for e in np.linspace(-1, 2, 7))


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    _identities(lab)
    _lambda(lab)
    _rademacher(lab, config)
    _width_free(lab)
    _vacuous(lab, config)
    test = lab.data(config.data, "test")
    _noise(lab, config, test)
    _regularisers(lab, config, test)


# -- mathematics -----------------------------------------------------------------------------------


def _random_net(lab: Lab, d: int, m: int, k: int, *key: object, scale: float = 1.0) -> ReLURNN:
    with lab.seeded("net", *key):
        net = ReLURNN(d, m, k).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    return net


def _random_sequences(lab: Lab, n: int, steps: int, d: int, *key: object) -> Tensor:
    g = lab.generator("sequences", *key)
    return torch.randn(n, steps, d, generator=g, dtype=torch.float64)


def _forward(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """The net in functional form, for autograd: (..., steps, d) -> (..., k)."""
    u, w, v = weights
    h = x.new_zeros(*x.shape[:-2], len(w))
    for step in x.unbind(-2):
        h = F.relu(step @ u.T + h @ w.T)
    return h @ v.T


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _identities(lab: Lab) -> None:
    for i, (d, m, k, steps) in enumerate([(3, 8, 4, 1), (5, 20, 3, 6), (8, 64, 10, 30)]):
        net, x = _random_net(lab, d, m, k, i, scale=1.2), _random_sequences(lab, 20, steps, d, i)
        weights = tuple(p.detach() for p in (net.U, net.W, net.V))
        one = torch.ones((), dtype=torch.float64)
        derivative = torch.func.jvp(partial(_scaled_forward, weights, x), (one,), (one,))[1]
        lab.measure("gradient-identity", _relative(scaling_derivative(net, x), derivative))

        y = torch.arange(20) % k
        gradients = vmap(grad(_cross_entropy), in_dims=(None, 0, 0))(weights, x, y)
        products = sum((g * w).flatten(1).sum(1) for g, w in zip(gradients, weights, strict=True))
        assert isinstance(products, Tensor)
        norm = products.square().mean().sqrt().item()
        found = fisher_rao_norm(net, x, y, kind="fr")
        lab.measure("fisher-rao-identity", abs(found - norm) / norm)
        lab.measure("decomposition", _decomposition_error(net, weights, x))


def _scaled_forward(weights: tuple[Tensor, ...], x: Tensor, s: Tensor) -> Tensor:
    return _forward(tuple(s * p for p in weights), x)


def _cross_entropy(weights: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(_forward(weights, x), y)


def _decomposition_error(net: ReLURNN, weights: tuple[Tensor, ...], x: Tensor) -> float:
    u, w, v = weights
    steps = x.shape[1]
    h = x.new_zeros(len(x), len(w))
    cut = x.new_zeros(len(x), len(v))
    for t in range(steps):
        g = x[:, t] @ u.T + h @ w.T
        h = g.clamp_min(0)
        cut += (h - g) @ (v @ torch.linalg.matrix_power(w, steps - 1 - t)).T
    linear = linearized_output(net, x)
    return ((h @ v.T - linear - cut).abs().max() / linear.abs().max()).item()


def _lambda(lab: Lab) -> None:
    betas = [Fraction(n, 8) for n in range(65)] + [1 + Fraction(s, 10**6) for s in (-1, 1)]
    for beta, steps in itertools.product(betas, (1, 2, 10, 100, 200)):
        if beta == 1:
            exact = Fraction(steps * (steps + 1), 2)
        else:
            exact = ((1 - beta**steps) / (1 - beta) - steps * beta**steps) / (1 - beta)
        # The floating-point β is exact for the eighths; beside 1 its rounding moves Λ by 1e-14.
        lab.measure(
            "lambda-closed-form", abs(math.exp(log_lambda(float(beta), steps)) / float(exact) - 1)
        )


def _rademacher(lab: Lab, config: Config) -> None:
    n, steps, d, m, k = 8, 3, 2, 3, 2
    for beta_w in (0.5, 1.0, 1.5):
        x = _random_sequences(lab, n, steps, d, "rademacher", beta_w)
        g = lab.generator("balls", beta_w)
        outputs, radii = [], []
        for net in _nets_in_balls(lab, config.nets, (d, m, k), beta_w, g):
            outputs.append(net(x).detach().T)
            radii.append(fisher_rao_norm(net, x))
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
        complexity = (torch.cat(outputs) @ signs.T / n).amax(0).mean().item()
        size, smallest = x.square().sum().sqrt().item(), smallest_moment(x)
        linear = max(radii) * size / (2 * n) / math.sqrt(smallest)
        rest = x.abs().mean(0).max().item() * math.exp(log_lambda(beta_w, steps))
        lab.measure("rademacher-bound", complexity / (linear + rest))


def _nets_in_balls(
    lab: Lab, count: int, sizes: tuple[int, int, int], beta_w: float, g: torch.Generator
) -> Iterator[ReLURNN]:
    """Nets with β_U, β_V ≤ 1 and β_W ≤ beta_w; every other one on the surface."""
    for i in range(count):
        net = _random_net(lab, *sizes, "balls", beta_w, i)
        for p, beta in ((net.U, 1.0), (net.W, beta_w), (net.V, 1.0)):
            share = 1.0 if i % 2 else torch.rand((), generator=g).item()
            p.data.mul_(share * beta / p.data.abs().sum(1).max())
        yield net


def _width_free(lab: Lab) -> None:
    for i in range(5):
        net, x = _random_net(lab, 4, 8, 3, "narrow", i), _random_sequences(lab, 60, 6, 4, "w", i)
        wide = ReLURNN(4, 16, 3).double()
        with torch.no_grad():
            wide.U.copy_(torch.cat([net.U, net.U]))
            wide.W.copy_(torch.cat([torch.cat([net.W, net.W], 1)] * 2) / 2)
            wide.V.copy_(torch.cat([net.V, net.V], 1) / 2)
        y = torch.arange(60) % 3
        one, other = (rnn_bound(model, x, y, margin=1.0).terms for model in (net, wide))
        changes = [abs(other[name] - one[name]) / max(one[name], 1e-300) for name in one]
        lab.measure("width-free", max(changes))


def _vacuous(lab: Lab, config: Config) -> None:
    """Nets that label their own inputs, the easiest task there is; many samples, few steps."""
    lowest = math.inf
    for i in lab.track(range(config.vacuous_nets), "looking for an informative bound"):
        g = lab.generator("vacuous", i)
        scale = 10 ** (2 * torch.rand((), generator=g).item() - 1)
        k, steps = 2 + i % 3, 1 + i % 4
        net = _random_net(lab, 2, 4, k, "vacuous", i, scale=scale)
        if i % 2:  # a net that forgets: β_W = 1/2
            net.W.data.mul_(0.5 / net.W.data.abs().sum(1).max())
        x = _random_sequences(lab, 2000, steps, 2, "vacuous", i)
        y = net(x).argmax(1)
        margin = 10 ** (6 * torch.rand((), generator=g).item() - 3)
        for std in (None, 0.1):
            report = rnn_bound(net, x, y, margin=margin, noise_std=std, generator=g)
            lab.measure("never-informative", report.total - 0.75 * report.weights)
            lowest = min(lowest, report.total)
    lab.note(
        "No choice of net, data or margin makes these bounds informative. With "
        "Q = β_V β_U ‖X'‖_1/n the mean size of an output is at most QΛ, so at most a share kQΛ/a "
        "of the samples has a margin above a, and the first and the last term alone add up to "
        "1 + 3kQΛ/a. The smallest bound found in the search, over nets with β_W = 1/2 too, is "
        f"{lowest:.3f}."
    )


# -- digits ----------------------------------------------------------------------------------------


def _rows(data: Dataset) -> Tensor:
    """Images as sequences of their rows, (n, height, width)."""
    return data.x.squeeze(1)


def _train(
    lab: Lab, config: Config, name: str, train: Dataset, seed: int, *, std: float = 0.0,
    clip: float | None = None, weight_decay: float = 0.0,
) -> nn.Sequential:  # fmt: skip
    """Train one net; the same start and the same batches for every setting of a seed."""
    x = _rows(train)
    with lab.seeded("start", seed):
        net = ReLURNN(x.shape[2], config.hidden, train.num_classes)
    with torch.no_grad():
        nn.init.eye_(net.W).mul_(config.identity)
    model = nn.Sequential(InputNoise(std), net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=weight_decay)
    if clip is not None:

        def shorten(*_: object) -> None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)

        optimizer.register_step_pre_hook(shorten)
    batches = Batches(x, train.y, config.batch_size, generator=lab.generator("batches", seed))
    lab.fit(f"{name}-{seed}", model, optimizer, batches, epochs=config.epochs)
    return model.cpu()


def _error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 1 - evaluate_classifier(model, x, y)["accuracy"]


def _noisy_error(lab: Lab, model: nn.Module, train: Dataset, std: float, seed: int) -> float:
    """Training error with the noise of training, mean of 20 draws."""
    g = lab.generator("evaluation", std, seed)
    x = _rows(train)
    errors = [
        _error(model, x + std * torch.randn(x.shape, generator=g), train.y) for _ in range(20)
    ]
    return float(np.mean(errors))


def _noise(lab: Lab, config: Config, test: Dataset) -> None:
    errors: dict[float, list[float]] = {std: [] for std in config.stds}
    gaps: dict[float, list[float]] = {std: [] for std in config.stds}
    rows, samples = [], []
    for seed in lab.seeds:
        train = lab.data(config.data, "train", limit=config.train, seed=seed)
        many = lab.data(config.data, "train", limit=1000, seed=seed)
        lab.measure("inputs-are-degenerate", smallest_moment(_rows(many)), seed=seed)
        for std in config.stds:
            model = _train(lab, config, f"noise-{std}", train, seed, std=std, clip=config.clip)
            error = _error(model, _rows(test), test.y)
            noisy = _noisy_error(lab, model, train, std, seed)
            errors[std].append(error)
            gaps[std].append(error - noisy)
            bound = rnn_bound(
                model[1], _rows(train), train.y, margin_grid=GRID,
                noise_std=std or None, generator=lab.generator("bound", std, seed),
            )  # fmt: skip
            if math.isfinite(bound.total):
                lab.measure("never-informative", bound.total - 0.75 * bound.weights)
            rows.append(
                {
                    "σ": std, "seed": seed, "test error": error, "noisy training error": noisy,
                    "gap": error - noisy, "β_W": bound.norms.beta_w, "‖θ‖_fs": bound.r,
                    "bound": _shown(bound.total), "dominated by": bound.dominant,
                }
            )  # fmt: skip
            if std == SIGMA:
                lab.measure("noisy-bound", math.log10(bound.total), seed=seed)
                samples += _second_term(lab, model[1], config, seed)
        middle = errors[SIGMA][-1]
        lab.measure("noise-helps", middle - errors[0.0][-1], seed=seed)
        lab.measure("noise-closes-gap", gaps[SIGMA][-1] / gaps[0.0][-1], seed=seed)
        lab.measure("noise-too-much", errors[config.stds[-1]][-1] - middle, seed=seed)
    lab.table("noise", rows, f"{_TRAINING}. The bound without noise is infinite: λ_min = 0.")
    lab.table("second term", samples, "The term of the weights at a margin of 1, one net a seed.")
    _plot_noise(lab, errors, gaps)


def _shown(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "∞"


def _second_term(lab: Lab, net: nn.Module, config: Config, seed: int) -> list[dict]:
    found = {}
    for n in (250, 500, 1000):
        data = lab.data(config.data, "train", limit=n, seed=seed)
        report = rnn_bound(
            net, _rows(data), data.y, margin=1.0, noise_std=SIGMA,
            generator=lab.generator("second term", n, seed),
        )  # fmt: skip
        found[n] = report.weights
    lab.measure("second-term-constant", found[1000] / found[250], seed=seed)
    return [{"seed": seed, "n": n, "term of the weights": term} for n, term in found.items()]


def _plot_noise(lab: Lab, errors: dict[float, list[float]], gaps: dict[float, list[float]]) -> None:
    figure, ax = lab.subplots()
    for label, values in (("clean test error", errors), ("gap", gaps)):
        table = np.array([values[std] for std in values])
        mean = table.mean(axis=1)
        spread = [mean - table.min(axis=1), table.max(axis=1) - mean]
        ax.errorbar(list(values), mean, spread, marker="o", capsize=3, label=label)
    ax.set(xlabel="σ, standard deviation of the noise", ylabel="share of the images")
    ax.legend()
    caption = "Mean and range over the seeds; gap = clean test error − noisy training error."
    lab.figure("noise", figure, caption)


def _regularisers(lab: Lab, config: Config, test: Dataset) -> None:
    settings = {
        "plain": {},
        "decay": {"weight_decay": config.weight_decay},
        "clipping": {"clip": config.clip},
    }
    rows = []
    for seed in lab.seeds:
        train = lab.data(config.data, "train", limit=config.train, seed=seed)
        x = _rows(train)
        found = {}
        for name, options in settings.items():
            model = _train(lab, config, name, train, seed, **options)
            beta, r = matrix_norms(model[1]).beta_w, fisher_rao_norm(model[1], x)
            gap = _error(model, _rows(test), test.y) - _error(model, x, train.y)
            found[name] = {"β_W": beta, "‖θ‖_fs": r, "gap": gap}
            rows.append({"training": name, "seed": seed, **found[name]})
        plain = found["plain"]
        for name in ("decay", "clipping"):
            lab.measure(f"{name}-lowers-beta", found[name]["β_W"] / plain["β_W"], seed=seed)
            lab.measure(f"{name}-lowers-r", found[name]["‖θ‖_fs"] / plain["‖θ‖_fs"], seed=seed)
            lab.measure(f"{name}-gap", found[name]["gap"] - plain["gap"], seed=seed)
    lab.table("regularisers", rows, f"{_TRAINING}, no noise.")

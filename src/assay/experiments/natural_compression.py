"""Natural compression for distributed deep learning (Horváth et al., 2019)."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.data import Batches, random_crop_flip
from assay.distributed import (
    Compose,
    Compressor,
    ErrorFeedback,
    Identity,
    LinkModel,
    NaturalCompressor,
    NaturalDithering,
    RandomDithering,
    SimulatedWorkers,
    StochasticIntegerRounding,
    TopK,
    integer_aggregation,
    natural_round,
)
from assay.functional.training import evaluate_classifier
from assay.kernels import natural
from assay.lab import Claim, Lab, Paper, at_least, at_most, between, close_to
from assay.models import MLP, build

PAPER = Paper(
    slug="natural-compression",
    title="Natural Compression for Distributed Deep Learning",
    authors=("S. Horváth", "C.-Y. Ho", "L. Horváth", "A. N. Sahu", "M. Canini", "P. Richtárik"),
    year=2019,
    url="https://arxiv.org/abs/1905.10988",
    topic="distributed",
    summary=(
        "A DDP communication hook that sends 9 bits per float32 gradient entry both ways, unbiased "
        "and with at most 1/8 more variance, and a family of compressors that compose with it."
    ),
    components=(
        "assay.distributed.NaturalCompressor",
        "assay.distributed.natural_round",
        "assay.distributed.NaturalDithering",
        "assay.distributed.RandomDithering",
        "assay.distributed.Compose",
        "assay.distributed.TopK",
        "assay.distributed.ErrorFeedback",
        "assay.distributed.CompressionState",
        "assay.distributed.two_way_compression_hook",
        "assay.distributed.SimulatedWorkers",
    ),
)

_NETWORK = "data, network and optimiser of the settings; n workers in one process; per seed"

CLAIMS = (
    Claim(
        "unbiased",
        "Natural compression is unbiased",
        paper="E C(x) = x",
        expect=at_most(1e-12),
        kind="exact",
        how="largest |E C(t) − t| / |t|; probabilities found by bisection over the random integers "
        "of the implementation; 10⁴ points in each of 60 binades, subnormal ones included",
    ),
    Claim(
        "unbiased-sampled",
        "Samples of natural compression are unbiased",
        expect=at_most(5.0),
        kind="exact",
        unit="standard errors",
        how="one draw at each point of the same grid; |mean of (C(t) − t)/t| in standard errors",
    ),
    Claim(
        "second-moment",
        "It multiplies the second moment by at most 9/8, reached at |t| = 4/3 · 2^k",
        paper="ω = 1/8",
        expect=close_to(9 / 8, tol=1e-9),
        kind="exact",
        how="largest E C(t)² / t² on the grid, from the same probabilities",
    ),
    Claim(
        "second-moment-sampled",
        "At t = 4/3, the worst case, samples show the second moment of 9/8",
        paper="9/8",
        expect=close_to(9 / 8, tol=0.003),
        kind="exact",
        how="mean of C(4/3)² / (4/3)² over 10⁶ draws",
    ),
    Claim(
        "integer-rounding",
        "Stochastic rounding to integers has no such bound: at t = 10⁻³ the ratio is 1000",
        paper="unbounded as t → 0",
        expect=close_to(1000, tol=80),
        kind="exact",
        how="mean of C(t)² / t² over 4 · 10⁶ draws; 80 is five standard errors",
    ),
    Claim(
        "bits-float32",
        "A float32 entry takes 9 bits",
        paper="3.56 times smaller",
        expect=at_most(9.01),
        kind="exact",
        unit="bits",
        how="bytes of the serialised message of 10⁶ Gaussian floats, header included",
    ),
    Claim(
        "bits-float64",
        "A float64 entry takes 12 bits",
        paper="5.82 times smaller",
        expect=at_most(12.01),
        kind="exact",
        unit="bits",
        how="as above; sign and 11 bits of exponent are 12, which makes 5.33; 5.82 = 64/11 leaves "
        "out the sign",
    ),
    Claim(
        "dithering-bound",
        "Natural dithering keeps its bound on the variance",
        paper="ω = 1/8 + a min(1, a), a = d^(1/min(p, 2)) 2^(1−s)",
        expect=at_most(1.0),
        kind="exact",
        how="largest closed-form variance / ω; Gaussian, one-hot, power-law and equal entries; "
        "d = 10³, 10⁵; s = 4, 8; p = 2, ∞",
    ),
    Claim(
        "dithering-relation",
        "s natural levels have at worst the variance of 2^(s−1) uniform levels plus 1/8",
        paper="same variance with exponentially fewer levels",
        expect=at_most(1e-12),
        kind="exact",
        how="largest natural − uniform − 1/8 on the same vectors",
    ),
    Claim(
        "dithering-s4",
        "With 4 levels natural dithering has far less variance than uniform dithering",
        paper="2^(s−1)/s = 2 times less",
        expect=at_least(0.9 * 2),
        kind="exact",
        how="uniform / natural, both 4 levels, Gaussian d = 1000, p = 2; 0.9 · 2^(s−1)/s asked",
    ),
    Claim(
        "dithering-s8",
        "With 8 levels natural dithering has far less variance still",
        paper="2^(s−1)/s = 16 times less",
        expect=at_least(0.9 * 16),
        kind="exact",
        how="as above",
    ),
    Claim(
        "dithering-easy",
        "for vectors with p = ∞ that is no longer so: the statement is about the worst case",
        how="uniform / natural, both 8 levels, Gaussian d = 1000, p = ∞",
    ),
    Claim(
        "time-natural",
        "Bits times the growth of the second moment: 3.2 times less time to a given accuracy",
        paper="3.2–3.6",
        expect=close_to(32 / 9 / (9 / 8), tol=0.05),
        kind="exact",
        how="32/bits counted/(1 + ω) for d = 10⁶",
    ),
    Claim(
        "time-dithering",
        "Natural dithering: 4.1 times less with levels enough for ω ≈ 1/8",
        paper="4.1–16 (unverified which settings)",
        expect=close_to(4.1, tol=0.1),
        kind="exact",
        how="32 d / (31 + d (2 + log₂ s)) / (1 + ω), s = 32, d = 10⁶; 16 = 32/2 is s = 1, whose "
        "variance is left out",
    ),
    Claim(
        "integer-equal",
        "Adding integers gives the float result bit for bit",
        expect=at_most(0),
        kind="exact",
        unit="entries",
        how="entries that differ, exponents within F of the largest, same random bits; 4 workers",
    ),
    Claim(
        "integer-unbiased",
        "Integer aggregation stays unbiased when exponents lie farther apart",
        expect=at_most(5.0),
        kind="exact",
        unit="standard errors",
        how="mean of 10⁵ draws of a value 1/8 of a unit",
    ),
    Claim(
        "accuracy-gap",
        "Compressing both ways does not change the accuracy",
        paper="no loss on CIFAR-10",
        expect=between(-0.01, 0.01),
        unit="accuracy",
        how=f"natural − none; {_NETWORK}",
    ),
    Claim(
        "loss-gap",
        "Compressing both ways does not change the training loss",
        paper="same convergence",
        unit="nats",
        how="natural − none, mean training loss of the last epoch",
    ),
    Claim(
        "integer-accuracy-gap",
        "Integer aggregation does not change the accuracy",
        paper="for in-network aggregation",
        expect=between(-0.01, 0.01),
        unit="accuracy",
        how=f"natural, integers − none; {_NETWORK}",
    ),
    Claim(
        "topk-gap",
        "Natural compression on top of Top-k keeps the accuracy",
        paper="93.72 → 93.93 % (ResNet-18, CIFAR-10, 0.39 %)",
        expect=at_least(-0.01),
        unit="accuracy",
        how=f"Top-k then natural − Top-k, 1 %, error feedback; {_NETWORK}",
    ),
    Claim(
        "topk-bits",
        "Natural compression on top of Top-k takes 0.62 times the bits of Top-k",
        paper="0.62",
        expect=close_to(41 / 64, tol=0.005),
        kind="exact",
        how="bits the workers sent; (index + 9)/(index + 32) with 32-bit indices is 0.641",
    ),
    Claim(
        "link-time",
        "On a slow link communication takes 32/9 times less",
        paper="3.56 times fewer bits",
        expect=at_least(3.5),
        kind="exact",
        how="time without over with compression by LinkModel on the bits counted, no latency",
    ),
    Claim(
        "wall-clock-resnet110",
        "ResNet-110 trains faster",
        paper="−26 % time (CIFAR-10)",
        expect=at_most(0.0),
        kind="paper",
        unit="relative",
        how="measured gradient and compression time of a step plus LinkModel's ring all-reduce",
    ),
    Claim(
        "wall-clock-alexnet",
        "AlexNet, with more parameters for its work, trains much faster",
        paper="−66 % time (CIFAR-10)",
        expect=at_most(0.0),
        kind="paper",
        unit="relative",
        how="as above",
    ),
)


@dataclass(frozen=True)
class Config:
    """Every knob.

    Attributes:
        points: grid points a binade.
        binades: number of binades, spread over the float32 range.
        long: entries of the longest vectors for dithering.
        data: data set.
        network: "mlp" (784-128-10 for MNIST), "alexnet" or a name of `assay.models`.
        workers: simulated workers.
        batch_size: examples a worker and step.
        lr: initial learning rate, cosine to zero.
        momentum: of SGD.
        weight_decay: of SGD.
        epochs: of each run.
        augment: random crops and flips.
        density: share of entries that Top-k sends.
        bandwidth: of the link, bits a second.
        timed: networks whose steps are timed.
    """

    points: int = 10_000
    binades: int = 60
    long: int = 100_000
    data: str = "mnist5k"
    network: str = "mlp"
    workers: int = 4
    batch_size: int = 32
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 30
    augment: bool = False
    density: float = 0.01
    bandwidth: float = 1e9
    timed: tuple[str, ...] = ()


PRESETS = {
    "smoke": Config(points=200, long=2_000, epochs=1),
    "small": Config(),
    "paper": Config(
        data="cifar10",
        network="resnet110",
        workers=8,
        weight_decay=1e-4,
        epochs=200,
        augment=True,
        density=0.0039,
        bandwidth=1e10,
        timed=("resnet110", "alexnet"),
    ),
}
SEEDS = {"smoke": 1, "small": 5, "paper": 3}

NATURAL = NaturalCompressor()


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    measure_rounding(lab, config)
    measure_messages(lab)
    measure_dithering(lab, config)
    measure_theoretical_time(lab)
    measure_integers(lab)
    compare_training(lab, config)
    measure_wall_clock(lab, config)
    lab.note(
        "Workers are simulated in one process with real messages; the DDP hook exchanges the same "
        "ones. Between processes of one machine the hook gains no time: memory is faster than "
        "compression. It pays on a link slower than about 32 bits an entry in the time that "
        "compressing one takes, which is why times here are those of a modelled link."
    )


# -- rounding ------------------------------------------------------------------------------------


def measure_rounding(lab: Lab, config: Config) -> None:
    """Mean and second moment from the implementation's own probabilities, and from samples."""
    # Float32 values on an even grid in each binade, with 4/3 2^k, where the ratio is largest.
    exponents = torch.linspace(-148, 126, config.binades).round().double()
    steps = torch.arange(config.points, dtype=torch.float64) / config.points
    fractions = torch.cat([1 + steps, torch.tensor([4 / 3], dtype=torch.float64)])
    t = (torch.exp2(exponents)[:, None] * fractions).float()
    lower = torch.exp2(torch.frexp(t.double()).exponent.double() - 1)
    up = probability_up(t)
    # In units of `lower`: float64 holds every quantity, and tiny values do not vanish when squared.
    ratio = t.double() / lower
    lab.measure("unbiased", ((1 + up - ratio) / ratio).abs().max())
    moment = (1 + 3 * up) / ratio.square()
    lab.measure("second-moment", moment.max())

    drawn = natural_round(t, lab.generator("grid")).double() / lower
    error = (drawn - ratio) / ratio
    spread = (up * (1 - up) / ratio.square()).sum().sqrt()
    lab.measure("unbiased-sampled", (error.sum() / spread).abs())
    draws = torch.full((1_000_000,), 4 / 3, dtype=torch.float64)
    squares = natural_round(draws, lab.generator("four thirds")).square()
    lab.measure("second-moment-sampled", squares.mean() / (16 / 9))

    small = torch.full((4_000_000,), 1e-3, dtype=torch.float64)
    rounding = StochasticIntegerRounding()
    integers = rounding.decompress(rounding.compress(small, generator=lab.generator("integers")))
    lab.measure("integer-rounding", integers.square().mean() / 1e-6)

    figure, axes = lab.subplots()
    row = len(exponents) // 2
    axes.plot(ratio[row, :-1], moment[row, :-1], label="from the implementation")
    axes.axhline(9 / 8, ls="--", color="grey", label="9/8")
    axes.set(xlabel="t / 2^k", ylabel="E C(t)² / t²")
    axes.legend()
    lab.figure("second moment", figure, "Growth of the second moment within one binade.")


def probability_up(t: Tensor) -> Tensor:
    """Probability that a float32 entry rounds up: the share of the 2²³ random integers that do it.

    More of the random integer never turns up into down, so bisection finds the smallest that
    rounds up.
    """
    low = torch.zeros(t.shape, dtype=torch.int64)
    high = torch.full_like(low, 1 << 23)
    down = natural.natural_round_reference(t, low, natural.largest_code(t.dtype))
    while bool((low < high).any()):
        middle = (low + high) // 2
        inside = middle.clamp(max=(1 << 23) - 1)
        rounded = natural.natural_round_reference(t, inside, natural.largest_code(t.dtype))
        ups = rounded > down
        high = torch.where(ups, middle, high)
        low = torch.where(ups | (low >= high), low, middle + 1)
    return 1 - low.double() / (1 << 23)


# -- messages and dithering ----------------------------------------------------------------------


def measure_messages(lab: Lab) -> None:
    """Real bytes of messages."""
    x = torch.randn(1_000_000, generator=lab.generator("message"))
    for dtype in (torch.float32, torch.float64):
        message = NATURAL.compress(x.to(dtype), generator=lab.generator("bits")).to_bytes()
        lab.measure(f"bits-{str(dtype).removeprefix('torch.')}", 8 * len(message) / len(x))


def vectors(lab: Lab, d: int) -> dict[str, Tensor]:
    """Return the vectors on which dithering is judged."""
    one_hot = torch.zeros(d, dtype=torch.float64)
    one_hot[0] = 1.0
    return {
        "Gaussian": torch.randn(d, generator=lab.generator("vector", d), dtype=torch.float64),
        "one-hot": one_hot,
        "power law": torch.arange(1, d + 1, dtype=torch.float64).pow(-1.0),
        # One large entry and equal small ones, at half of the lowest interval of 8 levels.
        "worst": torch.cat([torch.ones(1), torch.full((d - 1,), 2.0**-8)]).double(),
        "equal": torch.ones(d, dtype=torch.float64),
    }


def measure_dithering(lab: Lab, config: Config) -> None:
    """Closed-form variances of natural and uniform dithering."""
    rows = []
    for d in (1_000, config.long):
        for name, x in vectors(lab, d).items():
            for p in (2.0, math.inf):
                for s in (4, 8):
                    dithering, same = NaturalDithering(s, p), RandomDithering(s, p)
                    variance, uniform = float(dithering.variance(x)), float(same.variance(x))
                    finer = float(RandomDithering(2 ** (s - 1), p).variance(x))
                    lab.measure("dithering-bound", variance / dithering.omega(d))
                    lab.measure("dithering-relation", variance - finer - 1 / 8)
                    key = (d, name, p, s)
                    rows.append(
                        {
                            "vector": name,
                            "d": d,
                            "p": "∞" if math.isinf(p) else f"{p:g}",
                            "s": s,
                            "natural": variance,
                            "bound": dithering.omega(d),
                            "uniform, s levels": uniform,
                            "uniform, 2^(s−1) levels": finer,
                        }
                    )
                    if key == (1_000, "Gaussian", 2.0, s):
                        lab.measure(f"dithering-s{s}", uniform / variance)
                    if key == (1_000, "Gaussian", math.inf, 8):
                        lab.measure("dithering-easy", uniform / variance)
    lab.table("dithering", rows, "Relative variance E‖C(x) − x‖² / ‖x‖², in closed form.")

    x = vectors(lab, 1_000)["Gaussian"]
    figure, axes = lab.subplots()
    for kind, label in ((NaturalDithering, "natural"), (RandomDithering, "uniform")):
        for p, style in ((2.0, "-"), (math.inf, "--")):
            levels = range(1, 17)
            variances = [float(kind(s, p).variance(x)) for s in levels]
            axes.semilogy(levels, variances, style, label=f"{label}, p = {p:g}")
    axes.axhline(1 / 8, ls=":", color="grey")
    axes.set(xlabel="levels", ylabel="relative variance")
    axes.legend()
    lab.figure("dithering", figure, "A Gaussian vector of 1000 entries; dotted: 1/8.")


def measure_theoretical_time(lab: Lab) -> None:
    """Bits of a message times 1 + ω, against float32, from the counts and formulas."""
    d, density = 1_000_000, 0.01
    q, index = int(density * d), math.log2(d)
    natural_bits = 8 * NATURAL.compress(torch.ones(d)).nbytes
    s = 32
    dithering_bits = 31 + d * (2 + math.log2(s))
    formulas = (
        ("none", 32 * d, 0.0),
        ("natural", natural_bits, NATURAL.omega(d)),
        ("random sparsifier, 1 %", (33 + index) * q, d / q - 1),
        ("natural on random sparsifier", (10 + index) * q, 9 / 8 * d / q - 1),
        (f"uniform dithering, {2 ** (s - 1):,} levels", 31 + d * (2 + s), None),
        (f"natural dithering, {s} levels", dithering_bits, NaturalDithering(s).omega(d)),
    )
    rows = []
    for method, bits, omega in formulas:
        fewer = 32 * d / bits
        time_ = None if omega is None else fewer / (1 + omega)
        rows.append({"method": method, "bits": bits, "fewer bits": fewer, "less time": time_})
    lab.measure("time-natural", 32 * d / natural_bits / (1 + NATURAL.omega(d)))
    lab.measure("time-dithering", 32 * d / dithering_bits / (1 + NaturalDithering(s).omega(d)))
    lab.table("bits", rows, "The paper's formulas for d = 10⁶; less time = fewer bits / (1 + ω).")


# -- integer aggregation -------------------------------------------------------------------------


def measure_integers(lab: Lab) -> None:
    """Sums of integers against sums of floats with the same random bits."""
    workers, n, generator = 4, 100_000, lab.generator("integer aggregation")
    spread = integer_aggregation.fraction_bits(workers)
    exponents = -torch.randint(0, spread + 1, (workers, n), generator=generator)
    exponents[0, 0] = 0
    signs = torch.randint(0, 2, (workers, n), generator=generator) * 2.0 - 1
    rows = torch.ldexp(signs.double(), exponents)
    coded = [integer_aggregation.to_integers(row, 0, workers) for row in rows]
    total = torch.stack(coded).sum(0, dtype=torch.int32)
    ours = integer_aggregation.from_integers(total, 0, workers, torch.float64, seed=1)
    lab.measure("integer-equal", (ours != natural.natural_round(rows.sum(0), 1)).sum())

    small = torch.full((n,), 2.0 ** -(spread + 3), dtype=torch.float64)
    few = integer_aggregation.to_integers(small, 0, workers, generator)
    error = few.double().mean() - 1 / 8
    lab.measure("integer-unbiased", error.abs() / math.sqrt(1 / 8 * 7 / 8 / n))


# -- training ------------------------------------------------------------------------------------


def methods(config: Config) -> dict[str, tuple[Compressor, Compressor]]:
    """Compressors of workers and master by name."""
    topk = TopK(config.density)
    return {
        "none": (Identity(), Identity()),
        "natural": (NATURAL, NATURAL),
        "natural, integers": (NaturalCompressor(integer=True), NATURAL),
        "top-k": (ErrorFeedback(topk), Identity()),
        "top-k, natural": (ErrorFeedback(Compose(NATURAL, topk)), Identity()),
    }


def make_network(name: str, channels: int) -> nn.Module:
    """Return a new network for ten classes."""
    if name == "mlp":
        return MLP([784, 128, 10])
    if name == "alexnet":
        return alexnet(channels)
    return build(name, in_channels=channels)


def alexnet(channels: int) -> nn.Module:
    """Return AlexNet for images of 32 × 32 pixels."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride, pool in (
        (channels, 64, 2, True),
        (64, 192, 1, True),
        (192, 384, 1, False),
        (384, 256, 1, False),
        (256, 256, 1, True),
    ):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    layers += [nn.Flatten(), nn.Linear(256 * 2 * 2, 4096), nn.ReLU()]
    layers += [nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)]
    return nn.Sequential(*layers)


def train(lab: Lab, config: Config, name: str, seed: int) -> dict:
    """Train one method from one seed; its curves and the bits it sent."""
    data, held_out = lab.data(config.data, "train"), lab.data(config.data, "test")
    with lab.seeded("network", seed):
        model = make_network(config.network, data.x.shape[1]).to(lab.device)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    worker, master = methods(config)[name]
    group = SimulatedWorkers(
        model,
        F.cross_entropy,
        config.workers,
        worker=worker,
        master=master,
        generator=lab.generator("compression", name, seed),
    )
    batches = Batches(
        data.x.to(lab.device),
        data.y.to(lab.device),
        config.workers * config.batch_size,
        generator=lab.generator("batches", seed),
        drop_last=True,
        transform=random_crop_flip() if config.augment else None,
    )
    losses, accuracies = [], []
    for _ in lab.track(range(config.epochs), f"{name}, seed {seed}"):
        model.train()
        total = 0.0
        for x, y in batches:
            total += float(group.backward(*group.shard(x, y)).mean())
            optimizer.step()
        schedule.step()
        losses.append(total / len(batches))
        test = evaluate_classifier(model, held_out.x.to(lab.device), held_out.y.to(lab.device))
        accuracies.append(test["accuracy"])
    return {
        "loss": losses,
        "accuracy": accuracies,
        "bits_up": group.bits_up,
        "bits_down": group.bits_down,
        "steps": config.epochs * len(batches),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def compare_training(lab: Lab, config: Config) -> None:
    """Train every method from every seed."""
    names = tuple(methods(config))
    results: dict[str, list[dict]] = {name: [] for name in names}
    for seed in lab.seeds:
        for name in names:
            result = lab.stage(f"{name}-{seed}", lambda n=name, s=seed: train(lab, config, n, s))
            results[name].append(result)
            for epoch, loss in enumerate(result["loss"], 1):
                lab.log(f"{name}-{seed}", epoch, loss=loss, accuracy=result["accuracy"][epoch - 1])
        last = {name: results[name][-1] for name in names}
        accuracy = {name: last[name]["accuracy"][-1] for name in names}
        lab.measure("accuracy-gap", accuracy["natural"] - accuracy["none"], seed=seed)
        lab.measure("loss-gap", last["natural"]["loss"][-1] - last["none"]["loss"][-1], seed=seed)
        gap = accuracy["natural, integers"] - accuracy["none"]
        lab.measure("integer-accuracy-gap", gap, seed=seed)
        lab.measure("topk-gap", accuracy["top-k, natural"] - accuracy["top-k"], seed=seed)
    last = {name: results[name][-1] for name in names}
    lab.measure("topk-bits", last["top-k, natural"]["bits_up"] / last["top-k"]["bits_up"])
    link = LinkModel(config.bandwidth)
    seconds = {name: link.seconds(step_bits(r, config.workers)) for name, r in last.items()}
    lab.measure("link-time", seconds["none"] / seconds["natural"])
    rows = []
    for name in names:
        accuracies = torch.tensor([r["accuracy"][-1] for r in results[name]])
        bits = step_bits(last[name], config.workers)
        rows.append(
            {
                "method": name,
                "accuracy": float(accuracies.mean()),
                "lowest": float(accuracies.min()),
                "highest": float(accuracies.max()),
                "bits an entry, up": last[name]["bits_up"] / entries(last[name], config.workers),
                "bits an entry, down": last[name]["bits_down"] / entries(last[name], 1),
                "link, ms a step": 1e3 * seconds[name],
                "bits, relative": bits / step_bits(last["none"], config.workers),
            }
        )
    lab.table(
        "training",
        rows,
        f"{config.workers} workers; link of {config.bandwidth / 1e9:g} Gb/s, one worker's upload "
        "and the broadcast. Integers are 32 bits wide: a switch, not the link, gains from them.",
    )
    draw_training(lab, config, results)


def entries(result: dict, copies: int) -> int:
    """Gradient entries of a whole run, times `copies`."""
    return result["parameters"] * result["steps"] * copies


def step_bits(result: dict, workers: int) -> float:
    """Bits that one worker sends and receives in a step."""
    return (result["bits_up"] / workers + result["bits_down"]) / result["steps"]


def draw_training(lab: Lab, config: Config, results: dict[str, list[dict]]) -> None:
    """Draw accuracy by epoch and by bits."""
    figure, (left, right) = lab.subplots(1, 2, width=9.0, sharey=True)
    epochs = torch.arange(1, config.epochs + 1)
    for name, runs in results.items():
        accuracy = torch.tensor([r["accuracy"] for r in runs]).mean(0)
        per_epoch = step_bits(runs[-1], config.workers) * runs[-1]["steps"] / config.epochs
        left.plot(epochs, accuracy, label=name)
        right.semilogx(epochs * per_epoch / 1e6, accuracy, label=name)
    left.set(xlabel="epoch", ylabel="test accuracy")
    right.set(xlabel="Mbit that a worker sent and received")
    left.legend()
    lab.figure("training", figure, "Test accuracy, mean over seeds.")


# -- wall clock ----------------------------------------------------------------------------------


def measure_wall_clock(lab: Lab, config: Config) -> None:
    """Time of a step with and without compression, the network modelled."""
    link = LinkModel(config.bandwidth, latency=50e-6)
    rows = []
    for name in config.timed:
        with lab.seeded("timed", name):
            model = make_network(name, 3).to(lab.device)
            x = torch.randn(config.batch_size, 3, 32, 32, device=lab.device)
        y = torch.zeros(config.batch_size, dtype=torch.int64, device=lab.device)
        d = sum(p.numel() for p in model.parameters())

        def step(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> None:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

        gradient = torch.randn(d, device=lab.device)
        compute = seconds_of(step, lab.device)
        coding = 2 * seconds_of(lambda g=gradient: through(NATURAL, g), lab.device)
        plain = compute + link.all_reduce(32 * d, config.workers)
        compressed = compute + coding + link.all_reduce(9 * d, config.workers)
        change = compressed / plain - 1
        lab.measure(f"wall-clock-{name}", change)
        rows.append(
            {"network": name, "parameters": d, "gradient, s": compute, "coding, s": coding}
            | {"step, s": plain, "compressed, s": compressed, "change": change}
        )
    if rows:
        lab.table("wall clock", rows, f"{config.workers} workers, {config.bandwidth / 1e9:g} Gb/s.")


def through(compressor: Compressor, x: Tensor) -> Tensor:
    """Compress and decompress."""
    return compressor.decompress(compressor.compress(x))


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median time of a call after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]

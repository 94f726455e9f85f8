"""BackPACK: packing more into backprop (Dangel, Kunstner, Hennig, 2020)."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from assay.curvature import KroneckerFactors, compute
from assay.data import Batches, Dataset
from assay.functional import GGNOperator, HessianOperator
from assay.lab import Claim, Lab, Paper, UsageError, at_most
from assay.lab.usage import unknown
from assay.models import MLP, AllCNNC, ThreeConvThreeDense, TwoConvTwoDense
from assay.optim import KFAC, DiagGGN

PAPER = Paper(
    slug="backpack",
    title="BackPACK: Packing more into Backprop",
    authors=("F. Dangel", "F. Kunstner", "P. Hennig"),
    year=2020,
    url="https://arxiv.org/abs/1912.10985",
    topic="curvature",
    summary=(
        "Individual gradients, their norms and variance, and diagonal or Kronecker curvature of "
        "any model in nearly one backward pass, and optimizers that use them."
    ),
    components=(
        "assay.curvature.compute",
        "assay.curvature.extend",
        "assay.curvature.KroneckerFactors",
        "assay.curvature.all_reduce_quantities",
        "assay.optim.DiagGGN",
        "assay.optim.KFAC",
    ),
)

CLAIMS = (
    Claim(
        "individual-gradients",
        "Individual gradients, norms, second moment and variance are those of a loop over samples",
        expect=at_most(1e-10),
        kind="exact",
        unit="relative error",
        how=(
            "largest over an MLP, a grouped, strided, dilated convolution with BatchNorm, a "
            "residual net, LayerNorm, an LSTM and a tied transformer; float64"
        ),
    ),
    Claim(
        "individual-gradients-float32",
        "Individual gradients and their moments are those of the loop in single precision, too",
        expect=at_most(1e-5),
        kind="exact",
        unit="relative error",
        how="the same in float32, against the loop in float64",
    ),
    Claim(
        "ggn-diagonal",
        "The exact GGN diagonal is that of the dense Gauss-Newton matrix",
        expect=at_most(1e-10),
        kind="exact",
        unit="relative error",
        how="the same models, one product of the dense matrix a parameter",
    ),
    Claim(
        "kflr-one-sample",
        "KFLR is the exact block for a single sample",
        expect=at_most(1e-10),
        kind="exact",
        unit="relative error",
        how="blocks of the dense matrix for N = 1, tanh MLP",
    ),
    Claim(
        "kflr-linear-network",
        "KFLR is the exact block for a deep linear network with squared error",
        expect=at_most(1e-10),
        kind="exact",
        unit="relative error",
        how="blocks of the dense matrix for N = 8",
    ),
    Claim(
        "kfra-one-sample",
        "KFRA is KFLR for a single sample",
        expect=at_most(1e-10),
        kind="exact",
        unit="relative error",
        how="dense blocks, N = 1, tanh MLP",
    ),
    Claim(
        "monte-carlo-unbiased",
        "The Monte-Carlo GGN diagonal is unbiased",
        expect=at_most(4.0),
        kind="exact",
        unit="standard errors",
        how=(
            "largest deviation of the mean of 20,000 draws from the exact diagonal, the 21 "
            "parameters of a tanh MLP"
        ),
    ),
    Claim(
        "hessian-diagonal",
        "The Hessian diagonal is that of the dense Hessian",
        expect=at_most(1e-10),
        kind="exact",
        unit="relative error",
        how="tanh MLP and residual net with BatchNorm",
    ),
    Claim(
        "hessian-relu",
        "For piecewise linear networks the Hessian diagonal is the GGN diagonal",
        expect=at_most(1e-10),
        kind="exact",
        unit="relative error",
        how="ReLU MLP",
    ),
    Claim(
        "together",
        "Several quantities in one call cost less than one call each",
        paper="shared backward pass",
        expect=at_most(1.0),
        over_seeds="median",
        how=(
            "time of the four first-order quantities together / sum of their times alone, larger "
            "of MLP and 3C3D; medians of alternating calls"
        ),
        unit="ratio",
    ),
    Claim(
        "kfac-progress",
        "KFAC makes more progress in a step than SGD with momentum",
        paper="fewer steps on the DeepOBS problems",
        expect=at_most(0.0),
        unit="nats",
        how=(
            "training loss after the same steps, KFAC − tuned SGD with momentum; each at the best "
            "grid point of a run apart"
        ),
        discussion=(
            "With three seeds a t interval is wide: look at the values, and at the table, which "
            "has the seconds too. A step of KFAC costs several of SGD, so that at equal time the "
            "comparison can turn round."
        ),
    ),
    Claim(
        "diagonal-progress",
        "The diagonal GGN against SGD with momentum",
        paper="no clear win",
        expect=None,
        unit="nats",
        how="the same difference for DiagGGN with one draw",
    ),
    *(
        Claim(
            f"deepobs-{name}",
            f"{what}: KFAC reaches a lower training loss than tuned SGD with momentum",
            paper="lower loss at equal epochs",
            expect=at_most(0.0),
            kind="paper",
            unit="nats",
            how="training loss after DeepOBS's number of epochs, KFAC − SGD, ten seeds; each at "
            "the best grid point of a run apart",
        )
        for name, what in (
            ("logreg-mnist", "Logistic regression on MNIST"),
            ("2c2d-fashion-mnist", "2C2D on Fashion-MNIST"),
            ("3c3d-cifar10", "3C3D on CIFAR-10"),
            ("all-cnn-c-cifar100", "All-CNN-C on CIFAR-100"),
        )
    ),
)


@dataclass(frozen=True)
class Config:
    """Every knob.

    Args:
        problems: of the optimizers' comparison, names in `PROBLEMS`.
        train_size: training images, a stratified subset; 0 is all of them.
        epochs: of training; 0 for the problem's own number.
        lrs: learning rates of every grid.
        dampings: of the curvature optimizers.
        draws: Monte-Carlo draws for the unbiasedness.
        mlp_batch: images of the MLP whose overheads are measured.
        conv_batch: images of 3C3D.
        repeats: timed calls a quantity.
    """

    problems: tuple[str, ...] = ("mlp-fashion-mnist",)
    train_size: int = 6000
    epochs: int = 1
    lrs: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    dampings: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    draws: int = 20_000
    mlp_batch: int = 128
    conv_batch: int = 32
    repeats: int = 7


PRESETS = {
    "smoke": Config(
        problems=("mlp-mnist5k",),
        train_size=500,
        lrs=(1e-2, 1e-1, 1.0),
        dampings=(1e-1,),
        mlp_batch=16,
        conv_batch=2,
        repeats=3,
    ),
    "small": Config(),
    "paper": Config(
        problems=(
            "logreg-mnist",
            "2c2d-fashion-mnist",
            "3c3d-cifar10",
            "all-cnn-c-cifar100",
        ),
        train_size=0,
        epochs=0,
        dampings=(1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
        repeats=21,
    ),
}
SEEDS = {"smoke": 1, "small": 3, "paper": 10}


@dataclass(frozen=True)
class Problem:
    """Data, network and protocol that optimizers are compared on.

    Args:
        data: name of the data set.
        build: from the data set to the network.
        batch_size: images a step.
        epochs: of training.
        l2: weight of half the squared norm of the weights in the loss.
        exact: whether the exact factors (KFLR) are affordable: not for 100 classes.
    """

    data: str
    build: Callable[[Dataset], nn.Module]
    batch_size: int = 128
    epochs: int = 100
    l2: float = 0.0
    exact: bool = True


def logistic_regression(train: Dataset) -> nn.Module:
    """One linear layer, begun at zero as DeepOBS does."""
    layer = nn.Linear(train.x[0].numel(), train.num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), layer)


def mlp(*hidden: int) -> Callable[[Dataset], nn.Module]:
    """A ReLU MLP of these widths."""
    return lambda train: MLP((train.x[0].numel(), *hidden, train.num_classes))


# The last four are DeepOBS's, with its batch sizes, epochs and penalties.
PROBLEMS = {
    "mlp-mnist5k": Problem("mnist5k", mlp(32)),
    "mlp-fashion-mnist": Problem("fashion-mnist", mlp(100, 100)),
    "logreg-mnist": Problem("mnist", logistic_regression, epochs=50),
    "2c2d-fashion-mnist": Problem(
        "fashion-mnist", lambda train: TwoConvTwoDense(train.num_classes, train.x.shape[1])
    ),
    "3c3d-cifar10": Problem(
        "cifar10",
        lambda train: ThreeConvThreeDense(train.num_classes, train.x.shape[1]),
        l2=2e-3,
    ),
    "all-cnn-c-cifar100": Problem(
        "cifar100",
        lambda train: AllCNNC(train.num_classes, train.x.shape[1], dropout=False),
        batch_size=256,
        epochs=350,
        l2=5e-4,
        exact=False,
    ),
}

FIRST_ORDER = ("grad_batch", "batch_l2", "second_moment", "variance")
OVERHEADS = (
    ("individual gradients", ("grad_batch",)),
    ("norms", ("batch_l2",)),
    ("second moment", ("second_moment",)),
    ("variance", ("variance",)),
    ("all four", FIRST_ORDER),
    ("GGN diagonal, one draw", ("diag_ggn_mc",)),
    ("KFAC", ("kfac",)),
    ("GGN diagonal", ("diag_ggn",)),
    ("KFLR", ("kflr",)),
    ("GGN diagonal and KFLR", ("diag_ggn", "kflr")),
)


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    exactness(lab, config)
    overheads(lab, config)
    optimizers(lab, config)


# -- exactness -----------------------------------------------------------------------------------


class Residual(nn.Module):
    """A small residual net with BatchNorm and adaptive pooling."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.body = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, 4)`."""
        h = self.norm(self.stem(x)).tanh()
        h = h + self.body(h).sigmoid()
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class Recurrent(nn.Module):
    """An LSTM and a linear map of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, 4)`."""
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """A transformer layer between an embedding and itself, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.out = nn.Linear(4, 4, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(N, 4)`."""
        return self.out(self.layer(self.embed(tokens)).mean(1))


def tanh_mlp() -> nn.Module:
    """the 21 parameters of a tanh MLP and a second derivative."""
    return MLP((2, 3, 3), activation="tanh")


def models(lab: Lab) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Six kinds of models in float64 with four samples each."""
    built: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "MLP": (lambda: MLP((5, 6, 4), activation="tanh"), (4, 5)),
        "convolutions": (
            lambda: nn.Sequential(
                nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2, padding=1),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(54, 4),
            ),
            (4, 4, 8, 8),
        ),
        "residual net": (Residual, (4, 2, 5, 5)),
        "LayerNorm": (
            lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4)),
            (4, 5),
        ),
        "LSTM": (Recurrent, (4, 5, 3)),
        "tied transformer": (Tied, ()),
    }
    for name, (build, shape) in built.items():
        with lab.seeded("model", name):
            model = build().double().eval()
            x = torch.randn(shape).double() if shape else torch.randint(4, (4, 5))
            yield name, model, x, torch.randint(4, (4,))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest error over the largest entry."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((found.to(expected.dtype) - expected).abs().max() / scale)


def loop(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, dict[str, Tensor]]:
    """First-order quantities from one backward pass a sample."""
    params = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for name, g in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            rows[name].append(g)
    stacked = {name: torch.stack(row) for name, row in rows.items()}
    return {
        "grad_batch": stacked,
        "batch_l2": {k: g.flatten(1).square().sum(1) for k, g in stacked.items()},
        "second_moment": {k: g.square().mean(0) for k, g in stacked.items()},
        "variance": {k: g.var(0, correction=0) for k, g in stacked.items()},
    }


def exactness(lab: Lab, config: Config) -> None:
    """The claims that are mathematics."""
    loss_fn = nn.CrossEntropyLoss()
    rows = []
    for name, model, x, y in models(lab):
        expected = loop(model, x, y)
        found = compute(model, loss_fn, x, y, FIRST_ORDER)
        double = worst(found, expected)
        lab.measure("individual-gradients", double)
        ggn = GGNOperator(model, loss_fn, (x, y)).to_dense().diagonal()
        diagonal = compute(model, loss_fn, x, y, ["diag_ggn"])["diag_ggn"]
        ggn_error = relative_error(torch.cat([v.flatten() for v in diagonal.values()]), ggn)
        lab.measure("ggn-diagonal", ggn_error)
        if name in ("MLP", "residual net"):
            hessian = HessianOperator(model, loss_fn, (x, y)).to_dense().diagonal()
            exact = compute(model, loss_fn, x, y, ["diag_hessian"])["diag_hessian"]
            together = torch.cat([v.flatten() for v in exact.values()])
            lab.measure("hessian-diagonal", relative_error(together, hessian))
        single = compute(
            model.float(), loss_fn, x.float() if x.is_floating_point() else x, y, FIRST_ORDER
        )
        float_error = worst(single, expected)
        lab.measure("individual-gradients-float32", float_error)
        rows.append(
            {"model": name, "float64": double, "float32": float_error, "GGN diagonal": ggn_error}
        )
    lab.table("errors", rows, caption="Largest relative errors of first-order quantities and GGN")
    kronecker(lab)
    monte_carlo(lab, config)
    with lab.seeded("relu"):
        net, x, y = MLP((5, 6, 4)).double(), torch.randn(4, 5).double(), torch.randint(4, (4,))
    both = compute(net, loss_fn, x, y, ["diag_hessian", "diag_ggn"])
    for name, ggn in both["diag_ggn"].items():
        lab.measure("hessian-relu", relative_error(both["diag_hessian"][name], ggn))


def worst(found: dict[str, dict], expected: dict[str, dict[str, Tensor]]) -> float:
    """Largest relative error over quantities and parameters."""
    return max(
        relative_error(found[quantity][name], value)
        for quantity, entries in expected.items()
        for name, value in entries.items()
    )


def kronecker(lab: Lab) -> None:
    """When Kronecker factors are the block itself."""
    with lab.seeded("kronecker"):
        mlp = MLP((4, 5, 3), activation="tanh").double()
        linear = MLP((4, 5, 2), activation="identity").double()
        x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
        target = torch.randn(8, 2).double()
    one = compute(mlp, nn.CrossEntropyLoss(), x[:1], y[:1], ["kflr", "kfra"])
    expected = blocks(mlp, nn.CrossEntropyLoss(), x[:1], y[:1])
    many = compute(linear, nn.MSELoss(), x, target, ["kflr"])["kflr"]
    expected_many = blocks(linear, nn.MSELoss(), x, target)
    for name, block in expected.items():
        kflr: KroneckerFactors = one["kflr"][name]
        lab.measure("kflr-one-sample", relative_error(kflr.to_dense(), block))
        kfra = one["kfra"][name].to_dense()
        lab.measure("kfra-one-sample", relative_error(kfra, kflr.to_dense()))
        dense = many[name].to_dense()
        lab.measure("kflr-linear-network", relative_error(dense, expected_many[name]))


def blocks(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The diagonal blocks of the dense Gauss-Newton matrix."""
    dense = GGNOperator(model, loss_fn, (x, y)).to_dense()
    found, start = {}, 0
    for name, p in model.named_parameters():
        found[name] = dense[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
    return found


def monte_carlo(lab: Lab, config: Config) -> None:
    """The mean of many draws, in standard errors from the exact diagonal."""
    with lab.seeded("monte-carlo"):
        model = tanh_mlp().double()
        x, y = torch.randn(2, 2).double(), torch.tensor([0, 2])
    loss_fn, groups = nn.CrossEntropyLoss(), 20
    exact = compute(model, loss_fn, x, y, ["diag_ggn"])["diag_ggn"]
    generator = lab.generator("draws")
    # Each copy of the two samples in a batch has a draw of its own.
    copies = config.draws // groups
    x, y = x.repeat(copies, 1), y.repeat(copies)
    means = [
        compute(model, loss_fn, x, y, ["diag_ggn_mc"], generator=generator)["diag_ggn_mc"]
        for _ in range(groups)
    ]
    for name, value in exact.items():
        stacked = torch.stack([mean[name] for mean in means])
        error = stacked.std(0) / groups**0.5
        lab.measure("monte-carlo-unbiased", float(((stacked.mean(0) - value) / error).abs().max()))


# -- cost ----------------------------------------------------------------------------------------


def overheads(lab: Lab, config: Config) -> None:
    """Times relative to one gradient."""
    networks = {
        "MLP": (lambda: MLP((784, 500, 500, 500, 10)), (config.mlp_batch, 1, 28, 28)),
        "3C3D": (ThreeConvThreeDense, (config.conv_batch, 3, 32, 32)),
    }
    rows = []
    for seed in lab.seeds:
        ratios = []
        for name, (build, shape) in networks.items():

            def measured(build=build, shape=shape, seed=seed, name=name) -> dict[str, float]:
                with lab.seeded("overhead", name, seed):
                    model = build().to(lab.device)
                    x, y = torch.randn(shape), torch.randint(10, shape[:1])
                return times(model, x.to(lab.device), y.to(lab.device), config.repeats)

            seconds = lab.stage(f"overheads-{name}-{seed}", measured)
            alone = sum(seconds[label] for label, _ in OVERHEADS[:4])
            ratios.append(seconds["all four"] / alone)
            gradient = seconds["gradient"]
            rows += [
                {
                    "network": name,
                    "seed": seed,
                    "quantity": label,
                    "milliseconds": 1e3 * seconds[label],
                    "gradients": seconds[label] / gradient,
                }
                for label in ("gradient", *(label for label, _ in OVERHEADS))
            ]
        lab.measure("together", max(ratios), seed=seed)
    lab.table("overheads", rows, caption="Time of one call with the mean gradient, in gradients")
    lab.figure("overheads", overhead_figure(lab, rows), caption="Cost in gradients, first seed")


def times(model: nn.Module, x: Tensor, y: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each quantity and of the gradient, alternating."""
    loss_fn = nn.CrossEntropyLoss()
    params = list(model.parameters())
    calls: dict[str, Callable[[], object]] = {
        "gradient": lambda: torch.autograd.grad(loss_fn(model(x), y), params)
    }
    for label, quantities in OVERHEADS:
        wanted = ("grad", *quantities)
        earlier = compute(model, loss_fn, x, y, wanted)

        calls[label] = partial(compute, model, loss_fn, x, y, wanted, out=earlier)
    taken: dict[str, list[float]] = {label: [] for label in calls}
    for repeat in range(repeats + 1):
        for label, call in calls.items():
            start = time.perf_counter()
            call()
            if x.is_cuda:
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                taken[label].append(time.perf_counter() - start)
    return {label: sorted(t)[len(t) // 2] for label, t in taken.items()}


def overhead_figure(lab: Lab, rows: list[dict]) -> Figure:
    """Bars of the first seed."""
    figure, axes = lab.subplots(1, 2, width=9, sharey=True)
    for axis, network in zip(axes, ("MLP", "3C3D"), strict=True):
        chosen = [r for r in rows if r["network"] == network and r["seed"] == rows[0]["seed"]]
        axis.barh([r["quantity"] for r in chosen], [r["gradients"] for r in chosen])
        axis.invert_yaxis()
        axis.set_xlabel("time / time of a gradient")
        axis.set_title(network)
    return figure


# -- optimizers ----------------------------------------------------------------------------------


def optimizers(lab: Lab, config: Config) -> None:
    """Training loss after equal steps on every problem, each method at its best grid point."""
    for name in config.problems:
        if name not in PROBLEMS:
            raise UsageError(unknown("problem", name, PROBLEMS))
    table = [row for name in config.problems for row in compare(lab, config, name)]
    lab.table("optimizers", table, caption="Training loss after equal steps, best grid points")


def grids(config: Config, problem: Problem) -> dict[str, list[dict[str, float]]]:
    """The grid of every method: the same learning rates, for curvature every damping with each."""
    plain = [{"lr": lr} for lr in config.lrs]
    damped = [{"lr": lr, "damping": d} for lr in config.lrs for d in config.dampings]
    found = {"SGD with momentum": plain, "Adam": plain, "DiagGGN": damped, "KFAC": damped}
    return {**found, "KFLR": damped} if problem.exact else found


def compare(lab: Lab, config: Config, name: str) -> list[dict]:
    """Tune and run every method on one problem; rows of the table."""
    problem = PROBLEMS[name]
    train = lab.data(problem.data, "train", limit=config.train_size or None)
    train_with = partial(train_once, lab, config, problem, train)
    table = []
    best: dict[str, dict[str, float]] = {}
    for method, grid in grids(config, problem).items():
        losses = {}
        for number, point in enumerate(lab.track(grid, f"{name}, {method}: grid")):
            result: Any = lab.stage(
                f"grid-{name}-{method}-{number}", partial(train_with, method, point, "tuning")
            )
            losses[number] = result["losses"][-1]
        best[method] = grid[min(losses, key=losses.__getitem__)]
    for seed in lab.seeds:
        final = {}
        for method, point in best.items():
            result: Any = lab.stage(
                f"run-{name}-{method}-{seed}", partial(train_with, method, point, seed)
            )
            final[method] = result["losses"][-1]
            for step, loss in zip(result["steps"], result["losses"], strict=True):
                lab.log(f"training loss {name} {seed}", int(step), **{method: loss})
            table.append(
                {
                    "problem": name,
                    "method": method,
                    "seed": seed,
                    "lr": point["lr"],
                    "damping": point.get("damping", 0.0),
                    "training loss": final[method],
                    "seconds": result["seconds"],
                }
            )
        difference = final["KFAC"] - final["SGD with momentum"]
        if lab.preset == "paper":
            lab.measure(f"deepobs-{name}", difference, seed=seed)
        else:
            lab.measure("kfac-progress", difference, seed=seed)
            diagonal = final["DiagGGN"] - final["SGD with momentum"]
            lab.measure("diagonal-progress", diagonal, seed=seed)
    return table


def build_optimizer(
    method: str,
    model: nn.Module,
    point: dict[str, float],
    l2: float,
    generator: torch.Generator,
) -> torch.optim.Optimizer:
    """By its name in the grids."""
    lr = point["lr"]
    if method == "SGD with momentum":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=l2)
    if method == "Adam":
        return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=l2)
    kind = DiagGGN if method == "DiagGGN" else KFAC
    return kind(
        model, nn.CrossEntropyLoss(), lr=lr, damping=point["damping"], l2=l2,
        mc_samples=None if method == "KFLR" else 1, generator=generator,
    )  # fmt: skip


def train_once(
    lab: Lab,
    config: Config,
    problem: Problem,
    train: Dataset,
    method: str,
    point: dict,
    seed: object,
) -> dict[str, list[float] | float]:
    """Train from scratch; the loss on the training data at every epoch's end and half-way."""
    with lab.seeded("init", seed):
        model = problem.build(train).to(lab.device)
    optimizer = build_optimizer(method, model, point, problem.l2, lab.generator("draws", seed))
    generator = lab.generator("batches", seed)
    batches = Batches(train.x, train.y, problem.batch_size, generator=generator)
    start, steps, step = time.perf_counter(), [0.0], 0
    losses = [training_loss(lab, model, train)]
    spent = 0.0
    for _ in range(config.epochs or problem.epochs):
        for number, (x, y) in enumerate(batches):
            x, y = x.to(lab.device), y.to(lab.device)
            if not torch.isfinite(one_step(optimizer, model, x, y)):
                return {"steps": [*steps, step], "losses": [*losses, float("inf")], "seconds": 0.0}
            step += 1
            if number + 1 in (len(batches) // 2, len(batches)):
                spent += time.perf_counter() - start
                steps.append(float(step))
                losses.append(training_loss(lab, model, train))
                start = time.perf_counter()
    return {"steps": steps, "losses": losses, "seconds": spent}


def one_step(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A step on one batch; infinite if the loss has left the numbers."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if not torch.isfinite(loss):
            raise FloatingPointError
        loss.backward()
        return loss

    try:
        return optimizer.step(closure).detach()  # type: ignore[union-attr]
    except FloatingPointError:
        return torch.tensor(float("inf"))


@torch.no_grad()
def training_loss(lab: Lab, model: nn.Module, train: Dataset) -> float:
    """Mean cross-entropy over the training data; infinite if it is not a number."""
    total = 0.0
    for x, y in zip(train.x.split(1000), train.y.split(1000), strict=True):
        total += float(F.cross_entropy(model(x.to(lab.device)), y.to(lab.device), reduction="sum"))
    mean = total / len(train.x)
    return mean if mean < float("inf") else float("inf")

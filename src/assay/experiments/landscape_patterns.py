"""A deep network's loss surface contains every low-dimensional pattern (Czarnecki et al., 2019)."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.data import Batches, Dataset
from assay.functional import call_with_vector, parameters_to_vector
from assay.lab import Claim, Lab, Paper, at_least, at_most
from assay.landscape import (
    LogitLoss,
    MultiPointLoss,
    PlaneModel,
    PlantedPattern,
    embed_pattern,
    embed_pattern_beside,
    load_mask,
    scan_plane,
)
from assay.models import MLP

PAPER = Paper(
    slug="landscape-patterns",
    title="A Deep Neural Network's Loss Surface Contains Every Low-dimensional Pattern",
    authors=("W. M. Czarnecki", "S. Osindero", "R. Pascanu", "M. Jaderberg"),
    year=2019,
    url="https://arxiv.org/abs/1912.07559",
    topic="landscape",
    summary=(
        "A two-dimensional picture of a loss surface can show anything: plant a pattern in a "
        "model exactly, or find one by training a plane of weights (with I. Skorokhodov and "
        "M. Burtsev, arXiv:1910.03867)."
    ),
    components=(
        "assay.landscape.embed_pattern",
        "assay.landscape.embed_pattern_beside",
        "assay.landscape.LogitLoss",
        "assay.landscape.PlaneModel",
        "assay.landscape.MultiPointLoss",
        "assay.landscape.load_mask",
        "assay.landscape.scan_plane",
        "assay.landscape.random_plane",
    ),
)

_SUP = "largest |L − T| on a dense check off the fitting points, real labels"

CLAIMS = (
    Claim(
        "pattern-256",
        "A net of width 256 shows a smooth two-dimensional pattern",
        paper="any ε",
        expect=at_most(0.05),
        kind="exact",
        unit="nats",
        how=_SUP,
    ),
    Claim(
        "pattern-1024",
        "A net of width 1024 shows a smooth two-dimensional pattern more exactly",
        paper="any ε",
        expect=at_most(0.02),
        kind="exact",
        unit="nats",
        how=_SUP,
    ),
    Claim(
        "error-falls-with-width",
        "The error of a planted pattern falls as the net gets wider",
        expect=at_most(1.0),
        kind="exact",
        unit="ratio of consecutive errors",
        how="widths 64, 256 and 1024: error of each / error of the one before",
    ),
    Claim(
        "pattern-1d",
        "One-dimensional patterns are contained",
        expect=at_most(0.02),
        kind="exact",
        unit="nats",
        how=f"z = 1, width 1024: {_SUP}",
    ),
    Claim(
        "pattern-3d",
        "Three-dimensional patterns are contained",
        expect=at_most(0.1),
        kind="exact",
        unit="nats",
        how=f"z = 3, width 1024: {_SUP}",
    ),
    Claim(
        "input-free",
        "The planted loss does not depend on the inputs",
        expect=at_most(1e-6),
        kind="exact",
        unit="nats",
        how="largest difference of the loss on real images and on noise, same labels, float64",
    ),
    Claim(
        "transfer-bound",
        "A planted pattern transfers to the test set",
        expect=at_most(0.03),
        kind="exact",
        unit="nats",
        how="largest difference of training and test loss over the cube",
    ),
    Claim(
        "transfer-predicted",
        "Training and test loss of a planted pattern differ as the label marginals predict",
        paper="depends on the marginal alone",
        expect=at_most(1e-9),
        kind="exact",
        unit="nats",
        how="|(L_test − L_train) − c(h)(π_train − π_test)|, float64",
    ),
    Claim(
        "at-a-minimum",
        "The lowest point of a pattern can be a trained network",
        paper="theorem 2 (this construction is Assay's own)",
        expect=at_most(0.02),
        unit="nats",
        how="pattern planted beside a trained net, 0.05 above its loss: largest |L − T|",
    ),
    Claim(
        "at-a-minimum-transfer",
        "A pattern beside a trained network is there on the test set",
        paper="approximate",
        unit="correlation of test loss and pattern over the square",
        how="the same net, 41 × 41 points, 1,000 test images",
    ),
    Claim(
        "mask-accuracy-gap",
        "A plane of weights can be trained to show a shape: accuracy inside and outside",
        paper="good − bad > 0.01 counts as success",
        expect=at_least(0.4),
        unit="test accuracy",
        how="mean test accuracy of the good cells − of the bad ones, diamond ring of 10 × 10 cells",
    ),
    Claim(
        "mask-auc",
        "A shape that a plane of weights was trained to show is there on the test set",
        expect=at_least(0.95),
        unit="area under the ROC curve",
        how="−test loss of a cell as detector of the mask",
    ),
    Claim(
        "mask-50",
        "Shapes of 50 × 50 cells are found with convolutional nets",
        paper="icons of 50 × 50 cells",
        kind="paper",
        expect=at_least(0.01),
        unit="test accuracy",
        how="the same at the paper's scale",
    ),
)

RING = """
....##....
...#..#...
..#....#..
.#......#.
#........#
#........#
.#......#.
..#....#..
...#..#...
....##....
"""


@dataclass(frozen=True)
class Config:
    """Settings; counts of images, cells and steps."""

    data: str = "fashion-mnist"
    labels: int = 6000
    images: int = 6000
    test_images: int = 2000
    channels: tuple[int, ...] = ()
    hidden: tuple[int, ...] = (64, 64)
    mask_size: int = 10
    cells: int = 8
    batch_size: int = 128
    lr: float = 1e-3
    steps: int = 500
    trained_epochs: int = 10


PRESETS = {
    "smoke": Config(
        data="mnist5k", labels=2000, images=1000, test_images=500, steps=120, trained_epochs=2
    ),
    "small": Config(),
    "paper": Config(
        images=60_000, test_images=10_000, mask_size=50, cells=50, batch_size=512, lr=1e-3,
        steps=11_700, channels=(8, 32, 64), hidden=(128,),
    ),
}  # fmt: skip
SEEDS = {"smoke": 1, "small": 3, "paper": 5}


def waves(h: Tensor) -> Tensor:
    """A smooth pattern with values in [2.35, 3.55]."""
    return 2.95 + 0.6 * torch.sin(2 * math.pi * h).prod(dim=1)


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    from sklearn.metrics import roc_auc_score

    # Drawn without regard to class: in balanced sets both marginals would be the same and the
    # transfer between them no question.
    everything = lab.data(config.data, "train")
    drawn = torch.randperm(len(everything), generator=lab.generator("labels"))[: config.labels]
    labelled = everything.select(drawn, f"{config.labels} drawn at random")
    _planted(lab, labelled, lab.data(config.data, "test"))
    train = lab.data(config.data, "train", limit=config.images)
    held_out = lab.data(config.data, "test", limit=config.test_images)
    mask = load_mask(RING.strip(), size=(config.mask_size, config.mask_size))
    for seed in lab.seeds:
        beside = _beside(lab, config, train, held_out, seed)
        lab.measure("at-a-minimum", beside["error"], seed=seed)
        lab.measure("at-a-minimum-transfer", beside["transfer"], seed=seed)
        found = _mask(lab, config, mask, train, held_out, seed)
        good = torch.from_numpy(mask.ravel() == 1)
        gap = float(found["accuracy"][good].mean() - found["accuracy"][~good].mean())
        lab.measure("mask-accuracy-gap", gap, seed=seed)
        lab.measure("mask-50", gap, seed=seed)
        lab.measure("mask-auc", roc_auc_score(good.numpy(), -found["loss"].numpy()), seed=seed)
        if seed == lab.seeds[0]:
            _plot_mask(lab, mask, found)
            worst, best = float(found["loss"][good].max()), float(found["loss"][~good].min())
            order = "is perfect" if worst < best else "is not perfect"
            lab.note(
                f"Cell by cell the order {order}: the worst good cell has a test loss of "
                f"{worst:.2f}, the best bad one of {best:.2f} (first seed)."
            )


def _net(config: Config, images: Tensor) -> nn.Module:
    """An MLP, or the paper's net: convolutions, each halving the image, and dense layers."""
    if not config.channels:
        return MLP((images[0].numel(), *config.hidden, 10))
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((images.shape[1], *config.channels)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    side = images.shape[2] // 2 ** len(config.channels)
    dense = MLP((config.channels[-1] * side**2, *config.hidden, 10))
    return nn.Sequential(*layers, nn.Flatten(), dense)


# -- by construction ---------------------------------------------------------------------------


def _planted(lab: Lab, train: Dataset, test: Dataset) -> None:
    errors = {}
    inputs = train.x[0].numel()
    for width in (64, 256, 1024):
        with lab.seeded("net", width):
            net = MLP((inputs, 8, width, 10)).double()
        found = embed_pattern(net, waves, train.y, generator=lab.generator("features", width))
        errors[width] = found.sup_error
    rows = [{"width": width, "largest error / nats": error} for width, error in errors.items()]
    lab.table("error by width", rows, "Two-dimensional pattern, training labels.")
    lab.measure("pattern-256", errors[256])
    lab.measure("pattern-1024", errors[1024])
    lab.measure("error-falls-with-width", [errors[256] / errors[64], errors[1024] / errors[256]])
    _transfer(lab, net, found, train, test)
    for z, claim in ((1, "pattern-1d"), (3, "pattern-3d")):
        with lab.seeded("net", "z", z):
            other = MLP((inputs, 8, 1024, 10)).double()
        generator = lab.generator("features z", z)
        planted = embed_pattern(other, waves, train.y, z=z, tries=1, generator=generator)
        lab.measure(claim, planted.sup_error)
    _plot_planted(lab, found, train)


def _transfer(lab: Lab, net: MLP, found: PlantedPattern, train: Dataset, test: Dataset) -> None:
    sigma_train = found.loss
    sigma_test = LogitLoss.constant(test.y, classes=10)
    axis = torch.linspace(0, 1, 41, dtype=torch.float64)
    c = found.planted(torch.cartesian_prod(axis, axis))
    difference = sigma_test(c) - sigma_train(c)
    lab.measure("transfer-bound", difference.abs().max())
    # A few points through the network itself, on real images and on noise.
    origin = parameters_to_vector(net)
    x, y = train.x[:500].double(), train.y[:500]
    noise = torch.randn(x.shape, generator=lab.generator("noise"), dtype=torch.float64)
    shares = [torch.bincount(t, minlength=10).double()[0] / len(t) for t in (train.y, test.y)]
    for h in torch.rand(20, 2, generator=lab.generator("points"), dtype=torch.float64):
        with torch.no_grad():
            outputs = [
                call_with_vector(net, origin + h @ found.directions, batch)
                for batch in (x, noise, test.x[:1].double())
            ]
        real, of_noise = (F.cross_entropy(out, y) for out in outputs[:2])
        lab.measure("input-free", abs(float(real - of_noise)))
        said = outputs[2].expand(len(test.y), -1)
        on_train = F.cross_entropy(outputs[2].expand(len(train.y), -1), train.y)
        moved = F.cross_entropy(said, test.y) - on_train
        predicted = found.planted(h[None])[0] * (shares[0] - shares[1])
        lab.measure("transfer-predicted", abs(float(moved - predicted)))


def _plot_planted(lab: Lab, found: PlantedPattern, train: Dataset) -> None:
    axis = torch.linspace(0, 1, 61, dtype=torch.float64)
    asked = waves(torch.cartesian_prod(axis, axis)).view(61, 61)
    share = found.loss.weights
    # One image says what all do: the mean over all labels is that over their shares.
    shown = scan_plane(
        found.model, found.directions, {"train": (train.x[:1].double(), train.y[:1])},
        first=axis, second=axis, loss_fn=lambda out, _: (out.logsumexp(1) - out @ share).mean(),
    )["train"].loss.view(61, 61)  # fmt: skip
    figure, axes = lab.subplots(1, 3, width=10, height=3.2)
    difference = 1000 * (shown - asked)
    largest = float(difference.abs().max())
    same = {"vmin": float(asked.min()), "vmax": float(asked.max())}
    around_0 = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    pictures = (
        (asked, "pattern", "loss / nats", same),
        (shown, "loss of the net", "loss / nats", same),
        (difference, "net − pattern", "difference / 10⁻³ nats", around_0),
    )
    for ax, (values, title, label, style) in zip(axes, pictures, strict=True):
        image = ax.imshow(values.T.numpy(), origin="lower", extent=(0, 1, 0, 1), **style)
        ax.set(title=title, xlabel="h₁")
        ax.grid(visible=False)
        figure.colorbar(image, ax=ax, label=label, shrink=0.8)
    axes[0].set_ylabel("h₂")
    lab.figure(
        "planted", figure,
        "A pattern and the training loss of a net of width 1024, found by running it, over the "
        "plane of two entries of its first bias.",
    )  # fmt: skip


def _beside(lab: Lab, config: Config, train: Dataset, test: Dataset, seed: int) -> dict[str, float]:
    with lab.seeded("trained", seed):
        net = _net(config, train.x)
    batches = Batches(train.x, train.y, 64, generator=lab.generator("order", seed))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    lab.fit(f"trained-{seed}", net, optimizer, batches, epochs=config.trained_epochs)

    def planted() -> dict[str, float]:
        x, y = train.x[:1000], train.y[:1000]
        with torch.no_grad():
            lowest = F.cross_entropy(net(x), y).item() + 0.05

        def bowl(h: Tensor) -> Tensor:
            return lowest + 2 * (h - 0.5).square().sum(dim=1)

        generator = lab.generator("beside", seed)
        found = embed_pattern_beside(net, bowl, x, y, generator=generator)
        axis = torch.linspace(0, 1, 41, dtype=torch.float64)
        h = torch.cartesian_prod(axis, axis)
        x, y = test.x[:1000], test.y[:1000]
        with torch.no_grad():
            logits = net(x).double()
        share = torch.full((len(y),), 1 / len(y), dtype=torch.float64)
        on_test = LogitLoss(logits, y, share)(found.planted(h))
        correlation = torch.corrcoef(torch.stack([on_test, bowl(h)]))[0, 1]
        return {"error": found.sup_error, "transfer": float(correlation)}

    return lab.stage(f"beside-{seed}", planted)


# -- by multi-point optimisation ---------------------------------------------------------------


def _mask(
    lab: Lab, config: Config, mask: np.ndarray, train: Dataset, test: Dataset, seed: int
) -> dict[str, Tensor]:
    with lab.seeded("plane", seed):
        models = [_net(config, train.x) for _ in range(3)]
    plane = PlaneModel(models)
    cells = plane.coordinates(mask).flatten(0, 1)
    good = torch.from_numpy(mask.ravel() == 1)
    batches = Batches(
        train.x, train.y, config.batch_size, generator=lab.generator("plane order", seed),
        drop_last=True,
    )  # fmt: skip
    criterion = MultiPointLoss()

    def some(which: Tensor) -> Tensor:
        indices = which.nonzero().squeeze(1)
        return indices[torch.randperm(len(indices))[: config.cells]]

    class Sampled(torch.nn.Module):
        """The plane at a fresh choice of cells each step, drawn from torch's own generator."""

        def __init__(self) -> None:
            super().__init__()
            self.plane = plane

        def forward(self, x: Tensor) -> Tensor:
            chosen = torch.cat([some(good), some(~good)])
            self.good = good[chosen]
            return plane(x, cells[chosen])

    sampled = Sampled()
    optimizer = torch.optim.Adam(plane.parameters(), lr=config.lr)
    epochs = max(1, round(config.steps / len(batches)))
    lab.fit(
        f"plane-{seed}", sampled, optimizer, batches, epochs=epochs,
        loss_fn=lambda logits, y: criterion(logits, y, sampled.good),
    )  # fmt: skip

    def scanned() -> dict[str, Tensor]:
        grid = plane.scale.detach() * plane.coordinates(mask)
        found = scan_plane(
            models[0], torch.stack(plane.axes()).detach(), {"test": (test.x, test.y)},
            first=grid[:, 0, 0], second=grid[0, :, 1], origin=plane.origin.detach(),
        )["test"]  # fmt: skip
        assert found.accuracy is not None
        return {"loss": found.loss, "accuracy": found.accuracy}

    return lab.stage(f"scan-{seed}", scanned)


def _plot_mask(lab: Lab, mask: np.ndarray, found: dict[str, Tensor]) -> None:
    figure, axes = lab.subplots(1, 3, width=10, height=3.2)
    rows, columns = mask.shape
    extent = (
        -columns / 2,
        columns / 2,
        -rows / 2,
        rows / 2,
    )  # of α and β: unit steps, row 0 on top
    clipped = found["loss"].view(rows, columns).clamp(max=4).numpy()
    pictures = (
        (mask, "asked for", "Greys", None),
        (clipped, "on the test set", "viridis_r", "test loss / nats, up to 4"),
        (found["accuracy"].view(rows, columns).numpy(), "on the test set", "viridis",
         "test accuracy"),
    )  # fmt: skip
    for ax, (values, title, colours, label) in zip(axes, pictures, strict=True):
        image = ax.imshow(values, cmap=colours, extent=extent)
        ax.set(title=title, xlabel="β / steps along r")
        ax.grid(visible=False)
        if label is None:
            bar = figure.colorbar(image, ax=ax, shrink=0.8, ticks=[-1, 1])
            bar.ax.set_yticklabels(["bad", "good"])
        else:
            figure.colorbar(image, ax=ax, shrink=0.8, label=label)
    axes[0].set_ylabel("α / steps along u")
    lab.figure("mask", figure, "A plane of weights trained to show a ring, first seed.")

"""A small experiment with every kind of work, for the tests of the lab."""

from dataclasses import dataclass

import torch

from assay.data import Batches
from assay.lab import Claim, Lab, Paper, at_least, at_most
from assay.models import MLP

PAPER = Paper(
    "demo-experiment", "A demonstration", ("A. Author",), 2020, "https://example.org", "optim",
    "Shows what the lab does.", ("assay.models.MLP",),
)  # fmt: skip

CLAIMS = (
    Claim("bound", "A sine is at most one", "1", at_most(1.0), "exact"),
    Claim("accuracy", "The net learns", "", at_least(0.5), unit="accuracy"),
    Claim("noise", "Noise is small", "", at_most(10.0), over_seeds="every"),
    Claim("scale", "It works at scale", "99 %", at_least(0.99), "paper"),
)


@dataclass(frozen=True)
class Config:
    """Settings of every type."""

    data: str = "digits"
    epochs: int = 3
    lr: float = 0.1
    widths: tuple[int, ...] = (16,)
    limit: int | None = 200
    dropout: float = 0.2


PRESETS = {"smoke": Config(epochs=2), "small": Config(), "paper": Config(epochs=50, limit=None)}
SEEDS = {"smoke": 1, "small": 2, "paper": 5}


def run(lab: Lab, config: Config) -> None:
    """Measure the four claims."""
    train = lab.data(config.data, "train", limit=config.limit)
    test = lab.data(config.data, "test")
    for seed in lab.seeds:
        with lab.seeded("init", seed):
            sizes = (train.x[0].numel(), *config.widths, 10)
            model = MLP(sizes, dropout=config.dropout)
        batches = Batches(train.x, train.y, 32, generator=lab.generator("order", seed))
        optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
        lab.fit(f"mlp-{seed}", model, optimizer, batches, epochs=config.epochs, scheduler=schedule)
        with torch.no_grad():
            accuracy = (model(test.x).argmax(1) == test.y).double().mean()
        lab.measure("accuracy", accuracy, seed=seed)
        g = lab.generator("noise", seed)
        noise = lab.stage(f"noise-{seed}", lambda g=g: torch.randn(5, generator=g).abs().sum())
        lab.measure("noise", noise, seed=seed)
    lab.measure("bound", torch.linspace(0, 6, 7).sin())
    figure, axes = lab.subplots()
    axes.plot([0, 1], [0, 1])
    lab.figure("line", figure, "A line.")
    lab.table("numbers", [{"a": 1, "b": "x"}], "Two cells.")
    lab.note("A note.")

"""Results for the tests of reports: one as an experiment leaves it, with every kind of content."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from assay.lab import Claim, Lab, Paper, Result, at_least, at_most, between
from assay.lab.result import (
    ClaimResult,
    Figure,
    Measurement,
    PaperCard,
    Provenance,
    write_atomically,
)

SVG = """<?xml version="1.0" encoding="utf-8"?>
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 460 260" width="460" height="260">
<defs><clipPath id="clip"><rect width="460" height="260"/></clipPath></defs>
<g clip-path="url(#clip)"><rect width="460" height="260" fill="#ffffff"/>
<path d="M50 20V220H440" fill="none" stroke="#333"/>
<path d="M50 200C120 60 250 180 440 40" fill="none" stroke="{colour}" stroke-width="2"/>
<text x="220" y="250" font-size="14">{label}</text></g></svg>
"""

HOSTILE = (
    "</script></style><script>window.pwned=1</script>"
    "<img src=x onerror='window.pwned=1'>\"'&{{7*7}}"
)

PAPER = Paper(
    slug="sample-compression",
    title="Natural Compression for Distributed Deep Learning with a Title That Is Long Enough to "
    "Need a Second Line",
    authors=("S. Horváth", "C.-Y. Ho", "Ľ. Horváth", "A. N. Sahu", "M. Canini", "P. Richtárik"),
    year=2019,
    url="https://arxiv.org/abs/1905.10988",
    topic="distributed",
    summary="Gradients are rounded at random to powers of two, without bias, so that a float32 "
    "travels as nine bits; training loses no accuracy to speak of.",
    components=("assay.distributed.NaturalCompressor", "assay.distributed.natural_hook"),
)

CLAIMS = (
    Claim("second-moment", "Compressing multiplies the second moment by at most 9/8", paper="9/8",
          expect=at_most(1.125), kind="exact", how="maximum over a grid of 10⁴ points a binade"),
    Claim("unbiased", "The compressed gradient is unbiased", paper="E C(x) = x",
          expect=between(-1e-9, 1e-9), kind="exact", unit="relative error",
          how="closed-form expectation over the grid",
          discussion="Subnormal numbers are flushed to zero before they are rounded, which the "
          "paper's proof does not cover. All normal numbers satisfy the bound."),
    Claim("accuracy-gap", "SGD with compression reaches the accuracy of SGD without",
          paper="no loss on CIFAR-10", expect=at_least(-0.01), unit="accuracy",
          how="MNIST, 5 000 samples, 4 workers: difference of the final test accuracies"),
    Claim("steps", "Training needs at most five per cent more steps to the same loss",
          paper="“nearly the same”", expect=at_most(1.05), unit="ratio", over_seeds="median",
          how="steps to a training loss of 0.1, compressed over plain",
          discussion="At this scale the number of steps to the target varies more over seeds than "
          "the bound is wide. More seeds would decide it."),
    Claim("faster", "One step takes less wall-clock time at 1 Gbit/s", paper="1.9 × faster",
          expect=at_most(0.7), unit="ratio",
          how="simulated link, four processes on one machine",
          discussion="Packing costs as much time as the link saves, since four processes share two "
          "cores. On separate machines the link would dominate."),
    Claim("bits", "A value travels in nine bits", paper="9 bits", unit="bits",
          how="bytes sent over values sent, headers included"),
    Claim("imagenet", "ResNet-50 on ImageNet reaches the accuracy of the baseline",
          paper="76.15 % vs 75.96 %", expect=at_least(-0.005), kind="paper", unit="accuracy"),
)  # fmt: skip

MEASURED = {
    "second-moment": [1 + k / 4000 for k in range(501)],
    "unbiased": [2.2e-16, 1e-17, 3.1e-8],
    "accuracy-gap": [-0.0012, 0.0021, 0.0004, -0.0032, 0.0011],
    "steps": [1.012, 1.094, 0.998, 1.061, 1.037],
    "faster": [0.982, 1.013, 1.047, 0.991, 1.022],
    "bits": [9.02, 9.02, 9.02, 9.02, 9.02],
}


def provenance() -> Provenance:
    return Provenance(
        assay="0.1.0", commit="4f1c2a9d0b7e8c6a5f3d2e1b0a9c8d7e6f5a4b3c", python="3.11.9",
        versions={"torch": "2.13.0", "numpy": "2.2.1"}, platform="Linux x86_64",
        processor="AMD EPYC 7B13", cores=2, threads=2, device="cpu", precision="32-true",
        started=datetime(2026, 3, 14, 15, 9, 26, tzinfo=UTC), seconds=284.3,
    )  # fmt: skip


def write_result(
    folder: Path, paper: Paper = PAPER, preset: str = "small", seeds: int = 5
) -> Result:
    """A run's folder with two figures, curves of several seeds, tables and notes."""
    lab = Lab(paper.slug, CLAIMS, preset=preset, seeds=range(seeds), directory=folder)
    _draw(lab, seeds)
    lab.table(
        "Ablations",
        [
            {"method": "none", "bits a value": 32, "test accuracy": 0.9562, "biased": False},
            {"method": "natural", "bits a value": 9, "test accuracy": 0.9558, "biased": False},
            {"method": "top-k, 1 %", "bits a value": 0.64, "test accuracy": 0.94913, "biased": True,
             "remark": "needs error feedback: without it training diverges at this learning rate"},
        ],
        caption="Final accuracy by compressor; mean over seeds.",
    )  # fmt: skip
    lab.note("The link is simulated: a token bucket in front of the Gloo process group.")
    lab.data("digits", "train")
    claims = []
    for claim in CLAIMS:
        values = MEASURED.get(claim.id, [])
        if claim.kind == "exact":
            measurements = [Measurement(value=v) for v in values]
        else:
            measurements = [Measurement(value=v, seed=s) for s, v in enumerate(values[:seeds])]
        claims.append(ClaimResult.of(claim, measurements, preset))
    result = Result(
        paper=PaperCard.of(paper), preset=preset, seeds=list(range(seeds)), claims=claims,
        config={"data": "digits", "workers": 4, "lr": 0.05, "sizes": [64, 32], "momentum": None},
        data=lab.datasets, tables=lab.tables, figures=lab.figures,
        curves=list(lab.curves.values()), notes=lab.notes, provenance=provenance(),
    )  # fmt: skip
    result.write(folder)
    return result


def hostile(value: Any, key: str = "") -> Any:
    """The same document with every free text replaced by an attack."""
    if isinstance(value, dict):
        free = key in ("config", "versions") or key.startswith("row")
        return {
            (HOSTILE + k if free else k): hostile(v, k) for k, v in value.items()
        }  # fmt: skip
    if isinstance(value, list | tuple):
        return [hostile(v, "row" if key == "rows" else key) for v in value]
    fixed = key in ("kind", "over_seeds", "verdict", "file", "started")
    return HOSTILE + key if isinstance(value, str) and not fixed else value


def _draw(lab: Lab, seeds: int) -> None:
    for name, colour in (("error by bits", "#1f5fa8"), ("time by bandwidth", "#b4451b")):
        path = lab.directory / "figures" / f"{name.replace(' ', '-')}.svg"
        write_atomically(path, SVG.format(colour=colour, label=name))
        caption = "Relative error of one compressed gradient, median over layers."
        lab.figures.append(Figure(name=name, caption=caption, file=f"figures/{path.name}"))
    for seed in range(seeds):
        for rate, method in ((0.35, "plain"), (0.3, "natural")):
            for epoch in range(1, 21):
                wave = 1 + 0.1 * math.sin(3 * epoch + seed)
                loss = 2.3 * math.exp(-rate * epoch) * wave
                lab.log(f"{method}-{seed}", epoch, loss=loss, accuracy=1 - 0.9 * loss / 2.53)
    for step in range(0, 3000, 5):
        lab.log("gradient norm", step, plain=10 / (1 + step), natural=12 / (1 + step))

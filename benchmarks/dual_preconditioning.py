"""The learned preconditioner: its training, its step, and its way to a minimum; d = 50."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from assay.data.convex import LogisticRegression, synthetic_logistic
from assay.lab import at_most
from assay.lab.bench import Comparison, Samples, benchmark
from assay.optim import DualPreconditionedGD, LearnedPreconditioner, RadialSampler

DIM = 50
GAP = 1e-6


def _problem() -> LogisticRegression:
    generator = torch.Generator().manual_seed(0)
    return synthetic_logistic(1000, DIM, 0.05, decay=True, generator=generator)


def _learned(f: LogisticRegression) -> LearnedPreconditioner:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learned = LearnedPreconditioner(DIM)
    learned.fit(
        f.gradient,
        RadialSampler(DIM, 0.1, 1000.0),
        hessian_logdet=f.hessian_logdet,
        weights="tempered",
        generator=torch.Generator().manual_seed(0),
    )
    return learned


def _descent(
    f: LogisticRegression, make: Callable[[list[Tensor]], Any], best: float
) -> tuple[int, int]:
    """Steps and gradients until the gap is closed."""
    x = nn.Parameter(torch.full((DIM,), 50.0, dtype=torch.float64))
    optimizer = make([x])
    gradients = 0

    def closure() -> Tensor:
        nonlocal gradients
        gradients += 1
        point = x.detach()
        x.grad = f.gradient(point)
        return f(point)

    for step in range(10_000):
        if float(optimizer.step(closure)) - best <= GAP:
            return step, gradients
    raise RuntimeError("the gap was not closed in 10,000 steps")


def _makers(f: LogisticRegression, learned: LearnedPreconditioner) -> dict[str, Any]:
    inverse = 1 / f.smoothness
    return {
        "learned": lambda p: DualPreconditionedGD(
            p, preconditioner=learned, line_search="backtracking", fallback_lr=inverse
        ),
        "GD": lambda p: torch.optim.SGD(p, lr=inverse),
        "L-BFGS": lambda p: torch.optim.LBFGS(
            p,
            max_iter=1,
            max_eval=100,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        ),
    }


@benchmark("training a preconditioner, 1000 gradients, against 10 s of CPU", target=at_most(1.0))
def training_against_ten_seconds() -> Samples:
    f, seconds = _problem(), []
    for _ in range(3):
        start = time.process_time()  # of one thread: what others do on the machine is left out
        _learned(f)
        seconds.append(time.process_time() - start)
    return Samples(
        ours=seconds,
        peer=[10.0] * len(seconds),
        peer_name="ten seconds",
        peer_version="",
    )


@benchmark("a learned step against a step of SGD, gradients given")
def step_against_sgd() -> Comparison:
    f = _problem()
    learned = _learned(f)
    gradient = f.gradient(torch.full((DIM,), 50.0, dtype=torch.float64))
    steps = []
    for make in (
        lambda p: DualPreconditionedGD(p, 1e-9, learned),
        lambda p: torch.optim.SGD(p, lr=1e-9),
    ):
        x = nn.Parameter(torch.zeros(DIM, dtype=torch.float64))
        x.grad = gradient.clone()
        steps.append(make([x]).step)
    return Comparison(
        ours=steps[0],
        peer=steps[1],
        peer_name="torch.optim.SGD",
        peer_version=torch.__version__,
    )


def _against(peer: str) -> Comparison:
    f = _problem()
    start = time.process_time()
    learned = _learned(f)
    training = time.process_time() - start
    best = f(f.minimizer()).item()
    makers = _makers(f, learned)
    extra: dict[str, float | str] = {"seconds of training, not counted": training}
    for name in ("learned", peer):
        steps, gradients = _descent(f, makers[name], best)
        extra |= {f"{name} steps": steps, f"{name} gradients": gradients}
    extra["learned gradients with training"] = 1000 + float(extra["learned gradients"])
    return Comparison(
        ours=lambda: _descent(f, makers["learned"], best),
        peer=lambda: _descent(f, makers[peer], best),
        peer_name=f"{peer} to the same gap",
        peer_version=torch.__version__,
        extra=extra,
    )


@benchmark("a logistic loss, condition 80, to a gap of 1e-6, against GD with step 1/L")
def descent_against_gd() -> Comparison:
    return _against("GD")


@benchmark("a logistic loss, condition 80, to a gap of 1e-6, against L-BFGS")
def descent_against_lbfgs() -> Comparison:
    return _against("L-BFGS")

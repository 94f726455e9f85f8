"""Distributed learning in the non-convex world (Chang, Hong, Wai, Zhang, Lu, 2020)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from assay.distributed import (
    D2,
    DGD,
    DGET,
    EXTRA,
    ChebyshevFiltered,
    DecentralizedOptimizer,
    GradientTracking,
    LocalSGD,
    MixingMatrix,
    ProxPDA,
    SimulatedAgents,
    SimulatedGossip,
    TopK,
    Topology,
    TopologySchedule,
    worker_gradients,
)
from assay.distributed.testing import spawn
from assay.functional import evaluate_classifier
from assay.functional.parameters import parameters_to_vector, vector_to_parameters
from assay.lab import Claim, Lab, Paper, at_least, at_most, between, close_to
from assay.models import MLP

PAPER = Paper(
    slug="distributed-nonconvex",
    title=(
        "Distributed Learning in the Non-Convex World: From Batch to Streaming Data, and Beyond"
    ),
    authors=("T.-H. Chang", "M. Hong", "H.-T. Wai", "X. Zhang", "S. Lu"),
    year=2020,
    url="https://arxiv.org/abs/2001.04786",
    topic="distributed",
    summary=(
        "Decentralised training over any graph: choose who talks to whom and an algorithm, and "
        "step an ordinary optimiser; no server, no all-reduce."
    ),
    components=(
        "assay.distributed.DecentralizedOptimizer",
        "assay.distributed.SimulatedAgents",
        "assay.distributed.Topology",
        "assay.distributed.MixingMatrix",
        "assay.distributed.TopologySchedule",
        "assay.distributed.Gossip",
        "assay.distributed.SimulatedGossip",
        "assay.distributed.DGD",
        "assay.distributed.GradientTracking",
        "assay.distributed.EXTRA",
        "assay.distributed.ProxPDA",
        "assay.distributed.D2",
        "assay.distributed.DGET",
        "assay.distributed.ChebyshevFiltered",
        "assay.distributed.LocalSGD",
    ),
)

_BATCH = (
    "logistic loss and a non-convex penalty, breast cancer sorted by label on 8 agents in a ring, "
    "all local data a step, float64"
)
_STREAM = "the same data in batches of 8; mean over the last fifth of the steps"
_WORST = "ring of 32, 40 rounds, the slowest eigenvector"

CLAIMS = (
    Claim(
        "gossip-rate",
        "Gossip shrinks the distance from the mean by λ₂ a round",
        paper="λ₂^K",
        expect=close_to(1.0, tol=1e-9),
        kind="exact",
        how=f"{_WORST}: error relative to the first / λ₂^K",
    ),
    Claim(
        "chebyshev-rate",
        "Accelerated gossip of K rounds shrinks it by 1/T_K(1/λ₂)",
        paper="1/T_K(1/λ₂)",
        expect=close_to(1.0, tol=1e-9),
        kind="exact",
        how=f"{_WORST}: error relative to the first · T_K(1/λ₂)",
    ),
    Claim(
        "chebyshev-random",
        "Accelerated gossip stays below its bound from random values",
        paper="0.0032",
        expect=at_most(0.0032),
        kind="exact",
        how="ring of 32, 40 rounds, Gaussian start: error relative to the first",
    ),
    Claim(
        "rounds-plain",
        "Gossip needs rounds in proportion to 1 / spectral gap",
        paper="exponent 1",
        expect=between(0.95, 1.05),
        kind="exact",
        how="rings of 8 to 128: slope of log rounds to 1e-6 over log 1/gap",
    ),
    Claim(
        "rounds-accelerated",
        "Accelerated gossip needs rounds in proportion to its root",
        paper="exponent 1/2",
        expect=between(0.45, 0.55),
        kind="exact",
        how="rings of 8 to 128: slope of log rounds to 1e-6 over log 1/gap",
    ),
    Claim(
        "dgd-stalls",
        "DGD with a constant step stops before a stationary point",
        paper="bias grows with the step and the difference of data",
        expect=at_least(1e-5),
        kind="exact",
        unit="stationarity",
        how=f"{_BATCH}; ‖mean gradient at the mean model‖² after 1000 steps",
    ),
    Claim(
        "dgd-stays",
        "DGD with a constant step gets no nearer however long it runs",
        paper="does not converge",
        expect=close_to(1.0, tol=0.01),
        kind="exact",
        how="stationarity after 4000 steps / after 1000",
    ),
    *(
        Claim(
            f"{key}-stationarity",
            f"{name} with a constant step reaches a stationary point",
            paper="converges",
            expect=at_most(1e-10),
            kind="exact",
            unit="stationarity",
            how=f"{_BATCH}; ‖mean gradient at the mean model‖² after 1000 steps",
        )
        for key, name in (
            ("gt", "Gradient tracking"),
            ("extra", "EXTRA"),
            ("d2", "D²"),
            ("prox-pda", "Prox-PDA"),
            ("chebyshev", "The Chebyshev-filtered method"),
        )
    ),
    *(
        Claim(
            f"{key}-consensus",
            f"{name} with a constant step brings all agents to the same model",
            paper="converges",
            expect=at_most(1e-12),
            kind="exact",
            unit="consensus error",
            how=f"{_BATCH}; mean of ‖x_i − x̄‖² after 1000 steps",
        )
        for key, name in (("gt", "Gradient tracking"), ("extra", "EXTRA"), ("d2", "D²"))
    ),
    Claim(
        "diminishing-converges",
        "A diminishing step lets DGD converge",
        paper="α ∝ 1/√t",
        expect=at_most(0.5),
        kind="exact",
        how="stationarity after 4000 steps, diminishing / constant",
    ),
    Claim(
        "diminishing-slower",
        "DGD with a diminishing step is slower than gradient tracking",
        paper="sublinear",
        expect=at_least(1e4),
        kind="exact",
        how="stationarity after 4000 steps, DGD α/√t / gradient tracking with constant α",
    ),
    Claim(
        "prox-pda-is-extra",
        "Prox-PDA is EXTRA with the neighbours' average as weights",
        paper="equivalent",
        expect=at_most(1e-10),
        kind="exact",
        how="largest difference of iterates over 100 steps, from models that differ",
    ),
    Claim(
        "tracking",
        "The mean of the trackers is the mean of the gradients at every step",
        paper="mean(Y) = mean(G)",
        expect=at_most(1e-12),
        kind="exact",
        how="largest difference over all steps and entries, in real processes",
    ),
    Claim(
        "processes",
        "Processes that talk to their neighbours do what the stacked simulation does",
        expect=at_most(1e-12),
        kind="exact",
        how="largest difference of any model over 30 steps of eight algorithms, gloo, float64",
    ),
    Claim(
        "gnsd-consensus",
        "With streaming data GNSD agents differ at most half as much as those of DSGD",
        paper="GNSD removes heterogeneity",
        expect=at_most(0.5),
        how=f"{_STREAM}; ratio of consensus errors",
    ),
    Claim(
        "d2-stream-consensus",
        "With streaming data D² agents differ at most a third as much as those of DSGD",
        paper="D² removes heterogeneity",
        expect=at_most(1 / 3),
        how=f"{_STREAM}; ratio of consensus errors",
    ),
    Claim(
        "gnsd-stationarity",
        "The mean model of GNSD is as near to a stationary point as that of DSGD",
        paper="same order",
        how=f"{_STREAM}; GNSD / DSGD: both are at the floor of the gradient noise",
    ),
    Claim(
        "dget-stationarity",
        "D-GET goes below the noise of its batches",
        paper="variance reduction",
        expect=at_most(1e-7),
        unit="stationarity",
        how=f"{_STREAM}, batch and period ⌈√m⌉",
    ),
    Claim(
        "dget-consensus",
        "D-GET brings all agents to the same model in spite of batches",
        paper="variance reduction",
        expect=at_most(1e-12),
        unit="consensus error",
        how=f"{_STREAM}, batch and period ⌈√m⌉",
    ),
    Claim(
        "noise-floor",
        "Without variance reduction the noise of the batches keeps GNSD away",
        paper="noise floor",
        expect=at_least(1e-5),
        unit="stationarity",
        how=_STREAM,
    ),
    Claim(
        "dget-gradients",
        "D-GET takes fewer gradients than gradient tracking with full batches",
        paper="√m fewer",
        expect=at_most(1.0),
        how="sample gradients to stationarity 1e-6, ratio; same step",
    ),
    Claim(
        "speed-up",
        "The noise floor of DSGD falls in proportion to the number of agents",
        paper="linear speed-up",
        expect=between(-1.25, -0.75),
        how="shuffled data, batch of 8 an agent, 2 to 16 agents: slope of log stationarity over "
        "log N",
    ),
    Claim(
        "network-consensus",
        "For a neural network GNSD agents differ less than those of DSGD",
        paper="MNIST over 8–32 agents",
        expect=at_most(1.0),
        how="network with a hidden layer, images sorted by label; ratio of consensus errors",
        discussion=(
            "GNSD's agents first move further apart: trackers carry gradients from agents that are "
            "several rounds away. They come down towards DSGD's by the end (learning curves), "
            "where with small batches the noise of the gradients decides. With batches of 128 (one "
            "seed, tried beside this run) it was 0.025 against 0.045 after 500 steps."
        ),
    ),
    Claim(
        "network-local-accuracy",
        "The agents' own networks are more accurate with GNSD than with DSGD",
        paper="MNIST over 8–32 agents",
        expect=at_least(0.0),
        unit="accuracy",
        how="mean test accuracy over the agents' own networks, GNSD − DSGD",
    ),
    Claim(
        "network-accuracy",
        "The mean network is as accurate with GNSD as with DSGD",
        paper="MNIST over 8–32 agents",
        unit="accuracy",
        how="test accuracy of the mean network, GNSD − DSGD",
    ),
)


@dataclass(frozen=True)
class Config:
    """Every knob.

    Attributes:
        data: table for the batch and streaming experiments.
        agents: number of agents in the ring.
        penalty: weight of the non-convex penalty Σ x²/(1 + x²).
        lr: step with full batches.
        steps: of the comparison.
        long: steps of DGD.
        batch_size: samples an agent and step when streaming.
        stream_lr: step when streaming.
        stream_steps: of streaming.
        rings: sizes of rings for the rounds of gossip.
        crowds: numbers of agents for the speed-up.
        processes: real processes.
        process_steps: steps of each algorithm in them.
        images: data set of the neural network.
        image_agents: agents that train it.
        image_batch: images an agent and step.
        image_lr: step.
        image_steps: steps.
        hidden: width of its hidden layer.
    """

    data: str = "breast-cancer"
    agents: int = 8
    penalty: float = 0.05
    lr: float = 0.2
    steps: int = 1000
    long: int = 4000
    batch_size: int = 8
    stream_lr: float = 0.05
    stream_steps: int = 2000
    rings: tuple[int, ...] = (8, 16, 32, 64, 128)
    crowds: tuple[int, ...] = (2, 4, 8, 16)
    processes: int = 4
    process_steps: int = 30
    images: str = "mnist5k"
    image_agents: int = 8
    image_batch: int = 16
    image_lr: float = 0.1
    image_steps: int = 500
    hidden: int = 64


PRESETS = {
    "smoke": Config(
        long=2000,
        stream_steps=100,
        processes=2,
        process_steps=6,
        crowds=(2, 4),
        image_steps=5,
        hidden=8,
        rings=(8, 16, 32),
    ),
    "small": Config(),
    "paper": Config(
        images="mnist",
        image_agents=32,
        image_batch=32,
        image_steps=20_000,
        hidden=256,
        processes=8,
    ),
}
SEEDS = {"smoke": 1, "small": 5, "paper": 5}


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    measure_gossip(lab, config)
    problem = load_problem(lab, config, config.agents)
    compare_full_batches(lab, config, problem)
    measure_equivalence(lab, config, problem)
    measure_processes(lab, config)
    compare_streaming(lab, config, problem)
    count_gradients(lab, config, problem)
    measure_speed_up(lab, config)
    train_networks(lab, config)
    lab.note(
        "Agents of the comparisons live in one process (SimulatedAgents); the same updates run "
        "between processes (DecentralizedOptimizer), which the claim on processes compares."
    )
    lab.note(
        "The Chebyshev-filtered method is our statement of xFILTER's idea, since its details could "
        "not be checked. It takes several rounds of communication a step: compare by rounds."
    )


# -- gossip --------------------------------------------------------------------------------------


def measure_gossip(lab: Lab, config: Config) -> None:
    """Rates of plain and accelerated gossip, and rounds over the spectral gap."""
    mixing, rounds = Topology.ring(32).mixing(), 40
    slowest = torch.linalg.eigh(mixing.matrix).eigenvectors[:, -2:-1]
    bound = 1 / math.cosh(rounds * math.acosh(1 / mixing.lambda2))
    plain, accelerated = gossip_errors(mixing, slowest, rounds)
    lab.measure("gossip-rate", plain[-1] / mixing.lambda2**rounds)
    lab.measure("chebyshev-rate", accelerated[-1] / bound)
    start = torch.randn(32, 100, generator=lab.generator("gossip"), dtype=torch.float64)
    random = gossip_errors(mixing, start, rounds)
    lab.measure("chebyshev-random", random[1][-1])

    gaps, counts = [], {"plain": [], "accelerated": []}
    for n in config.rings:
        ring = Topology.ring(n).mixing()
        gaps.append(1 / ring.spectral_gap)
        worst = torch.linalg.eigh(ring.matrix).eigenvectors[:, -2:-1]
        counts["plain"].append(rounds_to(ring, worst, accelerated=False))
        counts["accelerated"].append(rounds_to(ring, worst, accelerated=True))
    for kind, count in counts.items():
        lab.measure(f"rounds-{kind}", slope(gaps, count))

    generator = lab.generator("graphs")
    graphs = {
        "path": Topology.path(16),
        "ring": Topology.ring(16),
        "star": Topology.star(16),
        "torus 4 × 4": Topology.torus(4, 4),
        "Erdős–Rényi, p = 0.3": Topology.erdos_renyi(16, 0.3, generator),
        "hypercube": Topology.hypercube(4),
        "exponential": Topology.exponential(16),
        "complete": Topology.complete(16),
    }
    rows = [
        {"graph": name, "weights": weights} | graph.mixing(weights).report()
        for name, graph in graphs.items()
        for weights in ("metropolis", "laplacian")
        if graph.symmetric or weights == "metropolis"
    ]
    lab.table("graphs", rows, "Sixteen agents; rounds until the worst error has shrunk to 1e-6.")
    one_peer = TopologySchedule.one_peer_exponential(16)
    lab.note(
        f"One-peer exponential graphs average 16 agents exactly in {one_peer.period} rounds of one "
        f"message each (spectral gap of a period: {one_peer.spectral_gap:.6f})."
    )

    figure, (left, right) = lab.subplots(1, 2, width=9.0)
    left.semilogy(random[0], label="plain")
    left.semilogy(random[1], label="accelerated")
    left.axhline(bound, ls="--", color="grey", label="bound 1/T₄₀")
    left.set(xlabel="round", ylabel="error relative to the first")
    left.legend()
    for kind, count in counts.items():
        right.loglog(gaps, count, "o-", label=kind)
    right.set(xlabel="1 / spectral gap", ylabel="rounds to 1e-6")
    right.legend()
    lab.figure("gossip", figure, "Ring of 32 from random values; rounds on rings of growing size.")


def gossip_errors(mixing: MixingMatrix, x: Tensor, rounds: int) -> tuple[list[float], list[float]]:
    """Distance from the mean, relative to the first, after 0 … `rounds` rounds of both kinds."""
    errors = []
    for accelerated in (False, True):
        mixed = [x]
        for count in range(1, rounds + 1):
            gossip = SimulatedGossip(mixing, rounds=count, accelerated=accelerated)
            mixed.append(gossip.mix(x))
        errors.append([float((y - x.mean(0)).norm() / (x - x.mean(0)).norm()) for y in mixed])
    return errors[0], errors[1]


def rounds_to(
    mixing: MixingMatrix, x: Tensor, *, accelerated: bool, tolerance: float = 1e-6
) -> int:
    """Fewest rounds after which the error is at most `tolerance` times the first, by bisection."""

    def error(rounds: int) -> float:
        gossip = SimulatedGossip(mixing, rounds=rounds, accelerated=accelerated)
        return float((gossip.mix(x) - x.mean(0)).norm() / (x - x.mean(0)).norm())

    high = 1
    while error(high) > tolerance:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= tolerance else (middle, high)
    return high


def slope(x: list[float], y: list[float] | list[int]) -> float:
    """Slope of log y over log x by least squares."""
    a = torch.tensor(x, dtype=torch.float64).log()
    b = torch.tensor(y, dtype=torch.float64).log()
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / a.square().sum())


# -- the problem ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """f_i(x) = mean log(1 + exp(−b aᵀx)) + penalty Σ x²/(1 + x²); `rows` holds b a, (n, m, d)."""

    rows: Tensor
    penalty: float

    @property
    def samples(self) -> int:
        """Samples of an agent."""
        return self.rows.shape[1]

    def start(self) -> Tensor:
        """Every agent at zero."""
        return self.rows.new_zeros(len(self.rows), self.rows.shape[2])

    def gradients(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Each agent's gradient at its row of x, of all its data or of its batch `rows`."""
        rows = self.rows if rows is None else rows
        pull = torch.sigmoid(-(rows @ x[..., None])).div_(rows.shape[1])
        logistic = -(rows.mT @ pull)[..., 0]
        return logistic + 2 * self.penalty * x / (1 + x.square()).square()

    def full(self, x: Tensor, step: int) -> Tensor:
        """All local data, whatever the step."""
        return self.gradients(x)

    def stationarity(self, x: Tensor) -> float:
        """‖mean gradient‖² at the mean of the agents' models."""
        return float(self.gradients(x.mean(0).expand_as(x)).mean(0).square().sum())

    def local_stationarity(self, x: Tensor) -> float:
        """‖mean gradient‖² at the agents' own models, on average."""
        each = [self.stationarity(row[None].expand_as(x)) for row in x]
        return sum(each) / len(each)

    def batches(self, steps: int, size: int, generator: torch.Generator) -> Tensor:
        """Numbers of the samples of every step, (steps, n, size)."""
        shape = (steps, len(self.rows), size)
        return torch.randint(self.samples, shape, generator=generator)

    def streaming(self, chosen: Tensor, full: Callable[[int], bool] = lambda step: False):
        """Gradients of batch `chosen[step]`, or of all data for steps that ask for it."""
        agents = torch.arange(len(self.rows))[:, None]

        def gradients(x: Tensor, step: int) -> Tensor:
            if full(step):
                return self.gradients(x)
            return self.gradients(x, self.rows[agents, chosen[step]])

        return gradients


def load_problem(lab: Lab, config: Config, agents: int, shuffled: bool = False) -> Problem:
    """The table, standardised, with a bias, sorted by label (or shuffled) and cut evenly."""
    parts = [lab.data(config.data, split) for split in ("train", "test")]
    x = torch.cat([part.x for part in parts]).flatten(1).double()
    y = torch.cat([part.y for part in parts])
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-12)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    if shuffled:
        order = torch.randperm(len(y), generator=lab.generator("shuffle"))
    else:
        order = y.argsort(stable=True)
    rows = (x * (2 * (y == 0).double() - 1)[:, None])[order]
    size = len(rows) // agents
    rows = rows[: agents * size].view(agents, size, -1).to(lab.device)
    return Problem(rows.contiguous(), config.penalty)


# -- full batches --------------------------------------------------------------------------------


def compare_full_batches(lab: Lab, config: Config, problem: Problem) -> None:
    """Every algorithm with constant steps, and DGD with diminishing ones."""
    mixing = Topology.ring(config.agents).mixing()
    lazy = mixing.lazy()
    top = TopK(0.25)
    runs: dict[str, tuple[SimulatedAgents, int]] = {}
    for name, method, weights, options, steps in (
        ("DGD", DGD(), mixing, {}, config.long),
        ("DGD, α/√t", DGD(), mixing, {}, config.long),
        ("local SGD, 5 steps", LocalSGD(5), mixing, {}, config.steps),
        ("gradient tracking", GradientTracking(), mixing, {}, config.steps),
        ("EXTRA", EXTRA(), mixing, {}, config.steps),
        ("D²", D2(), lazy, {}, config.steps),
        ("Prox-PDA", ProxPDA(), mixing, {}, config.steps),
        ("Chebyshev-filtered", ChebyshevFiltered(), mixing, {}, config.steps),
        (
            "gradient tracking, top-k",
            GradientTracking(),
            mixing,
            {"compressor": top, "gamma": 0.3},
            config.steps,
        ),
    ):
        agents = SimulatedAgents(
            method, problem.full, problem.start(), weights, config.lr, **options
        )
        runs[name] = (agents, config.long if name == "gradient tracking" else steps)
    curves = {}
    for name, (agents, steps) in runs.items():
        curves[name] = lab.stage(
            f"full batches, {name}",
            lambda a=agents, s=steps, n=name: trace(a, problem, s, config.lr, "√" in n),
        )
    at = {name: dict(zip(c["step"], c["stationarity"], strict=True)) for name, c in curves.items()}
    apart = {name: dict(zip(c["step"], c["consensus"], strict=True)) for name, c in curves.items()}
    end, last = config.steps, config.long
    lab.measure("dgd-stalls", at["DGD"][end])
    lab.measure("dgd-stays", at["DGD"][last] / at["DGD"][end])
    for claim, name in (
        ("gt", "gradient tracking"),
        ("extra", "EXTRA"),
        ("d2", "D²"),
        ("prox-pda", "Prox-PDA"),
        ("chebyshev", "Chebyshev-filtered"),
    ):
        lab.measure(f"{claim}-stationarity", at[name][end])
        if claim in ("gt", "extra", "d2"):
            lab.measure(f"{claim}-consensus", apart[name][end])
    diminishing = at["DGD, α/√t"][last]
    lab.measure("diminishing-converges", diminishing / at["DGD"][last])
    lab.measure("diminishing-slower", diminishing / max(at["gradient tracking"][last], 1e-300))
    report_full_batches(lab, config, curves)


def trace(
    agents: SimulatedAgents, problem: Problem, steps: int, lr: float, diminishing: bool
) -> dict:
    """Stationarity, consensus error and cost every ten steps."""
    curve: dict[str, list] = {
        key: [] for key in ("step", "stationarity", "local", "consensus", "rounds", "bytes")
    }
    for step in range(1, steps + 1):
        if diminishing:
            agents.lr = lr / math.sqrt(step)
        agents.step()
        if step % 10 == 0 or step == steps:
            curve["step"].append(step)
            curve["stationarity"].append(problem.stationarity(agents.x))
            curve["local"].append(problem.local_stationarity(agents.x))
            curve["consensus"].append(agents.consensus_error())
            curve["rounds"].append(agents.gossip.rounds_done)
            curve["bytes"].append(agents.gossip.bytes_sent)
    return curve


def report_full_batches(lab: Lab, config: Config, curves: dict[str, dict]) -> None:
    """What each algorithm reached and what it cost."""
    rows = []
    for name, curve in curves.items():
        end = curve["step"].index(config.steps)
        reached = [i for i, value in enumerate(curve["stationarity"]) if value <= 1e-6]
        first = reached[0] if reached else None
        rows.append(
            {
                "method": name,
                "stationarity": curve["stationarity"][end],
                "of the agents' own models": curve["local"][end],
                "consensus error": curve["consensus"][end],
                "steps to 1e-6": None if first is None else curve["step"][first],
                "rounds to 1e-6": None if first is None else curve["rounds"][first],
                "kB an agent to 1e-6": None
                if first is None
                else curve["bytes"][first] / config.agents / 1e3,
            }
        )
    lab.table(
        "full batches",
        rows,
        f"After {config.steps} steps; costs in steps of ten. Gradient tracking sends two vectors a "
        "round. Top-k: a quarter of the entries of compressed gossip.",
    )
    figure, (left, right) = lab.subplots(1, 2, width=9.0)
    for name, curve in curves.items():
        left.semilogy(curve["step"], curve["stationarity"], label=name)
        right.semilogy(curve["rounds"], curve["consensus"], label=name)
        for i in range(0, len(curve["step"]), 10):
            lab.log(
                name,
                curve["step"][i],
                stationarity=curve["stationarity"][i],
                consensus=curve["consensus"][i],
            )
    left.set(xlabel="step", ylabel="stationarity", ylim=(1e-20, 1))
    right.set(xlabel="round of communication", ylabel="consensus error", ylim=(1e-24, 1))
    left.legend(fontsize=7)
    lab.figure("full batches", figure, "All local data a step; data sorted by label.")


def measure_equivalence(lab: Lab, config: Config, problem: Problem) -> None:
    """Prox-PDA against EXTRA with the neighbours' average."""
    ring = Topology.ring(config.agents)
    average = MixingMatrix(ring.adjacency.double() / ring.degrees.double()[:, None])
    generator = lab.generator("equivalence")
    start = torch.randn(problem.start().shape, generator=generator, dtype=torch.float64)
    pair = [
        SimulatedAgents(method, problem.full, start.to(problem.rows.device), weights, config.lr)
        for method, weights in ((ProxPDA(), ring), (EXTRA(), average))
    ]
    differences = []
    for _ in range(100):
        one, other = (agents.step() for agents in pair)
        differences.append(float((one - other).abs().max()))
    lab.measure("prox-pda-is-extra", max(differences))


# -- processes -----------------------------------------------------------------------------------

_IN_PROCESSES = ("dsgd", "local", "gt", "extra", "prox_pda", "d2", "dget", "chebyshev")


def measure_processes(lab: Lab, config: Config) -> None:
    """The same training between processes and in the simulation."""
    problem = load_problem(lab, config, config.processes)
    rows = problem.rows.cpu()
    settings = (rows, config.penalty, config.lr, config.process_steps)
    results = spawn(train_in_process, config.processes, *settings)
    problem = Problem(rows, config.penalty)
    mixing = Topology.ring(config.processes).mixing(lazy=True)
    differences, table = {}, []
    for name in _IN_PROCESSES:
        agents = SimulatedAgents(name, problem.full, problem.start(), mixing, config.lr)
        theirs = torch.stack([result[name]["x"] for result in results], 1)
        ours = torch.stack([agents.step() for _ in range(config.process_steps)])
        differences[name] = float((ours - theirs).abs().max())
        table.append(
            {
                "method": name,
                "largest difference": differences[name],
                "rounds": agents.gossip.rounds_done,
                "bytes a process": results[0][name]["bytes"],
            }
        )
    lab.measure("processes", max(differences.values()))
    tracking = [value for r in results for name in ("gt", "dget") for value in r[name]["tracking"]]
    lab.measure("tracking", max(tracking))
    lab.table("processes", table, f"{config.processes} processes (gloo) against the simulation.")


def train_in_process(
    rows: Tensor, penalty: float, lr: float, steps: int
) -> dict[str, dict[str, Tensor | list[float] | int]]:
    """One rank: train its model with every algorithm by autograd on its own data."""
    mine = rows[dist.get_rank()]
    mixing = Topology.ring(len(rows)).mixing(lazy=True)
    results = {}
    for name in _IN_PROCESSES:
        x = nn.Parameter(torch.zeros(rows.shape[2], dtype=rows.dtype))
        optimizer = DecentralizedOptimizer([x], mixing, lr, name)

        def closure(x: nn.Parameter = x, optimizer: DecentralizedOptimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.softplus(-(mine @ x)).mean() + penalty * (x**2 / (1 + x**2)).sum()
            loss.backward()
            return loss

        iterates, apart = [], []
        for _ in range(steps):
            optimizer.step(closure)
            iterates.append(x.detach().clone())
            if "tracker" in optimizer.vectors:
                difference = optimizer.vectors["tracker"] - optimizer.vectors["gradient"]
                dist.all_reduce(difference)
                apart.append(float(difference.abs().max()) / len(rows))
        sent = optimizer.gossip.bytes_sent
        results[name] = {"x": torch.stack(iterates), "tracking": apart, "bytes": sent}
    return results


# -- streaming -----------------------------------------------------------------------------------


def compare_streaming(lab: Lab, config: Config, problem: Problem) -> None:
    """DSGD, GNSD, D² and D-GET on batches."""
    mixing = Topology.ring(config.agents).mixing()
    root = math.ceil(math.sqrt(problem.samples))
    methods = {
        "DSGD": (DGD(), mixing, config.batch_size),
        "GNSD": (GradientTracking(), mixing, config.batch_size),
        "D²": (D2(), mixing.lazy(), config.batch_size),
        "D-GET": (DGET(period=root), mixing, root),
    }
    rows = []
    for seed in lab.seeds:
        found = {}
        for name, (method, weights, size) in methods.items():
            generator = lab.generator("batches", size, seed)
            chosen = problem.batches(config.stream_steps, size, generator)
            full = method.needs_full_batch if isinstance(method, DGET) else lambda step: False
            agents = SimulatedAgents(
                method,
                problem.streaming(chosen, full),
                problem.start(),
                weights,
                config.stream_lr,
            )
            found[name] = lab.stage(
                f"streaming, {name}-{seed}",
                lambda a=agents: plateau(a, problem, config.stream_steps),
            )
            rows.append({"method": name, "seed": seed} | found[name])
        dsgd = found["DSGD"]
        lab.measure("gnsd-consensus", found["GNSD"]["consensus"] / dsgd["consensus"], seed=seed)
        lab.measure("d2-stream-consensus", found["D²"]["consensus"] / dsgd["consensus"], seed=seed)
        ratio = found["GNSD"]["stationarity"] / dsgd["stationarity"]
        lab.measure("gnsd-stationarity", ratio, seed=seed)
        lab.measure("dget-stationarity", found["D-GET"]["stationarity"], seed=seed)
        lab.measure("dget-consensus", found["D-GET"]["consensus"], seed=seed)
        lab.measure("noise-floor", found["GNSD"]["stationarity"], seed=seed)
    lab.table(
        "streaming",
        rows,
        f"Mean over the last fifth of {config.stream_steps} steps. The mean model is equally near "
        "to a stationary point with DSGD, GNSD and D²: the floor of the gradient noise.",
    )


def plateau(agents: SimulatedAgents, problem: Problem, steps: int) -> dict[str, float]:
    """Means over the last fifth of a run."""
    agents.run(steps - steps // 5)
    stationarity, consensus = [], []
    for _ in range(steps // 5):
        agents.step()
        stationarity.append(problem.stationarity(agents.x))
        consensus.append(agents.consensus_error())
    return {
        "stationarity": sum(stationarity) / len(stationarity),
        "consensus": sum(consensus) / len(consensus),
    }


def count_gradients(lab: Lab, config: Config, problem: Problem) -> None:
    """Sample gradients an agent takes to stationarity 1e-6."""
    mixing = Topology.ring(config.agents).mixing()
    root = math.ceil(math.sqrt(problem.samples))
    tracking = SimulatedAgents("gt", problem.full, problem.start(), mixing, config.lr)
    full_batch = steps_to(tracking, problem, 1e-6, config.long) * problem.samples
    rows = [{"method": "gradient tracking", "sample gradients": full_batch}]
    for seed in lab.seeds:
        chosen = problem.batches(config.long, root, lab.generator("d-get", seed))
        method = DGET(period=root)
        gradients = problem.streaming(chosen, method.needs_full_batch)
        agents = SimulatedAgents(method, gradients, problem.start(), mixing, config.lr)
        steps = steps_to(agents, problem, 1e-6, config.long)
        whole = -(-steps // root)
        count = whole * problem.samples + (steps - whole) * 2 * root
        lab.measure("dget-gradients", count / full_batch, seed=seed)
        rows.append({"method": f"D-GET, seed {seed}", "sample gradients": count})
    lab.table("gradients", rows, "Sample gradients of one agent to stationarity 1e-6, same step.")


def steps_to(agents: SimulatedAgents, problem: Problem, target: float, limit: int) -> int:
    """Steps until the stationarity is at most `target`; `limit` if it never is."""
    while agents.steps < limit:
        if problem.stationarity(agents.step()) <= target:
            break
    return agents.steps


def measure_speed_up(lab: Lab, config: Config) -> None:
    """Noise floor of DSGD over the number of agents, each with batches of the same size."""
    for seed in lab.seeds:
        floors = []
        for n in config.crowds:
            problem = load_problem(lab, config, n, shuffled=True)
            generator = lab.generator("speed-up", n, seed)
            chosen = problem.batches(config.stream_steps, config.batch_size, generator)
            agents = SimulatedAgents(
                "dsgd",
                problem.streaming(chosen),
                problem.start(),
                Topology.ring(n),
                config.stream_lr,
            )
            found = lab.stage(
                f"speed-up, {n}-{seed}",
                lambda a=agents, p=problem: plateau(a, p, config.stream_steps),
            )
            floors.append(found["stationarity"])
            lab.log(f"noise floor-{seed}", n, stationarity=found["stationarity"])
        lab.measure("speed-up", slope(list(map(float, config.crowds)), floors), seed=seed)


# -- neural networks -----------------------------------------------------------------------------


def train_networks(lab: Lab, config: Config) -> None:
    """DSGD, GNSD and D² train a network on images sorted by label."""
    methods = {
        "DSGD": ("dsgd", False),
        "GNSD": ("gt", False),
        "D²": ("d2", True),
        "local SGD": ("local", False),
    }
    rows = []
    for seed in lab.seeds:
        found = {}
        for name, (method, lazy) in methods.items():
            found[name] = lab.stage(
                f"network, {name}-{seed}",
                lambda m=method, z=lazy, s=seed: train_network(lab, config, m, z, s),
            )
            curve = found[name].pop("curve")
            for step, value in curve:
                lab.log(f"network, {name}-{seed}", step, consensus=value)
            rows.append({"method": name, "seed": seed} | found[name])
        gnsd, dsgd = found["GNSD"], found["DSGD"]
        lab.measure("network-consensus", gnsd["consensus"] / dsgd["consensus"], seed=seed)
        own = "accuracy of the agents' own"
        lab.measure("network-local-accuracy", gnsd[own] - dsgd[own], seed=seed)
        lab.measure("network-accuracy", gnsd["accuracy"] - dsgd["accuracy"], seed=seed)
    lab.table("networks", rows, f"{config.image_agents} agents in a ring, after the last step.")


def train_network(lab: Lab, config: Config, method: str, lazy: bool, seed: int) -> dict[str, Any]:
    """Train one network an agent; accuracies of the mean and of the agents' own."""
    data, test = lab.data(config.images, "train"), lab.data(config.images, "test")
    with lab.seeded("network", seed):
        model = MLP([data.x[0].numel(), config.hidden, data.num_classes]).to(lab.device)
    n = config.image_agents
    order = data.y.argsort(stable=True)
    size = len(order) // n
    shards = order[: n * size].view(n, size)
    x, y = data.x.to(lab.device), data.y.to(lab.device)
    generator = lab.generator("images", seed)
    chosen = torch.randint(size, (config.image_steps, n, config.image_batch), generator=generator)

    def gradients(parameters: Tensor, step: int) -> Tensor:
        batch = shards.gather(1, chosen[step]).to(lab.device)
        return worker_gradients(model, F.cross_entropy, x[batch], y[batch], parameters)[0]

    start = parameters_to_vector(model).detach().expand(n, -1)
    mixing = Topology.ring(n).mixing(lazy=lazy)
    agents = SimulatedAgents(method, gradients, start, mixing, config.image_lr)
    curve = []
    for _ in lab.track(range(config.image_steps), f"{method}, seed {seed}"):
        agents.step()
        if agents.steps % 25 == 0 or agents.steps == config.image_steps:
            curve.append((agents.steps, agents.consensus_error()))

    def accuracy(parameters: Tensor) -> float:
        vector_to_parameters(parameters, model)
        return evaluate_classifier(model, test.x.to(lab.device), test.y.to(lab.device))["accuracy"]

    return {
        "accuracy": accuracy(agents.x.mean(0)),
        "accuracy of the agents' own": sum(map(accuracy, agents.x)) / n,
        "consensus": agents.consensus_error(),
        "curve": curve,
    }

"""Algorithms against dense recursions of the papers, and processes against the simulation."""

import copy
import gc
import io
import math
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from assay.distributed import (
    D2,
    DGET,
    EXTRA,
    Compose,
    DecentralizedOptimizer,
    ErrorFeedback,
    Gossip,
    GradientTracking,
    Identity,
    LocalSGD,
    MixingMatrix,
    NaturalCompressor,
    ProxPDA,
    RandomK,
    SimulatedAgents,
    SimulatedGossip,
    StochasticIntegerRounding,
    TopK,
    Topology,
    TopologySchedule,
    chebyshev_rounds,
)
from assay.distributed.decentralized_updates import METHODS
from assay.distributed.testing import spawn

N, D, SAMPLES = 4, 6, 12
LAZY_RING = Topology.ring(N).mixing(lazy=True)
STEPS = 8


def problem(n=N, d=D):
    """Logistic losses with a non-convex penalty; the agents' data differ."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, SAMPLES, d, dtype=torch.float64, generator=generator)
    return a + torch.linspace(-1, 1, n, dtype=torch.float64)[:, None, None]


def loss(a, x):
    return nn.functional.softplus(a @ x).mean() + 0.05 * (x**2 / (1 + x**2)).sum()


def gradients(a):
    def stacked(x, step):
        pull = torch.sigmoid(a @ x[..., None]) / SAMPLES
        return (a.mT @ pull)[..., 0] + 0.1 * x / (1 + x**2) ** 2

    return stacked


def start(n=N, d=D):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def agents(method, topology=LAZY_RING, lr=0.1, **options):
    return SimulatedAgents(method, gradients(problem()), start(), topology, lr, **options)


# -- the papers' recursions, with dense matrices ---------------------------------------------------


def recursion_dsgd(W, g, x, alpha, steps):
    for _ in range(steps):
        x = W @ x - alpha * g(x)
        yield x


def recursion_gt(W, g, x, alpha, steps):
    y = g(x)
    for _ in range(steps):
        new = W @ x - alpha * y
        y = W @ y + g(new) - g(x)
        x = new
        yield x


def recursion_extra(W, g, x, alpha, steps):
    old, x = x, W @ x - alpha * g(x)
    yield x
    for _ in range(steps - 1):
        half = (np.eye(len(W)) + W) / 2
        old, x = x, x + W @ x - half @ old - alpha * (g(x) - g(old))
        yield x


def recursion_d2(W, g, x, alpha, steps):
    old, x = x, W @ (x - alpha * g(x))
    yield x
    for _ in range(steps - 1):
        old, x = x, W @ (2 * x - old - alpha * (g(x) - g(old)))
        yield x


def recursion_prox_pda(W, g, x, alpha, steps):
    """With a row of the incidence matrix an edge, multipliers an edge, and edges as heavy as W."""
    n = len(W)
    edges = [(i, j) for i in range(n) for j in range(i) if W[i, j]]
    A = np.zeros((len(edges), n))
    for row, (i, j) in zip(A, edges, strict=True):
        row[i], row[j] = math.sqrt(W[i, j]), -math.sqrt(W[i, j])
    degrees = np.diag(1 - np.diag(W))
    beta = 1 / (2 * alpha * (1 - np.diag(W)).min())
    dual = beta * A @ x
    for _ in range(steps):
        right = beta * np.abs(A).T @ np.abs(A) @ x - g(x) - A.T @ dual
        x = np.linalg.solve(2 * beta * degrees, right)
        dual = dual + beta * A @ x
        yield x


def recursion_local(W, g, x, alpha, steps):
    for step in range(steps):
        x = x - alpha * g(x)
        x = W @ x if step % 5 == 4 else x
        yield x


RECURSIONS = {
    "dsgd": recursion_dsgd,
    "gt": recursion_gt,
    "extra": recursion_extra,
    "d2": recursion_d2,
    "prox_pda": recursion_prox_pda,
    "local": recursion_local,
}


@pytest.mark.parametrize("method", RECURSIONS)
@pytest.mark.parametrize("graph", ["ring", "star"])
def test_update_is_the_papers_recursion(method, graph):
    mixing = getattr(Topology, graph)(N).mixing(lazy=True)
    stacked = gradients(problem())

    def g(x):
        return stacked(torch.from_numpy(x), 0).numpy()

    ours = agents(method, mixing)
    theirs = RECURSIONS[method](mixing.matrix.numpy(), g, start().numpy(), 0.1, 40)
    for expected in theirs:
        np.testing.assert_allclose(ours.step().numpy(), expected, rtol=0, atol=1e-12)
    assert ours.gossip.rounds_done == (8 if method == "local" else 40)


@pytest.mark.parametrize("n", [4, 5])
def test_prox_pda_is_extra_with_neighbours_average(n):
    ring = Topology.ring(n)
    average = MixingMatrix(ring.adjacency.double() / 2)
    a, x = problem(n), start(n)
    extra = SimulatedAgents("extra", gradients(a), x, average, 0.1)
    for weights in ("metropolis", "laplacian"):  # all of a ring's edges weigh the same
        prox = SimulatedAgents("prox_pda", gradients(a), x, ring.mixing(weights), 0.1)
        other = SimulatedAgents("extra", gradients(a), x, average, 0.1)
        for _ in range(100):
            torch.testing.assert_close(prox.step(), other.step(), rtol=0, atol=1e-10)
    assert not torch.equal(extra.x, other.x)


def test_chebyshev_filter_solves_the_proximal_system_better_with_more_rounds():
    """Its step is the exact primal step up to 1/T_Q, and equal for the fixed point."""
    mixing, lr = Topology.path(N).mixing(), 0.1
    ours = agents("chebyshev", mixing, lr)
    x, g = start(), gradients(problem())
    L = torch.eye(N, dtype=torch.float64) - mixing.matrix
    beta = 1 / lr / (1 - mixing.lambda2)
    system = torch.eye(N, dtype=torch.float64) / lr + beta * L
    exact = torch.linalg.solve(system, x / lr - g(x, 0) - beta * L @ x)
    kappa = 1 + (1 - mixing.lambda_min) / (1 - mixing.lambda2)
    rounds = math.ceil(math.sqrt(kappa))
    bound = 1 / math.cosh(rounds * math.acosh((kappa + 1) / (kappa - 1)))
    assert (ours.step() - exact).norm() <= bound * (x - exact).norm()
    assert ours.gossip.rounds_done == rounds


def stationarity(simulated, a):
    mean = simulated.x.mean(0).expand_as(simulated.x)
    return float(gradients(a)(mean, 0).mean(0).square().sum())


def test_constant_step_dgd_stalls_where_corrected_methods_converge():
    a = problem()
    for method in ("gt", "extra", "d2", "prox_pda", "chebyshev"):
        simulated = agents(method, lr=0.2)
        simulated.run(3000)
        assert stationarity(simulated, a) < 1e-20, method
        assert simulated.consensus_error() < 1e-20, method
    dgd = agents("dsgd", lr=0.2)
    dgd.run(3000)
    stalled = stationarity(dgd, a), dgd.consensus_error()
    dgd.run(1000)
    assert (stationarity(dgd, a), dgd.consensus_error()) == pytest.approx(stalled, rel=1e-6)
    assert min(stalled) > 1e-6
    for step in range(4000):
        dgd.lr = 0.2 / math.sqrt(step + 1)
        dgd.step()
    assert stationarity(dgd, a) < stalled[0] / 10


def test_solution_of_quadratics_is_the_mean_of_their_centres():
    c = torch.tensor([[1.0, 0.0], [3.0, 8.0], [5.0, 1.0], [7.0, -1.0]], dtype=torch.float64)
    for method in ("gt", "extra", "d2", "prox_pda", "chebyshev", DGET(period=3)):
        simulated = SimulatedAgents(method, lambda x, _: x - c, start(N, 2), LAZY_RING, 0.2)
        simulated.run(800)
        # 800 steps of rounding of values up to 8
        torch.testing.assert_close(simulated.x, c.mean(0).expand(4, 2), rtol=0, atol=1e-11)


def test_federated_averaging_with_one_local_step_is_centralised_descent():
    a, x = problem(), start()[:1].expand(N, D)
    simulated = SimulatedAgents(LocalSGD(1), gradients(a), x, Topology.complete(N), 0.1)
    for _ in range(50):
        x = x - 0.1 * gradients(a)(x, 0).mean(0)
        torch.testing.assert_close(simulated.step(), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_single_agent_does_gradient_descent(method):
    a = problem(1)
    alone = SimulatedAgents(method, gradients(a), start(1), Topology.ring(1), 0.1)
    x = start(1)
    for _ in range(20):
        x = x - 0.1 * gradients(a)(x, 0)
        torch.testing.assert_close(alone.step(), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["dsgd", "gt", "extra", "d2", "prox_pda"])
def test_the_mean_takes_the_current_step_also_when_lr_changes(method):
    simulated, a = agents(method), problem()
    for step in range(30):
        simulated.lr = 0.3 / (step + 1)
        x = simulated.x
        expected = x.mean(0) - simulated.lr * gradients(a)(x, 0).mean(0)
        torch.testing.assert_close(simulated.step().mean(0), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "topology",
    [
        Topology.ring(N),
        Topology.exponential(N),
        TopologySchedule.one_peer_exponential(N),
        TopologySchedule.random_matchings(N, 5, torch.Generator().manual_seed(0)),
    ],
    ids=["ring", "exponential", "one-peer", "matchings"],
)
def test_trackers_have_the_mean_of_the_gradients(topology):
    for method in ("gt", DGET(period=4)):
        simulated = agents(method, topology)
        for _ in range(400):
            simulated.step()
            difference = simulated.vectors["tracker"] - simulated.vectors["gradient"]
            assert difference.mean(0).abs().max() < 1e-13
        assert stationarity(simulated, problem()) < 1e-3


def test_dget_estimates_with_one_batch_at_two_points():
    calls = []

    def recorded(x, step):
        calls.append((step, x))
        return gradients(problem())(x, step)

    simulated = SimulatedAgents(DGET(period=3), recorded, start(), LAZY_RING, 0.1)
    points = [simulated.x]
    for _ in range(5):
        points.append(simulated.step())
    expected = [(0, 0), (1, 1), (1, 0), (2, 2), (2, 1), (3, 3), (4, 4), (4, 3)]
    assert [step for step, _ in calls] == [step for step, _ in expected]
    for (_, x), (_, index) in zip(calls, expected, strict=True):
        assert torch.equal(x, points[index])


# -- gossip ----------------------------------------------------------------------------------------


def test_accelerated_gossip_is_the_chebyshev_polynomial():
    mixing = Topology.grid(3, 3).mixing()
    gossip = SimulatedGossip(mixing, rounds=6, accelerated=True)
    values, vectors = torch.linalg.eigh(mixing.matrix)
    rate = mixing.contraction
    polynomial = torch.special.chebyshev_polynomial_t(values / rate, 6)
    polynomial /= math.cosh(6 * math.acosh(1 / rate))
    expected = vectors @ torch.diag(polynomial) @ vectors.T
    torch.testing.assert_close(gossip.effective.matrix, expected, rtol=0, atol=1e-12)
    x = start(9)
    torch.testing.assert_close(gossip.mix(x), expected @ x, rtol=0, atol=1e-12)
    assert gossip.rounds_done == 6
    assert gossip.bytes_sent == 6 * 24 * D * 8


def test_ten_thousand_accelerated_rounds_do_not_overflow():
    mixing = Topology.ring(6).mixing()
    x = start(6)
    mixed = chebyshev_rounds(lambda z: mixing.matrix @ z, x, 10_000, mixing.contraction)
    torch.testing.assert_close(mixed, x.mean(0).expand(6, D), rtol=0, atol=1e-10)
    assert torch.equal(chebyshev_rounds(lambda z: z / 0, x, 0, 0.5), x)
    with pytest.raises(ValueError, match=r"contraction must be in \[0, 1\), got 1"):
        chebyshev_rounds(lambda z: z, x, 3, 1.0)


def test_compressed_gossip_keeps_the_mean_and_reaches_it():
    ring, x = Topology.ring(6), start(6, 100)
    plain = SimulatedGossip(ring)
    for compressor, gamma in ((TopK(0.3), 0.5), (RandomK(0.5), 0.5), (NaturalCompressor(), 0.9)):
        gossip = SimulatedGossip(
            ring,
            compressor=compressor,
            gamma=gamma,
            generator=torch.Generator().manual_seed(0),
        )
        y = x
        for _ in range(200):
            y = gossip.mix(y)
        torch.testing.assert_close(y.mean(0), x.mean(0), rtol=0, atol=1e-12)
        assert (y - x.mean(0)).norm() < 1e-4 * (x - x.mean(0)).norm(), compressor
    plain.mix(x)
    per_round = gossip.bytes_sent / gossip.rounds_done
    assert per_round < plain.bytes_sent / 3  # 12 bits rather than 64, and the headers


def test_identity_compression_is_plain_gossip():
    plain, identity = agents("gt"), agents("gt", compressor=Identity())
    for _ in range(30):
        torch.testing.assert_close(identity.step(), plain.step(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", ["dsgd", "gt", "local"])
def test_training_with_compressed_gossip(method):
    plain = agents(method, lr=0.05)
    compressed = agents(method, lr=0.05, compressor=TopK(0.34), gamma=0.3)
    plain.run(800), compressed.run(800)
    assert stationarity(compressed, problem()) < max(1e-20, 100 * stationarity(plain, problem()))


# -- what is refused -------------------------------------------------------------------------------


def test_conditions_on_the_weights():
    ring = Topology.ring(4)  # weights 1/3: λ_min is −1/3 exactly
    with pytest.raises(ValueError, match=r"D2 needs weights with λ_min > -1/3, got -0\.333333"):
        agents("d2", ring)
    SimulatedAgents("d2", gradients(problem(5)), start(5), Topology.ring(5), 0.1)  # odd: above
    with pytest.raises(ValueError, match="connected"):
        agents("d2", Topology([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]))
    flip = MixingMatrix([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="DGD needs weights that contract, got a spectral gap"):
        SimulatedAgents("dsgd", gradients(problem(2)), start(2), flip, 0.1)
    for method in ("extra", "prox_pda", "d2", "chebyshev"):
        with pytest.raises(ValueError, match="needs symmetric weights"):
            agents(method, Topology.exponential(N))
        with pytest.raises(ValueError, match="needs one matrix W"):
            agents(method, TopologySchedule.one_peer_exponential(N))
        with pytest.raises(ValueError, match="needs one matrix W"):
            agents(method, compressor=TopK(0.5))
    negative = Topology.star(4).mixing("laplacian")
    assert negative.lambda_min == pytest.approx(-0.6)
    agents("extra", negative)
    with pytest.raises(ValueError, match=r"EXTRA needs weights with λ_min ≥ -1, got -1\.105"):
        agents("extra", Topology.star(4).mixing("laplacian", tau=1.9))


def test_d2_diverges_just_beyond_its_limit():
    """What the refusal protects from: the mode at λ_min leaves although gradients vanish."""

    def norm(lambda_min):
        half = (1 - lambda_min) / 2
        mixing = MixingMatrix([[1 - half, half], [half, 1 - half]])
        quadratic = SimulatedAgents("dsgd", lambda x, _: 0 * x, torch.eye(2).double(), mixing, 1.0)
        quadratic.method, quadratic.vectors = D2(), {"correction": torch.zeros(2, 2).double()}
        x = quadratic.run(400)
        return float((x - x.mean(0)).norm())

    assert norm(-0.30) < 1e-6
    assert norm(-0.37) > 1e6


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"method must be one of 'dsgd', .* got 'sgd'"):
        agents("sgd")
    with pytest.raises(ValueError, match="lr must not be negative, got -1"):
        agents("gt", lr=-1)
    with pytest.raises(ValueError, match=r"x0 must be .* with 3 rows, .* shape \(4, 6\)"):
        agents("gt", Topology.ring(3))
    with pytest.raises(TypeError, match="expected a Topology or a MixingMatrix, got str"):
        agents("gt", "ring")
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        agents("gt", rounds=0)
    with pytest.raises(ValueError, match="accelerated needs one symmetric matrix"):
        agents("gt", Topology.exponential(N), rounds=2, accelerated=True)
    with pytest.raises(ValueError, match="compressor needs weights that do not change"):
        agents("gt", TopologySchedule.one_peer_exponential(N), compressor=TopK(0.5))
    with pytest.raises(TypeError, match="compressor must be a compressor, got float"):
        agents("gt", compressor=0.5)
    with pytest.raises(ValueError, match="compressor must keep no memory"):
        agents("gt", compressor=ErrorFeedback(TopK(0.5)))
    with pytest.raises(ValueError, match="compressor must have a bounded variance"):
        agents("gt", compressor=StochasticIntegerRounding()).step()
    with pytest.raises(ValueError, match="gamma must be positive and goes with a compressor"):
        agents("gt", gamma=0.5)
    for make in (LocalSGD, DGET):
        with pytest.raises(ValueError, match="period must be at least 1 step, got 0"):
            make(period=0)
    for method in ("prox_pda", "chebyshev"):
        with pytest.raises(ValueError, match="lr must be positive"):
            agents(method, lr=0.0).step()
    gossip = SimulatedGossip(LAZY_RING, compressor=TopK(0.5))
    gossip.mix(start())
    with pytest.raises(ValueError, match=r"x must have shape \(4, 6\) as before"):
        gossip.mix(start(4, 7))
    with pytest.raises(ValueError, match=r"shape \(4, d\), a row an agent, got \(3, 6\)"):
        SimulatedGossip(LAZY_RING).mix(start(3))


def test_simulation_resumes():
    options = {"compressor": RandomK(0.5), "gamma": 0.2}
    whole = agents("gt", **options, generator=torch.Generator().manual_seed(0))
    half = agents("gt", **options, generator=torch.Generator().manual_seed(0))
    whole.run(10)
    half.run(5)
    buffer = io.BytesIO()
    torch.save(half.state_dict(), buffer)
    buffer.seek(0)
    resumed = agents("gt", **options, generator=torch.Generator().manual_seed(7))
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(resumed.run(5), whole.x)
    assert resumed.gossip.bytes_sent == whole.gossip.bytes_sent


# -- processes -------------------------------------------------------------------------------------

SETTINGS = {
    "dsgd": {"method": "dsgd"},
    "local": {"method": LocalSGD(3)},
    "gt": {"method": "gt"},
    "extra": {"method": "extra"},
    "prox_pda": {"method": "prox_pda"},
    "d2": {"method": "d2"},
    "dget": {"method": DGET(period=4)},
    "chebyshev": {"method": "chebyshev"},
    "rounds": {"method": "gt", "rounds": 3},
    "accelerated": {"method": "extra", "rounds": 3, "accelerated": True},
    "directed": {"method": "gt", "topology": Topology.exponential(N)},
    "complete": {"method": "local", "topology": Topology.complete(N)},
    "star": {"method": "prox_pda", "topology": Topology.star(N)},
    "schedule": {"method": "gt", "topology": TopologySchedule.one_peer_exponential(N)},
    "top-k": {"method": "gt", "compressor": TopK(0.5), "gamma": 0.3},
    "random-k": {"method": "dsgd", "compressor": RandomK(0.5), "gamma": 0.3},
    "natural": {"method": "dsgd", "compressor": Compose(NaturalCompressor(), TopK(0.5))},
}


class Model(nn.Module):
    """Two parameters, so that messages are made of pieces."""

    def __init__(self, x):
        super().__init__()
        self.first = nn.Parameter(x[:2].clone())
        self.rest = nn.Parameter(x[2:].clone().view(2, 2))

    def forward(self, a):
        x = torch.cat([self.first, self.rest.flatten()])
        return loss(a, x)


def make_optimizer(settings, **more):
    rank = dist.get_rank()
    a, model = problem()[rank], Model(start()[rank])
    options = {"topology": LAZY_RING, "lr": 0.1} | settings | more
    generator = torch.Generator().manual_seed(5)
    optimizer = DecentralizedOptimizer(model.parameters(), **options, generator=generator)

    def closure():
        optimizer.zero_grad()
        value = model(a)
        value.backward()
        return value

    return model, optimizer, closure


def flat(model):
    return torch.cat([model.first, model.rest.flatten()]).detach()


def train_all(names):
    results = {}
    for name in names:
        model, optimizer, closure = make_optimizer(SETTINGS[name])
        xs, means = [], []
        for _ in range(STEPS):
            optimizer.step(closure)
            xs.append(flat(model))
            if "tracker" in optimizer.vectors:
                difference = optimizer.vectors["tracker"] - optimizer.vectors["gradient"]
                means.append(float(optimizer.gossip.mean(difference).abs().max()))
        results[name] = {
            "x": torch.stack(xs),
            "bytes": optimizer.gossip.bytes_sent,
            "rounds": optimizer.gossip.rounds_done,
            "tracking": means,
            "consensus": optimizer.consensus_error(),
            "stationarity": optimizer.stationarity(closure),
            "unmoved": torch.equal(flat(model), xs[-1]),
        }
    return results


@pytest.mark.processes
def test_processes_do_what_the_simulation_does():
    results = spawn(train_all, N, tuple(SETTINGS))
    for name, settings in SETTINGS.items():
        options = {"topology": LAZY_RING, "lr": 0.1} | settings
        simulated = agents(**options, generator=torch.Generator().manual_seed(5))
        for step in range(STEPS):
            x = torch.stack([result[name]["x"][step] for result in results])
            torch.testing.assert_close(simulated.step(), x, rtol=0, atol=1e-12, msg=name)
        tracking = [value for result in results for value in result[name]["tracking"]]
        assert all(value < 1e-14 for value in tracking), name
        assert bool(tracking) == ("tracker" in simulated.vectors)
        mine = results[0][name]
        assert mine["rounds"] == simulated.gossip.rounds_done
        if not tracking:  # `mean` above is traffic too
            sent = sum(result[name]["bytes"] for result in results)
            assert sent == simulated.gossip.bytes_sent, name
        assert mine["consensus"] == pytest.approx(simulated.consensus_error(), rel=1e-12)
        assert mine["stationarity"] == pytest.approx(stationarity(simulated, problem()), rel=1e-9)
        assert all(result[name]["unmoved"] for result in results)


CONTINUED = ("gt", "d2", "dget", "top-k", "random-k", "schedule")


def first_half(folder):
    for name in CONTINUED:
        model, optimizer, closure = make_optimizer(SETTINGS[name])
        for _ in range(5):
            optimizer.step(closure)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, f"{folder}/{name}-{dist.get_rank()}.pt")


def second_half(folder):
    results = {}
    for name in CONTINUED:
        model, optimizer, closure = make_optimizer(SETTINGS[name])
        state = torch.load(f"{folder}/{name}-{dist.get_rank()}.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for _ in range(STEPS - 5):
            optimizer.step(closure)
        results[name] = flat(model), optimizer.steps
    return results


@pytest.mark.processes
def test_training_continues_from_state_dicts_in_fresh_processes(tmp_path):
    spawn(first_half, N, str(tmp_path))
    results = spawn(second_half, N, str(tmp_path))
    for name in CONTINUED:
        options = {"topology": LAZY_RING, "lr": 0.1} | SETTINGS[name]
        simulated = agents(**options, generator=torch.Generator().manual_seed(5))
        x = torch.stack([result[name][0] for result in results])
        torch.testing.assert_close(simulated.run(STEPS), x, rtol=0, atol=1e-12, msg=name)
        assert results[0][name][1] == STEPS


def odd_jobs():
    """What needs a group but no more than two ranks."""
    rank, pair = dist.get_rank(), Topology.ring(2)
    # Momentum as the inner optimiser, against the same by hand.
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data.fill_(rank)
    twin = nn.Linear(2, 1, bias=False).double()
    twin.weight.data.fill_(rank)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = DecentralizedOptimizer(model.parameters(), pair, 1.0, "dsgd", inner=inner)
    reference = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    gossip = Gossip(pair)
    x = torch.full((3, 2), 1.0 + rank, dtype=torch.float64)
    for _ in range(5):
        for net in (model, twin):
            net.zero_grad()
            net(x).square().mean().backward()
        optimizer.step()
        before = twin.weight.detach().clone()
        mixed = gossip.mix(before.flatten()).view_as(before)
        reference.step()
        twin.weight.data += mixed - before
    momentum = float((model.weight - twin.weight).abs().max())

    # Groups with rates of their own, a parameter without a gradient, and a scheduler.
    still = nn.Parameter(torch.full((2,), float(rank)))
    fast, slow = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [{"params": [still, fast]}, {"params": [slow], "lr": 0.1}]
    optimizer = DecentralizedOptimizer(groups, pair, 0.2, "dsgd")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    (fast + slow).sum().backward()
    for _ in range(2):
        optimizer.step()
        schedule.step()
    groups_end = still.tolist(), round(fast.item(), 6), round(slow.item(), 6)

    # Buffers are averaged when asked, counters left alone.
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(rank)
    norm.num_batches_tracked.fill_(rank + 5)
    gossip.average_(norm.buffers())
    optimizer.average_parameters_()

    errors = []
    for build in (
        lambda: Gossip(pair if rank else pair.mixing(lazy=True)),
        lambda: gossip.mix(torch.zeros(3 + rank)),
        lambda: Gossip(Topology.ring(3)),
        lambda: Gossip(pair, timeout=0.0),
        lambda: DecentralizedOptimizer(norm.parameters(), pair, 0.1, "gt", inner=inner),
        lambda: DecentralizedOptimizer(norm.parameters(), pair, 0.1, "dsgd", inner=inner),
        lambda: DecentralizedOptimizer([still, nn.Parameter(x)], pair, 0.1),
        lambda: DecentralizedOptimizer([still], pair, 0.1, "dget").load_state_dict(
            optimizer.state_dict()
        ),
    ):
        try:
            build()
        except (ValueError, TypeError) as error:
            errors.append(str(error))
    dget = DecentralizedOptimizer([still], pair, 0.1, DGET(period=2))
    full = []
    for _ in range(2):
        full.append(dget.needs_full_batch)
        try:
            dget.step()
        except ValueError as error:
            errors.append(str(error))
    return {
        "momentum": momentum,
        "groups": groups_end,
        "norm": (norm.running_mean.item(), norm.num_batches_tracked.item()),
        "errors": errors,
        "full": full,
    }


@pytest.mark.processes
def test_odd_jobs():
    results = spawn(odd_jobs, 2)
    for rank, result in enumerate(results):
        assert result["momentum"] < 1e-14
        # 0.2 + 0.1, and 0.1 + 0.05; two rounds of pair averaging make `still` equal.
        assert result["groups"] == ([0.5, 0.5], pytest.approx(-0.3), pytest.approx(-0.15))
        assert result["norm"] == (0.5, rank + 5)
        assert result["full"] == [True, False]
    expected = (
        "same weights and settings",
        "same number of entries and dtype",
        "topology must have 2 agents, one a rank of the group, got 3",
        "timeout must be positive seconds, got 0.0",
        "inner goes with 'dsgd' and 'local' only",
        "inner must be an optimiser of the same parameters",
        "params must have one dtype and device",
        "the memory of one method means nothing to another",
        "closure must be given",
    )
    for error, text in zip(results[0]["errors"], expected, strict=True):
        assert text in error


def draws_in_the_closure():
    """D-GET asks one batch at two points: what is drawn in the closure is the same at both."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = DecentralizedOptimizer([parameter], Topology.ring(2), 0.1, DGET(period=10))
    drawn = []

    def closure():
        optimizer.zero_grad()
        drawn.append(torch.rand(()).item())
        parameter.sum().backward()

    for _ in range(3):
        optimizer.step(closure)
    return drawn


@pytest.mark.processes
def test_dget_draws_the_same_at_both_points():
    first, a, b, c, d = spawn(draws_in_the_closure, 2)[0]
    assert a == b
    assert c == d
    assert len({first, a, c}) == 3


# -- messages that travel during the backward pass -------------------------------------------------

OVERLAPPED = ("dsgd", "gt", "extra", "prox_pda", "dget", "chebyshev", "rounds", "accelerated",
              "directed", "schedule")  # fmt: skip


def overlapping():
    """Each method with and without overlap, by closure and by backward pass and step."""
    results = {}
    for name in (*OVERLAPPED, "dsgd, complete"):
        settings = SETTINGS.get(name, {"method": "dsgd", "topology": Topology.complete(N)})
        for by_closure in (True, False):
            if name == "dget" and not by_closure:
                continue
            ends = []
            for overlap in (False, True):
                model, optimizer, closure = make_optimizer(settings, overlap=overlap)
                posted = []
                for step in range(STEPS):
                    if by_closure:
                        optimizer.step(closure)
                    else:
                        before = optimizer.gossip.bytes_sent
                        closure()
                        posted.append(optimizer.gossip.bytes_sent > before)
                        optimizer.step()
                    if step == 3:  # what looks at gradients elsewhere sends nothing
                        optimizer.stationarity(closure)
                        optimizer.zero_grad()
                    if step == 5:
                        model, optimizer = copy.deepcopy((model, optimizer))
                        a = problem()[dist.get_rank()]

                        def closure(model=model, optimizer=optimizer, a=a):
                            optimizer.zero_grad()
                            value = model(a)
                            value.backward()
                            return value

                ends.append((flat(model), optimizer.gossip.bytes_sent, posted))
            results[name, by_closure] = ends

    model, optimizer, closure = make_optimizer({"method": "dsgd"}, overlap=True)
    closure()
    model.first.data += 1
    errors = []
    for call in (
        optimizer.step,
        lambda: make_optimizer({"method": "d2"}, overlap=True),
        lambda: make_optimizer({"method": "local"}, overlap=True),
        lambda: make_optimizer(SETTINGS["top-k"], overlap=True),
    ):
        try:
            call()
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
    # Hooks do not outlive the optimiser.
    model, optimizer, closure = make_optimizer({"method": "dsgd"}, overlap=True)
    gossip = optimizer.gossip
    a = problem()[dist.get_rank()]
    del optimizer, closure
    gc.collect()
    sent = gossip.bytes_sent
    model(a).backward()
    return results, errors, gossip.bytes_sent == sent


@pytest.mark.processes
def test_overlap_with_the_backward_pass_changes_nothing_but_when():
    for results, errors, silent in spawn(overlapping, N):
        for name, ((x, sent, _), (y, sent_too, posted)) in results.items():
            assert torch.equal(x, y), name
            assert sent == sent_too > 0, name
            assert all(posted), name
        assert len(results) == 2 * len(OVERLAPPED) + 1
        assert "must stay as they are from the backward pass to the step" in errors[0]
        assert "what it sends depends on the gradient" in errors[1]
        assert "what it sends depends on the gradient" in errors[2]
        assert "overlap goes with no compressor" in errors[3]
        assert silent


# -- a rank that dies ------------------------------------------------------------------------------


def trains_until_it_cannot(pipe, rank, size, port, how):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    options = {"method": "gt", "topology": Topology.path(size), "timeout": 4.0}
    _, optimizer, closure = make_optimizer(options)
    for step in range(1000):
        if step == 5 and rank == size - 1:
            pipe.send("five steps")
            if how == "silent":
                time.sleep(60)
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        try:
            optimizer.step(closure)
        except RuntimeError as error:
            pipe.send((str(error), time.monotonic() - begin))
            return


@pytest.mark.processes
@pytest.mark.parametrize("how", ["dead", "silent"])
def test_a_lost_rank_is_a_clear_error_for_all_others(how):
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    size = 3  # on a path: rank 0 is no neighbour of the one that is lost
    try:
        for rank in range(size):
            ours, theirs = context.Pipe()
            job = (theirs, rank, size, store.port, how)
            process = context.Process(target=trains_until_it_cannot, args=job, daemon=True)
            process.start()
            pipes.append(ours)
            processes.append(process)
        assert pipes[2].poll(120)
        for rank, pipe in enumerate(pipes[:2]):
            assert pipe.poll(60)
            message, seconds = pipe.recv()
            # What rank 1 sent in round 6 may still have reached rank 0.
            assert re.match(f"rank {rank} lost rank {rank + 1} in gossip round [67]: it", message)
            assert "Restart all ranks from their last checkpoint" in message
            # A silent rank is waited for, and its neighbour's neighbour no longer than that.
            assert seconds < 30
    finally:
        for process in processes:
            process.kill()
            process.join()


def takes_a_first_step(pipe, rank, size, port, topology):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    if rank == 1:
        time.sleep(FIRST_TIMEOUT + 2)  # a slow start is no silence
    options = {"method": "dsgd", "topology": topology, "timeout": FIRST_TIMEOUT}
    _, optimizer, closure = make_optimizer(options)
    if rank == 1:
        pipe.send("constructed")
        time.sleep(120)
    begin = time.monotonic()
    try:
        optimizer.step(closure)
    except RuntimeError as error:
        pipe.send((str(error), time.monotonic() - begin))


FIRST_TIMEOUT = 3.0


@pytest.mark.processes
@pytest.mark.parametrize(
    "topology", [Topology.complete(2), Topology.ring(2).mixing(lazy=True)], ids=["complete", "lazy"]
)
def test_the_timeout_holds_for_the_first_step_too_and_the_process_ends(topology):
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    try:
        for rank in range(2):
            ours, theirs = context.Pipe()
            job = (theirs, rank, 2, store.port, topology)
            process = context.Process(target=takes_a_first_step, args=job, daemon=True)
            process.start()
            pipes.append(ours)
            processes.append(process)
        assert pipes[1].poll(120)
        assert pipes[1].recv() == "constructed"
        assert pipes[0].poll(60)
        message, seconds = pipes[0].recv()
        assert message.startswith("rank 0 lost another rank in gossip round")
        assert "was silent for 3 s" in message
        # The silent rank lives for two minutes, and gloo's own timeout is half an hour.
        assert FIRST_TIMEOUT - 0.5 < seconds < 30
        processes[0].join(45)
        assert processes[0].exitcode == 0
        assert processes[1].is_alive()
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_methods_by_name_and_instance_are_the_same():
    for name, method in (("gt", GradientTracking()), ("extra", EXTRA()), ("prox_pda", ProxPDA())):
        assert torch.equal(agents(name).run(3), agents(method).run(3))

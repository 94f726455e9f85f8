"""Graphs against networkx, spectra against closed forms, and what must be refused."""

import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.distributed import (
    MixingMatrix,
    SimulatedGossip,
    Topology,
    TopologySchedule,
    chebyshev_rounds,
)

GRAPHS = {
    "ring": (Topology.ring(7), nx.cycle_graph(7)),
    "ring of two": (Topology.ring(2), nx.path_graph(2)),
    "path": (Topology.path(5), nx.path_graph(5)),
    "star": (Topology.star(6), nx.star_graph(5)),
    "complete": (Topology.complete(5), nx.complete_graph(5)),
    "grid": (
        Topology.grid(3, 4),
        nx.convert_node_labels_to_integers(nx.grid_2d_graph(3, 4), ordering="sorted"),
    ),
    "torus": (
        Topology.torus(3, 4),
        nx.convert_node_labels_to_integers(
            nx.grid_2d_graph(3, 4, periodic=True), ordering="sorted"
        ),
    ),
    "hypercube": (
        Topology.hypercube(3),
        nx.convert_node_labels_to_integers(nx.hypercube_graph(3), ordering="sorted"),
    ),
    "exponential": (
        Topology.exponential(6),
        nx.DiGraph([((i - s) % 6, i) for s in (1, 2, 4) for i in range(6)]),
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_are_networkx_ones(name):
    ours, theirs = GRAPHS[name]
    ordered = nx.DiGraph() if theirs.is_directed() else nx.Graph()
    ordered.add_nodes_from(sorted(theirs.nodes))
    ordered.add_edges_from(theirs.edges)
    expected = nx.to_numpy_array(ordered).T != 0  # row: who listens
    np.testing.assert_array_equal(ours.adjacency.numpy(), expected)
    assert torch.equal(Topology.from_networkx(ordered).adjacency, ours.adjacency)
    listeners = [list(map(int, np.flatnonzero(row))) for row in expected]
    assert [list(ours.neighbors(rank)) for rank in range(ours.size)] == listeners


def test_a_torus_of_one_row_is_a_ring():
    assert torch.equal(Topology.torus(1, 5).adjacency, Topology.ring(5).adjacency)


def test_networkx_names_and_self_loops_are_left_behind():
    graph = nx.Graph([("b", "a"), ("a", "c"), ("a", "a")])
    assert Topology.from_networkx(graph).degrees.tolist() == [1, 2, 1]  # b, a, c


def test_erdos_renyi_is_seeded_and_connected():
    def draw(seed):
        return Topology.erdos_renyi(12, 0.2, torch.Generator().manual_seed(seed)).adjacency

    for seed in range(20):
        assert nx.is_connected(nx.from_numpy_array(draw(seed).numpy()))
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    with pytest.raises(ValueError, match="p must be larger: a thousand graphs of 5 agents"):
        Topology.erdos_renyi(5, 0.0)
    with pytest.raises(ValueError, match=r"p must be a probability, got 1\.5"):
        Topology.erdos_renyi(5, 1.5)


@pytest.mark.parametrize("n", [3, 8, 32])
def test_spectrum_of_a_ring(n):
    mixing = Topology.ring(n).mixing()
    k = torch.arange(n, dtype=torch.float64)
    expected = (1 / 3 + 2 / 3 * torch.cos(2 * math.pi * k / n)).sort().values
    torch.testing.assert_close(mixing.eigenvalues, expected, rtol=0, atol=1e-14 * n)
    assert mixing.contraction == pytest.approx(float(expected.abs().sort().values[-2]), abs=1e-13)
    assert mixing.spectral_gap == Topology.ring(n).spectral_gap
    assert mixing.lazy().lambda2 == pytest.approx((1 + mixing.lambda2) / 2, abs=1e-14)


@pytest.mark.parametrize("weights", ["metropolis", "max_degree", "laplacian"])
@given(n=st.integers(2, 9), seed=st.integers(0, 1000))
def test_weights_of_any_connected_graph_average(weights, n, seed):
    graph = Topology.erdos_renyi(n, 0.6, torch.Generator().manual_seed(seed))
    mixing = graph.mixing(weights)
    assert mixing.symmetric
    off = mixing.matrix - torch.diag(mixing.diagonal)
    assert torch.equal(off != 0, graph.adjacency)
    assert mixing.contraction < 1 or weights == "max_degree"
    assert graph.mixing(weights, lazy=True).contraction < 1
    assert mixing.sources(0) == list(graph.neighbors(0)) == mixing.targets(0)


def test_closed_form_weights_on_a_star():
    star = Topology.star(4)
    metropolis = star.mixing().matrix
    assert metropolis[0].tolist() == [0.25] * 4
    assert metropolis[1].tolist() == [0.25, 0.75, 0, 0]
    torch.testing.assert_close(star.mixing("max_degree").matrix, metropolis)
    # Laplacian of a star: eigenvalues 0, 1 (twice), 4, so the best τ is 5/2.
    best = star.mixing("laplacian")
    assert best.contraction == pytest.approx(0.6, abs=1e-12)
    for tau in (2.2, 2.4, 2.6, 3.0):
        assert star.mixing("laplacian", tau=tau).contraction > best.contraction


def test_directed_graphs():
    mixing = Topology.exponential(6).mixing()
    assert not mixing.symmetric
    assert mixing.diagonal.tolist() == [0.25] * 6
    with pytest.raises(ValueError, match="matrix must be symmetric to have real eigenvalues"):
        _ = mixing.lambda2
    assert mixing.report()["rounds, accelerated"] is None
    with pytest.raises(ValueError, match="tau must be given for a directed graph"):
        Topology.exponential(6).mixing("laplacian")
    unbalanced = Topology([[0, 1, 1], [1, 0, 0], [0, 1, 0]])
    with pytest.raises(ValueError, match="columns that sum to 1"):
        unbalanced.mixing()


def test_report_counts_the_rounds_that_gossip_takes():
    mixing = Topology.ring(16).mixing()
    report = mixing.report(1e-6)
    eigenvector = torch.linalg.eigh(mixing.matrix).eigenvectors[:, -2:-1]  # the slowest error
    rounds = report["rounds"]
    assert (torch.linalg.matrix_power(mixing.matrix, rounds) @ eigenvector).norm() <= 1e-6
    assert (torch.linalg.matrix_power(mixing.matrix, rounds - 1) @ eigenvector).norm() > 1e-6
    rounds = report["rounds, accelerated"]

    def accelerated(count):
        found = chebyshev_rounds(mixing.matrix.matmul, eigenvector, count, mixing.contraction)
        return found.norm()

    assert accelerated(rounds) <= 1e-6 < accelerated(rounds - 1)
    assert (report["agents"], report["messages"]) == (16, 32)
    assert Topology.complete(4).mixing().report()["rounds"] == 1


def test_one_peer_exponential_averages_exactly_in_log_n_rounds():
    gossip = SimulatedGossip(TopologySchedule.one_peer_exponential(8))
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = gossip.mix(gossip.mix(gossip.mix(x)))
    torch.testing.assert_close(y, x.mean(0).expand(8, 3), rtol=0, atol=1e-15)
    assert gossip.bytes_sent == 3 * 8 * 3 * 8  # a message an agent and round


@pytest.mark.parametrize("n", [6, 7])
def test_random_matchings_pair_agents(n):
    schedule = TopologySchedule.random_matchings(n, 12, torch.Generator().manual_seed(0))
    for phase in schedule.phases:
        partners = [phase.sources(agent) for agent in range(n)]
        assert sum(map(len, partners)) == n // 2 * 2
        assert all(agent in phase.sources(p[0]) for agent, p in enumerate(partners) if p)
    assert schedule.period == 12
    assert 0 < schedule.spectral_gap < 1
    assert schedule.at(13) is schedule.phases[1]


def test_a_single_agent():
    for graph in (Topology.ring(1), Topology.complete(1), Topology.star(1), Topology.hypercube(0)):
        mixing = graph.mixing("laplacian")
        assert (mixing.spectral_gap, mixing.lambda2, mixing.lambda_min) == (1, 0, 0)
    assert TopologySchedule.one_peer_exponential(1).size == 1


def test_what_is_no_graph():
    with pytest.raises(ValueError, match=r"square matrix, got shape \(2, 3\)"):
        Topology(torch.ones(2, 3))
    with pytest.raises(ValueError, match="no self-loops"):
        Topology(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"it has 2 parts, e\.g\. agents \[0, 1\]"):
        Topology.from_networkx(nx.Graph([(0, 1), (2, 3)]))
    with pytest.raises(ValueError, match="it has 3 parts"):
        Topology([[0, 0, 0], [1, 0, 0], [0, 1, 0]])  # nobody answers
    with pytest.raises(ValueError, match="n must be at least 1 agent, got 0"):
        Topology.ring(0)
    with pytest.raises(ValueError, match=r"rank must be in 0 … 3, got 4"):
        Topology.ring(4).neighbors(4)
    with pytest.raises(ValueError, match="weights must be 'metropolis'"):
        Topology.ring(4).mixing("uniform")
    with pytest.raises(ValueError, match="tau must be positive and goes with 'laplacian'"):
        Topology.ring(4).mixing(tau=2.0)


def test_what_is_no_mixing_matrix():
    with pytest.raises(ValueError, match=r"square, got shape \(3,\)"):
        MixingMatrix([1, 0, 0])
    with pytest.raises(ValueError, match="finite"):
        MixingMatrix([[math.nan]])
    with pytest.raises(ValueError, match=r"rows that sum to 1, but row 0 sums to 1\.5"):
        MixingMatrix([[1, 0.5], [0, 1]])
    with pytest.raises(ValueError, match=r"columns that sum to 1, but column 0 sums to 1\.5"):
        MixingMatrix([[1, 0], [0.5, 0.5]])
    with pytest.raises(ValueError, match="it has 2 parts"):
        MixingMatrix(torch.eye(2))


def test_what_is_no_schedule():
    with pytest.raises(ValueError, match="at least one topology"):
        TopologySchedule([])
    with pytest.raises(ValueError, match=r"one number of agents, got \[3, 4\]"):
        TopologySchedule([Topology.ring(3), Topology.ring(4)])
    with pytest.raises(TypeError, match="expected a Topology or a MixingMatrix, got int"):
        TopologySchedule([3])
    halves = Topology([[0, 1, 0], [1, 0, 0], [0, 0, 0]], connected=False)
    with pytest.raises(ValueError, match="phases together must be a connected graph"):
        TopologySchedule([halves, halves])

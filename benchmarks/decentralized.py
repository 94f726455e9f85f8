"""Decentralised training: the stacked simulation, and what a mixing costs between processes."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from assay.distributed import Gossip, LinkModel, SimulatedGossip, Topology
from assay.distributed.namespaces import ShapedNetwork, not_permitted
from assay.distributed.testing import spawn
from assay.lab import at_most
from assay.lab.bench import Comparison, Samples, benchmark

AGENTS, ENTRIES = 32, 10_000
MESSAGE = 1_000_000
ROUNDS = 12


def _against_loop(topology: Topology, name: str) -> Comparison:
    x = torch.randn(AGENTS, ENTRIES, dtype=torch.float64)
    gossip = SimulatedGossip(topology)
    weights = gossip.phases[0].matrix

    def loop() -> Tensor:
        mixed = torch.empty_like(x)
        for agent in range(AGENTS):
            row = weights[agent, agent] * x[agent]
            for other in gossip.phases[0].sources(agent):
                row = row + weights[agent, other] * x[other]
            mixed[agent] = row
        return mixed

    torch.testing.assert_close(gossip.mix(x), loop())
    return Comparison(
        ours=lambda: gossip.mix(x),
        peer=loop,
        peer_name=f"Python loop over agents and neighbours, {name}",
        peer_version=torch.__version__,
    )


@benchmark(
    "stacked mixing vs a loop over agents, 32 agents, 10⁴ entries, complete",
    target=at_most(0.05),
    threads=1,
)
def stacked_against_loop_complete() -> Comparison:
    return _against_loop(Topology.complete(AGENTS), "complete")


@benchmark("stacked mixing vs a loop over agents, 32 agents, 10⁴ entries, ring", threads=1)
def stacked_against_loop_ring() -> Comparison:
    return _against_loop(Topology.ring(AGENTS), "ring")


def exchanges(peer: str) -> dict[str, list[float]]:
    """Seconds of our mixing and of the peer's exchange, in turn, on this rank."""
    n, rank = dist.get_world_size(), dist.get_rank()
    gossip, x = Gossip(Topology.ring(n)), torch.randn(MESSAGE)
    neighbours = [(rank - 1) % n, (rank + 1) % n]
    received = [torch.empty_like(x) for _ in neighbours]

    def pair() -> None:
        operations = [
            dist.P2POp(dist.irecv, r, p) for r, p in zip(received, neighbours, strict=True)
        ]
        operations += [dist.P2POp(dist.isend, x, p) for p in neighbours]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def all_reduce() -> None:
        dist.all_reduce(x.clone())

    calls: dict[str, Any] = {
        "ours": lambda: gossip.mix(x),
        "peer": pair if peer == "pair" else all_reduce,
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 2):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in seconds.items()}


def _processes(peer: str, name: str) -> Samples:
    result = spawn(exchanges, 4, peer)[0]
    return Samples(
        ours=result["ours"], peer=result["peer"], peer_name=name, peer_version=torch.__version__
    )


@benchmark(
    "mixing vs one exchange with both neighbours, ring of 4 processes, 10⁶ float32",
    target=at_most(1.2),
)
def mixing_against_exchange() -> Samples:
    return _processes("pair", "batch_isend_irecv, no sums")


@benchmark(
    "mixing vs one exchange with both neighbours, ring of 4 namespaces, 10⁶ float32, 1 Gbit/s",
    target=at_most(1.2),
)
def mixing_against_exchange_over_a_network() -> Samples:
    """Over a link the weighted sums cost little; above, four processes share two cores for them."""
    reason = not_permitted()
    if reason:
        raise ModuleNotFoundError(f"network namespaces: {reason}")
    with ShapedNetwork(4, LinkModel(bandwidth=1e9, latency=1e-4)) as network:
        result = network.spawn(exchanges, "pair")[0]
    return Samples(
        ours=result["ours"],
        peer=result["peer"],
        peer_name="batch_isend_irecv, no sums",
        peer_version=torch.__version__,
    )


@benchmark("mixing vs all-reduce, ring of 4 processes, 10⁶ float32")
def mixing_against_all_reduce() -> Samples:
    return _processes("all-reduce", "all_reduce")

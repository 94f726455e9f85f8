"""Who talks to whom, and with which weights: graphs, mixing matrices and their spectral gap."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import scipy
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

__all__ = ["MixingMatrix", "Topology", "TopologySchedule"]

# Sums of weights and symmetry are checked up to what adding a few hundred float64 loses.
_ROUNDING = 1e-10


class Topology:
    """A communication graph of n agents.

    `adjacency[i, j]` says that agent i hears from agent j; the graph is undirected where the matrix
    is symmetric. Made by one of the constructors (`ring`, `torus`, `erdos_renyi`, …), or from any
    matrix or networkx graph.

    Args:
        adjacency: Square matrix of zeros and ones (or booleans) without self-loops.
        connected: Whether to refuse a graph in which not everybody reaches everybody. The phases of
            a `TopologySchedule` need not be connected each.

    Attributes:
        adjacency: Boolean matrix (n, n).

    Raises:
        ValueError: The matrix is not square, has self-loops or is not connected.

    Example:
        >>> ring = Topology.ring(6)
        >>> ring.neighbors(0)
        (1, 5)
        >>> round(ring.mixing("metropolis").lambda2, 6)  # 1/3 + 2/3 cos(2π/6)
        0.666667
        >>> Topology([[0, 1, 0], [1, 0, 0], [0, 0, 0]])
        Traceback (most recent call last):
            ...
        ValueError: adjacency must be a connected graph, but it has 2 parts, e.g. agents [0, 1]
    """

    def __init__(self, adjacency: object, *, connected: bool = True) -> None:
        matrix = torch.as_tensor(adjacency).detach().cpu()
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
            raise ValueError(f"adjacency must be a square matrix, got shape {tuple(matrix.shape)}")
        self.adjacency: Bool[Tensor, "n n"] = matrix != 0
        if bool(self.adjacency.diagonal().any()):
            raise ValueError("adjacency must have no self-loops, got a diagonal that is not zero")
        if connected:
            _check_connected(self.adjacency, "adjacency")

    def __repr__(self) -> str:
        kind = "" if self.symmetric else ", directed"
        return f"Topology({self.size} agents, {int(self.degrees.sum())} messages a round{kind})"

    @property
    def size(self) -> int:
        """Number of agents."""
        return len(self.adjacency)

    @property
    def symmetric(self) -> bool:
        """Whether every edge goes both ways."""
        return bool((self.adjacency == self.adjacency.T).all())

    @property
    def degrees(self) -> Tensor:
        """How many agents each one hears from, (n,)."""
        return self.adjacency.sum(1)

    @property
    def spectral_gap(self) -> float:
        """Spectral gap of the Metropolis weights."""
        return self.mixing().spectral_gap

    def neighbors(self, rank: int) -> tuple[int, ...]:
        """Agents that `rank` hears from, in order."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank must be in 0 … {self.size - 1}, got {rank}")
        return tuple(self.adjacency[rank].nonzero().flatten().tolist())

    # -- graphs --------------------------------------------------------------------------------

    @classmethod
    def ring(cls, n: int) -> "Topology":
        """A cycle: agent i and i + 1 modulo n."""
        return cls._circulant(n, (1, -1))

    @classmethod
    def path(cls, n: int) -> "Topology":
        """A line from agent 0 to n − 1."""
        return cls.grid(1, n)

    @classmethod
    def star(cls, n: int) -> "Topology":
        """Agent 0 with every other."""
        return cls._from_edges(n, [(0, i) for i in range(1, n)])

    @classmethod
    def complete(cls, n: int) -> "Topology":
        """Everybody with everybody."""
        _check_size(n)
        return cls(~torch.eye(n, dtype=torch.bool))

    @classmethod
    def grid(cls, rows: int, columns: int) -> "Topology":
        """A rectangle; agent r · columns + c sits at (r, c)."""
        return cls._lattice(rows, columns, wrap=False)

    @classmethod
    def torus(cls, rows: int, columns: int) -> "Topology":
        """A rectangle whose opposite sides meet."""
        return cls._lattice(rows, columns, wrap=True)

    @classmethod
    def hypercube(cls, dimension: int) -> "Topology":
        """2^dimension agents; neighbours differ in one bit."""
        if dimension < 0:
            raise ValueError(f"dimension must not be negative, got {dimension}")
        n = 2**dimension
        return cls._from_edges(
            n, [(i, i ^ (1 << bit)) for i in range(n) for bit in range(dimension)]
        )

    @classmethod
    def exponential(cls, n: int) -> "Topology":
        """Agent i hears from i − 2^k modulo n for every 2^k < n; directed, ⌈log₂ n⌉ neighbours."""
        _check_size(n)
        return cls._circulant(n, [-(2**k) for k in range((n - 1).bit_length())])

    @classmethod
    def erdos_renyi(cls, n: int, p: float, generator: Generator | None = None) -> "Topology":
        """Every edge with probability p; drawn again until connected, at most a thousand times."""
        _check_size(n)
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability, got {p}")
        for _ in range(1000):
            upper = (torch.rand(n, n, generator=generator, dtype=torch.float64) < p).triu(1)
            graph = cls(upper | upper.T, connected=False)
            if len(_parts(graph.adjacency)) == 1:
                return graph
        raise ValueError(
            f"p must be larger: a thousand graphs of {n} agents with p = {p} were not connected "
            f"(log(n)/n = {math.log(n) / n:.3g} makes most of them so)"
        )

    @classmethod
    def from_networkx(cls, graph: Any) -> "Topology":
        """Any networkx graph; agents in the order of its nodes, edges j → i of a digraph as heard.

        Edge weights are left out: they go into a `MixingMatrix`.
        """
        number = {node: i for i, node in enumerate(graph.nodes)}
        adjacency = torch.zeros(len(number), len(number), dtype=torch.bool)
        for source, target in graph.edges():
            if source != target:
                adjacency[number[target], number[source]] = True
                if not graph.is_directed():
                    adjacency[number[source], number[target]] = True
        return cls(adjacency)

    @classmethod
    def _from_edges(cls, n: int, edges: Sequence[tuple[int, int]]) -> "Topology":
        _check_size(n)
        adjacency = torch.zeros(n, n, dtype=torch.bool)
        for i, j in edges:
            if i != j:  # a torus of one row
                adjacency[i, j] = adjacency[j, i] = True
        return cls(adjacency)

    @classmethod
    def _circulant(cls, n: int, offsets: Sequence[int]) -> "Topology":
        _check_size(n)
        adjacency = torch.zeros(n, n, dtype=torch.bool)
        agents = torch.arange(n)
        for offset in offsets:
            adjacency[agents, (agents + offset) % n] = True
        adjacency.fill_diagonal_(False)
        return cls(adjacency)

    @classmethod
    def _lattice(cls, rows: int, columns: int, wrap: bool) -> "Topology":
        if rows < 1 or columns < 1:
            raise ValueError(f"rows and columns must be at least 1, got {rows} and {columns}")
        edges = []
        for r in range(rows):
            for c in range(columns):
                if wrap or r + 1 < rows:
                    edges.append((r * columns + c, (r + 1) % rows * columns + c))
                if wrap or c + 1 < columns:
                    edges.append((r * columns + c, r * columns + (c + 1) % columns))
        return cls._from_edges(rows * columns, edges)

    # -- weights -------------------------------------------------------------------------------

    def mixing(
        self, weights: str = "metropolis", *, tau: float | None = None, lazy: bool = False
    ) -> "MixingMatrix":
        """Weights for the edges.

        With degrees d and the Laplacian L:

            metropolis    W_ij = 1 / (1 + max(d_i, d_j))
            max_degree    W = I − L / (1 + max d)
            laplacian     W = I − L / τ

        Args:
            weights: One of the names above.
            tau: τ of "laplacian", above λ_max(L) / 2 or gossip diverges. By default
                (λ_max(L) + λ₂(L)) / 2, the best among constants for an undirected graph.
            lazy: Take (I + W) / 2, whose eigenvalues are not negative.

        Returns:
            The matrix.

        Raises:
            ValueError: `weights` is unknown, `tau` is not positive or belongs to other weights, or
                the graph is directed and no such weights average correctly on it.
        """
        if weights not in ("metropolis", "max_degree", "laplacian"):
            raise ValueError(
                f"weights must be 'metropolis', 'max_degree' or 'laplacian', got {weights!r}"
            )
        if tau is not None and (weights != "laplacian" or not tau > 0):
            raise ValueError(f"tau must be positive and goes with 'laplacian' only, got {tau}")
        edges, degrees = self.adjacency.double(), self.degrees.double()
        if weights == "metropolis":
            off = edges / (1 + torch.maximum(degrees[:, None], degrees))
        elif weights == "max_degree":
            off = edges / (1 + degrees.max())
        else:
            off = edges / (tau or self._best_tau())
        matrix = off + torch.diag(1 - off.sum(1))
        if lazy:
            matrix = (torch.eye(self.size, dtype=torch.float64) + matrix) / 2
        return MixingMatrix(matrix, connected=False)  # the graph itself has been checked

    def _best_tau(self) -> float:
        if not self.symmetric:
            raise ValueError("tau must be given for a directed graph, got None")
        laplacian = torch.diag(self.degrees.double()) - self.adjacency.double()
        eigenvalues = torch.linalg.eigvalsh(laplacian)
        return float(eigenvalues[-1] + eigenvalues[1]) / 2 if self.size > 1 else 1.0


class MixingMatrix:
    """Weights W of one round of gossip, x_i ← Σ_j W_ij x_j, and how fast it averages.

    Rows and columns sum to one, so that the mean never changes. The error from the mean shrinks by
    `contraction` = ‖W − 11ᵀ/n‖₂ a round, for symmetric W the second largest modulus of an
    eigenvalue; `spectral_gap` is what it lacks to one.

    Args:
        matrix: Square matrix (n, n); kept in float64.
        connected: Whether to refuse weights over which not everybody reaches everybody.

    Attributes:
        matrix: The weights, float64.

    Raises:
        ValueError: The matrix is not square, not finite, a row or a column does not sum to 1, or
            its graph is not connected.

    Example:
        >>> mixing = Topology.ring(32).mixing("metropolis")
        >>> mixing.symmetric, round(mixing.spectral_gap, 5)
        (True, 0.01281)
        >>> report = mixing.report()  # rounds until the error is at most 1e-6 times the first
        >>> report["rounds"], report["rounds, accelerated"]
        (1072, 91)
        >>> MixingMatrix([[0.5, 0.5], [0.4, 0.5]])
        Traceback (most recent call last):
            ...
        ValueError: matrix must have rows that sum to 1, but row 1 sums to 0.9
    """

    def __init__(self, matrix: object, *, connected: bool = True) -> None:
        W = torch.as_tensor(matrix, dtype=torch.float64).detach().cpu()
        if W.ndim != 2 or W.shape[0] != W.shape[1] or not len(W):
            raise ValueError(f"matrix must be square, got shape {tuple(W.shape)}")
        if not bool(W.isfinite().all()):
            raise ValueError("matrix must be finite, got infinities or NaN")
        for name, sums in (("row", W.sum(1)), ("column", W.sum(0))):
            worst = int((sums - 1).abs().argmax())
            if abs(float(sums[worst]) - 1) > _ROUNDING:
                raise ValueError(
                    f"matrix must have {name}s that sum to 1, but {name} {worst} sums to "
                    f"{float(sums[worst]):.6g}"
                )
        if connected:
            _check_connected(W != 0, "matrix")
        self.matrix: Float[Tensor, "n n"] = W

    def __repr__(self) -> str:
        return f"MixingMatrix({self.size} agents, spectral gap {self.spectral_gap:.3g})"

    @property
    def size(self) -> int:
        """Number of agents."""
        return len(self.matrix)

    @property
    def symmetric(self) -> bool:
        """Whether W = Wᵀ up to rounding."""
        return bool((self.matrix - self.matrix.T).abs().max() <= _ROUNDING)

    @property
    def diagonal(self) -> Float[Tensor, " n"]:
        """Weight of each agent's own value."""
        return self.matrix.diagonal()

    @cached_property
    def contraction(self) -> float:
        """‖W − 11ᵀ/n‖₂: factor by which the worst error from the mean shrinks a round."""
        return float(torch.linalg.matrix_norm(self.matrix - 1 / self.size, 2))

    @property
    def spectral_gap(self) -> float:
        """1 − contraction."""
        return 1 - self.contraction

    @cached_property
    def eigenvalues(self) -> Float[Tensor, " n"]:
        """Of a symmetric W, ascending; `ValueError` for others."""
        if not self.symmetric:
            raise ValueError("matrix must be symmetric to have real eigenvalues in order")
        return torch.linalg.eigvalsh((self.matrix + self.matrix.T) / 2)

    @property
    def lambda2(self) -> float:
        """Second largest eigenvalue (signed) of a symmetric W; 0 for a single agent."""
        return float(self.eigenvalues[-2]) if self.size > 1 else 0.0

    @property
    def lambda_min(self) -> float:
        """Smallest eigenvalue of a symmetric W; 0 for a single agent."""
        return float(self.eigenvalues[0]) if self.size > 1 else 0.0

    def lazy(self) -> "MixingMatrix":
        """(I + W) / 2: half as fast, and no eigenvalue below zero where W has none below −1."""
        identity = torch.eye(self.size, dtype=torch.float64)
        return MixingMatrix((identity + self.matrix) / 2, connected=False)

    def sources(self, rank: int) -> list[int]:
        """Agents whose values `rank` needs, in order and without itself."""
        return [j for j in self.matrix[rank].nonzero().flatten().tolist() if j != rank]

    def targets(self, rank: int) -> list[int]:
        """Agents that need the value of `rank`, in order and without itself."""
        return [i for i in self.matrix[:, rank].nonzero().flatten().tolist() if i != rank]

    def report(self, tolerance: float = 1e-6) -> dict[str, float | int | None]:
        """Figures to choose a topology by; one row of a table.

        Args:
            tolerance: Error, relative to the first, that the counted rounds reach at the latest.

        Returns:
            Agents, messages a round, λ₂ and λ_min (None for W that is not symmetric), spectral gap,
            rounds of plain and (symmetric W) of accelerated gossip.
        """
        symmetric, rate = self.symmetric, self.contraction
        plain: int | None = None
        accelerated: int | None = None
        if rate < 1:
            plain = 1 if rate <= tolerance else math.ceil(math.log(tolerance) / math.log(rate))
            if symmetric and rate > tolerance:
                accelerated = math.ceil(math.acosh(1 / tolerance) / math.acosh(1 / rate))
            elif symmetric:
                accelerated = 1
        return {
            "agents": self.size,
            "messages": sum(len(self.sources(rank)) for rank in range(self.size)),
            "lambda2": self.lambda2 if symmetric else None,
            "lambda_min": self.lambda_min if symmetric else None,
            "spectral gap": self.spectral_gap,
            "rounds": plain,
            "rounds, accelerated": accelerated,
        }


class TopologySchedule:
    """Weights that change from round to round: W_0, W_1, …, W_{period − 1}, and again from W_0.

    One phase need not connect everybody; all of them together must.

    Args:
        phases: `Topology` (Metropolis weights) or `MixingMatrix` of each round of a period.

    Raises:
        ValueError: There is no phase, sizes differ, or all phases together are not connected.
        TypeError: A phase is neither a `Topology` nor a `MixingMatrix`.

    Example:
        >>> schedule = TopologySchedule.one_peer_exponential(8)  # one message an agent and round
        >>> schedule.period, schedule.at(4).sources(0)
        (3, [6])
        >>> abs(schedule.spectral_gap - 1) < 1e-12  # three rounds average eight agents exactly
        True
    """

    def __init__(self, phases: Sequence[object]) -> None:
        if not phases:
            raise ValueError("phases must hold at least one topology, got none")
        self.phases = tuple(map(as_mixing, phases))
        sizes = {phase.size for phase in self.phases}
        if len(sizes) > 1:
            raise ValueError(f"phases must have one number of agents, got {sorted(sizes)}")
        union = torch.stack([phase.matrix != 0 for phase in self.phases]).any(0)
        _check_connected(union, "phases together")

    def __repr__(self) -> str:
        return f"TopologySchedule({self.size} agents, period {self.period})"

    @property
    def size(self) -> int:
        """Number of agents."""
        return self.phases[0].size

    @property
    def period(self) -> int:
        """Rounds until the weights repeat."""
        return len(self.phases)

    def at(self, step: int) -> MixingMatrix:
        """Weights of one round."""
        return self.phases[step % self.period]

    @property
    def spectral_gap(self) -> float:
        """1 − ‖W_{period−1} ⋯ W_0 − 11ᵀ/n‖₂, of a whole period."""
        product = torch.eye(self.size, dtype=torch.float64)
        for phase in self.phases:
            product = phase.matrix @ product
        return 1 - float(torch.linalg.matrix_norm(product - 1 / self.size, 2))

    @classmethod
    def one_peer_exponential(cls, n: int) -> "TopologySchedule":
        """In round k agent i averages with what it hears from i − 2^k modulo n.

        For n a power of two log₂ n rounds average exactly.
        """
        _check_size(n)
        identity = torch.eye(n, dtype=torch.float64)
        shifts = [identity.roll(2**k, 0) for k in range((n - 1).bit_length())] or [identity]
        return cls([MixingMatrix((identity + s) / 2, connected=False) for s in shifts])

    @classmethod
    def random_matchings(
        cls, n: int, period: int, generator: Generator | None = None
    ) -> "TopologySchedule":
        """In every round agents are paired at random and each pair averages; one rests if n is odd.

        Raises a `ValueError` when `period` random matchings happen not to connect everybody.
        """
        _check_size(n)
        phases = []
        for _ in range(period):
            adjacency = torch.zeros(n, n, dtype=torch.bool)
            order = torch.randperm(n, generator=generator)
            first, second = order[: n // 2], order[n // 2 : n // 2 * 2]
            adjacency[first, second] = adjacency[second, first] = True
            phases.append(Topology(adjacency, connected=False))
        return cls(phases)


def as_mixing(topology: object) -> MixingMatrix:
    """A matrix as it is, a graph with its Metropolis weights."""
    if isinstance(topology, Topology):
        return topology.mixing()
    if isinstance(topology, MixingMatrix):
        return topology
    raise TypeError(f"expected a Topology or a MixingMatrix, got {type(topology).__name__}")


def _check_size(n: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1 agent, got {n}")


def _parts(edges: Bool[Tensor, "n n"]) -> list[list[int]]:
    """Agents by strongly connected component."""
    count, labels = scipy.sparse.csgraph.connected_components(
        edges.numpy(), directed=True, connection="strong"
    )
    return [np.flatnonzero(labels == part).tolist() for part in range(count)]


def _check_connected(edges: Bool[Tensor, "n n"], name: str) -> None:
    parts = sorted(_parts(edges))
    if len(parts) > 1:
        raise ValueError(
            f"{name} must be a connected graph, but it has {len(parts)} parts, "
            f"e.g. agents {parts[0]}"
        )

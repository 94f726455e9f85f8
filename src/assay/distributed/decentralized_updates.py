"""Decentralised algorithms: each one's update, written once for processes and for simulation.

An update sees this agent's vector (d,), or all agents' as rows (n, d), the gradient there, and
`gossip.mix`, the product with W. The memory of an algorithm is kept in few vectors that start at
zero; where a paper states a recursion over two iterates, the equal one over their difference is
used, in which the mean over agents takes exactly a gradient step of the current `lr`, also when
`lr` changes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from assay.distributed.topology import MixingMatrix

__all__ = [
    "DGD",
    "DGET",
    "EXTRA",
    "METHODS",
    "ChebyshevFiltered",
    "D2",
    "GradientTracking",
    "LocalSGD",
    "Method",
    "ProxPDA",
    "find_method",
]

State = dict[str, Tensor]
Gradient = Callable[[Tensor], Tensor]  # of this step's batch, at a point


@dataclass(frozen=True)
class Method:
    """What all algorithms have: a step, and conditions on the weights.

    Subclass it for an algorithm of your own; `DecentralizedOptimizer` and `SimulatedAgents` take
    any instance.

    Example:
        >>> Method.vectors
        ()
    """

    vectors: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = False  # needs one symmetric matrix W: no schedule, no compression

    def update(
        self, x: Tensor, gradient: Gradient, state: State, gossip: Any, lr: Any, step: int
    ) -> Tensor:
        """The next iterate; `state` holds `vectors` and is changed."""
        raise NotImplementedError

    def early(self, x: Tensor, state: State) -> Tensor | None:
        """What `update` will mix first, if that is known before the gradient is; else None."""
        return None

    def check(self, gossip: Any) -> None:
        """Raise a `ValueError` unless the algorithm converges with these weights."""
        name = type(self).__name__
        if not self.linear:
            if gossip.effective is not None and not gossip.effective.contraction < 1 - 1e-12:
                raise ValueError(
                    f"{name} needs weights that contract, got a spectral gap of 0: "
                    f"{gossip.effective!r}; use lazy weights, (I + W) / 2"
                )
            return
        if gossip.effective is None:
            raise ValueError(
                f"{name} needs one matrix W: neither a TopologySchedule nor a compressor works "
                "with it; DGD, GradientTracking and LocalSGD take both"
            )
        if not gossip.effective.symmetric:
            raise ValueError(f"{name} needs symmetric weights, got {gossip.effective!r}")
        self.check_spectrum(gossip.effective)

    def check_spectrum(self, mixing: MixingMatrix) -> None:
        """Raise a `ValueError` unless the eigenvalues of a symmetric W are admissible."""
        _check_lambda_min(type(self).__name__, mixing, -1.0, strict=False)


@dataclass(frozen=True)
class DGD(Method):
    """Decentralised gradient descent; DSGD if gradients are stochastic.

    X⁺ = W X − α G(X). With constant α the agents stop at a distance from each other and from a
    stationary point that grows with α, the difference between their data and 1/(1 − λ₂);
    α ∝ 1/√t removes it.

    Example:
        >>> from assay.distributed import SimulatedAgents, Topology
        >>> c = torch.tensor([[0.0], [3.0]])  # f_i = (x − c_i)² / 2
        >>> agents = SimulatedAgents(DGD(), lambda x, step: x - c, torch.zeros(2, 1),
        ...                          Topology.ring(2).mixing().lazy(), lr=0.1)
        >>> agents.run(500).round(decimals=2).flatten()  # not (1.5, 1.5)
        tensor([1.2500, 1.7500])

    Reference:
        Nedić, Ozdaglar, Distributed Subgradient Methods for Multi-Agent Optimization, 2009.
    """

    def early(self, x: Tensor, state: State) -> Tensor:
        """X."""
        return x

    def update(
        self, x: Tensor, gradient: Gradient, state: State, gossip: Any, lr: Any, step: int
    ) -> Tensor:
        """X⁺ = W X − α G."""
        return gossip.mix(x) - lr * gradient(x)


@dataclass(frozen=True)
class LocalSGD(Method):
    """Local SGD: H own steps, then one mixing. With a complete graph it is federated averaging.

    Args:
        period: H, steps between mixings.

    Raises:
        ValueError: `period` is below 1.

    Example:
        >>> LocalSGD(period=10)
        LocalSGD(period=10)

    Reference:
        McMahan, Moore, Ramage, Hampson, Agüera y Arcas, Communication-Efficient Learning of Deep
        Networks from Decentralized Data, 2016, https://arxiv.org/abs/1602.05629.
    """

    period: int = 5

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period must be at least 1 step, got {self.period}")

    def update(
        self, x: Tensor, gradient: Gradient, state: State, gossip: Any, lr: Any, step: int
    ) -> Tensor:
        """X⁺ = X − α G, multiplied by W every `period` steps."""
        x = x - lr * gradient(x)
        return gossip.mix(x) if (step + 1) % self.period == 0 else x


@dataclass(frozen=True)
class GradientTracking(Method):
    """Gradient tracking; GNSD if gradients are stochastic.

    Y = W Y + G(X) − G(X₋), X⁺ = W X − α Y. The mean of the trackers Y is the mean of the gradients
    at every step, so that each agent follows the gradient of all data. X and Y travel in one
    message of twice the size.

    Example:
        >>> from assay.distributed import SimulatedAgents, Topology
        >>> c = torch.tensor([[0.0], [3.0]])
        >>> agents = SimulatedAgents(GradientTracking(), lambda x, step: x - c, torch.zeros(2, 1),
        ...                          Topology.ring(2).mixing().lazy(), lr=0.1)
        >>> agents.run(500).round(decimals=2).flatten()
        tensor([1.5000, 1.5000])

    Reference:
        Lu, Zhang, Sun, Hong, GNSD: A Gradient-Tracking Based Nonconvex Stochastic Algorithm for
        Decentralized Optimization, 2019.
    """

    vectors: ClassVar[tuple[str, ...]] = ("tracker", "gradient")

    def early(self, x: Tensor, state: State) -> Tensor:
        """X and Y."""
        return torch.cat([x, state["tracker"]], -1)

    def update(
        self, x: Tensor, gradient: Gradient, state: State, gossip: Any, lr: Any, step: int
    ) -> Tensor:
        """Mix iterate and tracker, correct the tracker by the change of the gradient, descend."""
        new = self.estimate(x, gradient, state, step)
        mixed, tracker = gossip.mix(self.early(x, state)).chunk(2, -1)
        state["tracker"] = tracker + new - state["gradient"]
        state["gradient"] = new
        return mixed - lr * state["tracker"]

    def estimate(self, x: Tensor, gradient: Gradient, state: State, step: int) -> Tensor:
        """What is tracked: here the gradient itself."""
        return gradient(x)


@dataclass(frozen=True)
class DGET(GradientTracking):
    """D-GET: gradient tracking of variance-reduced local gradients.

    Every `period` steps the estimate is the gradient of all local data (or of a large batch); in
    between it moves by the difference of one mini-batch's gradients at the new and the old point.
    Steps for which `needs_full_batch(step)` want the large batch, all others a small one. With m
    local samples period = batch size = ⌈√m⌉ is the theory's choice.

    Args:
        period: Steps between full gradients.

    Raises:
        ValueError: `period` is below 1.

    Example:
        >>> method = DGET(period=3)
        >>> [method.needs_full_batch(step) for step in range(5)]
        [True, False, False, True, False]

    Reference:
        Sun, Lu, Hong, Improving the Sample and Communication Complexity for Decentralized
        Non-Convex Optimization, 2019, https://arxiv.org/abs/1910.05857.
    """

    period: int = 10
    vectors: ClassVar[tuple[str, ...]] = ("tracker", "gradient", "point")

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period must be at least 1 step, got {self.period}")

    def needs_full_batch(self, step: int) -> bool:
        """Whether the gradient of this step should be that of all local data."""
        return step % self.period == 0

    def estimate(self, x: Tensor, gradient: Gradient, state: State, step: int) -> Tensor:
        """The full gradient, or the last estimate moved by one batch's difference."""
        new = gradient(x)
        if not self.needs_full_batch(step):
            new = state["gradient"] + new - gradient(state["point"])
        state["point"] = x
        return new


@dataclass(frozen=True)
class EXTRA(Method):
    """EXTRA: exact first-order decentralised descent with one mixing a step.

    X⁺ = (I + W) X − ½ (I + W) X₋ − α (G − G₋), from X¹ = W X⁰ − α G⁰; here in its summed form

        X⁺ = W X − α G − C,   C⁺ = C + ½ (X − W X).

    Example:
        >>> from assay.distributed import SimulatedAgents, Topology
        >>> c = torch.tensor([[0.0], [3.0]])
        >>> agents = SimulatedAgents(EXTRA(), lambda x, step: x - c, torch.zeros(2, 1),
        ...                          Topology.ring(2), lr=0.1)
        >>> agents.run(500).round(decimals=2).flatten()
        tensor([1.5000, 1.5000])

    Reference:
        Shi, Ling, Wu, Yin, EXTRA: An Exact First-Order Algorithm for Decentralized Consensus
        Optimization, 2014, https://arxiv.org/abs/1404.6264.
    """

    vectors: ClassVar[tuple[str, ...]] = ("correction",)
    linear: ClassVar[bool] = True

    def early(self, x: Tensor, state: State) -> Tensor:
        """X."""
        return x

    def update(
        self, x: Tensor, gradient: Gradient, state: State, gossip: Any, lr: Any, step: int
    ) -> Tensor:
        """X⁺ = W X − α G − C."""
        new = gradient(x)
        mixed = gossip.mix(x)
        following = mixed - lr * new - state["correction"]
        state["correction"] = state["correction"] + (x - mixed) / 2
        return following


@dataclass(frozen=True)
class D2(Method):
    """D²: decentralised SGD whose noise does not depend on how data differ between agents.

    X⁺ = W (2X − X₋ − α (G − G₋)), from X¹ = W (X⁰ − α G⁰); here X⁺ = W (X + R − α G) with
    R⁺ = X⁺ − X + α G. Diverges unless λ_min(W) > −1/3: a mode of W follows z² − 2λz + λ = 0.

    Example:
        >>> from assay.distributed import SimulatedAgents, Topology
        >>> SimulatedAgents(D2(), lambda x, step: x, torch.zeros(4, 1), Topology.ring(4), lr=0.1)
        Traceback (most recent call last):
            ...
        ValueError: D2 needs weights with λ_min > -1/3, got -0.333333: use mixing(lazy=True)

    Reference:
        Tang, Lian, Yan, Zhang, Liu, D²: Decentralized Training over Decentralized Data, 2018,
        https://arxiv.org/abs/1803.07068.
    """

    vectors: ClassVar[tuple[str, ...]] = ("correction",)
    linear: ClassVar[bool] = True

    def check_spectrum(self, mixing: MixingMatrix) -> None:
        """λ_min(W) > −1/3."""
        _check_lambda_min("D2", mixing, -1 / 3, strict=True)

    def update(
        self, x: Tensor, gradient: Gradient, state: State, gossip: Any, lr: Any, step: int
    ) -> Tensor:
        """X⁺ = W (X + R − α G)."""
        descent = lr * gradient(x)
        following = gossip.mix(x + state["correction"] - descent)
        state["correction"] = following - x + descent
        return following


@dataclass(frozen=True)
class ProxPDA(Method):
    """Proximal primal-dual algorithm (Prox-PDA): multipliers on every edge for equal values.

    With L⁻ = I − W the Laplacian of the edges, weighted as in W, D = I − diag(W) their degrees and
    L⁺ = 2D − L⁻, and P the multipliers' force on each agent,

        X⁺ = (2βD)⁻¹ (β L⁺ X − G − P),   P⁺ = P + β L⁻ X⁺.

    P starts as β L⁻ X⁰, which makes it EXTRA with the weights I − D⁻¹ L⁻ (neighbours' average) and
    steps 1/(2β D_ii) for every start. Laplacian weights give the paper's unweighted edges.
    β = 1 / (2 lr min D), so that `lr` is the largest of the agents' steps.

    Example:
        >>> from assay.distributed import SimulatedAgents, Topology
        >>> c = torch.tensor([[0.0], [3.0], [6.0]])
        >>> agents = SimulatedAgents(ProxPDA(), lambda x, step: x - c, torch.zeros(3, 1),
        ...                          Topology.path(3), lr=0.2)
        >>> agents.run(500).round(decimals=2).flatten()
        tensor([3., 3., 3.])

    Reference:
        Hong, Hajinezhad, Zhao, Prox-PDA: The Proximal Primal-Dual Algorithm for Fast Distributed
        Nonconvex Optimization and Learning Over Networks, 2017.
    """

    vectors: ClassVar[tuple[str, ...]] = ("dual",)
    linear: ClassVar[bool] = True

    def check_spectrum(self, mixing: MixingMatrix) -> None:
        """No negative weight between agents: then the neighbours' average never expands."""
        between = mixing.matrix - torch.diag(mixing.diagonal)
        if float(between.min()) < -1e-12:
            raise ValueError(
                "ProxPDA needs weights between agents that are not negative, got "
                f"{float(between.min()):.6g}"
            )

    def early(self, x: Tensor, state: State) -> Tensor:
        """X."""
        return x

    def update(
        self, x: Tensor, gradient: Gradient, state: State, gossip: Any, lr: Any, step: int
    ) -> Tensor:
        """The multipliers of this iterate, then the iterate that they and the gradient ask for."""
        _check_positive(lr)
        new = gradient(x)
        degrees = 1 - gossip.effective.diagonal
        smallest = float(degrees.min())
        if smallest <= 0:  # a single agent
            return x - lr * new
        relative = gossip.local(smallest / degrees)
        if isinstance(relative, Tensor):
            relative = relative.to(x)
        apart = x - gossip.mix(x)
        beta = 1 / (2 * lr * smallest)
        state["dual"] = state["dual"] + beta * apart
        return x - lr * relative * (beta * apart + new + state["dual"])


@dataclass(frozen=True)
class ChebyshevFiltered(Method):
    """Primal-dual descent whose step is filtered by Chebyshev polynomials, after xFILTER.

    With L = I − W and υ = 1/lr the step solves (υ I + β L) X⁺ = υ X − G − P by Q Chebyshev
    iterations from X, then P⁺ = P + β L X⁺. β = υ / (1 − λ₂) makes all disagreement contract, and
    Q = ⌈√κ⌉ with κ = 1 + (1 − λ_min)/(1 − λ₂) is enough: Q rounds a step, √ of what plain mixing
    takes. The mean takes the part 1 − 1/T_Q((κ + 1)/(κ − 1)) of a gradient step, at least 0.73.

    The published xFILTER could not be checked in every detail; this is our statement of its idea.

    Example:
        >>> from assay.distributed import SimulatedAgents, Topology
        >>> c = torch.tensor([[0.0], [3.0], [6.0]])
        >>> agents = SimulatedAgents(ChebyshevFiltered(), lambda x, step: x - c, torch.zeros(3, 1),
        ...                          Topology.path(3), lr=0.2)
        >>> agents.run(100).round(decimals=2).flatten(), agents.gossip.rounds_done
        (tensor([3., 3., 3.]), 200)

    Reference:
        Sun, Hong, Distributed Non-Convex First-Order Optimization and Information Processing, 2018,
        https://arxiv.org/abs/1804.02729.
    """

    vectors: ClassVar[tuple[str, ...]] = ("dual",)
    linear: ClassVar[bool] = True

    def early(self, x: Tensor, state: State) -> Tensor:
        """X."""
        return x

    def update(
        self, x: Tensor, gradient: Gradient, state: State, gossip: Any, lr: Any, step: int
    ) -> Tensor:
        """Solve for the next iterate; all equations are multiplied by `lr`."""
        _check_positive(lr)
        new = gradient(x)
        mixing = gossip.effective
        if mixing.size == 1:
            return x - lr * new
        weight = 1 / (1 - mixing.lambda2)  # β lr
        largest = 1 + weight * (1 - mixing.lambda_min)  # κ; the smallest eigenvalue is 1
        center, radius = (largest + 1) / 2, (largest - 1) / 2
        apart = weight * (x - gossip.mix(x))
        state["dual"] = state["dual"] + apart / lr
        residual = -lr * (new + state["dual"]) - apart
        change, ratio = residual / center, radius / center
        x = x + change
        for _ in range(math.ceil(math.sqrt(largest)) - 1):
            residual = residual - change - weight * (change - gossip.mix(change))
            following = 1 / (2 * center / radius - ratio)
            change = following * ratio * change + (2 * following / radius) * residual
            ratio = following
            x = x + change
        return x


def _check_positive(lr: Any) -> None:
    if not bool((torch.as_tensor(lr) > 0).all()):
        raise ValueError(f"lr must be positive: multipliers are weighted by 1 / lr, got {lr}")


def _check_lambda_min(name: str, mixing: MixingMatrix, bound: float, *, strict: bool) -> None:
    smallest = mixing.lambda_min
    slack = 1e-9 if strict else -1e-9
    if mixing.size > 1 and not smallest > bound + slack:
        text = "-1/3" if strict else "-1"
        raise ValueError(
            f"{name} needs weights with λ_min {'>' if strict else '≥'} {text}, got "
            f"{smallest:.6g}: use mixing(lazy=True)"
        )


METHODS: Mapping[str, type[Method]] = {
    "dsgd": DGD,
    "gt": GradientTracking,
    "extra": EXTRA,
    "prox_pda": ProxPDA,
    "d2": D2,
    "dget": DGET,
    "chebyshev": ChebyshevFiltered,
    "local": LocalSGD,
}


def find_method(method: object) -> Method:
    """A method by name, or an instance as it is."""
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    raise ValueError(
        f"method must be one of {', '.join(map(repr, METHODS))} or a Method, got {method!r}"
    )

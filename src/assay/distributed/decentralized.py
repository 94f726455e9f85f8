"""Decentralised training: an optimiser on real process groups, and the same agents in one process.

Both hand their vectors to the same update (`assay.distributed.decentralized_updates`) and differ in
`gossip.mix` alone, so that they agree step by step.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Generator, Tensor
from torch.optim import Optimizer

from assay.distributed.decentralized_updates import DGD, DGET, LocalSGD, find_method
from assay.distributed.gossip import Gossip, SimulatedGossip

__all__ = ["DecentralizedOptimizer", "SimulatedAgents"]


class SimulatedAgents:
    """Decentralised training of n agents in one process: their parameters are rows of a matrix.

    Agent i minimises (1/n) Σ f_i with the others, knowing f_i alone.

    Args:
        method: "dsgd", "gt", "extra", "prox_pda", "d2", "dget", "chebyshev", "local", or a `Method`
            such as `DGET(period=9)`.
        gradients: `(x, step) -> (n, d)`: row i is agent i's gradient at row i of `x`, of its batch
            of that step. It must give the same for the same arguments if the method asks twice
            (D-GET does, at two points).
        x0: Where the agents start, (n, d); rows may differ.
        topology: `Topology` (Metropolis weights), `MixingMatrix` or `TopologySchedule`.
        lr: Step α.
        rounds: See `SimulatedGossip`.
        accelerated: See `SimulatedGossip`.
        compressor: See `SimulatedGossip`.
        gamma: See `SimulatedGossip`.
        generator: See `SimulatedGossip`.

    Attributes:
        x: Parameters of all agents, (n, d).
        vectors: The method's memory by name, each (n, d).
        steps: Steps so far.
        lr: May be changed between steps.
        gossip: Counts rounds and bytes.

    Raises:
        ValueError: The method is unknown or does not converge with such weights, `lr` is negative,
            or `x0` does not have a row an agent.

    Example:
        >>> from assay.distributed import Topology
        >>> c = torch.arange(8.0, dtype=torch.float64)[:, None]  # f_i(x) = (x − c_i)² / 2
        >>> agents = SimulatedAgents("gt", lambda x, step: x - c, torch.zeros_like(c),
        ...                          Topology.ring(8), lr=0.1)
        >>> x = agents.run(300)
        >>> bool((x - 3.5).abs().max() < 1e-9), agents.gossip.rounds_done
        (True, 300)
        >>> bool((agents.vectors["tracker"].mean(0) - agents.vectors["gradient"].mean(0)) < 1e-12)
        True

    Reference:
        Chang, Hong, Wai, Zhang, Lu, Distributed Learning in the Non-Convex World: From Batch to
        Streaming Data, and Beyond, 2020, https://arxiv.org/abs/2001.04786.
    """

    def __init__(
        self,
        method: object,
        gradients: Callable[[Tensor, int], Tensor],
        x0: Tensor,
        topology: object,
        lr: float,
        *,
        rounds: int = 1,
        accelerated: bool = False,
        compressor: object = None,
        gamma: float = 1.0,
        generator: Generator | None = None,
    ) -> None:
        self.method = find_method(method)
        self.gossip = SimulatedGossip(
            topology,
            rounds=rounds,
            accelerated=accelerated,
            compressor=compressor,
            gamma=gamma,
            generator=generator,
        )
        self.method.check(self.gossip)
        _check_lr(lr)
        if x0.ndim != 2 or len(x0) != self.gossip.size or not x0.is_floating_point():
            raise ValueError(
                f"x0 must be a floating-point matrix with {self.gossip.size} rows, one an agent, "
                f"got {x0.dtype} of shape {tuple(x0.shape)}"
            )
        self.gradients, self.lr = gradients, lr
        self.x: Float[Tensor, "n d"] = x0.detach().clone()
        self.vectors = {name: torch.zeros_like(self.x) for name in self.method.vectors}
        self.steps = 0

    @torch.no_grad()
    def step(self) -> Float[Tensor, "n d"]:
        """One step of all agents; the new `x`."""
        self.x = self.method.update(
            self.x,
            lambda point: self.gradients(point, self.steps),
            self.vectors,
            self.gossip,
            self.lr,
            self.steps,
        )
        self.steps += 1
        return self.x

    def run(self, steps: int) -> Float[Tensor, "n d"]:
        """Several steps; the last `x`."""
        for _ in range(steps):
            self.step()
        return self.x

    def consensus_error(self) -> float:
        """(1/n) Σ ‖x_i − x̄‖²."""
        return float((self.x - self.x.mean(0)).square().sum(1).mean())

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later step depends on."""
        return {
            "x": self.x,
            "vectors": dict(self.vectors),
            "steps": self.steps,
            "lr": self.lr,
            "gossip": self.gossip.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.x, self.vectors = state["x"].clone(), dict(state["vectors"])
        self.steps, self.lr = state["steps"], state["lr"]
        self.gossip.load_state_dict(state["gossip"])


class DecentralizedOptimizer(Optimizer):
    """Trains one model a rank on that rank's data, talking to neighbours only.

    An optimiser like torch's: compute gradients of the local loss, call `step`. Do not wrap the
    model in `DistributedDataParallel`. To be constructed by all ranks at the same point; they call
    `step` equally often. Models may start alike or not. Learning rates may differ between parameter
    groups and change between steps, alike on all ranks.

    Parameters alone are mixed: of BatchNorm's running statistics each rank keeps its own until
    `gossip.average_(model.buffers())`. Parameters without a gradient count as having gradient zero.

    Args:
        params: Parameters or groups of them, of one dtype and on one device.
        topology: `Topology` (Metropolis weights), `MixingMatrix` or `TopologySchedule` of as many
            agents as there are ranks.
        lr: Step α.
        method: "dsgd", "gt", "extra", "prox_pda", "d2", "dget", "chebyshev", "local", or a `Method`
            such as `DGET(period=9)`.
        process_group: Ranks that train; all by default.
        inner: An optimiser of the same parameters whose movement replaces −α G, scaled by `lr`
            (give 1): momentum or Adam on every rank. For "dsgd" and "local".
        rounds: See `Gossip`.
        accelerated: See `Gossip`.
        compressor: See `Gossip`.
        gamma: See `Gossip`.
        generator: See `Gossip`.
        timeout: Seconds after which a silent rank is an error, from the first step on; see
            `Gossip`.
        overlap: Post the messages of a step at the first gradient of its backward pass (through
            post-accumulate-grad hooks), so that they travel during the rest of it. For methods
            that know what they send before the gradient: "dsgd", "gt", "extra", "prox_pda", "dget"
            and "chebyshev". Parameters must not be changed between backward pass and step, and a
            backward pass must be followed by a step on all ranks. The iterates are the same.

    Attributes:
        gossip: The `Gossip` between ranks; counts rounds and bytes sent.
        vectors: The method's memory by name, flat vectors in the order of the parameters.
        steps: Steps so far.

    Raises:
        RuntimeError: `torch.distributed` is not initialised; and, from `step`, another rank died or
            was silent for `timeout` seconds.
        TypeError: Parameters differ in dtype or device, or are not real floating-point.
        ValueError: The method is unknown or does not converge with such weights, `lr` is negative,
            `inner` does not go with the method or holds other parameters, `overlap` does not go
            with the method or a compressor, or ranks disagree.

    Example:
        >>> from assay.distributed import Topology
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = DecentralizedOptimizer(model.parameters(), Topology.ring(1), lr=0.1)
        >>> x, y = torch.ones(8, 3), torch.ones(8, 1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> losses = [optimizer.step(closure).item() for _ in range(20)]
        >>> losses[-1] < 1e-3, optimizer.consensus_error(), optimizer.stationarity(closure) < 1e-3
        (True, 0.0, True)
        >>> dist.destroy_process_group()

    Reference:
        Chang, Hong, Wai, Zhang, Lu, Distributed Learning in the Non-Convex World: From Batch to
        Streaming Data, and Beyond, 2020, https://arxiv.org/abs/2001.04786.
    """

    def __init__(
        self,
        params: Iterable[Any],
        topology: object,
        lr: float = 0.01,
        method: object = "gt",
        *,
        process_group: dist.ProcessGroup | None = None,
        inner: Optimizer | None = None,
        rounds: int = 1,
        accelerated: bool = False,
        compressor: object = None,
        gamma: float = 1.0,
        generator: Generator | None = None,
        timeout: float | None = None,
        overlap: bool = False,
    ) -> None:
        _check_lr(lr)
        self.method = find_method(method)
        super().__init__(params, {"lr": lr})
        first = self._parameters[0]
        for parameter in self._parameters:
            if not parameter.is_floating_point():
                raise TypeError(f"params must be real floating-point, got {parameter.dtype}")
            if (parameter.dtype, parameter.device) != (first.dtype, first.device):
                raise TypeError(
                    "params must have one dtype and device, got "
                    f"{first.dtype} on {first.device} and {parameter.dtype} on {parameter.device}"
                )
        if inner is not None:
            self._check_inner(inner)
        self.inner = inner
        self.gossip = Gossip(
            topology,
            process_group,
            rounds=rounds,
            accelerated=accelerated,
            compressor=compressor,
            gamma=gamma,
            generator=generator,
            timeout=timeout,
        )
        self.method.check(self.gossip)
        flat = self._flat()
        self.vectors = {name: torch.zeros_like(flat) for name in self.method.vectors}
        self.steps = 0
        self.overlap = self._may_start = overlap
        if overlap:
            self._check_overlap(flat)
            self._watch_gradients()

    @property
    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _check_inner(self, inner: Optimizer) -> None:
        if not isinstance(self.method, DGD | LocalSGD):
            raise ValueError(
                f"inner goes with 'dsgd' and 'local' only, got method {self.method!r}: the others "
                "correct gradients, not the movements of an optimiser"
            )
        theirs = {id(p) for group in inner.param_groups for p in group["params"]}
        if theirs != {id(p) for p in self._parameters}:
            raise ValueError("inner must be an optimiser of the same parameters as params")

    def _check_overlap(self, flat: Tensor) -> None:
        if self.method.early(flat, self.vectors) is None:
            raise ValueError(
                f"overlap does not go with method {self.method!r}: what it sends depends on the "
                "gradient"
            )
        if self.gossip.compressor is not None:
            raise ValueError(f"overlap goes with no compressor, got {self.gossip.compressor!r}")

    def _watch_gradients(self) -> None:
        """Start mixing at the first gradient; hooks must not keep this optimiser alive."""
        self._may_start, reference = True, weakref.ref(self)

        def begin(_: Tensor) -> None:
            optimizer = reference()
            if optimizer is not None:
                optimizer._start_mixing()

        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(begin)

    def _start_mixing(self) -> None:
        if self._may_start:
            self._may_start = False
            first = self.method.early(self._flat(), self.vectors)
            assert first is not None
            self.gossip.start(first)

    @property
    def needs_full_batch(self) -> bool:
        """Whether the next step's closure should use all local data (D-GET, now and then)."""
        return isinstance(self.method, DGET) and self.method.needs_full_batch(self.steps)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of this rank, together with its neighbours.

        Args:
            closure: Clears gradients, computes the loss of this step's batch, calls `backward` and
                returns the loss. Without it `.grad` must be set. D-GET needs it, since it evaluates
                one batch at two points (random numbers drawn in it are the same at both).

        Returns:
            The loss that `closure` returned at this rank's parameters.

        Raises:
            ValueError: The method needs a closure and there is none.
            RuntimeError: Another rank died or was silent for too long.
        """
        before = torch.get_rng_state()
        losses = []
        if self.overlap and closure is not None:  # its backward pass starts the mixing
            with torch.enable_grad():
                losses.append(closure())
        x, self._may_start = self._flat(), False

        def gradient(point: Tensor) -> Tensor:
            if point is x:
                if closure is not None and not losses:
                    with torch.enable_grad():
                        losses.append(closure())
                return self._flat_gradient() if self.inner is None else self._inner_movement(x)
            if closure is None:
                raise ValueError(f"closure must be given: {self.method!r} evaluates a batch twice")
            with self._placed(point), torch.random.fork_rng(), torch.enable_grad():
                torch.set_rng_state(before)
                closure()
                return self._flat_gradient()

        new = self.method.update(x, gradient, self.vectors, self.gossip, self._lr(), self.steps)
        self._write(new)
        self.steps += 1
        self._may_start = self.overlap
        return losses[0] if losses else None

    def _lr(self) -> float | Tensor:
        """One number, or one a parameter entry if groups differ."""
        rates = {float(group["lr"]) for group in self.param_groups}
        if len(rates) == 1:
            return rates.pop()
        first = self._parameters[0]
        return torch.cat(
            [
                torch.full((p.numel(),), float(group["lr"]), dtype=p.dtype, device=first.device)
                for group in self.param_groups
                for p in group["params"]
            ]
        )

    def _flat(self) -> Float[Tensor, " d"]:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters])

    def _flat_gradient(self) -> Float[Tensor, " d"]:
        parts = []
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is None:
                parts.append(torch.zeros_like(parameter).reshape(-1))
            elif gradient.is_sparse:
                raise ValueError("gradients must be dense, got a sparse one")
            else:
                parts.append(gradient.detach().reshape(-1))
        return torch.cat(parts)

    def _inner_movement(self, x: Tensor) -> Tensor:
        assert self.inner is not None
        self.inner.step()
        movement = x - self._flat()
        self._write(x)
        return movement

    def _write(self, flat: Tensor) -> None:
        parameters = self._parameters
        parts = flat.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view(parameter.shape))

    @contextlib.contextmanager
    def _placed(self, point: Tensor) -> Iterator[None]:
        """Parameters at another point for a moment; gradients come back too."""
        here = self._flat()
        gradients = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        may_start, self._may_start = self._may_start, False
        self._write(point)
        try:
            yield
        finally:
            self._write(here)
            self._may_start = may_start
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient

    # -- diagnostics: to be called by all ranks ------------------------------------------------

    @torch.no_grad()
    def consensus_error(self) -> float:
        """(1/n) Σ ‖x_i − x̄‖² over ranks."""
        x = self._flat()
        distance = (x - self.gossip.mean(x)).square().sum()
        return float(self.gossip.mean(distance[None]))

    @torch.no_grad()
    def stationarity(self, closure: Callable[[], Any]) -> float:
        """‖(1/n) Σ ∇f_i(x̄)‖² at the mean of all models; parameters and gradients are left alone.

        Args:
            closure: As for `step`, of the data that each rank is to be judged by.
        """
        with self._placed(self.gossip.mean(self._flat())):
            with torch.enable_grad():
                closure()
            gradient = self._flat_gradient()
        return float(self.gossip.mean(gradient).square().sum())

    @torch.no_grad()
    def average_parameters_(self) -> None:
        """Give every rank the mean of all models: the one to keep after training."""
        self._write(self.gossip.mean(self._flat()))

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State of this rank (ranks differ: keep one each)."""
        state = super().state_dict()
        state["decentralized"] = {
            "method": repr(self.method),
            "vectors": dict(self.vectors),
            "steps": self.steps,
            "gossip": self.gossip.state_dict(),
            "inner": None if self.inner is None else self.inner.state_dict(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` of the same rank was taken.

        Raises a `ValueError` if it is of another method or other parameters.
        """
        own = state_dict["decentralized"]
        if own["method"] != repr(self.method):
            raise ValueError(
                f"state_dict must be of {self.method!r}, got one of {own['method']}: the memory of "
                "one method means nothing to another"
            )
        flat = self._flat()
        for name, vector in own["vectors"].items():
            if vector.shape != flat.shape:
                raise ValueError(
                    f"state_dict must hold a {name} of {len(flat)} entries, got {len(vector)}"
                )
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.vectors = {name: v.detach().to(flat).clone() for name, v in own["vectors"].items()}
        self.steps = own["steps"]
        self.gossip.load_state_dict(own["gossip"])
        if self.inner is not None:
            self.inner.load_state_dict(own["inner"])

    def __getstate__(self) -> dict[str, Any]:
        own = ("method", "inner", "gossip", "vectors", "steps", "overlap")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._may_start = self.overlap
        if self.overlap:  # copies of parameters come without hooks
            self._watch_gradients()

    def __deepcopy__(self, memo: dict) -> "DecentralizedOptimizer":
        """Copy with parameters of its own in the same process group."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


def _check_lr(lr: float) -> None:
    if not lr >= 0:
        raise ValueError(f"lr must not be negative, got {lr}")

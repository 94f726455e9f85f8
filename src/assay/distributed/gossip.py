"""Gossip: one linear averaging step with neighbours, between processes or in one.

Algorithms see a single operation, `mix(x)`, which stands for W x. `Gossip` holds one agent's vector
(d,) a process and talks to its neighbours; `SimulatedGossip` holds all of them as rows of a matrix
(n, d) and multiplies. Everything else, several rounds, Chebyshev acceleration, compression, weights
that change and the count of what was sent, is shared.
"""

import copy
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Generator, Tensor

from assay.distributed.combinations import ErrorFeedback
from assay.distributed.compressors import Compressor, draw_seed
from assay.distributed.payload import Payload
from assay.distributed.topology import MixingMatrix, TopologySchedule, as_mixing
from assay.kernels.weighted_sum import weighted_sum

__all__ = ["Gossip", "SimulatedGossip", "chebyshev_rounds"]


def chebyshev_rounds(
    mix: Callable[[Tensor], Tensor], x: Tensor, rounds: int, contraction: float
) -> Tensor:
    """Accelerated gossip: T_K(W/l) x / T_K(1/l) from K products with W.

    For symmetric W whose eigenvalues other than 1 lie in [−l, l] the error from the mean shrinks by
    1/T_K(1/l) ≈ 2 exp(−K √(2(1 − l))) rather than by l^K.

    Args:
        mix: The product x ↦ W x.
        x: Values, one row an agent (or one agent's).
        rounds: K.
        contraction: l, below 1.

    Returns:
        The mixed values; their mean over agents is that of `x`.

    Raises:
        ValueError: `contraction` is not in [0, 1).

    Example:
        >>> from assay.distributed import Topology
        >>> mixing = Topology.ring(32).mixing()
        >>> x = torch.randn(32, 1, dtype=torch.float64)
        >>> y = chebyshev_rounds(lambda z: mixing.matrix @ z, x, 40, mixing.contraction)
        >>> bool((y - y.mean()).norm() < 0.0033 * (x - x.mean()).norm())
        True

    Reference:
        Scaman, Bach, Bubeck, Lee, Massoulié, Optimal Algorithms for Smooth and Strongly Convex
        Distributed Optimization in Networks, 2017, https://arxiv.org/abs/1702.08704.
    """
    if not 0 <= contraction < 1:
        raise ValueError(f"contraction must be in [0, 1), got {contraction}")
    if rounds < 1:
        return x
    if contraction < 1e-12:  # the first round averages exactly
        return mix(x)
    # ratio = T_k(1/l) / T_{k+1}(1/l): the values themselves overflow after some hundred rounds.
    previous, current, ratio = x, mix(x), contraction
    for _ in range(rounds - 1):
        following = 1 / (2 / contraction - ratio)
        mixed = mix(current)
        new = mixed.mul(2 * following / contraction).sub_(previous, alpha=ratio * following)
        previous, current, ratio = current, new, following
    return current


class _Mixer:
    """What `Gossip` and `SimulatedGossip` share; they say how to apply one W."""

    def __init__(
        self,
        topology: object,
        *,
        rounds: int = 1,
        accelerated: bool = False,
        compressor: object = None,
        gamma: float = 1.0,
        generator: Generator | None = None,
    ) -> None:
        fixed = not isinstance(topology, TopologySchedule)
        self.phases = (as_mixing(topology),) if fixed else topology.phases
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        if accelerated and not (fixed and self.phases[0].symmetric and compressor is None):
            raise ValueError(
                "accelerated needs one symmetric matrix and no compressor: Chebyshev polynomials "
                "are of one W"
            )
        if compressor is not None:
            _check_compressor(compressor)
            if not fixed:
                raise ValueError(
                    "compressor needs weights that do not change: neighbours keep weighted sums"
                )
        if not gamma > 0 or (compressor is None and gamma != 1):
            raise ValueError(f"gamma must be positive and goes with a compressor only, got {gamma}")
        self.rounds, self.accelerated = rounds, accelerated
        self.compressor, self.gamma = compressor, gamma
        self.seed = torch.initial_seed() if generator is None else int(draw_seed(generator))
        self.rounds_done = 0
        self.bytes_sent = 0
        # Compressed gossip: what all know of this agent's value, and W times what is known.
        self.known: Tensor | None = None
        self.known_mixed: Tensor | None = None
        self.effective = self._effective() if fixed and compressor is None else None

    def _effective(self) -> MixingMatrix:
        """The matrix that one `mix` multiplies by: a polynomial of W."""
        (mixing,) = self.phases
        if self.rounds == 1:
            return mixing
        identity = torch.eye(mixing.size, dtype=torch.float64)
        matrix = self._polynomial(lambda x: mixing.matrix @ x, identity)
        return MixingMatrix(matrix, connected=False)

    def _polynomial(self, apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.accelerated:
            return chebyshev_rounds(apply, x, self.rounds, self.phases[0].contraction)
        for _ in range(self.rounds):
            x = apply(x)
        return x

    @property
    def size(self) -> int:
        """Number of agents."""
        return self.phases[0].size

    @torch.no_grad()
    def mix(self, x: Float[Tensor, "*agents d"]) -> Float[Tensor, "*agents d"]:
        """W x, or after `rounds` rounds W^K x or T_K x; `x` itself is not changed."""
        return self._polynomial(self._one_round, x.detach())

    def _one_round(self, x: Tensor) -> Tensor:
        phase = self.rounds_done % len(self.phases)
        self.rounds_done += 1
        if self.compressor is None:
            return self._apply(phase, x)
        # x̂ ← x̂ + C(x − x̂) / (1 + ω), and x ← x + γ (W x̂ − x̂).
        if self.known is None or self.known_mixed is None:
            self.known, self.known_mixed = torch.zeros_like(x), torch.zeros_like(x)
        elif self.known.shape != x.shape:
            raise ValueError(
                f"x must have shape {tuple(self.known.shape)} as before: neighbours remember it, "
                f"got {tuple(x.shape)}"
            )
        sent, mixed = self._apply_compressed(x - self.known)
        scale = self._contractive_scale(x.shape[-1])
        self.known += scale * sent
        self.known_mixed += scale * mixed
        return x + self.gamma * (self.known_mixed - self.known)

    def _contractive_scale(self, d: int) -> float:
        """1/(1 + ω) makes a contraction of an unbiased compressor; x̂ would not converge without."""
        assert isinstance(self.compressor, Compressor)
        if not self.compressor.unbiased:
            return 1.0
        omega = self.compressor.omega(d)
        if omega == float("inf"):
            raise ValueError(
                f"compressor must have a bounded variance, got {self.compressor!r} with ω = ∞"
            )
        return 1 / (1 + omega)

    def _apply(self, phase: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply_compressed(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """What decoders get of `difference`, and W times that."""
        raise NotImplementedError

    def local(self, values: Float[Tensor, " n"]) -> Any:
        """This agent's entry, or all of them as a column."""
        raise NotImplementedError

    def mean(self, x: Float[Tensor, "*agents d"]) -> Float[Tensor, " d"]:
        """Mean over all agents, exact whatever the graph; to be called by all."""
        raise NotImplementedError

    def _generators(self) -> Sequence[Generator]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Rounds, traffic, memory of compressed gossip and random state."""
        return {
            "rounds_done": self.rounds_done,
            "bytes_sent": self.bytes_sent,
            "known": self.known,
            "known_mixed": self.known_mixed,
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.rounds_done, self.bytes_sent = state["rounds_done"], state["bytes_sent"]
        for name in ("known", "known_mixed"):
            value = state[name]
            setattr(self, name, None if value is None else value.clone())
        for generator, saved in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(saved)


class SimulatedGossip(_Mixer):
    """Gossip of n agents in one process: their values are the rows of a matrix.

    Args:
        topology: `Topology` (Metropolis weights), `MixingMatrix` or `TopologySchedule`.
        rounds: Rounds of communication K in one `mix`.
        accelerated: Mix by the Chebyshev polynomial T_K rather than by W^K.
        compressor: Compress what is sent (CHOCO gossip): agents send C(x − x̂), all keep x̂. An
            unbiased compressor is scaled by 1/(1 + ω), which makes it contract.
        gamma: Step γ of compressed gossip, 1 for none. Strong compression needs less.
        generator: Where the compressors' randomness starts (default: torch's initial seed).

    Attributes:
        effective: The `MixingMatrix` that `mix` multiplies by; None if there is no single one.
        rounds_done: Rounds so far.
        bytes_sent: Bytes that all agents have sent together.

    Raises:
        TypeError: `topology` or `compressor` is none.
        ValueError: A number is out of range, or `accelerated` or `compressor` meets weights that it
            does not work with.

    Example:
        >>> from assay.distributed import Topology
        >>> gossip = SimulatedGossip(Topology.complete(4))
        >>> gossip.mix(torch.tensor([[0.0], [0.0], [4.0], [8.0]])).flatten()
        tensor([3., 3., 3., 3.])
        >>> gossip.bytes_sent  # an all-reduce of 4 bytes between 4 agents
        24

    Reference:
        Koloskova, Stich, Jaggi, Decentralized Stochastic Optimization and Gossip Algorithms with
        Compressed Communication, 2019, https://arxiv.org/abs/1902.00340 (compression).
    """

    def __init__(
        self,
        topology: object,
        *,
        rounds: int = 1,
        accelerated: bool = False,
        compressor: object = None,
        gamma: float = 1.0,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(
            topology,
            rounds=rounds,
            accelerated=accelerated,
            compressor=compressor,
            gamma=gamma,
            generator=generator,
        )
        self._messages = [_messages(phase) for phase in self.phases]
        self._uniform = [_is_uniform(phase) for phase in self.phases]
        self._weights: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._random = [_generator(self.seed, agent) for agent in range(self.size)]

    def _apply(self, phase: int, x: Tensor) -> Tensor:
        _check_rows(x, self.size)
        row_bytes = x.shape[1] * x.element_size()
        if self._uniform[phase]:
            self.bytes_sent += _all_reduce_bytes(row_bytes, self.size) * self.size
        else:
            self.bytes_sent += sum(self._messages[phase]) * row_bytes
        return self._matrix(phase, x) @ x

    def _apply_compressed(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        _check_rows(difference, self.size)
        assert isinstance(self.compressor, Compressor)
        sent = torch.empty_like(difference)
        for agent, row in enumerate(difference):
            payload = self.compressor.compress(row, generator=self._random[agent])
            self.bytes_sent += self._messages[0][agent] * _message_bytes(payload.to_bytes())
            sent[agent] = self.compressor.decompress(payload)
        return sent, self._matrix(0, sent) @ sent

    def _matrix(self, phase: int, x: Tensor) -> Tensor:
        key = (phase, x.dtype, x.device)
        if key not in self._weights:
            self._weights[key] = self.phases[phase].matrix.to(x.device, x.dtype)
        return self._weights[key]

    def local(self, values: Float[Tensor, " n"]) -> Float[Tensor, "n 1"]:
        """All entries as a column."""
        return values[:, None]

    def mean(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
        """Mean over agents."""
        return x.mean(0)

    def _generators(self) -> Sequence[Generator]:
        return self._random


class Gossip(_Mixer):
    """Gossip between the processes of a group, with neighbours only.

    All messages of a round are posted together, so no order of sends can deadlock. Uniform weights
    (a complete graph) use one all-reduce, which sends less. To be constructed by all ranks at the
    same point: it opens a process group of its own and checks that all were given the same weights.

    Args:
        topology: `Topology` (Metropolis weights), `MixingMatrix` or `TopologySchedule` of as many
            agents as the group has ranks; the same on all.
        process_group: Ranks that take part; all by default.
        rounds: Rounds of communication K in one `mix`.
        accelerated: Mix by the Chebyshev polynomial T_K rather than by W^K.
        compressor: Compress what is sent (CHOCO gossip): ranks send C(x − x̂), and remember what
            their neighbours know.
        gamma: Step γ of compressed gossip, 1 for none. Strong compression needs less.
        generator: CPU generator that randomness starts from, alike on all ranks (default: torch's
            initial seed); each rank draws different numbers.
        timeout: Seconds that a silent neighbour is waited for (default: the backend's), from the
            first exchange on. Constructing waits for all ranks as long as `process_group` does.

    Attributes:
        effective: The `MixingMatrix` that `mix` multiplies by; None if there is no single one.
        rounds_done: Rounds so far.
        bytes_sent: Bytes that this rank has sent.

    Raises:
        RuntimeError: `torch.distributed` is not initialised; and, from any exchange, a neighbour
            died or was silent for too long.
        TypeError: `topology` or `compressor` is none.
        ValueError: A number is out of range, sizes do not fit, or ranks disagree.

    Example:
        >>> from assay.distributed import Topology
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> gossip = Gossip(Topology.ring(1))
        >>> model = torch.nn.Linear(3, 1)
        >>> gossip.mix_(model.parameters())  # with neighbours these would now be weighted means
        >>> gossip.rounds_done, gossip.bytes_sent
        (1, 0)
        >>> dist.destroy_process_group()

    Reference:
        Koloskova, Stich, Jaggi, Decentralized Stochastic Optimization and Gossip Algorithms with
        Compressed Communication, 2019, https://arxiv.org/abs/1902.00340 (compression).
    """

    def __init__(
        self,
        topology: object,
        process_group: dist.ProcessGroup | None = None,
        *,
        rounds: int = 1,
        accelerated: bool = False,
        compressor: object = None,
        gamma: float = 1.0,
        generator: Generator | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(
            topology,
            rounds=rounds,
            accelerated=accelerated,
            compressor=compressor,
            gamma=gamma,
            generator=generator,
        )
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed must be initialised before Gossip")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive seconds, got {timeout}")
        self.timeout = timeout
        parent = process_group or dist.group.WORLD
        self._ranks = dist.get_process_group_ranks(parent)
        self._backend = dist.get_backend(process_group)
        if len(self._ranks) != self.size:
            raise ValueError(
                f"topology must have {len(self._ranks)} agents, one a rank of the group, got "
                f"{self.size}"
            )
        # Wait for slow ranks in their own group: in the one that is opened the timeout holds.
        self._agree_on_settings(parent)
        self.group = self._open()
        self.rank = dist.get_rank(self.group)
        self._sources = [phase.sources(self.rank) for phase in self.phases]
        self._targets = [phase.targets(self.rank) for phase in self.phases]
        self._rows = [phase.matrix[self.rank].tolist() for phase in self.phases]
        self._uniform = [_is_uniform(phase) for phase in self.phases]
        self._random = [_generator(self.seed, self.rank)]
        self._agreed: set[tuple[int, torch.dtype]] = set()
        self._buffers: list[Tensor] = []
        self._started: tuple[Tensor, Callable[[], Tensor]] | None = None

    def _open(self) -> dist.ProcessGroup:
        # A group of its own with a timeout of its own: only so does a collective that has timed out
        # end, and let the process end. NCCL's watchdog would end the process instead of raising.
        limit = None
        if self.timeout is not None and self._backend == "gloo":
            limit = timedelta(seconds=self.timeout)
        group = dist.new_group(
            self._ranks,
            backend=self._backend,
            timeout=limit,
            use_local_synchronization=True,
        )
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError("process_group must contain this rank")
        return group

    def _agree_on_settings(self, group: Any) -> None:
        weights = b"".join(phase.matrix.numpy().tobytes() for phase in self.phases)
        settings = (self.rounds, self.accelerated, repr(self.compressor), self.gamma)
        self._agree(group, "weights and settings", hashlib.sha256(weights).hexdigest(), settings)

    def _agree(self, group: Any, what: str, *mine: object) -> None:
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=group)
        different = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
        if different:
            raise ValueError(
                f"all ranks must have the same {what}, but those of rank {different[0]} differ "
                f"from rank 0's: {everyone[different[0]]} and {everyone[0]}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the process group, which cannot be pickled; the first exchange opens one."""
        random = [generator.get_state() for generator in self._random]
        return vars(self) | {"group": None, "_buffers": [], "_random": random, "_started": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._random = [Generator().set_state(saved) for saved in state["_random"]]

    def __deepcopy__(self, memo: dict) -> "Gossip":
        """Copy with its own memory and random state in the same process group."""
        twin = copy.copy(self)
        twin.group = self.group
        twin._agreed, twin._buffers, twin._started = set(self._agreed), [], None
        twin.load_state_dict(copy.deepcopy(self.state_dict()))
        return twin

    @torch.no_grad()
    def start(self, x: Float[Tensor, " d"]) -> None:
        """Post the first messages of the next `mix(x)` now, to compute while they travel.

        Args:
            x: What `mix` will be given; a second call before that changes nothing.

        Raises:
            ValueError: There is a compressor, whose messages cannot be posted at once.
        """
        if self.compressor is not None:
            raise ValueError(f"start goes with no compressor, got {self.compressor!r}")
        if self._started is None:
            x = x.detach().contiguous()
            self._started = x, self._begin(self.rounds_done % len(self.phases), x)

    @torch.no_grad()
    def mix_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their weighted means with the neighbours', as one flat message."""
        tensors = list(tensors)
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        _write(tensors, self.mix(flat))

    @torch.no_grad()
    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace floating-point tensors by their exact means over all ranks; leave others alone.

        For buffers such as BatchNorm's, which gossip does not mix, and for the final model.
        """
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        if tensors:
            _write(tensors, self.mean(torch.cat([t.detach().reshape(-1) for t in tensors])))

    def mean(self, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Mean over all ranks by an all-reduce."""
        return self._begin_mean(x)()

    def _begin_mean(self, x: Tensor) -> Callable[[], Tensor]:
        self._prepare(x)
        total, others = x.detach().clone(), "another rank"
        work = self._guard(lambda: dist.all_reduce(total, group=self.group, async_op=True), others)
        self.bytes_sent += _all_reduce_bytes(x.nbytes, self.size)

        def finish() -> Tensor:
            self._finish(work, others)
            return total.div_(self.size)

        return finish

    def local(self, values: Float[Tensor, " n"]) -> float:
        """This rank's entry."""
        return float(values[self.rank])

    def _generators(self) -> Sequence[Generator]:
        return self._random

    # -- messages ------------------------------------------------------------------------------

    def _apply(self, phase: int, x: Tensor) -> Tensor:
        if self._started is None:
            return self._begin(phase, x)()
        (posted, finish), self._started = self._started, None
        mixed = finish()
        if not torch.equal(posted, x):
            raise RuntimeError(
                "mix must be given what `start` was, but values have changed in between: "
                "parameters must stay as they are from the backward pass to the step"
            )
        return mixed

    def _begin(self, phase: int, x: Tensor) -> Callable[[], Tensor]:
        """Post a round's messages; a call that waits for them and gives W x."""
        if self._uniform[phase]:
            return self._begin_mean(x)
        self._prepare(x)
        x, sources, row = x.contiguous(), self._sources[phase], self._rows[phase]
        buffers = self._receive_buffers(x, len(sources))
        arrivals = self._post(x, buffers, phase)

        def finish() -> Tensor:
            for done in arrivals:
                done()
            weights = [row[self.rank], *(row[source] for source in sources)]
            return weighted_sum([x, *buffers], weights)

        return finish

    def _apply_compressed(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.compressor, Compressor)
        self._prepare(difference)
        sources, row = self._sources[0], self._rows[0]
        payload = self.compressor.compress(difference, generator=self._random[0])
        message = payload.to_bytes()
        size = torch.tensor([len(message)], device=message.device)
        sizes = [torch.empty_like(size) for _ in sources]
        self._exchange(size, sizes)
        messages = [message.new_empty(int(theirs)) for theirs in sizes]
        self._exchange(message, messages)
        sent = self.compressor.decompress(payload)
        mixed = sent * row[self.rank]
        for source, theirs in zip(sources, messages, strict=True):
            read = Payload.from_bytes(theirs, difference.shape, difference.dtype)
            mixed.add_(self.compressor.decompress(read), alpha=row[source])
        return sent, mixed

    def _prepare(self, x: Tensor) -> None:
        """Be sure of the group, and that all ranks send vectors of one size."""
        others = "another rank"
        if self.group is None:
            self.group = self._guard(self._open, others)
            self._guard(lambda: self._agree_on_settings(self.group), others)
        size = (x.numel(), x.dtype)
        if size not in self._agreed:
            what = "number of entries and dtype"
            self._guard(lambda: self._agree(self.group, what, *size), others)
            self._agreed.add(size)

    def _receive_buffers(self, x: Tensor, count: int) -> list[Tensor]:
        """Memory that is kept: fresh pages for every message cost more than the sums."""
        fits = self._buffers and self._buffers[0].shape == x.shape
        if not (fits and self._buffers[0].dtype == x.dtype and self._buffers[0].device == x.device):
            self._buffers = []
        while len(self._buffers) < count:
            self._buffers.append(torch.empty_like(x))
        return self._buffers[:count]

    def _exchange(self, message: Tensor, buffers: list[Tensor]) -> None:
        """Send `message` to all targets and fill `buffers` from all sources; one fixed W."""
        for done in self._post(message, buffers, 0):
            done()

    def _post(self, message: Tensor, buffers: list[Tensor], phase: int) -> list[Callable[[], None]]:
        """Start all messages of a round; calls that wait for each receive, then for each send."""
        group = self.group
        peers = [*self._sources[phase], *self._targets[phase]]
        if not peers:
            return []
        receives = [
            dist.P2POp(dist.irecv, buffer, group=group, group_peer=source)
            for source, buffer in zip(self._sources[phase], buffers, strict=True)
        ]
        sends = [
            dist.P2POp(dist.isend, message, group=group, group_peer=target)
            for target in self._targets[phase]
        ]
        names = [f"rank {self._ranks[peer]}" for peer in peers]
        whole = f"one of {', '.join(sorted(set(names)))}"
        works = self._guard(lambda: dist.batch_isend_irecv([*receives, *sends]), whole)
        self.bytes_sent += message.nbytes * len(sends)
        if len(works) == len(names):
            return [
                functools.partial(self._finish, *pair) for pair in zip(works, names, strict=True)
            ]

        def everything() -> None:  # NCCL's coalesced messages (not run on GPU here)
            for work in works:
                self._finish(work, whole)

        return [everything, *[lambda: None] * (len(names) - 1)]

    def _finish(self, work: dist.Work, peer: str) -> None:
        self._guard(lambda: self._wait(work), peer)

    def _wait(self, work: dist.Work) -> None:
        if self.timeout is None:
            work.wait()
        else:
            work.wait(timedelta(seconds=self.timeout))

    def _guard(self, call: Callable[[], Any], peer: str) -> Any:
        try:
            return call()
        except RuntimeError as error:
            limit = "the backend's timeout" if self.timeout is None else f"{self.timeout:g} s"
            raise RuntimeError(
                f"rank {self._ranks[self.rank]} lost {peer} in gossip round {self.rounds_done}: it "
                f"ended, or was silent for {limit}. Restart all ranks from their last checkpoint."
            ) from error


def _check_compressor(compressor: object) -> None:
    if not isinstance(compressor, Compressor):
        raise TypeError(f"compressor must be a compressor, got {type(compressor).__name__}")
    if isinstance(compressor, ErrorFeedback):
        raise ValueError(
            f"compressor must keep no memory, got {compressor!r}: gossip itself feeds errors back"
        )


def _check_rows(x: Tensor, size: int) -> None:
    if x.ndim != 2 or len(x) != size:
        raise ValueError(f"x must have shape ({size}, d), a row an agent, got {tuple(x.shape)}")


def _write(tensors: list[Tensor], flat: Tensor) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


def _generator(seed: int, agent: int) -> Generator:
    return Generator().manual_seed((seed + agent) % 2**63)


def _messages(mixing: MixingMatrix) -> list[int]:
    """Messages that each agent sends in a round."""
    return [len(mixing.targets(agent)) for agent in range(mixing.size)]


def _message_bytes(message: Tensor) -> int:
    """A compressed message goes behind one of 8 bytes that tells its size."""
    return 8 + message.nbytes


def _is_uniform(mixing: MixingMatrix) -> bool:
    return mixing.size > 1 and float((mixing.matrix - 1 / mixing.size).abs().max()) < 1e-15


def _all_reduce_bytes(nbytes: int, workers: int) -> int:
    """Bytes that a rank sends in a ring all-reduce."""
    return 2 * (workers - 1) * nbytes // workers

"""Lottery tickets: sparse sub-networks found by magnitude pruning and rewinding."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class WeightMask(nn.Module):
    """A parametrization that keeps some weights at zero.

    Args:
        mask: which weights stay, boolean, of the weight's shape.

    Raises:
        TypeError: if the mask is not boolean.

    Example:
        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> from assay.analysis import WeightMask
        >>> line = torch.nn.Linear(2, 1)
        >>> keep = WeightMask(torch.tensor([[True, False]]))
        >>> _ = parametrize.register_parametrization(line, "weight", keep)
        >>> line.weight[0, 1].item() == 0
        True
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, got {mask.dtype}")
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros where the mask is false; so is its gradient."""
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What assigning to the weight stores."""
        return weight


@dataclass(frozen=True)
class Pruning:
    """What a round of pruning left.

    Args:
        remaining: weights that are not pruned.
        total: weights that can be.
        threshold: largest magnitude pruned in this round; 0 if none was.

    Example:
        >>> from assay.analysis import Pruning
        >>> Pruning(remaining=80, total=100, threshold=0.01).density
        0.8
    """

    remaining: int
    total: int
    threshold: float

    @property
    def density(self) -> float:
        """Share of the weights that remain."""
        return self.remaining / self.total


class LotteryTicket:
    """Iterative magnitude pruning with rewinding, around a training loop of your own.

    Train; prune the smallest weights of the whole model; put what remains back to where it was at
    step k of the first training; train again. The masks are parametrizations of the weights: any
    optimizer trains the masked model, and weight decay or momentum do not revive a weight.

    Make a new optimizer after each `prune`. A training that follows has k steps less to do.

    Args:
        model: any module; changed in place.
        fraction: share of the remaining weights that each round prunes.
        rewind_step: k; 0 rewinds to the weights that the model has now.
        params: names of the weights to prune, or a predicate on names; default all with two or more
            dimensions.

    Raises:
        ValueError: if a number is out of its range, a name is unknown, or no weight is left to
            prune.

    Example:
        >>> import torch
        >>> from assay.analysis import LotteryTicket
        >>> from assay.functional import fit
        >>> model = torch.nn.Linear(10, 10)
        >>> start = model.weight.detach().clone()
        >>> ticket = LotteryTicket(model, fraction=0.5)
        >>> batches = [(torch.randn(8, 10), torch.randint(10, (8,)))]
        >>> for _ in range(2):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     _ = fit(model, optimizer, batches, epochs=3, after_step=ticket.observe)
        ...     found = ticket.prune()
        >>> found.density
        0.25
        >>> torch.equal(model.weight, start * (model.weight != 0))
        True

    Reference:
        Frankle, Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
        ICLR 2019; Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket
        Hypothesis", ICML 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        fraction: float = 0.2,
        *,
        rewind_step: int = 0,
        params: Iterable[str] | Callable[[str], bool] | None = None,
    ) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be in (0, 1), got {fraction}")
        if rewind_step < 0:
            raise ValueError(f"rewind_step must not be negative, got {rewind_step}")
        self.model = model
        self.fraction = fraction
        self.rewind_step = rewind_step
        self._masks: list[tuple[nn.Module, str, WeightMask]] = []
        for name in _prunable(model, params):
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            mask = WeightMask(torch.ones_like(getattr(module, attribute), dtype=torch.bool))
            parametrize.register_parametrization(module, attribute, mask)
            self._masks.append((module, attribute, mask))
        self._rewind = self._snapshot() if rewind_step == 0 else None

    @property
    def density(self) -> float:
        """Share of the prunable weights that remain."""
        kept = sum(int(mask.mask.sum()) for _, _, mask in self._masks)
        return kept / sum(mask.mask.numel() for _, _, mask in self._masks)

    def observe(self, step: int) -> None:
        """Tell how many steps have been made; keeps the weights of step `rewind_step`.

        Args:
            step: of the first training, from 1; later trainings may call it too.
        """
        if self._rewind is None and step == self.rewind_step:
            self._rewind = self._snapshot()

    @torch.no_grad()
    def prune(self) -> Pruning:
        """Prune the smallest remaining weights of all layers together, and rewind the rest.

        Returns:
            What is left.

        Raises:
            RuntimeError: if step `rewind_step` has not been observed, or nothing is left to prune.
        """
        if self._rewind is None:
            raise RuntimeError(
                f"step {self.rewind_step} has not been observed: call observe(step) after each "
                "step of the first training, e.g. as after_step of assay.functional.fit"
            )
        originals = [_original(module, name) for module, name, _ in self._masks]
        kept = [mask.mask for _, _, mask in self._masks]
        sizes = torch.cat([w[m].abs().float() for w, m in zip(originals, kept, strict=True)])
        count = round(self.fraction * len(sizes))
        if len(sizes) - count < 1:
            raise RuntimeError(f"{len(sizes)} weights remain: nothing is left to prune")
        order = sizes.argsort(stable=True)  # ties by position, so that the count is exact
        survives = torch.ones(len(sizes), dtype=torch.bool, device=sizes.device)
        survives[order[:count]] = False
        pieces = survives.split([int(m.sum()) for m in kept])
        for mask, piece in zip(kept, pieces, strict=True):
            mask[mask.clone()] = piece
        self.rewind()
        threshold = float(sizes[order[count - 1]]) if count else 0.0
        total = sum(m.numel() for m in kept)
        return Pruning(len(sizes) - count, total, threshold)

    @torch.no_grad()
    def rewind(self) -> None:
        """Put parameters and buffers back to step `rewind_step`; masks stay.

        Raises:
            RuntimeError: if that step has not been observed.
        """
        if self._rewind is None:
            raise RuntimeError(f"step {self.rewind_step} has not been observed")
        masks = {id(mask.mask) for _, _, mask in self._masks}
        for name, tensor in self._tensors().items():
            if id(tensor) not in masks:
                tensor.copy_(self._rewind[name])

    def remove(self) -> None:
        """Make plain parameters of the masked weights: the pruned ones are stored zeros."""
        for module, attribute, _ in self._masks:
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        self._masks = []

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}


def _original(module: nn.Module, attribute: str) -> Tensor:
    return getattr(module.parametrizations, attribute).original


def _prunable(model: nn.Module, params: Iterable[str] | Callable[[str], bool] | None) -> list[str]:
    known = dict(model.named_parameters())
    if params is None:
        chosen = [name for name, p in known.items() if p.ndim > 1]
    elif callable(params):
        chosen = [name for name in known if params(name)]
    else:
        chosen = list(params)
        for name in chosen:
            if name not in known:
                raise ValueError(f"the model has no parameter {name!r}; it has {list(known)}")
    if not chosen:
        raise ValueError("no weights to prune: `params` matches none, or the model has none")
    places: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        places[id(p)] = places.get(id(p), 0) + 1
    for name in chosen:
        if places[id(known[name])] > 1:
            raise ValueError(
                f"{name!r} is tied to another parameter, which a mask would separate: leave it out "
                "through `params`"
            )
    return chosen

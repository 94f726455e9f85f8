"""Fast geometric ensembling: an ensemble for the price of one training run."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.landscape.evaluation import logits_of


class FGE:
    r"""An ensemble of snapshots of one network under a cyclical learning rate.

    Training goes on from a network at about 80 % of its usual budget with `FGECyclicLR`. Whenever
    the learning rate is lowest, `collect` keeps a copy of the weights; `predict_proba` averages the
    softmax probabilities of the members (not their logits, whose mean is another distribution).

    Args:
        model: the network in training; `collect` reads it, and it computes the predictions: it
            returns logits `(N, C, ...)`.

    Example:
        >>> import torch
        >>> from assay.landscape import FGE
        >>> from assay.optim import FGECyclicLR
        >>> model = torch.nn.Linear(2, 3)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> schedule = FGECyclicLR(sgd, max_lr=0.05, min_lr=0.005, cycle_steps=4)
        >>> ensemble = FGE(model)
        >>> x, y = torch.randn(8, 2), torch.randint(3, (8,))
        >>> for iteration in range(12):
        ...     sgd.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     sgd.step()
        ...     schedule.step()
        ...     if schedule.is_snapshot_step:
        ...         ensemble.collect()
        >>> len(ensemble), ensemble.predict_proba(x).shape
        (3, torch.Size([8, 3]))

    Reference:
        Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, "Loss Surfaces, Mode Connectivity, and Fast
        Ensembling of DNNs", NeurIPS 2018.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.members: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        """The number of members."""
        return len(self.members)

    def __repr__(self) -> str:
        return f"FGE(members={len(self)}, model={type(self.model).__name__})"

    def collect(self) -> None:
        """Keep a copy of the model's present parameters and buffers as a member."""
        self.members.append(copy.deepcopy(self.model.state_dict()))

    def member_probabilities(self, *inputs: object) -> Float[Tensor, "m n ..."]:
        """Softmax probabilities of every member, in evaluation mode.

        Args:
            *inputs: what the model takes; it returns logits `(N, C, ...)`.

        Returns:
            Probabilities `(members, N, C, ...)`.

        Raises:
            ValueError: if nothing has been collected, or the model's output has no classes.
            TypeError: if the model does not return a tensor.
        """
        if not self.members:
            raise ValueError("the ensemble is empty: collect() a member first")
        network = copy.deepcopy(self.model).eval()
        with torch.no_grad():
            probabilities = []
            for member in self.members:
                network.load_state_dict(member)
                logits = logits_of(network(*inputs), user="FGE")
                probabilities.append(logits.softmax(dim=1))
        return torch.stack(probabilities)

    def predict_proba(self, *inputs: object) -> Float[Tensor, "n ..."]:
        """The mean of the members' probabilities, in evaluation mode.

        Args:
            *inputs: what the model takes; it returns logits `(N, C, ...)`.

        Returns:
            Probabilities `(N, C, ...)`, which sum to 1 over the classes.

        Raises:
            ValueError: if nothing has been collected, or the model's output has no classes.
            TypeError: if the model does not return a tensor.
        """
        return self.member_probabilities(*inputs).mean(dim=0)

    def state_dict(self) -> dict[str, Any]:
        """The members, for `torch.save`.

        Returns:
            `{"members": [state_dict, ...]}`, not copied.
        """
        return {"members": list(self.members)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the members of another ensemble over a model of the same architecture.

        Args:
            state_dict: what `state_dict` gave.

        Raises:
            KeyError: if it has no `"members"`.
        """
        self.members = [dict(member) for member in state_dict["members"]]

"""The data of an examination: sampled once, and what the model makes of it computed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.analysis import embedding_of
from assay.analysis.classifier import frozen
from assay.data import stratified
from assay.functional import per_sample_loss
from assay.lab.lab import derive_seed

Task = Literal["classification", "regression", "sequence"]
LossFn = Callable[[Any, Tensor], Tensor]
BATCH = 256


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs and targets, on the model's device.

    Args:
        x: `(N, ...)`, what the model takes.
        y: class indices `(N,)`, values shaped as the model's outputs, or token classes `(N, T)`.
        index: place of each sample in the user's data, `(N,)`.

    Example:
        >>> import torch
        >>> from assay.examine import Split
        >>> len(Split(torch.zeros(3, 2), torch.zeros(3), torch.arange(3)))
        3
    """

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def select(self, index: Tensor) -> "Split":
        """The samples at these positions.

        Args:
            index: positions, `(M,)`.
        """
        index = index.to(self.y.device)
        return Split(self.x[index], self.y[index], self.index[index.to(self.index.device)])


@dataclass(eq=False)
class Sample:
    """What every panel is given beside the model.

    Panels read `train` and `test`, take stratified parts with `draw`, and share what `outputs` and
    `features` compute, which happens once.

    Args:
        model: maps `x` of shape `(N, ...)` to outputs: logits `(N, C)` of a classifier, logits
            `(N, C, T)` over tokens, or values shaped as the targets.
        train: samples the model was trained on.
        test: samples it was not.
        task: kind of problem.
        classes: names of the classes; empty for regression.
        loss_fn: `(outputs, y) -> mean loss`.
        sizes: how many samples the user's data has in each split; None if it does not say.
        notes: what a reader should know of the sampling.
        seed: of everything random.

    Example:
        >>> import torch
        >>> from assay.examine import Sample, Split
        >>> split = Split(torch.randn(20, 4), torch.arange(20) % 2, torch.arange(20))
        >>> model, task = torch.nn.Linear(4, 2), "classification"
        >>> data = Sample(model, split, split, task, ("no", "yes"), task_loss(task))
        >>> data.outputs("test").shape, len(data.draw("train", 6, "norms"))
        (torch.Size([20, 2]), 6)
    """

    model: nn.Module
    train: Split
    test: Split
    task: Task
    classes: tuple[str, ...]
    loss_fn: LossFn
    sizes: dict[str, int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        self._outputs: dict[str, Tensor] = {}
        self._features: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where samples and model are."""
        return self.train.y.device

    def split(self, name: str) -> Split:
        """The split of a name.

        Args:
            name: `"train"` or `"test"`.

        Raises:
            ValueError: for any other name.
        """
        if name not in ("train", "test"):
            raise ValueError(f"name must be 'train' or 'test', got {name!r}")
        return self.train if name == "train" else self.test

    def generator(self, *key: object) -> torch.Generator:
        """A fresh CPU generator for a key, the same in every examination with this seed.

        Args:
            key: what it is for.
        """
        return torch.Generator().manual_seed(derive_seed("examine", self.seed, *key))

    def draw(self, name: str, n: int, *key: object) -> Split:
        """At most `n` samples of a split, stratified by class, in random order.

        Args:
            name: `"train"` or `"test"`.
            n: how many.
            key: which choice; the same key gives the same samples.
        """
        split = self.split(name)
        n = min(n, len(split))
        seed = derive_seed("draw", self.seed, name, *key) % 2**63
        if self.task == "classification":
            return split.select(stratified(split.y.cpu(), n, seed))
        generator = torch.Generator().manual_seed(seed)
        return split.select(torch.randperm(len(split), generator=generator)[:n])

    def outputs(self, name: str) -> Tensor:
        """What the model answers on a split, in evaluation mode; computed once, no gradient.

        Args:
            name: `"train"` or `"test"`.

        Returns:
            `(N, C)` logits, `(N, d)` predictions, or `(N, C, T)` logits; float32 or better.
        """
        if name not in self._outputs:
            with torch.no_grad(), frozen(self.model):
                parts = [self.model(part) for part in self.split(name).x.split(BATCH)]
            out = torch.cat(parts)
            self._outputs[name] = out.to(torch.promote_types(out.dtype, torch.float32))
        return self._outputs[name]

    def features(self, name: str) -> Tensor:
        """What enters the model's last linear layer, `(N, d)`; computed once.

        Args:
            name: `"train"` or `"test"`.

        Raises:
            ValueError: if the model has no `nn.Linear`, or is not a classifier.
        """
        if name not in self._features:
            self._features[name] = embedding_of(self.model)(self.split(name).x)
        return self._features[name]

    def losses(self, name: str) -> Tensor:
        """The loss of every sample of a split, `(N,)`.

        Args:
            name: `"train"` or `"test"`.
        """
        outputs, y = self.outputs(name), self.split(name).y
        try:
            return per_sample_loss(self.loss_fn)(outputs, y)
        except ValueError:  # a loss of the user's: one sample at a time
            pairs = zip(outputs.split(1), y.split(1), strict=True)
            return torch.stack(
                [self.loss_fn(output, target).reshape(()) for output, target in pairs]
            )


def task_loss(task: Task) -> LossFn:
    """The usual mean loss of a task, as torch's module: cross-entropy, or the mean squared error.

    Args:
        task: kind of problem.

    Example:
        >>> import torch
        >>> from assay.examine import task_loss
        >>> task_loss("regression")(torch.zeros(2, 1), torch.ones(2, 1)).item()
        1.0
    """
    return nn.MSELoss() if task == "regression" else nn.CrossEntropyLoss()


def class_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Names of the classes, made up where there are none.

    Args:
        names: given ones, or None.
        count: of classes.
    """
    return tuple(map(str, range(count) if names is None else names))

"""The network under examination: made callable, checked against its data, and left as it was."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.examine.sample import Sample, Split, Task, class_names, task_loss
from assay.examine.sources import as_data, draw
from assay.lab.usage import UsageError

Call = Callable[[nn.Module, Tensor], Any]


class Subject(nn.Module):
    """A model of any kind as a function from inputs to one tensor.

    Args:
        model: the user's.
        call: `(model, x) -> output`; default `model(x)`.
        task: kind of problem; token logits `(N, T, C)` become `(N, C, T)`, as torch's loss wants.

    Raises:
        UsageError: in a forward pass, if the output holds no tensor.

    Example:
        >>> import torch
        >>> from assay.examine.subject import Subject
        >>> class Named(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return {"logits": super().forward(x)}
        >>> Subject(Named(4, 3))(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, model: nn.Module, call: Call | None = None, task: Task = "classification"
    ) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.task = task

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of inputs `(N, ...)`."""
        output = self.model(x) if self.call is None else self.call(self.model, x)
        tensor = tensor_in(output)
        return tensor.transpose(1, 2) if self.task == "sequence" else tensor


class Program(nn.Module):
    """An exported program as a module whose mode can be set, though that changes nothing.

    Args:
        program: from `torch.export.load`.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.graph = program.module()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the program answers."""
        return self.graph(*args, **kwargs)

    def train(self, mode: bool = True) -> "Program":
        """Set the flag alone: an exported graph has no modes."""
        self.training = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        """A copy, without torch's warning about types of its own."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def tensor_in(output: Any) -> Tensor:
    """The tensor of outputs in what a model returned.

    Args:
        output: a tensor; a mapping or object with `logits`; or a tuple that begins with a tensor,
            as a recurrent module's.

    Raises:
        UsageError: if there is none.
    """
    if isinstance(output, Mapping):
        found = output.get("logits")
    else:
        found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(output, tuple) and not isinstance(found, Tensor) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        keys = (
            f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        )
        raise UsageError(
            f"the model returns a {type(output).__name__}{keys}, which holds no tensor of logits: "
            "give an adapter `call(model, x) -> tensor` (--call FILE:FUNCTION)"
        )
    return found


def prepare(
    model: Any,
    data: Any,
    *,
    call: Call | None = None,
    loss_fn: Callable | None = None,
    samples: int = 4096,
    seed: int = 0,
) -> Sample:
    """Sample the data and check that the model takes it.

    Args:
        model: a trained module; it is not changed, panels work on a copy.
        data: see `assay.examine.sources.as_data`.
        call: `(model, x) -> output`, for models that are not called as `model(x)`.
        loss_fn: `(outputs, y) -> mean loss`; by default cross-entropy or the mean squared error.
        samples: at most so many of each split.
        seed: of the choice.

    Raises:
        UsageError: with one line on what does not fit: no module, NaN in the weights, inputs that
            the model does not take, labels out of range.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    _check_weights(model)
    given = as_data(data)
    drawn = {"train": draw(given.train, samples, seed)}
    notes = []
    if given.test is None:
        notes.append("No test data was given: what is said of test samples is of train samples.")
        drawn["test"] = drawn["train"]
    else:
        drawn["test"] = draw(given.test, samples, seed + 1)
    notes += [f"{name.capitalize()} samples: {part.note}." for name, part in drawn.items()]
    working = _copy(model).eval()
    place = next((p for p in working.parameters() if p.is_floating_point()), None)
    device = torch.device("cpu") if place is None else place.device
    dtype = torch.float32 if place is None else place.dtype
    splits = {}
    for name, part in drawn.items():
        splits[name] = Split(_inputs(part.x, dtype, device, notes), part.y.to(device), part.index)
    tasks: dict[str, Task] = {
        name: _fit_task(working, call, split) for name, split in splits.items()
    }
    task = tasks["train"]
    if tasks["test"] != task:
        raise UsageError(f"the train data are for {task}, the test data for {tasks['test']}")
    subject = Subject(working, call, task).eval()
    for name, split in splits.items():
        splits[name] = Split(split.x, _targets(subject, split, task, name), split.index)
    classes: tuple[str, ...] = ()
    if task != "regression":
        names = None if given.classes is None or not len(given.classes) else given.classes
        classes = class_names(names, _check_labels(subject, splits, names))
    loss = loss_fn or task_loss(task)
    _check_loss(subject, splits["train"], loss)
    return Sample(
        subject,
        splits["train"],
        splits["test"],
        task,
        classes,
        loss,
        {name: part.size for name, part in drawn.items()},
        notes,
        seed,
    )


def _check_loss(subject: Subject, split: Split, loss_fn: Callable) -> None:
    """One finite number for a few samples; a panel would show whatever else it is as a figure."""
    x, y = split.x[:8], split.y[:8]
    try:
        with torch.no_grad():
            loss = loss_fn(subject(x), y)
    except Exception as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"the loss does not take (outputs, targets): {said}") from error
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(f"the loss must be a mean, one number in floating point, got {got}")
    if not bool(loss.isfinite()):
        raise UsageError(f"the loss of the first {len(x)} train samples is {loss.item()}")


def _check_weights(model: nn.Module) -> None:
    for kind, tensors in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, tensor in tensors:
            if tensor.is_floating_point() and not tensor.isfinite().all():
                count = int((~tensor.isfinite()).sum())
                raise UsageError(
                    f"the {kind} {name} has {count} of {tensor.numel()} entries that are NaN or "
                    "infinite: training has diverged, or the file is damaged"
                )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UsageError(
            f"the model cannot be copied, so it cannot be left untouched: {error}"
        ) from error


def _inputs(x: Tensor, dtype: torch.dtype, device: torch.device, notes: list[str]) -> Tensor:
    if x.dtype == torch.uint8 and x.ndim >= 3:
        note = "Inputs of bytes were divided by 255."
        if note not in notes:
            notes.append(note)
        x = x.float() / 255
    if x.is_floating_point():
        if not x.isfinite().all():
            raise UsageError("the inputs have entries that are NaN or infinite")
        x = x.to(dtype)
    return x.to(device)


def _fit_task(model: nn.Module, call: Call | None, split: Split) -> Task:
    x, y = split.x[:2], split.y[:2]
    try:
        with torch.no_grad():
            output = tensor_in(model(x) if call is None else call(model, x))
    except UsageError:
        raise
    except Exception as error:
        shape = f"{tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}"
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"the model does not take the data (a batch of shape {shape}): {said}; if it is called "
            "in another way than model(x), give an adapter (--call FILE:FUNCTION)"
        ) from error
    if not output.is_floating_point():
        raise UsageError(
            f"the model returns {str(output.dtype).removeprefix('torch.')}: logits or values in "
            "floating point are needed"
        )
    if output.ndim == 0 or len(output) != len(x):
        raise UsageError(
            f"the model returns {tuple(output.shape)} for {len(x)} samples: the first dimension "
            "must be the sample"
        )
    task: Task = "regression"
    if not y.is_floating_point():
        task = "sequence" if y.ndim == 2 and output.ndim == 3 else "classification"
        if task == "classification" and (y.ndim != 1 or output.ndim != 2 or output.shape[1] < 2):
            raise UsageError(
                f"targets of shape {tuple(y.shape)} are class indices, which does not fit outputs "
                f"of shape {tuple(output.shape)}: a classifier returns (N, C) with C of at least "
                "2; targets of a regression are in floating point"
            )
        if task == "sequence" and output.shape[1] != y.shape[1]:
            raise UsageError(
                f"targets of shape {tuple(y.shape)} are token classes, which does not fit outputs "
                f"of shape {tuple(output.shape)}: they must be (N, T, C)"
            )
    return task


def _targets(subject: Subject, split: Split, task: Task, name: str) -> Tensor:
    y = split.y
    if task != "regression":
        return y.long()
    with torch.no_grad():
        output = subject(split.x[:1])
    shape = (len(y), *output.shape[1:])
    if not y.isfinite().all():
        raise UsageError(f"the {name} targets have entries that are NaN or infinite")
    if y.numel() != torch.Size(shape).numel():
        raise UsageError(
            f"{name} targets of shape {tuple(y.shape)} do not fit outputs of shape {shape}"
        )
    return y.reshape(shape).to(output.dtype)


def _check_labels(subject: Subject, splits: dict[str, Split], names: Any) -> int:
    with torch.no_grad():
        count = subject(splits["train"].x[:1]).shape[1]
    for name, split in splits.items():
        valid = split.y[split.y != -100] if split.y.ndim == 2 else split.y
        if not len(valid):
            raise UsageError(f"the {name} labels are all -100, which means to leave them out")
        low, high = int(valid.min()), int(valid.max())
        if low < 0 or high >= count:
            raise UsageError(
                f"the {name} labels run from {low} to {high}, but the model has {count} outputs: "
                f"labels must lie in [0, {count - 1}]"
            )
    if names is not None and len(names) != count:
        raise UsageError(f"{len(names)} class names for a model with {count} outputs")
    return count


class Snapshot:
    """What a model was, to tell whether a panel has left it so.

    Parameters, buffers, gradients, modes, hooks and submodules are remembered; Python attributes
    are not.

    Args:
        model: to remember.

    Example:
        >>> import torch
        >>> from assay.examine.subject import Snapshot
        >>> model = torch.nn.Linear(2, 2)
        >>> snapshot = Snapshot(model)
        >>> _ = model.weight.data.zero_()
        >>> snapshot.changes(model), snapshot.restore(model), snapshot.changes(model)
        (['parameter weight'], None, [])
    """

    def __init__(self, model: nn.Module) -> None:
        self._state = {key: _clone(value) for key, value in _state(model).items()}
        self._tensors = dict(tensors_of(model))
        self._modules = [
            (module, module.training, {name: dict(table) for name, table in _tables(module)})
            for module in model.modules()
        ]

    def changes(self, model: nn.Module) -> list[str]:
        """What differs now, bit for bit.

        Args:
            model: the same.
        """
        now = _state(model)
        keys = self._state.keys() | now.keys()
        return sorted(
            key
            for key in keys
            if key not in now
            or key not in self._state
            or not _identical(self._state[key], now[key])
        )

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put values, gradients, modes, hooks and submodules back.

        Args:
            model: the same.
        """
        for module, training, tables in self._modules:
            module.training = training
            for name, remembered in tables.items():
                table = getattr(module, name)
                table.clear()
                table.update(remembered)
        for key, tensor in self._tensors.items():
            if not tensor.is_leaf:
                tensor.detach_()
            tensor.grad = None  # its form must fit what is put back next
            tensor.data = _clone(self._state[key])
            tensor.requires_grad_(self._state[f"requires_grad of {key}"])
            tensor.grad = _clone(self._state[f"gradient of {key}"])


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each with its kind and name.

    Args:
        model: whose.
    """
    for name, p in model.named_parameters():
        yield f"parameter {name}", p
    for name, b in model.named_buffers():
        yield f"buffer {name}", b


_TABLES = (
    "_parameters", "_buffers", "_modules",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def _tables(module: nn.Module) -> Iterator[tuple[str, dict]]:
    """What a module registers: its tensors, parts and hooks, by name."""
    for name in _TABLES:
        yield name, getattr(module, name)


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything in which two moments of a model can differ."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"mode of {name}"] = module.training
        hooks = [list(table.items()) for key, table in _tables(module) if "hooks" in key]
        state[f"hooks of {name}"] = hooks
    for key, tensor in tensors_of(model):
        state[key] = tensor.detach()
        state[f"requires_grad of {key}"] = tensor.requires_grad
        state[f"gradient of {key}"] = tensor.grad if tensor.is_leaf else None
    return state


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _identical(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def untouched_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python in the block; put them back after.

    Args:
        seed: for all three.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    state, pythons = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)
            random.setstate(pythons)

"""Quantities beside a backward pass that the user makes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from assay.curvature.capture import Capture
from assay.curvature.chunks import count_samples
from assay.curvature.engine import (
    Selection,
    Settings,
    check_quantities,
    evaluate,
    needs_trace,
    refuse_batch_statistics,
    unwrapped,
    watched,
    without_autocast,
)
from assay.curvature.objective import find_objective
from assay.curvature.quantities import Quantities
from assay.functional import select_parameters


class _Watch(Capture):
    """A capture that evaluates when `loss.backward()` is called."""

    on_backward: Callable[[Tensor], None]

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is Tensor.backward:
            self.on_backward(args[0])
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@contextlib.contextmanager
def extend(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    quantities: Iterable[str],
    *,
    mc_samples: int | None = None,
    generator: torch.Generator | None = None,
    params: Selection = None,
    kfac_approx: str = "expand",
    max_features: int = 4096,
    batch_dim: int = 0,
) -> Iterator[Quantities]:
    """Compute quantities at every `loss.backward()` inside the block.

    The result is refilled by each backward pass and keeps its last values after the block. The
    pass itself is untouched: `.grad` accumulates, hooks of `DistributedDataParallel` run. All
    forward passes since the last backward pass belong to it, so that a model that is called twice
    has its gradients added; make passes that are not differentiated under `torch.no_grad()`.

    Args:
        model: any module, called inside the block.
        loss_fn: the loss; only its `reduction` is read. None for a mean over samples.
        quantities: see `compute`.
        mc_samples: see `compute`.
        generator: see `compute`.
        params: see `compute`.
        kfac_approx: see `compute`.
        max_features: see `compute`.
        batch_dim: see `compute`.

    Yields:
        The quantities, empty until the first backward pass.

    Raises:
        ValueError: as `compute`; also if forward passes of one backward pass differ in batch size.

    Example:
        >>> import torch
        >>> from assay import curvature
        >>> model, loss_fn = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> with curvature.extend(model, loss_fn, ["variance"]) as q:
        ...     loss_fn(model(x), y).backward()
        >>> q["variance"]["weight"].shape == model.weight.grad.shape
        True
    """
    wanted = check_quantities(quantities)
    settings = Settings(
        wanted, mc_samples, generator, params, kfac_approx, max_features, batch_dim, {}
    )
    model = unwrapped(model)
    selected = select_parameters(model, params)
    per_sample = wanted != {"grad"}
    watch = _Watch(
        selected,
        model.parameters(),
        model.buffers(),
        trace=needs_trace(wanted),
        per_sample=per_sample,
    )
    result = Quantities({}, 0)
    outputs: list[Any] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled():
            return
        if per_sample:
            refuse_batch_statistics(model)
        samples = count_samples((args, kwargs), batch_dim)
        if outputs and samples != watch.samples:
            raise ValueError(
                f"forward passes of one backward pass have {watch.samples} and {samples} samples"
            )
        watch.mark_inputs((args, kwargs), samples)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        if torch.is_grad_enabled():
            outputs.append(output)

    def on_backward(loss: Tensor) -> None:
        if not outputs:
            return
        with torch.enable_grad(), without_autocast():
            objective = find_objective(
                loss_fn, loss, outputs, None, watch.record, watch.samples, batch_dim, cut=False
            )
            found = evaluate(watch, objective, selected, settings)
        result.replace(found)
        outputs.clear()
        watch.start_again()

    watch.on_backward = on_backward
    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after),
    ]
    try:
        with watched(model, wanted), watch:
            yield result
    finally:
        for handle in handles:
            handle.remove()
        outputs.clear()
        watch.forget()
        del watch.on_backward  # which knows the watch and the result: a circle

"""Fresh weights for a network of any architecture."""

import torch
from torch import Tensor, nn

_METHODS = ("reset_parameters", "_reset_parameters")  # the latter is torch's attention's


@torch.no_grad()
def reinitialize(model: nn.Module, *, generator: torch.Generator | None = None) -> None:
    """Draw the parameters of a model anew, in place, as its modules did when they were made.

    Calls `reset_parameters` of every module that has it, inner modules first, as torch's layers
    do; norms forget their running statistics too. Frozen parameters (`requires_grad` is False) stay
    as they are: a training would not have changed them. Which parameters were drawn is not taken on
    trust: they are NaN before, so that one that nobody writes is found.

    Args:
        model: any module.
        generator: source of the seed, on the CPU; default torch's own.

    Raises:
        ValueError: names the parameters that no module draws; the model is then as it was. These
            are mostly those that a user's module makes itself (`nn.Parameter`) without a
            `reset_parameters` of its own.

    Example:
        >>> import torch
        >>> from assay.functional import reinitialize
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        >>> before = model[0].weight.clone()
        >>> reinitialize(model, generator=torch.Generator().manual_seed(1))
        >>> torch.equal(model[0].weight, before)
        False
    """
    parameters = dict(model.named_parameters())
    tensors = [*parameters.values(), *model.buffers()]
    before = [tensor.clone() for tensor in tensors]
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    for p in wanted.values():
        p.fill_(torch.nan)
    devices = sorted({p.device.index for p in parameters.values() if p.device.type == "cuda"})
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for module in reversed(list(model.modules())):
            _reset(module)
    for p, value in zip(parameters.values(), before, strict=False):
        if not p.requires_grad:
            p.copy_(value)
    missing = [name for name, p in wanted.items() if bool(p.isnan().any())]
    if missing:
        _put_back(tensors, before)
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"no module draws the parameters {', '.join(missing[:3])}{more}: give the module that "
            "has them a method reset_parameters()"
        )


def _reset(module: nn.Module) -> None:
    for name in _METHODS:
        method = getattr(module, name, None)
        if callable(method):
            try:
                method()
            except Exception:  # a user's method with other arguments: the NaN that it leaves tell
                continue
            return


def _put_back(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)

"""The rules: which use of its weights a call of a torch function is."""

from collections.abc import Callable
from functools import partial
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from assay.curvature.uses import ConvUse, ElementUse, EmbeddingUse, LinearUse, Use, Weight

Finder = Callable[[Any], Weight | None]
Pending = Callable[[Tensor], Use] | None
"""A rule is asked before the call, with the inputs as they are then, and finished by its result.

It answers None if the call is not of the form it knows.
"""


def _slots(find: Finder, **tensors: Any) -> dict[str, Weight]:
    found = {slot: find(tensor) for slot, tensor in tensors.items()}
    return {slot: weight for slot, weight in found.items() if weight is not None}


def _dependent(find: Finder, *tensors: Any) -> bool:
    """Whether any of these is itself a weight, which the rules for inputs do not expect."""
    return any(find(tensor) is not None for tensor in tensors)


# -- linear maps ---------------------------------------------------------------------------------


def linear(find: Finder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Pending:
    """`F.linear`."""
    if _dependent(find, input) or weight.ndim != 2:
        return None
    return _linear(_slots(find, weight=weight, bias=bias), input, grads_left=True)


def matmul(find: Finder, input: Tensor, other: Tensor) -> Pending:
    """`x @ W` with a matrix W."""
    if _dependent(find, input) or other.ndim != 2 or input.ndim < 2:
        return None
    return _linear(_slots(find, weight=other), input, grads_left=False)


def addmm(find: Finder, bias: Tensor, input: Tensor, other: Tensor, **kwargs: Any) -> Pending:
    """`b + x @ W`, as in the one-dimensional convolutions of GPT-2."""
    if kwargs or _dependent(find, input) or bias.shape != other.shape[1:]:
        return None
    return _linear(_slots(find, weight=other, bias=bias), input, grads_left=False)


def _linear(slots: dict[str, Weight], input: Tensor, *, grads_left: bool) -> Pending:
    version = input._version

    def finish(out: Tensor) -> Use:
        use = LinearUse(slots, out.shape, get_gradient_edge(out), grads_left=grads_left)
        use.input = input.detach()
        use.saved = [(use.input, version)]
        return use

    return finish


def convolution(
    spatial: int,
    find: Finder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Pending:
    """`F.conv1d`, `F.conv2d`, `F.conv3d`."""
    if _dependent(find, input) or input.ndim != spatial + 2:
        return None
    kernel = tuple(weight.shape[2:])
    dilation = _tuple(dilation, spatial)
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(span % 2 for span in spans):  # the odd one goes to the end
            input = F.pad(input, [side for s in reversed(spans) for side in (s // 2, s - s // 2)])
            padding = 0
        else:
            padding = tuple(span // 2 for span in spans)
    elif padding == "valid":
        padding = 0
    return _convolution(
        _slots(find, weight=weight, bias=bias),
        input,
        groups=groups,
        kernel=kernel,
        stride=_tuple(stride, spatial),
        padding=_tuple(padding, spatial),
        dilation=dilation,
    )


def transposed_convolution(
    spatial: int,
    find: Finder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Pending:
    """`F.conv_transpose1d`, `F.conv_transpose2d`, `F.conv_transpose3d`."""
    strides = _tuple(stride, spatial)
    rest = _tuple(output_padding, spatial)
    if _dependent(find, input) or input.ndim != spatial + 2:
        return None
    if any(r >= s for r, s in zip(rest, strides, strict=True)):
        return None
    return _convolution(
        _slots(find, weight=weight, bias=bias),
        input,
        grads_left=False,
        transposed=True,
        groups=groups,
        kernel=tuple(weight.shape[2:]),
        stride=strides,
        padding=_tuple(padding, spatial),
        dilation=_tuple(dilation, spatial),
    )


def _convolution(slots: dict[str, Weight], input: Tensor, **settings: Any) -> Pending:
    version = input._version

    def finish(out: Tensor) -> Use:
        edge = get_gradient_edge(out)
        use = ConvUse(slots, out.shape, edge, feature_dims=out.ndim - 1, **settings)
        use.input = input.detach()
        use.saved = [(use.input, version)]
        return use

    return finish


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * length
    return tuple(value) if len(value) == length else tuple(value) * length


# -- tables --------------------------------------------------------------------------------------


def embedding(
    find: Finder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Pending:
    """`F.embedding`."""
    if scale_grad_by_freq:
        raise ValueError(
            "scale_grad_by_freq divides by counts of the whole batch: a sample has no gradient of "
            "its own; build the embedding without it"
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    slots = _slots(find, weight=weight)
    version = input._version

    def finish(out: Tensor) -> Use:
        use = EmbeddingUse(slots, out.shape, get_gradient_edge(out), padding_idx=padding_idx)
        use.indices = input
        use.saved = [(input, version)]
        return use

    return finish


# -- norms ---------------------------------------------------------------------------------------


def layer_norm(
    find: Finder,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Pending:
    """`F.layer_norm`."""
    shape = tuple(normalized_shape)
    return _norm(
        find, input, weight, bias, lambda x: F.layer_norm(x, shape, None, None, eps), len(shape)
    )


def rms_norm(
    find: Finder,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Pending:
    """`F.rms_norm`."""
    shape = tuple(normalized_shape)
    return _norm(find, input, weight, None, lambda x: F.rms_norm(x, shape, None, eps), len(shape))


def group_norm(
    find: Finder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Pending:
    """`F.group_norm`."""
    return _norm(find, input, weight, bias, lambda x: F.group_norm(x, num_groups, None, None, eps))


def batch_norm(
    find: Finder,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Pending:
    """`F.batch_norm` with running statistics."""
    if training or running_mean is None or running_var is None:
        return None
    mean, var = running_mean.detach(), running_var.detach()

    def normalize(x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, None, None, False, 0.0, eps)

    return _norm(find, input, weight, bias, normalize, constants=(mean, var))


def instance_norm(
    find: Finder,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Pending:
    """`F.instance_norm`."""
    if not use_input_stats:
        return batch_norm(find, input, running_mean, running_var, weight, bias, False, 0.0, eps)
    return _norm(find, input, weight, bias, lambda x: F.instance_norm(x, eps=eps))


def _norm(
    find: Finder,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
    trailing: int | None = None,
    constants: tuple[Tensor, ...] = (),
) -> Pending:
    """z = x̂ ⊙ w + b over the trailing dimensions, or over dimension 1 (channels)."""
    if _dependent(find, input):
        return None
    slots = _slots(find, weight=weight, bias=bias)
    saved = [(t, t._version) for t in (input.detach(), *constants)]
    dtype = next(iter(slots.values())).tensor.dtype

    def finish(out: Tensor) -> Use:
        use = ElementUse(slots, out.shape, get_gradient_edge(out), saved=saved)
        use.feature_dims = out.ndim - 1 if trailing is None else trailing
        use.alignment = (1,) if trailing is None else None
        use.factors = {"weight": lambda: normalize(saved[0][0].to(dtype)), "bias": 1.0}
        return use

    return finish


# -- sums and products ---------------------------------------------------------------------------


def _entrywise(
    factor_of: Callable[[int, Any], Any], find: Finder, a: Any, b: Any, **kwargs: Any
) -> Pending:
    if kwargs or (_dependent(find, a) and _dependent(find, b)):
        return None
    place = 0 if _dependent(find, a) else 1
    weight, other = (find(a), b) if place == 0 else (find(b), a)
    if weight is None:
        return None
    factor = factor_of(place, other)
    saved = []
    if isinstance(factor, Tensor):
        saved = [(factor.detach(), factor._version)]
        factor = partial(getitem, saved[0], 0)
    trailing = weight.tensor.ndim
    while trailing and weight.tensor.shape[-trailing] == 1:
        trailing -= 1

    def finish(out: Tensor) -> Use:
        edge = get_gradient_edge(out)
        return ElementUse(
            {"weight": weight}, out.shape, edge, trailing, saved=saved, factors={"weight": factor}
        )

    return finish


add = partial(_entrywise, lambda place, other: 1.0)
subtract = partial(_entrywise, lambda place, other: 1.0 if place == 0 else -1.0)
multiply = partial(_entrywise, lambda place, other: other)

RULES: dict[Callable, Callable[..., Pending]] = {
    F.linear: linear,
    torch.addmm: addmm,
    Tensor.addmm: addmm,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), matmul),
    **dict.fromkeys(
        (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), add
    ),
    **dict.fromkeys(
        (torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__), subtract
    ),
    **dict.fromkeys(
        (torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__),
        multiply,
    ),
    **{
        function: partial(convolution, spatial)
        for spatial, function in enumerate((F.conv1d, F.conv2d, F.conv3d), start=1)
    },
    **{
        function: partial(transposed_convolution, spatial)
        for spatial, function in enumerate(
            (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), start=1
        )
    },
}

"""Attention and recurrent layers, written as the linear maps that they consist of.

One call of torch's own functions does many things to each parameter; here each happens in a call
of its own, so that each has its inputs and its gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Unrolled:
    """A replacement for a torch function, and for which arguments it holds."""

    function: Callable
    accepts: Callable[..., bool]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the torch function would return."""
        return self.function(*args, **kwargs)


# -- attention -----------------------------------------------------------------------------------


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` for `(L, N, E)` inputs."""
    width = embed_dim_to_check
    same = query is key and key is value
    # Samples first, so that no one has to ask later which axis they are.
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    v = k if value is key else value.transpose(0, 1)
    if same and not use_separate_proj_weight:
        q, k, v = F.linear(q, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        if use_separate_proj_weight:
            matrices = (q_proj_weight, k_proj_weight, v_proj_weight)
        else:
            together: Any = in_proj_weight
            matrices = together.split(width)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.split(width)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), matrices, biases, strict=True))
    samples = len(q)
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(samples, 1, width)], 1)
        v = torch.cat([v, bias_v.expand(samples, 1, width)], 1)
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = _attention_mask(attn_mask, key_padding_mask, samples, num_heads, k.shape[2], q)
    dropout = dropout_p if training else 0.0
    scores = (q @ k.mT) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    attention = F.dropout(scores.softmax(-1), dropout)
    merged = (attention @ v).transpose(1, 2).flatten(2)
    out = F.linear(merged, out_proj_weight, out_proj_bias).transpose(0, 1)
    if not need_weights:
        return out, None
    return out, attention.mean(1) if average_attn_weights else attention


def _attention_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    samples: int,
    heads: int,
    keys: int,
    like: Tensor,
) -> Tensor | None:
    """Both masks as one to be added, `(N or 1, heads or 1, L or 1, keys)`."""
    total = None
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, keys, like)
        total = attn_mask.view(samples, heads, *attn_mask.shape[1:]) if attn_mask.ndim == 3 else (
            attn_mask[None, None]
        )  # fmt: skip
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, keys, like)[:, None, None]
        total = padding if total is None else total + padding
    return total


def _additive(mask: Tensor, keys: int, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    # Keys that the layer appends (bias_k, zeros) are never masked.
    return F.pad(mask.to(like.dtype), (0, keys - mask.shape[-1]))


def _ordinary_attention(*args: Any, static_k: Any = None, static_v: Any = None, **_: Any) -> bool:
    return static_k is None and static_v is None and args[0].ndim == 3


# -- recurrence ----------------------------------------------------------------------------------

Step = Callable[[Tensor, tuple[Tensor, ...], list[Any]], tuple[Tensor, ...]]
"""(projected input, state, recurrent weights) to the next state; its first entry is the output."""


def _lstm_step(gates: Tensor, state: tuple[Tensor, ...], weights: list[Any]) -> tuple:
    h, c = state
    i, f, g, o = (gates + F.linear(h, weights[0], weights[1])).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (F.linear(h, weights[2]) if len(weights) > 2 else h), c


def _gru_step(gates: Tensor, state: tuple[Tensor, ...], weights: list[Any]) -> tuple:
    (h,) = state
    r, z, n = gates.chunk(3, -1)
    hr, hz, hn = F.linear(h, weights[0], weights[1]).chunk(3, -1)
    z = (z + hz).sigmoid()
    n = (n + (r + hr).sigmoid() * hn).tanh()
    return (n + z * (h - n),)


def _rnn_step(activation: Callable, gates: Tensor, state: tuple, weights: list[Any]) -> tuple:
    return (activation(gates + F.linear(state[0], weights[0], weights[1])),)


def _recurrence(
    step: Step,
    input: Tensor,
    hx: Any,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """All layers and directions of a recurrent network, step by step."""
    states = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    x = input if batch_first else input.transpose(0, 1)
    runs = num_layers * (2 if bidirectional else 1)
    size = len(params) // runs
    last: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(2 if bidirectional else 1):
            run = len(last)
            ours = params[run * size : (run + 1) * size]
            w_ih, w_hh = ours[:2]
            b_ih, b_hh = ours[2:4] if has_biases else (None, None)
            weights = [w_hh, b_hh, *ours[4 if has_biases else 2 :]]
            projected = F.linear(x, w_ih, b_ih).unbind(1)
            # A constant initial state becomes one that each sample has.
            state = tuple(s[run] + torch.zeros_like(x[:, 0, :1]) for s in states)
            hidden = []
            for gates in reversed(projected) if direction else projected:
                state = step(gates, state, weights)
                hidden.append(state[0])
            last.append(state)
            outputs.append(torch.stack(hidden[::-1] if direction else hidden, 1))
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and layer + 1 < num_layers:
            x = F.dropout(x, dropout, train)
    output = x if batch_first else x.transpose(0, 1)
    return (output, *(torch.stack(parts) for parts in zip(*last, strict=True)))


def _cell(step: Step, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor,
          b_ih: Tensor | None = None, b_hh: Tensor | None = None) -> Any:  # fmt: skip
    state: Any = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    state = tuple(s + torch.zeros_like(input[..., :1]) for s in state)
    state = step(F.linear(input, w_ih, b_ih), state, [w_hh, b_hh])
    return state if len(state) > 1 else state[0]


def _padded(input: Tensor, hx: Any, params: Any, *rest: Any) -> bool:
    """Whether the batch is a tensor; packed sequences have their batch sizes second."""
    return isinstance(params, list | tuple) and len(rest) == 6


def _any_cell(*args: Any) -> bool:
    return True


_STEPS: dict[str, Step] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": partial(_rnn_step, torch.tanh),
    "rnn_relu": partial(_rnn_step, torch.relu),
}

UNROLLED: dict[Callable, Unrolled] = {
    F.multi_head_attention_forward: Unrolled(multi_head_attention, _ordinary_attention),
    **{
        getattr(torch, name): Unrolled(partial(_recurrence, step), _padded)
        for name, step in _STEPS.items()
    },
    **{
        getattr(torch, f"{name}_cell"): Unrolled(partial(_cell, step), _any_cell)
        for name, step in _STEPS.items()
    },
}

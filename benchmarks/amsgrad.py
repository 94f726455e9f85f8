"""AMSGrad's step against torch's Adam(amsgrad=True), 4 M parameters.

Both fused steps are one pass over the same memory, nine streams of 16 MB. With two threads the
kernel runs on the OpenMP threads that torch itself has: on a pool of its own, whose threads wait
for the core on which torch's spin after their last work, it took 1.6 to 1.8 of torch's fused step.
"""

from typing import Any

import torch
from torch import nn

from assay.lab import at_most
from assay.lab.bench import Comparison, benchmark
from assay.optim import AMSGrad

# Eight tensors of half a million: the sizes of a real network's layers, 4 M in all.
TENSORS, SIZE = 8, 500_000


def _ready(make: Any) -> torch.optim.Optimizer:
    params = [nn.Parameter(torch.randn(SIZE)) for _ in range(TENSORS)]
    for param in params:
        param.grad = torch.randn(SIZE)
    optimizer = make(params)
    optimizer.step()  # makes the state and compiles the kernel
    return optimizer


def _against(ours: dict[str, Any], peer: dict[str, Any]) -> Comparison:
    mine = _ready(lambda params: AMSGrad(params, lr_decay=None, **ours))
    other = _ready(lambda params: torch.optim.Adam(params, amsgrad=True, **peer))
    options = ", ".join(f"{key}={value}" for key, value in peer.items())
    return Comparison(
        ours=mine.step,
        peer=other.step,
        peer_name=f"torch.optim.Adam(amsgrad=True, {options})",
        peer_version=torch.__version__,
    )


@benchmark("AMSGrad fused vs torch foreach, 4 M float32", target=at_most(1 / 3), threads=1)
def fused_against_foreach() -> Comparison:
    return _against({"fused": True}, {"foreach": True})


@benchmark("AMSGrad fused vs torch foreach, 4 M float32", target=at_most(1 / 3), threads=2)
def fused_against_foreach_on_two_threads() -> Comparison:
    return _against({"fused": True}, {"foreach": True})


@benchmark("AMSGrad fused vs torch fused, 4 M float32", target=at_most(1.2), threads=1)
def fused_against_fused() -> Comparison:
    return _against({"fused": True}, {"fused": True})


@benchmark("AMSGrad fused vs torch fused, 4 M float32", target=at_most(1.2), threads=2)
def fused_against_fused_on_two_threads() -> Comparison:
    return _against({"fused": True}, {"fused": True})


@benchmark("AMSGrad fused, before_max, vs torch fused, 4 M float32", target=at_most(1.2), threads=1)
def corrected_against_fused() -> Comparison:
    return _against({"fused": True, "bias_correction": "before_max"}, {"fused": True})


@benchmark("AMSGrad foreach vs torch foreach, 4 M float32", threads=1)
def foreach_against_foreach() -> Comparison:
    return _against({"foreach": True}, {"foreach": True})

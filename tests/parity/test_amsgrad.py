"""AMSGrad against the AMSBound variant of AdamC in pytorch_optimizer."""

import math

import pytest
import torch
from torch import nn

from assay.optim import AMSGrad

pytorch_optimizer = pytest.importorskip(
    "pytorch_optimizer",
    reason="not installed: pip install --no-deps -r tests/parity/requirements.txt",
)

pytestmark = pytest.mark.parity

LR, BETA1, BETA2 = 0.05, 0.9, 0.99


def _start():
    return nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))


def _gradients():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(60, 6, generator=generator, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_amsgrad_is_amsbound_without_the_bias_correction(how):
    # The peer's step is lr·√(1 − β2^t)/(1 − β1^t); a rate that undoes the factor leaves
    # lr·m/√max v. It adds 1e-15 inside the root: relative to v ≥ 1e-4 that is below 1e-11.
    ours, theirs = _start(), _start()
    mine = AMSGrad([ours], LR, (BETA1, BETA2), lr_decay=None, **how)
    peer = pytorch_optimizer.AdamC(
        [theirs], lr=LR, betas=(BETA1, BETA2), weight_decay=0.0, ams_bound=True, foreach=False
    )
    for t, gradient in enumerate(_gradients(), start=1):
        peer.param_groups[0]["lr"] = LR * (1 - BETA1**t) / math.sqrt(1 - BETA2**t)
        for param, optimizer in ((ours, mine), (theirs, peer)):
            param.grad = gradient.clone()
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        mine.state[ours]["max_exp_avg_sq"], peer.state[theirs]["max_exp_avg_sq"]
    )

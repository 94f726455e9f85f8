import copy

import pytest
import torch
from torch import nn

from assay.optim import DGCSGD


def trajectory(optimizer, w, gradients):
    seen = []
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
        seen.append(w.detach().clone())
    return torch.stack(seen)


@pytest.mark.parametrize("nesterov", [False, True])
def test_with_velocities_as_gradients_it_is_sgd_with_momentum(nesterov):
    g = torch.Generator().manual_seed(0)
    gradients = torch.randn(20, 5, generator=g, dtype=torch.float64)
    start = torch.randn(5, generator=g, dtype=torch.float64)
    m, velocity, carried = 0.9, torch.zeros(5, dtype=torch.float64), []
    for gradient in gradients:
        velocity = m * velocity + gradient
        carried.append(gradient + m * velocity if nesterov else velocity)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 0.1, "momentum": m, "weight_decay": 0.05, "nesterov": nesterov}
    actual = trajectory(DGCSGD([ours], **settings), ours, carried)
    expected = trajectory(torch.optim.SGD([theirs], **settings), theirs, gradients)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_without_weight_decay_it_is_plain_sgd_and_keeps_nothing():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = DGCSGD([w, nn.Parameter(torch.ones(1))], lr=0.5)
    w.grad = torch.tensor([1.0, -1.0])
    assert optimizer.step(lambda: 3.0) == 3.0
    assert w.tolist() == [0.5, 2.5]
    assert not optimizer.state


def test_a_checkpoint_continues_the_run():
    g = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 3, generator=g)
    w = nn.Parameter(torch.randn(3, generator=g))
    optimizer = DGCSGD([w], lr=0.1, weight_decay=0.1)
    trajectory(optimizer, w, gradients[:3])
    twin = nn.Parameter(w.detach().clone())
    resumed = DGCSGD([twin], lr=0.7)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    straight = trajectory(optimizer, w, gradients[3:])
    assert torch.equal(trajectory(resumed, twin, gradients[3:]), straight)


def test_bad_arguments_are_named():
    w = nn.Parameter(torch.ones(1))
    for name, bad in (("lr", -1.0), ("momentum", 1.0), ("weight_decay", -0.1)):
        with pytest.raises(ValueError, match=f"{name} must"):
            DGCSGD([w], **{name: bad})

"""The range test on quadratics whose limits are known, and Barzilai and Borwein's quotients."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.optim import BarzilaiBorwein, lr_range_test


def test_the_range_test_ends_where_gradient_descent_is_unstable():
    # f(w) = ½ h w² with h = 50: stable below 2/50 = 0.04.
    line = nn.Linear(1, 1, bias=False)
    nn.init.ones_(line.weight)
    data = [(torch.full((1, 1), math.sqrt(25.0)), torch.zeros(1, 1))]
    sgd = torch.optim.SGD(line.parameters(), lr=1.0)
    found = lr_range_test(
        line, sgd, data, loss_fn=F.mse_loss, low=1e-5, high=10.0, steps=200, smoothing=0.0
    )
    assert found.diverged
    assert 1e-4 < found.steepest < 0.04
    # In 200 steps the loss has fallen to rounding before the bound: it is smallest about there.
    assert 0.02 < found.largest < 0.08


def test_the_range_test_puts_everything_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    net.eval()
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    adam.step()
    before = copy.deepcopy((net.state_dict(), adam.state_dict()))
    gradient, state = net[0].weight.grad, torch.get_rng_state()
    found = lr_range_test(net, adam, batches, steps=10)
    assert len(found.lrs) <= 10
    assert found.lrs[0] == pytest.approx(1e-6)
    for ours, theirs in zip(before, (net.state_dict(), adam.state_dict()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert net[0].weight.grad is gradient
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training


def test_bad_arguments_of_the_range_test():
    line = nn.Linear(1, 1)
    sgd = torch.optim.SGD(line.parameters(), lr=1.0)
    for kwargs in ({"low": 1.0, "high": 0.1}, {"steps": 1}, {"smoothing": 1.0}, {"divergence": 1}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            lr_range_test(line, sgd, [], **kwargs)
    with pytest.raises(ValueError, match="batches is empty"):
        lr_range_test(line, sgd, [])


def test_barzilai_borwein_lies_between_the_inverse_curvatures():
    h = torch.tensor([1.0, 4.0, 10.0], dtype=torch.float64)
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    estimate = BarzilaiBorwein([w])
    found = []
    for _ in range(6):
        w.grad = h * w.detach()
        found.append(estimate())
        with torch.no_grad():
            w -= 0.05 * w.grad
    assert found[0] is None
    for step in found[1:]:
        assert 1 / 10 <= step.short <= step.long <= 1


def test_barzilai_borwein_steps_solve_a_quadratic():
    h = torch.tensor([1.0, 30.0, 100.0], dtype=torch.float64)
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    estimate, lr = BarzilaiBorwein([w]), 0.001
    for _ in range(60):
        w.grad = h * w.detach()
        step = estimate()
        lr = step.long if step is not None else lr
        with torch.no_grad():
            w -= lr * w.grad
        if w.norm() < 1e-12:
            return
    pytest.fail("60 steps were not enough; gradient descent would need thousands")


def test_negative_curvature_and_no_movement():
    w = nn.Parameter(torch.ones(1))
    estimate = BarzilaiBorwein([w])
    w.grad = -w.detach()
    assert estimate() is None
    assert estimate() is None  # has not moved
    with torch.no_grad():
        w += 1
    w.grad = -w.detach()
    assert estimate() == (math.inf, 0.0)
    with pytest.raises(ValueError, match="params is empty"):
        BarzilaiBorwein([])

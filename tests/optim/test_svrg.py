"""SVRG: its gradient against the definition, its rate against the theory."""

import copy

import pytest
import torch

from assay.optim import SVRG


@pytest.fixture
def problem():
    """Least squares: losses f_i(w) = ½(a_i w − b_i)², and its solution."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(30, 4, generator=g, dtype=torch.float64)
    b = torch.randn(30, generator=g, dtype=torch.float64)
    return A, b, torch.linalg.lstsq(A, b[:, None]).solution[:, 0]


def closures(w, A, b, optimizer_of):
    def loss_of(rows):
        optimizer_of().zero_grad()
        loss = (A[rows] @ w - b[rows]).square().mean() / 2
        loss.backward()
        return loss

    return loss_of


def made(problem, **kwargs):
    A, b, _ = problem
    w = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    box = {}
    loss_of = closures(w, A, b, lambda: box["optimizer"])
    box["optimizer"] = SVRG([w], full_closure=lambda: loss_of(slice(None)), **kwargs)
    return w, box["optimizer"], loss_of


def test_at_the_snapshot_the_gradient_is_the_full_one_to_the_last_bit(problem):
    w, optimizer, loss_of = made(problem, lr=0.1, epoch_length=5)
    loss_of(slice(None))
    full = w.grad.clone()
    optimizer.step(lambda: loss_of([3]))
    assert torch.equal(w.grad, full)
    assert torch.equal(w, 1 - 0.1 * full)


def test_steps_follow_the_definition(problem):
    A, b, _ = problem
    w, optimizer, loss_of = made(problem, lr=0.02, epoch_length=3)

    def gradient(v, rows):
        return A[rows].T @ (A[rows] @ v - b[rows]) / len(A[rows])

    expected = torch.ones(4, dtype=torch.float64)
    for step in range(8):
        if step % 3 == 0:
            snapshot, mu = expected.clone(), gradient(expected, slice(None))
        rows = [step, step + 7]
        g = gradient(expected, rows) - gradient(snapshot, rows) + mu
        optimizer.step(lambda rows=rows: loss_of(rows))
        expected = expected - 0.02 * g
        torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-13)


def test_it_converges_where_sgd_stalls(problem):
    A, b, solution = problem
    w, optimizer, loss_of = made(problem, lr=0.05, epoch_length=60)
    v = torch.ones(4, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    for _ in range(60 * 60):
        row = torch.randint(30, (1,), generator=g)
        optimizer.step(lambda row=row: loss_of(row))
        v -= 0.05 * (A[row] @ v - b[row]) * A[row[0]]
    assert (w - solution).norm() < 1e-10
    assert (v - solution).norm() > 1e-3


def test_the_loss_is_that_before_the_step(problem):
    A, b, _ = problem
    w, optimizer, loss_of = made(problem, lr=0.1, epoch_length=2)
    optimizer.step(lambda: loss_of([0]))
    expected = (A[0] @ w.detach() - b[0]).square() / 2
    assert optimizer.step(lambda: loss_of([0])).item() == pytest.approx(expected.item())


def test_a_resumed_run_takes_the_same_steps(problem):
    w, optimizer, loss_of = made(problem, lr=0.05, epoch_length=4)
    for i in range(6):
        optimizer.step(lambda i=i: loss_of([i]))
    v, other, loss_of_v = made(problem, lr=0.05, epoch_length=4)
    with torch.no_grad():
        v.copy_(w)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(6, 11):
        optimizer.step(lambda i=i: loss_of([i]))
        other.step(lambda i=i: loss_of_v([i]))
    assert torch.equal(w, v)


def test_groups_frozen_and_unused_parameters():
    w = torch.nn.Parameter(torch.ones(1))
    slow = torch.nn.Parameter(torch.ones(1))
    frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    unused = torch.nn.Parameter(torch.ones(1))

    def closure():
        optimizer.zero_grad()
        loss = (w + slow + frozen).sum()
        loss.backward()
        return loss

    groups = [{"params": [w, frozen, unused]}, {"params": [slow], "lr": 0.01}]
    optimizer = SVRG(groups, 0.1, closure, epoch_length=1)
    optimizer.step(closure)
    assert (w.item(), slow.item()) == (pytest.approx(0.9), pytest.approx(0.99))
    assert (frozen.item(), unused.item()) == (1, 1)


def test_a_copy_says_that_it_needs_a_closure(problem):
    _, optimizer, loss_of = made(problem, lr=0.05, epoch_length=1)
    twin = copy.deepcopy(optimizer)
    with pytest.raises(RuntimeError, match=r"set optimizer\.full_closure"):
        twin.step(lambda: loss_of([0]))


def test_bad_arguments():
    w = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="lr"):
        SVRG([w], -1.0, lambda: None, epoch_length=1)
    with pytest.raises(ValueError, match="epoch_length"):
        SVRG([w], 1.0, lambda: None, epoch_length=0)
    with pytest.raises(ValueError, match="closure"):
        SVRG([w], 1.0, lambda: None, epoch_length=1).step()

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.optim import FGECyclicLR, HoldDecayLR


def sgd(*lrs):
    return torch.optim.SGD(
        [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs]
    )


def run(optimizer, scheduler, steps):
    """Learning rate of each iteration, and the iterations after which a snapshot is due."""
    lrs, snapshots = [], []
    for iteration in range(1, steps + 1):
        lrs.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
        if getattr(scheduler, "is_snapshot_step", False):
            snapshots.append(iteration)
    return lrs, snapshots


def cyclic(i, c, high, low):
    t = ((i - 1) % c + 1) / c
    if t <= 0.5:
        return (1 - 2 * t) * high + 2 * t * low
    return (2 - 2 * t) * low + (2 * t - 1) * high


@given(half=st.integers(1, 12), cycles=st.integers(1, 4))
def test_fge_schedule_is_the_paper_s(half, cycles):
    c = 2 * half
    optimizer = sgd(1.0)
    lrs, snapshots = run(optimizer, FGECyclicLR(optimizer, 0.05, 0.0005, c), c * cycles)
    lrs = [lr for (lr,) in lrs]
    assert lrs == [cyclic(i, c, 0.05, 0.0005) for i in range(1, c * cycles + 1)]
    assert lrs[c:] == lrs[:-c]  # period c
    lowest = [i for i, lr in enumerate(lrs, start=1) if lr == min(lrs)]
    assert snapshots == lowest == [half + k * c for k in range(cycles)]
    assert min(lrs) == 0.0005
    assert max(lrs) == 0.05


def test_no_snapshot_before_the_first_step():
    assert not FGECyclicLR(sgd(1.0), 0.05, 0.0005, 2).is_snapshot_step


def test_every_group_gets_the_cycle():
    optimizer = sgd(1.0, 0.1)
    lrs, _ = run(optimizer, FGECyclicLR(optimizer, 0.05, 0.01, 4), 4)
    assert lrs == [pytest.approx([lr, lr]) for lr in (0.03, 0.01, 0.03, 0.05)]


@pytest.mark.parametrize(
    "make", [lambda o: FGECyclicLR(o, 0.05, 0.01, 6), lambda o: HoldDecayLR(o, 12)]
)
def test_resumes_in_the_middle(make):
    reference = sgd(0.3)
    expected = run(reference, make(reference), 12)[0]
    first = sgd(0.3)
    scheduler = make(first)
    begun = run(first, scheduler, 5)[0]
    second = sgd(0.3)
    resumed = make(second)
    resumed.load_state_dict(scheduler.state_dict())
    second.load_state_dict(first.state_dict())
    assert begun + run(second, resumed, 7)[0] == expected


@pytest.mark.parametrize("cycle", [0, 1, 3, -2])
def test_odd_or_short_cycles_are_refused(cycle):
    with pytest.raises(ValueError, match=f"cycle_steps must be even and at least 2, got {cycle}"):
        FGECyclicLR(sgd(1.0), 0.05, 0.01, cycle)


@pytest.mark.parametrize(("high", "low"), [(0.01, 0.05), (0.01, 0.01), (0.1, -0.1)])
def test_learning_rates_in_the_wrong_order_are_refused(high, low):
    with pytest.raises(ValueError, match="min_lr < max_lr"):
        FGECyclicLR(sgd(1.0), high, low, 2)


@given(st.integers(1, 60))
def test_hold_decay_is_constant_then_linear_then_one_percent(total):
    optimizer = sgd(2.0, 0.2)
    lrs, _ = run(optimizer, HoldDecayLR(optimizer, total), total)
    for step, lr in enumerate(lrs):
        alpha = step / total
        if alpha <= 0.5:
            factor = 1.0
        elif alpha <= 0.9:
            factor = 1.0 - (alpha - 0.5) / 0.4 * 0.99
        else:
            factor = 0.01
        assert lr == pytest.approx([2.0 * factor, 0.2 * factor], rel=1e-12)


def test_hold_decay_refuses_an_empty_training():
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        HoldDecayLR(sgd(1.0), 0)

import threading

import pytest
import torch
import torch.distributed as dist

from assay.distributed.testing import spawn

pytestmark = pytest.mark.processes


def summed(offset):
    x = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(x)
    return x, torch.get_num_threads()


def test_results_by_rank():
    results = spawn(summed, 3, 10)
    assert [(x.item(), threads) for x, threads in results] == [(33.0, 1)] * 3


def fails_on_one():
    if dist.get_rank() == 1:
        raise ArithmeticError("rank one cannot count")
    dist.barrier()  # waits for ever


def test_traceback_of_the_child_reaches_the_parent_while_others_wait():
    with pytest.raises(
        RuntimeError, match=r"(?s)rank 1 raised.*fails_on_one.*rank one cannot count"
    ):
        spawn(fails_on_one, 2)


def waits():
    if dist.get_rank() == 0:
        threading.Event().wait()


def test_time_runs_out():
    with pytest.raises(TimeoutError, match=r"ranks \[0.* were not done"):
        spawn(waits, 2, timeout=3)


def test_no_processes():
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        spawn(summed, 0)

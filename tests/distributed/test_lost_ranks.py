"""A rank that is killed in mid-training: the others fail with a clear message, and soon."""

import multiprocessing
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from assay.distributed import CompressionState, DGCState, dgc_hook, two_way_compression_hook

pytestmark = pytest.mark.processes

TIMEOUT = 4.0  # of the process group, seconds
RANKS = 3
HOOKS = {
    "natural": lambda model: (CompressionState(), two_way_compression_hook),
    "natural, warm-up": lambda model: (
        CompressionState(warmup_steps=1000),
        two_way_compression_hook,
    ),
    "dgc": lambda model: (DGCState(model, density=0.1, warmup=None), dgc_hook),
}


def trains(pipe, name, rank, port):
    """Step until told otherwise; say when five are done and how it ended."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT)
    )
    model = DistributedDataParallel(nn.Linear(100, 100))
    model.register_comm_hook(*HOOKS[name](model))
    for step in range(100_000):
        begin = time.monotonic()
        try:
            model(torch.randn(8, 100)).square().sum().backward()
        except RuntimeError as error:
            pipe.send((str(error), time.monotonic() - begin))
            return
        if step == 5:
            pipe.send("five steps")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("name", HOOKS)
def test_the_others_fail_within_the_timeout_with_a_clear_message(name, how):
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    try:
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=trains, args=(theirs, name, rank, store.port))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for pipe in pipes:
            assert pipe.poll(120)
            assert pipe.recv() == "five steps"
        os.kill(processes[-1].pid, how)
        if how == signal.SIGKILL:
            processes[-1].join(10)
            assert processes[-1].exitcode == -signal.SIGKILL
        for rank, pipe in enumerate(pipes[:-1]):
            assert pipe.poll(60)
            message, seconds = pipe.recv()
            assert f"rank {rank} lost another rank while it exchanged gradients" in message
            assert "Restart all ranks from their last checkpoint" in message
            # Without the timeout it would be half an hour; a busy machine may need a while.
            assert seconds < TIMEOUT + 50
    finally:
        for process in processes:
            process.kill()
            process.join()

"""Real process groups on one machine, for tests and demonstrations."""

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["spawn"]


def spawn(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Run `fn(*args)` in `world_size` processes that form a gloo process group.

    Each process uses one thread. They meet at a store that the parent opens on a port the system
    gives it and holds, so that several groups may start at once.

    Args:
        fn: Function at the top level of a module or a test file; calls `torch.distributed` freely.
        world_size: Number of processes.
        *args: Passed on; pickled.
        timeout: Seconds after which the processes are ended.

    Returns:
        What `fn` returned, by rank.

    Raises:
        ValueError: `world_size` is below 1.
        RuntimeError: A process raised (the message holds its traceback) or died.
        TimeoutError: Not all were done in time.

    Example:
        >>> spawn(dist.get_rank, 2)
        [0, 1]
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = _context()
    receivers, processes = [], []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            job = (job_of(fn, args), rank, world_size, ("127.0.0.1", store.port), timeout)
            process = context.Process(target=work, args=(sender, *job), daemon=True)
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        return collect(receivers, time.monotonic() + timeout)
    finally:
        for process, receiver in zip(processes, receivers, strict=True):
            process.join(2)  # those that are done leave by themselves
            if process.is_alive():
                process.kill()
                process.join()
            receiver.close()


def _context() -> Any:
    """Processes that start clean of this one's threads, quickly where the platform can."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numba", "torch.nn.parallel.distributed"])
    return context


Job = tuple[str | None, str, str, bytes]  # file, module and name of a function; its arguments


def job_of(fn: Callable[..., Any], args: tuple) -> Job:
    """Where another process finds `fn` (test files are not always importable by name), and `args`.

    A file that is run as a program is imported there under another name.
    """
    module = sys.modules[fn.__module__]
    name = "__assay_main__" if fn.__module__ == "__main__" else fn.__module__
    return getattr(module, "__file__", None), name, fn.__qualname__, pickle.dumps(args)


def _find(file: str | None, module: str, name: str) -> Callable[..., Any]:
    try:
        found = __import__(module, fromlist=["_"])
    except ImportError:
        spec = spec_from_file_location(module, str(file))
        if spec is None or spec.loader is None:
            raise
        found = sys.modules[module] = module_from_spec(spec)
        spec.loader.exec_module(found)
    return getattr(found, name)


def work(
    sender: Connection,
    job: Job,
    rank: int,
    world_size: int,
    address: tuple[str, int],
    timeout: float,
    host: bool = False,
) -> None:
    """Join a gloo group that meets at `address`, do a job, and send back what came of it.

    Args:
        sender: Where to: True and the pickled result, or False and a traceback.
        job: From `job_of`.
        rank: Of this process.
        world_size: Number of processes.
        address: Host and port of the store.
        timeout: Seconds that the group waits for a silent rank.
        host: Open the store here.
    """
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        torch.set_num_threads(1)
        limit = timedelta(seconds=timeout)
        store = dist.TCPStore(*address, is_master=host, timeout=limit, wait_for_workers=False)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=limit
        )
        file, module, name, args = job
        result = _find(file, module, name)(*pickle.loads(args))
        # As bytes: tensors would otherwise travel through shared memory that dies with the child.
        sender.send((True, pickle.dumps(result)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        sender.send((False, traceback.format_exc()))


def collect(receivers: list[Connection], deadline: float) -> list[Any]:
    """Results of `work`, by rank; raises what `spawn` says."""
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        open_ = [r for rank, r in enumerate(receivers) if rank not in results]
        ready = wait(open_, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(receivers)) if rank not in results]
            raise TimeoutError(f"ranks {missing} were not done in time")
        for rank, receiver in enumerate(receivers):
            if receiver not in ready:
                continue
            try:
                done, value = receiver.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if not done:
                raise RuntimeError(f"rank {rank} raised\n{value}")
            results[rank] = pickle.loads(value)
    return [results[rank] for rank in range(len(receivers))]

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
            job = (_located(fn), pickle.dumps(args), rank, world_size, store.port, timeout)
            process = context.Process(target=_child, args=(sender, *job), daemon=True)
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        return _collect(receivers, time.monotonic() + timeout)
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


def _located(fn: Callable[..., Any]) -> tuple[str | None, str, str]:
    """Where a child finds `fn`: test files are not always importable by name."""
    module = sys.modules[fn.__module__]
    return getattr(module, "__file__", None), fn.__module__, fn.__qualname__


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


def _child(
    sender: Connection,
    location: tuple[str | None, str, str],
    args: bytes,
    rank: int,
    world_size: int,
    port: int,
    timeout: float,
) -> None:
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        torch.set_num_threads(1)
        limit = timedelta(seconds=timeout)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=limit
        )
        result = _find(*location)(*pickle.loads(args))
        # As bytes: tensors would otherwise travel through shared memory that dies with the child.
        sender.send((True, pickle.dumps(result)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        sender.send((False, traceback.format_exc()))


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
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

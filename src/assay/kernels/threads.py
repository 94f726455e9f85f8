"""Compiled kernels on several threads, and the few operations of a machine that numba lacks.

A kernel that is run on threads takes the address of a job: 64-bit integers, of which the first is
a counter. All threads get the same address and take the next piece of work from the counter until
none is left, so that one that is held up by other programs does not hold up the others.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

__all__ = ["LINE", "pointer", "run_on_threads", "stream_fence", "stream_scaled", "take"]

LINE = 64
"""Bytes of a cache line, to which `stream_scaled` writes."""


@intrinsic
def pointer(typingctx, address, like):
    """To numbers of the type of `like`, at an address.

    Making numpy arrays of five tensors takes longer than a small parameter's whole step.
    """

    def build(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), build


@intrinsic
def take(typingctx, address):
    """The next number of a counter at an address, which all threads share."""

    def build(context, builder, signature, args):
        number = ir.IntType(64)
        counter = builder.inttoptr(args[0], number.as_pointer())
        return builder.atomic_rmw("add", counter, number(1), "monotonic")

    return types.int64(types.int64), build


@intrinsic
def stream_scaled(typingctx, address, source, factor):
    """Write a line's worth of the numbers at `source`, times `factor`, past the cache.

    An ordinary store first reads the line that it writes to into the cache: twice the traffic, and
    what was in the cache is gone. This one is for results that would not fit it.

    `address` is a multiple of `LINE`. `stream_fence` comes after the last one.
    """

    def build(context, builder, signature, args):
        number = context.get_value_type(signature.args[2])
        width = signature.args[2].bitwidth // 8
        lanes = LINE // width
        vector = ir.VectorType(number, lanes)
        numbers = builder.load(builder.inttoptr(args[1], vector.as_pointer()), align=width)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), args[2], ir.IntType(32)(0))
        where = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        factors = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), where)
        target = builder.inttoptr(args[0], vector.as_pointer())
        store = builder.store(builder.fmul(numbers, factors), target, align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, factor), build


@intrinsic
def stream_fence(typingctx):
    """Have everything that was written past the cache arrive before what follows."""

    def build(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


def run_on_threads(work: Callable[..., None], at: int, zero: Any, threads: int) -> None:
    """Call a compiled function on several threads at once, and wait for all.

    They are torch's own threads where torch runs on OpenMP: those spin for a while after their
    last work, on the cores that threads of another pool would need. No lock is held meanwhile.

    Args:
        work: made by `numba.njit(nogil=True)`, takes `at` and `zero`.
        at: the address of the job.
        zero: 0 of the type of number that it works on.
        threads: how many.
    """
    if threads < 2:
        work(at, zero)
        return
    openmp = _openmp_of_torch()
    if openmp is not None:
        openmp(
            ctypes.c_void_p(_task(work, type(zero)).address),
            ctypes.c_void_p(at),
            ctypes.c_uint(threads),
            ctypes.c_uint(0),
        )
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, at, zero) for _ in range(threads - 1)]
        work(at, zero)
    for other in others:
        other.result()


@lru_cache
def _task(work: Callable[..., None], number: type) -> Any:
    """A function as C calls it on each thread; kept, since its code lives as long as it does."""
    zero = number(0)

    @cfunc(types.void(types.int64))
    def task(job_at):
        work(job_at, zero)

    return task


@lru_cache
def _openmp_of_torch() -> Callable[..., Any] | None:
    """What compiled code calls for a parallel region, of the OpenMP library that torch has loaded.

    GNU's and, under the same name, LLVM's and Intel's libraries have it on Linux.
    """
    try:
        return ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None

"""Process groups over a network that is really slow: namespaces, virtual cables, shaped by `tc`.

Each rank gets a network namespace of its own, with one virtual cable to a switch in a further one.
Both ends of every cable send through a token bucket of the link's rate, and the switch keeps every
frame for the link's latency. Linux only, and only where one may create namespaces: usually as root,
with iproute2 installed.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from assay.distributed import delaying_switch
from assay.distributed.link import LinkModel
from assay.distributed.testing import collect, job_of, work

__all__ = ["ShapedNetwork", "not_permitted", "interface_bytes"]

INTERFACE = "cable"  # of every rank, in its namespace
_PREFIX = "assay"
_PORT = 29500  # a namespace is fresh: every port is free
_BURST = 0.6e-3  # seconds of a link that the token bucket lets pass at once
_COUNTER = itertools.count()


class ShapedNetwork:
    """Network namespaces joined by cables of a given rate and latency; a context manager.

    Leaving the context ends all processes and removes everything, also after an error. Should this
    process be killed, those it started end with it, and its namespaces are removed by the next
    `ShapedNetwork` on this machine.

    Args:
        ranks: Number of namespaces for ranks.
        link: Rate and latency of the way from any rank to any other; None for as fast as goes.

    Raises:
        ValueError: `ranks` is not in 1 … 250.
        PermissionError: From entering: namespaces cannot be created here (the message says why).

    Example:
        >>> import torch.distributed as dist
        >>> def in_a_slow_network():  # 1 MB/s
        ...     with ShapedNetwork(2, LinkModel(bandwidth=8e6, latency=0.01)) as network:
        ...         return network.spawn(dist.get_rank)
    """

    def __init__(self, ranks: int, link: LinkModel | None = None) -> None:
        if not 1 <= ranks <= 250:
            raise ValueError(f"ranks must be in 1 … 250, got {ranks}")
        self.ranks, self.link = ranks, link
        stem = f"{_PREFIX}-{os.getpid()}-{next(_COUNTER)}"
        self.namespaces = [f"{stem}-{rank}" for rank in range(ranks)]
        self._switch_namespace = f"{stem}-switch"
        self._switch: subprocess.Popen | None = None

    def __enter__(self) -> "ShapedNetwork":
        reason = not_permitted()
        if reason:
            raise PermissionError(f"no network namespaces: {reason}")
        remove_abandoned()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _build(self) -> None:
        for name in [self._switch_namespace, *self.namespaces]:
            _run("ip", "netns", "add", name)
        ports = [f"port{rank}" for rank in range(self.ranks)]
        for rank, (name, port) in enumerate(zip(self.namespaces, ports, strict=True)):
            cable = f"link add {INTERFACE} netns {name} type veth peer name {port} netns"
            _run("ip", *cable.split(), self._switch_namespace)
            _run("ip", "-n", name, "addr", "add", f"{self.address(rank)}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            for namespace, device in ((name, INTERFACE), (self._switch_namespace, port)):
                _run("ip", "-n", namespace, "link", "set", device, "up")
                if self.link is not None:
                    _shape(namespace, device, self.link.bandwidth)
        self._join(ports)

    def _join(self, ports: Sequence[str]) -> None:
        if self.link is None:
            inside = ("ip", "-n", self._switch_namespace, "link")
            _run(*inside, "add", "switch", "type", "bridge")
            _run(*inside, "set", "switch", "up")
            for port in ports:
                _run(*inside, "set", port, "master", "switch")
            return
        settings = [str(os.getpid()), str(self.link.latency), *ports]
        program = [sys.executable, delaying_switch.__file__, *settings]
        self._switch = subprocess.Popen(
            _inside(self._switch_namespace, program), stdout=subprocess.PIPE, text=True
        )
        assert self._switch.stdout is not None
        if self._switch.stdout.readline() != "ready\n":
            raise RuntimeError("the switch between the namespaces did not start")

    def _remove(self) -> None:
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
            if self._switch.stdout is not None:
                self._switch.stdout.close()
            self._switch = None
        for name in [self._switch_namespace, *self.namespaces]:
            _delete(name)

    def address(self, rank: int) -> str:
        """IPv4 address of a rank."""
        return f"10.77.0.{rank + 1}"

    def spawn(self, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Run `fn(*args)` in a process a namespace; they form a gloo group over the network.

        As `assay.distributed.testing.spawn`, which says what the errors are.

        Args:
            fn: Function at the top level of a module or a file; calls `torch.distributed` freely.
            *args: Passed on; pickled.
            timeout: Seconds after which the processes are ended.

        Returns:
            What `fn` returned, by rank.
        """
        receivers: list[Connection] = []
        processes: list[subprocess.Popen] = []
        try:
            for rank, name in enumerate(self.namespaces):
                ours, theirs = Pipe()
                # `-c` rather than `-m`: pickled objects know this module by its name.
                start = f"import {__name__} as n; n.start_worker({theirs.fileno()}, {os.getpid()})"
                command = _inside(name, [sys.executable, "-c", start])
                # Namespaces know no host names, of which torch would warn.
                settings = {"TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ
                processes.append(
                    subprocess.Popen(command, pass_fds=[theirs.fileno()], env=settings)
                )
                theirs.close()
                receivers.append(ours)
                address = (self.address(0), _PORT)
                ours.send((job_of(fn, args), rank, self.ranks, address, timeout))
            return collect(receivers, time.monotonic() + timeout)
        finally:
            for process, receiver in zip(processes, receivers, strict=False):
                try:
                    process.wait(2)  # those that are done leave by themselves
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                receiver.close()


def start_worker(descriptor: int, parent: int) -> None:
    """Do, in a process of `ShapedNetwork.spawn`, what is asked through a pipe."""
    delaying_switch.end_with_parent(parent)
    connection = Connection(descriptor)
    job, rank, size, address, timeout = connection.recv()
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    work(connection, job, rank, size, address, timeout, host=rank == 0)


def interface_bytes(interface: str = INTERFACE) -> tuple[int, int]:
    """Bytes that a network interface of this process has sent and received so far, by the kernel.

    They include the headers of TCP, IP and Ethernet; those of the segments that the kernel leaves
    to the network card to cut count once.

    Args:
        interface: Its name; that of a rank in a `ShapedNetwork` by default.

    Returns:
        Bytes sent, bytes received.

    Raises:
        FileNotFoundError: There is no such interface (or no Linux).

    Example:
        >>> sent, received = interface_bytes("lo")
        >>> sent == received
        True
    """
    folder = Path("/sys/class/net") / interface / "statistics"
    sent, received = (int((folder / f"{way}_bytes").read_text()) for way in ("tx", "rx"))
    return sent, received


def not_permitted() -> str | None:
    """Why shaped namespaces cannot be had on this machine; None if they can.

    Example:
        >>> reason = not_permitted()
        >>> reason is None or isinstance(reason, str)
        True
    """
    if sys.platform != "linux":
        return f"they are a feature of Linux, and this is {sys.platform}"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 not found"
    name = f"{_PREFIX}-{os.getpid()}-{next(_COUNTER)}-probe"
    try:
        _run("ip", "netns", "add", name)
    except PermissionError as error:
        return str(error)
    try:
        _run("ip", "-n", name, "link", "add", "one", "type", "veth", "peer", "two")
        _shape(name, "one", 1e8)
    except PermissionError as error:
        return str(error)
    finally:
        _delete(name)
    return None


def remove_abandoned() -> list[str]:
    """Remove namespaces of processes that are no more, and say which they were."""
    abandoned = []
    for name in _namespaces():
        match = re.fullmatch(rf"{_PREFIX}-(\d+)-\d+-\w+", name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _delete(name)
            abandoned.append(name)
    return abandoned


def _shape(namespace: str, device: str, rate: float) -> None:
    """Let a device send `rate` bits a second.

    The bucket holds little, or short messages would pass unshaped, and what the kernel hands down
    in one piece has to fit, or it would be cut into single packets at a price in processor time.
    """
    burst = max(1600, round(_BURST * rate / 8))
    pieces = ("gso_max_segs", "1") if burst < 3000 else ("gso_max_size", str(min(burst, 60000)))
    _run("ip", "-n", namespace, "link", "set", device, *pieces)
    bucket = f"tbf rate {round(rate)} burst {round(1.1 * burst) + 200} limit 100000000"
    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *bucket.split())


def _namespaces() -> list[str]:
    listed = _run("ip", "netns", "list")
    return [line.split()[0] for line in listed.splitlines() if line.strip()]


def _delete(namespace: str) -> None:
    """Remove a namespace, unless it is not there: another process may remove abandoned ones too."""
    try:
        _run("ip", "netns", "delete", namespace)
    except PermissionError:
        if namespace in _namespaces():
            raise


def _inside(namespace: str, command: Sequence[str]) -> list[str]:
    return ["ip", "netns", "exec", namespace, *command]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise PermissionError(f"`{' '.join(command)}` failed: {said}")
    return done.stdout

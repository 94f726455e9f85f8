"""A network switch in user space: passes Ethernet frames on between interfaces, each a while later.

Not every kernel has `netem` to delay frames; this needs raw sockets only. Run as a program,
``python delaying_switch.py PARENT SECONDS INTERFACE...``, it needs nothing but the standard
library, says "ready" and works until it is ended, or the process that started it is. Frames keep
their order. `assay.distributed.namespaces` starts it.
"""

import ctypes
import itertools
import os
import select
import signal
import socket
import sys
import time
from collections import deque

__all__ = ["end_with_parent", "forward"]

# Of <linux/if_packet.h> and <linux/if_ether.h>, which Python does not name.
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_ETH_P_ALL = 3
_OFFLOAD = 10  # bytes before each frame: the kernel's note on checksums and segments left to do
_LARGEST = _OFFLOAD + 14 + 2**16
_BUFFER = 2**26
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Ask Linux to kill this process as soon as the one that started it ends, however it ends.

    Args:
        parent: Process id of that one, which may be gone already.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def forward(seconds: float, interfaces: list[str]) -> None:
    """Pass frames on for ever.

    Args:
        seconds: How long each frame is kept.
        interfaces: Names of the network interfaces that are joined.
    """
    ports = [_port(name) for name in interfaces]
    towards: dict[bytes, socket.socket] = {}  # learned from the frames that came
    kept: deque[tuple[float, bytes, socket.socket]] = deque()
    while True:
        wait = max(0.0, kept[0][0] - time.monotonic()) if kept else None
        readable, _, _ = select.select(ports, [], [], wait)
        for port in readable:
            due = time.monotonic() + seconds
            for frame in _frames(port):
                towards[frame[_OFFLOAD + 6 : _OFFLOAD + 12]] = port
                kept.append((due, frame, port))
        while kept and kept[0][0] <= time.monotonic():
            _, frame, came_from = kept.popleft()
            known = towards.get(frame[_OFFLOAD : _OFFLOAD + 6])
            for port in [known] if known else ports:  # unknown receivers and broadcasts: to all
                if port is not came_from:
                    port.send(frame)


def _port(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
    port.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    port.bind((name, 0))
    return port


def _frames(port: socket.socket) -> list[bytes]:
    """What has arrived, some frames at a time so that other ports get their turn."""
    frames = []
    for _ in itertools.repeat(None, 64):
        try:
            frames.append(port.recv(_LARGEST, socket.MSG_DONTWAIT))
        except BlockingIOError:
            break
    return frames


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    print("ready", flush=True)
    forward(float(sys.argv[2]), sys.argv[3:])

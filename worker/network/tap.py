"""TAP devices, opened by file descriptor: when the last descriptor closes, the kernel removes the device.

Numbers from <linux/if_tun.h>.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
from contextlib import ExitStack
from dataclasses import dataclass

from worker.errors import NetworkFailed

TUN_DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
TUNGETFEATURES = 0x800454CF
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tap:
    """An open tap: the kernel's name for it and the descriptors, one a queue, that keep it alive."""

    name: str
    fds: tuple[int, ...]

    @property
    def fd(self) -> int:
        """The first queue's descriptor."""
        return self.fds[0]

    @property
    def ifindex(self) -> int:
        """The kernel's number of the interface; unlike its name it is not given to another one."""
        return socket.if_nametoindex(self.name)

    def close(self) -> None:
        """Close our descriptors; the device goes when QEMU's are closed too."""
        for fd in self.fds:
            os.close(fd)


def supports_vnet_hdr(fd: int) -> bool:
    """Whether the kernel's taps can carry virtio-net headers (offloads)."""
    try:
        answer = fcntl.ioctl(fd, TUNGETFEATURES, struct.pack("I", 0))
    except OSError:
        log.warning("TUNGETFEATURES ioctl() not implemented")
        return False
    if struct.unpack("I", answer)[0] & IFF_VNET_HDR:
        return True
    log.warning("Host does not support IFF_VNET_HDR, not enabling")
    return False


def open_tap(*, vnet_hdr: bool = True, queues: int = 1) -> Tap:
    """A new tap, named by the kernel, with a descriptor for each of its ``queues``.

    Raises NetworkFailed; then no device and no descriptor is left.
    """
    with ExitStack() as undo:
        name, fds = b"", []
        for _ in range(queues):
            fds.append(fd := _open_tun())
            undo.callback(os.close, fd)
            if not name:
                flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet_hdr and supports_vnet_hdr(fd) else 0)
                flags |= IFF_MULTI_QUEUE if queues > 1 else 0
            name = _attach(fd, name, flags)
        undo.pop_all()
    return Tap(name.decode(), tuple(fds))


def _open_tun() -> int:
    try:
        return os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise NetworkFailed(f"Failed to open {TUN_DEVICE}: {exc.strerror}; only cards of mode user do without") from exc


def _attach(fd: int, name: bytes, flags: int) -> bytes:
    """Make ``fd`` a queue of the tap ``name``, of a new one where that is empty; the tap's name."""
    try:
        # struct ifreq is 40 bytes: 16 of name (empty: the kernel chooses) and a union that begins with the flags.
        answer = fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name, flags))
    except OSError as exc:
        what = f"open another queue of the TAP device {name.decode()}" if name else "allocate a new TAP device"
        raise NetworkFailed(f"Failed to {what}: {exc.strerror} (it needs CAP_NET_ADMIN)") from exc
    return answer[:16].rstrip(b"\0")

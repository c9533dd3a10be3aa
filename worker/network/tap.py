"""TAP devices, opened by file descriptor: when the last descriptor closes, the kernel removes the device.

Numbers from <linux/if_tun.h>.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
from dataclasses import dataclass

from worker.errors import NetworkFailed

TUN_DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
TUNGETFEATURES = 0x800454CF
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tap:
    """An open tap: the kernel's name for it and the descriptor that keeps it alive."""

    name: str
    fd: int

    @property
    def ifindex(self) -> int:
        """The kernel's number of the interface; unlike its name it is not given to another one."""
        return socket.if_nametoindex(self.name)

    def close(self) -> None:
        """Close our descriptor; the device goes when QEMU's is closed too."""
        os.close(self.fd)


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


def open_tap(*, vnet_hdr: bool = True) -> Tap:
    """A new tap, named by the kernel. Raises NetworkFailed; then no device and no descriptor is left."""
    try:
        fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise NetworkFailed(f"Failed to open {TUN_DEVICE}: {exc.strerror}; bridged and routed cards need it") from exc
    flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet_hdr and supports_vnet_hdr(fd) else 0)
    try:
        # struct ifreq is 40 bytes: 16 of name (empty: the kernel chooses) and a union that begins with the flags.
        answer = fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"", flags))
    except OSError as exc:
        os.close(fd)
        raise NetworkFailed(f"Failed to allocate a new TAP device: {exc.strerror} (it needs CAP_NET_ADMIN)") from exc
    return Tap(answer[:16].rstrip(b"\0").decode(), fd)

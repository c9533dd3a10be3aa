"""vhost-net: a card's queues served by the kernel of the host instead of by QEMU; the guest only notices the speed."""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import ExitStack

VHOST_DEVICE = "/dev/vhost-net"
VHOST_SET_OWNER = 0xAF01
"""From <linux/vhost.h>: the first thing that QEMU asks of a descriptor, which can be done once."""

log = logging.getLogger(__name__)


def open_vhost(queues: int) -> tuple[int, ...]:
    """A descriptor for each of a card's queues; none, and the reason in the log, where vhost-net does not really work.

    QEMU inherits them: it may be confined to where there is no such device. They are tried on others before, because a
    QEMU with several queues aborts where one does not work.
    """
    with ExitStack() as undo:
        fds = []
        try:
            _try_out(queues)
            for _ in range(queues):
                fds.append(fd := os.open(VHOST_DEVICE, os.O_RDWR | os.O_CLOEXEC))
                undo.callback(os.close, fd)
        except OSError as exc:
            log.warning("vhost-net is not used: %s: %s", VHOST_DEVICE, exc.strerror)
            return ()
        undo.pop_all()
    return tuple(fds)


def _try_out(queues: int) -> None:
    with ExitStack() as opened:
        for _ in range(queues):
            fd = os.open(VHOST_DEVICE, os.O_RDWR | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            fcntl.ioctl(fd, VHOST_SET_OWNER)


def close_vhost(fds: tuple[int, ...]) -> None:
    """Close our descriptors; QEMU keeps its own."""
    for fd in fds:
        os.close(fd)

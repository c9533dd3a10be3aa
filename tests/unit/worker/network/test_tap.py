"""Taps on the real kernel; what it will not do here is done by a system call that fails as it would."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.services import missing
from worker.errors import NetworkFailed
from worker.network import tap
from worker.network.tap import TUN_DEVICE, open_tap, supports_vnet_hdr

TUNGETIFF = 0x800454D2
PROJECT = Path(__file__).parents[4]
NOBODY = "65534"


@pytest.fixture
def tun() -> None:
    """The test needs a kernel with taps, and root."""
    if os.geteuid() != 0 or not os.access(TUN_DEVICE, os.R_OK | os.W_OK):
        missing("A tap", f"needs root and {TUN_DEVICE}")


def descriptors() -> set[str]:
    return {link.name for link in Path("/proc/self/fd").iterdir()}


def flags(fd: int) -> int:
    answer = fcntl.ioctl(fd, TUNGETIFF, bytes(40))
    return int(struct.unpack("16sH22x", answer)[1])


def failing(request: int, code: int) -> Callable[..., Any]:
    """``fcntl.ioctl``, except that one request fails."""
    real = fcntl.ioctl

    def ioctl(fd: int, number: int, argument: Any) -> Any:
        if number == request:
            raise OSError(code, os.strerror(code))
        return real(fd, number, argument)

    return ioctl


@pytest.mark.usefixtures("tun")
def test_the_kernel_names_a_tap_and_removes_it_when_it_is_closed() -> None:
    made = open_tap()
    try:
        assert Path("/sys/class/net", made.name).is_dir()
        assert "\0" not in made.name
        assert not os.get_inheritable(made.fd)
    finally:
        made.close()
    assert not Path("/sys/class/net", made.name).exists()


@pytest.mark.usefixtures("tun")
def test_a_tap_carries_virtio_headers_only_where_that_was_asked_for() -> None:
    for asked in (True, False):
        made = open_tap(vnet_hdr=asked)
        try:
            assert flags(made.fd) & tap.IFF_TAP
            assert flags(made.fd) & tap.IFF_NO_PI
            assert bool(flags(made.fd) & tap.IFF_VNET_HDR) is asked
        finally:
            made.close()


@pytest.mark.usefixtures("tun")
def test_each_queue_is_a_descriptor_of_the_one_tap_that_lives_as_long_as_one_is_open() -> None:
    made = open_tap(queues=3)
    try:
        assert len({*made.fds}) == 3
        for fd in made.fds:
            assert (
                struct.unpack("16sH22x", fcntl.ioctl(fd, TUNGETIFF, bytes(40)))[0].rstrip(b"\0") == made.name.encode()
            )
            assert flags(fd) & tap.IFF_MULTI_QUEUE
            assert flags(fd) & tap.IFF_VNET_HDR
            assert not os.get_inheritable(fd)
        assert len([*Path("/sys/class/net", made.name, "queues").glob("rx-*")]) == 3
    finally:
        made.close()
    assert not Path("/sys/class/net", made.name).exists()


@pytest.mark.usefixtures("tun")
def test_a_tap_of_one_queue_is_none_of_many() -> None:
    made = open_tap()
    try:
        assert made.fds == (made.fd,)
        assert not flags(made.fd) & tap.IFF_MULTI_QUEUE
    finally:
        made.close()


@pytest.mark.usefixtures("tun")
def test_w13_a_queue_that_is_refused_leaves_no_tap_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = descriptors(), fcntl.ioctl

    def ioctl(fd: int, number: int, argument: Any) -> Any:
        if number == tap.TUNSETIFF and argument[0]:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        return real(fd, number, argument)

    monkeypatch.setattr("worker.network.tap.fcntl.ioctl", ioctl)
    with pytest.raises(
        NetworkFailed, match=r"Failed to open another queue of the TAP device \w+: Argument list too long"
    ):
        open_tap(queues=2)
    monkeypatch.undo()
    assert descriptors() == before


@pytest.mark.usefixtures("tun")
def test_two_taps_are_two_devices() -> None:
    first, second = open_tap(), open_tap()
    try:
        assert first.name != second.name
    finally:
        first.close()
        second.close()


@pytest.mark.usefixtures("tun")
def test_a_kernel_that_cannot_be_asked_has_no_virtio_headers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.network.tap.fcntl.ioctl", failing(tap.TUNGETFEATURES, errno.EINVAL))
    with caplog.at_level(logging.WARNING):
        made = open_tap()
    monkeypatch.undo()
    try:
        assert not flags(made.fd) & tap.IFF_VNET_HDR
    finally:
        made.close()
    assert "TUNGETFEATURES ioctl() not implemented" in caplog.text


def test_a_kernel_that_says_it_has_none_has_no_virtio_headers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.network.tap.fcntl.ioctl", lambda *_: struct.pack("I", tap.IFF_TAP | tap.IFF_NO_PI))
    with caplog.at_level(logging.WARNING):
        assert not supports_vnet_hdr(0)
    assert "Host does not support IFF_VNET_HDR, not enabling" in caplog.text


@pytest.mark.usefixtures("tun")
@pytest.mark.parametrize(("code", "words"), [(errno.EPERM, "Operation not permitted"), (errno.EBUSY, "busy")])
def test_w13_a_tap_that_is_refused_leaves_no_descriptor_behind(
    monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    before = descriptors()
    monkeypatch.setattr("worker.network.tap.fcntl.ioctl", failing(tap.TUNSETIFF, code))
    with pytest.raises(NetworkFailed, match=f"Failed to allocate a new TAP device: .*{words}"):
        open_tap()
    monkeypatch.undo()
    assert descriptors() == before


@pytest.mark.parametrize("path", ["/no/such/tun", "/dev/null/tun"])
def test_a_host_without_taps_is_told_so(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(tap, "TUN_DEVICE", path)
    with pytest.raises(NetworkFailed, match=f"Failed to open {path}: .*only cards of mode user do without"):
        open_tap()


def test_a_user_without_the_right_to_make_taps_is_told_so() -> None:
    """As nobody: some distributions let everybody open the device, none lets everybody make a tap."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        missing("Another user", "needs root and setpriv")
    program = "from worker.network.tap import open_tap\nopen_tap()"
    argv = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", sys.executable, "-c", program]
    allowed = subprocess.run([*argv[:-2], "-c", ""], capture_output=True)
    if allowed.returncode:
        pytest.skip(f"nobody may not run {sys.executable}")
    done = subprocess.run(
        argv, env={"PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path])}, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("worker.errors.NetworkFailed: Failed to"), done.stderr
    assert "ermi" in last  # Permission denied, or Operation not permitted

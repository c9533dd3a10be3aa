"""vhost-net is used where it answers, and quietly not elsewhere."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from worker.network import vhost
from worker.network.vhost import close_vhost, open_vhost


def descriptors() -> set[str]:
    return {link.name for link in Path("/proc/self/fd").iterdir()}


def test_a_host_without_vhost_net_says_so_in_its_log_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vhost, "VHOST_DEVICE", "/no/such/vhost-net")
    assert open_vhost(2) == ()
    assert "vhost-net is not used: /no/such/vhost-net: No such file or directory" in caplog.text


def test_a_device_that_is_no_vhost_net_is_not_used_and_not_kept_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is only there and does not answer: a device node whose module cannot be loaded, a stranger."""
    monkeypatch.setattr(vhost, "VHOST_DEVICE", "/dev/null")
    before = descriptors()
    assert open_vhost(2) == ()
    assert "/dev/null: Inappropriate ioctl for device" in caplog.text
    assert descriptors() == before


def test_each_queue_has_a_descriptor_of_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a kernel that answers, whether or not the one here does."""
    monkeypatch.setattr(vhost, "VHOST_DEVICE", "/dev/null")
    monkeypatch.setattr("worker.network.vhost.fcntl.ioctl", lambda *_: 0)
    with caplog.at_level(logging.WARNING):
        fds = open_vhost(3)
    try:
        assert len({*fds}) == 3
        assert not any(os.get_inheritable(fd) for fd in fds)
        assert caplog.text == ""
    finally:
        close_vhost(fds)


def test_where_not_all_queues_can_be_served_none_is_and_none_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([None, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))])

    def ioctl(*_: object) -> None:
        if answer := next(answers):
            raise answer

    monkeypatch.setattr(vhost, "VHOST_DEVICE", "/dev/null")
    monkeypatch.setattr("worker.network.vhost.fcntl.ioctl", ioctl)
    before = descriptors()
    assert open_vhost(2) == ()
    assert descriptors() == before

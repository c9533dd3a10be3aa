"""Fixtures for the tests that speak to QEMUs of their own, without a worker."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.kvm.qmp import EventLoop


@pytest.fixture(scope="module")
def loop() -> Iterator[EventLoop]:
    """A loop for monitors, stopped when the module's tests are done."""
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose name leaves room for a unix socket's path."""
    folder = Path(tempfile.mkdtemp(prefix="hst-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)

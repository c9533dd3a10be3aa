"""Fixtures for all tests."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.nodes import TestNode, node
from tests.services import database, empty_database, empty_database_url, missing

__all__ = ["database", "empty_database", "empty_database_url"]


@pytest.fixture(scope="module")
def qemu() -> None:
    """The test needs QEMU."""
    if not shutil.which("qemu-system-x86_64"):
        missing("QEMU", "no qemu-system-x86_64 on PATH; install qemu-system-x86")


@pytest.fixture
def new_node(qemu: None) -> Iterator[TestNode]:
    """A node of this test's own, without a worker yet."""
    with node() as made:
        yield made


@pytest.fixture(scope="module")
def shared_node(qemu: None) -> Iterator[TestNode]:
    """A node with a worker, shared by a module's tests. They use it through ``n1``."""
    with node() as made:
        made.start_worker()
        yield made


@pytest.fixture
def n1(shared_node: TestNode) -> Iterator[TestNode]:
    """The module's node, its worker alive, without guests; those that the test leaves are killed."""
    if shared_node.worker is None or shared_node.worker.poll() is not None:
        shared_node.start_worker()
    yield shared_node
    shared_node.end_guests()


@pytest.fixture(scope="module")
def netns() -> Iterator[str]:
    """A network namespace: taps and bridges in it are no one else's."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        missing("A network namespace", "needs root and iproute2")
    name = f"hst-{secrets.token_hex(4)}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        missing("A network namespace", done.stderr.strip())
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)

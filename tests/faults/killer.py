"""Faults at random moments, for the soaks."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress

from hostler import embedded
from hostler.errors import ServiceUnreachable
from hostler.settings import Settings
from tests.nodes import TestNode

Fault = Callable[[random.Random], bool]
"""Brings it about; whether there was anything it could be done to."""


class Killer(threading.Thread):
    """Brings about one fault after another until it is stopped; at the end all workers live.

    ``chaos`` has the faults' weights, ``pause_s`` how long it waits between two; those that happened are counted.
    """

    def __init__(
        self,
        chaos: Mapping[str, int],
        faults: Mapping[str, Fault],
        pause_s: tuple[float, float],
        counted: Counter[str],
        rng: random.Random,
    ) -> None:
        super().__init__(name="killer", daemon=True)
        self._chaos = chaos
        self._faults = faults
        self._pause_s = pause_s
        self._counted = counted
        self._rng = rng
        self._enough = threading.Event()

    def stop(self) -> None:
        """Return when the fault under way, if any, is over."""
        self._enough.set()
        self.join()

    def run(self) -> None:
        """The thread's work."""
        while not self._enough.wait(self._rng.uniform(*self._pause_s)):
            (fault,) = self._rng.choices([*self._chaos], [*self._chaos.values()])
            if self._faults[fault](self._rng):
                self._counted[fault] += 1


def freeze_worker(node: TestNode, seconds: float) -> bool:
    """Stop a worker and let it go on."""
    assert node.worker
    node.worker.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    node.worker.send_signal(signal.SIGCONT)
    return True


def kill_broker(settings: Settings) -> bool:
    """Kill the embedded broker and start it again; its workers may do so first."""
    pid = embedded.status(settings).pid
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(ServiceUnreachable):
        embedded.ensure(settings)
    return True

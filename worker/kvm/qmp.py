"""QEMU's monitor protocol, one function per command we use, each with a deadline.

One event loop in a thread of its own serves the monitors of all guests. Functions may be called from any other thread.
Reference: docs/interop/qmp-spec and the QMP reference manual of QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, Runstate, StateError
from qemu.qmp.error import ProtocolError

from worker.errors import QemuFailed, QmpLost

ANSWER_TIMEOUT_S = 10.0
"""Every command we send answers at once; a main loop that is silent for this long is stuck (dead storage, SIGSTOP)."""

CHECK_S = 0.2
"""How often a connection attempt looks whether it is still wanted."""

HANG_UP_TIMEOUT_S = 5.0
"""Closing a socket takes no time; only a loop that is stuck makes us go on without."""

log = logging.getLogger(__name__)
Event = dict[str, Any]
T = TypeVar("T")
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # a guest's end is no error; what matters is raised


class EventLoop:
    """A thread with an asyncio loop, for monitors and pidfds."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="qmp", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run ``work`` in the loop; the result is waited for by the caller."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        """Stop the loop and its thread. Guests are not touched."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5)


class Monitor:
    """A QMP connection to one guest, from greeting to end of file."""

    def __init__(self, loop: EventLoop, client: QMPClient, on_event: Callable[[Event], None]) -> None:
        self._loop = loop
        self._client = client
        self._on_event = on_event
        self._reader = loop.submit(self._read_events())

    @classmethod
    def connect(
        cls,
        loop: EventLoop,
        path: Path,
        timeout_s: float,
        on_event: Callable[[Event], None],
        check: Callable[[], None] = lambda: None,
    ) -> Monitor:
        """Connect, read the greeting, negotiate. ``on_event`` is called in the loop's thread and must not block.

        ``check`` is called several times a second meanwhile; what it raises ends the attempt.

        Raises QmpLost when QEMU hangs up or keeps silent, QemuFailed when what answers does not speak QMP. The process
        is not touched in either case.
        """
        client = QMPClient(path.parent.name)
        try:
            connecting = loop.submit(_connect(client, str(path), timeout_s))
            try:
                while not futures.wait([connecting], CHECK_S).done:
                    check()
            finally:
                connecting.cancel()
            connecting.result()
        except TimeoutError:
            raise QmpLost(f"QEMU did not greet on its monitor within {timeout_s:g} s") from None
        except ConnectError as exc:
            cause = exc.exc
            if isinstance(cause, EOFError | OSError):
                raise QmpLost(f"QEMU closed its monitor before greeting ({type(cause).__name__})") from exc
            raise QemuFailed(f"what answers on QEMU's monitor does not speak QMP: {exc}") from exc
        return cls(loop, client, on_event)

    @property
    def version(self) -> str:
        """QEMU's version as it greeted, such as ``7.2.22``."""
        greeting = self._client.greeting
        number = cast(dict[str, Any], greeting.QMP.version).get("qemu", {}) if greeting else {}
        return ".".join(str(number.get(part, 0)) for part in ("major", "minor", "micro"))

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> Any:
        """Send a command and return its answer.

        Raises QemuFailed with QEMU's own words when it refuses, QmpLost when the connection is gone or silent (whether
        the command was carried out is then unknown).
        """
        # Shielded: a late answer to an abandoned command must find its slot, not be taken for another's.
        future = self._loop.submit(_within(self._client.execute(command, arguments), timeout_s))
        try:
            return future.result(timeout_s + 1)
        except TimeoutError:
            raise QmpLost(f"QEMU did not answer {command} within {timeout_s:g} s") from None
        except ExecuteError as exc:
            raise QemuFailed(f"QEMU refused {command}: {exc}", qemu_class=exc.error_class) from exc
        except (ExecInterruptedError, StateError, ProtocolError, EOFError, OSError) as exc:
            raise QmpLost(f"the connection to QEMU's monitor broke during {command}") from exc

    def status(self) -> str:
        """QEMU's run state in its own word: ``running``, ``paused``, ``prelaunch``, ``shutdown``, ``io-error``, ..."""
        return str(self.execute("query-status")["status"])

    def continue_vcpus(self) -> None:
        """Let the guest run (``cont``)."""
        self.execute("cont")

    def pause_vcpus(self) -> None:
        """Stop the guest's processors (``stop``); its memory and devices stay."""
        self.execute("stop")

    def press_power_button(self) -> None:
        """ACPI power button (``system_powerdown``); what the guest makes of it is its own affair."""
        self.execute("system_powerdown")

    def reset(self) -> None:
        """The reset line (``system_reset``): the guest boots anew in the same process."""
        self.execute("system_reset")

    def wait_closed(self, timeout_s: float) -> bool:
        """Wait until QEMU hung up and every event it had sent was delivered; False when the time ran out."""
        return bool(futures.wait([self._reader], timeout_s).done)

    def close(self) -> None:
        """Hang up. The guest is not touched."""
        futures.wait([self._loop.submit(_hang_up(self._client))], HANG_UP_TIMEOUT_S)
        self._reader.cancel()

    async def _read_events(self) -> None:
        # Everything received before the connection ended is delivered, SHUTDOWN and its reason above all.
        closed = asyncio.ensure_future(_until_closed(self._client))
        while not closed.done():
            event = asyncio.ensure_future(self._client.events.get())
            await asyncio.wait({event, closed}, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                self._deliver(dict(event.result()))
            else:
                event.cancel()
        for left in self._client.events.clear():
            self._deliver(dict(left))
        await _hang_up(self._client)

    def _deliver(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:  # whatever it is, it must not cost the next events
            log.exception("an event of QEMU's could not be handled: %s", event)


async def _connect(client: QMPClient, path: str, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(client.connect(path), timeout_s)
    except AssertionError as exc:
        # The library takes it for granted that a connection outlives its negotiation.
        await _hang_up(client)
        raise ConnectError("the connection ended with its negotiation", EOFError()) from exc


async def _hang_up(client: QMPClient) -> None:
    # It raises whatever ended the connection, which those who waited for an answer were told already.
    with contextlib.suppress(Exception):
        await client.disconnect()


async def _within(work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    return await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(work)), timeout_s)


async def _until_closed(client: QMPClient) -> None:
    while client.runstate == Runstate.RUNNING:
        await client.runstate_changed()

"""QEMU's monitor protocol, one function per command we use, each with a deadline.

One event loop in a thread of its own serves the monitors of all guests. Functions may be called from any other thread.
Reference: docs/interop/qmp-spec and the QMP reference manual of QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import threading
import time
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

PERIPHERALS = "/machine/peripheral"
"""Where QEMU keeps the devices that have an id."""
NOT_FOUND = "DeviceNotFound"
FDSET = "/dev/fdset/"
"""How the names begin by which QEMU opens descriptors that it was handed."""

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
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
        check: Callable[[], None] = lambda: None,
    ) -> Any:
        """Send a command and return its answer. ``check`` is called while it waits; what it raises ends the waiting.

        Raises QemuFailed with QEMU's own words when it refuses, QmpLost when the connection is gone or silent (whether
        the command was carried out is then unknown).
        """
        return self._answer(command, self._client.execute(command, arguments), timeout_s, check)

    def _answer(
        self, command: str, work: Coroutine[Any, Any, Any], timeout_s: float, check: Callable[[], None] = lambda: None
    ) -> Any:
        # Shielded: a late answer to an abandoned command must find its slot, not be taken for another's.
        future = self._loop.submit(_within(work, timeout_s))
        try:
            self._wait(future, timeout_s, check)
            return future.result()
        except TimeoutError:
            raise QmpLost(f"QEMU did not answer {command} within {timeout_s:g} s") from None
        except ExecuteError as exc:
            raise QemuFailed(f"QEMU refused {command}: {exc}", qemu_class=exc.error_class) from exc
        except (ExecInterruptedError, StateError, ProtocolError, EOFError, OSError) as exc:
            raise QmpLost(f"the connection to QEMU's monitor broke during {command}") from exc

    @staticmethod
    def _wait(future: Future[Any], timeout_s: float, check: Callable[[], None]) -> None:
        deadline = time.monotonic() + timeout_s + 1  # the loop gives up before; it may have been closed
        while not futures.wait([future], CHECK_S).done:
            check()
            if time.monotonic() > deadline:
                raise TimeoutError

    def status(self, check: Callable[[], None] = lambda: None, timeout_s: float = ANSWER_TIMEOUT_S) -> str:
        """QEMU's run state in its own word: ``running``, ``paused``, ``prelaunch``, ``shutdown``, ``io-error``, ..."""
        return str(self.execute("query-status", timeout_s=timeout_s, check=check)["status"])

    def machine_uuid(self) -> str:
        """The uuid that the guest knows as its machine's (``query-uuid``)."""
        return str(self.execute("query-uuid")["UUID"])

    def vcpu_threads(self) -> dict[int, int]:
        """The host's thread of each vCPU, by the vCPU's number (``query-cpus-fast``)."""
        return {int(vcpu["cpu-index"]): int(vcpu["thread-id"]) for vcpu in self.execute("query-cpus-fast")}

    def continue_vcpus(self) -> None:
        """Let the guest run (``cont``)."""
        self.execute("cont")

    def pause_vcpus(self) -> None:
        """Stop the guest's processors (``stop``); its memory and devices stay."""
        self.execute("stop")

    def press_power_button(self, check: Callable[[], None] = lambda: None) -> None:
        """ACPI power button (``system_powerdown``); what the guest makes of it is its own affair."""
        self.execute("system_powerdown", check=check)

    def reset(self) -> None:
        """The reset line (``system_reset``): the guest boots anew in the same process."""
        self.execute("system_reset")

    def block_nodes(self) -> dict[str, dict[str, Any]]:
        """Every open image by its node's name: ``file`` is its path, ``image`` what is known of its content.

        ``file`` and ``backing_file`` are paths also of what was handed over by descriptor.
        """
        nodes = self.execute("query-named-block-nodes", {"flat": True})
        passed = self._passed_files() if FDSET in str(nodes) else {}
        for node in nodes:
            for key in ("file", "backing_file"):
                if key in node:
                    node[key] = _path_of(node[key], passed)
        return {node["node-name"]: node for node in nodes}

    def add_block_node(self, node: dict[str, Any]) -> None:
        """Open an image (``blockdev-add``). Raises QemuFailed when it cannot be opened, or somebody else has it."""
        self.execute("blockdev-add", node)

    def remove_block_node(self, name: str) -> None:
        """Close an image (``blockdev-del``). Raises QemuFailed while a device has it."""
        self.execute("blockdev-del", {"node-name": name})
        self.forget_files()

    def pass_file(self, path: str, *, writable: bool) -> str:
        """Hand over a file that QEMU itself could not open (``add-fd``); returns the name by which it can.

        For one image only: those that are opened by the same name share its locks. Raises QemuFailed.
        """
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as exc:
            raise QemuFailed(f"{path} cannot be opened: {exc.strerror}") from exc
        try:
            return f"{FDSET}{self._hand_over('add-fd', {'opaque': path}, fd)['fdset-id']}"
        finally:
            os.close(fd)

    def forget_files(self) -> None:
        """Have QEMU close the files handed over that no image is opened by (any more)."""
        if passed := self._passed_files():
            used = str(self.execute("query-named-block-nodes", {"flat": True}))
            for name in passed:
                if not re.search(rf"{name}\b", used):
                    self.execute("remove-fd", {"fdset-id": int(name.removeprefix(FDSET))})

    def _passed_files(self) -> dict[str, str]:
        """By the name by which QEMU opens each: its path."""
        sets = self.execute("query-fdsets")
        return {f"{FDSET}{each['fdset-id']}": fd["opaque"] for each in sets for fd in each["fds"] if "opaque" in fd}

    def resize_block_node(self, name: str, size_bytes: int) -> None:
        """Make an image larger; its guest is told (``block_resize``)."""
        self.execute("block_resize", {"node-name": name, "size": size_bytes})

    def devices(self) -> set[str]:
        """The ids of all devices that were added by one."""
        return {each["name"] for each in self.execute("qom-list", {"path": PERIPHERALS})} - {"type"}

    def device_property(self, device: str, name: str) -> Any:
        """One property of a device, as QEMU has it."""
        return self.execute("qom-get", {"path": f"{PERIPHERALS}/{device}", "property": name})

    def pci_slots(self) -> dict[str, int]:
        """The slots on the machine's first PCI bus, of the devices that have an id."""
        devices = [device for bus in self.execute("query-pci") if bus["bus"] == 0 for device in bus["devices"]]
        return {device["qdev_id"]: device["slot"] for device in devices if device["qdev_id"]}

    def plug(self, device: dict[str, Any]) -> None:
        """Add a device (``device_add``)."""
        self.execute("device_add", device)

    def ask_to_unplug(self, device: str) -> None:
        """Ask the guest to give up a device (``device_del``); it is gone when the guest has let go of it."""
        try:
            self.execute("device_del", {"id": device})
        except QemuFailed as exc:
            if exc.details["qemu_class"] != NOT_FOUND and "process of unplug" not in exc.message:
                raise

    def add_network(self, netdev: dict[str, Any], fds: dict[str, int]) -> None:
        """Add the host's side of a card (``netdev_add``), after its descriptors by the names it uses."""
        for name, fd in fds.items():
            self.pass_fd(name, fd)
        self.execute("netdev_add", netdev)

    def remove_network(self, netdev: str) -> None:
        """Remove the host's side of a card, and its tap; nothing happens where there is none (``netdev_del``)."""
        try:
            self.execute("netdev_del", {"id": netdev})
        except QemuFailed as exc:
            if exc.details["qemu_class"] != NOT_FOUND:
                raise

    def pass_fd(self, name: str, fd: int) -> None:
        """Give QEMU a copy of a descriptor, and a name for it (``getfd``). One of that name before is closed."""
        self._hand_over("getfd", {"fdname": name}, fd)

    def _hand_over(self, command: str, arguments: dict[str, Any], fd: int) -> Any:
        return self._answer(command, _with_fd(self._client, command, arguments, fd), ANSWER_TIMEOUT_S)

    def memory_bytes(self) -> int:
        """How much memory the balloon leaves the guest. Raises QemuFailed where there is no balloon."""
        return int(self.execute("query-balloon")["actual"])

    def inflate_balloon(self, memory_bytes: int) -> None:
        """Ask the guest to give back memory until it has so much left, or to take it again (``balloon``)."""
        self.execute("balloon", {"value": memory_bytes})

    def set_password(self, display: str, password: str) -> None:
        """The password of ``vnc`` or ``spice`` for connections from now on."""
        self.execute("set_password", {"protocol": display, "password": password, "connected": "keep"})

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


async def _with_fd(client: QMPClient, command: str, arguments: dict[str, Any], fd: int) -> Any:
    # In one step of the loop: the descriptor must arrive with this command and no other one.
    client.send_fd_scm(fd)
    return await client.execute(command, arguments)


def _path_of(name: str, passed: dict[str, str]) -> str:
    """The path that QEMU's name of an image means; where only a description names it, that of the file in it."""
    if name.startswith("json:"):
        described = json.loads(name.removeprefix("json:"))
        name = described.get("file", described).get("filename", name)
    return passed.get(name, name)


async def _hang_up(client: QMPClient) -> None:
    # It raises whatever ended the connection, which those who waited for an answer were told already.
    with contextlib.suppress(Exception):
        await client.disconnect()


async def _within(work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    return await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(work)), timeout_s)


async def _until_closed(client: QMPClient) -> None:
    while client.runstate == Runstate.RUNNING:
        await client.runstate_changed()

"""The scripts that connect a tap to the host's network (ifup) and disconnect it (ifdown), run as ``SCRIPT TAP``.

The environment is Ganeti's with VLAN and MTU added, and nothing else of the worker's is passed on: INSTANCE, MAC, MODE,
INTERFACE, INTERFACE_INDEX, TAGS, and IP, LINK, BRIDGE, VLAN, MTU where they apply.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import IO

from hostler.payloads import Nic
from worker.errors import NetworkFailed
from worker.network import links

SCRIPT_TIMEOUT_S = 30.0
CHECK_S = 0.1
OUTPUT_MAX_BYTES = 4000
"""How much of a script's output an error quotes, from its end."""


def shipped(name: str) -> Path:
    """The ``ifup`` or ``ifdown`` that comes with hostler."""
    return Path(str(files("worker.network") / "scripts" / name))


def environment(instance: str, tags: list[str], index: int, nic: Nic, tap: str) -> dict[str, str]:
    """What a network script is told about the card it configures; MTU is the bridge's, in bytes, where it has one."""
    env = {
        "PATH": links.SEARCH_PATH,
        "INSTANCE": instance,
        "MAC": nic.mac,
        "MODE": nic.mode,
        "INTERFACE": tap,
        "INTERFACE_INDEX": str(index),
        "TAGS": " ".join(tags),
    }
    if nic.ip:
        env["IP"] = nic.ip
    if nic.link:
        env["LINK"] = nic.link
    if nic.mode == "bridged":
        env["BRIDGE"] = nic.link
    if nic.mode in ("bridged", "openvswitch") and (mtu := links.mtu_bytes(nic.link)):
        env["MTU"] = str(mtu)
    if nic.vlan:
        env["VLAN"] = str(nic.vlan)
    return env


def run(
    script: Path,
    tap: str,
    env: dict[str, str],
    timeout_s: float = SCRIPT_TIMEOUT_S,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run ``script`` for ``tap``. Raises NetworkFailed with the script's output when it fails or takes too long.

    ``check`` is called several times a second meanwhile; what it raises ends the script, with all it started.
    """
    failed = f"Failed to configure interface {tap}"
    with tempfile.TemporaryFile() as output:
        try:
            status = _run_to_its_end([str(script), tap], env, output, timeout_s, check)
        except subprocess.TimeoutExpired:
            said = _text(output)
            raise NetworkFailed(
                f"{failed}: {script} did not end within {timeout_s:g} s and was killed. "
                f"Network configuration script output: {said}"
            ) from None
        except OSError as exc:
            raise NetworkFailed(f"{failed}: cannot run {script}: {exc.strerror}") from exc
        if status:
            reason = f"exited with exit code {status}" if status > 0 else f"signal {-status}"
            raise NetworkFailed(f"{failed}: {reason}. Network configuration script output: {_text(output)}")


def _run_to_its_end(
    argv: list[str], env: dict[str, str], output: IO[bytes], timeout_s: float, check: Callable[[], None]
) -> int:
    deadline = time.monotonic() + timeout_s
    process = subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", start_new_session=True
    )
    try:
        while True:
            try:
                return process.wait(CHECK_S)
            except subprocess.TimeoutExpired:
                check()
                if time.monotonic() > deadline:
                    raise
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _text(output: IO[bytes]) -> str:
    output.seek(0)
    text = output.read()[-OUTPUT_MAX_BYTES:].decode(errors="replace").strip()
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")  # which no database's text can hold

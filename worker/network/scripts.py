"""The scripts that connect a tap to the host's network (ifup) and disconnect it (ifdown), run as ``SCRIPT TAP``.

The environment is Ganeti's, and nothing else of the worker's is passed on: INSTANCE, MAC, MODE, INTERFACE,
INTERFACE_INDEX, TAGS, and IP, LINK, BRIDGE where they apply.
"""

from __future__ import annotations

import subprocess
from importlib.resources import files
from pathlib import Path

from hostler.payloads import Nic
from worker.errors import NetworkFailed

SCRIPT_TIMEOUT_S = 30.0
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def shipped(name: str) -> Path:
    """The ``ifup`` or ``ifdown`` that comes with hostler."""
    return Path(str(files("worker.network") / "scripts" / name))


def environment(instance: str, tags: list[str], index: int, nic: Nic, tap: str) -> dict[str, str]:
    """What a network script is told about the card it configures."""
    env = {
        "PATH": SEARCH_PATH,
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
    return env


def run(script: Path, tap: str, env: dict[str, str], timeout_s: float = SCRIPT_TIMEOUT_S) -> None:
    """Run ``script`` for ``tap``. Raises NetworkFailed with the script's output when it fails or takes too long."""
    failed = f"Failed to configure interface {tap}"
    try:
        done = subprocess.run(
            [str(script), tap],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise NetworkFailed(f"{failed}: {script} did not end within {timeout_s:g} s and was killed") from None
    except OSError as exc:
        raise NetworkFailed(f"{failed}: cannot run {script}: {exc.strerror}") from exc
    if done.returncode:
        output = done.stdout.decode(errors="replace").strip()
        reason = f"exited with exit code {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        raise NetworkFailed(f"{failed}: {reason}. Network configuration script output: {output}")

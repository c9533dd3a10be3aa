"""Whether this host can be a node at all, looked at before a worker begins. `hostler doctor` looks at much more."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from hostler.settings import Settings
from worker.errors import OperationError
from worker.kvm import emulator
from worker.kvm.emulator import EmulatorMissing

log = structlog.get_logger(__name__)


class HostUnfit(OperationError):
    """A setting names something that this host does not have. Nothing was started."""


def require_fit(settings: Settings) -> None:
    """Raises HostUnfit naming the setting. A host without QEMU is only warned of in the log."""
    for name, script in (("HOSTLER_IFUP", settings.ifup), ("HOSTLER_IFDOWN", settings.ifdown)):
        if script and not (Path(script).is_file() and os.access(script, os.X_OK)):
            raise HostUnfit(f"{name}: {script!r} is not a program that can be run")
    try:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise HostUnfit(f"HOSTLER_RUN_DIR: {str(settings.run_dir)!r} cannot be made: {exc.strerror}") from None
    if not os.access(settings.run_dir, os.W_OK):
        raise HostUnfit(f"HOSTLER_RUN_DIR: {str(settings.run_dir)!r} cannot be written")
    try:
        emulator.find(settings.qemu_binary)
    except EmulatorMissing as exc:
        if settings.qemu_binary:
            raise HostUnfit(exc.message) from None
        log.warning("no guest can be started here yet", reason=exc.message)

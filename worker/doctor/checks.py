"""All checks, in the order in which one repairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hostler import settings as settings_module
from hostler.settings import Settings, SettingsError
from worker.doctor import host, services, virtualization
from worker.doctor.check import Check, guarded, without_passwords

HOST_CHECKS: dict[str, Callable[[], Check]] = {
    "python": host.python,
    "packages": host.packages,
    "hardware": host.hardware,
    "rights": host.rights,
    "boot_id": host.boot_id,
    "tun": host.tun,
    "ip": host.ip_command,
    "socat": host.socat_command,
    "qemu-img": host.qemu_img_command,
}
NODE_CHECKS: dict[str, Callable[[Settings], Check]] = {
    "qemu": virtualization.qemu,
    "kvm": virtualization.kvm,
    "cgroups": host.control_groups,
    "state_dir": host.state_dir,
    "run_dir": host.run_dir,
    "embedded_server": services.embedded_server,
    "broker": services.broker,
    "results": services.results,
    "database": services.database,
    "worker": services.worker_alive,
}


def run_all() -> Iterator[Check]:
    """Every finding, as it is made. Takes seconds where KVM hangs or a server is silent.

    With a wrong setting, the checks that need settings are left out: they would look at the wrong place. Starts the
    embedded broker where that is the configured one, and leaves it running, and makes the folder of guests' control
    groups where the host has them; nothing else is left behind.
    """
    try:
        settings: Settings | None = settings_module.load()
    except SettingsError as exc:
        settings = None
        yield Check("settings", "fail", str(exc), "correct the environment, then run hostler doctor again: "
                    "what needs settings was not looked at")  # fmt: skip
    else:
        yield Check("settings", "ok", f"node {settings_module.load().node}")
    for name, check in HOST_CHECKS.items():
        yield guarded(name, check)
    if settings:
        for name, node_check in NODE_CHECKS.items():
            yield without_passwords(guarded(name, node_check, settings), settings)

"""What QEMU is told before a live migration. What it can do is asked of it, never concluded from its version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from worker.errors import QemuFailed, Unsupported
from worker.kvm.qmp import Monitor

UNLIMITED_BYTES_S = 2**63 - 1
"""What QEMU takes as its highest bandwidth; it has no word for "unlimited" that holds in all versions."""


@dataclass(frozen=True)
class Tuning:
    """How a migration goes. Both sides must be told the same, except for bandwidth and downtime.

    ``bandwidth_bytes_s`` 0 is unlimited. ``multifd_channels`` 0 is one connection for everything. ``compression`` is
    that of multifd: ``none``, ``zlib`` or ``zstd``. ``postcopy`` only makes it possible; ``start_postcopy`` begins it.
    ``tls_creds`` is the id of a tls-creds object, ``tls_hostname`` the name that the target's certificate must have.
    ``capabilities`` are more of QEMU's own, by their names.
    """

    bandwidth_bytes_s: int = 0
    downtime_ms: int = 300
    auto_converge: bool = False
    xbzrle: bool = False
    multifd_channels: int = 0
    compression: str = "none"
    postcopy: bool = False
    tls_creds: str = ""
    tls_hostname: str = ""
    capabilities: tuple[str, ...] = ()


def prepare(monitor: Monitor, tuning: Tuning, *, incoming: bool) -> None:
    """Set capabilities and parameters, those included that an earlier attempt had set otherwise.

    Raises Unsupported naming the argument that this QEMU cannot do, or that does not go together with another one;
    the guest is not touched.
    """
    _refuse_what_does_not_fit(tuning)
    wanted = _capabilities(tuning, incoming=incoming)
    known = {each["capability"] for each in monitor.execute("query-migrate-capabilities")}
    lacking = [argument for name, (argument, on) in wanted.items() if on and name not in known]
    if lacking:
        raise Unsupported(f"this QEMU {monitor.version} cannot migrate with {', '.join(lacking)}", arguments=lacking)
    switches = [{"capability": name, "state": on} for name, (_, on) in wanted.items() if name in known]
    _switch(monitor, switches)
    _set_parameters(monitor, tuning, incoming=incoming)


def limits(bandwidth_bytes_s: int | None, downtime_ms: int | None) -> dict[str, Any]:
    """Bandwidth and downtime in QEMU's words; None leaves one as it is."""
    parameters: dict[str, Any] = {}
    if bandwidth_bytes_s is not None:
        parameters["max-bandwidth"] = bandwidth_bytes_s or UNLIMITED_BYTES_S
        parameters["max-postcopy-bandwidth"] = bandwidth_bytes_s  # here 0 is QEMU's own word for unlimited
    if downtime_ms is not None:
        parameters["downtime-limit"] = downtime_ms
    return parameters


def _refuse_what_does_not_fit(tuning: Tuning) -> None:
    if tuning.compression != "none" and not tuning.multifd_channels:
        raise Unsupported("compression is that of multifd: it needs multifd_channels", arguments=["compression"])
    for argument, on in (("xbzrle", tuning.xbzrle), ("postcopy", tuning.postcopy)):
        if on and tuning.multifd_channels:
            raise Unsupported(f"{argument} does not go together with multifd_channels", arguments=[argument])


def _capabilities(tuning: Tuning, *, incoming: bool) -> dict[str, tuple[str, bool]]:
    """By QEMU's name: the argument that asks for it, and whether it is wanted."""
    return {
        **{name: (f"migration_caps {name}", True) for name in tuning.capabilities},
        "events": ("events", True),
        # Else the source says ``completed`` when all is sent, even to a target that cannot read it: the guest is lost.
        "return-path": ("return-path", True),
        # The target opens the images when it is continued, not when the last byte has come.
        "late-block-activate": ("late-block-activate", True),
        "pause-before-switchover": ("pause-before-switchover", not incoming),
        "postcopy-ram": ("postcopy", tuning.postcopy),
        "multifd": ("multifd_channels", bool(tuning.multifd_channels)),
        "xbzrle": ("xbzrle", tuning.xbzrle),
        "auto-converge": ("auto_converge", tuning.auto_converge and not incoming),
    }


def _switch(monitor: Monitor, switches: list[dict[str, Any]]) -> None:
    try:
        monitor.execute("migrate-set-capabilities", {"capabilities": switches})
    except QemuFailed as exc:
        if "postcopy is not supported" not in exc.message.lower():
            raise
        raise Unsupported(
            "this host cannot do post-copy: its QEMU may not use userfaultfd, which takes a QEMU that is root or the"
            " sysctl vm.unprivileged_userfaultfd=1",
            arguments=["postcopy"],
        ) from exc


def _set_parameters(monitor: Monitor, tuning: Tuning, *, incoming: bool) -> None:
    parameters: dict[str, Any] = {"tls-creds": tuning.tls_creds}
    if not incoming:
        parameters |= limits(tuning.bandwidth_bytes_s, tuning.downtime_ms)
        parameters["tls-hostname"] = tuning.tls_hostname
    if tuning.multifd_channels:
        parameters["multifd-channels"] = tuning.multifd_channels
    monitor.execute("migrate-set-parameters", parameters)
    if tuning.multifd_channels:
        _set_compression(monitor, tuning.compression)


def _set_compression(monitor: Monitor, method: str) -> None:
    try:
        monitor.execute("migrate-set-parameters", {"multifd-compression": method})
    except QemuFailed as exc:  # which methods there are is a matter of how this QEMU was built
        raise Unsupported(
            f"this QEMU cannot migrate with compression {method}: {exc}", arguments=["compression"]
        ) from exc

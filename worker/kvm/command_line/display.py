"""VNC and SPICE: how a person sees the guest from afar, and the graphics card for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostler.hvchecks import FIRST_DISPLAY_PORT
from hostler.hvparams import HvParams
from hostler.payloads import Instance
from worker.kvm.command_line.options import HostPart, Option, quoted

VGA_DEVICES = {
    "std": "VGA", "cirrus": "cirrus-vga", "qxl": "qxl-vga", "virtio": "virtio-vga", "vmware": "vmware-svga",
}  # fmt: skip


def has_display(hvparams: HvParams) -> bool:
    """Whether a person can look at the guest's screen."""
    return bool(hvparams.vnc_bind_address or hvparams.spice_bind)


def socket_path(instance: Instance) -> Path | None:
    """Where the display's unix socket is; None where it has an address, and where there is no display."""
    hvparams = instance.hvparams
    for bound, ending in ((hvparams.vnc_bind_address, "vnc"), (hvparams.spice_bind, "spice")):
        if bound.startswith("/"):
            return Path(bound, f"{instance.name}.{ending}")
    return None


def servers(instance: Instance, host: HostPart) -> Iterator[Option]:
    """VNC or SPICE, with the objects that hold certificates and passwords."""
    hvparams = instance.hvparams
    for name, fd in host.password_fds.items():
        # QEMU reads the secret while it starts; only the number of a descriptor shows in its arguments.
        yield "-object", {"qom-type": "secret", "id": f"{name}-password", "file": f"/proc/self/fd/{fd}"}
    if hvparams.vnc_bind_address:
        if vnc_has_tls(hvparams):
            yield "-object", _vnc_credentials(hvparams)
        yield "-vnc", ",".join(_vnc(instance, host))
    if hvparams.spice_bind:
        yield "-spice", ",".join(_spice(instance, host))
    if hvparams.keymap:
        yield "-k", hvparams.keymap


def graphics(hvparams: HvParams) -> Iterator[Option]:
    """The graphics card."""
    card = hvparams.vga or ("std" if hvparams.vnc_bind_address else "qxl" if hvparams.spice_bind else "")
    if card:
        yield "-device", {"driver": VGA_DEVICES[card], "id": "vga0"}


def vnc_has_tls(hvparams: HvParams) -> bool:
    """Whether VNC is encrypted; on a unix socket it never is."""
    return hvparams.vnc_tls and not hvparams.vnc_bind_address.startswith("/")


def _vnc_credentials(hvparams: HvParams) -> dict[str, Any]:
    credentials = {"qom-type": "tls-creds-anon", "id": "vnc-tls", "endpoint": "server"}
    if not hvparams.vnc_x509_path:
        return credentials
    whom = {"dir": hvparams.vnc_x509_path, "verify-peer": hvparams.vnc_x509_verify}
    return credentials | {"qom-type": "tls-creds-x509"} | whom


def _vnc(instance: Instance, host: HostPart) -> Iterator[str]:
    address = instance.hvparams.vnc_bind_address
    if path := socket_path(instance):
        yield f"unix:{quoted(str(path))}"
        return
    assert instance.network_port is not None  # hostler.hvchecks
    yield f"{f'[{address}]' if ':' in address else address}:{instance.network_port - FIRST_DISPLAY_PORT}"
    if vnc_has_tls(instance.hvparams):
        yield "tls-creds=vnc-tls"
    if "vnc" in host.password_fds:
        yield "password-secret=vnc-password"


def _spice(instance: Instance, host: HostPart) -> Iterator[str]:
    hvparams = instance.hvparams
    if path := socket_path(instance):
        yield "unix=on"
        yield f"addr={quoted(str(path))}"
    else:
        yield f"addr={hvparams.spice_bind}"
        yield f"{'tls-port' if hvparams.spice_use_tls else 'port'}={instance.network_port}"
    if hvparams.spice_use_tls:
        yield f"x509-dir={quoted(hvparams.spice_x509_path)}"
    yield "password-secret=spice-password" if "spice" in host.password_fds else "disable-ticketing=on"

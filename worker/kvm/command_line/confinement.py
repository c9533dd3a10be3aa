"""How QEMU gives up its rights when it has opened all it needs, and before the guest runs."""

from __future__ import annotations

from collections.abc import Iterator

from worker.kvm.command_line.options import HostPart, Option, quoted


def confinement(host: HostPart) -> Iterator[Option]:
    """Another user, another root folder; in the words that this QEMU knows."""
    wanted = {"user": host.confinement.run_as, "chroot": host.confinement.chroot}
    words = {name: value for name, value in wanted.items() if value}
    if new := [f"{name}={quoted(words[name])}" for name in words if name in host.confinement.run_with]:
        yield "-run-with", ",".join(new)
    for name, option in (("user", "-runas"), ("chroot", "-chroot")):
        if name in words and name not in host.confinement.run_with:
            yield option, words[name]

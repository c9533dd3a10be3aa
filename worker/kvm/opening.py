"""Having a QEMU that runs open further images, also one that gave up the right to open files.

A confined QEMU is handed descriptors: a writable one of an image that is written to, read-only ones of all others and
of the files that they lie on. It never gets two of one file, because QEMU's locks belong to a descriptor.
"""

from __future__ import annotations

from typing import Any

from worker.errors import QemuFailed
from worker.kvm import images
from worker.kvm.devices import driver_of
from worker.kvm.qmp import Monitor


def open_image(monitor: Monitor, image: dict[str, Any], *, confined: bool) -> None:
    """Open an image that is described by the path of its ``file``. Raises QemuFailed, and nothing is open then."""
    try:
        monitor.add_block_node(_by_descriptor(monitor, image) if confined else image)
    except QemuFailed:
        if confined:
            monitor.forget_files()
        raise


def _by_descriptor(monitor: Monitor, image: dict[str, Any]) -> dict[str, Any]:
    path = image["file"]["filename"]
    name = monitor.pass_file(path, writable=not image.get("read-only", False))
    described = image | {"file": image["file"] | {"filename": name}}
    if image["driver"] == "qcow2" and "backing" not in image:
        described["backing"] = _below(monitor, path)
    return described


def _below(monitor: Monitor, path: str) -> dict[str, Any] | None:
    try:
        below = images.backing_file(path)
    except OSError as exc:
        raise QemuFailed(f"{path} cannot be read: {exc.strerror}") from exc
    if below is None:
        return None
    file, driver = below
    if not driver:
        raise QemuFailed(f"{path} does not say in which format the file is that it lies on ({file})")
    layer = {"driver": driver, "read-only": True, "file": {"driver": driver_of(file), "filename": file}}
    return _by_descriptor(monitor, layer)

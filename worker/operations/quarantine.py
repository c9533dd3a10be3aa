"""What QEMUs left in their chroots, in which nothing should ever be: kept for a person to look at."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from hostler.errors import InvalidArgument
from models import utc_now
from worker.isolation import quarantine
from worker.kvm.folder import GuestFolder
from worker.operations.context import NodeContext
from worker.operations.views import iso

log = structlog.get_logger(__name__)

NAME_SHOWN = 150
"""How much of an instance's name stands in an item's; the rest must fit into a file's name too."""


def put_aside(node: NodeContext, name: str, folder: GuestFolder) -> list[str]:
    """Put what a QEMU that has ended left in its chroot into the quarantine. Returns what was, for people."""
    item = f"{name[:NAME_SHOWN]}-{utc_now():%Y%m%dT%H%M%SZ}-{folder.path.name[:8]}.tar"
    archive = folder_of(node) / item
    if not quarantine.put_aside(folder.chroot, archive):
        return []
    log.warning(
        "QEMU left files in its chroot, which it has no reason to do: possibly its guest broke out. They are kept for "
        "you to look at; then: hostler quarantine release",
        instance=name,
        archive=str(archive),
    )
    return [f"quarantine {archive}"]


def folder_of(node: NodeContext) -> Path:
    """Where the node keeps it; it outlives a reboot of the host."""
    return node.settings.state_dir / "quarantine"


def list_items(node: NodeContext) -> dict[str, Any]:
    """Every item with its size and when it was put aside, the oldest first."""
    items = [(path, path.stat()) for path in folder_of(node).glob("*.tar")]
    items.sort(key=lambda item: item[1].st_mtime)
    return {
        "node": node.name,
        "items": [
            {"name": path.name, "path": str(path), "size_bytes": info.st_size, "at": _iso(info.st_mtime)}
            for path, info in items
        ],
    }


def release(node: NodeContext, names: list[str], *, again: bool = False) -> dict[str, Any]:
    """Delete items by name. ``again`` says that this very job may have done so already.

    Raises InvalidArgument for a name that is none; then nothing was deleted.
    """
    known = {item["name"] for item in list_items(node)["items"]}
    if (unknown := [name for name in names if name not in known]) and not again:
        reason = f"not in the quarantine of node {node.name}"
        raise InvalidArgument([{"field": "names", "reason": f"{name}: {reason}"} for name in unknown])
    for name in known.intersection(names):
        (folder_of(node) / name).unlink(missing_ok=True)
    return {"node": node.name, "released": names}


def _iso(seconds: float) -> str | None:
    return iso(datetime.fromtimestamp(seconds, UTC))

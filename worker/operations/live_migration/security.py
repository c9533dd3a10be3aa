"""Whether a migration goes in TLS: what was asked for, what both nodes allow, and their certificates."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from hostler.errors import InvalidArgument
from models import LiveMigration, runtime_of
from worker.errors import OperationError, Unsupported
from worker.kvm.live_migration import tls
from worker.kvm.live_migration.nbd import Tls
from worker.operations.context import NodeContext
from worker.operations.guests import Guest

Wish = Literal["yes", "no", "where possible"]


def wish(node: NodeContext, asked: bool | None) -> Wish:
    """What the source wants. Raises InvalidArgument or Unsupported, each saying what to do."""
    policy = node.settings.migration_tls
    if asked is False and policy == "required":
        raise InvalidArgument([{"field": "tls", "reason": f"node {node.name} requires it (HOSTLER_MIGRATION_TLS)"}])
    if asked and policy == "off":
        raise InvalidArgument([_without_tls(node)])
    if asked or policy == "required":
        _require_certificates(node)
        return "yes"
    return "no" if asked is False or policy == "off" or _problems(node) else "where possible"


def agree(node: NodeContext, wanted: Wish) -> bool:
    """The target's word: whether it goes in TLS. Raises InvalidArgument or Unsupported, each saying what to do."""
    policy = node.settings.migration_tls
    if wanted == "yes" or policy == "required":
        if wanted == "no":
            raise Unsupported(
                f"node {node.name} receives guests in TLS only (HOSTLER_MIGRATION_TLS), and the source has no "
                "certificates or was told to do without"
            )
        if policy == "off":
            raise InvalidArgument([_without_tls(node)])
        _require_certificates(node)
        return True
    return wanted == "where possible" and policy != "off" and not _problems(node)


def give_certificates(node: NodeContext, guest: Guest, endpoint: tls.Endpoint) -> str:
    """Have a QEMU read this node's certificates; the id of the object that has them. Raises QemuFailed, Unsupported."""
    with node.database.reading() as session:
        runtime = runtime_of(session, node.name, guest.name)
    try:
        tls.add_credentials(
            guest.talk(), folder_of(node), endpoint, guest.folder, uid=runtime.uid if runtime else None
        )  # fmt: skip
    except OSError as exc:
        raise Unsupported(f"the certificates of node {node.name} cannot be used: {exc}") from exc
    return tls.CREDENTIALS


def take_certificates(guest: Guest) -> None:
    """Have a QEMU forget them; one that is gone has."""
    with suppress(OperationError):
        tls.remove_credentials(guest.talk())


def of_source(node: NodeContext, row: LiveMigration) -> Tls | None:
    """How the source of a migration shows who it is; None for one in clear text."""
    return Tls(folder_of(node)) if row.info.get("tls") else None


def folder_of(node: NodeContext) -> Path:
    """Where this node's certificates are."""
    return Path(node.settings.migration_tls_dir)


def _without_tls(node: NodeContext) -> dict[str, str]:
    reason = f"node {node.name} never uses it (HOSTLER_MIGRATION_TLS=off); set it to allowed there, or do without"
    return {"field": "tls", "reason": reason}


def _problems(node: NodeContext) -> list[str]:
    if not node.settings.migration_tls_dir:
        return ["HOSTLER_MIGRATION_TLS_DIR names no folder of certificates"]
    return tls.check_folder(folder_of(node))


def _require_certificates(node: NodeContext) -> None:
    if problems := _problems(node):
        raise Unsupported(f"node {node.name} cannot migrate in TLS: " + "; ".join(problems), problems=problems)

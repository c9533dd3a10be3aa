"""What a migration's arguments and its guest's parameters mean for QEMU."""

from __future__ import annotations

from hostler.hvparams import HvParams
from hostler.migration import MigrateArguments
from hostler.payloads import Instance
from models import LiveMigration
from worker.kvm.live_migration.capabilities import Tuning

MIB = 2**20


def options_of(row: LiveMigration) -> MigrateArguments:
    """The arguments that the migration was asked for with, as they are after changes under way."""
    return MigrateArguments.model_validate(row.options)


def _hvparams(row: LiveMigration) -> HvParams:
    return Instance.model_validate(row.info["instance"]).hvparams


def is_live(row: LiveMigration) -> bool:
    """Whether the guest runs meanwhile: where it was asked for, and its own parameter does not say otherwise."""
    return options_of(row).live and _hvparams(row).migration_mode == "live"


def bandwidth_mib_s(row: LiveMigration) -> float:
    """At most; 0 is without limit."""
    asked = options_of(row).bandwidth_mib_s
    return asked if asked is not None else _hvparams(row).migration_bandwidth


def downtime_ms(row: LiveMigration) -> int:
    """How long the guest may stand still, as QEMU is told at first."""
    return options_of(row).downtime_ms or _hvparams(row).migration_downtime


def tuning_of(row: LiveMigration, *, tls_creds: str = "") -> Tuning:
    """What this side's QEMU is told."""
    options = options_of(row)
    return Tuning(
        capabilities=tuple(filter(None, _hvparams(row).migration_caps.split(":"))),
        bandwidth_bytes_s=int(bandwidth_mib_s(row) * MIB),
        downtime_ms=downtime_ms(row),
        auto_converge=options.auto_converge,
        xbzrle=options.xbzrle,
        multifd_channels=options.multifd_channels,
        compression=options.compression,
        tls_creds=tls_creds,
        postcopy=options.postcopy != "never" or options.on_deadline == "postcopy",
    )

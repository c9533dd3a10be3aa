"""The guest goes on where it was: what is done on the source once a migration is given up."""

from __future__ import annotations

from hostler.contract import InstanceState
from models import LiveMigration
from worker.errors import TimedOut
from worker.kvm.live_migration.outgoing import Outgoing
from worker.kvm.live_migration.sample import POSTCOPY
from worker.operations.context import NodeContext
from worker.operations.guests import Guests
from worker.operations.live_migration import rows
from worker.operations.live_migration.transfer import give_up

ENDED_S = 20.0


def go_on_here(node: NodeContext, guests: Guests, row: LiveMigration) -> None:
    """End what the source's QEMU is at, and let the guest run on if it ran. To be called for a migration that is
    ``aborted``, so that no other node can own the guest any more. Safe to repeat.

    With post-copy whose target is gone no QEMU can run the guest any more: then its end is recorded.

    Raises QmpLost when QEMU keeps silent; nothing is concluded from that.
    """
    guest = guests.get(row.instance_name)
    if guest and Outgoing(guest.talk()).query().status in POSTCOPY:
        # QEMU continues it never more: it had begun to send the rest to a target that is gone.
        guest.process.kill(grace_s=0)
        if not guest.ended.wait(ENDED_S):
            raise TimedOut(f"QEMU of {guest.name} has ended, but cleaning up after it takes too long; it goes on")
        return
    if guest is None:
        rows.note_gone(node, row.instance_name)
        return
    give_up(guest, row)
    if rows.state_of(node, row.instance_name) == InstanceState.MIGRATING:
        rows.set_state(node, row.instance_name, InstanceState.UNKNOWN)
    guests.observe(guest)

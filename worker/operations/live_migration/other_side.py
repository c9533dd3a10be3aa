"""What this node has of a guest that another one owns, and its end."""

from __future__ import annotations

from hostler.contract import InstanceState
from models import runtime_of
from worker.errors import TimedOut
from worker.kvm.process import QemuProcess
from worker.operations.context import NodeContext
from worker.operations.ending import Ending
from worker.operations.guests import Guests, identity_of, release

DISCARDED = Ending(InstanceState.STOPPED, "another node has the guest", "killed")


def moved_to(target: str) -> Ending:
    """The end of a QEMU whose guest goes on at another node."""
    return Ending(InstanceState.STOPPED, f"it moved to node {target}", "killed")


def end_incoming(
    node: NodeContext, guests: Guests, name: str, uuid: str | None = None, why: Ending = DISCARDED
) -> list[str]:  # fmt: skip
    """End this node's QEMU of a guest that another node owns, and give back what it had. Safe to repeat.

    With ``uuid`` only that one; ``why`` is for the log. Returns what was removed. Raises TimedOut.
    """
    with node.database.reading() as session:
        runtime = runtime_of(session, node.name, name)
    if runtime is None or (uuid and runtime.uuid != uuid):
        return []
    guest = guests.get(name)
    if guest and guest.uuid == runtime.uuid:
        guest.killed_by_us, guest.ended_as = True, why
        guest.process.kill(grace_s=0.5)
        if not guest.ended.wait(20):
            raise TimedOut(f"QEMU of {name} has ended, but cleaning up after it takes too long; it goes on")
        return [f"runtime {runtime.uuid}"]
    if (identity := identity_of(runtime)) and (process := QemuProcess.adopt(identity)):
        process.kill(grace_s=0.5)
    return release(node, name, runtime.uuid, why)

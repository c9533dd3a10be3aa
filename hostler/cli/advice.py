"""What to do next when a job has failed."""

from __future__ import annotations

from hostler.contract import ErrorCode
from hostler.errors import OperationFailed

_BY_CODE = {
    ErrorCode.UNKNOWN_INSTANCE: "The node knows these: hostler list -n {node}",
    ErrorCode.ALREADY_RUNNING: "See what it is doing: hostler info {name} -n {node}",
    ErrorCode.NOT_RUNNING: "See how it ended: hostler info {name} -n {node}; start it: hostler start {node} FILE",
    ErrorCode.INSTANCE_BUSY: "See which job holds it: hostler jobs --instance {name} -n {node}",
    ErrorCode.NETWORK_FAILED: "Check the node's network: run hostler doctor there",
    ErrorCode.QEMU_FAILED: "Check the node: run hostler doctor there",
    ErrorCode.NODE_UNAVAILABLE: "Start the node's worker: run hostler worker there",
    ErrorCode.INTERNAL: "The node's log has the details",
}


def advise(failed: OperationFailed, job_id: str, node: str = "NODE", name: str = "NAME") -> None:
    """Add the next steps to the exception as notes, which :mod:`hostler.cli.exits` shows."""
    step = _BY_CODE.get(ErrorCode(failed.code)) if failed.code in ErrorCode.__members__ else None
    if step and "`hostler" not in failed.message:
        failed.add_note(step.format(node=node, name=name, job_id=job_id))
    # Not only its own job ends with this code: one that was to change it, and a drain, do too.
    if migration := failed.details.get("migration_id"):
        failed.add_note(f"How it went: hostler migration-report {migration} -n {node}")
    if failed.retryable:
        failed.add_note("The same job, sent again, can succeed.")
    failed.add_note(f"Its history: hostler job {job_id} --history -n {node}")

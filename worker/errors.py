"""What can go wrong on a node, as one tree.

    OperationError                 INTERNAL
    |- UnknownInstance             UNKNOWN_INSTANCE    nothing was done
    |- UnknownJob                  INVALID_ARGUMENT    nothing was done
    |- InstanceBusy                INSTANCE_BUSY       nothing was done
    |- AlreadyRunning              ALREADY_RUNNING     nothing was done; the guest goes on
    |- NotRunning                  NOT_RUNNING         nothing was done
    |- UidPoolExhausted            UID_POOL_EXHAUSTED  everything begun was undone
    |- NetworkFailed               NETWORK_FAILED      everything begun was undone
    |- QemuFailed                  QEMU_FAILED         everything begun was undone
    |  |- EmulatorMissing          (worker.kvm.emulator) nothing was done
    |  `- EmulatorBroken           (worker.kvm.emulator) nothing was done
    |- QmpLost                     QMP_LOST            the guest may go on; its state is asked again
    |- MigrationFailed             MIGRATION_FAILED    the guest is where `details` say
    |  `- LinkLost                 MIGRATION_FAILED    it runs on the target and waits for the rest of its memory
    |- TargetBusy                  NODE_UNAVAILABLE    nothing was done
    |- NodeUnavailable             NODE_UNAVAILABLE    nothing was done, or what the message says
    |- TimedOut                    TIMED_OUT           as the message says
    |- Interrupted                 INTERNAL            the worker died in mid-job; the message says in which phase
    |- Cancelled                   CANCELLED           what had been begun was undone
    `- Unsupported                 UNSUPPORTED         nothing was done

Wrong arguments are ``hostler.errors.InvalidArgument``. At the task boundary, and only there, each becomes
``OperationFailed(code, message, details)``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hostler.contract import ErrorCode


class OperationError(Exception):
    """An operation could not do its work. Subclasses say what state is left behind and whether a retry can help."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    retryable: ClassVar[bool] = False
    transient: ClassVar[bool] = False
    """Whether it is likely to pass by itself, so that the job is tried again without anybody asking."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = {"retryable": self.retryable, **details}


class UnknownInstance(OperationError):
    """The node has no instance of this name; ``owner`` is the node that has it. Nothing was done."""

    code = ErrorCode.UNKNOWN_INSTANCE

    def __init__(self, name: str, node: str, owner: str | None = None) -> None:
        if owner:
            super().__init__(f"{name} is on node {owner}, not on node {node}", instance=name, node=owner)
        else:
            reason = f"node {node} knows no instance {name}; `hostler list` shows those it knows"
            super().__init__(reason, instance=name)


class UnknownJob(OperationError):
    """The node's ledger has no job of this id. Nothing was done."""

    code = ErrorCode.INVALID_ARGUMENT

    def __init__(self, job_id: str, node: str) -> None:
        reason = f"node {node} knows no job {job_id}; it was sent elsewhere, not received yet, or pruned"
        super().__init__(reason, errors=[{"field": "id", "reason": reason}])


class InstanceBusy(OperationError):
    """The job cannot be done beside another one. Nothing was done."""

    code = ErrorCode.INSTANCE_BUSY
    retryable = True


class AlreadyRunning(OperationError):
    """The instance has a QEMU, here or on another node. Nothing was done, the guest goes on."""

    code = ErrorCode.ALREADY_RUNNING


class NotRunning(OperationError):
    """The operation needs a running guest and there is none. Nothing was done."""

    code = ErrorCode.NOT_RUNNING


class UidPoolExhausted(OperationError):
    """The node's pool has no uid that neither a guest nor a process has. What had been begun was undone."""

    code = ErrorCode.UID_POOL_EXHAUSTED
    retryable = True


class NetworkFailed(OperationError):
    """A tap or a network script failed. What had been begun was undone."""

    code = ErrorCode.NETWORK_FAILED


class QemuFailed(OperationError):
    """QEMU refused, or ended when it should not have. What had been begun was undone."""

    code = ErrorCode.QEMU_FAILED


class QmpLost(OperationError):
    """QEMU's monitor did not answer. The guest may go on; nothing was concluded from the silence."""

    code = ErrorCode.QMP_LOST
    retryable = True
    transient = True


class MigrationFailed(OperationError):
    """A live migration came to nothing. ``details`` say where the guest is now (``node``), its ``state`` and the
    ``phase`` in which it failed, as far as who raises it knows."""

    code = ErrorCode.MIGRATION_FAILED


class LinkLost(MigrationFailed):
    """A guest runs on the target and the rest of its memory does not come through. Nothing is given up."""

    retryable = True
    transient = True


class TargetBusy(OperationError):
    """A node receives as many guests as it may. Nothing was done; it passes when one of them has arrived."""

    code = ErrorCode.NODE_UNAVAILABLE
    retryable = True
    transient = True


class NodeUnavailable(OperationError):
    """A node is drained or fenced, and so cannot do it. The message says what makes it available again."""

    code = ErrorCode.NODE_UNAVAILABLE


class TimedOut(OperationError):
    """What was waited for did not happen in time. The message says what state things are in."""

    code = ErrorCode.TIMED_OUT
    retryable = True


class Interrupted(OperationError):
    """The worker that carried out the job died. The message says in which phase, and what was found."""

    retryable = True


class Cancelled(OperationError):
    """The job was asked to give up, and did: what it had begun was undone."""

    code = ErrorCode.CANCELLED
    retryable = True


class Unsupported(OperationError):
    """This host or this version cannot do it. Nothing was done."""

    code = ErrorCode.UNSUPPORTED

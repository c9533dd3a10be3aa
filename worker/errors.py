"""What can go wrong on a node, as one tree.

    OperationError                 INTERNAL
    |- UnknownInstance             UNKNOWN_INSTANCE    nothing was done
    |- UnknownJob                  INVALID_ARGUMENT    nothing was done
    |- InstanceBusy                INSTANCE_BUSY       nothing was done
    |- AlreadyRunning              ALREADY_RUNNING     nothing was done; the guest goes on
    |- NotRunning                  NOT_RUNNING         nothing was done
    |- NetworkFailed               NETWORK_FAILED      everything begun was undone
    |- QemuFailed                  QEMU_FAILED         everything begun was undone
    |  |- EmulatorMissing          (worker.kvm.emulator) nothing was done
    |  `- EmulatorBroken           (worker.kvm.emulator) nothing was done
    |- QmpLost                     QMP_LOST            the guest may go on; its state is asked again
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
    """The node knows no instance of this name. Nothing was done."""

    code = ErrorCode.UNKNOWN_INSTANCE

    def __init__(self, name: str, node: str) -> None:
        super().__init__(f"node {node} knows no instance {name}; `hostler list` shows those it knows", instance=name)


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

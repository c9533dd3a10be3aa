"""The one exception a failed job raises, and what else the client can raise."""

from __future__ import annotations

from typing import Any

from hostler.contract import ErrorCode


class OperationFailed(Exception):
    """A job ended in failure.

    The arguments are positional and JSON-able (``code``, ``message``, ``details``), so that any result backend carries
    them and a reader without hostler's code still finds them in ``exc.args``.
    ``details["retryable"]`` says whether sending the same job again can help; ``details["state"]``, where present,
    what the instance was left in.
    """

    def __init__(self, code: str, message: str, details: dict[str, Any] | None = None) -> None:
        self.details: dict[str, Any] = {"retryable": False, **(details or {})}
        self.code = str(code)
        self.message = message
        super().__init__(self.code, message, self.details)

    @property
    def retryable(self) -> bool:
        """Whether the same job, sent again, can succeed."""
        return bool(self.details["retryable"])

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class InvalidArgument(OperationFailed):
    """An argument is wrong; raised before any side effect. ``details["errors"]`` lists every field with its reason."""

    def __init__(self, errors: list[dict[str, str]]) -> None:
        message = "; ".join(f"{error['field']}: {error['reason']}" for error in errors)
        super().__init__(ErrorCode.INVALID_ARGUMENT, message, {"errors": errors})


class ServiceUnreachable(Exception):
    """The broker or the result backend does not answer. Nothing was sent, or the job goes on without us watching."""

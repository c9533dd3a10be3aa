"""Jobs before they are sent: their arguments checked, bound to the client that can send them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, overload

from hostler.contract import TaskName, queue_name
from hostler.errors import InvalidArgument
from hostler.payloads import ARGUMENTS, JobIdArguments, parse

if TYPE_CHECKING:
    from hostler.client import Client
    from hostler.job import Job

P = ParamSpec("P")


@dataclass(frozen=True)
class JobRequest:
    """A job not sent yet, its arguments checked. Made by ``client.TASK.job(...)``, sent by :meth:`Client.send`."""

    task: TaskName
    node: str
    arguments: dict[str, Any]
    job_id: str | None = None

    def after(self, *job_ids: str, even_if_failed: bool = False) -> JobRequest:
        """The same job, to begin only when those have ended, on whichever node they run.

        Should one of them fail or be cancelled, this one is cancelled too, unless ``even_if_failed``. The nodes have to
        share a database. Raises InvalidArgument for an id no job can have.
        """
        for job_id in job_ids:
            check_id("after", job_id)
        waits = {"after": list(job_ids)} | ({"after_failure": "run"} if even_if_failed else {})
        return replace(self, arguments=self.arguments | waits)


class TaskCall(Generic[P]):
    """A task of one client. Call it to send a job; :meth:`job` builds the job without sending it."""

    def __init__(self, client: Client, build: Callable[P, JobRequest]) -> None:
        self._client = client
        self._build = build
        self.__doc__ = build.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Job:
        """Send the job. Raises InvalidArgument (nothing was sent) or ServiceUnreachable."""
        return self._client.send(self._build(*args, **kwargs))

    def job(self, *args: P.args, **kwargs: P.kwargs) -> JobRequest:
        """Build the job without sending it. Raises InvalidArgument, naming the field."""
        return self._build(*args, **kwargs)


class Task(Generic[P]):
    """Binds a builder of requests to a client, as a method is bound to its object."""

    def __init__(self, build: Callable[P, JobRequest]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, client: None, owner: type[Any]) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type[Any]) -> TaskCall[P]: ...
    def __get__(self, client: Client | None, owner: type[Any]) -> Self | TaskCall[P]:
        return self if client is None else TaskCall(client, self._build)


def request(task: TaskName, node: str, job_id: str | None, /, **arguments: Any) -> JobRequest:
    """The job ``task`` for ``node``. Raises InvalidArgument, naming the field."""
    model = ARGUMENTS[task]
    # What is left at its default is not sent: the message stays short, and the node's own default counts.
    given = {name: value for name, value in arguments.items() if not _is_default(model.model_fields.get(name), value)}
    checked = parse(model, given).model_dump(mode="json", exclude_unset=True)
    check_address(node, job_id)
    return JobRequest(task, node, checked, job_id)


def _is_default(field: Any, value: object) -> bool:
    if field is None:
        return False  # nobody knows it; it is refused by its name
    default = field.get_default(call_default_factory=True)
    return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)


def check_address(node: str, job_id: str | None) -> None:
    """Raises InvalidArgument for a node or a job that there cannot be."""
    try:
        queue_name(node)
    except (ValueError, TypeError):
        reason = f"{node!r} is not a node name (letters, digits, '.', '_', '-'; at most 63)"
        raise InvalidArgument([{"field": "node", "reason": reason}]) from None
    if job_id is not None:
        check_id("job_id", job_id)


def check_id(field: str, value: str) -> None:
    """Raises InvalidArgument, naming ``field``, for an id no job can have."""
    try:
        parse(JobIdArguments, {"id": value})
    except InvalidArgument as exc:
        raise InvalidArgument([{**error, "field": field} for error in exc.details["errors"]]) from None

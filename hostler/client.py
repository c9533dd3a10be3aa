"""The client: builds jobs, checks their arguments, sends them to a node's queue.

A job is a plain Celery message, so everything here can be done with ``send_task`` too; this adds types, the check of
arguments before anything is sent, and clear errors.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Literal, ParamSpec, Self, overload

from celery import Celery
from celery.backends.redis import RedisBackend
from celery.exceptions import ImproperlyConfigured
from kombu import Queue

from hostler.celery_options import shared_options
from hostler.contract import TaskName, queue_name, worker_name
from hostler.errors import InvalidArgument
from hostler.job import Job, reaching, safe_url
from hostler.payloads import ARGUMENTS, Instance, JobIdArguments, parse
from hostler.settings import Settings, SettingsError, load

ANSWER_S = 3.0
"""How long a broker or backend may take to accept a connection or to answer, before it counts as unreachable."""
PING_S = 1.0
"""A living worker answers a ping in milliseconds, whatever its jobs do."""
_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5}
"""One more attempt, for a connection that went stale; Celery's own default may go on for ever."""

InstanceSpec = Instance | Mapping[str, Any]
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
            _check_id("after", job_id)
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


class _Task(Generic[P]):
    """Binds a builder of requests to a client, as a method is bound to its object."""

    def __init__(self, build: Callable[P, JobRequest]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, client: None, owner: type[Client]) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type[Client]) -> TaskCall[P]: ...
    def __get__(self, client: Client | None, owner: type[Client]) -> Self | TaskCall[P]:
        return self if client is None else TaskCall(client, self._build)


def _start(node: str, instance: InstanceSpec, paused: bool = False, job_id: str | None = None) -> JobRequest:
    """Build and run a guest; with ``paused`` it is left before its first instruction. Result: the instance view."""
    return _request(TaskName.INSTANCE_START, node, job_id, instance=instance, paused=paused)


def _stop(
    node: str,
    name: str,
    *,
    force: bool = False,
    timeout_s: float = 120,
    on_timeout: Literal["force", "fail"] = "force",
    job_id: str | None = None,
) -> JobRequest:
    """Ask the guest to shut down through ACPI, or kill it with ``force``. Result: the view plus ``how`` it ended."""
    return _request(
        TaskName.INSTANCE_STOP, node, job_id, name=name, force=force, timeout_s=timeout_s, on_timeout=on_timeout
    )


def _reboot(
    node: str,
    name: str,
    mode: Literal["soft", "hard", "reset"] = "soft",
    timeout_s: float = 120,
    job_id: str | None = None,
) -> JobRequest:
    """Restart the guest: by ACPI (``soft``), by killing it (``hard``) or by its reset line. Result: the view."""
    return _request(TaskName.INSTANCE_REBOOT, node, job_id, name=name, mode=mode, timeout_s=timeout_s)


def _pause(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Halt the guest's processors; its memory stays. Result: the instance view."""
    return _request(TaskName.INSTANCE_PAUSE, node, job_id, name=name)


def _resume(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Let a paused guest go on. Result: the instance view."""
    return _request(TaskName.INSTANCE_RESUME, node, job_id, name=name)


def _cleanup(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Remove what a guest that no longer runs left behind. Result: what was removed, released, quarantined."""
    return _request(TaskName.INSTANCE_CLEANUP, node, job_id, name=name)


def _info(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Result: the instance view."""
    return _request(TaskName.INSTANCE_INFO, node, job_id, name=name)


def _list(node: str, job_id: str | None = None) -> JobRequest:
    """Result: the views of all instances of the node."""
    return _request(TaskName.INSTANCE_LIST, node, job_id)


def _console(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Result: how to reach the guest's console (``kind``: ``serial``, ``vnc`` or ``message``)."""
    return _request(TaskName.INSTANCE_CONSOLE, node, job_id, name=name)


def _check(node: str, instance: InstanceSpec, job_id: str | None = None) -> JobRequest:
    """Would the node start this? Nothing is started. Result: ``errors`` and ``warnings``."""
    return _request(TaskName.INSTANCE_CHECK, node, job_id, instance=instance)


def _node_info(node: str, job_id: str | None = None) -> JobRequest:
    """Result: facts about the node."""
    return _request(TaskName.NODE_INFO, node, job_id)


def _jobs(
    node: str,
    instance: str | None = None,
    states: Sequence[str] = (),
    queries: bool = False,
    limit: int = 50,
    job_id: str | None = None,
) -> JobRequest:
    """Result: the node's latest jobs from its ledger, newest first; with ``queries`` also those that only look."""
    wanted = {"instance": instance, "states": list(states), "queries": queries, "limit": limit}
    return _request(TaskName.JOB_LIST, node, job_id, **wanted)


def _job_info(node: str, id: str, job_id: str | None = None) -> JobRequest:
    """Result: everything the node's ledger knows of the job ``id`` (``job_id`` is the id of this question)."""
    return _request(TaskName.JOB_INFO, node, job_id, id=id)


def _job_cancel(node: str, id: str, job_id: str | None = None) -> JobRequest:
    """Result: what became of the job ``id``: ``outcome`` and ``message``. :meth:`hostler.Job.cancel` is quicker."""
    return _request(TaskName.JOB_CANCEL, node, job_id, id=id)


def _job_retry(
    node: str, id: str | None = None, failed_since: str | None = None, limit: int = 100, job_id: str | None = None
) -> JobRequest:
    """Result: a list of ``{"id", "retry_of", "task"}``: the job ``id`` sent again, or all that failed since a time."""
    return _request(TaskName.JOB_RETRY, node, job_id, id=id, failed_since=failed_since, limit=limit)


def _job_why(node: str, id: str, job_id: str | None = None) -> JobRequest:
    """Result: ``state``, ``because`` (sentences) and ``command`` (what resolves it) of the job ``id``."""
    return _request(TaskName.JOB_WHY, node, job_id, id=id)


def _request(task: TaskName, node: str, job_id: str | None, **arguments: Any) -> JobRequest:
    model = ARGUMENTS[task]
    # What is left at its default is not sent: the message stays short, and the node's own default counts.
    given = {name: value for name, value in arguments.items() if not _is_default(model.model_fields[name], value)}
    checked = parse(model, given).model_dump(mode="json", exclude_unset=True)
    _check_address(node, job_id)
    return JobRequest(task, node, checked, job_id)


def _is_default(field: Any, value: object) -> bool:
    default = field.get_default(call_default_factory=True)
    return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)


def _check_address(node: str, job_id: str | None) -> None:
    try:
        queue_name(node)
    except (ValueError, TypeError):
        reason = f"{node!r} is not a node name (letters, digits, '.', '_', '-'; at most 63)"
        raise InvalidArgument([{"field": "node", "reason": reason}]) from None
    if job_id is not None:
        _check_id("job_id", job_id)


def _check_id(field: str, value: str) -> None:
    try:
        parse(JobIdArguments, {"id": value})
    except InvalidArgument as exc:
        raise InvalidArgument([{**error, "field": field} for error in exc.details["errors"]]) from None


class Client:
    """Sends jobs to nodes and looks at jobs.

    ``broker_url`` and ``result_backend`` default to the settings (``HOSTLER_*``), and those to the embedded broker of
    this machine, which is started when it is first needed. Nothing is connected before a job is sent or read. A client
    may be shared by threads. Its Celery application is its own: it neither becomes the current one nor reads the
    configuration of an application around it.

    Raises SettingsError for a URL that no transport or backend understands.
    """

    start = _Task(_start)
    stop = _Task(_stop)
    reboot = _Task(_reboot)
    pause = _Task(_pause)
    resume = _Task(_resume)
    cleanup = _Task(_cleanup)
    info = _Task(_info)
    list = _Task(_list)
    console = _Task(_console)
    check = _Task(_check)
    node_info = _Task(_node_info)
    jobs = _Task(_jobs)
    job_info = _Task(_job_info)
    job_cancel = _Task(_job_cancel)
    job_retry = _Task(_job_retry)
    job_why = _Task(_job_why)

    def __init__(
        self, broker_url: str | None = None, result_backend: str | None = None, settings: Settings | None = None
    ) -> None:
        given = {"broker_url": broker_url, "result_backend": result_backend}
        base = settings or load()
        self._settings = base.model_copy(update={name: url for name, url in given.items() if url})
        self._app = _application(self._settings.effective_broker_url, self._settings.effective_result_backend)
        self._embedded_lock = threading.Lock()
        self._embedded_ready = not self._settings.needs_embedded_server

    def send(self, request: JobRequest) -> Job:
        """Send a job built by ``client.TASK.job(...)`` to its node's queue.

        Raises ServiceUnreachable if the broker does not take it. Should the connection have broken at the last moment,
        the job may be there nevertheless: send it again with the same ``job_id``, and it takes effect once.
        """
        job_id = request.job_id or str(uuid.uuid4())
        self._ensure_embedded()
        with reaching(f"the broker {self._broker_url} (sending job {job_id})"):
            self._app.send_task(
                str(request.task),
                kwargs=request.arguments,
                task_id=job_id,
                queue=self._queue(request.node),
                add_to_parent=False,
            )
        return Job(self._app, job_id)

    def job(self, job_id: str) -> Job:
        """The job with this id, whoever sent it. Raises InvalidArgument for an id no job can have."""
        _check_id("id", job_id)
        self._ensure_embedded()
        return Job(self._app, job_id)

    def ping(self, node: str) -> bool:
        """Whether the node's worker is alive: it answers even when all its threads are busy."""
        _check_address(node, None)
        self._ensure_embedded()
        with reaching(f"the broker {self._broker_url}"):
            inspect = self._app.control.inspect(destination=[worker_name(node)], timeout=PING_S)
            return bool(inspect.ping())

    def close(self) -> None:
        """Close the connections. Jobs go on; the client may be used again and then connects again."""
        self._app.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _broker_url(self) -> str:
        return safe_url(self._settings.effective_broker_url)

    def _queue(self, node: str) -> Queue:
        # The very queue that a bare send_task(queue="node.n1") would declare. Only ours: no other name is created.
        return self._app.amqp.queues.new_missing(queue_name(node))

    def _ensure_embedded(self) -> None:
        if self._embedded_ready:
            return
        from hostler import embedded

        with self._embedded_lock:
            if not self._embedded_ready:
                embedded.ensure(self._settings)
                self._embedded_ready = True


class _Application(Celery):  # type: ignore[misc]  # Celery has no types
    def _get_backend(self) -> Any:
        backend = super()._get_backend()
        if isinstance(backend, RedisBackend):
            # Celery subscribes to the result of everything it sends, read or not, for as long as the process lives.
            backend.on_task_call = lambda producer, task_id: None
        return backend


def _application(broker_url: str, result_backend: str) -> Celery:
    app = _Application("hostler-client", set_as_current=False, fixups=[])
    # Named this way, the URLs cannot be replaced by CELERY_BROKER_URL and CELERY_RESULT_BACKEND, which in the
    # environment of a master service mean its own.
    app.backend_cls = result_backend
    app.conf.update(_options(broker_url, result_backend), broker_read_url=broker_url, broker_write_url=broker_url)
    try:
        app.connection_for_write().get_transport_cls()
        app.backend  # noqa: B018  (made here, connected on first use)
    except (KeyError, ValueError, ImportError, ImproperlyConfigured) as exc:
        urls = f"broker {safe_url(broker_url)!r}, result backend {safe_url(result_backend)!r}"
        # The text of a ValueError may quote a piece of a password that was not quoted.
        hint = "not a valid URL; special characters in a password are written as %2F for / and so on"
        raise SettingsError(f"{urls}: {hint if isinstance(exc, ValueError) else exc.args[0]}") from None
    return app


def _options(broker_url: str, result_backend: str) -> dict[str, Any]:
    options = shared_options(broker_url, result_backend)
    transport = options["broker_transport_options"]
    quick = {name: ANSWER_S for name in ("socket_timeout", "socket_connect_timeout") if name in transport}
    return options | {
        "broker_transport_options": transport | _RETRY | quick,
        "broker_connection_timeout": ANSWER_S,
        "redis_socket_timeout": ANSWER_S,
        "redis_socket_connect_timeout": ANSWER_S,
        "task_publish_retry_policy": _RETRY,
        "task_create_missing_queues": False,
    }

"""The client: builds jobs, checks their arguments, sends them to a node's queue.

A job is a plain Celery message, so everything here can be done with ``send_task`` too; this adds types, the check of
arguments before anything is sent, and clear errors.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from celery import Celery
from celery.backends.redis import RedisBackend
from celery.exceptions import ImproperlyConfigured
from kombu import Queue

from hostler.celery_options import shared_options
from hostler.client_maintenance import MaintenanceTasks
from hostler.client_migration import MigrationTasks
from hostler.contract import TaskName, queue_name, worker_name
from hostler.errors import ServiceUnreachable
from hostler.hidden import shown
from hostler.job import Job, reaching, safe_url
from hostler.job_request import JobRequest, Task, check_address, check_id, request
from hostler.payloads import Disk, Instance, Nic
from hostler.settings import Settings, SettingsError, load

ANSWER_S = 3.0
"""How long a broker or backend may take to accept a connection or to answer, before it counts as unreachable."""
PING_S = 1.0
"""A living worker answers a ping in milliseconds, whatever its jobs do."""
_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5}
"""One more attempt, for a connection that went stale; Celery's own default may go on for ever."""

InstanceSpec = Instance | Mapping[str, Any]


def _start(node: str, instance: InstanceSpec, paused: bool = False, job_id: str | None = None) -> JobRequest:
    """Build and run a guest; with ``paused`` it is left before its first instruction. Result: the instance view."""
    return request(TaskName.INSTANCE_START, node, job_id, instance=instance, paused=paused)


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
    return request(
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
    return request(TaskName.INSTANCE_REBOOT, node, job_id, name=name, mode=mode, timeout_s=timeout_s)


def _restart(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Start an instance that does not run again, as it was last started. Result: the instance view and ``how``."""
    return request(TaskName.INSTANCE_RESTART, node, job_id, name=name)


def _pause(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Halt the guest's processors; its memory stays. Result: the instance view."""
    return request(TaskName.INSTANCE_PAUSE, node, job_id, name=name)


def _resume(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Let a paused guest go on. Result: the instance view."""
    return request(TaskName.INSTANCE_RESUME, node, job_id, name=name)


def _cleanup(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Remove what a guest that no longer runs left behind. Result: what was removed, released, quarantined."""
    return request(TaskName.INSTANCE_CLEANUP, node, job_id, name=name)


def _disk_add(node: str, name: str, disk: Disk | Mapping[str, Any], job_id: str | None = None) -> JobRequest:
    """Plug a disk into a running guest, as its last one. Result: the instance view."""
    return request(TaskName.INSTANCE_DISK_ADD, node, job_id, name=name, disk=disk)


def _disk_remove(node: str, name: str, path: str, timeout_s: float = 30, job_id: str | None = None) -> JobRequest:
    """Take a disk out once the guest has let go of it. Result: the instance view."""
    return request(TaskName.INSTANCE_DISK_REMOVE, node, job_id, name=name, path=path, timeout_s=timeout_s)


def _disk_resize(node: str, name: str, path: str, size_mib: int, job_id: str | None = None) -> JobRequest:
    """Make a disk of a running guest larger. Result: the instance view."""
    return request(TaskName.INSTANCE_DISK_RESIZE, node, job_id, name=name, path=path, size_mib=size_mib)


def _nic_add(node: str, name: str, nic: Nic | Mapping[str, Any], job_id: str | None = None) -> JobRequest:
    """Plug a network card into a running guest, as its last one. Result: the instance view."""
    return request(TaskName.INSTANCE_NIC_ADD, node, job_id, name=name, nic=nic)


def _nic_remove(node: str, name: str, mac: str, timeout_s: float = 30, job_id: str | None = None) -> JobRequest:
    """Take a card out once the guest has let go of it. Result: the instance view."""
    return request(TaskName.INSTANCE_NIC_REMOVE, node, job_id, name=name, mac=mac, timeout_s=timeout_s)


def _cd_insert(
    node: str,
    name: str,
    path: str,
    drive: Literal["cdrom", "cdrom2"] = "cdrom",
    *,
    timeout_s: float = 30,
    force: bool = False,
    job_id: str | None = None,
) -> JobRequest:
    """Put a CD into a drive, in the place of the one in it; ``force`` also where the guest has locked it.

    Result: the instance view.
    """
    how = {"drive": drive, "timeout_s": timeout_s, "force": force}
    return request(TaskName.INSTANCE_CD_INSERT, node, job_id, name=name, path=path, **how)


def _cd_eject(
    node: str,
    name: str,
    drive: Literal["cdrom", "cdrom2"] = "cdrom",
    *,
    timeout_s: float = 30,
    force: bool = False,
    job_id: str | None = None,
) -> JobRequest:
    """Take the CD out of a drive, ``force`` also where the guest has locked it. Result: the instance view."""
    how = {"drive": drive, "timeout_s": timeout_s, "force": force}
    return request(TaskName.INSTANCE_CD_EJECT, node, job_id, name=name, **how)


def _set_memory(node: str, name: str, memory_mib: int, timeout_s: float = 30, job_id: str | None = None) -> JobRequest:
    """Change how much memory a running guest has, by its balloon. Result: the instance view."""
    return request(TaskName.INSTANCE_SET_MEMORY, node, job_id, name=name, memory_mib=memory_mib, timeout_s=timeout_s)


def _set_password(
    node: str, name: str, kind: Literal["vnc", "spice"], password_file: str, job_id: str | None = None
) -> JobRequest:
    """Give a display the password that is in a file on the node. Result: the instance view."""
    return request(TaskName.INSTANCE_SET_PASSWORD, node, job_id, name=name, kind=kind, password_file=password_file)


def _backup(
    node: str,
    name: str,
    target_dir: str | None = None,
    *,
    targets: Sequence[str] = (),
    format: Literal["raw", "qcow2"] = "qcow2",
    job_id: str | None = None,
) -> JobRequest:
    """Copy all disks, as they are at one moment, into new files of the node. Result: ``files`` and ``how``."""
    where = {"target_dir": target_dir, "targets": list(targets), "format": format}
    return request(TaskName.INSTANCE_BACKUP, node, job_id, name=name, **where)


def _snapshot_create(node: str, name: str, snapshot: str, job_id: str | None = None) -> JobRequest:
    """Keep all writable disks of an instance, running or not, as they are at this moment. Result: the snapshot."""
    return request(TaskName.SNAPSHOT_CREATE, node, job_id, name=name, snapshot=snapshot)


def _snapshot_list(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Result: the instance's snapshots, the oldest first."""
    return request(TaskName.SNAPSHOT_LIST, node, job_id, name=name)


def _snapshot_revert(node: str, name: str, snapshot: str, job_id: str | None = None) -> JobRequest:
    """Discard what a stopped instance wrote since its latest snapshot, which stays. Result: the snapshot."""
    return request(TaskName.SNAPSHOT_REVERT, node, job_id, name=name, snapshot=snapshot)


def _snapshot_delete(node: str, name: str, snapshot: str, job_id: str | None = None) -> JobRequest:
    """Give a snapshot up; what was written since is merged into its files. Result: ``disks`` as they are now."""
    return request(TaskName.SNAPSHOT_DELETE, node, job_id, name=name, snapshot=snapshot)


def _info(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Result: the instance view."""
    return request(TaskName.INSTANCE_INFO, node, job_id, name=name)


def _list(node: str, job_id: str | None = None) -> JobRequest:
    """Result: the views of all instances of the node."""
    return request(TaskName.INSTANCE_LIST, node, job_id)


def _console(
    node: str, name: str, kind: Literal["serial", "vnc", "spice"] | None = None, job_id: str | None = None
) -> JobRequest:
    """Result: how to reach the guest, by its first console or that of ``kind``: a ``serial`` port or a display.

    Of the result, ``kind`` is ``serial`` (``host``, ``command``, ``path``), ``vnc`` or ``spice`` (``host`` and
    ``port``, or ``path`` of a unix socket), or ``message``: there is none.
    """
    return request(TaskName.INSTANCE_CONSOLE, node, job_id, name=name, kind=kind)


def _check(node: str, instance: InstanceSpec, job_id: str | None = None) -> JobRequest:
    """Would the node start this? Nothing is started. Result: ``errors`` and ``warnings``."""
    return request(TaskName.INSTANCE_CHECK, node, job_id, instance=instance)


def _node_info(node: str, job_id: str | None = None) -> JobRequest:
    """Result: facts about the node."""
    return request(TaskName.NODE_INFO, node, job_id)


def _node_list(node: str, job_id: str | None = None) -> JobRequest:
    """Result: all nodes of the database that ``node`` uses: worker, guests by state, open jobs. Ask any living one."""
    return request(TaskName.NODE_LIST, node, job_id)


def _audit(node: str, job_id: str | None = None) -> JobRequest:
    """Result: ``findings``, where the node's database and its host disagree, and what was ``checked``."""
    return request(TaskName.NODE_AUDIT, node, job_id)


def _repair(node: str, ids: Sequence[str] = (), dry_run: bool = True, job_id: str | None = None) -> JobRequest:
    """Act on findings of an audit that still hold: ``ids``, or all that can be repaired. Destroys nothing by itself.

    Result: ``done``, ``would_do`` (with ``dry_run``) and ``left`` with the reason.
    """
    return request(TaskName.NODE_REPAIR, node, job_id, ids=list(ids), dry_run=dry_run)


def _verify(node: str, job_id: str | None = None) -> JobRequest:
    """Result: all that is wrong with the node: ``errors`` and ``warnings``, each with what to do."""
    return request(TaskName.NODE_VERIFY, node, job_id)


def _powercycle(node: str, confirm: str, boot_id: str | None = None, job_id: str | None = None) -> JobRequest:
    """Reboot the host at once, its guests' power cut; ``confirm`` is the node's name once more. Result: nothing.

    The job ends just before the host goes. With ``boot_id``, from ``node_info``, only if it was not rebooted since.
    """
    return request(TaskName.NODE_POWERCYCLE, node, job_id, confirm=confirm, boot_id=boot_id)


def _uid_pool_show(node: str, history: bool = False, job_id: str | None = None) -> JobRequest:
    """Result: ``ranges``, ``size``, ``free`` and ``leases``; with ``history`` also of uids that are free again."""
    return request(TaskName.UID_POOL_SHOW, node, job_id, history=history)


def _uid_pool_add(node: str, ranges: str, force: bool = False, job_id: str | None = None) -> JobRequest:
    """Give the node uids for guests, such as ``20000-20099,20200``. Result: as ``uid_pool_show``."""
    return request(TaskName.UID_POOL_ADD, node, job_id, ranges=ranges, force=force)


def _uid_pool_remove(node: str, ranges: str, job_id: str | None = None) -> JobRequest:
    """Take ranges, each as it was added, out of the node's pool. Result: as ``uid_pool_show``."""
    return request(TaskName.UID_POOL_REMOVE, node, job_id, ranges=ranges)


def _quarantine_list(node: str, job_id: str | None = None) -> JobRequest:
    """Result: ``items``, what QEMUs left where nothing should ever be: ``name``, ``path``, ``size_bytes``, ``at``."""
    return request(TaskName.QUARANTINE_LIST, node, job_id)


def _quarantine_release(node: str, names: Sequence[str], job_id: str | None = None) -> JobRequest:
    """Delete items of the quarantine. Result: ``released``."""
    return request(TaskName.QUARANTINE_RELEASE, node, job_id, names=list(names))


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
    return request(TaskName.JOB_LIST, node, job_id, **wanted)


def _job_info(node: str, id: str, job_id: str | None = None) -> JobRequest:
    """Result: everything the node's ledger knows of the job ``id`` (``job_id`` is the id of this question)."""
    return request(TaskName.JOB_INFO, node, job_id, id=id)


def _job_cancel(node: str, id: str, job_id: str | None = None) -> JobRequest:
    """Result: what became of the job ``id``: ``outcome`` and ``message``. :meth:`hostler.Job.cancel` is quicker."""
    return request(TaskName.JOB_CANCEL, node, job_id, id=id)


def _job_retry(
    node: str, id: str | None = None, failed_since: str | None = None, limit: int = 100, job_id: str | None = None
) -> JobRequest:
    """Result: a list of ``{"id", "retry_of", "task"}``: the job ``id`` sent again, or all that failed since a time."""
    return request(TaskName.JOB_RETRY, node, job_id, id=id, failed_since=failed_since, limit=limit)


def _job_why(node: str, id: str, job_id: str | None = None) -> JobRequest:
    """Result: ``state``, ``because`` (sentences) and ``command`` (what resolves it) of the job ``id``."""
    return request(TaskName.JOB_WHY, node, job_id, id=id)


def _prune(
    node: str,
    older_than_s: int | None = None,
    failures_older_than_s: int | None = None,
    dry_run: bool = False,
    job_id: str | None = None,
) -> JobRequest:
    """Remove ended jobs from the node's ledger; by default those older than its settings say, at the least 600 s.

    Result: ``removed`` (``would_remove`` with ``dry_run``), ``by_state``, and ``kept``: how many are old enough, but
    jobs that have not ended come after them or retry them.
    """
    ages = {"older_than_s": older_than_s, "failures_older_than_s": failures_older_than_s}
    return request(TaskName.JOB_PRUNE, node, job_id, **ages, dry_run=dry_run)


class Client(MigrationTasks, MaintenanceTasks):
    """Sends jobs to nodes and looks at jobs.

    ``broker_url`` and ``result_backend`` default to the settings (``HOSTLER_*``), and those to the embedded broker of
    this machine, which is started when it is first needed. Nothing is connected before a job is sent or read. A client
    may be shared by threads. Its Celery application is its own: it neither becomes the current one nor reads the
    configuration of an application around it.

    Raises SettingsError for a URL that no transport or backend understands.
    """

    start = Task(_start)
    stop = Task(_stop)
    reboot = Task(_reboot)
    restart = Task(_restart)
    pause = Task(_pause)
    resume = Task(_resume)
    cleanup = Task(_cleanup)
    disk_add = Task(_disk_add)
    disk_remove = Task(_disk_remove)
    disk_resize = Task(_disk_resize)
    nic_add = Task(_nic_add)
    nic_remove = Task(_nic_remove)
    cd_insert = Task(_cd_insert)
    cd_eject = Task(_cd_eject)
    set_memory = Task(_set_memory)
    set_password = Task(_set_password)
    backup = Task(_backup)
    snapshot_create = Task(_snapshot_create)
    snapshot_list = Task(_snapshot_list)
    snapshot_revert = Task(_snapshot_revert)
    snapshot_delete = Task(_snapshot_delete)
    info = Task(_info)
    list = Task(_list)
    console = Task(_console)
    check = Task(_check)
    node_info = Task(_node_info)
    node_list = Task(_node_list)
    audit = Task(_audit)
    repair = Task(_repair)
    uid_pool_show = Task(_uid_pool_show)
    uid_pool_add = Task(_uid_pool_add)
    uid_pool_remove = Task(_uid_pool_remove)
    quarantine_list = Task(_quarantine_list)
    quarantine_release = Task(_quarantine_release)
    verify = Task(_verify)
    powercycle = Task(_powercycle)
    jobs = Task(_jobs)
    job_info = Task(_job_info)
    job_cancel = Task(_job_cancel)
    job_retry = Task(_job_retry)
    job_why = Task(_job_why)
    prune = Task(_prune)

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
                kwargsrepr=shown(request.arguments),
                task_id=job_id,
                queue=self._queue(request.node),
                add_to_parent=False,
            )
        return Job(self._app, job_id)

    def job(self, job_id: str) -> Job:
        """The job with this id, whoever sent it. Raises InvalidArgument for an id no job can have."""
        check_id("id", job_id)
        self._ensure_embedded()
        return Job(self._app, job_id)

    def ping(self, node: str) -> bool:
        """Whether the node's worker is alive: it answers even when all its threads are busy."""
        check_address(node, None)
        self._ensure_embedded()
        with reaching(f"the broker {self._broker_url}"):
            inspect = self._app.control.inspect(destination=[worker_name(node)], timeout=PING_S)
            return bool(inspect.ping())

    def living_node(self) -> str:
        """The node whose worker answers first. Raises ServiceUnreachable when none does."""
        self._ensure_embedded()
        with reaching(f"the broker {self._broker_url}"):
            replies = self._app.control.ping(timeout=PING_S, limit=1)
        names = [name.removeprefix(worker_name("")) for reply in replies or () for name in reply]
        if not names:
            raise ServiceUnreachable("no node's worker answers; start one on its host: hostler worker")
        return str(names[0])

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

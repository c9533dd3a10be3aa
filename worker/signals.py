"""The worker's life as Celery's signals: checked and registered before it consumes, let go of when it ends."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import structlog
from celery import signals
from celery.platforms import SecurityWarning
from celery.utils.nodenames import default_nodename
from sqlalchemy.exc import SQLAlchemyError

from hostler import settings
from hostler.contract import worker_name
from hostler.errors import ServiceUnreachable
from migrations.errors import SchemaError
from models import DatabaseUnusable
from tasks import outcome, presence
from tasks.reporting import Reporter
from worker import logs
from worker.errors import OperationError
from worker.operations.host import HostUnfit
from worker.operations.service import Service, current, set_current

log = structlog.get_logger(__name__)


@signals.setup_logging.connect
def _set_up_logging(loglevel: int | str | None = None, **_: Any) -> None:
    logs.configure(settings.load().log_format, loglevel or "INFO")


@signals.celeryd_init.connect
def _open(instance: Any, **_: Any) -> None:
    """Become the node's worker, or end with a clear message: Celery would go on after a mere exception."""
    try:
        # Celery warns root of messages that carry code (pickle); ours are JSON, and taps need the rights.
        warnings.simplefilter("ignore", SecurityWarning)
        chosen = settings.load()
        if instance.hostname == default_nodename(None):
            instance.hostname = worker_name(chosen.node)
        logs.configure(chosen.log_format, "INFO")
        set_current(Service.open(chosen))
    except (DatabaseUnusable, HostUnfit, settings.SettingsError) as exc:
        logs.refuse(exc, logs.MISUSED)
    except (OperationError, SchemaError) as exc:
        logs.refuse(exc, logs.REFUSED)
    except ServiceUnreachable as exc:
        logs.refuse(exc, logs.UNREACHABLE)
    except SQLAlchemyError as exc:
        reason = f"the database cannot be used: {getattr(exc, 'orig', None) or exc}"
        logs.refuse(reason, logs.UNREACHABLE)


@signals.worker_ready.connect
def _ready(sender: Any, **_: Any) -> None:
    service, app = current(), sender.app
    restore = partial(outcome.restore_results, app, service.node.database)
    outcome.use_reporter(Reporter(app, sender.hostname, restore))
    outcome.repair_results(app, service)
    presence.tell_own(app, service.node.database, service.node.name)
    for wakeup in service.left_behind:
        log.info("continuing a job of the worker before", job=wakeup.job_id, task=wakeup.task)
        outcome.wake(app, wakeup)
    service.start_heart(lambda ended: outcome.carry_out(app, ended))
    presence.watch(app, service)
    log.info("worker is ready", node=service.node.name, queue=f"node.{service.node.name}")


@signals.worker_shutting_down.connect
def _stop_waiting(**_: Any) -> None:
    outcome.shutting_down.set()


@signals.worker_shutdown.connect
def _close(**_: Any) -> None:
    outcome.use_reporter(None)
    presence.watch_no_more()
    current().close()
    set_current(None)
    log.info("worker ended; every guest runs on")

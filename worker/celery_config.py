"""Celery's configuration of a node, computed from the settings. Loaded by Celery on first use."""

from __future__ import annotations

import os
from typing import Any

from kombu import Exchange, Queue
from kombu.transport import TRANSPORT_ALIASES

from hostler import embedded
from hostler.celery_options import shared_options
from hostler.contract import queue_name
from hostler.errors import ServiceUnreachable
from hostler.settings import Settings, SettingsError, load
from worker import logs


def node_options(settings: Settings) -> dict[str, Any]:
    """Everything that makes a Celery worker this node's worker."""
    queue = queue_name(settings.node)
    options = shared_options(settings.effective_broker_url, settings.effective_result_backend)
    options["broker_transport_options"] |= _own_unacked(settings)
    return options | {
        "include": [
            "tasks.hotplug",
            "tasks.instance",
            "tasks.isolation",
            "tasks.job",
            "tasks.maintenance",
            "tasks.migration",
            "tasks.node",
            "tasks.snapshot",
        ],
        "task_queues": [Queue(queue, Exchange(queue), routing_key=queue)],
        "task_default_queue": queue,
        "task_default_exchange": queue,
        "task_default_routing_key": queue,
        "worker_consumer": "worker.consumer:NodeConsumer",
        # Operations wait for QEMU, not for a processor; threads share one monitor loop, at half of prefork's memory.
        "worker_pool": "threads",
        "worker_concurrency": settings.concurrency,
        # Acknowledged early: the ledger has the job by then, and a redelivery while it runs could only do harm.
        "task_acks_late": False,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": settings.effective_broker_url.startswith("redis"),
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_send_task_events": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_enable_remote_control": True,
        # However long the broker is away; Celery's default gives up after a hundred attempts.
        "broker_connection_max_retries": None,
        "task_track_started": True,
        "task_send_sent_event": True,
        # A result is saved over an outage of the backend; progress is not, see tasks/reporting.py.
        "result_backend_always_retry": True,
    }


def _own_unacked(settings: Settings) -> dict[str, Any]:
    # With keys of its own a node restores only its own unacknowledged messages, and at once when it starts.
    if not settings.effective_broker_url.startswith("redis"):
        return {}
    return {
        "unacked_key": f"unacked.{settings.node}",
        "unacked_index_key": f"unacked_index.{settings.node}",
        "unacked_mutex_key": f"unacked_mutex.{settings.node}",
    }


# By its alias, because a URL such as redis+socket:// says itself which transport it wants.
TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), "worker.redis_transport:Transport"))

# Celery lets these override what is configured; a node is told where its broker is by HOSTLER_BROKER_URL alone.
for _name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND"):
    os.environ.pop(_name, None)
try:
    _settings = load()
    embedded.ensure(_settings)
except SettingsError as exc:  # `celery -A worker` would show a person where in Celery this was read
    logs.refuse(exc, logs.MISUSED)
except ServiceUnreachable as exc:
    logs.refuse(exc, logs.UNREACHABLE)
globals().update(node_options(_settings))

"""Celery settings that client and worker must agree on, and why each is as it is."""

from __future__ import annotations

from typing import Any

RESULT_EXPIRES_S = 7 * 24 * 3600
"""Results are for those who wait; the ledger in SQL keeps what happened."""

_SOCKET = {"socket_timeout": 30, "socket_connect_timeout": 5, "socket_keepalive": True, "health_check_interval": 25}


def shared_options(broker_url: str, result_backend: str) -> dict[str, Any]:
    """Settings for any Celery application that talks to hostler's nodes."""
    return {
        "broker_url": broker_url,
        "result_backend": result_backend,
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": _transport_options(broker_url),
        "redis_socket_timeout": 30,
        "redis_socket_connect_timeout": 5,
        "redis_socket_keepalive": not broker_url.startswith("redis+socket"),
        "redis_backend_health_check_interval": 25,
        "accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "result_expires": RESULT_EXPIRES_S,
        # Name and arguments stand beside the result, so that a client can show and repeat a job it did not send.
        "result_extended": True,
        "enable_utc": True,
        "timezone": "UTC",
    }


def _transport_options(broker_url: str) -> dict[str, Any]:
    if broker_url.startswith("redis+socket"):
        return {name: value for name, value in _SOCKET.items() if name != "socket_keepalive"}
    return dict(_SOCKET) if broker_url.startswith("redis") else {}

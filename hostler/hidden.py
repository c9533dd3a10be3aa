"""What is shown of a job's arguments: everything but what may be secret."""

from __future__ import annotations

from typing import Any

SECRET = ("cloud_init_user_data", "cloud_init_meta_data", "cloud_init_network_config")
"""Parameters whose values are for the guest alone."""
PASSED = ("info", "accepted")
"""What one step of a live migration hands to the next: an instance may be in it."""
HIDDEN = "(hidden)"
REPR_MAX = 1024
"""As much of its arguments as Celery shows in a job's events."""


def without_secrets(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` as they may be shown; of whatever shape they are."""
    passed = {name: arguments[name] for name in PASSED if isinstance(arguments.get(name), dict)}
    arguments = arguments | {name: without_secrets(value) for name, value in passed.items()}
    instance = arguments.get("instance")
    hvparams = instance.get("hvparams") if isinstance(instance, dict) else None
    if not isinstance(instance, dict) or not isinstance(hvparams, dict):
        return arguments
    shown = hvparams | {name: HIDDEN for name in SECRET if hvparams.get(name)}
    return arguments | {"instance": instance | {"hvparams": shown}}


def shown(arguments: dict[str, Any]) -> str:
    """Likewise as the text that travels beside them in a message, for Flower and Celery's other observers."""
    from celery.utils.saferepr import saferepr

    return str(saferepr(without_secrets(arguments), REPR_MAX))

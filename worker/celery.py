"""The Celery application: ``celery -A worker worker`` finds it here. Configuration is read when it is first needed."""

from __future__ import annotations

from celery import Celery

app = Celery("hostler", set_as_current=True)
app.config_from_object("worker.celery_config")

from worker import control, signals  # noqa: E402, F401  (connects its receivers and commands)

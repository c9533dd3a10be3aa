"""The worker's own audits, at its heartbeats. They only report: a warning for each finding, a line when it is gone."""

from __future__ import annotations

import time

import structlog

from worker.operations.audit.auditing import look
from worker.operations.audit.findings import Finding
from worker.operations.context import NodeContext
from worker.operations.guests import Guests

log = structlog.get_logger(__name__)


class Patrol:
    """Audits every ``interval_s`` (0: never). What is suspicious is looked at again at the next heartbeat."""

    def __init__(self, node: NodeContext, guests: Guests, interval_s: float) -> None:
        self._node = node
        self._guests = guests
        self._interval_s = interval_s
        self._due_at = time.monotonic()
        self._before: list[Finding] = []
        self._reported: set[str] = set()

    def beat(self) -> None:
        """Audit if it is time."""
        if not self._interval_s or time.monotonic() < self._due_at:
            return
        found = look(self._node, self._guests).findings
        standing = [finding for finding in found if finding in self._before]
        self._due_at = time.monotonic() + (self._interval_s if len(standing) == len(found) else 0)
        self._before = found
        self._report(standing, {finding["id"] for finding in found})

    def _report(self, standing: list[Finding], found: set[str]) -> None:
        for finding in standing:
            if finding["id"] not in self._reported:
                log.warning("audit: " + finding["explanation"], finding=finding["id"], evidence=finding["evidence"])
                self._reported.add(finding["id"])
        for finding_id in sorted(self._reported - found):
            log.info("audit: a finding is gone", finding=finding_id)
            self._reported.discard(finding_id)

"""What is said about a live migration under way: from samples to the progress that everybody sees. Pure."""

from __future__ import annotations

import math
from typing import Any

from worker.kvm.live_migration.forecast import MIB, Forecast, forecast
from worker.kvm.live_migration.sample import COMPLETED, ENDS, POSTCOPY_ACTIVE, Sample

SMOOTHING_S = 2.0
"""Time constant of the throughput's moving average."""
_SENDING = ("active", POSTCOPY_ACTIVE)
_SURE_AFTER = 8  # samples
_HIGHEST = 99.0  # percent, before it is complete


class Progress:
    """The progress of one migration. ``downtime_ms`` is the limit QEMU has now; change it when QEMU's is changed."""

    def __init__(self, downtime_ms: float) -> None:
        self.downtime_ms = downtime_ms
        self._last: Sample | None = None
        self._throughput = 0.0
        self._percent = 0.0
        self._seen = 0
        self._pass = (0, 0)  # its number, and how much there was to send at its beginning

    def feed(self, sample: Sample) -> dict[str, Any]:
        """The meta ``live_migration`` of the contract as of ``sample``; samples come in the order of their times."""
        self._measure(sample)
        expected = self._forecast(sample)
        eta_s = expected.seconds if expected and (expected.converges or sample.status == POSTCOPY_ACTIVE) else None
        if sample.status == COMPLETED:
            eta_s = 0.0
        self._advance(sample, eta_s)
        return {
            "status": sample.status,
            "total_bytes": sample.total_bytes,
            "transferred_bytes": sample.transferred_bytes,
            "remaining_bytes": sample.remaining_bytes,
            "throughput_bytes_s": round(self._throughput),
            "dirty_rate_bytes_s": sample.dirty_rate_bytes_s,
            "pass": sample.passes,
            "expected_downtime_ms": sample.expected_downtime_ms,
            "eta_s": None if eta_s is None else round(eta_s, 1),
            "eta_confidence": 0.0 if eta_s is None else self._confidence(sample),
            "percent": self._percent,
            "verdict": self._verdict(sample, expected),
            "storage": None,
        }

    def _measure(self, sample: Sample) -> None:
        last, self._last = self._last, sample
        self._seen += 1
        if sample.passes > self._pass[0]:
            self._pass = (sample.passes, sample.remaining_bytes)
        if last and last.status in _SENDING and sample.status in _SENDING and sample.at > last.at:
            took_s = sample.at - last.at
            now = max(0, sample.transferred_bytes - last.transferred_bytes) / took_s
            weight = 1 - math.exp(-took_s / SMOOTHING_S) if self._throughput else 1.0
            self._throughput += weight * (now - self._throughput)
        elif not self._throughput:
            self._throughput = sample.mbps * 1_000_000 / 8

    def _forecast(self, sample: Sample) -> Forecast | None:
        if self._throughput < 1 or sample.status in ENDS or not sample.total_bytes:
            return None
        dirty_rate = sample.dirty_rate_bytes_s if sample.status == "active" else 0
        return forecast(sample.remaining_bytes, dirty_rate, self._throughput, self.downtime_ms)

    def _advance(self, sample: Sample, eta_s: float | None) -> None:
        if sample.status == COMPLETED:
            self._percent = 100.0
        elif eta_s is not None and (elapsed_s := sample.total_ms / 1000) > 0:
            share = math.floor(1000 * elapsed_s / (elapsed_s + eta_s)) / 10
            self._percent = max(self._percent, min(_HIGHEST, share))

    def _confidence(self, sample: Sample) -> float:
        """How much the ETA is worth: little while few samples are in, or the guest writes nearly as fast as we send."""
        if sample.status == COMPLETED:
            return 1.0
        race = sample.dirty_rate_bytes_s / self._throughput if sample.status == "active" else 0.0
        unmeasured = 0.5 if sample.status == "active" and sample.passes < 2 else 1.0
        return round(min(1.0, self._seen / _SURE_AFTER) * max(0.0, 1 - race) * unmeasured, 2)

    def _verdict(self, sample: Sample, expected: Forecast | None) -> str | None:
        if sample.status != "active" or sample.passes < 2 or expected is None or expected.converges:
            return None
        needed_ms = max(sample.expected_downtime_ms, math.ceil(self._pass[1] / self._throughput * 1000))
        return (
            f"will not converge at {_mib(self._throughput)} MiB/s: the guest writes {_mib(sample.dirty_rate_bytes_s)}"
            f" MiB/s; needs {needed_ms} ms of downtime or {_mib(sample.dirty_rate_bytes_s * 1.1)} MiB/s"
        )


def _mib(bytes_s: float) -> str:
    return f"{math.ceil(bytes_s / MIB * 10) / 10:g}"

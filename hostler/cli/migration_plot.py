"""A live migration as a picture: what was left, how fast it went, how fast the guest wrote, and what was decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click

_MISSING = "--plot draws with matplotlib, which is not installed here: pip install 'hostler[plot]'"
_MIB = 2**20


def require_plotting(file: Path) -> None:
    """Raises click.UsageError where there is no matplotlib, or no picture can be written as ``file``."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise click.UsageError(_MISSING) from None
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in kinds:
        raise click.BadParameter(
            f"{file.name!r} names no kind of picture, such as .png, .svg or .pdf", param_hint="--plot"
        )
    if not file.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {file.absolute().parent}", param_hint="--plot")


def plot(document: Mapping[str, Any], file: Path) -> None:
    """Write the picture of what ``migration.report`` returned. Raises click.UsageError: nothing to draw."""
    samples: Sequence[Mapping[str, Any]] = document.get("samples") or ()
    if not samples:
        raise click.UsageError("nothing was noted on the way of this migration: there is nothing to draw")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    left, speed = figure.subplots(2, 1, sharex=True)
    began = _seconds(samples[0]["at"])
    times = [_seconds(sample["at"]) - began for sample in samples]
    left.plot(times, _mib(samples, "remaining_bytes"), color="tab:blue", label="left to send")
    left.set_ylabel("MiB")
    speed.plot(times, _mib(samples, "throughput_bytes_s"), color="tab:green", label="sent")
    speed.plot(times, _mib(samples, "dirty_rate_bytes_s"), color="tab:red", label="written by the guest")
    speed.set_ylabel("MiB/s")
    speed.set_xlabel("seconds")
    for decision in (document.get("report") or {}).get("decisions") or ():
        at = _seconds(decision["at"]) - began
        for axes in (left, speed):
            axes.axvline(at, color="black", linestyle=":")
        left.annotate(decision["what"], (at, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right")
    for axes in (left, speed):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{document.get('name')}: {document.get('source')} to {document.get('target')}", parse_math=False)
    figure.savefig(file, dpi=120)


def _mib(samples: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [(sample.get(name) or 0) / _MIB for sample in samples]


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()

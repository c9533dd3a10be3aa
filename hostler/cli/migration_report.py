"""How a live migration went, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hostler.cli import output
from hostler.cli.amounts import duration, rate, size

_HAPPENED = {"live": "moved while it ran", "non-live": "moved while it was paused", "cold": "moved; it does not run"}


def is_report(result: object) -> bool:
    """Whether this is the result of ``instance.migrate``."""
    return isinstance(result, dict) and {"name", "source", "target", "decisions"} <= result.keys()


def show_result(report: Mapping[str, Any]) -> None:
    """The result of ``instance.migrate``: a report, or, of a dry run, a prediction."""
    if "kind" not in report and report.get("prediction"):
        _print(f"{report.get('name')}: nothing was moved. To node {report.get('target')} it would be so:", "bold")
        _rows(_predicted(report["prediction"]))
        return
    _headline(report)
    _rows(_facts(report))
    _decisions(report)


def show_stored(document: Mapping[str, Any]) -> None:
    """The result of ``migration.report``: of a migration that has ended, well or not, or is under way."""
    report = {key: document.get(key) for key in ("name", "source", "target")} | dict(document.get("report") or {})
    if failure := report.get("failure"):
        _print(f"{report['name']}, from node {report['source']} to node {report['target']}: did not move", "bold red")
        _print(f"{failure.get('code')}: {failure.get('message')}")
    elif document.get("stage") == "done":
        show_result(report)
        return
    else:
        text = f"{report['name']}, from node {report['source']} to node {report['target']}: {document.get('stage')}"
        _print(text, "bold")
    _rows(_facts(report | {"samples": len(document.get("samples") or ())}))
    _decisions(report)


def _headline(report: Mapping[str, Any]) -> None:
    how = _HAPPENED.get(str(report.get("kind")), "moved")
    where = f"it is {report.get('state')} on node {report.get('node')}"
    route = f"from node {report.get('source')} to node {report.get('target')}"
    _print(f"{report.get('name')} {how}, {route}; {where}", "bold")


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if text := _joined(
        _ms(report, "total_ms", "{} in all"),
        _ms(report, "qemu_total_ms", "QEMU's own {}"),
        _ms(report, "setup_ms", "to prepare it {}"),
    ):
        yield "time", text
    if text := _joined(
        _ms(report, "downtime_seen_ms", "{} as both nodes saw it"),
        _ms(report, "downtime_ms", "{} as QEMU says"),
        _ms(report, "downtime_limit_ms", "asked for: at most {}"),
    ):
        yield "stood still", text
    if report.get("transferred_bytes") is not None:
        sent, passes = size(report["transferred_bytes"]), report.get("passes")
        yield (
            "memory",
            _joined(
                f"{sent} sent of {size(report.get('total_bytes') or 0)}",
                f"{passes} pass{'es' if passes != 1 else ''}" if passes else "",
                rate(report["throughput_bytes_s"]) if report.get("throughput_bytes_s") else "",
            ),
        )
    if "postcopy" in report or "tls" in report:
        yes = {True: "yes", False: "no"}
        yield "post-copy", yes[bool(report.get("postcopy"))]
        yield "encrypted", yes[bool(report.get("tls"))]
    if prediction := report.get("prediction"):
        yield from _compared(prediction, report)
    if report.get("samples"):
        yield "samples", str(report["samples"])


def _predicted(prediction: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if prediction.get("dirty_rate_bytes_s") is not None:
        yield "the guest writes", rate(prediction["dirty_rate_bytes_s"])
    if prediction.get("converges") is False:
        yield "it would not end", "it writes faster than its memory can be sent: give it more bandwidth or downtime,"
        yield "", "or let it move by --auto-converge, --postcopy if-needed or --on-deadline force"
    if prediction.get("total_s") is not None:
        yield "time", f"about {duration(prediction['total_s'])}"
    if prediction.get("downtime_ms") is not None:
        yield "standing still", f"about {duration(prediction['downtime_ms'] / 1000)}"


def _compared(prediction: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if prediction.get("total_s") is not None and report.get("qemu_total_ms"):
        took_s = report["qemu_total_ms"] / 1000
        yield "predicted time", f"{duration(prediction['total_s'])}; it took {_against(took_s, prediction['total_s'])}"
    seen = report.get("downtime_seen_ms") or report.get("downtime_ms")
    if prediction.get("downtime_ms") is not None and seen is not None:
        yield "predicted standstill", f"{duration(prediction['downtime_ms'] / 1000)}; it was {duration(seen / 1000)}"


def _against(took_s: float, predicted_s: float) -> str:
    if not predicted_s:
        return duration(took_s)
    return f"{duration(took_s)} ({(took_s / predicted_s - 1) * 100:+.0f} %)"


def _decisions(report: Mapping[str, Any]) -> None:
    decisions = report.get("decisions") or ()
    if decisions:
        _print("decided on the way:", "bold")
    for decision in decisions:
        _print(f"  {_moment(decision.get('at'))}  {decision.get('what')}: {decision.get('why')}")


def _ms(report: Mapping[str, Any], name: str, text: str) -> str:
    return text.format(duration(report[name] / 1000)) if report.get(name) is not None else ""


def _moment(at: object) -> str:
    return f"{at[11:19]}Z" if isinstance(at, str) else f"{at} s"


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _rows(rows: Iterator[tuple[str, str]]) -> None:
    for title, text in rows:
        _print(f"  {title:21} {text}")


def _print(text: str, style: str = "") -> None:
    output.out().print(output.clean(text), style=style, markup=False, soft_wrap=True)

"""All that is wrong with a node, for ``node.verify``: the doctor's checks, and what only the node itself knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import select

from hostler.payloads import Nic
from hostler.settings import Settings
from models import Incarnation, Instance, utc_now
from worker.doctor.check import Check, guarded, without_passwords
from worker.doctor.checks import HOST_CHECKS, NODE_CHECKS
from worker.network import links
from worker.operations.context import JobContext, NodeContext

CLOCK_S = 5.0
"""A heartbeat from farther in the future than this is no rounding."""
NAMES_MAX = 5


def verify(node: NodeContext, job: JobContext) -> dict[str, Any]:
    """Every problem at once: ``errors`` keep the node from its work, with ``warnings`` it works with less.

    Changes nothing, but that KVM is tried anew and the worker believes the new finding. Takes seconds where KVM hangs
    or a server is silent. Raises Cancelled between two checks.
    """
    steps = _steps(node)
    found: list[Check] = []
    for number, (name, check) in enumerate(steps.items()):
        job.phase("verify", 100 * number // len(steps), f"looking at {name}")
        found.append(guarded(name, check))
    job.phase("verify", 99, "looking at bridges")
    found += bridges(node)
    shown = [without_passwords(check, node.settings) for check in found]
    return {
        "node": node.name,
        "errors": [_problem(check) for check in shown if check.status == "fail"],
        "warnings": [_problem(check) for check in shown if check.status == "warn"],
        "checked": [*steps, "bridges"],
    }


def _steps(node: NodeContext) -> dict[str, Callable[[], Check]]:
    return {
        **HOST_CHECKS,
        **{name: partial(check, node.settings) for name, check in NODE_CHECKS.items()},
        **{name: partial(folder, name, NODE_CHECKS[name], node.settings) for name in ("state_dir", "run_dir")},
        "ifup": partial(network_script, "ifup", node.ifup),
        "ifdown": partial(network_script, "ifdown", node.ifdown),
        "clock": partial(clock, node),
    }


def _problem(check: Check) -> dict[str, str]:
    return {"subject": check.name, "what": check.detail, "what_to_do": check.fix}


def folder(name: str, check: Callable[[Settings], Check], settings: Settings) -> Check:
    """As the doctor's ``check``, for which a folder may yet have to be made; a worker has made it."""
    path = getattr(settings, name)
    if path.is_dir():
        return check(settings)
    return Check(name, "fail", f"{path} is gone while the worker runs", "restart the worker, which makes it anew")


def network_script(name: str, path: Path) -> Check:
    """Whether the kernel would run it: a file, executable, its interpreter there."""
    fix = f"repair it, or correct HOSTLER_{name.upper()} and restart the worker; guests run on meanwhile"
    if not path.is_file():
        return Check(name, "fail", f"{path} is not a file: no guest with a tap starts", fix)
    if not os.access(path, os.X_OK):
        return Check(name, "fail", f"{path} may not be run: no guest with a tap starts", f"chmod 0755 {path}")
    interpreter = _interpreter(path)
    if interpreter and not os.access(interpreter, os.X_OK):
        return Check(name, "fail", f"{path} needs {interpreter}, which cannot be run", f"install {interpreter}")
    return Check(name, "ok", str(path))


def _interpreter(path: Path) -> str:
    with path.open("rb") as script:
        first = script.readline(256)
    words = first[2:].split() if first.startswith(b"#!") else []
    return os.fsdecode(words[0]) if words else ""


def clock(node: NodeContext) -> Check:
    """Whether this host's clock agrees with those of the nodes it shares the database with, and with its own past."""
    latest = select(Incarnation.node, Incarnation.heartbeat_at).order_by(Incarnation.heartbeat_at.desc()).limit(1)
    with node.database.reading() as session:
        row = session.execute(latest).first()
    ahead_s = (row.heartbeat_at - utc_now()).total_seconds() if row else 0.0
    if row is None or ahead_s <= CLOCK_S:
        return Check("clock", "ok", "no heartbeat of any node lies in the future")
    return Check(
        "clock", "warn",
        f"the last heartbeat of node {row.node} lies {ahead_s:.0f} s in the future: this host's clock is behind or was "
        "set back, or that one's is ahead",
        "have all nodes' clocks synchronised: timedatectl set-ntp true",
    )  # fmt: skip


def bridges(node: NodeContext) -> Iterator[Check]:
    """A problem for each bridge that cards of this node's instances are to be on, and cannot be."""
    if node.settings.ifup:  # a script of the site's own may know links that are none to us
        return
    with node.database.reading() as session:
        rows = session.scalars(select(Instance).where(Instance.node == node.name).order_by(Instance.name)).all()
    wanted: dict[Nic, dict[str, Instance]] = {}
    for row in rows:
        for nic in map(Nic.model_validate, row.spec.get("nics", ())):
            wanted.setdefault(nic.model_copy(update={"mac": "", "ip": ""}), {})[row.name] = row
    for nic, instances in sorted(wanted.items(), key=lambda item: item[0].link):
        if problem := links.problem(nic):
            yield _unconnected(nic, problem[1], [*instances.values()])


def _unconnected(nic: Nic, reason: str, instances: list[Instance]) -> Check:
    needed = any(row.runtime or row.wanted == "running" for row in instances)
    names = ", ".join(row.name for row in instances[:NAMES_MAX])
    more = f" and {len(instances) - NAMES_MAX} more" if len(instances) > NAMES_MAX else ""
    by_hand = "" if nic.mode != "bridged" else (
        f"; a bridge by hand: ip link add {nic.link} type bridge && ip link set {nic.link} up"
    )  # fmt: skip
    return Check(
        f"bridge {nic.link}", "fail" if needed else "warn", f"{reason}, for cards of {names}{more}",
        f"repair the host's network configuration{by_hand}",
    )  # fmt: skip

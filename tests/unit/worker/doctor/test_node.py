"""node.verify: what only the node itself knows, and that no problem hides another."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hostler.payloads import Instance as InstancePayload
from hostler.settings import Settings
from migrations import schema
from models import Database, Incarnation, Instance, Node, utc_now
from worker.doctor import node as node_doctor
from worker.doctor.check import Check
from worker.errors import Cancelled
from worker.network import links
from worker.operations.context import JobContext, NodeContext


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeContext]:
    """A node on a host without network interfaces, whose doctor finds nothing."""
    database = Database(f"sqlite+pysqlite:///{tmp_path / 'hostler.sqlite'}")
    schema.upgrade(database)
    with database.transaction() as session:
        session.add(Node(name="n1"))
    monkeypatch.setattr(links, "INTERFACES", tmp_path / "net")
    monkeypatch.setattr(node_doctor, "HOST_CHECKS", {"python": lambda: Check("python", "ok", "")})
    monkeypatch.setattr(
        node_doctor, "NODE_CHECKS", {name: lambda _: Check("", "ok", "") for name in ("state_dir", "run_dir")}
    )
    settings = Settings(node="n1", ifup="", ifdown="").model_copy(update={"state_dir": tmp_path, "run_dir": tmp_path})
    yield NodeContext(settings, database, "unused", None)  # type: ignore[arg-type]
    database.dispose()


def verify(node: NodeContext) -> dict[str, Any]:
    """The result, whatever the job records."""
    job: Any = SimpleNamespace(phase=lambda *_: None)
    return node_doctor.verify(node, job)


def add(node: NodeContext, name: str, *nics: dict[str, Any], wanted: str = "running") -> None:
    cards = [{"mac": f"52:54:00:00:{hash(name) % 256:02x}:{at:02x}"} | nic for at, nic in enumerate(nics)]
    spec = InstancePayload.model_validate({"name": name, "memory_mib": 16, "nics": cards}).model_dump(mode="json")
    with node.database.transaction() as session:
        session.add(Instance(name=name, node="n1", state="stopped", spec=spec, wanted=wanted))


def test_a_node_in_order_has_no_problem(node: NodeContext, tmp_path: Path) -> None:
    (tmp_path / "net/br0/bridge").mkdir(parents=True)
    add(node, "web1", {"link": "br0"}, {"mode": "user"})
    found = verify(node)
    assert (found["node"], found["errors"], found["warnings"]) == ("n1", [], [])
    assert {"python", "ifup", "ifdown", "clock", "bridges"} <= {*found["checked"]}


def test_every_problem_is_told_at_once_each_with_what_to_do(
    node: NodeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Check:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(node_doctor, "HOST_CHECKS", {
        "luck": broken, "tun": lambda: Check("tun", "warn", "not there", "modprobe tun"),
    })  # fmt: skip
    monkeypatch.setitem(node_doctor.NODE_CHECKS, "qemu", lambda _: Check("qemu", "fail", "missing", "install it"))
    gone = {"ifup": str(tmp_path / "ifup"), "run_dir": tmp_path / "gone"}
    node.settings = node.settings.model_copy(update=gone)
    found = verify(node)
    assert [error["subject"] for error in found["errors"]] == ["luck", "run_dir", "qemu", "ifup"]
    assert found["warnings"] == [{"subject": "tun", "what": "not there", "what_to_do": "modprobe tun"}]
    assert "out of luck" in found["errors"][0]["what"]
    assert all(error["what_to_do"] for error in found["errors"][1:])


def test_no_problem_shows_a_password(node: NodeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    node.settings = node.settings.model_copy(update={"broker_url": "redis://:geheim@h/0"})
    monkeypatch.setitem(node_doctor.NODE_CHECKS, "broker", lambda given: Check("broker", "fail", given.broker_url))
    assert "geheim" not in str(verify(node))


def test_a_verification_that_is_cancelled_ends_between_two_checks(node: NodeContext) -> None:
    job = JobContext("unused", None, node, lambda meta: None)
    job.cancel()
    with pytest.raises(Cancelled):
        node_doctor.verify(node, job)


def test_a_missing_bridge_is_an_error_where_a_guest_is_wanted_and_names_who_needs_it(node: NodeContext) -> None:
    add(node, "web1", {"link": "br0"}, {"link": "br0"}, {"link": "br1"}, wanted="stopped")
    add(node, "web2", {"link": "br0"})
    found = verify(node)
    (error,), (warning,) = found["errors"], found["warnings"]
    assert error["subject"] == "bridge br0" and error["what"].endswith("web1, web2")
    assert "ip link add br0 type bridge" in error["what_to_do"]
    assert warning["subject"] == "bridge br1" and warning["what"].endswith("web1")


def test_many_instances_on_one_missing_bridge_are_counted(node: NodeContext) -> None:
    for number in range(8):
        add(node, f"web{number}", {"link": "br0"})
    assert verify(node)["errors"][0]["what"].endswith("web4 and 3 more")


def test_links_of_a_sites_own_script_are_its_own_affair(node: NodeContext, tmp_path: Path) -> None:
    add(node, "web1", {"link": "br0"})
    script = tmp_path / "ifup"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    node.settings = node.settings.model_copy(update={"ifup": str(script)})
    assert verify(node)["errors"] == []


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0, "not a file"),
        ("#!/bin/sh\n", 0o644, "may not be run"),
        ("#!/no/such/shell -e\n", 0o755, "/no/such/shell"),
        ("#! /bin/sh -e\n", 0o755, ""),
        ("\x7fELF", 0o755, ""),
        ("#!\n", 0o755, ""),
    ],
)
def test_a_network_script_has_to_be_one_that_the_kernel_runs(
    content: str | None, mode: int, said: str, tmp_path: Path
) -> None:
    script = tmp_path / "ifup"
    if content is not None:
        script.write_text(content)
        script.chmod(mode)
    found = node_doctor.network_script("ifup", script)
    assert found.status == ("fail" if said else "ok")
    assert said in found.detail and bool(found.fix) == bool(said)


def test_a_heartbeat_from_the_future_is_a_warning_about_the_clocks(node: NodeContext) -> None:
    def beat(name: str, ahead_s: float) -> None:
        with node.database.transaction() as session:
            session.add(Incarnation(id=name, node="n1", pid=1, start_ticks=1, boot_id="b", version="0",
                                    heartbeat_at=utc_now() + timedelta(seconds=ahead_s)))  # fmt: skip

    beat("past", -3600)
    assert node_doctor.clock(node).status == "ok"
    beat("future", 600)
    found = node_doctor.clock(node)
    assert found.status == "warn" and "node n1" in found.detail
    assert 590 < int(found.detail.split(" lies ")[1].split(" s ")[0]) <= 600

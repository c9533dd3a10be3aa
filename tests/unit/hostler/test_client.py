"""Building jobs: arguments are checked and named before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hostler import Client, Instance, InvalidArgument, JobRequest
from hostler.contract import TaskName
from hostler.payloads import ARGUMENTS
from hostler.settings import SettingsError

WEB1 = {"name": "web1", "memory_mib": 64}
MAC = "52:54:00:12:34:56"


@pytest.fixture
def client() -> Client:
    """A client of a broker that does not exist: whatever were sent would fail."""
    return Client("redis://127.0.0.1:1/0")


def test_every_task_of_the_contract_has_a_method(client: Client) -> None:
    name, spec = {"name": "web1"}, {"instance": WEB1}
    requests = [
        client.start.job("n1", **spec), client.check.job("n1", **spec), client.stop.job("n1", **name),
        client.reboot.job("n1", **name), client.restart.job("n1", **name), client.pause.job("n1", **name),
        client.resume.job("n1", **name), client.prune.job("n1"),
        client.disk_add.job("n1", **name, disk={"path": "/d"}), client.disk_remove.job("n1", **name, path="/d"),
        client.disk_resize.job("n1", **name, path="/d", size_mib=9), client.nic_remove.job("n1", **name, mac=MAC),
        client.nic_add.job("n1", **name, nic={"mac": MAC, "mode": "user"}),
        client.cd_insert.job("n1", **name, path="/d"), client.cd_eject.job("n1", **name),
        client.set_memory.job("n1", **name, memory_mib=9),
        client.set_password.job("n1", **name, kind="vnc", password_file="/d"),
        client.backup.job("n1", **name, target_dir="/d"), client.snapshot_list.job("n1", **name),
        client.snapshot_create.job("n1", **name, snapshot="s"), client.snapshot_revert.job("n1", "web1", "s"),
        client.snapshot_delete.job("n1", "web1", "s"),
        client.cleanup.job("n1", **name), client.info.job("n1", **name), client.console.job("n1", **name),
        client.list.job("n1"), client.node_info.job("n1"), client.audit.job("n1"), client.repair.job("n1"),
        client.node_list.job("n1"), client.jobs.job("n1"), client.job_info.job("n1", id="x"),
        client.job_cancel.job("n1", id="x"), client.job_retry.job("n1", id="x"), client.job_why.job("n1", id="x"),
        client.drain.job("n1", auto=True), client.undrain.job("n1"),
        client.hold.job("n1"), client.unhold.job("n1"), client.fence.job("n1", "n2", "it is off"),
        client.unfence.job("n1", "n2"),
        client.verify.job("n1"), client.powercycle.job("n1", confirm="n1"),
        client.uid_pool_show.job("n1"), client.uid_pool_add.job("n1", "20000"), client.uid_pool_remove.job("n1", "7"),
        client.migrate.job("n1", "web1", "n2"), client.migrate_cancel.job("n1", "web1"),
        client.migrate_tune.job("n1", "web1", downtime_ms=9), client.migration_report.job("n1", "x"),
        client.migration_info.job("n1", "web1", "n2"), client.migration_accept.job("n1", {"migration_id": "x"}),
        client.migration_run.job("n1", "web1", {"migration_id": "x"}), client.migration_finalize.job("n1", "x"),
        client.migration_recover.job("n1", "x"),
        client.quarantine_list.job("n1"), client.quarantine_release.job("n1", ["x.tar"]),
    ]  # fmt: skip
    assert {request.task for request in requests} == set(ARGUMENTS)
    assert {request.node for request in requests} == {"n1"}


def test_what_is_left_at_its_default_is_not_sent(client: Client) -> None:
    assert client.stop.job("n1", "web1").arguments == {"name": "web1"}
    assert client.stop.job("n1", "web1", force=False, timeout_s=120.0).arguments == {"name": "web1"}
    assert client.start.job("n1", WEB1).arguments == {"instance": WEB1}
    assert client.start.job("n1", Instance(name="web1", memory_mib=64)).arguments == {"instance": WEB1}
    assert client.jobs.job("n1").arguments == {}


def test_what_differs_from_the_default_is_sent_as_json(client: Client) -> None:
    request = client.stop.job("n1", name="web1", force=True, timeout_s=5, on_timeout="fail", job_id="mine")
    arguments = {"name": "web1", "force": True, "timeout_s": 5, "on_timeout": "fail"}
    assert request == JobRequest(TaskName.INSTANCE_STOP, "n1", arguments, "mine")
    assert client.jobs.job("n1", states=("FAILURE",)).arguments == {"states": ["FAILURE"]}


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda client: client.info("n1", "../etc"), "name"),
        (lambda client: client.info("n1", None), "name"),
        (lambda client: client.stop("n1", "web1", force=1), "force"),
        (lambda client: client.stop("n1", "web1", timeout_s=-1), "timeout_s"),
        (lambda client: client.stop("n1", "web1", on_timeout="perhaps"), "on_timeout"),
        (lambda client: client.reboot("n1", "web1", mode="warm"), "mode"),
        (lambda client: client.start("n1", "web1"), "instance"),
        (lambda client: client.start("n1", {"name": "web1", "memory_mib": "64"}), "instance.memory_mib"),
        (lambda client: client.start("n1", {**WEB1, "memroy": 1}), "instance.memroy"),
        (lambda client: client.start("n1", {**WEB1, "disks": [{"path": "relative"}]}), "instance.disks[0].path"),
        (lambda client: client.info("no such/node", "web1"), "node"),
        (lambda client: client.info("", "web1"), "node"),
        (lambda client: client.info(None, "web1"), "node"),
        (lambda client: client.ping("a b"), "node"),
        (lambda client: client.info("n1", "web1", job_id=""), "job_id"),
        (lambda client: client.info("n1", "web1", job_id="two\nlines"), "job_id"),
        (lambda client: client.job(""), "id"),
        (lambda client: client.migrate("n1", "web1", "n 2"), "target"),
        (lambda client: client.migrate("n1", "web1", "n2", downtime_ms=0), "downtime_ms"),
        (lambda client: client.migrate("n1", "web1", "n2", bandwith=5), "bandwith"),
        (lambda client: client.migrate_tune("n1", "web1"), "arguments"),
        (lambda client: client.migrate_tune("n1", "web1", postcopy_now=False), "arguments"),
        (lambda client: client.migration_accept("n1", {}), "info"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_sent(
    client: Client, build: Callable[[Any], object], field: str
) -> None:
    with pytest.raises(InvalidArgument) as wrong:
        build(client)
    assert [error["field"] for error in wrong.value.details["errors"]] == [field]


def test_a_misspelt_argument_is_a_type_error_as_in_any_call(client: Client) -> None:
    with pytest.raises(TypeError, match="forse"):
        client.stop.job("n1", "web1", forse=True)  # type: ignore[call-arg]


def test_a_method_tells_what_it_does(client: Client) -> None:
    assert "ACPI" in (client.stop.__doc__ or "")


@pytest.mark.parametrize("url", ["redis://user:geh/eim@host/0", "redis://user:geh?eim@host/0", "pigeon://:eim@host"])
def test_a_url_that_cannot_be_read_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(SettingsError) as wrong:
        Client(url)
    assert "eim" not in str(wrong.value)

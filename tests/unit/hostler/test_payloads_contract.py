"""The contract in its own words, written down here a second time: whoever changes a name there has to do it twice.

Then what is refused, with the exact name of the field that is wrong.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from hostler import payloads
from hostler.contract import (
    FINAL_JOB_STATES,
    NODE_PATTERN,
    ErrorCode,
    InstanceState,
    JobState,
    TaskName,
    queue_name,
    worker_name,
)
from hostler.errors import InvalidArgument, OperationFailed
from hostler.hvparams import HvParams
from hostler.payloads import ARGUMENTS, EXCLUSIVE_TASKS, Instance, InstanceView, instance_of, parse

WEB1: dict[str, Any] = {"name": "web1", "memory_mib": 64}
NIC: dict[str, Any] = {"mac": "52:54:00:12:34:56", "mode": "user"}
DISK: dict[str, Any] = {"path": "/disk"}

REQUIRED = ...
TASKS: dict[str, dict[str, Any]] = {
    "instance.start": {"instance": REQUIRED, "paused": False},
    "instance.stop": {"name": REQUIRED, "force": False, "timeout_s": 120, "on_timeout": "force"},
    "instance.reboot": {"name": REQUIRED, "mode": "soft", "timeout_s": 120},
    "instance.pause": {"name": REQUIRED},
    "instance.resume": {"name": REQUIRED},
    "instance.cleanup": {"name": REQUIRED},
    "instance.info": {"name": REQUIRED},
    "instance.list": {},
    "instance.console": {"name": REQUIRED},
    "instance.check": {"instance": REQUIRED},
    "node.info": {},
}
EXAMPLES: dict[str, Any] = {"instance": WEB1, "name": "web1"}


def arguments_of(task: str) -> dict[str, Any]:
    """The fewest arguments the task takes."""
    return {name: EXAMPLES[name] for name, default in TASKS[task].items() if default is REQUIRED}


def refused(model: Any, arguments: object) -> dict[str, str]:
    """Field and reason of everything that is wrong."""
    with pytest.raises(InvalidArgument) as error:
        parse(model, arguments)
    assert error.value.code == "INVALID_ARGUMENT"
    assert error.value.retryable is False
    errors = error.value.details["errors"]
    json.dumps(error.value.args)
    assert error.value.message == "; ".join(f"{each['field']}: {each['reason']}" for each in errors)
    return {each["field"]: each["reason"] for each in errors}


def instance(**more: Any) -> dict[str, Any]:
    return WEB1 | more


def with_hv(**hvparams: Any) -> dict[str, Any]:
    return WEB1 | {"hvparams": hvparams}


def test_every_task_of_the_contract_has_its_name() -> None:
    assert {str(name) for name in TaskName} >= {*TASKS}
    assert set(ARGUMENTS) == set(TaskName)


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_arguments_have_the_contracts_names_and_defaults(task: str) -> None:
    parsed = parse(ARGUMENTS[TaskName(task)], arguments_of(task))
    defaults = {name: default for name, default in TASKS[task].items() if default is not REQUIRED}
    assert {name: getattr(parsed, name) for name in defaults} == defaults


@pytest.mark.parametrize("task", TASKS)
def test_what_a_task_needs_is_missed_by_name_and_what_it_does_not_know_is_refused(task: str) -> None:
    needed = arguments_of(task)
    for name in needed:
        assert refused(ARGUMENTS[TaskName(task)], {})[name] == "is missing"
    assert refused(ARGUMENTS[TaskName(task)], needed | {"forse": True}) == {"forse": "is not supported"}


def test_the_states_of_a_job_are_the_contracts() -> None:
    assert {str(state) for state in JobState} == {
        *("PENDING", "WAITING", "STARTED", "PROGRESS", "RETRY", "SUCCESS", "FAILURE", "REVOKED")
    }
    assert {str(state) for state in FINAL_JOB_STATES} == {"SUCCESS", "FAILURE", "REVOKED"}


def test_the_states_of_an_instance_are_the_contracts() -> None:
    assert {str(state) for state in InstanceState} == {
        *("stopped", "starting", "running", "paused", "stopping", "crashed", "incoming", "migrating", "unknown")
    }


def test_the_codes_of_failures_are_the_contracts() -> None:
    assert [str(code) for code in ErrorCode] == [
        *("INVALID_ARGUMENT", "UNKNOWN_INSTANCE", "ALREADY_RUNNING", "NOT_RUNNING", "INSTANCE_BUSY"),
        *("UID_POOL_EXHAUSTED", "NETWORK_FAILED", "QEMU_FAILED", "QMP_LOST", "MIGRATION_FAILED", "TIMED_OUT"),
        *("CANCELLED", "UNSUPPORTED", "NODE_UNAVAILABLE", "INTERNAL"),
    ]


def test_a_view_has_the_contracts_fields() -> None:
    assert {"name", "node", "state", "pid", "memory_mib", "vcpus", "uid", "nics", "started_at", "qemu_version"} <= {
        *InstanceView.__annotations__
    }
    assert "how" in InstanceView.__annotations__


def test_an_instance_has_the_contracts_fields_and_defaults() -> None:
    whole = parse(Instance, WEB1 | {"disks": [DISK], "nics": [NIC]}).model_dump()
    hvparams = whole.pop("hvparams")
    assert whole == {
        "name": "web1",
        "memory_mib": 64,
        "vcpus": 1,
        "disks": [{"path": "/disk", "mode": "rw", "shared": False, "format": "raw"}],
        "nics": [{"mac": "52:54:00:12:34:56", "mode": "user", "link": "", "ip": ""}],
        "tags": [],
        "network_port": None,
    }
    assert hvparams == HvParams().model_dump()


def test_the_parameters_keep_ganetis_names_and_their_defaults() -> None:
    assert (
        HvParams().model_dump().items()
        >= {
            **{"initrd_path": "", "root_path": "/dev/vda1", "kernel_args": "ro", "acpi": True, "serial_console": True},
            **{"boot_order": "disk", "cdrom_image_path": "", "nic_type": "paravirtual", "disk_type": "paravirtual"},
            **{"disk_cache": "default", "kvm_flag": "", "use_localtime": False},
        }.items()
    )


def test_queues_and_workers_are_named_after_their_node() -> None:
    assert queue_name("n1.example_site-2") == "node.n1.example_site-2"
    assert worker_name("n1") == "hostler@n1"
    for bad in ("", "n 1", "n/1", "n" * 64, "nö", "n1\n"):
        assert not NODE_PATTERN.fullmatch(bad)
        with pytest.raises(ValueError, match="node: "):
            queue_name(bad)


def test_a_failure_is_json_in_the_order_code_message_details_and_says_whether_to_try_again() -> None:
    failure = OperationFailed(ErrorCode.QMP_LOST, "silent", {"state": "unknown"})
    assert json.loads(json.dumps(failure.args)) == ["QMP_LOST", "silent", {"retryable": False, "state": "unknown"}]
    assert str(failure) == "QMP_LOST: silent"
    assert OperationFailed("X", "y", {"retryable": True}).retryable is True
    assert OperationFailed(*failure.args).details == failure.details


def test_jobs_that_change_an_instance_are_the_ones_that_wait_for_each_other() -> None:
    changing = {"instance.start", "instance.stop", "instance.reboot", "instance.pause", "instance.resume"}
    assert {str(name) for name in EXCLUSIVE_TASKS} >= changing | {"instance.cleanup"}
    assert not {str(name) for name in EXCLUSIVE_TASKS} & {"instance.info", "instance.list", "instance.check"}


BAD_NAMES = [
    *("", ".", "..", "a/b", "../x", "/", "a b", " web1", "web1 ", "-web", ".web", "web.", "a..b", "web1\n", "web\0"),
    *("wéb1", "web1\u0301", "w\u0435b1", "a:b", "a,b", "a=b", "a'b", "$(x)", "n" * 256, "n" * 300, "\ud800"),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_none_is_refused_wherever_it_stands(name: str) -> None:
    assert set(refused(payloads.NameArguments, {"name": name})) == {"name"}
    assert set(refused(payloads.StartArguments, {"instance": instance(name=name)})) == {"instance.name"}
    assert instance_of({"name": name}) is None
    assert instance_of({"instance": {"name": name}}) is None


@pytest.mark.parametrize("name", ["a", "web1", "WEB_1", "db-1.example.org", "1.2.3.4", "a-", "_x", "n" * 255])
def test_a_dns_style_name_is_taken(name: str) -> None:
    assert parse(Instance, instance(name=name)).name == name
    assert instance_of({"name": name}) == instance_of({"instance": {"name": name}}) == name


BAD_INSTANCES: list[tuple[dict[str, Any], str]] = [
    *((instance(name=value), "name") for value in (None, 5, ["web1"], {}, True)),
    *((instance(memory_mib=value), "memory_mib") for value in (0, -1, "64", 1.5, True, None, 2**24 + 1, 10**30, [])),
    *((instance(vcpus=value), "vcpus") for value in (0, -1, "1", 1.5, True, None, 4097, 10**30)),
    *((instance(disks=value), "disks") for value in (None, "/disk", {}, 5)),
    (instance(disks=[{"path": f"/d{number}"} for number in range(25)]), "disks"),
    (instance(disks=[DISK, DISK]), "disks"),
    *((instance(disks=[value]), "disks[0]") for value in (None, "/disk", 5, [])),
    (instance(disks=[{}]), "disks[0].path"),
    *(
        (instance(disks=[DISK, {"path": value}]), "disks[1].path")
        for value in (
            *("", "disk", "./disk", "/a/../b", "/a//b", "//a", "/a/", "/a/.", "/a\nb", "/a\0b", "/a\x7fb", "/\ud800"),
            *("/" + "d" * 4095, None, 5),
        )
    ),
    *((instance(disks=[DISK | {"mode": value}]), "disks[0].mode") for value in ("", "RW", "w", None, True)),
    *((instance(disks=[DISK | {"shared": value}]), "disks[0].shared") for value in ("yes", 1, None)),
    *((instance(disks=[DISK | {"format": value}]), "disks[0].format") for value in ("", "vmdk", "RAW", None)),
    (instance(disks=[DISK | {"size": 1}]), "disks[0].size"),
    *((instance(nics=value), "nics") for value in (None, {}, "user")),
    (instance(nics=[NIC | {"mac": f"52:54:00:00:00:{number:02x}"} for number in range(9)]), "nics"),
    (instance(nics=[NIC, NIC | {"mac": NIC["mac"].upper()}]), "nics"),
    (instance(nics=[{"mode": "user"}]), "nics[0].mac"),
    *(
        (instance(nics=[NIC | {"mac": value}]), "nics[0].mac")
        for value in ("", "52:54:00:12:34", "52-54-00-12-34-56", "01:00:5e:00:00:01", "gg:54:00:12:34:56", None, 5)
    ),
    *((instance(nics=[NIC | {"mode": value}]), "nics[0].mode") for value in ("", "bridge", None)),
    (instance(nics=[NIC | {"mode": "bridged"}]), "nics[0].link"),
    *((instance(nics=[NIC | {"link": value}]), "nics[0].link") for value in ("b" * 16, "br 0", "br/0", "br0\n", None)),
    *((instance(nics=[NIC | {"ip": value}]), "nics[0].ip") for value in ("192.0.2", "192.0.2.1/24", "host", None)),
    (instance(nics=[NIC | {"vlan": 1}]), "nics[0].vlan"),
    *((instance(tags=value), "tags") for value in (None, "a", ["a b"], [""], ["t" * 129], ["ü"], ["a\n"])),
    (instance(tags=["a", 5]), "tags[1]"),
    *((instance(network_port=value), "network_port") for value in (0, -1, 65536, "5900", 5900.0, True)),
    *((instance(hvparams=value), "hvparams") for value in (None, [], "acpi")),
    (instance(cpus=1), "cpus"),
]
BAD_HVPARAMS: list[tuple[dict[str, Any], str]] = [
    *(({name: "relative"}, name) for name in ("kernel_path", "initrd_path", "cdrom_image_path")),
    *(({name: "/a/../b"}, name) for name in ("kernel_path", "initrd_path", "cdrom_image_path")),
    *(({name: "two\nlines"}, name) for name in ("kernel_path", "initrd_path", "root_path", "kernel_args")),
    *(({name: None}, name) for name in HvParams.model_fields),
    *(({name: 1}, name) for name in HvParams.model_fields),
    *(({name: "yes"}, name) for name in ("acpi", "serial_console", "use_localtime")),
    *(({"boot_order": value}, "boot_order") for value in ("", "floppy", "Disk", "c")),
    *(({"disk_type": value}, "disk_type") for value in ("", "virtio", "sd", "pflash")),
    *(({"nic_type": value}, "nic_type") for value in ("", "virtio", "e1000e")),
    *(({"disk_cache": value}, "disk_cache") for value in ("", "unsafe", "directsync")),
    *(({"kvm_flag": value}, "kvm_flag") for value in ("on", "Enabled")),
    *(({name: "pc,accel=kvm"}, name) for name in ("machine_version", "cpu_type")),
    *(({name: "x" * 129}, name) for name in ("machine_version", "cpu_type")),
    ({"kernel_path": "/vmlinuz", "root_path": ""}, "root_path"),
    ({"boot_order": "cdrom"}, "cdrom_image_path"),
    ({"acpy": True}, "acpy"),
]


@pytest.mark.parametrize(("bad", "field"), BAD_INSTANCES)
def test_a_bad_instance_is_refused_and_the_field_named(bad: dict[str, Any], field: str) -> None:
    assert set(refused(payloads.StartArguments, {"instance": bad})) == {f"instance.{field}"}
    assert set(refused(payloads.InstanceArguments, {"instance": bad})) == {f"instance.{field}"}


@pytest.mark.parametrize(("bad", "field"), BAD_HVPARAMS)
def test_a_bad_parameter_is_refused_and_named(bad: dict[str, Any], field: str) -> None:
    assert set(refused(payloads.StartArguments, {"instance": with_hv(**bad)})) == {f"instance.hvparams.{field}"}


@pytest.mark.parametrize(
    ("task", "arguments", "field"),
    [
        *(("instance.start", {"instance": value}, "instance") for value in (None, "web1", 5, [], True)),
        *(("instance.start", {"instance": WEB1, "paused": value}, "paused") for value in ("yes", 1, None)),
        *(("instance.stop", {"name": "web1", "force": value}, "force") for value in ("yes", 1, None)),
        *(
            ("instance.stop", {"name": "web1", "timeout_s": value}, "timeout_s")
            for value in (0, -1, "5", None, True, float("nan"), float("inf"), 86_401)
        ),
        *(("instance.stop", {"name": "web1", "on_timeout": value}, "on_timeout") for value in ("", "kill", None)),
        *(("instance.reboot", {"name": "web1", "mode": value}, "mode") for value in ("", "warm", "SOFT", None)),
        ("instance.reboot", {"name": "web1", "force": True}, "force"),
        *(("instance.info", {"name": value}, "name") for value in (None, 5, {}, [])),
        ("instance.list", {"name": "web1"}, "name"),
        *(("job.list", {"limit": value}, "limit") for value in (0, 1001, "5", None)),
        *(("job.list", {"instance": value}, "instance") for value in ("", "a/b", 5)),
        ("job.list", {"states": "SUCCESS"}, "states"),
        *(("job.info", {"id": value}, "id") for value in ("", "x" * 256, "a\nb", None, 5)),
    ],
)
def test_a_bad_argument_is_refused_and_named(task: str, arguments: dict[str, Any], field: str) -> None:
    assert set(refused(ARGUMENTS[TaskName(task)], arguments)) == {field}


@pytest.mark.parametrize("arguments", [None, [], "web1", 5, [["name", "web1"]]])
def test_arguments_that_are_no_object_are_refused(arguments: object) -> None:
    assert set(refused(payloads.NameArguments, arguments)) == {"arguments"}


def test_all_that_is_wrong_is_said_at_once_and_where() -> None:
    bad = {"name": "a b", "disks": [DISK, {"path": "x", "mode": "r"}], "hvparams": {"acpi": "on", "nick": 1}}
    assert refused(payloads.StartArguments, {"instance": bad, "pauzed": True}) == {
        "instance.name": "'a b' is not an instance name: labels of letters, digits, '-' and '_', joined by '.', "
        "no leading '-'",
        "instance.memory_mib": "is missing",
        "instance.disks[1].path": "must be an absolute, normalised path (no '..', no '//', no final '/'), not 'x'",
        "instance.disks[1].mode": "input should be 'rw' or 'ro' (got 'r')",
        "instance.hvparams.acpi": "input should be a valid boolean (got 'on')",
        "instance.hvparams.nick": "is not supported",
        "pauzed": "is not supported",
    }


def test_the_cross_checks_say_what_ganeti_said() -> None:
    assert refused(HvParams, {"kernel_path": "/k", "root_path": ""}) == {
        "root_path": "Need a root partition for the instance, if a kernel is defined"
    }
    assert refused(HvParams, {"boot_order": "cdrom"}) == {
        "cdrom_image_path": "Cannot boot from cdrom without an ISO path"
    }
    assert refused(Instance, instance(name="n" * 300)) == {"name": "is 300 characters long; at most 255 are allowed"}


@pytest.mark.parametrize("key", ["\0", "a\nb", "\ud800", "k" * 100_000, "", "a.b", "ключ"])
def test_an_unknown_key_of_any_kind_makes_an_error_that_can_be_shown_and_kept(key: str) -> None:
    (field,) = refused(payloads.StartArguments, {"instance": instance(**{key: 1})})
    assert field.startswith("instance")
    assert field.isprintable()
    assert len(field) < 200
    field.encode()


def test_a_long_value_is_not_repeated_in_the_error() -> None:
    reasons = refused(Instance, instance(memory_mib="9" * 10_000, disks=[{"path": "/d", "mode": "w" * 10_000}]))
    assert all(len(reason) < 200 for reason in reasons.values())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"name": "web1"}, "web1"),
        ({"instance": {"name": "web1"}}, "web1"),
        ({"instance": {"name": "web1", "memory_mib": "nonsense"}}, "web1"),
        ({"instance": "web1"}, "web1"),
        ({"instance": {"name": "web1"}, "name": "web2"}, "web1"),
        ({"instance": {}, "name": "web2"}, None),
        ({}, None),
        ({"name": None}, None),
        ({"name": 5}, None),
        ({"name": ["web1"]}, None),
        ({"instance": []}, None),
        ({"instance": None}, None),
        ({"instance": {"name": {}}}, None),
    ],
)
def test_the_instance_of_a_jobs_raw_arguments_is_the_one_it_is_about(
    arguments: dict[str, Any], name: str | None
) -> None:
    assert instance_of(arguments) == name


def test_what_was_parsed_cannot_be_changed_afterwards() -> None:
    parsed = parse(Instance, WEB1)
    with pytest.raises(ValueError, match="frozen"):
        parsed.memory_mib = 5  # type: ignore[misc]


def test_a_mac_is_kept_in_lower_case_and_an_ip_in_its_shortest_form() -> None:
    parsed = parse(Instance, instance(nics=[NIC | {"mac": "52:54:00:AB:CD:EF", "ip": "2001:DB8:0::7"}]))
    assert (parsed.nics[0].mac, parsed.nics[0].ip) == ("52:54:00:ab:cd:ef", "2001:db8::7")

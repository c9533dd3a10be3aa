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
    "instance.console": {"name": REQUIRED, "kind": None},
    "instance.check": {"instance": REQUIRED},
    "instance.migrate": {"name": REQUIRED, "target": REQUIRED, "live": True},
    "instance.migrate_cancel": {"name": REQUIRED},
    "migration.info": {"name": REQUIRED, "target": REQUIRED, "live": True},
    "migration.accept": {"info": REQUIRED},
    "migration.run": {"name": REQUIRED, "accepted": REQUIRED},
    "migration.finalize": {"migration_id": REQUIRED, "success": True},
    "node.info": {},
    "node.verify": {},
    "node.powercycle": {"confirm": REQUIRED},
}
EXAMPLES: dict[str, Any] = {
    **{"instance": WEB1, "name": "web1", "confirm": "n1", "target": "n2", "migration_id": "j1"},
    **{name: {"migration_id": "j1"} for name in ("info", "accepted")},
}


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
        "nics": [{"mac": "52:54:00:12:34:56", "mode": "user", "link": "", "ip": "", "vlan": 0}],
        "tags": [],
        "network_port": None,
        **{"autostart": False, "restart_policy": "never", "restart_max": 5, "restart_delay_s": 5},
        "placement": None,
    }
    assert hvparams == HvParams().model_dump()


GANETI_DEFAULTS: dict[str, Any] = {
    **{"initrd_path": "", "root_path": "/dev/vda1", "kernel_args": "ro", "acpi": True, "serial_console": True},
    **{"vnc_bind_address": "", "vnc_tls": False, "vnc_x509_path": "", "vnc_x509_verify": False},
    **{"vnc_password_file": "", "floppy_image_path": "", "cdrom_image_path": "", "cdrom2_image_path": ""},
    **{"boot_order": "disk", "nic_type": "paravirtual", "disk_type": "paravirtual", "cdrom_disk_type": ""},
    **{"usb_mouse": "", "migration_mode": "live", "use_localtime": False, "disk_cache": "default"},
    **{"security_model": "none", "security_domain": "", "kvm_flag": "", "vhost_net": False, "use_chroot": False},
    "mem_path": "",
}
CHANGED_DEFAULTS = {"kernel_path": "", "migration_port": 0, "migration_bandwidth": 1024, "migration_downtime": 300}


def test_the_31_parameters_keep_ganetis_names_and_their_defaults_but_four_that_make_no_sense_today() -> None:
    assert len(GANETI_DEFAULTS | CHANGED_DEFAULTS) == 31
    assert HvParams().model_dump().items() >= (GANETI_DEFAULTS | CHANGED_DEFAULTS).items()
    for name in CHANGED_DEFAULTS:
        assert "(was " in str(HvParams.model_fields[name].description), name


GANETI_CHOICES: dict[str, set[str]] = {
    "boot_order": {"floppy", "cdrom", "disk", "network"},
    "nic_type": {
        *["rtl8139", "ne2k_pci", "ne2k_isa", "i82551", "i82557b", "i82559er", "pcnet", "e1000", "paravirtual"]
    },
    "disk_type": {"paravirtual", "ide", "scsi", "sd", "mtd", "pflash"},
    "cdrom_disk_type": {"", "paravirtual", "ide", "scsi", "sd", "mtd", "pflash"},
    "usb_mouse": {"", "mouse", "tablet"},
    "migration_mode": {"live", "non-live"},
    "disk_cache": {"default", "none", "writethrough", "writeback"},
    "security_model": {"none", "user", "pool"},
    "kvm_flag": {"", "enabled", "disabled"},
}


@pytest.mark.parametrize("name", GANETI_CHOICES)
def test_what_ganeti_let_one_choose_can_be_chosen(name: str) -> None:
    needed = {"cdrom": {"cdrom_image_path": "/cd.iso"}, "user": {"security_domain": "guest"}}
    for choice in GANETI_CHOICES[name]:
        assert getattr(parse(HvParams, {name: choice} | needed.get(choice, {})), name) == choice


def test_w33_the_last_port_is_one_and_w34_limits_are_above_zero() -> None:
    assert parse(HvParams, {"migration_port": 65535}).migration_port == 65535
    for name in ("migration_bandwidth", "migration_downtime"):
        assert parse(HvParams, {name: 1})
        assert set(refused(HvParams, {name: 0})) == {name}


def test_w32_an_address_of_a_display_is_an_ip_of_either_kind_in_its_shortest_form_or_a_path() -> None:
    for given, kept in (("0.0.0.0", "0.0.0.0"), ("2001:DB8:0::7", "2001:db8::7"), ("/run/vnc", "/run/vnc"), ("", "")):
        assert parse(HvParams, {"vnc_bind_address": given}).vnc_bind_address == kept


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
PATHS = [
    *("kernel_path", "initrd_path", "floppy_image_path", "cdrom_image_path", "cdrom2_image_path", "mem_path"),
    *("cloud_init_image_path", "uefi_code_path", "uefi_vars_path", "uefi_vars_template_path"),
    "cloud_init_user_data_path",
    *("vnc_x509_path", "vnc_password_file", "spice_x509_path", "spice_password_file"),
]
SEED_TEXTS = ("cloud_init_user_data", "cloud_init_network_config")
BAD_HVPARAMS: list[tuple[dict[str, Any], str]] = [
    *(({name: "relative"}, name) for name in PATHS),
    *(({name: "/a/../b"}, name) for name in PATHS),
    *(({name: "two\nlines"}, name) for name in ("kernel_path", "initrd_path", "root_path", "kernel_args")),
    *(({name: None}, name) for name in HvParams.model_fields),
    *(({name: 1}, name) for name, field in HvParams.model_fields.items() if field.annotation is not int),
    *(({name: "1"}, name) for name, field in HvParams.model_fields.items() if field.annotation is int),
    *(({name: True}, name) for name, field in HvParams.model_fields.items() if field.annotation is int),
    *(({name: "yes"}, name) for name, field in HvParams.model_fields.items() if field.annotation is bool),
    *(({"boot_order": value}, "boot_order") for value in ("", "Disk", "c")),
    *(({"disk_type": value}, "disk_type") for value in ("", "virtio", "floppy")),
    *(({"nic_type": value}, "nic_type") for value in ("", "virtio", "e1000e")),
    *(({"disk_cache": value}, "disk_cache") for value in ("", "off")),
    *(({name: "eth0"}, name) for name in ("vnc_bind_address", "spice_bind")),
    *(({"vnc_bind_address": value}, "vnc_bind_address") for value in ("fe80::1%eth0", "::1,tls", "1.2.3", "/a/../b")),
    *(({"migration_port": value}, "migration_port") for value in (-1, 65536)),
    *(({"migration_bandwidth": value}, "migration_bandwidth") for value in (0, -1)),
    *(({"migration_downtime": value}, "migration_downtime") for value in (0, -1)),
    *(({"migration_caps": value}, "migration_caps") for value in (":", "a:", ":a", "a b", "a,b", "A", "-a", "a--b")),
    *(({"cpu_features": [value]}, "cpu_features[0]") for value in ("vmx", "+", "+vmx,accel", "+a=b", 1)),
    *(
        ({"cpu_mask": value}, "cpu_mask")
        for value in ("a", "1-", "0,,1", "0:", "0 1", "-1", "^0", "3-1", "0,^0", "0:1")
    ),
    *(({name: value}, name) for name in SEED_TEXTS for value in ("ü" * 32769, "a\0", "\ud800", ["secret"])),
    *(({"cloud_init_meta_data": value}, "cloud_init_meta_data") for value in ("a: b", {"a": "ü" * 32769}, {"a": "\0"})),
    ({"cloud_init_user_data": "a", "cloud_init_user_data_path": "/a"}, "cloud_init_user_data_path"),
    ({"cloud_init_network_config": "a", "cloud_init_image_path": "/a"}, "cloud_init_image_path"),
    *(({"usb_devices": [value]}, "usb_devices[0]") for value in ("disk", "host:1:2", "tablet,bus=usb.0", 1)),
    *(({"kvm_extra": [value]}, "kvm_extra[0]") for value in ("", "a\nb", 1)),
    *(({"cpu_threads": value}, "cpu_threads") for value in (-1, 4097)),
    *(({"virtio_net_queues": value}, "virtio_net_queues") for value in (0, 257)),
    *(({"serial_speed": value}, "serial_speed") for value in (0, 1200, "9600")),
    *(({"soundhw": value}, "soundhw") for value in ("all", "ac97,hda")),
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
    for cdrom2 in ({}, {"cdrom2_image_path": "/cd2.iso"}):
        assert refused(HvParams, {"boot_order": "cdrom"} | cdrom2) == {
            "cdrom_image_path": "Cannot boot from cdrom without an ISO path"
        }
    assert refused(HvParams, {"vnc_x509_verify": True}) == {
        "vnc_x509_path": "vnc_x509_path must be defined, if vnc_x509_verify is"
    }
    assert refused(HvParams, {"security_model": "user"}) == {
        "security_domain": "A security domain (user to run kvm as) must be specified"
    }
    for model in ("none", "pool"):
        assert refused(HvParams, {"security_model": model, "security_domain": "guest"}) == {
            "security_domain": "Cannot have a security domain when the security model is 'none' or 'pool'"
        }
    assert parse(HvParams, {"boot_order": "floppy"}).floppy_image_path == ""
    assert refused(Instance, instance(name="n" * 300)) == {"name": "is 300 characters long; at most 255 are allowed"}


CROSS_CHECKED: list[tuple[dict[str, Any], set[str]]] = [
    ({"vnc_bind_address": "::1", "spice_bind": "::1"}, {"spice_bind"}),
    ({"spice_use_tls": True}, {"spice_x509_path"}),
    ({"spice_use_tls": True, "spice_x509_path": "/x", "spice_bind": "/run"}, {"spice_use_tls"}),
    ({"cdrom_drive": True, "cdrom_disk_type": "paravirtual"}, {"cdrom_drive"}),
    ({"cdrom2_drive": True, "cdrom_disk_type": "paravirtual"}, {"cdrom2_drive"}),
    ({"memory_min_mib": 16}, {"balloon"}),
    ({"memory_max_mib": 64}, {"balloon"}),
    ({"disk_aio": "native"}, {"disk_cache"}),
    ({"disk_aio": "native", "disk_cache": "writethrough"}, {"disk_cache"}),
    ({"uefi_code_path": "/code.fd"}, {"uefi_vars_path"}),
    ({"uefi_vars_path": "/vars.fd"}, {"uefi_code_path"}),
    ({"uefi_vars_template_path": "/vars.fd"}, {"uefi_vars_path"}),
    (
        {
            "kernel_path": "/k",
            "root_path": "",
            "boot_order": "cdrom",
            "vnc_x509_verify": True,
            "security_model": "user",
        },
        {"root_path", "cdrom_image_path", "vnc_x509_path", "security_domain"},
    ),
]


@pytest.mark.parametrize(("bad", "fields"), CROSS_CHECKED)
def test_parameters_that_do_not_go_together_are_all_named_at_once(bad: dict[str, Any], fields: set[str]) -> None:
    assert set(refused(HvParams, bad)) == fields
    assert set(refused(payloads.StartArguments, {"instance": with_hv(**bad)})) == {
        f"instance.hvparams.{field}" for field in fields
    }


def test_parameters_that_do_not_suit_the_instance_are_all_named_at_once() -> None:
    def wrong(more: dict[str, Any], **hvparams: Any) -> set[str]:
        return set(refused(payloads.StartArguments, {"instance": with_hv(**hvparams) | more}))

    for display in ("vnc_bind_address", "spice_bind"):
        for port in (None, 80, 5900):
            assert wrong({"network_port": port}, **{display: "::1"}) == {"instance.network_port"}
        assert parse(Instance, with_hv(**{display: "::1"}) | {"network_port": 5901}).network_port == 5901
        assert parse(Instance, with_hv(**{display: "/run"})).network_port is None
        assert wrong({"name": "n" * 105}, **{display: "/run"}) == {f"instance.hvparams.{display}"}
    assert wrong({"vcpus": 4}, cpu_sockets=2, cpu_cores=4) == {"instance.hvparams.cpu_sockets"}
    assert parse(Instance, with_hv(cpu_sockets=2, cpu_cores=4) | {"vcpus": 8}).vcpus == 8
    bounds = {"balloon": True, "memory_min_mib": 16, "memory_max_mib": 64}
    assert wrong({"memory_mib": 15}, **bounds) == {"instance.hvparams.memory_min_mib"}
    assert wrong({"memory_mib": 65}, **bounds) == {"instance.hvparams.memory_max_mib"}
    for memory_mib in (16, 64):
        assert parse(Instance, with_hv(**bounds) | {"memory_mib": memory_mib}).memory_mib == memory_mib
    assert wrong({"vcpus": 4}, cpu_threads=3, vnc_bind_address="::1") == {
        "instance.hvparams.cpu_sockets",
        "instance.network_port",
    }


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

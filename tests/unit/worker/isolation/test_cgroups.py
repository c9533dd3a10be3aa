"""Which control groups a host offers, and what a guest's is told. On real ones: tests/node/test_cgroups.py."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.services import missing
from worker.isolation import cgroups
from worker.isolation.cgroups import Folders, Limits, NoGroups, Scopes

EVERYTHING = Limits(memory_max_bytes=2**30, cpu_max_percent=150, cpu_weight=50)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A root folder whose /proc says that version 2 is mounted, as in hybrid set-ups, below two of version 1."""
    if os.geteuid() != 0:
        missing("Control groups", "need root")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "25 24 0:22 / /sys rw shared:7 - sysfs sysfs rw\n"
        "31 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
        "32 25 0:28 / /sys/fs/cgroup/two\\040words rw shared:9 master:1 - cgroup2 cgroup2 rw\n"
    )
    return tmp_path


def mounted(host: Path, controllers: str) -> Path:
    mount = host / "sys/fs/cgroup/two words"
    mount.mkdir(parents=True)
    (mount / "cgroup.controllers").write_text(controllers)
    return mount


def test_the_controllers_are_switched_on_for_our_folder_and_for_those_in_it(host: Path) -> None:
    mount = mounted(host, "cpuset cpu io memory pids\n")
    groups = cgroups.detect(host)
    assert (groups, groups.limits) == (Folders(mount / "hostler"), True)
    for folder in (mount, mount / "hostler"):
        assert (folder / "cgroup.subtree_control").read_text() == "+cpu +memory"


@pytest.mark.parametrize("controllers", ["hugetlb\n", "cpu io\n", "\n"])
def test_a_hierarchy_without_both_controllers_is_of_no_use(host: Path, controllers: str) -> None:
    mounted(host, controllers)
    groups = cgroups.detect(host)
    assert isinstance(groups, NoGroups)
    assert "no hierarchy of version 2 has both cpu and memory" in groups.about


def test_a_hierarchy_that_may_not_be_changed_is_said_with_the_kernels_reason(host: Path) -> None:
    (mounted(host, "cpu memory\n") / "cgroup.subtree_control").mkdir()  # not even root writes to that
    groups = cgroups.detect(host)
    assert not groups.limits
    assert groups.about.endswith("cgroup.subtree_control: Is a directory")


def test_what_the_kernel_refuses_names_the_file_and_leaves_no_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path, text: str) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # as a write does, without the file's name

    monkeypatch.setattr(Path, "write_text", refuses)
    with pytest.raises(OSError, match=r"Invalid argument: '.*/0-1-2/memory.max'"):
        Folders(tmp_path).enter("0-1-2", EVERYTHING)
    assert not [*tmp_path.iterdir()]


def test_our_folder_is_made_again_where_somebody_removed_it(tmp_path: Path) -> None:
    groups = Folders(tmp_path / "hostler")
    assert [*groups.uuids()] == []
    groups.enter("0-1-2", Limits())
    assert (tmp_path / "hostler" / "0-1-2").is_dir()


@pytest.fixture
def systemd(host: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemd-run that prints what a scope's shell would, as the file ``answer`` beside it has it."""
    (host / "run/systemd/system").mkdir(parents=True)
    program = host / "systemd-run"
    program.write_text(f"#!/bin/sh\ncat {host}/answer || exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{host}:{os.environ['PATH']}")
    return program


def test_where_systemd_runs_the_host_a_guest_gets_a_scope(host: Path, systemd: Path) -> None:
    (host / "answer").write_text("/hostler.slice/hostler-probe-0.scope\ncpu memory pids\n")
    groups = cgroups.detect(host)
    assert groups == Scopes(str(systemd))
    assert groups.enter("0-1-2", EVERYTHING) == [
        str(systemd), "--scope", "--quiet", "--collect", "--slice=hostler", "--unit=hostler-0-1-2",
        "--property=MemoryMax=1073741824", "--property=CPUWeight=50", "--property=CPUQuota=150%", "--",
    ]  # fmt: skip
    assert not [word for word in groups.enter("0-1-2", Limits()) if word.startswith("--property")]
    assert (groups.remove("0-1-2"), [*groups.uuids()]) == (False, [])


def test_a_scope_without_the_controllers_has_no_limits(host: Path, systemd: Path) -> None:
    (host / "answer").write_text("/hostler.slice/hostler-probe-0.scope\npids\n")
    groups = cgroups.detect(host)
    assert (groups, groups.limits) == (Scopes(str(systemd), limits=False), False)
    assert "without limits" in groups.about


def test_a_systemd_that_makes_no_scope_is_not_relied_on(
    host: Path, systemd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = cgroups.detect(host)
    assert not refused.limits
    assert "systemd-run made no scope: cat: " in refused.about
    (host / "answer").write_text("/system.slice/docker-1.scope\ncpu memory\n")
    assert isinstance(cgroups.detect(host), NoGroups)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no systemd-run" in cgroups.detect(host).about


def test_limits_are_written_in_the_kernels_words_and_what_has_none_is_left_alone(tmp_path: Path) -> None:
    groups = Folders(tmp_path)
    through = groups.enter("0-1-2", EVERYTHING)
    assert through[-1] == str(tmp_path / "0-1-2" / "cgroup.procs")
    written = {path.name: path.read_text() for path in (tmp_path / "0-1-2").iterdir()}
    assert written == {"memory.max": "1073741824", "cpu.max": "150000 100000", "cpu.weight": "50"}
    groups.enter("3-4-5", Limits())
    assert not [*(tmp_path / "3-4-5").iterdir()]
    assert (groups.remove("3-4-5"), groups.remove("3-4-5")) == (True, False)


def test_an_empty_group_is_told_from_one_with_a_process(tmp_path: Path) -> None:
    for name, pids in (("empty", ""), ("in-use", "77\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").write_text(pids)
    (tmp_path / "cgroup.stat").touch()
    assert [*Folders(tmp_path).uuids()] == ["empty"]


def test_switched_off_there_are_none() -> None:
    groups = cgroups.of_host("off")
    assert (groups.enter("0-1-2", EVERYTHING), groups.remove("0-1-2"), [*groups.uuids()]) == ([], False, [])
    assert "HOSTLER_CGROUPS is off" in groups.about

"""What QEMU is given beside monitors and taps: passwords in memory, sockets, the UEFI variable store."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from hostler.hvparams import HvParams
from hostler.payloads import Instance
from worker.errors import QemuFailed
from worker.kvm.folder import GuestFolder
from worker.kvm.prepared import password_files, prepare, provide_variable_store, read_password


@pytest.fixture
def folder(short_dir: Path) -> GuestFolder:
    made = GuestFolder.of(short_dir, "u")
    made.create()
    return made


def guest(**hvparams: Any) -> Instance:
    return Instance.model_validate({"name": "web1", "memory_mib": 16, "network_port": 5999, "hvparams": hvparams})


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("content", [b"secret", b"secret\n"])
def test_w17_a_password_is_the_only_line_of_its_file_without_the_line_break(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    assert read_password(file) == b"secret"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"secret\n\n", b"sec\nret", b"sec\nret\n", b"se\0cret", b"s" * 4097, b"\nsecret"]
)
def test_w17_a_password_file_that_is_empty_or_of_several_lines_is_refused_and_not_quoted(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    with pytest.raises(QemuFailed, match=str(file)) as failed:
        read_password(file)
    assert "sec" not in failed.value.message.replace(str(file), "")


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_a_password_file_that_cannot_be_read_is_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "password")
    with pytest.raises(QemuFailed, match="Failed to open password file"):
        read_password(tmp_path / "password")


def test_a_password_is_asked_for_only_where_its_display_has_an_address() -> None:
    files = {"vnc_password_file": "/vnc", "spice_password_file": "/spice"}
    for display, wanted in (
        ({"vnc_bind_address": "::1"}, {"vnc": "/vnc"}),
        ({"vnc_bind_address": "/run"}, {}),
        ({"spice_bind": "::1"}, {"spice": "/spice"}),
        ({"spice_bind": "/run"}, {"spice": "/spice"}),
        ({}, {}),
    ):
        assert password_files(HvParams.model_validate(files | display)) == wanted


def test_a_password_travels_in_memory_and_the_agents_socket_listens(folder: GuestFolder, tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes(b"secret\n")
    before = open_fds()
    hvparams = {"vnc_bind_address": "::1", "vnc_password_file": str(tmp_path / "password"), "guest_agent": True}
    prepared = prepare(guest(**hvparams), folder)
    try:
        assert Path(f"/proc/self/fd/{prepared.password_fds['vnc']}").read_bytes() == b"secret"
        assert folder.agent.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(folder.agent))
        assert not any(os.get_inheritable(fd) for fd in prepared.fds)
    finally:
        for fd in prepared.fds:
            os.close(fd)
    assert open_fds() == before


def test_nothing_stays_open_when_it_fails(folder: GuestFolder, tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes(b"secret\n")
    folder.agent.touch()  # the socket cannot be bound
    before = open_fds()
    hvparams = {"vnc_bind_address": "::1", "vnc_password_file": str(tmp_path / "password"), "guest_agent": True}
    with pytest.raises(OSError, match="in use"):
        prepare(guest(**hvparams), folder)
    assert open_fds() == before


def test_nothing_is_prepared_for_a_guest_that_asks_for_nothing(folder: GuestFolder) -> None:
    assert prepare(guest(), folder).fds == []
    assert [*folder.path.iterdir()] == []


def test_w23_a_displays_socket_goes_with_the_guests_folder_and_nothing_else_does(
    folder: GuestFolder, short_dir: Path
) -> None:
    place = short_dir / "web1.vnc"
    prepare(guest(vnc_bind_address=str(short_dir)), folder)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
    assert folder.remove()
    assert not place.exists()
    folder.create()
    prepare(guest(vnc_bind_address=str(short_dir)), folder)
    assert folder.remove()  # it was gone already
    folder.create()
    prepare(guest(vnc_bind_address=str(short_dir)), folder)
    place.write_text("somebody's file")
    assert folder.remove()
    assert place.read_text() == "somebody's file"


def uefi(tmp_path: Path) -> HvParams:
    paths = {"uefi_code_path": "code.fd", "uefi_vars_path": "vars.fd", "uefi_vars_template_path": "template.fd"}
    return HvParams.model_validate({name: str(tmp_path / file) for name, file in paths.items()})


def test_a_variable_store_is_copied_once_and_then_the_guests_own(tmp_path: Path) -> None:
    template, store = tmp_path / "template.fd", tmp_path / "vars.fd"
    template.write_bytes(b"empty")
    (tmp_path / "vars.fd.new").write_bytes(b"left by a worker that was killed")
    provide_variable_store(uefi(tmp_path))
    assert (store.read_bytes(), store.stat().st_mode & 0o777) == (b"empty", 0o600)
    assert {path.name for path in tmp_path.iterdir()} == {"template.fd", "vars.fd"}
    store.write_bytes(b"the guest's")
    provide_variable_store(uefi(tmp_path))
    assert store.read_bytes() == b"the guest's"


def test_a_variable_store_that_cannot_be_copied_fails_the_start_and_leaves_no_half_of_it(tmp_path: Path) -> None:
    with pytest.raises(QemuFailed, match="variable store cannot be copied"):
        provide_variable_store(uefi(tmp_path))
    assert [*tmp_path.iterdir()] == []

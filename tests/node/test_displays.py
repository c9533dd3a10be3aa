"""Displays, agents and firmware on a real node: what a client meets, and that nothing of it stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import TestNode, tiny_instance, until
from tests.services import missing

pytestmark = pytest.mark.node

FIRST_PORT = 5900


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return port if port > FIRST_PORT else free_port()


def des(key: bytes, challenge: bytes) -> bytes:
    """Single DES, as three times the same key; VNC takes each byte of a password with its bits reversed."""
    if not shutil.which("openssl"):
        missing("openssl", "not on PATH")
    reversed_key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in key[:8].ljust(8, b"\0"))
    argv = ["openssl", "enc", "-des-ede3", "-nopad", "-K", (reversed_key * 3).hex()]
    return subprocess.run(argv, input=challenge, capture_output=True, check=True).stdout


def received(connection: socket.socket, number: int) -> bytes:
    data = b""
    while len(data) < number:
        more = connection.recv(number - len(data))
        assert more, f"hung up after {data!r}"
        data += more
    return data


def greeted(connection: socket.socket) -> bytes:
    """The security types that are offered (RFC 6143, 7.1)."""
    connection.settimeout(30)
    assert received(connection, 12) == b"RFB 003.008\n"
    connection.sendall(b"RFB 003.008\n")
    return received(connection, received(connection, 1)[0])


def logs_in(port: int, password: bytes) -> bool:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        assert greeted(connection) == b"\x02"
        connection.sendall(b"\x02")
        connection.sendall(des(password, received(connection, 16)))
        return received(connection, 4) == bytes(4)


def with_password(n1: TestNode, port: int, content: str) -> dict[str, Any]:
    file = n1.root / "password"
    file.write_text(content)
    hvparams = {"vnc_bind_address": "127.0.0.1", "vnc_password_file": str(file)}
    return tiny_instance(n1.root, hvparams=hvparams, network_port=port)


def test_w22_a_vnc_display_takes_the_password_of_the_file_which_no_one_finds_elsewhere(n1: TestNode) -> None:
    port = free_port()
    n1.start(with_password(n1, port, "seCret7\n"))
    assert logs_in(port, b"seCret7")
    assert not logs_in(port, b"seCret8")
    assert not logs_in(port, b"seCret7\n")
    pid = n1.pid("web1")
    assert b"seCret7" not in Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    kept = [n1.root / "worker.log", *(n1.root / "state").rglob("*"), *(n1.root / "run").rglob("*")]
    assert not [path for path in kept if path.is_file() and b"seCret7" in path.read_bytes()]


def test_a_hard_reboot_reads_the_password_again(n1: TestNode) -> None:
    port = free_port()
    n1.start(with_password(n1, port, "old"))
    (n1.root / "password").write_text("new")
    n1.do("instance.reboot", name="web1", mode="hard")
    assert logs_in(port, b"new")
    assert not logs_in(port, b"old")


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_w23_the_socket_of_a_display_is_there_while_the_guest_runs_and_no_longer(n1: TestNode, how: str) -> None:
    place = n1.root / "displays"
    place.mkdir(exist_ok=True)
    n1.start(tiny_instance(n1.root, hvparams={"vnc_bind_address": str(place)}))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(place / "web1.vnc"))
        assert greeted(connection) == b"\x01"
    if how == "stopped":
        n1.do("instance.stop", name="web1", force=True)
    else:
        os.kill(n1.pid("web1"), signal.SIGKILL)
        n1.until_state("web1", "crashed")
    until(lambda: [*place.iterdir()] == [], what="the socket is gone")


def test_the_agents_channel_is_a_socket_in_the_guests_folder(n1: TestNode) -> None:
    view = n1.start(tiny_instance(n1.root, hvparams={"guest_agent": True}))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(Path(view["run_dir"]) / "agent"))
    assert "org.qemu.guest_agent.0" in n1.monitor("web1", "info qtree")


def test_a_guest_with_many_devices_boots_all_the_same(n1: TestNode) -> None:
    drives = {name: str(n1.root / name) for name in ("floppy_image_path", "cdrom_image_path", "cdrom2_image_path")}
    for path in drives.values():
        Path(path).write_bytes(bytes(1474560))
    hvparams = {"vga": "std", "usb_mouse": "tablet", "soundhw": "hda", "balloon": True, "usb_devices": ["keyboard"]}
    n1.start(tiny_instance(n1.root, hvparams=drives | hvparams | {"cpu_cores": 1, "disk_cache": "unsafe"}))
    with n1.serial("web1") as serial:
        serial.tick()


@pytest.mark.parametrize("kind", ["paravirtual", "virtio-scsi", "scsi", "ide", "nvme"])
def test_the_firmware_boots_from_a_disk_of_each_type(n1: TestNode, kind: str) -> None:
    n1.start(tiny_instance(n1.root, hvparams={"disk_type": kind}))
    with n1.serial("web1") as serial:
        serial.tick()


def test_the_firmware_boots_from_a_floppy(n1: TestNode) -> None:
    instance = tiny_instance(n1.root)
    image = Path(instance.pop("disks")[0]["path"])
    floppy = n1.root / "floppy"
    floppy.write_bytes(image.read_bytes()[:512].ljust(1474560, b"\0"))
    n1.start(instance | {"hvparams": instance["hvparams"] | {"boot_order": "floppy", "floppy_image_path": str(floppy)}})
    with n1.serial("web1") as serial:
        serial.tick()


def test_a_variable_store_is_made_at_the_first_start_and_stays(n1: TestNode) -> None:
    code, template, store = (n1.root / name for name in ("code.fd", "template.fd", "vars.fd"))
    code.write_bytes(bytes(65536))
    template.write_bytes(b"V" * 65536)
    hvparams = {"uefi_code_path": str(code), "uefi_vars_path": str(store), "uefi_vars_template_path": str(template)}
    n1.start(tiny_instance(n1.root, hvparams=hvparams), paused=True)
    assert store.read_bytes() == template.read_bytes()
    n1.do("instance.stop", name="web1", force=True)
    assert store.exists()


def test_what_no_machine_can_do_is_unsupported_by_name_and_leaves_nothing(n1: TestNode) -> None:
    hvparams = {"disk_type": "sd", "cdrom_disk_type": "mtd"}
    failed = n1.failure("instance.start", instance=tiny_instance(n1.root, "later", hvparams=hvparams))
    assert failed.code == "UNSUPPORTED"
    fields = {f"instance.hvparams.{name}" for name in hvparams}
    assert {error["field"] for error in failed.details["errors"]} == fields
    assert not n1.leftovers()
    assert "later" not in n1.known()


def test_a_check_tells_what_is_wrong_what_cannot_be_done_and_what_is_worth_a_look_all_at_once(n1: TestNode) -> None:
    hvparams = {"kernel_path": "/no/kernel", "disk_type": "sd", "disk_cache": "unsafe"}
    hvparams |= {"vnc_bind_address": "0.0.0.0", "vnc_password_file": "/no/password"}
    found = n1.do("instance.check", instance=tiny_instance(n1.root, hvparams=hvparams, network_port=5999, vcpus=4000))
    errors, warnings = ({each["field"].removeprefix("instance.hvparams.") for each in found[kind]} for kind in found)
    assert errors == {"kernel_path", "vnc_password_file", "disk_type", "instance.vcpus"}
    assert warnings == {"machine_version", "cpu_type", "disk_cache", "vnc_bind_address"}
    failed = n1.failure("instance.start", instance=tiny_instance(n1.root, hvparams=hvparams, network_port=5999))
    assert failed.code == "INVALID_ARGUMENT"
    assert len(failed.details["errors"]) == 3

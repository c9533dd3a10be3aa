"""A seed for cloud-init that the node makes, as a Linux guest finds it, and who can read what is in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.guests import LINUX_ARGUMENTS, LINUX_MEMORY_MIB, LINUX_READY, linux_guest
from tests.nodes import Serial, TestNode, tiny_instance

pytestmark = pytest.mark.node

BOOT_S = 60.0
SECRET = "geheim-4711"


def ask(serial: Serial, command: str) -> str:
    serial.send(f'echo "answer $({command}) end"\n'.encode())
    return serial.read_until(re.compile(rb"\r\nanswer ([^$]*?) end\r\n"))[1].decode()


def linux(hvparams: dict[str, Any]) -> dict[str, Any]:
    guest = linux_guest()
    boot = {"kernel_path": str(guest.kernel), "initrd_path": str(guest.initrd), "kernel_args": LINUX_ARGUMENTS}
    return {"name": "web1", "memory_mib": LINUX_MEMORY_MIB, "hvparams": boot | {"kvm_flag": "disabled"} | hvparams}


def test_linux_mounts_the_seed_and_reads_who_it_is(n1: TestNode) -> None:
    user_data = n1.root / "user-data"
    user_data.write_text(f"#cloud-config\npassword: {SECRET}\n")
    seed = {"cloud_init_user_data_path": str(user_data), "cloud_init_network_config": "version: 2\n"}
    n1.start(linux(seed | {"cloud_init_meta_data": {"local-hostname": "www", "é": 1}}))
    with n1.serial("web1") as serial:
        serial.read_until(LINUX_READY, BOOT_S)
        assert ask(serial, "mkdir /seed; mount -t iso9660 -o ro /dev/sr0 /seed 2>&1") == ""
        assert ask(serial, "ls /seed").split() == ["meta-data", "network-config", "user-data"]
        assert ask(serial, "tail -n 1 /seed/user-data") == f"password: {SECRET}"
        assert json.loads(ask(serial, "cat /seed/meta-data")) == {
            "instance-id": "web1",
            "local-hostname": "www",
            "é": 1,
        }
        assert ask(serial, "cat /seed/network-config") == "version: 2"
        assert ask(serial, "dd if=/dev/sr0 bs=1 skip=32808 count=7 2>/dev/null") == "cidata ", "the volume's label"


def test_user_data_of_a_file_are_in_the_guests_folder_alone_and_go_with_it(n1: TestNode) -> None:
    user_data = n1.root / "user-data"
    user_data.write_text(SECRET)
    view = n1.start(tiny_instance(n1.root, hvparams={"cloud_init_user_data_path": str(user_data)}))
    seed = Path(view["run_dir"]) / "seed.iso"
    assert (seed.stat().st_mode & 0o777, SECRET.encode() in seed.read_bytes()) == (0o600, True)
    user_data.write_text("another")
    n1.do("instance.reboot", name="web1", mode="hard")
    again = Path(n1.info("web1")["run_dir"]) / "seed.iso"
    assert b"another" in again.read_bytes(), "a file is read at each start"
    assert SECRET.encode() not in Path(f"/proc/{n1.pid('web1')}/cmdline").read_bytes()
    assert not seed.exists()
    kept = [n1.log_path, *(n1.root / "state").rglob("*")]
    assert not [path for path in kept if path.is_file() and SECRET.encode() in path.read_bytes()]
    n1.do("instance.stop", name="web1", force=True)
    n1.nothing_is_left()
    assert user_data.exists()


def test_user_data_in_the_job_are_in_no_log_argument_or_answer(n1: TestNode) -> None:
    job = n1.send("instance.start", instance=tiny_instance(n1.root, hvparams={"cloud_init_user_data": SECRET}))
    view = job.wait(30)
    assert SECRET.encode() in (Path(view["run_dir"]) / "seed.iso").read_bytes()
    told = [view, n1.info("web1"), n1.do("instance.list"), n1.do("job.info", id=job.id)]
    assert SECRET not in json.dumps(told) + n1.log_path.read_text()
    assert told[-1]["arguments"]["instance"]["hvparams"]["cloud_init_user_data"] == "(hidden)"
    assert SECRET not in n1.cli("job", job.id, "--json").stdout
    assert SECRET.encode() not in Path(f"/proc/{n1.pid('web1')}/cmdline").read_bytes()

"""A full Linux guest moves between two real nodes while it writes a log: no record is lost, torn or doubled.

A record has a number, random payload and a checksum over both; the guest says on its serial console which ones are
synced. Each has a place of its own on the disk, so that one that was written twice does not have the checksum said.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.guests import LINUX_ARGUMENTS, LINUX_MEMORY_MIB, LINUX_READY, Entry, cpio_archive, linux_guest
from tests.migrating import Com1
from tests.nodes import TestNode, until
from tests.pairs import apart, in_order, migrate
from worker.kvm import images

pytestmark = [pytest.mark.node, pytest.mark.timeout(240)]

BOOT_S = 60.0
RECORD_BYTES = 4096
DISK_BYTES = 64 * 2**20
MIB_S = 48
"""So slow that there is time to write while memory is on its way."""
SYNCED = re.compile(rb"synced (\d+) ([0-9a-f]{32})\r")
_WRITER = f"""#!/bin/busybox sh
n=0
while [ ! -e /enough ]; do
    record="$n $(head -c 2900 /dev/urandom | base64 -w 0)"
    sum=$(echo "$record" | md5sum)
    printf "%-{RECORD_BYTES - 1}s\\n" "$record ${{sum%% *}}" >/record
    dd if=/record of=/dev/vda bs={RECORD_BYTES} seek=$n conv=notrunc,fsync 2>/dev/null && echo "synced $n ${{sum%% *}}"
    n=$((n + 1))
done
echo "ended after $n"
"""


class Guest:
    """The writing guest, all that it said so far, and the nodes that it goes to and fro between."""

    def __init__(self, nodes: list[TestNode], folders: list[Path]) -> None:
        self.here, self.there = nodes
        self.disks = {node.name: folder / "log.qcow2" for node, folder in zip(nodes, folders, strict=True)}
        self.said: dict[int, bytes] = {}
        self._heard = b""

    def boot(self) -> None:
        path = self.disks[self.here.name]
        images.create(str(path), "qcow2", DISK_BYTES)
        self.here.start(linux(self.here.root, path))
        with self.here.serial("linux1") as serial:
            serial.read_until(LINUX_READY, BOOT_S)
            serial.send(b"sh /writer &\n")
            serial.read_until(SYNCED)
        self.com1 = self._listen()

    def move(self, **options: Any) -> Any:
        """To the other node; what the guest said until it had gone is kept, and that it wrote all the while."""
        until(lambda: SYNCED.search(self.com1.heard), what="the guest writes")
        before = len(self.com1.heard)
        report = migrate(self.here, self.there, "linux1", bandwidth_mib_s=MIB_S, **options)
        self.com1.close()
        assert len(SYNCED.findall(self.com1.heard[before:])) > 3, "it wrote nothing while it moved"
        self._keep()
        self.here, self.there = self.there, self.here
        self.com1 = self._listen()
        return report

    def end(self) -> int:
        """Have it write no more; how many records it wrote."""
        until(lambda: len(SYNCED.findall(self.com1.heard)) > 3, what="the guest goes on writing")
        self.com1.send(b"touch /enough\n")
        ended = until(lambda: re.search(rb"ended after (\d+)\r", self.com1.heard), what="it has ended")
        self.here.do("instance.stop", name="linux1", force=True)
        self.com1.close()
        self._keep()
        return int(ended[1])

    def _listen(self) -> Com1:
        row = self.here.row("linux1")
        assert row and row.runtime
        return Com1(Path(row.runtime.run_dir) / "serial")

    def _keep(self) -> None:
        for number, checksum in SYNCED.findall(self.com1.heard):
            assert int(number) not in self.said, f"record {int(number)} was synced twice"
            self.said[int(number)] = checksum


def linux(folder: Path, disk: Path) -> dict[str, Any]:
    guest = linux_guest()
    initrd = folder / "initrd"
    initrd.write_bytes(
        guest.initrd.read_bytes() + cpio_archive([Entry("writer", stat.S_IFREG | 0o755, _WRITER.encode())])
    )
    hvparams = {"kernel_path": str(guest.kernel), "initrd_path": str(initrd), "kernel_args": LINUX_ARGUMENTS}
    hvparams |= {"kvm_flag": "disabled"}
    disks = [{"path": str(disk), "format": "qcow2"}]
    return {"name": "linux1", "memory_mib": LINUX_MEMORY_MIB, "vcpus": 1, "disks": disks, "hvparams": hvparams}


def log_on(disk: Path) -> dict[int, bytes]:
    """The records on a disk, each with its checksum; they are whole, in their places, and without a gap."""
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(disk)], check=True)
    raw = disk.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(raw)], check=True)
    content = raw.read_bytes()
    raw.unlink()
    places = [content[at : at + RECORD_BYTES] for at in range(0, len(content), RECORD_BYTES)]
    count = next(place for place, record in enumerate(places) if not any(record))
    assert not any(content[count * RECORD_BYTES :]), f"records beyond the first gap, at {count}"
    return {place: checksum_of(record, place) for place, record in enumerate(places[:count])}


def checksum_of(record: bytes, place: int) -> bytes:
    number, payload, checksum = record.split()
    assert int(number) == place
    assert hashlib.md5(number + b" " + payload + b"\n").hexdigest().encode() == checksum, f"record {place} is torn"
    return checksum


def test_a_linux_guest_that_writes_all_the_time_loses_no_record_however_it_moves(qemu: None) -> None:
    with apart() as (nodes, folders):
        guest = Guest(nodes, folders)
        guest.boot()
        one, other = (guest.disks[node.name] for node in nodes)
        os.link(one, other)  # the disk is shared
        guest.move()
        assert guest.move(postcopy="at-once")["postcopy"] is True
        other.unlink()  # it is not any more
        assert guest.move(copy_storage="full")["copied"]
        left = log_on(one)
        one.unlink()
        guest.move(copy_storage="full")
        left_there = log_on(other)
        assert in_order(nodes) == []
        count = guest.end()
        found = log_on(one)
    assert len(found) == count
    assert guest.said.items() <= found.items()
    # What stays behind is the log as it was at the switch.
    assert left.items() < left_there.items() < found.items()
    assert {*left_there} - {*left} and max(guest.said) == count - 1

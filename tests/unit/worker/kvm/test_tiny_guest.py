"""The bytes of the tiny guest; that they boot is shown by tests/node/test_guests_boot.py."""

from pathlib import Path

import pytest

from worker.kvm import tiny_guest
from worker.kvm.tiny_guest import assemble, boot_sector, write_disk


def assembled(listing: str, **data: bytes) -> bytes:
    return assemble(listing, data, {"key": b"k"}, origin=0x7C00)


def test_the_sector_has_512_bytes_and_the_boot_signature() -> None:
    sector = boot_sector()
    assert len(sector) == 512
    assert sector[510:] == b"\x55\xaa"


def test_the_partition_table_is_empty() -> None:
    assert boot_sector()[446:510] == bytes(64)


def test_the_sector_is_the_same_each_time() -> None:
    assert boot_sector() == boot_sector()


def test_the_sector_contains_each_message_once_and_ended_by_zero() -> None:
    for message in (
        tiny_guest.BANNER,
        tiny_guest.POWER_BUTTON_MESSAGE,
        tiny_guest.BYE_MESSAGE,
        tiny_guest.IGNORING_MESSAGE,
        tiny_guest.TICK_PREFIX + b"00000000\r\n",
    ):
        assert boot_sector().count(message + b"\0") == 1


def test_every_line_of_the_listing_says_which_instruction_it_is() -> None:
    for line in filter(str.strip, tiny_guest._LISTING.splitlines()):
        assert line.endswith(":") or line.partition(";")[2].strip(), line


def test_references_become_little_endian_addresses_and_distances() -> None:
    assert assembled("here: F4 =here >here ~here") == bytes.fromhex("F4 00 7C FB FF FA")
    assert assembled("~there >there F4 there:") == bytes.fromhex("03 01 00 F4")


def test_data_follows_the_code_under_its_own_label() -> None:
    assert assembled("BE =text ; mov si, text", text=b"hi") == b"\xbe\x03\x7chi"


def test_a_constant_becomes_its_byte() -> None:
    assert assembled("3C ?key ; cmp al, 'k'") == b"\x3ck"


@pytest.mark.parametrize(
    ("listing", "complaint"),
    [
        ("E8 >nowhere", "'>nowhere' names a label or constant that is not there"),
        ("3C ?nokey", "'\\?nokey' names a label or constant that is not there"),
        ("twice: F4 twice:", "'twice' stands in two places"),
        ("~far" + " 90" * 128 + " far:", "'~far' does not fit"),
        ("100", "'100' does not fit"),
        ("hlt", "'hlt' is neither a byte in hex nor a reference"),
    ],
)
def test_what_cannot_be_assembled_is_named(listing: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        assembled(listing)


def test_a_disk_is_the_sector_and_then_zeros(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"x" * 4096)
    write_disk(disk)
    assert disk.read_bytes() == boot_sector().ljust(1024 * 1024, b"\0")
    write_disk(disk, size_bytes=512)
    assert disk.read_bytes() == boot_sector()


@pytest.mark.parametrize("size_bytes", [0, -512, 511, 513])
def test_a_size_that_is_no_number_of_sectors_is_refused_before_the_file_is_touched(
    tmp_path: Path, size_bytes: int
) -> None:
    disk = tmp_path / "disk.img"
    with pytest.raises(ValueError, match=f"size_bytes is {size_bytes}"):
        write_disk(disk, size_bytes)
    assert not disk.exists()

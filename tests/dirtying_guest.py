"""The tiny guest, and beside its counting it writes to memory at a chosen rate and checks what it wrote before.

It goes round and round through a range of memory that begins at :data:`FIRST_ADDRESS`. At each tick of the BIOS clock
(18.2 a second) it takes the next so many pages; the first four bytes of a page get the number of the round. Before it
writes a page it looks whether the last round's number is there: one page that a live migration forgot, or brought along
too old, makes it print :data:`CORRUPT_MESSAGE` and halt. All that the tiny guest does on COM1 it does too.
"""

from pathlib import Path
from typing import Final

from worker.kvm import tiny_guest

MIB: Final = 2**20
PAGE_BYTES: Final = 4096
TICKS_PER_S: Final = 18.2065
FIRST_ADDRESS: Final = MIB
ROUND_ADDRESS: Final = 0x7E0C
"""Physical address of the number of the round, 32 bits, little endian."""
CORRUPT_MESSAGE: Final = b"corrupt\r\n"

_BEGIN = """
    66 C7 06 08 7E 00 00 10 00  ; mov dword [0x7E08], 0x100000  the page whose turn it is
    66 C7 06 0C 7E 01 00 00 00  ; mov dword [0x7E0C], 1         the round
"""
_CALL = """
    E8 >dirty               ; call dirty
"""
# Real mode reaches 64 KiB beyond a segment's beginning. A segment register that was loaded in protected mode keeps the
# limit it got there, 4 GiB; loaded anew at each tick, whatever the BIOS made of it meanwhile.
_DIRTY = """
dirty:
    FA                      ; cli
    0F 01 16 =gdt           ; lgdt [gdt]
    0F 20 C0                ; mov eax, cr0
    0C 01                   ; or al, 1
    0F 22 C0                ; mov cr0, eax              protected mode
    BB 08 00                ; mov bx, 8
    8E C3                   ; mov es, bx
    24 FE                   ; and al, 0xFE
    0F 22 C0                ; mov cr0, eax              and back
    31 DB                   ; xor bx, bx
    8E C3                   ; mov es, bx                an interrupt may store and load it
    FB                      ; sti
    66 8B 0E =pages         ; mov ecx, [pages]
    66 8B 3E 08 7E          ; mov edi, [0x7E08]
    66 A1 0C 7E             ; mov eax, [0x7E0C]
next_page:
    66 3B 3E =end           ; cmp edi, [end]
    72 ~same_round          ; jb same_round
    66 BF 00 00 10 00       ; mov edi, 0x100000
    66 40                   ; inc eax
same_round:
    66 89 C3                ; mov ebx, eax
    66 4B                   ; dec ebx
    74 ~write               ; jz write                  in the first round there is anything
    26 67 66 39 1F          ; cmp es:[edi], ebx
    75 ~corrupt             ; jne corrupt
write:
    26 67 66 89 07          ; mov es:[edi], eax
    66 81 C7 00 10 00 00    ; add edi, 4096
    66 49                   ; dec ecx
    75 ~next_page           ; jnz next_page
    66 89 3E 08 7E          ; mov [0x7E08], edi
    66 A3 0C 7E             ; mov [0x7E0C], eax
    C3                      ; ret
corrupt:
    BE =corruption          ; mov si, corruption
    E8 >print               ; call print
halted:
    FA                      ; cli
    F4                      ; hlt
    EB ~halted              ; jmp halted
gdt:                        ; its first entry is never used by the processor, and holds what lgdt wants
    0F 00 =gdt 00 00 00 00
    FF FF 00 00 00 92 CF 00
"""


def boot_sector(mib_per_s: float, range_mib: int) -> bytes:
    """The guest: 512 bytes. It needs about 2 MiB of memory more than ``range_mib``.

    Raises ValueError unless it writes at least a page a tick, and a tick's pages fit into the range.
    """
    pages = round(mib_per_s * MIB / PAGE_BYTES / TICKS_PER_S)
    if not 1 <= pages <= range_mib * MIB // PAGE_BYTES:
        raise ValueError(f"{mib_per_s} MiB/s in {range_mib} MiB are {pages} pages a tick")
    data = {
        **tiny_guest._DATA,
        "corruption": CORRUPT_MESSAGE + b"\0",
        "pages": pages.to_bytes(4, "little"),
        "end": (FIRST_ADDRESS + range_mib * MIB).to_bytes(4, "little"),
    }
    code = tiny_guest.assemble(_listing(), data, tiny_guest._KEYS, tiny_guest._ORIGIN)
    if len(code) > 510:
        raise ValueError(f"the dirtying guest has {len(code)} bytes, 510 fit")
    return code.ljust(510, b"\0") + tiny_guest._SIGNATURE


def write_disk(path: Path, mib_per_s: float, range_mib: int, size_bytes: int = MIB) -> None:
    """Write a raw disk image that boots the guest, replacing what is at ``path``."""
    with path.open("wb") as disk:
        disk.write(boot_sector(mib_per_s, range_mib))
        disk.truncate(size_bytes)


def _listing() -> str:
    listing = tiny_guest._LISTING
    for place, addition in (
        ("    FC                      ; cld\n", _BEGIN),
        ("    F4                      ; hlt  ", _CALL),
    ):
        before, found, after = listing.partition(place)
        end_of_line = after.find("\n") + 1 if not place.endswith("\n") else 0
        assert found, f"the tiny guest no longer has {place!r}"
        listing = before + found + after[:end_of_line] + addition + after[end_of_line:]
    return listing + _DIRTY

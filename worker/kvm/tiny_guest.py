"""A guest of our own in 512 bytes: enough of a computer to prove that a host can run one.

The guest is one BIOS boot sector. It needs no download and no operating system, and is up as soon as the BIOS is. It
runs on ``-machine pc`` (and ``q35``) from any disk the BIOS can boot, under KVM and under TCG, in 1 MiB of memory or
more.

What it does
    It prints :data:`BANNER` on COM1, then about nine times a second (every second BIOS tick) a line such as
    ``tick 0000002a``: a counter in eight hex digits that starts at 1 and lives in memory at :data:`COUNTER_ADDRESS`
    (32 bits, little endian), so that a count that goes on proves that a live migration brought the memory along.
    In between it halts the CPU. The ACPI power button makes it print :data:`POWER_BUTTON_MESSAGE` and power off.
    A press before the banner is lost, as in every guest that is still booting, and so are bytes sent before it.

What it understands on COM1
    ==========================  ================================================================================
    :data:`POWER_OFF_KEY`       print :data:`BYE_MESSAGE` and power off from inside
    :data:`RESET_KEY`           reset the machine; the counter starts again
    :data:`IGNORE_KEY`          print :data:`IGNORING_MESSAGE` and ignore the power button until the next reset
    any other byte              is echoed as it is, between the lines, at the next tick of the clock
    ==========================  ================================================================================

What may be missing
    Without a UART, or with nobody listening, the output is lost and all else works. If a listener stops reading, lines
    are cut short, never waited for. Without ACPI (``acpi=off``) there is no button, and powering off only halts the
    CPU.

Ports and addresses it uses
    ===============  ============================  =====================================================================
    0x3F8            UART data                     PC16550D data sheet, "Registers"; COM1 by PC convention
    0x3F9            divisor, high byte (DLAB=1)   the same
    0x3FA            FIFO control                  the same; 0x01 switches the FIFOs on, 0xC0 is the trigger level 14
    0x3FB            line control                  the same; 0x80 is DLAB, 0x03 is 8 data bits, no parity, 1 stop bit
    0x3FC            modem control                 the same; 0x03 raises DTR and RTS
    0x3FD            line status                   the same; bit 0 is data ready, bit 5 is transmitter empty
    0x600            PM1 status                    ACPI 6.5, "PM1 Status Registers"; bit 8 PWRBTN_STS, 1 clears it
    0x602            PM1 enable                    ACPI 6.5, "PM1 Enable Registers"; bit 8 PWRBTN_EN
    0x604            PM1 control                   ACPI 6.5, "PM1 Control Registers"; bit 13 SLP_EN, 10-12 SLP_TYP
    0x64             keyboard controller command   8042; command 0xFE pulses the CPU's reset line
    0x0046C          BIOS tick count               BIOS data area, 18.2 a second, counted by the timer interrupt
    ===============  ============================  =====================================================================

    That the PM1 block begins at 0x600 is SeaBIOS's choice: it sets the base, on both machines, before it boots the disk
    (QEMU's ``info mtree`` shows it as ``acpi-evt``). That SLP_TYP 0 means "off" is QEMU's choice (hw/acpi/core.c, which
    the PIIX4 and ICH9 power management share). A device that is not there reads as all ones; the guest checks for that.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SECTOR_BYTES: Final = 512
BANNER: Final = b"hostler tiny guest\r\n"
TICK_PREFIX: Final = b"tick "
POWER_BUTTON_MESSAGE: Final = b"power button\r\n"
BYE_MESSAGE: Final = b"bye\r\n"
IGNORING_MESSAGE: Final = b"ignoring\r\n"
POWER_OFF_KEY: Final = b"s"
RESET_KEY: Final = b"r"
IGNORE_KEY: Final = b"i"
COUNTER_ADDRESS: Final = 0x7E00
"""Physical address of the counter: the first free byte behind the loaded sector."""

_ORIGIN: Final = 0x7C00  # where every PC BIOS loads the boot sector
_CODE_LIMIT_BYTES: Final = 446  # here begins the partition table; it stays empty, so that no tool sees partitions
_SIGNATURE: Final = b"\x55\xaa"  # without it the BIOS does not boot the disk

# In front of the semicolon: machine code as `assemble` reads it. Behind it: the instruction, and sometimes its reason.
_LISTING: Final = """
    FA                      ; cli
    66 31 C0                ; xor eax, eax
    8E D8                   ; mov ds, ax
    8E D0                   ; mov ss, ax
    BC 00 7C                ; mov sp, 0x7C00            the stack grows down from the sector
    EA =begin 00 00         ; jmp 0:begin               some BIOSes enter at 07C0:0000
begin:
    66 A3 00 7E             ; mov [0x7E00], eax         the counter
    A2 04 7E                ; mov [0x7E04], al          the tick of the last line
    FC                      ; cld
    FB                      ; sti

    BA FB 03                ; mov dx, 0x3FB
    B0 80                   ; mov al, 0x80              show the divisor
    EE                      ; out dx, al
    BA F9 03                ; mov dx, 0x3F9
    30 C0                   ; xor al, al
    EE                      ; out dx, al
    4A                      ; dec dx                    0x3F8
    40                      ; inc ax                    divisor 1: 115200 baud
    EE                      ; out dx, al
    BA FA 03                ; mov dx, 0x3FA
    B0 C1                   ; mov al, 0xC1              FIFOs on; QEMU fills them up to the trigger level at a time
    EE                      ; out dx, al
    42                      ; inc dx                    0x3FB
    B0 03                   ; mov al, 3                 8N1, divisor hidden again
    EE                      ; out dx, al
    42                      ; inc dx                    0x3FC
    EE                      ; out dx, al                3: DTR and RTS

    BA 00 06                ; mov dx, 0x600
    B8 00 01                ; mov ax, 0x100
    EF                      ; out dx, ax                forget an old press
    BA 02 06                ; mov dx, 0x602
    EF                      ; out dx, ax                PWRBTN_EN
    BE =banner              ; mov si, banner
    E8 >print               ; call print

main:
    F4                      ; hlt                       until the next timer interrupt
    BA 00 06                ; mov dx, 0x600
    ED                      ; in ax, dx
    83 F8 FF                ; cmp ax, -1                no ACPI here
    74 ~no_press            ; je no_press
    F6 C4 01                ; test ah, 1                PWRBTN_STS
    75 ~pressed             ; jnz pressed
no_press:
    E8 >read                ; call read
    A0 6C 04                ; mov al, [0x46C]
    24 FE                   ; and al, 0xFE              every second tick
    3A 06 04 7E             ; cmp al, [0x7E04]
    74 ~main                ; je main
    A2 04 7E                ; mov [0x7E04], al
    66 FF 06 00 7E          ; inc dword [0x7E00]
    66 A1 00 7E             ; mov eax, [0x7E00]
    BF =digits              ; mov di, digits
    B9 08 00                ; mov cx, 8
next_digit:
    66 C1 C0 04             ; rol eax, 4                the highest digit first
    89 C3                   ; mov bx, ax
    83 E3 0F                ; and bx, 0x0F
    8A 9F =hex              ; mov bl, [bx + hex]
    88 1D                   ; mov [di], bl
    47                      ; inc di
    E2 ~next_digit          ; loop next_digit
    BE =line                ; mov si, line
    E8 >print               ; call print
    EB ~main                ; jmp main

pressed:
    EF                      ; out dx, ax                clear PWRBTN_STS
    BE =power_button        ; mov si, power_button
    EB ~power_off           ; jmp power_off
leave:
    BE =bye                 ; mov si, bye
power_off:
    E8 >print               ; call print
    BA 04 06                ; mov dx, 0x604
    B8 00 20                ; mov ax, 0x2000            SLP_EN, SLP_TYP 0
    EF                      ; out dx, ax
    EB ~halt                ; jmp halt
reset:
    B0 FE                   ; mov al, 0xFE
    E6 64                   ; out 0x64, al
halt:
    FA                      ; cli
    F4                      ; hlt
    EB ~halt                ; jmp halt

read:                       ; what COM1 received
    B9 10 00                ; mov cx, 16                one FIFO at most, so that ticks go on in a flood
next_byte:
    BA FD 03                ; mov dx, 0x3FD
    EC                      ; in al, dx
    3C FF                   ; cmp al, 0xFF              no UART here
    74 ~read_done           ; je read_done
    A8 01                   ; test al, 1                data ready
    74 ~read_done           ; jz read_done
    BA F8 03                ; mov dx, 0x3F8
    EC                      ; in al, dx
    3C ?power_off_key       ; cmp al, 's'
    74 ~leave               ; je leave
    3C ?reset_key           ; cmp al, 'r'
    74 ~reset               ; je reset
    3C ?ignore_key          ; cmp al, 'i'
    74 ~ignore              ; je ignore
    E8 >put                 ; call put
    E2 ~next_byte           ; loop next_byte
read_done:
    C3                      ; ret
ignore:
    31 C0                   ; xor ax, ax
    BA 02 06                ; mov dx, 0x602
    EF                      ; out dx, ax                no PWRBTN_EN
    BE =ignoring            ; mov si, ignoring          and on into print

print:                      ; the text at si up to its zero byte; gives up where put does
    AC                      ; lodsb
    84 C0                   ; test al, al
    74 ~print_done          ; jz print_done
    E8 >put                 ; call put
    75 ~print               ; jnz print
print_done:
    C3                      ; ret

put:                        ; al to COM1, keeping cx and si; zero flag set: the UART stayed full, the byte is lost
    51                      ; push cx
    50                      ; push ax
    B9 00 04                ; mov cx, 0x400             reads of 1 us: ten times what a byte takes at 115200 baud
    BA FD 03                ; mov dx, 0x3FD
full:
    EC                      ; in al, dx
    A8 20                   ; test al, 0x20             transmitter empty
    E1 ~full                ; loopz full
    58                      ; pop ax
    74 ~put_done            ; jz put_done
    BA F8 03                ; mov dx, 0x3F8
    EE                      ; out dx, al
put_done:
    59                      ; pop cx
    C3                      ; ret
"""

_DATA: Final = {
    "banner": BANNER + b"\0",
    "power_button": POWER_BUTTON_MESSAGE + b"\0",
    "bye": BYE_MESSAGE + b"\0",
    "ignoring": IGNORING_MESSAGE + b"\0",
    "hex": b"0123456789abcdef",
    "line": TICK_PREFIX,
    "digits": b"00000000\r\n\0",
}
_KEYS: Final = {"power_off_key": POWER_OFF_KEY, "reset_key": RESET_KEY, "ignore_key": IGNORE_KEY}


def boot_sector() -> bytes:
    """The guest: exactly 512 bytes, always the same, ending in the boot signature."""
    code = assemble(_LISTING, _DATA, _KEYS, _ORIGIN)
    if len(code) > _CODE_LIMIT_BYTES:
        raise ValueError(f"the tiny guest has {len(code)} bytes, {_CODE_LIMIT_BYTES} fit")
    return code.ljust(SECTOR_BYTES - len(_SIGNATURE), b"\0") + _SIGNATURE


def write_disk(path: Path, size_bytes: int = 1024 * 1024) -> None:
    """Write a raw disk image that boots the guest: the sector, then zeros (sparse) up to ``size_bytes``.

    A file that is already at ``path`` is replaced by the new content, so it must not be the disk of a running guest.
    Raises ValueError, before touching the file, unless ``size_bytes`` is a positive multiple of 512, and OSError if the
    file cannot be written; what it then contains is undefined.
    """
    if size_bytes <= 0 or size_bytes % SECTOR_BYTES:
        raise ValueError(f"size_bytes is {size_bytes}: a disk is a positive multiple of {SECTOR_BYTES} bytes")
    with path.open("wb") as disk:
        disk.write(boot_sector())
        disk.truncate(size_bytes)


def assemble(listing: str, data: Mapping[str, bytes], constants: Mapping[str, bytes], origin: int) -> bytes:
    """Machine code of ``listing`` followed by ``data``, for loading at the address ``origin``.

    The words of a line, up to its semicolon, are: a byte in hex (``F4``), a label (``main:``), the address of a label
    in two bytes (``=main``), the distance to it in two bytes (``>main``) or in one (``~main``), or the byte of a
    constant (``?key``). Every name in ``data`` is a label too. Raises ValueError naming the word it cannot assemble.
    """
    words = [word for line in listing.splitlines() for word in line.partition(";")[0].split()]
    for name, content in data.items():
        words += [f"{name}:", *(f"{byte:02X}" for byte in content)]
    labels = _labels(words, origin)
    code = b""
    for word in words:
        if not word.endswith(":"):
            code += _encode(word, origin + len(code), labels, constants)
    return code


def _labels(words: list[str], origin: int) -> dict[str, int]:
    labels: dict[str, int] = {}
    address = origin
    for word in words:
        if not word.endswith(":"):
            address += 2 if word[0] in "=>" else 1
        elif labels.setdefault(word[:-1], address) != address:
            raise ValueError(f"the label {word[:-1]!r} stands in two places")
    return labels


def _encode(word: str, address: int, labels: Mapping[str, int], constants: Mapping[str, bytes]) -> bytes:
    kind, name = word[0], word[1:]
    try:
        if kind == "=":
            return labels[name].to_bytes(2, "little")
        if kind == ">":  # a distance counts from the end of the instruction, and the word is its last part
            return (labels[name] - address - 2).to_bytes(2, "little", signed=True)
        if kind == "~":
            return (labels[name] - address - 1).to_bytes(1, "little", signed=True)
        return constants[name] if kind == "?" else int(word, 16).to_bytes(1, "little")
    except KeyError:
        raise ValueError(f"{word!r} names a label or constant that is not there") from None
    except OverflowError:
        raise ValueError(f"{word!r} does not fit: too far away, or more than a byte") from None
    except ValueError:
        raise ValueError(f"{word!r} is neither a byte in hex nor a reference") from None


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: {Path(sys.executable).name} -m worker.kvm.tiny_guest DISK   (writes the guest there)")
    if Path(sys.argv[1]).exists():
        sys.exit(f"{sys.argv[1]} exists already; nothing was done")
    write_disk(Path(sys.argv[1]))

"""A full Linux guest for the node tests: Debian's cloud kernel, and a busybox initrd that we pack ourselves.

Nothing is installed on the host: the packages are downloaded by apt, verified by it, and unpacked into a cache folder.
The guest works with or without disks and NICs (virtio and IDE). On COM1 it prints :data:`LINUX_READY`, then
``linux tick N`` each second, and offers a root shell. The ACPI power button makes it power off.
"""

import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

LINUX_READY = b"linux guest ready"
LINUX_TICK = b"linux tick "
LINUX_ARGUMENTS = "console=ttyS0 quiet"
LINUX_MEMORY_MIB = 96  # boots in 80 with a virtio disk; the rest is for the tests' own commands

_KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
_MODULES = (
    *("button", "evdev", "virtio_pci", "virtio_blk", "virtio_net", "virtio_scsi", "ata_piix", "sd_mod"),
    *("sr_mod", "isofs", "virtio_balloon"),
)
_APT_TIMEOUT_S = 300
_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do insmod "/modules/$module.ko"; done
acpid -d >/dev/null 2>&1 &
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty rows 24 cols 80
echo {LINUX_READY.decode()}
(n=0; while true; do n=$((n + 1)); echo "{LINUX_TICK.decode()}$n"; sleep 1; done) &
while true; do setsid -c sh; sleep 1; done
"""
# busybox's acpid runs this file, below /etc/acpi, when a power button is pressed
_POWER_BUTTON_ACTION = "etc/acpi/PWRF/00000080"
_POWER_OFF = "#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n"


@dataclass(frozen=True)
class LinuxGuest:
    """The two files QEMU boots (``-kernel``, ``-initrd``); use them with :data:`LINUX_ARGUMENTS`."""

    kernel: Path
    initrd: Path


@dataclass(frozen=True)
class Entry:
    """A file of an initrd: its path, its type and permissions as ``st_mode`` has them, and what is in it."""

    path: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def default_cache_dir() -> Path:
    """Where built guests are kept from one test run to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hostler-tests"


def linux_guest(cache_dir: Path | None = None) -> LinuxGuest:
    """The guest's files, from the cache if they are there, else downloaded (about 30 MB) and built.

    A guest stays cached, with the kernel of its day, until its recipe here changes or the folder is deleted. Safe to
    call from several processes. Where apt cannot deliver, the test is skipped, or failed if ``CI=true``, and nothing
    half-built stays behind.
    """
    cache = cache_dir or default_cache_dir()
    home = cache / f"linux-{_recipe_digest()}"
    if not home.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as folder:
            _build(Path(folder))
            _publish(Path(folder, "guest"), home)
    return LinuxGuest(kernel=home / "vmlinuz", initrd=home / "initrd.cpio")


def cpio_archive(entries: list[Entry]) -> bytes:
    """``entries`` in the "newc" format of the kernel's initramfs buffer documentation; same entries, same bytes."""
    members = [*entries, Entry("TRAILER!!!", 0)]
    return b"".join(_cpio_member(number, entry) for number, entry in enumerate(members, start=1))


def _cpio_member(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _recipe_digest() -> str:
    recipe = "\0".join((_KERNEL_METAPACKAGE, *_MODULES, _INIT, _POWER_BUTTON_ACTION, _POWER_OFF))
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def _publish(built: Path, home: Path) -> None:
    try:
        built.rename(home)
    except OSError:
        if not home.is_dir():  # else another process was first, with the same guest
            raise


def _build(folder: Path) -> None:
    root, guest = folder / "root", folder / "guest"
    _unpack(_kernel_package(), folder, root)
    guest.mkdir()
    (kernel,) = root.glob("boot/vmlinuz-*")
    shutil.copyfile(kernel, guest / "vmlinuz")
    (guest / "initrd.cpio").write_bytes(cpio_archive(list(_initrd_entries(root, _static_busybox(folder)))))


def _initrd_entries(root: Path, busybox: bytes) -> Iterator[Entry]:
    for path in ("bin", "dev", "proc", "sys", "tmp", "modules", "etc", "etc/acpi", "etc/acpi/PWRF", "var", "var/run"):
        yield Entry(path, stat.S_IFDIR | 0o755)
    yield Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    yield Entry("init", stat.S_IFREG | 0o755, _INIT.encode())
    yield Entry("bin/busybox", stat.S_IFREG | 0o755, busybox)
    yield Entry(_POWER_BUTTON_ACTION, stat.S_IFREG | 0o755, _POWER_OFF.encode())
    modules = _modules_in_load_order(root)
    for name, content in modules.items():
        yield Entry(f"modules/{name}.ko", stat.S_IFREG | 0o644, content)
    yield Entry("modules/order", stat.S_IFREG | 0o644, "\n".join(modules).encode())


def _modules_in_load_order(root: Path) -> dict[str, bytes]:
    files = {path.name.partition(".")[0].replace("-", "_"): path for path in root.rglob("*.ko*")}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or name not in files:  # what has no file is built into the kernel
            return
        content = _module_content(files[name])
        for dependency in _module_dependencies(content):
            load(dependency)
        loaded[name] = content

    for name in _MODULES:
        load(name)
    return loaded


def _module_content(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def _module_dependencies(content: bytes) -> list[str]:
    # a module's .modinfo section is a row of key=value texts; depmod's files are only made when a package is installed
    found = re.search(rb"\0depends=([^\0]*)\0", content)
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []


def _static_busybox(folder: Path) -> bytes:
    found = shutil.which("busybox")
    if found:
        content = Path(found).read_bytes()
        if b"/lib64/ld-linux" not in content:  # a dynamically linked one would need its libraries in the initrd
            return content
    root = folder / "busybox"
    _unpack("busybox-static", folder, root)
    return next(root.rglob("bin/busybox")).read_bytes()


def _kernel_package() -> str:
    found = re.search(r"Depends: (linux-image-\S+)", _run("apt-cache", "depends", _KERNEL_METAPACKAGE))
    if not found:
        _unavailable(f"apt knows no package that {_KERNEL_METAPACKAGE} depends on")
    return found[1]


def _unpack(package: str, folder: Path, root: Path) -> None:
    _run("apt-get", "download", package, cwd=folder)
    archives = list(folder.glob(f"{package}_*.deb"))
    if len(archives) != 1:
        _unavailable(f"apt-get download {package} left {len(archives)} packages")
    _run("dpkg-deb", "-x", str(archives[0]), str(root))


def _run(*command: str, cwd: Path | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_APT_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        _unavailable(str(error))
    if done.returncode:
        _unavailable(f"{' '.join(command)} exited with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _unavailable(reason: str) -> NoReturn:
    message = f"the Linux guest cannot be built: {reason}. It needs Debian with fresh package lists (apt-get update)"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)

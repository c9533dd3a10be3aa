"""A Linux host of its own for a test: Debian's kernel, with our Python, tree, QEMU and Redis in its memory.

For what the machine that runs the tests may not have, such as control groups of version 2 with all controllers. Nothing
is mounted from outside: the files are packed into an archive behind the Linux guest's own (tests/guests.py), and the
kernel unpacks both (initramfs buffer format of its documentation).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from tests.guests import linux_guest
from tests.services import missing

ROOT = Path(__file__).parents[1]
MEMORY_MIB = 1536
SAID, ENDED = "linux host: ", "linux host ended: "
SYSTEMD = Path("/usr/lib/systemd/systemd")
PROGRAMS = ("qemu-system-x86_64", "redis-server", "busybox")
FIRMWARE = ("/usr/share/seabios", "/usr/share/qemu", "/usr/lib/ipxe/qemu", "/usr/lib/x86_64-linux-gnu/qemu")
NOT_NEEDED = re.compile(
    r"/(test|tests|idlelib|tkinter|ensurepip|lib2to3|turtledemo|config-[^/]*|numpy[^/]*|matplotlib|mpl_toolkits|PIL|"
    r"pillow[^/]*|fontTools|mypy|mypyc|hypothesis|pip|ruff|grimp|hatchling|flower|tornado|contourpy|kiwisolver|"
    r"setuptools|pkg_resources|site-packages/bin|[^/]*__mypyc[^/]*|skiboot.lid)$"
)
TOP_LINKS = {Path("/lib"), Path("/lib64")}
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /dev/pts /run /tmp
mount -t tmpfs tmpfs /run
ip link set lo up
exec {first}
"""
_MAIN = """#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
cd {root}
{python} -m {module} >/dev/ttyS0 2>&1
echo "{ended}$?" >/dev/ttyS0
poweroff -f
"""
_UNIT = """[Unit]
DefaultDependencies=no
[Service]
ExecStart=/main
"""


def run(module: str, folder: Path, timeout_s: float, *, systemd: bool = False) -> list[str]:
    """Boot a host whose only program is ``python -m MODULE``, and return what that printed.

    With ``systemd`` that is a service of the host's systemd, which is the one of the machine that runs the test.
    Raises AssertionError with it when the program failed, or the host was not done in time; no host is left then.
    """
    host = linux_guest()
    initrd, said = folder / "host.cpio", folder / "host.log"
    shutil.copyfile(host.initrd, initrd)
    _pack(initrd, folder, module, systemd)
    machine = ["-machine", "pc", "-cpu", "max", "-m", str(MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot"]
    boot = ["-kernel", str(host.kernel), "-initrd", str(initrd), "-append", "console=ttyS0 quiet cgroup_no_v1=all"]
    argv = [shutil.which(PROGRAMS[0]) or PROGRAMS[0], *machine, *boot, "-serial", f"file:{said}", "-accel", "tcg"]
    with suppress(subprocess.TimeoutExpired):  # what it has said tells how far it came
        subprocess.run(argv, check=True, timeout=timeout_s, capture_output=True)
    initrd.unlink()
    lines = said.read_text(errors="replace").splitlines()
    assert f"{ENDED}0" in lines, "\n".join(lines)
    return [line.removeprefix(SAID) for line in lines if line.startswith(SAID)]


def _pack(initrd: Path, folder: Path, module: str, systemd: bool) -> None:
    first = f"{SYSTEMD} --unit=main.service --log-target=console --log-level=warning" if systemd else "/main"
    python = Path(sys.prefix) / "bin" / "python"
    texts = {
        "init": _INIT.format(first=first),
        "main": _MAIN.format(root=ROOT, python=python, module=module, ended=ENDED),
        "etc/systemd/system/main.service": _UNIT,
    }
    own = folder / "own"
    for name, text in texts.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(text)
        (own / name).chmod(0o755)
    with initrd.open("ab") as archive:
        archive.write(bytes(-archive.tell() % 512))
        archive.flush()
        _append(archive.fileno(), Path("/"), _files(systemd))
        _append(archive.fileno(), own, sorted(own.rglob("*")))


def _append(archive: int, root: Path, paths: Iterable[Path]) -> None:
    """Modification times are kept: Python believes its compiled files by them."""
    names = "".join(f"{path.relative_to(root)}\n" for path in paths)
    busybox = shutil.which("busybox") or missing("busybox", "install busybox-static")
    subprocess.run([str(busybox), "cpio", "-o", "-H", "newc"], cwd=root, input=names.encode(), stdout=archive,
                   stderr=subprocess.DEVNULL, check=True)  # fmt: skip


def _files(systemd: bool) -> list[Path]:
    """Everything that the host needs, each folder before what is in it."""
    found = {*_trees(), *_programs((*PROGRAMS, SYSTEMD, "systemd-run") if systemd else PROGRAMS)}
    found |= {library for path in [*found] if _is_elf(path) for library in _libraries(path)}
    found |= {step for path in [*found] for step in _links(path)}
    real = {path.parent.resolve() / path.name for path in found} | TOP_LINKS
    return sorted({folder for path in real for folder in (path, *path.parents) if folder != Path("/")})


def _trees() -> Iterator[Path]:
    ours = [ROOT / name for name in ("hostler", "worker", "tasks", "models", "migrations", "tests", "pyproject.toml")]
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    kept = {ROOT / "tests"}
    for top in [library, packages, Path(sys.prefix, "pyvenv.cfg"), *ours, *map(Path, FIRMWARE)]:
        for folder, folders, files in os.walk(top):
            here = Path(folder)
            folders[:] = [name for name in folders if not NOT_NEEDED.search(str(here / name)) or here / name in kept]
            if here == library:
                folders[:] = [name for name in folders if name != "site-packages"]
            yield from (here / name for name in files if not NOT_NEEDED.search(str(here / name)))
        if top.is_file():
            yield top


def _programs(names: Iterable[str | Path]) -> Iterator[Path]:
    yield Path(sys.prefix, "bin", "python")
    for name in names:
        yield Path(shutil.which(name) or missing(str(name), "is not installed"))


def _links(path: Path) -> Iterator[Path]:
    """A link's way to what it means."""
    while path.is_symlink():
        path = Path(os.path.normpath(path.parent / path.readlink()))
        yield path


def _is_elf(path: Path) -> bool:
    if not path.is_file() or not (os.access(path, os.X_OK) or ".so" in path.name):
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _libraries(path: Path) -> Iterator[Path]:
    said = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False).stdout
    yield from (Path(os.path.normpath(name)) for name in re.findall(r"(/\S+) \(0x", said))

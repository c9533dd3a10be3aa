"""What was found where nothing should be, put aside as an archive: no file in it has an owner or acts any more."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

PART_MAX_BYTES = 64 * 2**20
"""As much is kept of one file; a file may say that it is larger than any disk."""


def put_aside(folder: Path, archive: Path) -> bool:
    """Archive what is in ``folder`` at ``archive``; False where there is nothing. Raises OSError: no archive then.

    Links, devices and pipes are kept as what they are; none is opened.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    archive.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = archive.with_suffix(".part")
    try:
        with os.fdopen(_create(unfinished), "wb") as opened:
            with tarfile.open(fileobj=opened, mode="w") as tar:
                for parent, folders, files in os.walk(folder):
                    for name in sorted((*folders, *files)):
                        _add(tar, Path(parent, name), str(Path(parent, name).relative_to(folder)))
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(archive)
    finally:
        unfinished.unlink(missing_ok=True)
    return True


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    info = tar.gettarinfo(str(path), arcname=name)
    if info is None:  # a socket, of which there is nothing to keep
        return
    if not info.isreg():
        tar.addfile(info)
        return
    if info.size > PART_MAX_BYTES:
        info.pax_headers = {"HOSTLER.size": str(info.size)}
        info.size = PART_MAX_BYTES
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as opened:
        tar.addfile(info, opened)

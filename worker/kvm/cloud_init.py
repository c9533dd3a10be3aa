"""The seed of a guest: a CD image from which cloud-init learns, at the first boot, who it is (data source NoCloud)."""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path

from hostler.hvparams import HvParams
from hostler.payloads import Instance
from worker.errors import QemuFailed

LABEL = "cidata"
"""By this name of the volume cloud-init knows its seed."""
USER_DATA_MAX_BYTES = 2**20
"""Of a file of user data; cloud-init reads all of it into memory, and so does the worker."""


def write_seed(instance: Instance, path: Path) -> None:
    """Make the seed at ``path``, mode 0600. Raises QemuFailed; then a part of it may lie in the guest's folder."""
    image = _image(seed_files(instance))
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(image)
    except OSError as exc:
        raise QemuFailed(f"the seed for cloud-init cannot be written to {path}: {exc.strerror}") from exc


def seed_files(instance: Instance) -> dict[str, bytes]:
    """The seed's files by name. Raises QemuFailed where the user data cannot be read.

    The instance-id is the instance's name: a guest that is stopped and started, or moved, is the same to cloud-init,
    and a copy of its disk under another name is another, whose first boot it is.
    """
    hvparams = instance.hvparams
    meta_data = {"instance-id": instance.name, "local-hostname": instance.name} | hvparams.cloud_init_meta_data
    files = {
        "user-data": user_data(hvparams),
        "meta-data": json.dumps(meta_data, ensure_ascii=False).encode(),  # JSON is YAML
    }
    if hvparams.cloud_init_network_config:
        files["network-config"] = hvparams.cloud_init_network_config.encode()
    return files


def user_data(hvparams: HvParams) -> bytes:
    """The user data, inline or of their file. Raises QemuFailed, which never says what is in the file."""
    if not hvparams.cloud_init_user_data_path:
        return hvparams.cloud_init_user_data.encode()
    path = Path(hvparams.cloud_init_user_data_path)
    try:
        with path.open("rb") as file:
            content = file.read(USER_DATA_MAX_BYTES + 1)
    except OSError as exc:
        raise QemuFailed(f"Failed to open user data {path}: {exc.strerror}") from exc
    if len(content) > USER_DATA_MAX_BYTES:
        raise QemuFailed(f"user data {path} are longer than {USER_DATA_MAX_BYTES} bytes")
    return content


def _image(files: dict[str, bytes]) -> bytes:
    import pycdlib  # a tenth of a second and some megabytes, for the guests that have a seed

    iso, image = pycdlib.PyCdlib(), BytesIO()
    # Rock Ridge has the names as they are for Linux, Joliet for the others; plain ISO 9660 has capitals and no hyphen.
    iso.new(interchange_level=3, vol_ident=LABEL, rock_ridge="1.09", joliet=3)
    for number, (name, content) in enumerate(files.items()):
        iso.add_fp(BytesIO(content), len(content), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
    iso.write_fp(image)
    iso.close()
    return image.getvalue()

"""The seed as a file. That Linux reads it: tests/node/test_cloud_init.py."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pycdlib
import pytest
import yaml

from hostler.payloads import Instance
from worker.errors import QemuFailed
from worker.kvm.cloud_init import seed_files, write_seed


def guest(**hvparams: Any) -> Instance:
    return Instance.model_validate({"name": "web1.example.org", "memory_mib": 16, "hvparams": hvparams})


@pytest.mark.parametrize("names", ["rr_path", "joliet_path"])
def test_a_seed_has_its_files_under_their_names_for_every_system(tmp_path: Path, names: str) -> None:
    wanted = guest(cloud_init_user_data="#!/bin/sh\n" * 5000, cloud_init_network_config="version: 2\n")
    write_seed(wanted, tmp_path / "seed.iso")
    iso = pycdlib.PyCdlib()
    iso.open(str(tmp_path / "seed.iso"))
    for name, content in seed_files(wanted).items():
        read = BytesIO()
        iso.get_file_from_iso_fp(read, **{names: f"/{name}"})
        assert read.getvalue() == content
    iso.close()
    assert (tmp_path / "seed.iso").stat().st_mode & 0o777 == 0o600


def test_who_the_guest_is_can_be_added_to_and_read_as_yaml() -> None:
    meta_data = yaml.safe_load(
        seed_files(guest(cloud_init_meta_data={"keys": ["ß", "\N{GRINNING FACE}"]}))["meta-data"]
    )
    assert meta_data["keys"] == ["ß", "\N{GRINNING FACE}"]
    assert meta_data["instance-id"] == meta_data["local-hostname"] == "web1.example.org"
    changed = yaml.safe_load(seed_files(guest(cloud_init_meta_data={"instance-id": "i-7"}))["meta-data"])
    assert changed == {"instance-id": "i-7", "local-hostname": "web1.example.org"}


def test_without_user_data_the_file_is_there_and_empty(tmp_path: Path) -> None:
    wanted = guest(cloud_init_meta_data={"a": 1})
    assert seed_files(wanted)["user-data"] == b""
    write_seed(wanted, tmp_path / "seed.iso")


def test_a_seed_that_cannot_be_written_or_read_fails_without_its_content(tmp_path: Path) -> None:
    with pytest.raises(QemuFailed, match="cannot be written") as failed:
        write_seed(guest(cloud_init_user_data="geheim"), tmp_path / "no" / "seed.iso")
    assert "geheim" not in str(failed.value)
    with pytest.raises(QemuFailed, match="Failed to open user data /no/file"):
        seed_files(guest(cloud_init_user_data_path="/no/file"))

"""node.info: facts of /proc and /sys, of this host and of hosts described in a folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hostler import __version__
from hostler.settings import Settings
from migrations import schema
from models import Database, Instance, Node
from worker.kvm.accelerator import KvmProbe
from worker.operations import node_facts
from worker.operations.context import NodeContext

QEMU = shutil.which("true") or "/bin/true"
"""A program that is no QEMU."""


def node_of(database: Database, folder: Path, **settings: Any) -> NodeContext:
    folders = {"state_dir": folder, "run_dir": folder / "gone"}  # of any length: no socket is made
    return NodeContext(Settings(node="n1", **settings).model_copy(update=folders), database, "unused", None)  # type: ignore[arg-type]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_is_in_mib_and_free_is_what_only_caches(tmp_path: Path) -> None:
    kib = {"MemTotal": 8192, "MemFree": 1024, "MemAvailable": 4096, "Buffers": 512, "Cached": 1536, "Active": 3072}
    lines = [f"{name}:  {number} kB" for name, number in kib.items()]
    write(tmp_path / "meminfo", "\n".join([*lines, "Active(anon): 7 kB", "HugePages_Total:  3", ""]))
    assert node_facts.memory(tmp_path) == {
        "memory_total_mib": 8, "memory_free_mib": 3, "memory_available_mib": 4, "memory_active_mib": 3,
    }  # fmt: skip


def test_each_numa_node_has_its_memory_and_processors_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, cpus in ((10, "8-15"), (2, "0-7\n")):
        folder = tmp_path / f"devices/system/node/node{number}"
        lines = {"MemTotal": 2048 * number, "MemFree": 1024, "FilePages": 1024}
        write(folder / "meminfo", "".join(f"Node {number} {name}:   {kib} kB\n" for name, kib in lines.items()))
        write(folder / "cpulist", cpus)
    (tmp_path / "devices/system/node/possible").touch()
    assert node_facts.numa_nodes(tmp_path) == [
        {"node": 2, "memory_total_mib": 4, "memory_free_mib": 2, "cpus": "0-7"},
        {"node": 10, "memory_total_mib": 20, "memory_free_mib": 2, "cpus": "8-15"},
    ]
    assert node_facts.processors(tmp_path)["cpu_nodes"] == 2


def test_sockets_are_counted_by_their_ids(tmp_path: Path) -> None:
    for number, package in enumerate((0, 1, 0, 1)):
        write(tmp_path / f"devices/system/cpu/cpu{number}/topology/physical_package_id", f"{package}\n")
    assert node_facts.processors(tmp_path)["cpu_sockets"] == 2


def test_hugepages_of_each_size_are_told_the_smaller_first(tmp_path: Path) -> None:
    for size_kib, total, free in ((1048576, 2, 1), (2048, 512, 100)):
        folder = tmp_path / f"kernel/mm/hugepages/hugepages-{size_kib}kB"
        write(folder / "nr_hugepages", f"{total}\n")
        write(folder / "free_hugepages", f"{free}\n")
    assert node_facts.hugepages(tmp_path) == [
        {"size_kib": 2048, "total": 512, "free": 100}, {"size_kib": 1048576, "total": 2, "free": 1},
    ]  # fmt: skip


def test_a_kernel_without_numa_and_hugepages_has_one_node_and_none(tmp_path: Path) -> None:
    assert (node_facts.numa_nodes(tmp_path), node_facts.hugepages(tmp_path)) == ([], [])
    assert node_facts.processors(tmp_path) == {"cpu_total": os.cpu_count(), "cpu_sockets": 1, "cpu_nodes": 1}


def test_a_host_without_a_working_qemu_still_tells_all_else(database: Database, tmp_path: Path) -> None:
    with database.transaction() as session:
        session.add(Node(name="n1"))
        session.flush()
        session.add_all(
            Instance(name=name, node="n1", state=state, spec={})
            for name, state in (("a", "running"), ("b", "running"), ("c", "crashed"))
        )
    facts = node_facts.node_info(node_of(database, tmp_path, qemu_binary=QEMU))
    assert "does not work as QEMU" in facts["qemu_problem"]
    assert (facts["qemu_version"], facts["accelerator"], facts["kvm_works"]) == (None, None, False)
    assert facts["instances"] == {"running": 2, "crashed": 1}
    assert facts["worker_version"] == __version__
    assert facts["state_dir_free_mib"] <= facts["state_dir_total_mib"]
    assert facts["run_dir"] == f"{tmp_path}/gone" and facts["run_dir_free_mib"] is None
    assert 0 < facts["memory_free_mib"] <= facts["memory_total_mib"]
    missing = node_facts.node_info(node_of(database, tmp_path, qemu_binary="/no/such/qemu"))
    assert "/no/such/qemu" in missing["qemu_problem"] and missing["qemu_binary"] is None


@pytest.mark.parametrize(("works", "accelerator"), [(True, "kvm"), (False, "tcg")])
def test_the_accelerator_is_told_with_its_reason(
    works: bool, accelerator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NodeContext, "features", lambda self: type("Features", (), {"version_text": "7.2.0"}))
    monkeypatch.setattr(NodeContext, "kvm", lambda self: KvmProbe(works, "seen with my own eyes"))
    database = Database(f"sqlite+pysqlite:///{tmp_path / 'hostler.sqlite'}")
    schema.upgrade(database)
    facts = node_facts.node_info(node_of(database, tmp_path, qemu_binary=QEMU))
    database.dispose()
    assert (facts["accelerator"], facts["kvm_works"]) == (accelerator, works)
    assert "seen with my own eyes" in facts["accelerator_reason"]
    assert (facts["qemu_version"], facts["qemu_binary"], facts["qemu_problem"]) == ("7.2.0", QEMU, None)

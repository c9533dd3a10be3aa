"""Both wheels, built as a release is: what is in them, and that the client needs nothing of the node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import hostler

ROOT = Path(__file__).parents[2]
NODE_PACKAGES = ("hostler", "worker", "tasks", "models", "migrations")


def build(project: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(project)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = target.glob("*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def files_of(*packages: str) -> set[str]:
    paths = (path for package in packages for path in (ROOT / package).rglob("*") if path.is_file())
    wanted = {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}
    return wanted - {"hostler/pyproject.toml"}


@pytest.fixture(scope="session")
def client_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the folder, so that nothing above it can help."""
    alone = tmp_path_factory.mktemp("client") / "hostler"
    shutil.copytree(ROOT / "hostler", alone, ignore=shutil.ignore_patterns("__pycache__"))
    return build(alone, tmp_path_factory.mktemp("client-wheel"))


@pytest.fixture(scope="session")
def node_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("node-wheel"))


@pytest.fixture(scope="session")
def client_python(client_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the client wheel and its dependencies, and without the project."""
    home = tmp_path_factory.mktemp("client-environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    query = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(query, text=True).strip())
    zipfile.ZipFile(client_wheel).extractall(site)
    # Dependencies are taken from the environment of the tests by link, each but the project itself.
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if "hostler" not in installed.name and installed.suffix != ".pth":
            (site / installed.name).symlink_to(installed)
    return python


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run([python, *arguments], cwd=python.parent, env=environment, capture_output=True, text=True)


def test_the_client_wheel_holds_the_hostler_package_alone_and_all_of_it(client_wheel: Path) -> None:
    assert contents(client_wheel) == files_of("hostler")


def test_the_node_wheel_holds_every_file_of_its_packages(node_wheel: Path) -> None:
    assert contents(node_wheel) == files_of(*NODE_PACKAGES)


def test_the_node_wheel_holds_what_is_not_python_too(node_wheel: Path) -> None:
    inside = contents(node_wheel)
    assert {"worker/network/scripts/ifup", "worker/network/scripts/ifdown", "migrations/env.py"} <= inside
    assert any(name.startswith("migrations/versions/") for name in inside)


def test_both_wheels_and_the_package_have_one_version(client_wheel: Path, node_wheel: Path) -> None:
    assert client_wheel.name.split("-")[:2] == ["hostler_client", hostler.__version__]
    assert node_wheel.name.split("-")[:2] == ["hostler", hostler.__version__]


def test_the_client_pins_what_the_node_pins_and_asks_for_nothing_else() -> None:
    node, client = (
        tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in (ROOT, ROOT / "hostler")
    )
    assert set(client["dependencies"]) < set(node["dependencies"])
    assert client["requires-python"] == node["requires-python"]
    assert client["scripts"] == node["scripts"]


def test_the_client_works_where_the_node_is_not_installed(client_python: Path) -> None:
    program = "import hostler; hostler.Client('redis://127.0.0.1:1/0').stop.job('n1', 'web1'); print(hostler.__file__)"
    done = run(client_python, "-c", program)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(client_python.parents[1])


def test_the_command_works_where_the_node_is_not_installed(client_python: Path) -> None:
    shown = run(client_python, "-m", "hostler", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "console" in shown.stdout
    refused = run(client_python, "-m", "hostler", "worker")
    assert refused.returncode == 2
    assert "part of the node distribution 'hostler'" in refused.stderr


@pytest.mark.parametrize("package", ["worker", "tasks", "models", "migrations"])
def test_the_node_packages_cannot_be_imported_beside_the_client(client_python: Path, package: str) -> None:
    done = run(client_python, "-c", f"import {package}")
    assert f"No module named '{package}'" in done.stderr


def test_the_client_imports_no_database_or_qemu_library(client_python: Path) -> None:
    program = "import sys, pkgutil, importlib, hostler\n"
    program += "for found in pkgutil.walk_packages(hostler.__path__, 'hostler.'):\n"
    program += "    found.name.endswith('__main__') or importlib.import_module(found.name)\n"
    program += "print(sorted({'sqlalchemy', 'alembic', 'psutil', 'qemu', 'structlog', 'pyroute2'} & set(sys.modules)))"
    done = run(client_python, "-c", program)
    assert done.stdout.strip() == "[]", done.stderr

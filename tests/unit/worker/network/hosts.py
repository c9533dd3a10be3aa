"""What tests of the network pretend: a host's interfaces, and programs that only write down how they are run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker.network import links


class Host:
    """A host with no interfaces and no settings but those a test gives it."""

    def __init__(self, root: Path) -> None:
        self.interfaces, self.sysctl, self.bin = root / "interfaces", root / "sysctl", root / "bin"
        for folder in (self.interfaces, self.sysctl, self.bin):
            folder.mkdir(parents=True)

    def has(self, interface: str, **files: str) -> None:
        """Give it an interface; ``__`` in a file's name is a folder."""
        (self.interfaces / interface).mkdir()
        for name, content in files.items():
            path = self.interfaces / interface / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content + "\n")

    def sets(self, name: str, value: str) -> None:
        path = self.sysctl / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value + "\n")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path / "host")
    monkeypatch.setattr(links, "INTERFACES", made.interfaces)
    monkeypatch.setattr(links, "SYSCTL", made.sysctl)
    return made


def tools(folder: Path, **answers: str) -> Path:
    """A folder of ``ip``, ``bridge``, ``ovs-vsctl`` and what has an answer; what they are told goes to ``commands``.

    An answer ``!N`` is an exit with N.
    """
    place = folder / "tools"
    place.mkdir()
    for name in {"ip", "bridge", "ovs-vsctl", *(each.replace("_", "-") for each in answers)}:
        answer = answers.get(name.replace("-", "_"), "")
        ending = f"exit {answer[1:]}" if answer.startswith("!") else f"echo '{answer}'"
        program = place / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >>{folder}/commands\n{ending}\n')
        os.chmod(program, 0o755)  # noqa: PTH101
    return place

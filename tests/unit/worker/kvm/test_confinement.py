"""How QEMU is told to give up its rights: in the words it knows, whatever its version."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hostler.payloads import Instance, parse
from worker.kvm.arguments import HostPart, build, render
from worker.kvm.command_line.options import Confinement

HOST = HostPart(uuid="u", accelerator="tcg", qmp_fd=3, monitor_fd=4)
WEB1 = parse(Instance, {"name": "web1", "memory_mib": 16})


def argv(**confinement: object) -> list[str]:
    host = replace(HOST, confinement=Confinement(**confinement))  # type: ignore[arg-type]
    return render("qemu", build(WEB1, host))


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ((), ["-runas", "20000:20000", "-chroot", "/run/a,b/chroot"]),
        (("async-teardown",), ["-runas", "20000:20000", "-chroot", "/run/a,b/chroot"]),
        (("chroot",), ["-run-with", "chroot=/run/a,,b/chroot", "-runas", "20000:20000"]),
        (("chroot", "user"), ["-run-with", "user=20000:20000,chroot=/run/a,,b/chroot"]),
    ],
)
def test_it_is_said_in_the_words_that_this_qemu_knows(known: tuple[str, ...], words: list[str]) -> None:
    given = argv(run_as="20000:20000", chroot="/run/a,b/chroot", run_with=frozenset(known))
    assert given[-len(words) :] == words


def test_what_is_not_asked_for_is_not_said() -> None:
    plain = argv(run_with=frozenset({"chroot", "user"}))
    assert not {"-run-with", "-runas", "-chroot"} & {*plain}
    assert argv(chroot="/c")[-2:] == ["-chroot", "/c"]
    assert argv(run_as="kvm")[-2:] == ["-runas", "kvm"]


def test_the_sandbox_is_always_on_and_lets_qemu_change_its_user_only_where_it_has_to() -> None:
    for confinement, word in (({}, "deny"), ({"chroot": "/c"}, "deny"), ({"run_as": "kvm"}, "allow")):
        given = argv(**confinement)
        sandbox = given[given.index("-sandbox") + 1]
        assert f"elevateprivileges={word}" in sandbox
        assert {"on", "obsolete=deny", "spawn=deny", "resourcecontrol=deny"} < {*sandbox.split(",")}

"""Migration and NBD in TLS between two real QEMUs, and who is refused."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.node.migration_peers import HOST, PORTS, Authority, Peer, peers, prepare, same, write_writer
from tests.services import missing
from worker.errors import MigrationFailed, QemuFailed
from worker.kvm import images
from worker.kvm.command_line.options import Confinement
from worker.kvm.folder import GuestFolder
from worker.kvm.live_migration import nbd, storage, tls
from worker.kvm.live_migration.nbd import Address, Tls
from worker.kvm.qmp import EventLoop

pytestmark = [pytest.mark.node, pytest.mark.usefixtures("qemu")]
SIZE = 8 * 2**20
NAME = "n2.example"
UID = 2_000_000_000 + os.getpid()
"""Of nobody else on this host."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of nodes by what is special about them."""
    root = tmp_path_factory.mktemp("x509")
    ours, theirs = Authority(root / "ours"), Authority(root / "theirs")
    made = {
        "n1": ours.issue(root / "n1"),
        "other name": ours.issue(root / "other name", server="DNS:elsewhere.example,IP:127.9.9.9"),
        "no address": ours.issue(root / "no address", server=f"DNS:{NAME}"),
        "other authority": theirs.issue(root / "other authority"),
        "expired": ours.issue(root / "expired", days=-1),
    }
    # It trusts the target's authority, and shows what another one has issued; QEMU takes it where it trusts both.
    for name, trusted in (("stranger", ["n1"]), ("half a stranger", ["n1", "other authority"])):
        shutil.copytree(made["other authority"], root / name)
        authorities = "".join((made[each] / "ca-cert.pem").read_text() for each in trusted)
        (root / name / "ca-cert.pem").write_text(authorities)
    return lambda name: root / name


@contextmanager
def pair(place: Path, loop: EventLoop, confinement: Confinement = Confinement()) -> Iterator[tuple[Peer, Peer]]:  # noqa: B008
    here, there = place / "here.img", place / "there.img"
    for path in (here, there):
        images.create(str(path), "raw", SIZE)
    write_writer(here)
    sides = [{"path": str(here)}], [{"path": str(there)}]
    with peers(loop, place, sides, confinement) as (source, target):
        source.monitor.continue_vcpus()
        yield source, target


def give(peer: Peer, folder: Path, endpoint: tls.Endpoint, uid: int | None = None) -> None:
    tls.add_credentials(peer.monitor, folder, endpoint, peer.folder, uid=uid)


def migrate(source: Peer, target: Peer, *, server_tls: bool = True, client_tls: bool = True, name: str = "") -> str:
    """The end of a migration."""
    port = prepare(source, target)
    target.ask("migrate-set-parameters", {"tls-creds": tls.CREDENTIALS if server_tls else ""})
    source.ask("migrate-set-parameters", {"tls-creds": tls.CREDENTIALS if client_tls else "", "tls-hostname": name})
    source.ask("migrate", {"uri": f"tcp:{HOST}:{port}"})
    if source.until_migration("pre-switchover", "failed") == "pre-switchover":
        if storage.mirrors(source.monitor):
            storage.finish_mirrors(source.monitor, source.changed)
        source.ask("migrate-continue", {"state": "pre-switchover"})
    return source.until_migration("completed", "failed")


def move_all(source: Peer, target: Peer, folder: Path, name: str = "") -> None:
    """Disk and guest, all in TLS."""
    found = storage.export_disks(target.monitor, {"disk0": "disk0"}, HOST, PORTS, tls.CREDENTIALS)
    address = Address(found.host, found.port, Tls(folder, name))
    storage.start_mirror(source.monitor, "disk0", "disk0", address)
    storage.follow(source.monitor, source.changed)
    assert migrate(source, target, name=name) == "completed"
    assert target.until_migration("completed", "failed") == "completed"
    storage.stop_exports(target.monitor)
    for peer in (source, target):
        tls.remove_credentials(peer.monitor)
        tls.remove_credentials(peer.monitor)
        assert not [each for each in peer.ask("qom-list", {"path": "/objects"}) if each["name"] == tls.CREDENTIALS]
        assert peer.ask("query-migrate-parameters")["tls-creds"] == ""
        assert peer.nbd_is_left() == []


@pytest.mark.parametrize(("server", "name"), [("n1", ""), ("n1", NAME), ("no address", NAME)])
def test_guest_and_disk_arrive_over_tls(
    place: Path, loop: EventLoop, certificates: Callable[[str], Path], server: str, name: str
) -> None:
    with pair(place, loop) as (source, target):
        give(target, certificates(server), "server")
        give(source, certificates("n1"), "client")
        source.until_counting()
        move_all(source, target, certificates("n1"), name)
        assert same(place / "here.img", "raw", place / "there.img", "raw")
        target.monitor.continue_vcpus()
        target.until_counting()


@pytest.mark.parametrize("chroot", [False, True], ids=["", "chroot"])
@pytest.mark.parametrize("uid", [None, UID], ids=["", "uid"])
def test_a_confined_qemu_is_lent_the_certificates_and_keeps_no_file_of_them(
    place: Path, loop: EventLoop, certificates: Callable[[str], Path], uid: int | None, chroot: bool
) -> None:
    if os.geteuid() != 0:
        missing("Another uid", "needs root")
    place.chmod(0o711)
    confinement = Confinement(f"{uid}:{uid}" if uid else "", "yes" if chroot else "")
    with pair(place, loop, confinement) as (source, target):
        give(target, certificates("n1"), "server", uid)
        give(source, certificates("n1"), "client", uid)
        for peer in (source, target):
            assert not [path for path in peer.folder.path.rglob("*") if path.name == "x509" or path.suffix == ".pem"]
            for folder in (peer.folder.path, peer.folder.chroot):
                assert not folder.exists() or stat.S_IMODE(folder.stat().st_mode) == 0o700
        source.until_counting()
        move_all(source, target, certificates("n1"))
        target.monitor.continue_vcpus()
        target.until_counting()


def test_what_may_be_missing_is_lent_where_it_is_there(certificates: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "x509"
    shutil.copytree(certificates("n1"), folder)
    guest = GuestFolder.of(tmp_path, "guest")
    guest.create()
    more = {"dh-params.pem", "ca-crl.pem"}
    for there in (set(), more):
        for name in there:
            (folder / name).write_text(name)
        with tls.lent(folder, "server", guest, os.getuid()) as seen_as:
            lent = {path.name for path in Path(seen_as).iterdir()}
        assert lent == {"ca-cert.pem", "server-cert.pem", "server-key.pem"} | there


def test_what_a_dead_worker_had_lent_is_taken_back(
    place: Path, loop: EventLoop, certificates: Callable[[str], Path]
) -> None:
    with pair(place, loop) as (source, _):
        lent = tls.lent(certificates("n1"), "client", source.folder, UID)
        seen_as = Path(lent.__enter__())
        assert {path.name for path in seen_as.iterdir()} == {"ca-cert.pem", "client-cert.pem", "client-key.pem"}
        assert {path.stat().st_uid for path in (seen_as, *seen_as.iterdir())} == {UID}
        assert {stat.S_IMODE(path.stat().st_mode) for path in seen_as.iterdir()} == {0o600}
        tls.take_back(source.folder)
        assert not seen_as.exists()
        assert stat.S_IMODE(source.folder.path.stat().st_mode) == 0o700


def refused_both(source: Peer, target: Peer, folder: Path, reason: str, client_tls: bool = True) -> None:
    """Neither guest nor disk gets through, and the guest goes on."""
    found = storage.export_disks(target.monitor, {"disk0": "disk0"}, HOST, PORTS, tls.CREDENTIALS)
    address = Address(found.host, found.port, Tls(folder) if client_tls else None)
    with pytest.raises(MigrationFailed, match=reason):
        storage.start_mirror(source.monitor, "disk0", "disk0", address)
    # What QEMU itself says, when it is asked without our looking first.
    with pytest.raises(QemuFailed):
        source.monitor.add_block_node(storage._client("mirror-disk0", "disk0", address) | {"open-timeout": 1})
    assert migrate(source, target, client_tls=client_tls) == "failed"
    assert source.nbd_is_left() == []
    assert source.monitor.status() == "running"
    source.until_counting()


def test_a_client_of_another_authority_is_refused(
    place: Path, loop: EventLoop, certificates: Callable[[str], Path]
) -> None:
    with pair(place, loop) as (source, target):
        give(target, certificates("n1"), "server")
        give(source, certificates("other authority"), "client")
        refused_both(source, target, certificates("other authority"), "TLS with the target .* failed: unable to get")
        assert target.monitor.status() == "inmigrate", "it waits on"


def test_a_client_that_trusts_the_target_and_is_not_trusted_is_refused(
    place: Path, loop: EventLoop, certificates: Callable[[str], Path]
) -> None:
    with pair(place, loop) as (source, target):
        give(target, certificates("n1"), "server")
        with pytest.raises(QemuFailed, match="issuer"):  # QEMU itself does not take what it would not trust
            give(source, certificates("stranger"), "client")
        give(source, certificates("half a stranger"), "client")
        reason = "it hung up, most likely because it does not accept the certificate in"
        refused_both(source, target, certificates("half a stranger"), reason)
        assert target.monitor.status() == "inmigrate", "it waits on"
        storage.stop_exports(target.monitor)
        found = storage.export_disks(target.monitor, {"disk0": "disk0"}, HOST, PORTS, tls.CREDENTIALS)
        assert nbd.size_of(Address(found.host, found.port, Tls(certificates("n1"))), "disk0") == SIZE


def test_a_target_of_another_name_is_refused(place: Path, loop: EventLoop, certificates: Callable[[str], Path]) -> None:
    with pair(place, loop) as (source, target):
        give(target, certificates("other name"), "server")
        give(source, certificates("n1"), "client")
        refused_both(source, target, certificates("n1"), "IP address mismatch")
        assert target.process.wait(30), "for it, a guest had begun to come in"


def test_a_client_in_clear_text_is_refused(place: Path, loop: EventLoop, certificates: Callable[[str], Path]) -> None:
    with pair(place, loop) as (source, target):
        give(target, certificates("n1"), "server")
        refused_both(source, target, certificates("n1"), "it serves its disks in TLS only", client_tls=False)
        assert target.monitor.status() == "inmigrate", "it waits on"


def test_a_target_in_clear_text_is_refused(place: Path, loop: EventLoop, certificates: Callable[[str], Path]) -> None:
    with pair(place, loop) as (source, target):
        give(source, certificates("n1"), "client")
        found = storage.export_disks(target.monitor, {"disk0": "disk0"}, HOST, PORTS)
        address = Address(found.host, found.port, Tls(certificates("n1")))
        with pytest.raises(MigrationFailed, match="it serves its disks otherwise: in clear text"):
            storage.start_mirror(source.monitor, "disk0", "disk0", address)
        assert migrate(source, target, server_tls=False) == "failed"
        assert source.monitor.status() == "running"


def test_certificates_that_cannot_be_used_are_refused_and_none_are_kept(
    place: Path, loop: EventLoop, certificates: Callable[[str], Path]
) -> None:
    with pair(place, loop) as (source, _):
        give(source, certificates("n1"), "client")
        with pytest.raises(QemuFailed, match="expired"):
            give(source, certificates("expired"), "client")
        assert tls.CREDENTIALS not in {each["name"] for each in source.ask("qom-list", {"path": "/objects"})}


def test_a_folder_is_judged_before_it_is_used(certificates: Callable[[str], Path], tmp_path: Path) -> None:
    for good in ("n1", "other authority", "no address"):
        assert tls.check_folder(certificates(good)) == []
    (expired,) = tls.check_folder(certificates("expired"))
    assert expired.endswith("-cert.pem is refused by the other side: certificate has expired")
    (stranger,) = tls.check_folder(certificates("stranger"))
    assert "is refused by the other side: unable to get local issuer certificate" in stranger
    folder = tmp_path / "x509"
    shutil.copytree(certificates("n1"), folder)
    shutil.copy(certificates("other authority") / "client-key.pem", folder)
    (mismatch,) = tls.check_folder(folder)
    assert "the client's files cannot be used: KEY_VALUES_MISMATCH" in mismatch
    (folder / "server-key.pem").chmod(0o604)
    (folder / "ca-cert.pem").unlink()
    missing_file, open_key = tls.check_folder(folder)
    assert missing_file == f"{folder}/ca-cert.pem is missing"
    assert open_key == f"{folder}/server-key.pem is open to everybody (mode 0604); chmod o= it"
    assert len(tls.check_folder(tmp_path / "nowhere")) == len(tls.FILES)

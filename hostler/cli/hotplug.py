"""Commands that change a running guest: its disks, CDs, cards, memory, and its display's password."""

from __future__ import annotations

from typing import Any, Literal

import click

from hostler.cli.instances import send_and_show
from hostler.cli.options import JobOptions, examples, job_options, node_option

let_go_option = click.option(
    "--guest-timeout",
    "guest_timeout_s",
    type=float,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the guest may take. One that does not react keeps what it has, and the job fails.",
)


@click.group(
    "disk",
    epilog=examples(
        "hostler disk add web1 /srv/web1-data.raw",
        "hostler disk resize web1 /srv/web1-data.raw 20480",
        "hostler disk remove web1 /srv/web1-data.raw --json",
    ),
)
def disk_command() -> None:
    """Change the disks of a running guest.

    Its next QEMU has them too, each where the guest knows it.
    """


@disk_command.command(
    "add",
    epilog=examples(
        "hostler disk add web1 /srv/web1-data.raw", "hostler disk add web1 /srv/tools.qcow2 --format qcow2 --ro"
    ),
)
@click.argument("name")
@click.argument("path")
@click.option("--ro", "read_only", is_flag=True, help="The guest cannot write to it.")
@click.option("--shared", is_flag=True, help="Other instances may open it too; every one of them has to say so.")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["raw", "qcow2"]),
    default="raw",
    show_default=True,
    help="Its format.",
)
@node_option
@job_options
def add_disk(
    *, name: str, path: str, read_only: bool, shared: bool, image_format: str, node: str, options: JobOptions
) -> None:
    """Plug the file or block device PATH of the node into the instance NAME, as its last disk."""
    disk = {"path": path, "mode": "ro" if read_only else "rw", "shared": shared, "format": image_format}
    send_and_show(lambda client: client.disk_add.job(node, name, disk, job_id=options.job_id), options)


@disk_command.command("remove", epilog=examples("hostler disk remove web1 /srv/web1-data.raw"))
@click.argument("name")
@click.argument("path")
@let_go_option
@node_option
@job_options
def remove_disk(name: str, path: str, guest_timeout_s: float, node: str, options: JobOptions) -> None:
    """Take the disk PATH out of the instance NAME, once the guest has let go of it. Its file stays."""
    send_and_show(
        lambda client: client.disk_remove.job(node, name, path, guest_timeout_s, job_id=options.job_id), options
    )


@disk_command.command("resize", epilog=examples("hostler disk resize web1 /srv/web1-data.raw 20480    20 GiB"))
@click.argument("name")
@click.argument("path")
@click.argument("size_mib", type=int)
@node_option
@job_options
def resize_disk(name: str, path: str, size_mib: int, node: str, options: JobOptions) -> None:
    """Make the disk PATH of the instance NAME SIZE_MIB large, which is more than it has.

    The guest sees it at once; its partitions and file systems are its own affair.
    """
    send_and_show(lambda client: client.disk_resize.job(node, name, path, size_mib, job_id=options.job_id), options)


drive_option = click.option(
    "--drive",
    type=click.Choice(["cdrom", "cdrom2"]),
    default="cdrom",
    show_default=True,
    help="Which of its CD drives.",
)
force_option = click.option(
    "--force", is_flag=True, help="Do not ask the guest, and take out a CD that it has locked because it is in use."
)


@click.group(
    "cd", epilog=examples("hostler cd insert web1 /srv/iso/debian.iso", "hostler cd eject web1 --drive cdrom2 --json")
)
def cd_command() -> None:
    """Change the CDs of a running guest.

    It needs a drive from its start: an image in it, or the parameter cdrom_drive (cdrom2_drive). After a reboot the
    same CD is in it, or none.
    """


@cd_command.command("insert", epilog=examples("hostler cd insert web1 /srv/iso/debian.iso"))
@click.argument("name")
@click.argument("path")
@drive_option
@let_go_option
@force_option
@node_option
@job_options
def insert_cd(
    *,
    name: str,
    path: str,
    drive: Literal["cdrom", "cdrom2"],
    guest_timeout_s: float,
    force: bool,
    node: str,
    options: JobOptions,
) -> None:
    """Put the ISO image PATH of the node into a CD drive of the instance NAME, in the place of the one in it."""
    how: dict[str, Any] = {"timeout_s": guest_timeout_s, "force": force, "job_id": options.job_id}
    send_and_show(lambda client: client.cd_insert.job(node, name, path, drive, **how), options)


@cd_command.command("eject", epilog=examples("hostler cd eject web1", "hostler cd eject web1 --force"))
@click.argument("name")
@drive_option
@let_go_option
@force_option
@node_option
@job_options
def eject_cd(
    *,
    name: str,
    drive: Literal["cdrom", "cdrom2"],
    guest_timeout_s: float,
    force: bool,
    node: str,
    options: JobOptions,
) -> None:
    """Take the CD out of a drive of the instance NAME. The drive stays, empty."""
    how: dict[str, Any] = {"timeout_s": guest_timeout_s, "force": force, "job_id": options.job_id}
    send_and_show(lambda client: client.cd_eject.job(node, name, drive, **how), options)


@click.group(
    "nic",
    epilog=examples(
        "hostler nic add web1 52:54:00:12:34:57 --link br0 --json", "hostler nic remove web1 52:54:00:12:34:57"
    ),
)
def nic_command() -> None:
    """Change the network cards of a running guest.

    Its next QEMU has them too, each where the guest knows it.
    """


@nic_command.command(
    "add",
    epilog=examples(
        "hostler nic add web1 52:54:00:12:34:57 --link br0",
        "hostler nic add web1 52:54:00:12:34:57 --mode routed --ip 192.0.2.7",
    ),
)
@click.argument("name")
@click.argument("mac")
@click.option("--mode", default="bridged", show_default=True, help="As in an instance file: bridged, routed, user, ...")
@click.option("--link", default="", help="The bridge, or the routing table.")
@click.option("--ip", default="", help="Told to ifup; routed cards get a route to it.")
@click.option("--vlan", type=int, default=0, help="VLAN of the bridge that the card is in.")
@node_option
@job_options
def add_nic(*, name: str, mac: str, mode: str, link: str, ip: str, vlan: int, node: str, options: JobOptions) -> None:
    """Plug a network card with the address MAC into the instance NAME, as its last one."""
    nic = {"mac": mac, "mode": mode, "link": link, "ip": ip, "vlan": vlan}
    send_and_show(lambda client: client.nic_add.job(node, name, nic, job_id=options.job_id), options)


@nic_command.command("remove", epilog=examples("hostler nic remove web1 52:54:00:12:34:57"))
@click.argument("name")
@click.argument("mac")
@let_go_option
@node_option
@job_options
def remove_nic(name: str, mac: str, guest_timeout_s: float, node: str, options: JobOptions) -> None:
    """Take the network card MAC out of the instance NAME, once the guest has let go of it."""
    send_and_show(
        lambda client: client.nic_remove.job(node, name, mac, guest_timeout_s, job_id=options.job_id), options
    )


@click.command("memory", epilog=examples("hostler memory web1 512"))
@click.argument("name")
@click.argument("memory_mib", type=int)
@let_go_option
@node_option
@job_options
def memory_command(name: str, memory_mib: int, guest_timeout_s: float, node: str, options: JobOptions) -> None:
    """Let the instance NAME have MEMORY_MIB by its balloon; after a reboot it has that much too.

    It needs the parameter balloon and a guest with a driver for it. The most is memory_max_mib, or what it was started
    with; the least is memory_min_mib.
    """
    send_and_show(
        lambda client: client.set_memory.job(node, name, memory_mib, guest_timeout_s, job_id=options.job_id), options
    )


@click.command("password", epilog=examples("hostler password web1 vnc /etc/hostler/web1.vnc"))
@click.argument("name")
@click.argument("display", type=click.Choice(["vnc", "spice"]))
@click.argument("file")
@node_option
@job_options
def password_command(name: str, display: Literal["vnc", "spice"], file: str, node: str, options: JobOptions) -> None:
    """Change the password of a DISPLAY of the instance NAME to the only line of FILE, which is on the node."""
    send_and_show(lambda client: client.set_password.job(node, name, display, file, job_id=options.job_id), options)

"""The original's behaviours and bugs, numbered: what became of each here, where in the code, and what tests it.

Rendered as docs/parity.md, so that page and table cannot disagree; a test looks up every place and test named here. The
original is Ganeti's KVM module of 2011 with what it calls. What is said of it are facts in our own words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

PARITY = Path(__file__).with_name("parity.md")

HEAD = """\
# Parity with the original

Generated from `docs/parity_table.py` by `./dev docs`; do not edit. A test looks up every place and every test named.

The original is the KVM module of Ganeti as it was in 2011, with its uid pool and its executor of jobs. Its behaviours
have numbers from 1 to 119, its bugs from W1 to W47. What were files there are rows in SQL here, what were commands of
QEMU's human monitor is QMP, and the command line is in the words of QEMU 7.2 and later.
"""


class Status(StrEnum):
    """What became of a behaviour, or of the cause of a bug."""

    DONE = "done"
    """As the original does it, in the words of today; a bug cannot come back without its test failing."""
    CHANGED = "changed"
    """Done in another way, for the reason given."""
    NOT_YET = "not yet"
    """Missing; what of it is there already is said."""
    BY_CONSTRUCTION = "by construction"
    """A bug that has no place to be: why, instead of a test."""


@dataclass(frozen=True)
class Row:
    """One behaviour or bug. ``code`` are ``module`` or ``module:name``, ``tests`` paths or ``path::name`` in tests/."""

    what: str
    status: Status
    code: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    why: str = ""


def done(what: str, code: str, *tests: str) -> Row:
    return Row(what, Status.DONE, tuple(code.split()), tests)


def changed(what: str, code: str, *tests: str, why: str) -> Row:
    return Row(what, Status.CHANGED, tuple(code.split()), tests, why)


def by_construction(what: str, code: str, *, why: str) -> Row:
    return Row(what, Status.BY_CONSTRUCTION, tuple(code.split()), (), why)


ADOPTION = "node/test_adoption.py::test_"
ACCELERATOR = "node/test_accelerator.py::test_"
ARGUMENTS = "unit/worker/kvm/test_arguments.py::test_"
ASSESSMENTS = "unit/worker/operations/test_assessments.py::test_"
BAD_INPUT = "node/test_bad_input.py::test_"
ARRIVALS = "node/test_live_migration_original.py::test_"
CANCEL = "integration/test_cancel_and_retry.py::test_"
CLIENT = "integration/test_client.py::test_"
CONFINEMENT = "unit/worker/kvm/test_confinement.py::test_"
CONSOLES = "node/test_consoles.py::test_"
CONVERGENCE = "unit/worker/kvm/test_convergence.py::test_"
CONTRACT = "unit/hostler/test_payloads_contract.py::test_"
DISPLAYS = "node/test_displays.py::test_"
DOCTOR = "unit/worker/doctor/test_node.py::test_"
DRIVER = "node/test_migration_driver.py::test_"
ENDINGS = "node/test_endings.py::test_"
EXECUTOR = "unit/hostler/test_executor.py::test_"
BATCHES = "integration/test_executor.py::test_"
FACTS = "unit/worker/operations/test_node_facts.py::test_"
FOLDER = "unit/worker/kvm/test_folder.py::test_"
HARDWARE = "unit/worker/operations/test_hardware.py::test_"
ISOLATION = "node/test_isolation.py::test_"
LAUNCH = "unit/worker/kvm/test_launch.py::test_"
LEDGER = "unit/worker/operations/test_ledger.py::test_"
LIFECYCLE = "node/test_lifecycle.py::test_"
LIVE = "node/test_live_migration.py::test_"
MEANT = "node/test_golden_lines.py::test_qemu_takes_the_golden_line_and_makes_of_it_what_was_meant"
"""A real QEMU is started with each line and asked what it made of it."""
NETWORK = "node/test_network.py::test_"
ORIGINAL = "unit/test_original_bugs.py::test_"
OPTIONS = "unit/hostler/test_migration_payloads.py::test_"
POOL = "unit/worker/operations/test_uid_pool.py::test_"
POWERCYCLE = "unit/worker/operations/test_node_powercycle.py::test_"
PREPARED = "unit/worker/kvm/test_prepared.py::test_"
PROGRESS = "unit/worker/kvm/test_migration_progress.py::test_"
PROCESS = "unit/worker/kvm/test_process.py::test_"
QMP = "unit/worker/kvm/test_qmp.py::test_"
QUARANTINE = "unit/worker/isolation/test_quarantine.py::test_"
RANGES = "unit/hostler/test_uid_ranges.py::test_"
SCRIPTS = "unit/worker/network/test_scripts.py::test_"
TAP = "unit/worker/network/test_tap.py::test_"
UNDO = "node/test_undo.py::test_"

DEFAULTS = f"{CONTRACT}the_31_parameters_keep_ganetis_names_and_their_defaults_but_four_that_make_no_sense_today"
CHOICES = f"{CONTRACT}what_ganeti_let_one_choose_can_be_chosen"
REFUSED = f"{CONTRACT}a_bad_parameter_is_refused_and_named"
CROSS = f"{CONTRACT}the_cross_checks_say_what_ganeti_said"
MISSING_FILES = f"{HARDWARE}files_and_folders_that_are_not_there_are_all_named_at_once"

HV = "hostler.hvparams:HvParams"
LINE = "worker.kvm.command_line"
MOVING = "worker.operations.live_migration"
SENDING = "worker.kvm.live_migration"
ACCEPT = f"{MOVING}.accept:accept"
TUNING = f"{MOVING}.tuning"


def golden(*names: str) -> tuple[str, ...]:
    """The golden lines of these names, and who holds QEMU to them."""
    return (*(f"unit/worker/kvm/golden/{name}.txt" for name in names), MEANT)


ROWS: dict[str, dict[str, Row]] = {}
"""By title of its part: each number with its row."""

ROWS["Taps"] = {
    "1": done("The numbers of `<linux/if_tun.h>`", "worker.network.tap:TUNSETIFF worker.network.tap:TUNGETFEATURES",
              f"{TAP}a_tap_carries_virtio_headers_only_where_that_was_asked_for"),
    "2": done("Whether the kernel's taps have virtio headers is asked; a no is a warning",
              "worker.network.tap:supports_vnet_hdr", f"{TAP}a_kernel_that_cannot_be_asked_has_no_virtio_headers",
              f"{TAP}a_kernel_that_says_it_has_none_has_no_virtio_headers"),
    "3": done("A tap is opened by descriptor and named by the kernel; both ways to fail have their message",
              "worker.network.tap:open_tap", f"{TAP}the_kernel_names_a_tap_and_removes_it_when_it_is_closed",
              f"{TAP}a_host_without_taps_is_told_so"),
}  # fmt: skip

ROWS["State"] = {
    "4": changed("Folders for state, made when they are missing", "worker.kvm.folder:GuestFolder.create",
                 f"{FOLDER}a_guests_folder_is_its_owners_alone_and_new_each_time",
                 why="state is in SQL; a guest's sockets and log have one folder, open to its owner alone"),
    "5": changed("What is kept of each guest, and where", "models.instance:Runtime worker.kvm.folder:GuestFolder.of",
                 f"{FOLDER}the_longest_run_folder_the_settings_allow_still_holds_every_socket",
                 why="rows in place of files; the folder is named by uuid, for a long name fits into no socket's path"),
    "6": changed("What a pid is, found out from its arguments", "worker.kvm.process:ProcessIdentity",
                 f"{PROCESS}a_pid_that_is_used_again_does_not_make_the_new_process_ours",
                 why="a process is its pid, start time and boot id; memory and processors are known from SQL"),
    "7": changed("Whether a guest's process lives", "worker.operations.guests:identity_of",
                 f"{PROCESS}a_qemu_whose_pid_was_never_written_down_is_found_by_its_uuid",
                 why="by identity, and by `-uuid` where the pid was never recorded; by no name"),
    "8": done("An instance that runs is not started", "worker.operations.start:start worker.errors:AlreadyRunning",
              f"{LIFECYCLE}a_running_instance_is_not_started_twice"),
    "9": changed("A guest's uid is read back; an unreadable one is none", "models.uid_pool:UidLease",
                 f"{POOL}leases_have_one_holder_whatever_is_asked", why="it is a column of integers"),
    "10": changed("What is removed after a guest, in an order; what is missing is no error",
                  "worker.operations.guests:release",
                  f"{ENDINGS}an_ending_is_recorded_with_its_reason_and_nothing_is_left",
                  why="network first, then folder, uid and rows: a worker killed in between repeats it"),
    "11": changed("What is left in a chroot is kept for a person", "worker.isolation.quarantine:put_aside",
                  f"{ISOLATION}what_a_qemu_left_in_its_chroot_is_kept_for_a_person",
                  f"{QUARANTINE}everything_is_kept_as_what_it_is_and_nothing_is_opened_that_would_not_end",
                  why="as an archive, in which no file has an owner or acts any more"),
    "12": changed("That a guest lives is found out, never stored", "worker.operations.guests:Guests.adopt",
                  f"{ADOPTION}what_ended_while_no_worker_ran_is_told_from_the_journal",
                  why="`/proc` still decides; SQL has what was seen last, and a new worker looks first"),
}  # fmt: skip

ROWS["Network script"] = {
    "13": changed("`SCRIPT TAP` with INSTANCE, MAC, MODE, INTERFACE, INTERFACE_INDEX and TAGS",
                  "worker.network.scripts:environment worker.network.scripts:run",
                  f"{NETWORK}ifup_is_told_exactly_what_the_card_is_and_nothing_of_the_worker_s",
                  why="PATH is a fixed one and not the daemon's; VLAN and MTU were added"),
    "14": done("IP and LINK where they are set, BRIDGE for bridged cards alone", "worker.network.scripts:environment",
               f"{SCRIPTS}a_script_is_told_all_about_its_card_and_nothing_that_does_not_apply",
               f"{NETWORK}tags_are_empty_where_there_are_none_and_link_is_no_bridge_in_mode_routed"),
    "15": done("A script that fails is quoted", "worker.network.scripts:run",
               f"{SCRIPTS}a_script_that_fails_is_quoted_with_all_it_said"),
    "16": changed("The script for bridges reaches every node", "worker.network.scripts:shipped",
                  f"{SCRIPTS}the_scripts_that_come_with_hostler_are_there_and_are_shell",
                  "packaging/test_wheels.py::test_the_node_wheel_holds_what_is_not_python_too",
                  why="it is in the node's wheel; nothing is copied between nodes"),
}  # fmt: skip

ROWS["Listing"] = {
    "17": changed("The instances of a node", "worker.operations.queries:list_instances",
                  f"{LIFECYCLE}list_shows_every_instance_and_info_the_one",
                  why="all it knows, each with its state, and not only those that run"),
    "18": changed("What is known of one", "worker.operations.queries:info worker.operations.views:instance_view",
                  f"{LIFECYCLE}a_started_guest_runs_and_its_view_is_complete",
                  f"{LIFECYCLE}an_instance_nobody_knows", why="names with units; an unknown one is an error"),
    "19": changed("What is known of all; one that cannot be read does not spoil it",
                  "worker.operations.queries:list_instances", f"{LIFECYCLE}list_shows_every_instance_and_info_the_one",
                  why="one query; no process is asked"),
}  # fmt: skip

ROWS["Parameters"] = {
    "20": changed("`kernel_path`: an absolute path, a file on the node", HV, DEFAULTS, REFUSED, MISSING_FILES,
                  why="empty by default: no host has the kernel of 2011"),
    "21": done("`initrd_path`: likewise", HV, DEFAULTS, REFUSED, MISSING_FILES),
    "22": done("`root_path`", HV, DEFAULTS, *golden("kernel-initrd-root-args")),
    "23": done("`kernel_args`", HV, DEFAULTS, *golden("kernel-initrd-root-args")),
    "24": done("`acpi`", HV, DEFAULTS, *golden("acpi-off")),
    "25": done("`serial_console`", HV, DEFAULTS, *golden("serial-console-off")),
    "26": done("`vnc_bind_address`: an address or an absolute path", HV, DEFAULTS,
               f"{CONTRACT}w32_an_address_of_a_display_is_an_ip_of_either_kind_in_its_shortest_form_or_a_path"),
    "27": done("`vnc_tls`", HV, DEFAULTS, *golden("vnc-tls-anonymous")),
    "28": done("`vnc_x509_path`: a folder on the node", f"{HV} worker.operations.hardware:problems", DEFAULTS,
               MISSING_FILES,
               f"{HARDWARE}certificates_are_looked_for_where_they_are_used"),
    "29": done("`vnc_x509_verify`", HV, DEFAULTS, *golden("vnc-tls-x509-verify")),
    "30": done("`vnc_password_file`: a file on the node", f"{HV} worker.kvm.prepared:read_password", DEFAULTS,
               MISSING_FILES),
    "31": done("`floppy_image_path`: a file on the node", HV, DEFAULTS, MISSING_FILES),
    "32": done("`cdrom_image_path`: likewise", HV, DEFAULTS, MISSING_FILES),
    "33": done("`cdrom2_image_path`: likewise", HV, DEFAULTS, MISSING_FILES),
    "34": done("`boot_order`: disk, cdrom, network or floppy", HV, DEFAULTS, CHOICES, REFUSED),
    "35": done("`nic_type`: nine models", HV, DEFAULTS, CHOICES, REFUSED),
    "36": changed("`disk_type`: six types", f"{HV} worker.operations.hardware:UNSUPPORTED", DEFAULTS, CHOICES,
                  f"{HARDWARE}what_cannot_be_done_yet_is_refused_by_name",
                  why="virtio-scsi and nvme were added; sd, mtd and pflash are understood and refused, since no "
                  "machine that is built has a bus for them"),
    "37": changed("`cdrom_disk_type`: the same or none", f"{HV} worker.operations.hardware:UNSUPPORTED", DEFAULTS,
                  CHOICES, f"{HARDWARE}what_cannot_be_done_yet_is_refused_by_name", why="as 36"),
    "38": done("`usb_mouse`: mouse, tablet or none", HV, DEFAULTS, CHOICES, REFUSED),
    "39": done("`migration_port` (default: any free one)", f"{HV} {ACCEPT}", DEFAULTS,
               f"{CONTRACT}w33_the_last_port_is_one_and_w34_limits_are_above_zero"),
    "40": done("`migration_bandwidth` (default: 1024 MiB/s)", f"{HV} {TUNING}:bandwidth_mib_s", DEFAULTS, REFUSED),
    "41": done("`migration_downtime` (default: 300 ms)", f"{HV} {TUNING}:downtime_ms", DEFAULTS, REFUSED),
    "42": done("`migration_mode`: live or non-live", f"{HV} {TUNING}:is_live", DEFAULTS, CHOICES,
               f"{ARRIVALS}a_guest_whose_own_parameter_says_so_is_paused_while_it_moves"),
    "43": done("`use_localtime`", HV, DEFAULTS, *golden("localtime")),
    "44": done("`disk_cache`: default, none, writethrough, writeback", HV, DEFAULTS, CHOICES, REFUSED),
    "45": done("`security_model`: none, user, pool", f"{HV} worker.operations.isolating:assign_uid", DEFAULTS, CHOICES,
               f"{ISOLATION}qemu_has_the_rights_that_its_security_model_gives_it_and_no_more"),
    "46": done("`security_domain`", HV, DEFAULTS, CROSS),
    "47": changed("`kvm_flag`: enabled, disabled or neither", f"{HV} worker.operations.start:choose_accelerator",
                  DEFAULTS, f"{BAD_INPUT}without_kvm_flag_a_guest_runs_with_what_works",
                  why="neither means KVM where a guest has been seen to run with it, else emulation"),
    "48": done("`vhost_net`", HV, DEFAULTS, *golden("nic-vhost")),
    "49": done("`use_chroot`", f"{HV} worker.operations.isolating:confinement_of", DEFAULTS,
               f"{ISOLATION}qemu_has_the_rights_that_its_security_model_gives_it_and_no_more"),
    "50": done("`mem_path`: a folder on the node", HV, DEFAULTS, MISSING_FILES),
    "51": changed("Port, bandwidth and mode of migrations are one value for the whole cluster",
                  f"hostler.settings:Settings hostler.migration:MigrationInfoArguments {TUNING}:tuning_of",
                  f"{OPTIONS}without_options_a_guest_moves_live_as_its_own_parameters_say",
                  why="each guest has its own, a node the ports it receives guests at, and a job can say otherwise"),
    "52": done("A kernel needs a root device", "hostler.hvchecks:cross_check", CROSS),
    "53": done("Verified clients need certificates", "hostler.hvchecks:cross_check", CROSS),
    "54": done("To boot from a CD needs the first one", "hostler.hvchecks:cross_check", CROSS,
               *golden("boot-floppy-without-image")),
    "55": done("Model user needs a login", "hostler.hvchecks:cross_check", CROSS),
    "56": done("The other models have none", "hostler.hvchecks:cross_check", CROSS),
    "57": done("The node knows the login", "worker.operations.hardware:problems",
               f"{HARDWARE}a_security_domain_that_is_no_login_is_named"),
}  # fmt: skip

ROWS["Command line"] = {
    "58": changed("Name, memory, processors, ACPI, KVM", f"{LINE}.machine:identity {LINE}.machine:machine",
                  *golden("defaults", "size", "acpi-off", "kvm-enabled", "kvm-disabled"),
                  why="`-machine acpi=` and `-accel`; QEMU is spawned and watched, so there is no pid file and no "
                  "`-daemonize`"),
    "59": changed("Booting from the network", f"{LINE}.options:boots_first", *golden("boot-network"),
                  f"{ARGUMENTS}the_firmware_boots_from_what_boot_order_names",
                  why="`bootindex` on the first card; `-boot` and a drive's own boot flag exclude each other"),
    "60": changed("One drive for each disk", f"{LINE}.disks:disks",
                  *golden("disk-paravirtual", "disk-ide", "disk-scsi"),
                  why="`-blockdev` and `-device`, as JSON"),
    "61": changed("Booting from the first disk alone", f"{LINE}.disks:disk_device",
                  *golden("boot-disk", "boot-disk-ide"), f"{DISPLAYS}the_firmware_boots_from_a_disk_of_each_type",
                  why="`bootindex`, for IDE too"),
    "62": changed("Read-only disks", f"{LINE}.disks:disk_image worker.operations.checks:check",
                  f"{BAD_INPUT}a_read_only_disk_is_refused_on_ide_and_never_open_for_writing_elsewhere",
                  *golden("disk-read-only", "disk-read-only-scsi"),
                  why="QEMU has them today; only IDE, which has not, is refused"),
    "63": changed("Cache modes; disks that other hosts see are not cached",
                  f"{LINE}.disks:disk_image worker.operations.assessments:assess",
                  *golden("cache-default-paravirtual", "cache-none-paravirtual", "cache-writethrough-paravirtual"),
                  f"{ASSESSMENTS}a_shared_disk_that_is_cached_is_warned_of",
                  why="hostler does not know templates: a shared disk that is cached is warned of and done as asked"),
    "64": changed("A CD drive is of its own type or of the disks'", f"{LINE}.disks:cdrom_types",
                  *golden("cdrom-beside-scsi-disks", "cdrom-beside-paravirtual-disks"),
                  why="IDE where the disks' type has no CD drive"),
    "65": changed("The CD that is booted from", f"{LINE}.disks:cdroms", *golden("boot-cdrom", "cdrom-ide-boots"),
                  why="`bootindex`, and one bus for the drive whatever its type"),
    "66": changed("CDs that are not", f"{LINE}.disks:cdroms",
                  *golden("cdrom-ide", "cdroms-all", "cdrom2-alone", "cdrom-ide-empty"),
                  why="`-blockdev` and `-device`; of type paravirtual a read-only disk"),
    "67": changed("The floppy", f"{LINE}.disks:floppy", *golden("floppy", "boot-floppy", "boot-floppy-without-image"),
                  f"{DISPLAYS}the_firmware_boots_from_a_floppy", why="it boots by a property of its controller"),
    "68": changed("Kernel, initial RAM disk and the kernel's arguments", f"{LINE}.machine:kernel", *golden(
                  "kernel", "kernel-initrd-root-args", "initrd-without-kernel", "kernel-without-serial-console"),
                  why="a guest with a kernel has no boot order beside it"),
    "69": changed("Memory from a hugetlbfs, at once", f"{LINE}.machine:machine", *golden("hugepages"),
                  why="a memory backend, since `-mem-path` is for no machine of today"),
    "70": changed("A USB pointer, and a tablet where there is a display", f"{LINE}.peripherals:usb",
                  *golden("usb-mouse-mouse", "usb-mouse-tablet", "vnc"),
                  why="`-device`, since `-usbdevice` has gone from QEMU"),
    "71": changed("VNC on an address, on the display its port means", f"{LINE}.display:servers",
                  *golden("vnc", "vnc-any-address"),
                  f"{ARGUMENTS}w21_an_address_without_a_port_is_refused_and_a_password_never_asked_for_without_a_display",
                  why="without a port above 5900 it is refused before anything is done"),
    "72": changed("VNC's TLS, certificates and password", f"{LINE}.display:servers",
                  *golden("vnc-tls-anonymous", "vnc-tls-x509", "vnc-tls-x509-verify", "vnc-password-tls-x509"),
                  why="objects for certificates and password, in QEMU's words of today"),
    "73": changed("VNC on a unix socket NAME.vnc without options; no display at all",
                  f"{LINE}.display:socket_path {LINE}.display:servers",
                  *golden("vnc-socket-has-no-options", "defaults"),
                  why="`-display none`: `-nographic` would take the terminal"),
    "74": changed("Monitor, serial port, clock, chroot", f"{LINE}.channels:monitors {LINE}.channels:serial "
                  f"{LINE}.confinement:confinement", *golden("serial-console-off", "localtime"),
                  f"{CONFINEMENT}it_is_said_in_the_words_that_this_qemu_knows",
                  why="QEMU inherits sockets that are bound here; `-rtc base=`, and `-run-with` where there is one"),
}  # fmt: skip

ROWS["Record of a running guest"] = {
    "75": changed("What a guest was started with is kept", "models.instance:Runtime",
                  f"{LIFECYCLE}a_reboot_builds_the_hardware_that_was_saved_and_not_what_qemu_would_choose_now",
                  why="a row, written before the side effects; the spec and not the words of one QEMU"),
    "76": changed("It is read from another node's guest too", f"models.live_migration:LiveMigration {ACCEPT}",
                  f"{LIVE}a_guest_moves_and_its_counter_goes_on",
                  why="in SQL, which both nodes share; nothing is passed as a text and parsed"),
    "77": changed("It is given to the target of a migration", f"{MOVING}.checks:describe {MOVING}.driven:info",
                  f"{LIVE}the_four_steps_driven_by_a_program_that_has_celery_alone",
                  why="with what the target has to compare: machine, accelerator, disks. A master carries it from step "
                  "to step without secrets"),
}  # fmt: skip

ROWS["Execution"] = {
    "78": changed("A guest that is started from its record sees what it saw before",
                  "worker.operations.lifecycle:reboot",
                  f"{LIFECYCLE}a_reboot_builds_the_hardware_that_was_saved_and_not_what_qemu_would_choose_now",
                  f"{DISPLAYS}a_hard_reboot_reads_the_password_again",
                  why="all saved parameters count; only files and the pool's uid are looked at anew"),
    "79": changed("QEMU's version", "worker.kvm.emulator:probe",
                  f"{ACCELERATOR}the_probe_reads_qemus_own_words", why="asked by QMP; it decides nothing"),
    "80": done("QEMU becomes the login", f"{LINE}.confinement:confinement",
               f"{CONFINEMENT}it_is_said_in_the_words_that_this_qemu_knows",
               f"{ISOLATION}qemu_has_the_rights_that_its_security_model_gives_it_and_no_more"),
    "81": done("Without cards there is none", f"{LINE}.network:nics", *golden("defaults")),
    "82": changed("virtio-net, and taps with virtio headers for it alone", f"{LINE}.network:nic_device "
                  "worker.network.tap:open_tap", *golden("nic-paravirtual-tap", "nic-e1000-tap"),
                  why="no QEMU is without it today; the kernel is asked about headers"),
    "83": changed("`vhost_net` for virtio-net; where it is not there, it is said",
                  f"{LINE}.network:nics worker.operations.hardware:problems",
                  *golden("nic-vhost", "nic-vhost-of-another-model"),
                  f"{HARDWARE}vhost_needs_the_kernels_device_for_a_virtio_card_with_a_tap",
                  why="the kernel's device is looked for, and not QEMU's version"),
    "84": changed("Each card has a tap by descriptor and a device", f"{LINE}.network:netdev",
                  *golden("nics-every-mode"), f"{ARGUMENTS}a_user_card_needs_no_descriptor_and_a_tap_gets_its_own",
                  why="as JSON; the older form has gone"),
    "85": changed("QEMU that waits for a guest to arrive",
                  f"{LINE}.machine:identity {SENDING}.incoming:Incoming.listen",
                  *golden("incoming"), f"{DRIVER}a_guest_moves_with_its_memory_and_stands_still_until_it_is_continued",
                  why="`-incoming defer -S`: it listens when it is told to, and never runs by itself"),
    "86": changed("VNC's password: the one line of its file", "worker.kvm.prepared:read_password",
                  f"{PREPARED}w17_a_password_is_the_only_line_of_its_file_without_the_line_break",
                  f"{PREPARED}a_password_file_that_cannot_be_read_is_refused",
                  why="QEMU reads it from memory while it starts; no monitor command has it"),
    "87": done("A chroot of its own, mode 0700", "worker.operations.isolating:confinement_of",
               f"{ISOLATION}a_confined_qemu_of_the_pool_cannot_put_anything_into_its_chroot"),
    "88": done("The network script runs before QEMU starts (of incoming guests: 103)", "worker.operations.start:build",
               f"{NETWORK}an_ifup_that_fails_is_quoted_and_everything_is_undone"),
    "89": changed("A uid of the pool, given back when the start fails", "worker.operations.uid_pool:lease",
                  f"{ISOLATION}a_start_that_fails_gives_uid_and_disk_back",
                  f"{POOL}of_64_that_ask_at_once_in_four_processes_32_get_a_uid_each_and_32_are_refused",
                  "node/test_uid_pool_storm.py::"
                  "test_of_64_real_starts_at_once_32_get_a_uid_each_and_32_are_refused",
                  why="leased in SQL, in the transaction that writes it into the runtime; it needs no login"),
    "90": done("QEMU inherits the taps, which are closed here; a QEMU that fails is quoted", "worker.kvm.launch:spawn",
               f"{LAUNCH}nothing_stays_open_here_whether_it_lives_or_not",
               f"{LAUNCH}a_qemu_that_ends_at_once_is_told_with_how_and_its_last_words"),
    "91": changed("Which tap a card has is kept", "models.instance:Runtime",
                  f"{NETWORK}the_tap_survives_the_worker_and_goes_with_the_guest", why="before QEMU runs, in its row"),
}  # fmt: skip

ROWS["Lifecycle"] = {
    "92": done("Start: look, build, record, execute", "worker.operations.start:start",
               f"{LIFECYCLE}a_started_guest_runs_and_its_view_is_complete"),
    "93": changed("Commands to the monitor; what fails is told", "worker.kvm.qmp:Monitor.execute",
                  f"{QMP}what_a_real_qemu_refuses_is_told_in_its_own_words_and_the_monitor_works_on",
                  why="QMP, each with a deadline"),
    "94": changed("Stop: by ACPI, or by force with TERM and then KILL", "worker.operations.lifecycle:stop "
                  "worker.kvm.process:QemuProcess.kill", f"{LIFECYCLE}the_power_button_stops_a_guest",
                  f"{LIFECYCLE}stopping_a_stopped_instance_says_so",
                  f"{LIFECYCLE}a_guest_without_acpi_is_killed_at_once",
                  f"{PROCESS}a_process_that_ignores_sigterm_is_killed",
                  why="one job waits for the end itself, presses again, and gives TERM 5 s"),
    "95": done("Clean-up of what does not run", "worker.operations.lifecycle:cleanup",
               f"{LIFECYCLE}a_live_guest_is_not_cleaned_up",
               f"{LIFECYCLE}a_crashed_instance_is_stopped_after_its_cleanup"),
    "96": changed("Soft reboot: shut down, then the saved hardware", "worker.operations.lifecycle:reboot",
                  f"{LIFECYCLE}a_soft_reboot_shuts_down_and_starts_the_saved_hardware",
                  f"{LIFECYCLE}a_stopped_instance_is_not_rebooted",
                  why="a guest that does not shut down runs on, and the job says so"),
    "97": changed("What the caller added: timeouts, force, kinds of reboot", "worker.operations.lifecycle:stop "
                  "worker.operations.lifecycle:reboot",
                  f"{LIFECYCLE}a_guest_that_does_not_shut_down_in_time_is_killed",
                  f"{LIFECYCLE}a_hard_reboot_does_not_ask_the_guest",
                  "node/test_bare_sender.py::test_a_job_sent_twice_under_one_id_takes_effect_once",
                  why="to start what runs is `ALREADY_RUNNING`, a job sent twice takes effect once; `reset` is new"),
}  # fmt: skip

ROWS["Migration"] = {
    "98": changed("The target starts a QEMU from the source's record", ACCEPT,
                  f"{LIVE}a_guest_moves_and_its_counter_goes_on",
                  f"{LIVE}what_the_target_lacks_is_named_and_nothing_is_touched",
                  why="checked there first as for a start, and recorded before its QEMU is there"),
    "99": changed("The source sets its limits and begins", f"{SENDING}.capabilities:prepare "
                  f"{SENDING}.outgoing:Outgoing.start", f"{DRIVER}memory_that_is_written_meanwhile_comes_along",
                  f"{LIVE}without_live_it_stands_still_meanwhile_and_then_goes_on",
                  why="what this QEMU can do is asked before anything is touched"),
    "100": changed("Progress is asked for until it is done or has failed", f"{SENDING}.follow:follow "
                   f"{MOVING}.teller:Teller", f"{LIVE}it_is_one_job_in_which_either_node_is_seen_to_act",
                   why="at QEMU's events, else four times a second, and told"),
    "101": changed("Answers that mean nothing are counted", f"{SENDING}.follow:follow",
                   f"{DRIVER}a_silent_qemu_is_asked_again_before_it_is_given_up",
                   why="silence is counted, words are not; five silences end the attempt and not the migration"),
    "102": changed("The source ends and is cleaned up after", f"{MOVING}.other_side:end_incoming",
                   f"{LIVE}a_guest_moves_and_its_counter_goes_on", f"{LIVE}the_source_s_uid_is_free_again",
                   why="when the guest runs on the target, and not before"),
    "103": changed("The target connects its network and records the guest, or ends it",
                   f"{MOVING}.finalize:finalize {MOVING}.accept:discard",
                   f"{LIVE}cards_are_connected_before_and_disconnected_after",
                   f"{LIVE}a_master_that_gives_up_between_two_steps_leaves_nothing",
                   why="record and bridge come first; the guest announces itself once it runs"),
}  # fmt: skip

ROWS["Console and host"] = {
    "104": changed("Console: the serial port, else VNC, else a message", "worker.operations.consoles:console",
                   f"{LIFECYCLE}the_serial_console_names_a_command_that_works",
                   f"{CONSOLES}vnc_on_a_port_is_met_where_the_job_says",
                   f"{CONSOLES}the_serial_port_comes_first_and_what_there_is_not_is_a_message",
                   why="SPICE was added, and a kind can be asked for"),
    "105": changed("What the host lacks", "worker.doctor.node:verify",
                   "node/test_doctor.py::test_a_missing_qemu_fails_with_what_to_install",
                   f"{DOCTOR}every_problem_is_told_at_once_each_with_what_to_do",
                   why="all problems at once, each with what to do"),
    "106": changed("Memory and processors of the host", "worker.operations.node_facts:node_info",
                   f"{FACTS}memory_is_in_mib_and_free_is_what_only_caches", f"{FACTS}sockets_are_counted_by_their_ids",
                   why="sockets and NUMA nodes are counted and not 1; units are in the names"),
    "107": changed("Rebooting the host by sysrq, else by a program", "worker.operations.powercycle:powercycle",
                   f"{POWERCYCLE}the_kernel_is_told_by_its_own_trigger",
                   f"{POWERCYCLE}a_kernel_that_cannot_be_told_leaves_it_to_a_program",
                   why="the node has to allow it, the job names the node, and the job ends first"),
}  # fmt: skip

ROWS["Uid pool"] = {
    "108": changed("Ranges as text", "hostler.uid_ranges:parse_ranges",
                   f"{RANGES}text_is_read_sorted_and_neighbours_are_not_merged",
                   f"{RANGES}what_is_no_range_is_refused_by_name",
                   why="upside-down and overlapping ones are refused while they are read"),
    "109": changed("Ranges are checked, written, added and removed as given",
                   "hostler.uid_ranges:add_ranges hostler.uid_ranges:remove_ranges hostler.uid_ranges:format_ranges",
                   f"{RANGES}ranges_are_written_with_a_comma_and_a_space",
                   f"{RANGES}only_exactly_what_was_added_is_removed",
                   why="the largest uid is 2^32-2: the next one means none to the kernel"),
    "110": changed("A uid that nobody has, tried in an order, against processes too",
                   "worker.operations.uid_pool:lease worker.isolation.in_use:uids_in_use",
                   f"{POOL}the_uid_that_was_free_for_the_longest_time_is_handed_out_first",
                   f"{POOL}a_uid_that_a_process_of_the_host_has_is_neither_handed_out_nor_freed",
                   f"{POOL}an_empty_pool_and_a_used_up_one_say_what_to_do",
                   why="a lease in SQL in place of a lock file; the longest free one first, not a random one"),
    "111": changed("A uid is released, also when what it was for fails", "worker.operations.uid_pool:release",
                   f"{POOL}the_end_of_an_earlier_qemu_does_not_free_what_a_later_one_has",
                   f"{ISOLATION}a_start_that_fails_gives_uid_and_disk_back",
                   why="safe to repeat; kept while anything of the host has it"),
}  # fmt: skip

ROWS["Job executor and job queue"] = {
    "112": changed("`queue_job`, in one order with added ids", "hostler.executor:JobExecutor.queue_job",
                   f"{BATCHES}results_come_in_the_order_added_with_every_kind_of_failure_told_apart",
                   why="several requests are jobs of their own, and each has its id before it is sent"),
    "113": changed("`submit_pending`: all, or one by one", "hostler.executor:JobExecutor.submit_pending",
                   f"{BATCHES}w43_the_ids_sent_before_a_failure_are_kept_and_the_rest_can_be_sent_later",
                   f"{EXECUTOR}a_failure_at_submission_is_a_result_in_its_place",
                   why="one message a job over one connection; what was sent is kept when one raises"),
    "114": done("`get_results` sends what is left, says what was sent, and failures first",
                "hostler.executor:JobExecutor.get_results", f"{BATCHES}the_example_of_the_contract",
                f"{BATCHES}lines_without_a_terminal_and_nothing_of_it_on_standard_output"),
    "115": changed("The job that is waited for aloud is one that runs, else the first",
                   "hostler.executor_display:display",
                   f"{EXECUTOR}lines_wait_aloud_for_the_first_that_runs_then_for_the_first",
                   why="all are waited for at once; the order is only what is said"),
    "116": done("Archived, failed and successful jobs are told apart", "hostler.executor_part:Part.outcome",
                f"{EXECUTOR}an_archived_job_is_neither_failed_nor_unknown",
                f"{EXECUTOR}a_bad_end_is_told_with_the_name_if_there_is_one"),
    "117": done("Results in the order added; `wait_or_show` prints ids instead",
                "hostler.executor:JobExecutor.wait_or_show",
                f"{BATCHES}results_come_in_the_order_added_with_every_kind_of_failure_told_apart",
                f"{BATCHES}w42_a_job_without_a_name_is_shown_by_its_id_alone"),
    "118": changed("Following a job: why it waits, its log, its error", "hostler.following:follow hostler.job:Job.wait "
                   "worker.operations.why:explain", f"{CLIENT}progress_is_pushed_step_by_step_and_the_result_returned",
                   f"{CLIENT}a_failed_job_raises_with_code_message_and_details",
                   f"{CANCEL}why_explains_each_state_and_names_the_next_command",
                   why="pushed and not polled; a job has phases in place of log lines, and one error of the contract"),
    "119": changed("The rules of the queue: states, cancelling, what a restart does, priorities, archiving",
                   "worker.operations.ledger:Ledger worker.operations.pruning:Pruner",
                   f"{LEDGER}the_next_worker_takes_over_what_its_predecessor_held_with_phases_and_lock",
                   f"{CANCEL}a_waiting_job_is_cancelled_at_once_and_stays_so_for_the_next_worker",
                   "unit/worker/operations/test_ledger_waiting.py::"
                   "test_places_go_to_the_more_urgent_first_and_else_in_order",
                   why="the next worker carries a job on that died with its worker, a running job can be cancelled, "
                   "and no number of jobs is too large; what the drain flag refused waits (`hostler hold`)"),
}  # fmt: skip

ROWS["Bugs"] = {
    "W1": done("The uid's file held a Python object's text, so that no uid was ever released",
               "worker.operations.uid_pool:release",
               f"{ORIGINAL}w1_a_uid_is_a_number_on_record_and_is_released_by_what_was_recorded"),
    "W2": done("A reboot killed the guest right after asking it to shut down", "worker.operations.lifecycle:reboot",
               f"{LIFECYCLE}a_soft_reboot_of_a_guest_that_ignores_its_button_times_out_and_it_runs_on"),
    "W3": done("A reboot took a second uid and kept the first", "worker.operations.start:build",
               f"{ISOLATION}a_reboot_takes_one_uid_and_gives_the_one_before_back"),
    "W4": done("A migration could go on for ever", f"{SENDING}.convergence:Convergence {MOVING}.checks:deadline_s",
               f"{CONVERGENCE}at_the_deadline_what_was_asked_for_is_done_once",
               f"{CONVERGENCE}a_connection_that_carries_nothing_is_given_up_even_where_the_guest_was_forced_to_pause"),
    "W5": done("Migration states of newer QEMUs counted as broken answers", f"{SENDING}.sample:ENDS",
               f"{PROGRESS}only_three_words_and_none_are_an_end"),
    "W6": done("A guest paused for its migration stayed paused when that failed", f"{MOVING}.returned:go_on_here",
               "node/test_live_migration_cancel.py::test_without_live_the_guest_runs_again"),
    "W7": done("What the monitor refused looked as if it had worked", "worker.kvm.qmp:Monitor.execute",
               f"{QMP}what_a_real_qemu_refuses_is_told_in_its_own_words_and_the_monitor_works_on"),
    "W8": done("An answer could be lost and count as empty", "worker.kvm.qmp:Monitor",
               f"{QMP}late_answers_are_not_taken_for_the_answers_of_later_commands",
               f"{QMP}a_qemu_that_keeps_silent_is_lost_after_the_deadline"),
    "W9": done("The target had no record while a guest arrived", ACCEPT,
               f"{ARRIVALS}w9_while_a_guest_arrives_the_target_has_a_record_by_which_its_next_worker_finds_it"),
    "W10": done("A target that failed was killed and not cleaned up after", f"{MOVING}.other_side:end_incoming",
                f"{ARRIVALS}w10_of_a_target_that_dies_nothing_is_left_and_the_guest_runs_on"),
    "W11": done("The source ended without a look at the target", f"{MOVING}.finalize:finalize "
                f"{MOVING}.rows:give_back",
                f"{DRIVER}a_target_that_cannot_read_the_guest_leaves_it_running_at_the_source",
                f"{DRIVER}a_target_that_dies_leaves_the_guest_running_at_the_source"),
    "W12": done("Two guests could not arrive at once: one port", f"{SENDING}.incoming:Incoming.listen",
                f"{LIVE}two_guests_come_to_one_node_at_once", f"{DRIVER}a_port_that_is_taken_is_passed_over"),
    "W13": done("Taps leaked when a later step failed", "worker.operations.start:build worker.network.tap:open_tap",
                f"{TAP}w13_a_tap_that_is_refused_leaves_no_descriptor_behind",
                f"{UNDO}a_start_that_fails_is_undone_and_the_next_one_succeeds",
                f"{ISOLATION}of_more_guests_than_uids_the_rest_is_refused_and_leaves_nothing"),
    "W14": done("Nothing undid what the network script had done", "worker.operations.guests:disconnect",
                f"{NETWORK}a_guest_that_dies_has_its_ifdown",
                f"{NETWORK}a_guest_that_died_while_no_worker_ran_has_its_ifdown"),
    "W15": done("Taps and uid were written down after QEMU ran", "worker.operations.start:build",
                f"{ADOPTION}a_start_killed_while_qemu_hangs_before_greeting_is_finished_by_the_next_worker"),
    "W16": done("Any process with the guest's name among its arguments was the guest",
                "worker.kvm.process:qemu_processes", f"{PROCESS}w16_a_find_for_files_of_the_guests_name_is_not_a_guest",
                f"{PROCESS}a_pid_that_is_used_again_does_not_make_the_new_process_ours"),
    "W17": done("Empty files and processes without arguments broke list, start and clean-up",
                "worker.kvm.process:arguments_of worker.kvm.prepared:read_password",
                f"{PROCESS}w17_a_process_without_arguments_is_nobody",
                f"{PREPARED}w17_a_password_file_that_is_empty_or_of_several_lines_is_refused_and_not_quoted"),
    "W18": done("Arguments in other spellings of QEMU's broke it", "worker.kvm.process:qemu_processes",
                f"{PROCESS}w18_arguments_in_any_of_qemus_spellings_do_no_harm"),
    "W19": done("A lock file that was gone ended the clean-up half-way", "worker.operations.isolating:take_back",
                f"{ISOLATION}a_lease_that_somebody_removed_does_not_keep_the_rest_from_being_given_back",
                f"{ORIGINAL}w19_a_uid_that_was_never_leased_or_is_free_already_is_released_without_an_error"),
    "W20": done("A comma in a path was an option", f"{LINE}.options:quoted worker.kvm.arguments:render",
                f"{ARGUMENTS}w20_a_path_of_any_characters_is_one_value_and_no_option"),
    "W21": done("VNC without a port became options of no display", "hostler.hvchecks:check_instance",
                f"{ARGUMENTS}w21_an_address_without_a_port_is_refused_and_a_password_never_asked_for_without_a_display"),
    "W22": done("VNC's password was in arguments, logs and errors", "worker.kvm.prepared:prepare",
                f"{DISPLAYS}w22_a_vnc_display_takes_the_password_of_the_file_which_no_one_finds_elsewhere",
                f"{ARGUMENTS}w22_a_password_is_a_descriptor_and_its_file_is_nowhere_in_the_line"),
    "W23": done("VNC's socket stayed for ever, and the console called its path a host",
                "worker.kvm.folder:GuestFolder.adopt_socket worker.operations.consoles:console",
                f"{PREPARED}w23_a_displays_socket_goes_with_the_guests_folder_and_nothing_else_does",
                f"{CONSOLES}w23_vnc_on_a_socket_is_a_path_and_pretends_no_port"),
    "W24": done("A version of two numbers was none, and an empty help broke it", "worker.kvm.emulator:probe",
                f"{ACCELERATOR}the_probe_reads_qemus_own_words",
                f"{ACCELERATOR}a_program_that_is_not_qemu_is_told_as_such_and_ended",
                f"{QMP}a_version_that_is_not_told_is_no_error"),
    "W25": done("Versions decided what QEMU can do", "worker.kvm.emulator:Features worker.operations.hardware:problems",
                f"{HARDWARE}a_device_that_was_left_out_of_this_qemu_is_named_by_its_parameter",
                f"{HARDWARE}what_this_qemu_was_built_without_is_named"),
    "W26": done("Two ways to say what boots, and a kernel beside them", f"{LINE}.options:boots_first",
                f"{ARGUMENTS}w26_one_device_boots_first_and_none_when_a_kernel_is_given"),
    "W27": done("Options that QEMU dropped later", "worker.kvm.arguments:build",
                f"{ARGUMENTS}w27_no_option_that_newer_emulators_dropped", MEANT),
    "W28": done("Two starts at once, and a pid file not yet written", "worker.operations.ledger:Ledger.receive",
                f"{LIFECYCLE}two_jobs_of_one_instance_run_in_the_order_they_were_sent",
                "unit/worker/operations/test_ledger_races.py::"
                "test_of_two_nodes_that_want_an_instance_at_once_one_gets_it_and_the_other_gets_it_next"),
    "W29": done("Executing changed the list of arguments, so that a second time doubled options",
                "worker.kvm.arguments:build",
                f"{ORIGINAL}w29_building_and_rendering_a_line_change_nothing_that_they_were_given"),
    "W30": done("The record of a start that failed was believed", "worker.operations.start:build",
                f"{UNDO}an_instance_that_ran_before_is_after_a_failed_start_what_it_was"),
    "W31": done("A guest that arrived announced itself to a bridge it was not yet on",
                f"{SENDING}.incoming:Incoming.announce {MOVING}.finalize:finalize",
                f"{LIVE}cards_are_connected_before_and_disconnected_after"),
    "W32": done("Displays on IPv4 alone", "hostler.hvtypes:BindAddress",
                f"{CONTRACT}w32_an_address_of_a_display_is_an_ip_of_either_kind_in_its_shortest_form_or_a_path",
                *golden("vnc-ipv6")),
    "W33": done("Port 65535 was refused", HV, f"{CONTRACT}w33_the_last_port_is_one_and_w34_limits_are_above_zero"),
    "W34": done("Limits of nothing and below were accepted", HV,
                f"{CONTRACT}w33_the_last_port_is_one_and_w34_limits_are_above_zero"),
    "W35": changed("State and times were constants, memory the configured one", "worker.operations.queries:info "
                   "worker.operations.hotplug_settings:set_memory",
                   f"{LIFECYCLE}a_pause_and_resume_at_qemus_own_monitor_are_noticed",
                   "node/test_hotplug.py::test_a_balloon_that_nobody_answers_is_taken_back",
                   why="the state is QEMU's own; memory is what is on record, changed only once the guest has it. "
                   "Processor time is not told"),
    "W36": done("Nobody waited after KILL, and zombies were alive", "worker.kvm.process:QemuProcess.kill",
                f"{PROCESS}a_process_that_ignores_sigterm_is_killed",
                f"{PROCESS}a_zombie_counts_as_dead"),
    "W37": done("The reboot of a host broke on its own descriptor, and its fallback never ran",
                "worker.operations.powercycle:powercycle", f"{POWERCYCLE}the_kernel_is_told_by_its_own_trigger",
                f"{POWERCYCLE}a_kernel_that_cannot_be_told_leaves_it_to_a_program"),
    "W38": done("An unknown range broke its own error; overlapping ones were accepted",
                "hostler.uid_ranges:remove_ranges hostler.uid_ranges:add_ranges",
                f"{RANGES}only_exactly_what_was_added_is_removed",
                f"{RANGES}a_range_that_overlaps_the_pool_is_refused"),
    "W39": done("Root could be in the pool; each candidate cost a search of all processes",
                "hostler.uid_ranges:require_harmless worker.isolation.in_use:uids_in_use",
                f"{RANGES}uids_of_services_need_force_and_root_is_never_a_member",
                f"{ORIGINAL}w39_all_processes_are_looked_at_once_however_large_the_pool_is"),
    "W40": done("A queued job was never sent when an id was added after it", "hostler.executor:JobExecutor.get_results",
                f"{BATCHES}w40_what_was_queued_is_sent_even_if_an_id_was_added_after_it"),
    "W41": done("Sending twice sent everything twice", "hostler.executor:JobExecutor.submit_pending",
                f"{BATCHES}w41_nothing_is_sent_twice"),
    "W42": done("Jobs without a name were called None", "hostler.executor_part:if_name",
                f"{BATCHES}w42_a_job_without_a_name_is_shown_by_its_id_alone"),
    "W43": done("An error midway lost the ids sent before it", "hostler.executor:JobExecutor.submit_pending",
                f"{BATCHES}w43_the_ids_sent_before_a_failure_are_kept_and_the_rest_can_be_sent_later"),
    "W44": done("All jobs were asked for to pick one", "hostler.following:follow",
                f"{BATCHES}w44_ten_thousand_jobs_are_awaited_over_one_connection_without_asking_for_each"),
    "W45": by_construction("A range of new job ids was one too long", "hostler.executor:JobExecutor.queue_job",
                           why="ids are UUIDs, or the sender's choice; no counter gives out ranges"),
    "W46": done("The network script had the daemon's whole environment", "worker.network.scripts:run",
                f"{SCRIPTS}w46_a_script_sees_its_own_environment_and_none_of_the_workers"),
    "W47": done("Verifying a host told only its first problem", "worker.doctor.node:verify",
                f"{DOCTOR}every_problem_is_told_at_once_each_with_what_to_do",
                f"{BAD_INPUT}files_that_are_missing_are_all_named_at_once"),
}  # fmt: skip


def rows() -> Iterator[tuple[str, Row]]:
    """Every number with its row, in the order of the page."""
    for part in ROWS.values():
        yield from part.items()


def render() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_counts(), *_tables()]) + "\n"


def _counts() -> Iterator[str]:
    yield from ("| | behaviours | bugs |", "| --- | --- | --- |")
    for status in Status:
        bugs = [number.startswith("W") for number, row in rows() if row.status is status]
        yield f"| **{status}** | {bugs.count(False)} | {bugs.count(True)} |"


def _tables() -> Iterator[str]:
    for title, part in ROWS.items():
        yield from ("", f"## {title}", "", "| | what | became | code | tests |", "| --- | --- | --- | --- | --- |")
        for number, row in part.items():
            became = f"**{row.status}**" + (f": {row.why}" if row.why else "")
            yield f"| {number} | {row.what} | {became} | {_listed(row.code)} | {_listed(row.tests)} |"


def _listed(names: tuple[str, ...]) -> str:
    return "<br>".join(f"`{name}`" for name in names)

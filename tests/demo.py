"""``./dev demo``: one guest's life on the embedded default, told as it happens, by the commands a person would type."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from worker.kvm import tiny_guest

NODE = "demo"
READY_S = 60.0
SERIAL_S = 20.0
TICKS_SHOWN = 5
out = Console(highlight=False)


class Demo:
    """A worker and a guest in a folder of their own, so that nothing of this machine's is touched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.instance_file = root / "web1.yaml"
        self.worker: subprocess.Popen[bytes] | None = None
        self.settings = {
            "HOSTLER_NODE": NODE,
            "HOSTLER_STATE_DIR": str(root / "state"),
            "HOSTLER_RUN_DIR": str(root / "run"),
        }
        others = {name: value for name, value in os.environ.items() if not name.startswith("HOSTLER_")}
        self.env = others | self.settings

    def hostler(self, *arguments: str, check: bool = True) -> None:
        """Run a command of hostler's, showing it and what it says."""
        out.print(f"\n[bold cyan]$ hostler {shlex.join(arguments)}[/]")
        subprocess.run([sys.executable, "-m", "hostler", *arguments], env=self.env, check=check)

    def start_worker(self) -> None:
        """Start the worker and wait for it."""
        out.print(f"\n[bold cyan]$ hostler worker &[/]   [dim]# its log: {self.root / 'worker.log'}[/]")
        log_path = self.root / "worker.log"
        with log_path.open("wb") as log:
            self.worker = subprocess.Popen(
                [sys.executable, "-m", "hostler", "worker"],
                env=self.env | {"HOSTLER_LOG_FORMAT": "console"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_S
        while "worker is ready" not in log_path.read_text(errors="replace"):
            if self.worker.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the worker did not get ready:\n{log_path.read_text(errors='replace')}")
            time.sleep(0.05)
        out.print(f"the worker is ready (pid {self.worker.pid}), with an embedded broker and an SQLite database")

    def write_instance(self) -> None:
        """A 512-byte guest on a disk, and the file that describes it."""
        tiny_guest.write_disk(self.root / "web1.img")
        text = f"name: web1\nmemory_mib: 16\nvcpus: 1\ndisks:\n  - path: {self.root / 'web1.img'}\nhvparams:\n"
        self.instance_file.write_text(text + "  disk_type: ide\n")
        out.print(f"\n[bold cyan]$ cat {self.instance_file}[/]")
        out.print(self.instance_file.read_text().rstrip())

    def show_console(self) -> None:
        """Some lines of the guest's serial console, as they come."""
        out.print("\n[bold cyan]$ hostler console web1[/]")
        console = subprocess.Popen(
            [sys.executable, "-m", "hostler", "console", "web1"],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert console.stdout is not None
        deadline, shown = time.monotonic() + SERIAL_S, 0
        try:
            while shown < TICKS_SHOWN and time.monotonic() < deadline and (line := console.stdout.readline()):
                text = line.decode(errors="replace").strip()
                if text:
                    out.print(f"  {text}", markup=False)
                shown += text.startswith(tiny_guest.TICK_PREFIX.decode().strip())
        finally:
            console.kill()
            console.wait()
        if shown < TICKS_SHOWN:
            sys.exit("the guest's counter did not show on its serial console")

    def end(self) -> None:
        """Stop what the demo started."""
        subprocess.run([sys.executable, "-m", "hostler", "stop", "web1", "--force"], env=self.env, capture_output=True)
        if self.worker:
            self.worker.send_signal(signal.SIGTERM)
            self.worker.wait(30)
        subprocess.run([sys.executable, "-m", "hostler", "embedded", "stop"], env=self.env, capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave worker and guest running, and say how to go on")
    keep = parser.parse_args().keep
    began = time.monotonic()
    demo = Demo(Path(tempfile.mkdtemp(prefix="hostler-demo-", dir="/tmp")))
    try:
        demo.start_worker()
        demo.write_instance()
        demo.hostler("start", NODE, str(demo.instance_file))
        demo.show_console()
        demo.hostler("list")
        if not keep:
            demo.hostler("stop", "web1")
            demo.hostler("jobs")
        else:
            _say_how_to_go_on(demo)
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            demo.end()
    if not keep:
        _sum_up(time.monotonic() - began)


def _sum_up(took_s: float) -> None:
    out.print(
        f"\n[bold green]Done in {took_s:.1f} s.[/] A worker booted a real QEMU guest as a job, reported each phase, "
        "showed its console,\nand shut it down by its ACPI power button. Nothing is left running and nothing is left "
        "on disk.\n\nWhere to go next:\n"
        "  ./dev demo --keep     the same, left running for you to play with\n"
        "  ./dev hostler doctor  what this machine needs for guests of your own\n"
        "  README.md             a worker of your own, and jobs from your own programs\n"
        "  ./dev test            every test, on real QEMU and real databases"
    )


def _say_how_to_go_on(demo: Demo) -> None:
    exports = " ".join(f"{name}={value}" for name, value in demo.settings.items())
    pid = demo.worker.pid if demo.worker else 0
    out.print(
        "\n[bold green]The worker and its guest are running.[/] To go on, in this shell:\n\n"
        f"  export {exports}\n"
        "  ./dev hostler list\n"
        "  ./dev hostler console web1     # ^] leaves it; 's' makes the guest shut down, 'r' reset\n"
        f"  kill -9 {pid}; ./dev worker     # the guest does not notice, the next worker adopts it\n\n"
        f"To end it: ./dev hostler stop web1; kill {pid}; ./dev hostler embedded stop; rm -r {demo.root}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()

"""Settings come from the environment, and a wrong one is refused by its name before anything is started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hostler import settings
from hostler.settings import DIR_MAX, Settings, SettingsError, known_names

Load = Callable[..., Settings]
CONTRACT = {
    *("HOSTLER_NODE", "HOSTLER_STATE_DIR", "HOSTLER_RUN_DIR", "HOSTLER_BROKER_URL", "HOSTLER_RESULT_BACKEND"),
    *("HOSTLER_DATABASE_URL", "HOSTLER_QEMU_BINARY", "HOSTLER_MIGRATION_ADDRESS", "HOSTLER_MIGRATION_PORTS"),
    *("HOSTLER_IFUP", "HOSTLER_IFDOWN", "HOSTLER_LOG_FORMAT"),
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Reads the settings from nothing but the given variables."""
    for name in [name for name in os.environ if name.startswith("HOSTLER_")]:
        monkeypatch.delenv(name)

    def read(**variables: str) -> Settings:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return settings.load.__wrapped__()

    return read


def test_the_contracts_names_are_known() -> None:
    assert known_names() >= CONTRACT


def test_without_any_setting_everything_is_embedded_below_the_state_folder(load: Load) -> None:
    chosen = load()
    assert chosen.embedded_broker
    assert chosen.embedded_database
    assert chosen.needs_embedded_server
    assert str(chosen.broker_socket).startswith(f"{chosen.state_dir}/")
    assert chosen.effective_broker_url == chosen.effective_result_backend
    assert chosen.effective_database_url == f"sqlite+pysqlite:///{chosen.state_dir}/hostler.sqlite"
    assert chosen.migration_ports == (49152, 49215)
    assert chosen.log_format == ""
    assert (chosen.migration_tls, chosen.migration_tls_dir) == ("allowed", "")
    assert (chosen.limit_migrations, chosen.limit_incoming) == (2, 2)
    if os.geteuid() == 0:
        assert (chosen.state_dir, chosen.run_dir) == (Path("/var/lib/hostler"), Path("/run/hostler"))


def test_the_default_node_is_the_host_made_a_node_name(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    for host, node in (
        ("n1.example.org", "n1.example.org"),
        ("a b/c", "a-b-c"),
        ("h" * 80, "h" * 63),
        ("", "localhost"),
    ):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        assert load().node == node


def test_a_person_who_is_not_root_has_folders_of_their_own(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    chosen = load(XDG_STATE_HOME="/home/u/state", XDG_RUNTIME_DIR="/run/user/1000")
    assert (chosen.state_dir, chosen.run_dir) == (Path("/home/u/state/hostler"), Path("/run/user/1000/hostler"))
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    chosen = load(HOME="/home/u")
    assert (chosen.state_dir, chosen.run_dir) == (Path("/home/u/.local/state/hostler"), Path("/tmp/hostler-1000"))


def test_every_setting_is_read_from_its_variable(load: Load) -> None:
    chosen = load(
        HOSTLER_NODE="n1",
        HOSTLER_STATE_DIR="/srv/state",
        HOSTLER_RUN_DIR="/srv/run",
        HOSTLER_BROKER_URL="redis://db/0",
        HOSTLER_RESULT_BACKEND="redis://db/1",
        HOSTLER_DATABASE_URL="postgresql+psycopg://db/hostler",
        HOSTLER_QEMU_BINARY="/opt/qemu",
        HOSTLER_MIGRATION_ADDRESS="192.0.2.1",
        HOSTLER_MIGRATION_PORTS="50000-50010",
        HOSTLER_IFUP="/etc/ifup",
        HOSTLER_IFDOWN="/etc/ifdown",
        HOSTLER_LOG_FORMAT="json",
    )
    assert chosen.node == "n1"
    assert (chosen.state_dir, chosen.run_dir) == (Path("/srv/state"), Path("/srv/run"))
    assert (chosen.effective_broker_url, chosen.effective_result_backend) == ("redis://db/0", "redis://db/1")
    assert chosen.effective_database_url == "postgresql+psycopg://db/hostler"
    assert (chosen.qemu_binary, chosen.migration_address) == ("/opt/qemu", "192.0.2.1")
    assert chosen.migration_ports == (50000, 50010)
    assert (chosen.ifup, chosen.ifdown, chosen.log_format) == ("/etc/ifup", "/etc/ifdown", "json")
    assert not chosen.needs_embedded_server


def test_an_empty_variable_is_an_unset_one(load: Load) -> None:
    chosen = load(**dict.fromkeys(sorted(CONTRACT), ""))
    assert chosen.embedded_broker
    assert chosen.node


@pytest.mark.parametrize(
    ("broker", "backend", "effective", "embedded"),
    [
        ("redis://db/0", "", "redis://db/0", False),
        ("rediss://db/0", "", "rediss://db/0", False),
        ("amqp://mq//", "", None, True),
        ("amqp://mq//", "redis://db/1", "redis://db/1", False),
        ("", "redis://db/1", "redis://db/1", True),
    ],
)
def test_results_go_to_the_redis_that_is_the_broker_else_to_the_embedded_one(
    load: Load, broker: str, backend: str, effective: str | None, embedded: bool
) -> None:
    chosen = load(HOSTLER_BROKER_URL=broker, HOSTLER_RESULT_BACKEND=backend, HOSTLER_STATE_DIR="/s")
    assert chosen.effective_result_backend == (effective or "redis+socket:///s/broker/redis.sock?virtual_host=0")
    assert chosen.needs_embedded_server is embedded


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        *(("HOSTLER_NODE", value, "is not a node name") for value in ("n 1", "n/1", "..\n", "n" * 64, "nö")),
        *((name, "relative", "is not an absolute path") for name in ("HOSTLER_STATE_DIR", "HOSTLER_RUN_DIR")),
        *((name, "/" + "d" * DIR_MAX, "is longer than") for name in ("HOSTLER_STATE_DIR", "HOSTLER_RUN_DIR")),
        ("HOSTLER_RUN_DIR", "/" + "ü" * (DIR_MAX // 2 + 1), "is longer than"),
        *(
            ("HOSTLER_MIGRATION_PORTS", value, "is not a port range")
            for value in ("50000", "2-1", "0-5", "1-65536", "a-b", "1-2-3", "[1,2]")
        ),
        *(("HOSTLER_MIGRATION_TLS", value, "") for value in ("on", "Required", "1")),
        ("HOSTLER_MIGRATION_TLS_DIR", "tls", "is not an absolute path"),
        *((f"HOSTLER_LIMIT_{of}", value, "") for of in ("MIGRATIONS", "INCOMING") for value in ("0", "-1", "some")),
        *(("HOSTLER_LOG_FORMAT", value, "") for value in ("JSON", "text")),
        *(("HOSTLER_QEMU_TIMEOUT_S", value, "") for value in ("0", "-1", "601", "soon", "nan")),
        *(("HOSTLER_CONCURRENCY", value, "") for value in ("0", "1025", "1.5", "many")),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(load: Load, name: str, value: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: .*{reason}"):
        load(**{name: value})


def test_all_wrong_settings_are_named_at_once(load: Load) -> None:
    with pytest.raises(SettingsError) as error:
        load(HOSTLER_NODE="a b", HOSTLER_CONCURRENCY="0")
    assert "HOSTLER_NODE: " in str(error.value)
    assert "HOSTLER_CONCURRENCY: " in str(error.value)


def test_a_misspelt_setting_is_refused_and_the_right_ones_are_listed(load: Load) -> None:
    with pytest.raises(SettingsError, match=r"unknown setting HOSTLER_BROKERURL; known are .*HOSTLER_BROKER_URL"):
        load(HOSTLER_BROKERURL="redis://db/0")


def test_no_other_variable_and_no_file_is_taken_for_a_setting(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("HOSTLER_NODE=from-a-file\n")
    monkeypatch.chdir(tmp_path)
    assert load(NODE="other", BROKER_URL="redis://other/0", hostler_node="lower").node not in ("from-a-file", "other")


def test_the_longest_folders_are_taken(load: Load) -> None:
    longest = "/" + "d" * (DIR_MAX - 1)
    chosen = load(HOSTLER_STATE_DIR=longest, HOSTLER_RUN_DIR=longest)
    assert len(os.fsencode(chosen.broker_socket)) <= 107


def test_a_worker_with_a_wrong_setting_says_so_in_one_line_and_starts_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for wrong in ({"HOSTLER_NODE": "a b"}, {"HOSTLER_NOD": "n1"}):
        env = {name: value for name, value in os.environ.items() if not name.startswith("HOSTLER_")}
        done = subprocess.run(
            [sys.executable, "-m", "hostler", "worker"],
            env=env | {"HOSTLER_STATE_DIR": str(state)} | wrong,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode != 0
        assert next(iter(wrong)) in done.stderr
        assert "Traceback" not in done.stderr
        assert not state.exists()

"""Instance files: what they may hold, and errors that name file, line and reason."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from hostler.errors import InvalidArgument
from hostler.instance_file import SIZE_MAX, load
from hostler.payloads import Instance, parse

YAML = """\
# a web server
name: web1
memory_mib: 512
disks:
  - {path: /srv/web1.raw, mode: rw}
nics:
  - {mac: 52:54:00:12:34:56, mode: user}
hvparams:
  acpi: true
"""


def written(folder: Path, text: str | bytes, name: str = "web1.yaml") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_yaml_file_is_read(tmp_path: Path) -> None:
    instance = parse(Instance, load(written(tmp_path, YAML)))
    assert (instance.name, instance.memory_mib, instance.disks[0].path) == ("web1", 512, "/srv/web1.raw")


def test_a_mac_address_of_digits_only_is_not_a_number_to_base_60(tmp_path: Path) -> None:
    assert load(written(tmp_path, YAML))["nics"][0]["mac"] == "52:54:00:12:34:56"


def test_a_date_or_an_octal_number_stays_text(tmp_path: Path) -> None:
    text = "name: 2024-01-01\ntags: [0755, 1_000, 12:30]\nsize: 1.5\ncount: -3"
    expected = {"name": "2024-01-01", "tags": ["0755", "1_000", "12:30"], "size": 1.5, "count": -3}
    assert load(written(tmp_path, text)) == expected


def test_a_json_file_is_read_tabs_included(tmp_path: Path) -> None:
    assert load(written(tmp_path, '{\n\t"name": "web1",\n\t"memory_mib": 64\n}\n')) == {
        "name": "web1",
        "memory_mib": 64,
    }


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps({"name": "web1"}).encode())))
    assert load("-") == {"name": "web1"}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("name: web1\nmemory_mib: 64\nname: web2\n", 3, "key 'name' is given twice"),
        ("name: web1\ndisks:\n- {path: /a, path: /b}\n", 3, "key 'path' is given twice"),
        ('{"name": "web1",\n "vcpus": 1,\n "vcpus": 2}', 3, "key 'vcpus' is given twice"),
        ('{"name": "web1",\n "vcpus" 1}', 2, "Expecting ':' delimiter"),
        ('{"name": "web1"', 1, "Expecting ',' delimiter"),
        ("name: web1\n  memory_mib: 64\n", 2, "mapping values are not allowed here"),
        ("name: web1\ntags: [a, b\n", 3, "expected ',' or ']'"),
        ("name: !!python/object/apply:os.system ['true']\n", 1, "could not determine a constructor"),
        ("name: web1\n---\nname: web2\n", 2, "but found another document"),
        ("- web1\n- web2\n", 1, "must hold one mapping such as 'name: web1', not a list"),
        ("web1\n", 1, "not a str"),
        ("", 1, "not empty"),
        ("# nothing\n", 1, "not empty"),
        ("[" * 5000, 1, "nested too deeply"),
        ('{"a":' * 5000, 1, "nested too deeply"),
        ("name: web\x00\n", 1, "special characters are not allowed"),
        (b"name: web1\ntags: [\xff]\n", 2, "is not text in UTF-8"),
        (b"#" * (SIZE_MAX + 1), 1, "is larger than"),
    ],
)
def test_a_wrong_file_is_refused_with_file_line_and_reason(
    tmp_path: Path, text: str | bytes, line: int, reason: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InvalidArgument) as wrong:
        load(path)
    [error] = wrong.value.details["errors"]
    assert error["field"] == f"{path}:{line}"
    assert reason in error["reason"]


@pytest.mark.parametrize(("name", "reason"), [("missing.yaml", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason) as wrong:
        load(str(tmp_path / name))
    assert str(tmp_path) in wrong.value.message

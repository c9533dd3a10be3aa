"""Instance files: one instance in YAML or JSON, read into the dict that goes into a job.

Only the form is checked here (syntax, duplicate keys, one mapping); what the fields mean is checked by
:mod:`hostler.payloads`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from hostler.errors import InvalidArgument

STDIN = "-"
SIZE_MAX = 1024 * 1024
"""An instance takes a few hundred bytes; a megabyte means the wrong file."""


def load(path: str) -> dict[str, Any]:
    """The instance in the file ``path``, or in standard input for ``-``.

    Raises InvalidArgument naming file, line and reason.
    """
    name = "standard input" if path == STDIN else path
    text = _read(path, name)
    document = _json(text, name) if text.lstrip().startswith("{") else _yaml(text, name)
    if not isinstance(document, dict):
        kind = "empty" if document is None else f"a {type(document).__name__}"
        raise _wrong(name, 1, f"must hold one mapping such as 'name: web1', not {kind}")
    return document


def _read(path: str, name: str) -> str:
    try:
        if path == STDIN:
            raw = sys.stdin.buffer.read(SIZE_MAX + 1)
        else:
            with Path(path).open("rb") as file:
                raw = file.read(SIZE_MAX + 1)
        if len(raw) > SIZE_MAX:
            raise _wrong(name, 1, f"is larger than {SIZE_MAX} bytes; is it the right file?")
        return raw.decode()
    except OSError as exc:
        raise InvalidArgument([{"field": name, "reason": f"cannot be read: {exc.strerror}"}]) from exc
    except UnicodeDecodeError as exc:
        raise _wrong(name, raw[: exc.start].count(b"\n") + 1, "is not text in UTF-8") from exc


def _wrong(name: str, line: int, reason: str) -> InvalidArgument:
    return InvalidArgument([{"field": f"{name}:{line}", "reason": reason}])


def _json(text: str, name: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as exc:
        raise _wrong(name, exc.lineno, f"{exc.msg} (column {exc.colno})") from exc
    except _DuplicateKey as exc:
        raise _wrong(name, _line_of_second(text, exc.key), f"key {exc.key!r} is given twice") from exc
    except RecursionError as exc:
        raise _wrong(name, 1, "is nested too deeply") from exc


class _DuplicateKey(Exception):
    def __init__(self, key: str) -> None:
        self.key = key


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    seen: dict[str, object] = {}
    for key, value in pairs:
        if key in seen:
            raise _DuplicateKey(key)
        seen[key] = value
    return seen


def _line_of_second(text: str, key: str) -> int:
    # Python's parser does not say where a key stood; the second mention is close enough to find it by eye.
    places = [match.start() for match in re.finditer(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", text)]
    return text.count("\n", 0, places[1] if len(places) > 1 else 0) + 1


def _yaml(text: str, name: str) -> object:
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        raise _wrong(name, mark.line + 1 if mark else 1, exc.problem or str(exc)) from exc
    except (yaml.YAMLError, RecursionError, ValueError) as exc:
        reason = "is nested too deeply" if isinstance(exc, RecursionError) else str(exc).splitlines()[0]
        raise _wrong(name, 1, reason) from exc


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses duplicate keys and reads only plain numbers as numbers.

    YAML 1.1, which it follows otherwise, takes the MAC address 52:54:00:12:34:56 for a number to base 60 and
    2024-01-01 for a date.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_NUMBERS_AND_DATES = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS_AND_DATES]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+\.[0-9]+$"), list("-+0123456789"))

"""HOSTLER_MIGRATION_TLS: what a node makes of what a job asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hostler.errors import InvalidArgument
from hostler.settings import Settings
from models import Database
from worker.operations.context import NodeContext
from worker.operations.live_migration import security


@pytest.fixture
def node(tmp_path: Path) -> Callable[[str], NodeContext]:
    """A node by its policy, without certificates."""
    database = Database(f"sqlite:///{tmp_path}/hostler.db")
    return lambda policy: NodeContext(Settings(node="n1", migration_tls=policy), database, "unused", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("refuse", [lambda node: security.wish(node, True), lambda node: security.agree(node, "yes")])
def test_a_node_that_never_uses_tls_refuses_who_asks_for_it(
    node: Callable[[str], NodeContext], refuse: Callable[[NodeContext], object]
) -> None:
    with pytest.raises(InvalidArgument, match="HOSTLER_MIGRATION_TLS=off") as refused:
        refuse(node("off"))
    assert [each["field"] for each in refused.value.details["errors"]] == ["tls"]


def test_a_node_that_never_uses_tls_does_without_where_nobody_asks(node: Callable[[str], NodeContext]) -> None:
    assert [security.wish(node("off"), asked) for asked in (None, False)] == ["no", "no"]
    assert [security.agree(node("off"), wanted) for wanted in ("where possible", "no")] == [False, False]


def test_a_node_that_requires_tls_refuses_who_declines_it(node: Callable[[str], NodeContext]) -> None:
    with pytest.raises(InvalidArgument, match="requires it"):
        security.wish(node("required"), False)

"""Where guests go that leave a node: by the memory that targets say they have, and that SQL has promised there."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import update

from models import Database, Instance, Node
from worker.operations.maintenance.parts import ID_MAX, KEY_MAX, Part, key_of
from worker.operations.maintenance.targets import Rooms
from worker.operations.steps import Step

SPEC = {"memory_mib": 300}


def part(kind: str, instance: str | None, place: str, *, ended: bool = True, result: Any = None) -> Part:
    step = Step("d1", "x", "instance.migrate", "n1", {})  # type: ignore[arg-type]
    return Part("d1.x", kind, instance, place, True, ended, ended, False, result, "", step)


def facts(**available_mib: int) -> dict[str, Part]:
    """What nodes say that have 1000 MiB each."""
    return {
        name: part("facts", None, name, result={"memory_available_mib": free, "memory_total_mib": 1000})
        for name, free in available_mib.items()
    }


@pytest.fixture
def shared(database: Database) -> Database:
    """Node n2 has a guest of 300 MiB."""
    with database.transaction() as session:
        session.add_all([Node(name="n2"), Node(name="n3")])
        session.flush()
        session.add(Instance(name="there", node="n2", state="running", spec=SPEC))
    return database


def rooms(database: Database, parts: list[Part] | None = None, **available_mib: int) -> Rooms:
    return Rooms(database, facts(**available_mib), parts or [], {"web1": 200, "web2": 100})


def test_free_is_what_the_host_has_and_sql_has_not_promised(shared: Database) -> None:
    assert rooms(shared, n2=900, n3=900).free_mib == {"n2": 700, "n3": 900}
    assert rooms(shared, n2=100, n3=900).free_mib == {"n2": 100, "n3": 900}
    with shared.transaction() as session:
        session.execute(update(Instance).values(state="crashed"))
    assert rooms(shared, n2=900).free_mib == {"n2": 900}


def test_a_guest_on_its_way_has_its_memory_there_already(shared: Database) -> None:
    coming = rooms(shared, [part("move", "web1", "n2", ended=False)], n2=900)
    assert (coming.free_mib, coming.under_way) == ({"n2": 500}, {"n2": 1})
    # One that has arrived is among those that SQL has promised.
    came = rooms(shared, [part("move", "web1", "n2")], n2=900)
    assert (came.free_mib, came.under_way) == ({"n2": 700}, {"n2": 0})


def test_a_guest_goes_where_the_most_is_free_and_no_link_has_too_many(shared: Database) -> None:
    found = rooms(shared, n2=600, n3=500)
    assert [found.take(200, [], per_link=2) for _ in range(5)] == ["n2", "n3", "n2", "n3", None]
    assert found.take(1, ["n3"], per_link=9) == "n2"
    assert found.take(1000, [], per_link=9) is None
    assert found.in_words() == "n2 has 199 MiB free, n3 has 100 MiB free"


def test_a_part_has_an_id_that_a_migration_of_its_own_can_have() -> None:
    names = ["a" * 255, "a" * 254 + "b"]
    assert key_of(names[0]) != key_of(names[1])
    assert {len(key_of(name)) for name in names} == {KEY_MAX}
    assert key_of("web1") == "web1"
    assert len("x" * ID_MAX + f".move.{key_of(names[0])}.1000") <= 240

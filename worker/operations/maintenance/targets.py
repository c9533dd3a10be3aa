"""Which nodes can take guests, and how much of their memory is free: as they say themselves, and as SQL knows it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from sqlalchemy import func, select

from hostler.contract import TaskName
from hostler.errors import InvalidArgument
from models import Database, Instance, Node
from worker.operations import presence
from worker.operations.context import JobContext, NodeContext
from worker.operations.maintenance.marks import why_drained
from worker.operations.maintenance.parts import PLACING, Part
from worker.operations.steps import HandedOver, Step
from worker.operations.wanted import IDLE

FACTS_S = 15.0
"""How long a node may take to say how much memory it has; it takes milliseconds."""


def unusable(database: Database, names: Iterable[str], leaving: str) -> dict[str, str]:
    """Those of the nodes that can take no guest of the node ``leaving``, and why."""
    known = presence.presences(database)
    with database.reading() as session:
        rows = {row.name: row for row in session.scalars(select(Node))}
    return {name: why for name in names if (why := _why_unusable(name, leaving, rows.get(name), known))}


def _why_unusable(name: str, leaving: str, row: Node | None, known: Mapping[str, presence.Presence]) -> str:
    if name == leaving:
        return "is the node that its guests leave"
    if row is None:
        return f"this node's database knows no node {name!r}; nodes that exchange guests share one database"
    if row.drained_at:
        return why_drained(row)
    return "" if known[name].alive else known[name].absence


def require_usable(database: Database, field: str, names: Collection[str], leaving: str) -> None:
    """Raises InvalidArgument, naming each that is not."""
    wrong = unusable(database, names, leaving)
    if errors := [
        {"field": f"{field}[{index}]", "reason": wrong[name]} for index, name in enumerate(names) if name in wrong
    ]:
        raise InvalidArgument(errors)


def all_usable(database: Database, leaving: str) -> list[str]:
    """Every node that can take guests of the node ``leaving``."""
    names = [*presence.presences(database)]
    wrong = unusable(database, names, leaving)
    return [name for name in names if name not in wrong]


def facts_of(node: NodeContext, job: JobContext, names: Collection[str], parts: list[Part]) -> dict[str, Part]:
    """The nodes that said what they have, once all have, or had time enough. Raises HandedOver to wait for them."""
    asked = {part.place: part for part in parts if part.kind == "facts"}
    steps = [Step(job.id, f"facts.{name}", TaskName.NODE_INFO, name, {}) for name in asked or names]
    waited_s = max((node.ledger.waited_s(step.id) or 0.0 for step in steps), default=0.0)
    silent = [step for step in steps if not ((part := asked.get(step.node)) and part.ended)]
    if silent and waited_s < FACTS_S:
        job.phase("plan", 3, f"asking {', '.join(step.node for step in silent)} how much memory is free there")
        raise HandedOver(node.ledger.hand_over(job.id, silent, FACTS_S - waited_s))
    return {name: part for name, part in asked.items() if part.succeeded}


class Rooms:
    """The memory that is free on each target, less what is already on its way there.

    A guest's memory is free there if the host says so and SQL has not promised it to a guest that does not use all of
    its own yet.
    """

    def __init__(
        self, database: Database, facts: Mapping[str, Part], parts: list[Part], memory_mib: Mapping[str, int]
    ) -> None:
        placed = [part for part in parts if part.kind in PLACING and (part.succeeded or not part.ended)]
        promised = _promised(database, facts)
        self.free_mib: dict[str, int] = {}
        self.under_way = dict.fromkeys(facts, 0)
        for name, part in facts.items():
            came = [each for each in placed if each.place == name]
            coming = [each for each in came if not each.ended]
            self.under_way[name] = len(coming)
            self.free_mib[name] = min(
                part.result["memory_available_mib"] - _sum(came, memory_mib),
                part.result["memory_total_mib"] - promised.get(name, 0) - _sum(coming, memory_mib),
            )

    def take(self, memory_mib: int, tried: Collection[str], per_link: int) -> str | None:
        """The target with the most memory free that has enough of it, and is not busy; it then has so much less."""
        fitting = [
            name
            for name, free_mib in self.free_mib.items()
            if name not in tried and free_mib >= memory_mib and self.under_way[name] < per_link
        ]
        if not fitting:
            return None
        chosen = max(fitting, key=lambda name: (self.free_mib[name], name))
        self.free_mib[chosen] -= memory_mib
        self.under_way[chosen] += 1
        return chosen

    def in_words(self) -> str:
        """How much is free, for people."""
        return ", ".join(f"{name} has {max(0, free)} MiB free" for name, free in sorted(self.free_mib.items()))


def _sum(parts: Iterable[Part], memory_mib: Mapping[str, int]) -> int:
    return sum(memory_mib.get(part.instance or "", 0) for part in parts)


def _promised(database: Database, names: Collection[str]) -> dict[str, int]:
    query = (
        select(Instance.node, func.sum(Instance.spec["memory_mib"].as_integer()).label("mib"))
        .where(Instance.node.in_(names), Instance.state.not_in(IDLE))
        .group_by(Instance.node)
    )
    with database.reading() as session:
        return {row.node: int(row.mib) for row in session.execute(query)}

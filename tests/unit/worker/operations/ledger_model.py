"""What the ledger has to do, said in dicts and lists: no rows, no locks, one caller at a time.

Each method is one transaction of the ledger, so that a worker can be killed after any of them; ``wake_others`` is what
it does in transactions of their own after a job's end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from worker.operations.job_rows import INSTANCE, LIMIT, PARENTS
from worker.operations.ledger import RETRIES_MAX, RETRYABLE
from worker.operations.receipts import CancelOutcome, Decision, Receipt, Verdict

FINAL = {"SUCCESS", "FAILURE", "REVOKED"}
CLAIMED = {"STARTED", "PROGRESS"}


@dataclass
class ModelJob:
    """A job as the ledger has to know it; ``number`` is its place in the order of receipt."""

    receipt: Receipt
    node: str
    number: int
    state: str = "PENDING"
    waits_on: str | None = None
    claimed: bool = False
    """By the living, or it was when it ended."""
    has_place: bool = False
    asked_to_give_up: bool = False
    due: bool = False
    attempts: int = 0
    retries: int = 0
    deaths: int = 0
    retry_of: str | None = None

    def become(self, state: str, waits_on: str | None = None) -> None:
        self.state, self.waits_on = state, waits_on


@dataclass
class Ending:
    """What a job's end brings about: who has the instance next, whether a place is free, whose parent has ended."""

    wakeups: list[str]
    place: bool
    children: list[str]


class LedgerModel:
    """The jobs of all nodes; ``places`` is how many starts each may have under way."""

    def __init__(self, places: dict[str, int]) -> None:
        self.places = places
        self.jobs: dict[str, ModelJob] = {}
        self.holders: dict[str, str] = {}

    # Who is where

    def at_work(self, node: str | None = None) -> list[str]:
        return [i for i, job in self.jobs.items() if job.state in CLAIMED and node in (None, job.node)]

    def waiting_on(self, what: str) -> list[str]:
        return [i for i, job in self.jobs.items() if job.waits_on == what]

    def of(self, node: str, *states: str) -> list[str]:
        return [i for i, job in self.jobs.items() if job.node == node and job.state in states]

    def with_a_place(self, node: str) -> list[str]:
        return [i for i, job in self.jobs.items() if job.node == node and job.has_place]

    def children(self, parent: str) -> list[str]:
        return [i for i in self.waiting_on(PARENTS) if parent in self.jobs[i].receipt.after]

    # Receiving

    def _insert(self, receipt: Receipt, node: str) -> ModelJob:
        return self.jobs.setdefault(receipt.job_id, ModelJob(receipt, node, len(self.jobs)))

    def _parents(self, job: ModelJob) -> tuple[list[str], list[str]]:
        wanted = sorted(set(job.receipt.after))
        states = {parent: self.jobs[parent].state if parent in self.jobs else "unheard of" for parent in wanted}
        still_open = [parent for parent in wanted if states[parent] not in FINAL]
        return still_open, [parent for parent in wanted if states[parent] in FINAL - {"SUCCESS"}]

    def write_down(self, receipt: Receipt, node: str) -> None:
        """The first thing that is done with a job that comes after others."""
        if receipt.job_id not in self.jobs:
            self._insert(receipt, node).become("WAITING", PARENTS)

    def meet_parents(self, receipt: Receipt) -> Decision | None:
        """What is done with it next; None if it need not wait for them."""
        job = self.jobs[receipt.job_id]
        if job.waits_on != PARENTS:
            return None
        still_open, failed = self._parents(job)
        if failed and receipt.after_failure == "cancel":
            job.become("REVOKED")
            return Decision(Verdict.REVOKED)
        if still_open:
            job.become("WAITING", PARENTS)
            return Decision(Verdict.WAIT, tuple(still_open))
        job.become("PENDING")
        return None

    def decide(self, receipt: Receipt, node: str) -> Decision:
        job = self._insert(receipt, node)
        if job.node != node or job.state in CLAIMED | FINAL or (job.state == "RETRY" and not job.due):
            return Decision(Verdict.DROP)
        name = job.receipt.instance_name
        if name and (holder := self.holders.setdefault(name, receipt.job_id)) != receipt.job_id:
            job.become("WAITING", INSTANCE)
            ahead = [i for i in self._queue(name) if self.jobs[i].number < job.number]
            return Decision(Verdict.WAIT, (holder, *ahead))
        if job.receipt.slot and not job.has_place:
            if len(others := self.with_a_place(node)) >= self.places[node]:
                job.become("WAITING", LIMIT)
                return Decision(Verdict.WAIT, tuple(others))
            job.has_place = True
        job.become("STARTED")
        job.claimed, job.attempts = True, job.attempts + 1
        return Decision(Verdict.RUN, (), job.attempts, job.deaths, job.asked_to_give_up)

    def receive(self, receipt: Receipt, node: str) -> Decision:
        """A whole delivery."""
        if receipt.after:
            self.write_down(receipt, node)
            if decision := self.meet_parents(receipt):
                return decision
        return self.decide(receipt, node)

    # Ending

    def _queue(self, instance: str) -> list[str]:
        return [i for i in self.waiting_on(INSTANCE) if self.jobs[i].receipt.instance_name == instance]

    def end(self, job_id: str, state: str) -> Ending:
        """The job is final, its instance is the next one's, its place is free; nobody else knows yet."""
        job = self.jobs[job_id]
        job.become(state)
        place, job.has_place = job.has_place, False
        name, woken = job.receipt.instance_name, []
        if name and self.holders.get(name) == job_id:
            del self.holders[name]
            if woken := self._queue(name)[:1]:
                self.holders[name] = woken[0]
                self.jobs[woken[0]].become("PENDING")
        return Ending(woken, place, self.children(job_id))

    def wake_others(self, ending: Ending, node: str) -> tuple[list[str], list[str]]:
        """Whom the end wakes, and whom it revokes."""
        woken, revoked = [*ending.wakeups, *(self.fill(node) if ending.place else [])], []
        for child in ending.children:
            more, gone = self.settle(child, node)
            woken, revoked = woken + more, revoked + gone
        return woken, revoked

    def fill(self, node: str) -> list[str]:
        """Give a node's free places to those that wait longest, the more urgent first."""
        queue = [i for i in self.waiting_on(LIMIT) if self.jobs[i].node == node]
        queue.sort(key=lambda i: (-self.jobs[i].receipt.priority, self.jobs[i].number))
        served = queue[: max(0, self.places[node] - len(self.with_a_place(node)))]
        for job_id in served:
            self.jobs[job_id].has_place = True
            self.jobs[job_id].become("PENDING")
        return served

    def settle(self, job_id: str, node: str) -> tuple[list[str], list[str]]:
        """What a job that waited for parents does, now that one may have ended."""
        job = self.jobs[job_id]
        if job.waits_on != PARENTS:
            return [], []
        still_open, failed = self._parents(job)
        if failed and job.receipt.after_failure == "cancel":
            woken, revoked = self.wake_others(self.end(job_id, "REVOKED"), node)
            return woken, [job_id, *revoked]
        if still_open:
            return [], []
        job.become("PENDING")
        return [job_id], []

    # Trying again

    def postpone(self, job_id: str) -> Ending | None:
        """It keeps its instance and gives up its place; None when that was done often enough."""
        job = self.jobs[job_id]
        if job.retries >= RETRIES_MAX:
            return None
        job.become("RETRY")
        ending = Ending([], job.has_place, [])
        job.claimed, job.has_place, job.due, job.retries = False, False, False, job.retries + 1
        return ending

    def wake_due(self, node: str) -> list[str]:
        due = [i for i in self.of(node, "RETRY") if self.jobs[i].due]
        for job_id in due:
            self.jobs[job_id].become("PENDING")
        return due

    def refuses_to_retry(self, job_id: str, node: str) -> str | None:
        """The error that asking for a retry meets."""
        job = self.jobs.get(job_id)
        if job is None or job.node != node:
            return "UnknownJob"
        if any(other.state not in FINAL for i, other in self.jobs.items() if job_id in (i, other.retry_of)):
            return "InstanceBusy"
        return "Unsupported" if job.state == "SUCCESS" or job.receipt.task not in RETRYABLE else None

    def retry(self, job_id: str, new_id: str) -> Receipt:
        old = self.jobs[job_id]
        receipt = replace(old.receipt, job_id=new_id, after=(), after_failure="cancel")
        self._insert(receipt, old.node).retry_of = job_id
        return receipt

    # Cancelling

    def cancel(self, receipt: Receipt, node: str, *, also_running: bool) -> tuple[CancelOutcome, Ending]:
        nothing = Ending([], False, [])
        if receipt.job_id not in self.jobs:
            stand_in = Receipt(receipt.job_id, "unknown", {}, None)
            self._insert(stand_in, node).become("REVOKED")
            return CancelOutcome.REVOKED, Ending([], False, self.children(receipt.job_id))
        job = self.jobs[receipt.job_id]
        if job.state in FINAL:
            never_began = job.state == "REVOKED" and not job.claimed
            return CancelOutcome.REVOKED if never_began else CancelOutcome.FINISHED, nothing
        if job.state in CLAIMED or (job.state == "PENDING" and job.attempts):
            job.asked_to_give_up |= also_running
            return CancelOutcome.REQUESTED, nothing
        return CancelOutcome.REVOKED, self.end(receipt.job_id, "REVOKED")

    # After a death, and healing

    def take_over(self, node: str) -> list[str]:
        """A new worker after one that was killed."""
        freed = self.of(node, "PENDING", *CLAIMED)
        for job_id in freed:
            self.jobs[job_id].deaths += self.jobs[job_id].claimed
            self.jobs[job_id].claimed = False
            self.jobs[job_id].become("PENDING")
        return freed

    def overdue(self, node: str) -> tuple[list[str], list[str]]:
        woken, revoked = [], []
        for job_id in [i for i in self.waiting_on(PARENTS) if self.jobs[i].node == node]:
            more, gone = self.settle(job_id, node)
            woken, revoked = woken + more, revoked + gone
        return woken + self.fill(node), revoked

"""The worker that gives up a dead node killed at each step of it; the steps are seen, as in ``sweep``.

Node n1 loses its power with a guest that is wanted running, behind which a job waits. n2 fences it, n3 takes the guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hostler.client import Job
from tests.faults.migrations import END_S, WHENS, Sweep, dies, some
from tests.faults.promises import Sent, all_ready, violations
from tests.faults.sweep import Bed, Step
from tests.nodes import TestNode, tiny_instance, until
from tests.pairs import job_row, pair, still_wrong
from tests.power import had_by, lose_power, pretend_boot

NAME = "web1"


class Trio:
    """A node that dies each time, one that fences it and dies where it is told to, and one that takes the guest."""

    def __init__(self, nodes: list[TestNode]) -> None:
        self.dead, self.fencer, self.other = nodes
        self.bed = Bed(self.fencer)
        self.waiting = ""

    def rest(self) -> None:
        """No plan, two workers, and a host without power on which the guest ran."""
        self.bed.no_plan()
        if self.fencer.worker is None or self.fencer.worker.poll() is not None:
            self.fencer.kill_worker()
            self.bed.start_worker()
        if self.other.worker is None:
            self.other.start_worker()
        pretend_boot(self.dead)
        self.dead.start_worker()
        row = self.other.row(NAME)
        if row and row.runtime:
            self.other.do("instance.stop", name=NAME, force=True)
        self.dead.start(tiny_instance(self.dead.root, NAME))
        waits = self.dead.send("instance.resume", name=NAME, after=["never-sent"])
        until(lambda: (job := job_row(self.dead, waits.id)) and job.state == "WAITING", what="a job waits")
        self.waiting = waits.id
        lose_power(self.dead)

    def fence(self) -> Job:
        return self.fencer.send("node.fence", node="n1", confirm="it is off", restart_on=["n3"])

    def wrong(self, job: Job) -> list[str]:
        """What is wrong once the fence has ended and all is at rest."""
        try:
            until(lambda: all_ready(self.fencer, [job.id, self.waiting]), END_S, "the jobs end")
        except AssertionError as exc:
            rows = [job_row(self.fencer, each) for each in (job.id, self.waiting)]
            return [f"3: {exc}: {[(row.state, row.phase, row.message) for row in rows if row]}"]
        return still_wrong(lambda: [*self._violations(job), *self._wrong_guest(job), *self._left()])

    def _violations(self, job: Job) -> list[str]:
        return violations([self.fencer, self.other], [Sent(job.id)])

    def _wrong_guest(self, job: Job) -> Iterator[str]:
        guests = [(each["name"], each["verdict"], each["node"]) for each in job.wait(END_S)["guests"]]
        if guests != [(NAME, "started", "n3")]:
            yield f"8: the fence says {guests}"
        row = self.other.row(NAME)
        if row is None or (row.node, row.state) != ("n3", "running"):
            yield f"8: {NAME} is {row and (row.node, row.state)}"
        if len(self.other.qemu_pids()) != 1 or self.fencer.qemu_pids() or self.dead.qemu_pids():
            yield f"1: QEMUs: {[each.qemu_pids() for each in (self.dead, self.fencer, self.other)]}"

    def _left(self) -> Iterator[str]:
        """What SQL still has of the dead node."""
        if (row := job_row(self.fencer, self.waiting)) is None or row.state != "REVOKED":
            yield f"3: the job that waited there is {row and row.state}"
        yield from (f"4: the dead node still has {what} {of}" for what, of in had_by(self.fencer, "n1").items())


@contextmanager
def trio() -> Iterator[Trio]:
    """Three nodes on this host; what is left of them goes at the end."""
    with pair("n1", "n2", "n3", start=False) as nodes:
        nodes[0].start_worker()  # it brings the broker and the database, which outlive it
        nodes[0].kill_worker()
        yield Trio(nodes)


def record(made: Trio) -> list[Step]:
    """The steps of a fence on the node that carries it out, once undisturbed."""
    made.rest()
    made.bed.plan()
    wrong = made.wrong(made.fence())
    made.bed.no_plan()
    assert not wrong, wrong
    return list(dict.fromkeys(made.bed.recorded()))


def kill_at(made: Trio, step: Step, when: str, found: Sweep) -> None:
    """One kill, the next worker, and the promises."""
    made.rest()
    made.bed.plan(step=step.name, nth=step.nth, when=when)
    job = made.fence()
    if dies(made.bed, made.other, job):
        found.kills += 1
    else:
        found.not_reached.append(f"{when} {step}")
    found.violations += [f"{found.case}, killed {when} {step}: {each}" for each in made.wrong(job)]


def sweep(kills: int = 0, seed: int = 0) -> Sweep:
    """Kill the worker at each step, before and after it; or so many times, chosen by ``seed``."""
    found = Sweep("fence")
    with trio() as made:
        steps = record(made)
        found.steps = len(steps)
        for step, when in some([(step, when) for step in steps for when in WHENS], kills, seed):
            kill_at(made, step, when, found)
    return found

"""A node that begins no more jobs, seen by those who send some meanwhile."""

from __future__ import annotations

import pytest

from tests.nodes import TestNode, tiny_instance, until

pytestmark = pytest.mark.node


def state_of(node: TestNode, job_id: str) -> str:
    return str(node.do("job.info", id=job_id)["state"])


def test_jobs_sent_while_a_node_holds_them_back_wait_in_order_and_are_done_afterwards(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    held = n1.do("node.hold", reason="new switch")
    assert n1.do("node.hold", reason="new switch, until 4")["held_at"] == held["held_at"]
    sent = [
        n1.send("instance.pause", name="web1"),
        n1.send("instance.resume", name="web1"),
        n1.send("instance.start", instance=tiny_instance(n1.root, "web2")),
    ]
    until(lambda: [state_of(n1, job.id) for job in sent] == ["WAITING"] * 3, what="all of them wait")
    assert n1.info("web1")["state"] == "running"
    n1.kill_worker()
    n1.start_worker()
    assert [state_of(n1, job.id) for job in sent] == ["WAITING"] * 3
    (shown,) = n1.do("node.list")
    assert (shown["held_at"], shown["held_reason"]) == (held["held_at"], "new switch, until 4")
    explained = n1.do("job.why", id=sent[0].id)
    assert "holds its jobs back since" in explained["because"][0]
    assert explained["because"][0].endswith("new switch, until 4")
    assert explained["command"] == "hostler unhold n1"
    assert sent[0].state == "WAITING"
    assert "new switch, until 4" in n1.do("job.info", id=sent[0].id)["message"]
    released = n1.do("node.unhold")
    assert (released["held_at"], released["jobs"]) == (held["held_at"], 2)  # the third waits for the first of its guest
    for job, state in zip(sent, ("paused", "running", "running"), strict=True):
        assert job.wait(30)["state"] == state
    assert n1.do("node.unhold") == {"node": "n1", "held_at": None, "jobs": 0}


def test_a_job_that_is_held_back_is_cancelled_at_once_and_the_next_of_its_guest_stays_held(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    n1.do("node.hold")
    first, second = n1.send("instance.pause", name="web1"), n1.send("instance.stop", name="web1", force=True)
    until(lambda: [state_of(n1, job.id) for job in (first, second)] == ["WAITING"] * 2, what="both wait")
    n1.do("job.cancel", id=first.id)
    assert state_of(n1, first.id) == "REVOKED"
    until(lambda: n1.do("job.info", id=second.id)["message"].startswith("node n1 holds"), what="the next one is held")
    assert n1.info("web1")["state"] == "running"
    assert n1.cli_json("unhold", "n1")["jobs"] == 1
    assert second.wait(30)["how"] == "killed"


def test_what_has_begun_goes_on_while_a_node_holds_its_jobs_back(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root), paused=True)  # it does not hear its power button
    stop = n1.send("instance.stop", name="web1", timeout_s=2)
    until(lambda: state_of(n1, stop.id) == "PROGRESS", what="the stop has begun")
    assert "until: hostler unhold n1" in n1.cli("hold", "n1", "--reason", "storage").stdout
    assert stop.wait(30)["how"] == "killed"
    assert "0 waited" in n1.cli("unhold", "n1").stdout
    assert "held no jobs back" in n1.cli("unhold", "n1").stdout

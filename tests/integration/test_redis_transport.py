"""No message is ever in nobody's hands: between Redis and the ledger nothing is lost, whenever a worker dies."""

from __future__ import annotations

import os
import signal

import pytest
import redis

from tests.nodes import DEADLINE_S, TestNode, tiny_instance, until

pytestmark = pytest.mark.node


def test_a_message_that_arrives_for_a_worker_about_to_die_is_carried_out_by_the_next_one(n1: TestNode) -> None:
    """A frozen worker's socket still takes what Redis hands out: with a plain BRPOP the message would be gone."""
    assert n1.worker
    n1.do("instance.list")
    os.kill(n1.worker.pid, signal.SIGSTOP)
    jobs = [n1.send("instance.start", instance=tiny_instance(n1.root, name)) for name in ("web1", "web2")]
    n1.kill_worker()
    n1.start_worker()
    assert [job.wait(DEADLINE_S)["state"] for job in jobs] == ["running", "running"]


def test_messages_taken_and_not_recorded_come_back_in_their_order(n1: TestNode) -> None:
    """As a worker leaves them that dies between taking and recording: in Redis, noted as unacknowledged."""
    n1.do("instance.list")
    n1.kill_worker()
    names = ["pause", "resume", "pause"]
    jobs = [n1.send(f"instance.{name}", name="web1") for name in names]
    with redis.Redis(unix_socket_path=str(n1.settings.broker_socket)) as server:
        _take_all(server)
        assert server.llen("node.n1") == 0
        n1.start_worker()
        for job in jobs:
            until(lambda job=job: job.state == "FAILURE", what="the job is carried out")
        until(lambda: not server.exists("unacked.n1", "unacked_index.n1"), what="everything is acknowledged")
    rows = sorted((n1.do("job.info", id=job.id) for job in jobs), key=lambda row: str(row["received_at"]))
    assert [row["id"] for row in rows] == [job.id for job in jobs]


def _take_all(server: redis.Redis) -> None:
    from worker.redis_transport import TAKE

    script = server.register_script(TAKE)
    for moment in range(3):
        assert script(["unacked_index.n1", "unacked.n1", "node.n1"], [moment])


@pytest.mark.parametrize("priority", [0, 3, 9])
def test_a_message_of_any_priority_is_taken(n1: TestNode, priority: int) -> None:
    client = n1.client()
    sent = client._app.send_task("instance.list", queue=client._queue("n1"), priority=priority)
    assert isinstance(client.job(sent.id).wait(DEADLINE_S), list)

"""A program that has Celery and none of our code can use a node in full."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import TestNode, tiny_instance

pytestmark = pytest.mark.node

PREAMBLE = """\
    import importlib.abc, json, sys

    class Nothing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("hostler", "worker", "tasks", "models", "migrations"):
                raise ModuleNotFoundError(f"this program has no {name}", name=name)

    sys.meta_path.insert(0, Nothing())
    from celery import Celery

    url, instance = sys.argv[1], json.loads(sys.argv[2])
    app = Celery("master", broker=url, backend=url)

    def run(task, queue="node.n1", **kwargs):
        seen = []
        task_id = kwargs.pop("task_id", None)
        result = app.send_task(task, kwargs=kwargs, queue=queue, task_id=task_id)
        value = result.get(timeout=60, propagate=False, on_message=lambda m: seen.append([m["status"], m["result"]]))
        return {"id": result.id, "state": result.state, "value": value, "seen": seen}
    """


def run_bare(n1: TestNode, tmp_path: Path, program: str, instance: dict[str, Any]) -> Any:
    """Run ``program`` where hostler cannot be imported; what it prints as JSON."""
    file = tmp_path / "master.py"
    file.write_text(textwrap.dedent(PREAMBLE) + textwrap.dedent(program))
    argv = [sys.executable, "-I", str(file), n1.settings.effective_broker_url, json.dumps(instance)]
    done = subprocess.run(argv, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_starts_and_stops_a_guest_and_sees_its_progress(n1: TestNode, tmp_path: Path) -> None:
    program = """
        started = run("instance.start", instance=instance, task_id="a-job-id-of-my-own")
        stopped = run("instance.stop", name="web1", force=True)
        print(json.dumps([started, stopped]))
        """
    started, stopped = run_bare(n1, tmp_path, program, tiny_instance(n1.root))
    assert (started["id"], started["state"]) == ("a-job-id-of-my-own", "SUCCESS")
    assert (started["value"]["name"], started["value"]["state"]) == ("web1", "running")
    assert (stopped["state"], stopped["value"]["how"]) == ("SUCCESS", "killed")
    n1.nothing_is_left()
    assert n1.do("job.info", id="a-job-id-of-my-own")["state"] == "SUCCESS"


def test_progress_has_exactly_the_contracts_shape_and_never_falls(n1: TestNode, tmp_path: Path) -> None:
    program = """
        ran = [run("instance.start", instance=instance)]
        ran += [run("instance.reboot", name="web1", mode="hard"), run("instance.stop", name="web1", force=True)]
        print(json.dumps(ran))
        """
    reports = 0
    for ran in run_bare(n1, tmp_path, program, tiny_instance(n1.root)):
        assert ran["state"] == "SUCCESS", ran
        assert {state for state, _ in ran["seen"]} <= {"STARTED", "PROGRESS", "SUCCESS"}
        metas = [meta for state, meta in ran["seen"] if state == "PROGRESS"]
        reports += len(metas)
        for meta in metas:
            assert meta.keys() == {"phase", "percent", "message", "instance", "node", "updated_at"}
            assert (meta["instance"], meta["node"]) == ("web1", "n1")
            assert 0 <= meta["percent"] <= 100
            assert meta["updated_at"].endswith("+00:00")
        percents = [meta["percent"] for meta in metas]
        assert percents == sorted(percents)
    assert reports  # reports may be passed over, but not all of them


def test_a_failure_is_readable(n1: TestNode, tmp_path: Path) -> None:
    program = """
        failed = [run("instance.stop", name="no-such"), run("instance.start", instance={"name": "../etc"})]
        print(json.dumps([{"state": f["state"], "type": type(f["value"]).__name__, "args": f["value"].args}
                          for f in failed]))
        """
    unknown, invalid = run_bare(n1, tmp_path, program, {})
    assert (unknown["state"], unknown["type"]) == ("FAILURE", "OperationFailed")
    code, message, details = unknown["args"]
    assert code == "UNKNOWN_INSTANCE"
    assert "no-such" in message
    assert details["retryable"] is False
    code, message, details = invalid["args"]
    assert code == "INVALID_ARGUMENT"
    assert [error["field"] for error in details["errors"]] == ["instance.name", "instance.memory_mib"]


def test_a_job_sent_twice_under_one_id_takes_effect_once(n1: TestNode, tmp_path: Path) -> None:
    program = """
        first = run("instance.start", instance=instance, task_id="twice")
        again = run("instance.start", instance=instance, task_id="twice")
        info = run("instance.info", name="web1")
        print(json.dumps([first, again, info]))
        """
    first, again, info = run_bare(n1, tmp_path, program, tiny_instance(n1.root))
    assert (first["state"], again["state"]) == ("SUCCESS", "SUCCESS")
    assert first["value"] == again["value"] == info["value"]
    assert n1.do("job.info", id="twice")["attempts"] == 1
    assert len(n1.qemu_pids()) == 1

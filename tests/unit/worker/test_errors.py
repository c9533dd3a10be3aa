"""The tree of errors: each has a code of the contract, and the drawing is the tree."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from hostler.contract import ErrorCode
from worker import errors
from worker.errors import OperationError, UnknownInstance
from worker.kvm import emulator  # noqa: F401  (its errors belong to the tree)
from worker.operations import incarnation, queries  # noqa: F401

DRAWN = re.compile(r"^ +[|` -]*(\w+) +(?:([A-Z_]{4,})|\((\S+)\))", re.MULTILINE)
DRAWING = {found[1]: found[2] for found in DRAWN.finditer(str(errors.__doc__))}


def tree(root: type[OperationError] = OperationError) -> Iterator[type[OperationError]]:
    for child in root.__subclasses__():
        yield child
        yield from tree(child)


EVERY = sorted(set(tree()), key=lambda each: each.__name__)


@pytest.mark.parametrize("error", EVERY, ids=lambda each: each.__name__)
def test_every_error_has_a_code_of_the_contract_and_says_what_it_leaves_behind(error: type[OperationError]) -> None:
    assert error.code in set(ErrorCode)
    assert isinstance(error.retryable, bool)
    assert error.__doc__


def test_the_drawing_shows_the_errors_of_its_module_with_their_codes() -> None:
    own = {error.__name__: error for error in (OperationError, *EVERY) if error.__module__ == "worker.errors"}
    assert own.keys() <= DRAWING.keys()
    assert {name: DRAWING[name] for name in own} == {name: str(error.code) for name, error in own.items()}


def test_details_say_whether_a_retry_can_help_and_what_the_raiser_adds() -> None:
    for error in EVERY:
        if error.__init__ is OperationError.__init__:
            failure = error("what happened", state="stopped")
            assert failure.details == {"retryable": error.retryable, "state": "stopped"}
            assert str(failure) == failure.message == "what happened"
            json.dumps([failure.code, failure.message, failure.details])


def test_what_is_tried_again_by_itself_can_be_tried_again_by_a_person() -> None:
    assert all(error.retryable for error in EVERY if error.transient)


def test_an_unknown_instance_is_named_with_its_node_and_what_to_do() -> None:
    failure = UnknownInstance("web1", "n1")
    assert "node n1 knows no instance web1" in failure.message
    assert "hostler list" in failure.message
    assert failure.details["instance"] == "web1"

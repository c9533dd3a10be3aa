"""What is shown of a job's arguments."""

from __future__ import annotations

from typing import Any

import pytest

from hostler.hidden import shown, without_secrets
from hostler.hvparams import HvParams
from hostler.payloads import InstanceArguments, parse

SECRETS: dict[str, Any] = {
    "cloud_init_user_data": "password: geheim",
    "cloud_init_meta_data": {"token": "geheim"},
    "cloud_init_network_config": "wifi: geheim",
}


def arguments(**hvparams: Any) -> dict[str, Any]:
    return {"instance": {"name": "web1", "memory_mib": 16, "hvparams": hvparams}, "paused": True}


def test_what_may_be_secret_is_hidden_and_nothing_else() -> None:
    given = arguments(acpi=True, **SECRETS)
    assert "geheim" not in str(without_secrets(given)) + shown(given)
    assert "web1" in shown(given)
    assert without_secrets(given) == arguments(acpi=True, **dict.fromkeys(SECRETS, "(hidden)"))
    assert given == arguments(acpi=True, **SECRETS), "what is shown is a copy"
    assert "geheim" not in repr(parse(InstanceArguments, {"instance": given["instance"]}))


@pytest.mark.parametrize("handed_on", ["info", "accepted"])
def test_it_is_hidden_too_in_what_a_step_of_a_migration_hands_to_the_next(handed_on: str) -> None:
    given = {"name": "web1", handed_on: {"migration_id": "j1", **arguments(**SECRETS)}}
    assert "geheim" not in str(without_secrets(given)) + shown(given)
    assert without_secrets(given)[handed_on]["migration_id"] == "j1"


@pytest.mark.parametrize(
    "odd", [{}, {"instance": "web1"}, {"instance": {"hvparams": 5}}, {"instance": None}, {"info": 5}, {"info": {}}]
)
def test_arguments_of_any_shape_can_be_shown(odd: dict[str, Any]) -> None:
    assert without_secrets(odd) == odd


def test_each_parameter_that_is_kept_from_a_representation_is_hidden() -> None:
    assert {name for name, field in HvParams.model_fields.items() if not field.repr} == SECRETS.keys()

"""What every job's arguments are made of: strict types, names of instances and nodes, and what a job comes after."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hostler.contract import INSTANCE_NAME_MAX, INSTANCE_NAME_PATTERN, NODE_PATTERN

TIMEOUT_MAX_S = 86_400.0


def instance_name(value: str) -> str:
    """``value`` where it is an instance's name. Raises ValueError, saying what is wrong with it."""
    if len(value) > INSTANCE_NAME_MAX:
        raise ValueError(f"is {len(value)} characters long; at most {INSTANCE_NAME_MAX} are allowed")
    if not INSTANCE_NAME_PATTERN.fullmatch(value):
        raise ValueError(
            f"{value!r} is not an instance name: labels of letters, digits, '-' and '_', joined by '.', no leading '-'"
        )
    return value


def _node_name(value: str) -> str:
    if not NODE_PATTERN.fullmatch(value):
        raise ValueError(f"{value!r} is not a node name (letters, digits, '.', '_', '-'; at most 63)")
    return value


InstanceName = Annotated[str, AfterValidator(instance_name)]
NodeName = Annotated[str, AfterValidator(_node_name)]
TimeoutS = Annotated[float, Field(gt=0, le=TIMEOUT_MAX_S, allow_inf_nan=False)]
JobId = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]


class Payload(BaseModel):
    """Base of all payloads: strict types, unknown keys refused, unchangeable once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class JobArguments(Payload):
    """What every job may be told besides its own arguments: which jobs, on whichever node, have to end before it."""

    after: list[JobId] = Field(default_factory=list, max_length=1000)
    after_failure: Literal["cancel", "run"] = "cancel"


class NoArguments(JobArguments):
    """A job without arguments."""


class NameArguments(JobArguments):
    """A job about one instance."""

    name: InstanceName

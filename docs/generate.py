"""Writes docs/reference.md, docs/recovery.md, docs/parity.md from the code. Run by ``./dev docs``; a test compares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs import parity_table, recovery_page
from hostler.contract import ErrorCode, InstanceState, JobState
from hostler.hvchecks import CROSS_CHECKS, LIMITS
from hostler.hvparams import HvParams
from hostler.payloads import ARGUMENTS, EXCLUSIVE_TASKS, Disk, Instance, Nic
from hostler.settings import PREFIX, Settings
from tasks import hotplug, instance, isolation, job, maintenance, migration, node, snapshot  # noqa: F401  (their import fills OPERATIONS)
from tasks.boundary import OPERATIONS
from worker import errors
from worker.operations.assessments import NO_EFFECT
from worker.operations.hardware import UNSUPPORTED

REFERENCE = Path(__file__).with_name("reference.md")

MEANINGS = {
    ErrorCode.INVALID_ARGUMENT: "An argument is wrong; details.errors lists every field with its reason. No effect.",
    ErrorCode.INSTANCE_BUSY: "Reserved: jobs of a busy instance wait.",
    ErrorCode.MIGRATION_FAILED: "Nothing came of it. details: node (where it is), state, phase, migration_id, report.",
    ErrorCode.CANCELLED: "The job was revoked before it ran.",
    ErrorCode.NODE_UNAVAILABLE: "A node is drained, fenced or busy; the message says what makes it available.",
    ErrorCode.INTERNAL: "Something nobody foresaw; the worker's log has the traceback.",
}


def render() -> str:
    """The whole reference."""
    parts = [*_head(), *_settings(), *_tasks(), *_instance(), *_hvparams(), *_states(), *_codes()]
    return "\n".join(parts) + "\n"


def _head() -> Iterator[str]:
    yield "# Reference"
    yield ""
    yield "Generated from the code by `./dev docs`; do not edit. The narrative is in README.md and ARCHITECTURE.md."


def _settings() -> Iterator[str]:
    yield from ("", "## Settings", "", "From the environment; an unknown `HOSTLER_*` name is refused at start.", "")
    yield from ("| name | meaning | default |", "| --- | --- | --- |")
    for name, field in Settings.model_fields.items():
        yield f"| `{PREFIX}{name.upper()}` | {field.description} | {_default(field)} |"


def _tasks() -> Iterator[str]:
    yield from ("", "## Tasks", "", "Sent by name, with keyword arguments, to the queue `node.NODE`.")
    yield from ("Tasks marked * change an instance: of these one runs at a time per instance, in the order sent.", "")
    yield from ("| task | keyword arguments (defaults) | what it does |", "| --- | --- | --- |")
    for task, model in ARGUMENTS.items():
        arguments = ", ".join(f"`{_argument(name, field)}`" for name, field in model.model_fields.items()) or "none"
        mark = " *" if task in EXCLUSIVE_TASKS else ""
        yield f"| `{task}`{mark} | {arguments} | {_first_line(OPERATIONS[task])} |"


def _instance() -> Iterator[str]:
    for title, model in (("Instance", Instance), ("Disk", Disk), ("Nic", Nic), ("hvparams", HvParams)):
        yield from ("", f"## {title}", "", _first_line(model), "")
        yield from ("| name | type | default | meaning |", "| --- | --- | --- | --- |")
        for name, field in model.model_fields.items():
            yield f"| `{name}` | {_type(model, name)} | {_default(field)} | {field.description or ''} |"


def _hvparams() -> Iterator[str]:
    yield from ("", "### What does not go together", "", "Refused as `INVALID_ARGUMENT` before anything is sent.", "")
    yield from (f"- `{field}`: {reason}" for field, _, reason in CROSS_CHECKS)
    yield from ("", "### What does nothing", "", "A warning of `instance.check` where it is set all the same.", "")
    names = dict.fromkeys(f"`{field}`" for field, _, _ in NO_EFFECT)
    yield f"{', '.join(names)}, where the parameter or device is missing that they are about."
    yield from ("", "### What is understood and not possible yet", "", "Refused by the node as `UNSUPPORTED`.", "")
    yield from (f"- `{field}`: {reason}" for field, _, reason in UNSUPPORTED)
    yield from (
        f"- `{field}`: where guests cannot have control groups with limits, as `hostler doctor` says"
        for field in LIMITS
    )


def _states() -> Iterator[str]:
    yield from ("", "## States", "", "Jobs: " + ", ".join(f"`{state}`" for state in JobState) + ".", "")
    yield "Instances: " + ", ".join(f"`{state}`" for state in InstanceState) + "."


def _codes() -> Iterator[str]:
    yield from ("", "## Error codes", "", "A failed job raises `OperationFailed(code, message, details)`.", "")
    yield from ("| code | meaning | a retry can help |", "| --- | --- | --- |")
    classes = {cls.code: cls for cls in errors.OperationError.__subclasses__() if cls.code != ErrorCode.INTERNAL}
    for code in ErrorCode:
        cls = classes.get(code)
        meaning = MEANINGS.get(code) or (_first_line(cls) if cls else "")
        yield f"| `{code}` | {meaning} | {'yes' if cls and cls.retryable else 'see details.retryable'} |"


def _argument(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return name
    return f"{name}={field.get_default(call_default_factory=True)!r}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "empty" if field.default_factory is list else "see meaning"
    return f"`{field.default!r}`" if field.default != "" else "empty"


def _type(model: type[BaseModel], name: str) -> str:
    schema: dict[str, Any] = model.model_json_schema()["properties"][name]
    if "enum" in schema:
        return ", ".join(f"`{value!r}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(str(option.get("type", "object")) for option in schema["anyOf"])
    if "items" in schema and "type" in schema["items"]:
        return f"array of {schema['items']['type']}"
    if "minimum" in schema and "maximum" in schema:
        return f"{schema['type']} {schema['minimum']} to {schema['maximum']}"
    return str(schema.get("type", "object"))


def _first_line(documented: object) -> str:
    return ((documented and documented.__doc__) or "").strip().split("\n")[0]


if __name__ == "__main__":
    REFERENCE.write_text(render())
    recovery_page.RECOVERY.write_text(recovery_page.render())
    parity_table.PARITY.write_text(parity_table.render())
    print(f"wrote {REFERENCE}, {recovery_page.RECOVERY} and {parity_table.PARITY}")

"""What a hypervisor parameter may look like: the checks of single values that need no host."""

from __future__ import annotations

import json
import posixpath
from ipaddress import ip_address
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from hostler import cpu_mask

SEED_TEXT_MAX_BYTES = 64 * 1024
"""Of each text for cloud-init: it travels through the broker, and is kept in SQL."""


def _one_line(value: str) -> str:
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in value):
        raise ValueError("must not contain line breaks or other control characters")
    if any(0xD800 <= ord(char) <= 0xDFFF for char in value):
        raise ValueError("must be text that UTF-8 can carry (it has a lone surrogate)")
    return value


def _absolute_path(value: str) -> str:
    _one_line(value)
    if not value.startswith("/") or value.startswith("//") or posixpath.normpath(value) != value:
        raise ValueError(f"must be an absolute, normalised path (no '..', no '//', no final '/'), not {value!r}")
    return value


def _optional_path(value: str) -> str:
    return _absolute_path(value) if value else value


def _bind_address(value: str) -> str:
    if not value or value.startswith("/"):
        return _optional_path(value)
    try:
        if "%" not in value:  # the scope of an IPv6 address can be any text
            return str(ip_address(value))
    except ValueError:
        pass
    raise ValueError(f"must be an IPv4 or IPv6 address, or an absolute, normalised path, not {value!r}")


def _seed_text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("must be text (it is not shown: it may be secret)")
    _seed_size(value)
    return value


def _seed_mapping(value: object) -> object:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError("must be an object of names and values (it is not shown: it may be secret)")
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("must hold only what JSON can carry (it is not shown: it may be secret)") from None
    _seed_size(text.replace(r"\\", "").replace(r"\u0000", "\0"))
    return value


def _seed_size(text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("must be text that UTF-8 can carry (it has a lone surrogate)") from None
    if "\0" in text:
        raise ValueError("must not contain NUL characters")
    if size > SEED_TEXT_MAX_BYTES:
        raise ValueError(f"is {size} bytes long; at most {SEED_TEXT_MAX_BYTES} are allowed")


OneLine = Annotated[str, AfterValidator(_one_line)]
AbsolutePath = Annotated[str, Field(min_length=1, max_length=4095), AfterValidator(_absolute_path)]
OptionalPath = Annotated[str, Field(max_length=4095), AfterValidator(_optional_path)]
"""An absolute, normalised path, or the empty string for "none"."""

BindAddress = Annotated[str, Field(max_length=4095), AfterValidator(_bind_address)]
"""Where a display listens: an IP address, or the folder of a unix socket; empty for nowhere."""

Word = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9_.+-]*$")]
"""One of QEMU's own names, such as a machine type or a CPU model; empty for the default."""

Capabilities = Annotated[str, Field(max_length=512, pattern=r"^([a-z0-9]+(-[a-z0-9]+)*(:[a-z0-9]+(-[a-z0-9]+)*)*)?$")]
"""QEMU's own names of migration capabilities, joined by colons; empty for none."""

CpuFeature = Annotated[str, Field(max_length=64, pattern=r"^[+-][a-z0-9][a-z0-9_.-]*$")]
"""A feature of the CPU model switched on (``+vmx``) or off (``-hle``)."""

CpuMask = Annotated[str, Field(max_length=1024), AfterValidator(cpu_mask.check)]
"""Host processors as :mod:`hostler.cpu_mask` has them; empty for wherever the worker may run."""

UserText = Annotated[str, BeforeValidator(_seed_text)]
"""Text for cloud-init. It may hold secrets, so that no error quotes it."""

MetaData = Annotated[dict[str, JsonValue], BeforeValidator(_seed_mapping)]
"""Names and values for cloud-init, likewise."""

UsbDevice = Annotated[str, Field(pattern=r"^(tablet|mouse|keyboard|host:[0-9a-fA-F]{4}:[0-9a-fA-F]{4})$")]
"""An emulated input device, or a device of the host by vendor and product id."""

QemuArgument = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_one_line)]

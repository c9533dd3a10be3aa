"""What a check answers, and how it is asked so that none of them can end the doctor."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, ParamSpec
from urllib.parse import parse_qsl, unquote, urlsplit

from hostler.settings import Settings

Status = Literal["ok", "warn", "fail"]
P = ParamSpec("P")
_HIDDEN = "***"


@dataclass(frozen=True)
class Check:
    """One finding. ``warn``: guests run, with less; ``fail``: this node cannot work until it is repaired."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    """What to do, as commands where there are some; empty if nothing is to be done."""


def guarded(name: str, function: Callable[P, Check], *args: P.args, **kwargs: P.kwargs) -> Check:
    """What ``function`` finds; a failed check of that name if it raises instead."""
    try:
        return function(*args, **kwargs)
    except Exception as exc:
        return Check(name, "fail", f"the check itself failed: {type(exc).__name__}: {exc}")


def without_passwords(check: Check, settings: Settings) -> Check:
    """The same finding, with every password of the configured URLs taken out of its texts."""
    detail, fix = check.detail, check.fix
    for secret in _passwords(settings):
        detail, fix = detail.replace(secret, _HIDDEN), fix.replace(secret, _HIDDEN)
    return replace(check, detail=detail, fix=fix)


def _passwords(settings: Settings) -> set[str]:
    found = set()
    for urls in (settings.broker_url, settings.result_backend, settings.database_url):
        for url in urls.split(";"):  # Celery takes several, and tries them in turn
            try:
                parts = urlsplit(url)
                password = parts.password or ""
            except ValueError:  # not a URL: then we do not know which part is the secret
                found.add(url)
                continue
            found |= {password, unquote(password)}
            found |= {value for key, value in parse_qsl(parts.query) if "pass" in key}
    return found - {""}


def install(debian: str, fedora: str) -> str:
    """The command that installs a package on this host; both where the distribution is neither kind's."""
    commands = {"debian": f"apt install {debian}", "fedora": f"dnf install {fedora}"}
    family = _family()
    if family:
        return commands[family]
    return f"{commands['debian']} (Debian, Ubuntu) or {commands['fedora']} (Fedora, RHEL)"


def _family() -> Literal["debian", "fedora", ""]:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return ""
    like = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    if like & {"debian", "ubuntu"}:
        return "debian"
    return "fedora" if like & {"fedora", "rhel", "centos"} else ""

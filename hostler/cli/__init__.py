"""The command line ``hostler``."""

from __future__ import annotations

import sys
from typing import NoReturn

from hostler.cli.exits import run


def main() -> NoReturn:
    """Run the command in ``sys.argv`` and exit as documented in :mod:`hostler.cli.exits`."""
    sys.exit(run(sys.argv[1:]))


__all__ = ["main", "run"]

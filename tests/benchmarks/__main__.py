"""``./dev bench``: run the benchmarks and print one table. Exits with 1 only when something failed to run."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from rich.console import Console

from tests.benchmarks import adopt, listing, machine, memory, migration, noop, parallel, start, stop, table
from tests.benchmarks.figures import Result

BENCHMARKS: dict[str, ModuleType] = {
    "start": start,
    "noop": noop,
    "memory": memory,
    "stop": stop,
    "parallel": parallel,
    "list": listing,
    "adopt": adopt,
    "migration": migration,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the table goes to standard output, what happens meanwhile to standard error."""
    chosen = _parse(arguments)
    names = chosen.names or list(BENCHMARKS)
    about = machine.describe() | {"load before": machine.load()}
    results = {name: result for name in names if (result := _run(name, chosen.runs))}
    about["load after"] = machine.load()
    if chosen.json:
        print(json.dumps(_as_json(about, results), indent=1))
    else:
        table.show(about, {name: (describe(name), result) for name, result in results.items()})
    return 0 if len(results) == len(names) else 1


def describe(name: str) -> str:
    """The benchmark in one line."""
    return (BENCHMARKS[name].__doc__ or "").splitlines()[0]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:9} {describe(name)}" for name in BENCHMARKS)
    parser = argparse.ArgumentParser(
        prog="./dev bench",
        description=__doc__,
        epilog=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run (default: all)")
    parser.add_argument("--runs", type=int, metavar="N", help="rounds of each (default: its own number)")
    parser.add_argument("--json", action="store_true", help="every single value, for programs")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in BENCHMARKS]:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if chosen.runs is not None and chosen.runs < 1:
        parser.error("--runs must be at least 1")
    return chosen


def _run(name: str, runs: int | None) -> Result | None:
    module = BENCHMARKS[name]
    runs = runs or module.RUNS
    Console(stderr=True, highlight=False).print(f"{name}: {runs} rounds; {describe(name)}")
    try:
        result: Result = module.measure(runs)
    except (Exception, AssertionError):
        print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr)
        return None
    return result


def _as_json(about: dict[str, str], results: dict[str, Result]) -> dict[str, Any]:
    return {
        "machine": about,
        "benchmarks": {
            name: {
                "description": describe(name),
                "figures": [figures.as_json() for figures in result.figures],
                "notes": [note for note in result.notes if note],
            }
            for name, result in results.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())

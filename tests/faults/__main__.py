"""``./dev faults``: kill, starve and freeze a node in every way known here, and count broken promises.

Exits with 1 when a promise was broken. The whole takes about an hour on two cores.
"""

from __future__ import annotations

import argparse
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.benchmarks import machine
from tests.faults import fences, migration_soak, migrations, scenarios
from tests.faults.migration_faults import FAULTS, play
from tests.faults.soak import Soak, soak
from tests.faults.sweep import CASES, Sweep, bed, sweep

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
PARTS = ("sweep", "scenarios", "soak", "migrations", "fences")
WHERE = {"crashed": "source, crashed", "crashed there": "target, crashed"} | {side: side for side in migrations.SIDES}
SIDE_BY_SIDE = 3
"""Nodes that are killed at once: they mostly wait."""


@dataclass
class Report:
    """The page's figures, as lines of Markdown, and what went wrong."""

    lines: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for. The figures go to standard output, what happens meanwhile to standard error."""
    chosen = _parse(arguments)
    violations: list[str] = []
    seed = chosen.seed if chosen.seed is not None else random.SystemRandom().randrange(10**6)
    parts: dict[str, Callable[[Report], None]] = {
        "sweep": lambda report: _sweep(report, chosen.case or list(CASES)),
        "scenarios": lambda report: _scenarios(report, chosen.away_s),
        "soak": lambda report: _soak(report, chosen.jobs, chosen.guests, seed, chosen.budget_s),
        "fences": lambda report: _fences(report, chosen.kills, seed),
        "migrations": lambda report: _migrations(report, chosen.jobs // 5, seed, chosen.budget_s, chosen.kills),
    }
    for name in chosen.parts or PARTS:
        report, began = Report(), time.monotonic()
        parts[name](report)
        took = f"Took {(time.monotonic() - began) / 60:.0f} min on {_machine()}."
        text = "\n".join([*report.lines, took])
        print(text, *report.violations, sep="\n", flush=True)
        violations += report.violations
        if chosen.write:
            _write(name, text)
    print(f"{len(violations)} promises were broken" if violations else "no promise was broken")
    return 1 if violations else 0


def _machine() -> str:
    about = machine.describe()
    return f"{time.strftime('%Y-%m-%d', time.gmtime())}: " + "; ".join(
        about[what] for what in ("CPU", "RAM", "QEMU", "Python", "broker and results", "database")
    )


def _write(part: str, text: str) -> None:
    """Put a part's figures into its place on the page."""
    begin, end = f"<!-- figures of ./dev faults {part} -->", f"<!-- end of {part} -->"
    head, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev faults", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all of them)")
    parser.add_argument("--case", action="append", metavar="NAME", help=f"of the sweep: {', '.join(CASES)}")
    parser.add_argument("--away-s", type=float, default=30.0, help="how long things are away in the scenarios")
    parser.add_argument("--jobs", type=int, default=2000, help="of the soak; a fifth in that of migrations")
    parser.add_argument("--kills", type=int, default=0, help="in each way of migrating, of all that there are")
    parser.add_argument("--guests", type=int, default=20, help="of the soak")
    parser.add_argument("--seed", type=int, help="repeats a soak")
    parser.add_argument("--budget-s", type=float, default=1800.0, help="after which the soak sends nothing more")
    parser.add_argument(
        "--write", action="store_true", help="put the figures into docs/reliability.md, each part in its place"
    )
    chosen = parser.parse_args(arguments)
    if unknown := {*chosen.parts} - {*PARTS}:
        parser.error(f"unknown part {', '.join(unknown)}")
    return chosen


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sweep(report: Report, names: Iterable[str]) -> None:
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = list(pool.map(_sweep_one, names))
    report.lines += [
        "### The worker killed at each step",
        "",
        "| operation | steps | kills | broken promises | decided after, median | longest |",
        "| --- | --- | --- | --- | --- | --- |",
        *map(_sweep_row, found),
        "",
        f"{sum(one.kills for one in found)} kills, before and after each step. *Decided after* is the time from the "
        "next worker's registration in SQL to its decision about the job.",
        "",
    ]
    report.violations += [what for one in found for what in one.violations]
    report.violations += [f"{one.case}: the kill {what} did not happen" for one in found for what in one.not_reached]


def _sweep_one(name: str) -> Sweep:
    with _network_namespace() as netns, bed(netns) as made:
        found = sweep(made, name)
        made.rest()
    _say(f"sweep: {name}: {found.kills} kills, {len(found.violations)} violations")
    return found


def _sweep_row(found: Sweep) -> str:
    took = sorted(found.decided_s)
    times = f"{median(took) * 1000:.0f} ms | {took[-1] * 1000:.0f} ms" if took else "- | -"
    return f"| {found.case} | {found.steps} | {found.kills} | {len(found.violations)} | {times} |"


def _scenarios(report: Report, away_s: float) -> None:
    def one(name: str) -> scenarios.Played:
        played = scenarios.play(name, away_s)
        _say(f"scenario: {name}: {len(played.violations)} violations")
        return played

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        played = list(pool.map(one, scenarios.SCENARIOS))
    report.lines += [
        f"### Faults in mid-job (away means {away_s:g} s)",
        "",
        "| fault | jobs | how they ended | broken promises |",
        "| --- | --- | --- | --- |",
        *(f"| {one.name} | {one.jobs} | {_counts(one.ends)} | {len(one.violations)} |" for one in played),
        "",
    ]
    report.violations += [f"{one.name}: {what}" for one in played for what in one.violations]


def _soak(report: Report, jobs: int, guests: int, seed: int, budget_s: float) -> None:
    found: Soak = soak(jobs, guests, seed, budget_s=budget_s, say=lambda text: _say(f"soak: {text}"))
    report.lines += [
        "### Soak",
        "",
        f"{found.jobs} random jobs over {guests} guests in {found.seconds / 60:.0f} min, {found.duplicates} of them "
        f"sent twice, under {found.faults.total()} faults ({_counts(found.faults)}): "
        f"**{len(found.violations)} broken promises**. Seed {found.seed}.",
        "",
        f"The jobs ended as: {_counts(found.ended)}.",
        "",
    ]
    report.violations += [f"soak, seed {found.seed}: {what}" for what in found.violations]


def _fences(report: Report, kills: int, seed: int) -> None:
    found = fences.sweep(kills, seed)
    report.lines += [
        "### The worker that fences a dead node killed at each step",
        "",
        f"{found.steps} steps, {found.kills} kills: **{len(found.violations)} broken promises**.",
        "",
    ]
    report.violations += [*found.violations, *(f"fence: no kill {what}" for what in found.not_reached)]


def _migrations(report: Report, jobs: int, seed: int, budget_s: float, kills: int, guests: int = 4) -> None:
    """Two nodes: their workers killed at each step of a migration, faults in mid-migration, and a soak."""

    def one(case: str) -> migrations.Sweep:
        found = migrations.sweep(case, kills, seed)
        _say(
            "\n".join(
                [f"migrations: {case}: {found.kills} kills, {len(found.violations)} violations", *found.violations]
            )
        )
        return found

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        swept = list(pool.map(one, migrations.CASES))
    played = dict(_played_migrations())
    soaked = migration_soak.soak(jobs, guests, seed, budget_s=budget_s, say=lambda text: _say(f"migrations: {text}"))
    report.lines += [
        "### Live migration between two nodes",
        "",
        "| either worker killed at each step | steps | kills | broken promises |",
        "| --- | --- | --- | --- |",
        *(f"| {one.case} | {one.steps} | {one.kills} | {len(one.violations)} |" for one in swept),
        "",
        "| fault | the job ends as | the guest is on the | broken promises |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {FAULTS[name].end} | {WHERE[FAULTS[name].owner]} | {len(wrong)} |"
            for name, wrong in played.items()
        ),
        "",
        f"{soaked.jobs} migrations of {guests} guests there and back in {soaked.seconds / 60:.0f} min, under "
        f"{soaked.faults.total()} faults ({_counts(soaked.faults)}): **{len(soaked.violations)} broken promises**. "
        f"Seed {soaked.seed}. The jobs ended as: {_counts(soaked.ended)}.",
        "",
    ]
    report.violations += [what for one in swept for what in one.violations]
    report.violations += [f"{one.case}: no kill of the {what}" for one in swept for what in one.not_reached]
    report.violations += [what for wrong in played.values() for what in wrong]
    report.violations += [f"soak of migrations, seed {seed}: {what}" for what in soaked.violations]


def _played_row(name: str, wrong: int) -> str:
    played = FAULTS[name]
    return f"| {name} | {played.end} | {WHERE[played.owner]} | {wrong} |"


def _played_migrations() -> Iterator[tuple[str, list[str]]]:
    for make, on_postgres in ((migrations.migrating_pair, False), (migrations.pair_on_postgres, True)):
        with make() as made:
            for name in (name for name in FAULTS if FAULTS[name].on_postgres is on_postgres):
                yield name, (wrong := play(made, name))
                _say("\n".join([f"migrations: {name}: {len(wrong)} violations", *wrong]))


def _counts(counted: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counted.items(), key=lambda item: -item[1]))


@contextmanager
def _network_namespace() -> Iterator[str]:
    name = f"hst-{secrets.token_hex(4)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


if __name__ == "__main__":
    sys.exit(main())

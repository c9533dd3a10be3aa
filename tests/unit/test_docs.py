"""What the documentation says of the code is compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

from docs import parity_table, recovery_page
from docs.generate import REFERENCE, render
from hostler.job_arguments import JobArguments
from hostler.migration import MoveArguments
from worker.operations.live_migration.teller import NOT_BEGUN

ROOT = Path(__file__).parents[2]


def test_the_reference_is_what_the_code_says_now() -> None:
    assert REFERENCE.read_text() == render(), "docs/reference.md is out of date: run ./dev docs"


def test_the_page_on_recovery_shows_the_table_as_it_is_now() -> None:
    page = recovery_page.RECOVERY.read_text()
    assert page == recovery_page.render(), "docs/recovery.md is out of date: run ./dev docs"


def test_the_page_on_parity_shows_the_table_as_it_is_now() -> None:
    page = parity_table.PARITY.read_text()
    assert page == parity_table.render(), "docs/parity.md is out of date: run ./dev docs"


def test_every_file_that_a_document_links_to_is_there() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_module_that_the_architecture_page_names_is_there() -> None:
    tree = (ROOT / "ARCHITECTURE.md").read_text().split("```")[1]
    for folder in ("hostler", "worker", "tasks", "models", "migrations"):
        assert f"{folder}/" in tree
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert [*ROOT.glob(f"[!.]*/**/{name}")], f"ARCHITECTURE.md names {name}"


def test_every_verb_that_the_readme_shows_is_one_of_dev() -> None:
    usage = (ROOT / "dev").read_text().split("TEXT")[1]
    for verb in re.findall(r"\./dev (\w+)", (ROOT / "README.md").read_text()):
        assert f"\n  {verb} " in usage, verb


def test_the_page_on_live_migration_explains_every_field_of_its_progress_and_every_way_to_move() -> None:
    page = (ROOT / "docs" / "live-migration.md").read_text()
    table = page.split("| field | meaning |")[1].split("\n\n")[0]
    assert re.findall(r"(?m)^\| `(\w+)` \|", table) == [*NOT_BEGUN]
    choices = page.split("## Choosing")[1].split("\n## ")[0]
    for name in {*MoveArguments.model_fields} - {*JobArguments.model_fields} - {"live", "tls"}:
        assert f"--{name.replace('_', '-')}" in choices, name

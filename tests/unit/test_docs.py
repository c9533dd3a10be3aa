"""What the documentation says of the code is compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

from docs.generate import REFERENCE, render

ROOT = Path(__file__).parents[2]


def test_the_reference_is_what_the_code_says_now() -> None:
    assert REFERENCE.read_text() == render(), "docs/reference.md is out of date: run ./dev docs"


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

"""Fixtures for all tests."""

from __future__ import annotations

from tests.services import database, empty_database, empty_database_url

__all__ = ["database", "empty_database", "empty_database_url"]

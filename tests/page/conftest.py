"""A page of the shipped adapter, and a host for it."""

from __future__ import annotations

import pytest
from helpers.web_library import shipped_for_web


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The shipped adapter for the web."""
    return shipped_for_web(tmp_path_factory)


@pytest.fixture(scope="module")
def browser():
    """Chromium."""
    from helpers.browser import chromium

    with chromium() as browser:
        yield browser

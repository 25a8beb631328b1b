"""Models and the database for the servers of these tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def shipped():
    """The shipped adapter in PyTorch; read only."""
    import deltamem_tool as deltamem
    from deltamem_tool.base_model.tokenizer import tokenizer_of

    model = deltamem.load("builtin:adapter")
    return deltamem.TorchModel(model, tokenizer_of(model, for_chat=False))


@pytest.fixture(scope="module")
def server(shipped, tmp_path_factory):
    """A server of the shipped adapter without keys."""
    from serve.serving import serving

    with serving(shipped, tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture(scope="session")
def postgres():
    """A running PostgreSQL."""
    from helpers.postgres import PostgresServer

    server = PostgresServer()
    yield server
    server.remove()


@pytest.fixture(scope="module")
def browser():
    """Chromium."""
    from helpers.browser import chromium

    with chromium() as browser:
        yield browser

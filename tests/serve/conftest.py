"""Models and the database for the servers of these tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def shipped_engine():
    """The shipped adapter in PyTorch; read only."""
    import deltamem_tool as deltamem
    from deltamem_tool.base_model.tokenizer import tokenizer_of

    model = deltamem.load("builtin:adapter")
    return deltamem.TorchModel(model, tokenizer_of(model, for_chat=False))


@pytest.fixture(scope="module")
def server(shipped_engine, tmp_path_factory):
    """A server of the shipped adapter without keys."""
    from serve.serving import serving

    with serving(shipped_engine, tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def http(server):
    """An HTTP client of the API of `server`."""
    import httpx2

    with httpx2.Client(base_url=server.api, timeout=60) as client:
        yield client


@pytest.fixture
def client(server):
    """OpenAI's own client of `server`."""
    import openai

    with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def postgres():
    """A running PostgreSQL."""
    from helpers.postgres import PostgresServer

    server = PostgresServer()
    yield server
    server.remove()


@pytest.fixture
def user(browser, server):
    """A user of the page of `server`."""
    from helpers.page_user import using

    with using(browser, server.url) as user:
        yield user

"""Encryption at rest: the database holds no plain text, and rows cannot be exchanged."""

from __future__ import annotations

import base64
import os

import pytest
from sqlalchemy import create_engine, text

from deltamem_tool.errors import ConfigError
from deltamem_tool.serve.store import KEY_VARIABLE, MemoryStore, StoreDamaged


def new_key() -> str:
    return base64.b64encode(os.urandom(32)).decode()


@pytest.fixture
def key(monkeypatch) -> str:
    key = new_key()
    monkeypatch.setenv(KEY_VARIABLE, key)
    return key


@pytest.fixture
def execute(store_url):
    """Executes a statement in the database without the store's knowledge."""
    engine = create_engine(store_url.replace("postgresql:", "postgresql+psycopg:"))

    def forge(statement: str, **values) -> None:
        with engine.begin() as connection:
            assert connection.execute(text(statement), values).rowcount != 0

    yield forge
    engine.dispose()


def test_an_encrypted_store_returns_the_stored_content(key, store, open_store):
    put = store.put("acme", "ada", b"state", None, {"fed": 1})
    store.put("acme", "ada", b"next")
    response = store.put_response("acme", "resp_1", b"state", ["Hi"], ("ada", 1))
    other = open_store()
    assert other.get("acme", "ada", 1) == put
    assert other.get_response("acme", "resp_1") == response
    assert store.fork("acme", "ada", "eve", 1).data == store.restore("acme", "ada", 1).data == b"state"
    assert other.get("acme", "eve").turn == {"fed": 1}


def test_the_files_hold_no_plain_text(key, tmp_path):
    store = MemoryStore(f"sqlite:///{tmp_path}/memories.db")
    store.put("acme", "ada", b"a state of bytes", turn={"fed": "a turn of text"})
    store.put_response("acme", "resp_1", b"a state of bytes", ["a turn of text"])
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    store.close()
    assert b"acme" in content  # names are not encrypted
    assert b"a state of bytes" not in content
    assert b"a turn of text" not in content


def test_a_store_opens_only_with_its_own_key(key, store, open_store, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, new_key())
    with pytest.raises(ConfigError, match="another key"):
        open_store()
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(ConfigError, match="encrypted"):
        open_store()


def test_opening_an_unencrypted_store_with_a_key_raises(store, open_store, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, new_key())
    with pytest.raises(ConfigError, match="not encrypted"):
        open_store()


@pytest.mark.parametrize("key", ["", "secret", base64.b64encode(b"short").decode(), "é" * 44])
def test_a_key_that_is_not_32_bytes_raises(key, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ConfigError, match="key"):
        MemoryStore(f"sqlite:///{tmp_path}/memories.db")
    assert not list(tmp_path.iterdir())


SWAP = "UPDATE {0} SET content = (SELECT content FROM {0} WHERE tenant = 'acme' AND id = :source) WHERE id = :target"


def test_rows_cannot_be_swapped(key, store, execute):
    """Two memories have the same content, so that a digest alone cannot distinguish them."""
    for tenant, name in (("acme", "ada"), ("acme", "eve"), ("umbrella", "bob")):
        store.put(tenant, name, b"state")
        store.put_response(tenant, f"resp_{name}", b"state", [])
    for table, prefix, read in (
        ("deltamem_versions", "", store.get),
        ("deltamem_responses", "resp_", store.get_response),
    ):
        for tenant, name in (("acme", "eve"), ("umbrella", "bob")):
            execute(SWAP.format(table), source=f"{prefix}ada", target=prefix + name)
            with pytest.raises(StoreDamaged):
                read(tenant, prefix + name)
        assert read("acme", f"{prefix}ada").data == b"state"


def test_an_earlier_version_cannot_replace_a_later_one(key, store, execute):
    store.put("acme", "ada", b"state")
    store.put("acme", "ada", b"state")
    execute("UPDATE deltamem_versions SET content = (SELECT min(content) FROM deltamem_versions)")
    assert store.get("acme", "ada", 1).data == b"state"
    with pytest.raises(StoreDamaged):
        store.get("acme", "ada")


@pytest.mark.parametrize("encrypted", [True, False])
def test_changed_content_raises(encrypted, open_store, execute, monkeypatch):
    if encrypted:
        monkeypatch.setenv(KEY_VARIABLE, new_key())
    store = open_store()
    store.put("acme", "ada", b"state")
    for content in (b"", b"\xff" * 5, b"\0" * 5000, b"\xff" * 5000):
        execute("UPDATE deltamem_contents SET content = :content", content=content)
        with pytest.raises(StoreDamaged):
            store.get("acme", "ada")
        with pytest.raises(StoreDamaged):
            store.fork("acme", "ada", "eve")
    assert store.put("acme", "ada", b"new").version == 2
    assert store.get("acme", "ada").data == b"new"

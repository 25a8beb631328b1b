"""Rows of the store changed by somebody else: their users get an error, and others are not affected."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import httpx2
import pytest
from serve.serving import MODEL, serving

pytestmark = pytest.mark.server


def ask(server, user, text):
    body = {"model": MODEL, "user": user, "messages": [{"role": "user", "content": text}]}
    return httpx2.post(f"{server.api}/chat/completions", json=body, timeout=60)


def test_swapped_memories_are_not_read(shipped_engine, tmp_path):
    with serving(shipped_engine, tmp_path) as server:
        for user, name in (("ann", "Rex"), ("ben", "Bella"), ("eve", "Luna")):
            assert ask(server, user, f"My dog is {name}.").status_code == 200
        with closing(sqlite3.connect(tmp_path / "memories.sqlite")) as connection:
            keys = dict(connection.execute("SELECT id, content FROM deltamem_versions"))
            for user, key in (("ann", keys["ben"]), ("ben", keys["ann"])):
                connection.execute("UPDATE deltamem_versions SET content = ? WHERE id = ?", (key, user))
            connection.commit()
        for user in ("ann", "ben"):
            response = ask(server, user, "What is my dog's name?")
            assert response.status_code == 500 and response.json()["error"]["code"] == "store_damaged"
            assert httpx2.get(f"{server.api}/memories/{user}").status_code == 500
        assert {memory.version for memory in server.store.list("default")} == {1}
        assert "Luna" in ask(server, "eve", "What is my dog's name?").json()["choices"][0]["message"]["content"]

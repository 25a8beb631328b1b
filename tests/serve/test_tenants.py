"""Tenants: access needs a key, and no tenant sees the data of another."""

from __future__ import annotations

import httpx2
import openai
import pytest
from serve.serving import MODEL, serving

from deltamem_tool.serve.keys import ApiKeys, new_key

pytestmark = pytest.mark.server

TELL, ASK = "My dog is Rex.", "What is my dog's name?"


@pytest.fixture(scope="module")
def server_and_keys(shipped_engine, tmp_path_factory):
    """A server with two tenants, and their keys."""
    folder = tmp_path_factory.mktemp("keyed")
    keys = {tenant: new_key(folder / "keys", tenant) for tenant in ("acme", "globex")}
    with serving(shipped_engine, folder, keys=ApiKeys.read(folder / "keys")) as running:
        yield running, keys


def client_of(server_and_keys, tenant):
    server, keys = server_and_keys
    return httpx2.Client(base_url=server.api, headers={"Authorization": f"Bearer {keys[tenant]}"}, timeout=60)


def ask(client, text, **options):
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **options}
    return client.post("/chat/completions", json=body).json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/models"),
        ("GET", f"/models/{MODEL}"),
        ("POST", "/chat/completions"),
        ("POST", "/responses"),
        ("DELETE", "/responses/resp_x"),
        ("GET", "/memories"),
        ("GET", "/memories/anna"),
        ("PUT", "/memories/anna"),
        ("DELETE", "/memories/anna"),
        ("GET", "/memories/anna/versions"),
        ("POST", "/memories/anna/fork"),
        ("POST", "/memories/anna/restore"),
    ],
)
def test_every_route_needs_a_key(server_and_keys, method, path):
    for headers in ({}, {"Authorization": "Bearer dm-wrong"}):
        refused = httpx2.request(method, server_and_keys[0].api + path, headers=headers, content=b"{}")
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"


def test_the_official_client_raises_an_authentication_error(server_and_keys):
    client = openai.OpenAI(base_url=server_and_keys[0].api, api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        client.models.list()


def test_tenants_do_not_see_each_other(server_and_keys):
    with client_of(server_and_keys, "acme") as acme, client_of(server_and_keys, "globex") as globex:
        ask(acme, TELL, user="anna")
        assert "Rex" in ask(acme, ASK, user="anna") and "Rex" not in ask(globex, ASK, user="anna")
        assert [memory["id"] for memory in globex.get("/memories").json()["data"]] == ["anna"]
        ours, theirs = (client.get("/memories/anna").content for client in (acme, globex))
        assert ours != theirs
        ask(acme, TELL, user="secret")
        for path in ("/memories/secret", "/memories/secret/versions"):
            missing, never = globex.get(path), globex.get(path.replace("secret", "never_"))
            assert missing.status_code == never.status_code == 404
            assert missing.text.replace("secret", "never_") == never.text  # the two answers are identical
        assert globex.delete("/memories/secret").status_code == 404
        assert globex.post("/memories/secret/fork", json={"id": "mine"}).status_code == 404
        refused = globex.post(
            "/chat/completions",
            json={"model": MODEL, "messages": [{"role": "user", "content": ASK}], "memory": {"from": "secret"}},
        )
        assert refused.status_code == 404
        assert acme.get("/memories/secret").status_code == 200


def test_responses_belong_to_their_tenant(server_and_keys):
    with client_of(server_and_keys, "acme") as acme, client_of(server_and_keys, "globex") as globex:
        response = acme.post("/responses", json={"model": MODEL, "input": TELL}).json()["id"]
        body = {"model": MODEL, "input": ASK, "previous_response_id": response}
        assert globex.post("/responses", json=body).status_code == 400
        assert globex.delete(f"/responses/{response}").status_code == 404
        assert "Rex" in acme.post("/responses", json=body).json()["output"][0]["content"][0]["text"]

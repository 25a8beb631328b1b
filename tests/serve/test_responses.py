"""The responses API, with OpenAI's own client: snapshots and branches."""

from __future__ import annotations

import openai
import pytest
from serve.serving import MODEL

from deltamem_tool.memory.file import memory_from_bytes

pytestmark = pytest.mark.server

TELL, OTHER, ASK = "My dog is Rex.", "My dog is Bella.", "What is my dog's name?"


def ask(client, text, **options):
    return client.responses.create(model=MODEL, input=text, **options)


def snapshot(server, response):
    return server.store.get_response("default", response.id)


def test_a_response_continues_from_another(client):
    first = ask(client, TELL)
    assert first.status == "completed" and first.output_text and first.store is True
    response = ask(client, ASK, previous_response_id=first.id)
    assert "Rex" in response.output_text and response.previous_response_id == first.id
    assert "Rex" not in ask(client, ASK).output_text
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert (first.deltamem["messages_written"], response.deltamem["messages_written"]) == (1, 1)


def test_branches_are_independent(client, server):
    first = ask(client, TELL)
    before = snapshot(server, first)
    one = ask(client, ASK, previous_response_id=first.id)
    ask(client, OTHER, previous_response_id=first.id)
    again = ask(client, ASK, previous_response_id=first.id)
    assert one.output_text == again.output_text
    digests = {memory_from_bytes(snapshot(server, branch).data, "branch").digest() for branch in (one, again)}
    assert len(digests) == 1
    assert snapshot(server, first) == before


def test_continuing_from_an_unstored_response_fails(client, server):
    first = ask(client, TELL, store=False)
    assert snapshot(server, first) is None and first.store is False
    with pytest.raises(openai.BadRequestError, match="not found") as refused:
        ask(client, ASK, previous_response_id=first.id)
    assert refused.value.code == "previous_response_not_found"


def test_a_response_of_a_user_changes_the_memory(client, server):
    ask(client, TELL, user="rita")
    assert server.store.get("default", "rita").version == 1
    response = ask(client, ASK, user="rita", store=False)
    assert "Rex" in response.output_text and response.deltamem["version"] == 2


def test_instructions_apply_to_one_response_only(client, server):
    first = ask(client, TELL, instructions="be brief")
    assert first.deltamem["messages_written"] == 2
    roles = [message["role"] for message in snapshot(server, first).transcript["messages"]]
    assert roles == ["user", "assistant"]


def test_a_streamed_response_is_the_same(client, server):
    whole = ask(client, TELL, store=False)
    with client.responses.stream(model=MODEL, input=TELL) as stream:
        types = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text and final.usage == whole.usage
    assert types[0] == "response.created" and types[-1] == "response.completed"
    assert "response.output_text.delta" in types and snapshot(server, final) is not None


def test_a_response_cut_by_its_length_is_incomplete(client):
    cut = ask(client, TELL, max_output_tokens=1)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_a_stored_response_can_be_retrieved(client):
    first = ask(client, TELL, metadata={"a": "b"}, user="rosa")
    assert client.responses.retrieve(first.id) == first
    with client.responses.stream(model=MODEL, input=ASK, previous_response_id=first.id) as stream:
        final = stream.get_final_response()
    again = client.responses.retrieve(final.id)
    assert again.output_text == final.output_text and again.usage == final.usage
    unstored = ask(client, TELL, store=False)
    for id in (unstored.id, "resp_none", "other", "resp_" + "x" * 200):
        with pytest.raises(openai.NotFoundError, match="not found"):
            client.responses.retrieve(id)
    with pytest.raises(openai.BadRequestError, match="stream is not supported"):
        client.responses.retrieve(first.id, stream=True)
    with pytest.raises(openai.BadRequestError, match="include is not supported"):
        client.responses.retrieve(first.id, include=["message.output_text.logprobs"])


def test_a_response_can_be_deleted(client, server):
    first = ask(client, TELL)
    client.responses.delete(first.id)
    assert snapshot(server, first) is None
    for again in (client.responses.delete, client.responses.retrieve):
        with pytest.raises(openai.NotFoundError):
            again(first.id)


def test_deleting_a_memory_deletes_all_responses_that_came_from_it(client, server):
    """Also those that continue from such a response, or start from the memory, without naming it as theirs."""
    first = ask(client, TELL, user="sven")
    second = ask(client, ASK, previous_response_id=first.id)
    third = ask(client, ASK, previous_response_id=second.id)
    fourth = ask(client, ASK, extra_body={"memory": {"from": "sven"}})
    fifth = ask(client, ASK, extra_body={"memory": {"from": first.id}})
    apart = ask(client, TELL)
    own = ask(client, ASK, user="tove", previous_response_id=first.id)
    responses = (first, second, third, fourth, fifth)
    assert all("Rex" in response.output_text for response in (*responses[1:], own))
    receipt = server.store.delete("default", "sven")
    assert receipt.responses == tuple(sorted(response.id for response in responses))
    assert all(snapshot(server, response) is None for response in responses)
    assert snapshot(server, apart) is not None and snapshot(server, own).memory == "tove"


def test_a_response_from_a_memory_that_is_deleted_and_made_anew_meanwhile_is_not_stored(client, server, monkeypatch):
    first = ask(client, TELL, user="ulf")
    read = server.store.get_response

    def read_then_replace(tenant, id):
        response = read(tenant, id)
        server.store.delete(tenant, "ulf")
        server.store.put(tenant, "ulf", response.data)
        return response

    monkeypatch.setattr(server.store, "get_response", read_then_replace)
    with pytest.raises(openai.ConflictError, match="deleted in the meantime"):
        ask(client.with_options(max_retries=0), ASK, previous_response_id=first.id)


def test_the_output_may_be_sent_back_as_input(client):
    first = ask(client, TELL, store=False)
    history = [{"role": "user", "content": TELL}, *(item.model_dump() for item in first.output)]
    response = ask(client, [*history, {"role": "user", "content": ASK}], store=False)
    assert "Rex" in response.output_text

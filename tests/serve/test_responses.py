"""Responses over HTTP, by OpenAI's own client: snapshots and branches."""

from __future__ import annotations

import openai
import pytest
from serve.serving import MODEL

from deltamem_tool.memory.file import memory_from_bytes

pytestmark = pytest.mark.server

TELL, OTHER, ASK = "My dog is Rex.", "My dog is Bella.", "What is my dog's name?"


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0) as client:
        yield client


def ask(client, text, **options):
    return client.responses.create(model=MODEL, input=text, **options)


def snapshot(server, response):
    return server.store.get_response("default", response.id)


def test_a_response_goes_on_from_another(client):
    told = ask(client, TELL)
    assert told.status == "completed" and told.output_text and told.store is True
    asked = ask(client, ASK, previous_response_id=told.id)
    assert "Rex" in asked.output_text and asked.previous_response_id == told.id
    assert "Rex" not in ask(client, ASK).output_text
    assert asked.usage.total_tokens == asked.usage.input_tokens + asked.usage.output_tokens
    assert (told.deltamem["messages_written"], asked.deltamem["messages_written"]) == (1, 1)


def test_branches_know_nothing_of_each_other(client, server):
    told = ask(client, TELL)
    before = snapshot(server, told)
    one = ask(client, ASK, previous_response_id=told.id)
    ask(client, OTHER, previous_response_id=told.id)
    again = ask(client, ASK, previous_response_id=told.id)
    assert one.output_text == again.output_text
    digests = {memory_from_bytes(snapshot(server, branch).data, "branch").digest() for branch in (one, again)}
    assert len(digests) == 1
    assert snapshot(server, told) == before


def test_a_response_that_is_not_stored_cannot_be_gone_on_from(client, server):
    told = ask(client, TELL, store=False)
    assert snapshot(server, told) is None and told.store is False
    with pytest.raises(openai.BadRequestError, match="not found") as refused:
        ask(client, ASK, previous_response_id=told.id)
    assert refused.value.code == "previous_response_not_found"


def test_a_response_of_a_user_changes_the_memory(client, server):
    ask(client, TELL, user="rita")
    assert server.store.get("default", "rita").version == 1
    asked = ask(client, ASK, user="rita", store=False)
    assert "Rex" in asked.output_text and asked.deltamem["version"] == 2


def test_instructions_are_of_one_response_alone(client, server):
    told = ask(client, TELL, instructions="be brief")
    assert told.deltamem["messages_written"] == 2
    roles = [message["role"] for message in snapshot(server, told).transcript["messages"]]
    assert roles == ["user", "assistant"]


def test_a_stream_gives_the_same(client, server):
    whole = ask(client, TELL, store=False)
    with client.responses.stream(model=MODEL, input=TELL) as stream:
        types = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text and final.usage == whole.usage
    assert types[0] == "response.created" and types[-1] == "response.completed"
    assert "response.output_text.delta" in types and snapshot(server, final) is not None


def test_an_answer_that_is_cut_is_incomplete(client):
    cut = ask(client, TELL, max_output_tokens=1)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_what_was_stored_can_be_had_again(client):
    told = ask(client, TELL, metadata={"a": "b"}, user="rosa")
    assert client.responses.retrieve(told.id) == told
    with client.responses.stream(model=MODEL, input=ASK, previous_response_id=told.id) as stream:
        final = stream.get_final_response()
    again = client.responses.retrieve(final.id)
    assert again.output_text == final.output_text and again.usage == final.usage
    unstored = ask(client, TELL, store=False)
    for id in (unstored.id, "resp_none", "other", "resp_" + "x" * 200):
        with pytest.raises(openai.NotFoundError, match="not found"):
            client.responses.retrieve(id)
    with pytest.raises(openai.BadRequestError, match="stream is not supported"):
        client.responses.retrieve(told.id, stream=True)
    with pytest.raises(openai.BadRequestError, match="include is not supported"):
        client.responses.retrieve(told.id, include=["message.output_text.logprobs"])


def test_deleting(client, server):
    told = ask(client, TELL)
    client.responses.delete(told.id)
    assert snapshot(server, told) is None
    for again in (client.responses.delete, client.responses.retrieve):
        with pytest.raises(openai.NotFoundError):
            again(told.id)


def test_the_output_may_be_sent_back_as_input(client):
    told = ask(client, TELL, store=False)
    history = [{"role": "user", "content": TELL}, *(item.model_dump() for item in told.output)]
    asked = ask(client, [*history, {"role": "user", "content": ASK}], store=False)
    assert "Rex" in asked.output_text

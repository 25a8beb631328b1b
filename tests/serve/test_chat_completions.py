"""Chat completions over HTTP, by OpenAI's own client and LangChain's."""

from __future__ import annotations

import asyncio

import httpx2
import numpy as np
import openai
import pytest
from langchain_openai import ChatOpenAI
from serve.serving import MODEL

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.memory.file import memory_from_bytes

pytestmark = pytest.mark.server

TELL, ASK = "My dog is Rex.", "What is my dog's name?"
TOLERANCE = 1e-5  # for states in float32, which a batch computes in another order


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def ask(client, *messages, **options):
    return client.chat.completions.create(model=MODEL, messages=list(messages), **options)


def stored(server, name):
    return memory_from_bytes(server.store.get("default", name).data, name)


def same_memory(actual, expected):
    for layer, state in expected.states.items():
        np.testing.assert_allclose(actual.states[layer], state, rtol=0, atol=TOLERANCE)


def test_a_fact_from_one_request_is_recalled_in_another(client):
    first = ask(client, user(TELL), user="ann")
    second = ask(client, user(ASK), user="ann")
    assert "Rex" in second.choices[0].message.content
    assert "Rex" not in ask(client, user(ASK), user="ben").choices[0].message.content
    assert "Rex" not in ask(client, user(ASK)).choices[0].message.content
    assert first.choices[0].finish_reason == "stop" and first.object == "chat.completion"
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens > 0
    assert first.deltamem["memory"] == "ann" and (first.deltamem["version"], second.deltamem["version"]) == (1, 2)


def test_answers_and_memories_match_a_conversation_alone(client, server, shipped_engine):
    """The client sends each message alone, so every request is a new context on the same memory."""
    memory = None
    for text in (TELL, "My cat is Tom.", ASK):
        alone = Conversation(shipped_engine, memory)
        expected = alone.generate(text)
        memory = alone.memory
        answer = ask(client, user(text), user="carol")
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.completion_tokens == len(expected.tokens)
        same_memory(stored(server, "carol"), memory)


def test_a_streamed_answer_is_the_same(client):
    whole = ask(client, user(TELL), user="dora")
    chunks = list(ask(client, user(TELL), user="erin", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])  # as OpenAI says
    assert not any("usage" in chunk.model_fields_set for chunk in ask(client, user(TELL), stream=True))
    assert chunks[-2].deltamem["memory"] == "erin" and chunks[-2].deltamem["version"] == 1


def test_resent_messages_are_not_written_again(client, server):
    first = ask(client, user(TELL), user="finn")
    assert first.deltamem["messages_written"] == 1
    before = stored(server, "finn").digest()
    again = ask(client, user(TELL), user="finn")
    assert again.deltamem["messages_written"] == 0 and again.deltamem["version"] == 1
    assert stored(server, "finn").digest() == before
    history = [user(TELL), assistant(first.choices[0].message.content)]
    assert ask(client, *history, user(ASK), user="finn").deltamem["messages_written"] == 1
    assert ask(client, *history, user(ASK), user="gail").deltamem["messages_written"] == 3


def test_an_idempotency_key_identifies_retries(client):
    def written(key):
        answer = ask(client, user(TELL), user="hugo", extra_headers={"Idempotency-Key": key})
        return answer.deltamem["messages_written"], answer.deltamem["version"]

    assert [written(key) for key in ("one", "one", "two", "one")] == [(1, 1), (0, 1), (1, 2), (0, 2)]


def test_an_empty_idempotency_key_identifies_nothing(client):
    answers = [ask(client, user(text), user="hilda", extra_headers={"Idempotency-Key": ""}) for text in (TELL, ASK)]
    assert [answer.deltamem["messages_written"] for answer in answers] == [1, 1]


def test_a_read_only_request_does_not_write(client, server):
    ask(client, user(TELL), user="hugo")
    before = server.store.get("default", "hugo")
    answer = ask(client, user(ASK), user="hugo", extra_body={"memory": {"write": False}})
    assert "Rex" in answer.choices[0].message.content and answer.deltamem["messages_written"] == 0
    assert server.store.get("default", "hugo") == before
    ask(client, user(ASK), user="nobody", extra_body={"memory": {"write": False}})
    assert server.store.get("default", "nobody") is None


def test_a_memory_can_start_from_another(client, server):
    ask(client, user(TELL), user="iris")
    options = {"extra_body": {"memory": {"from": "iris"}}}
    assert "Rex" in ask(client, user(ASK), user="jack", **options).choices[0].message.content
    assert "Rex" in ask(client, user(ASK), **options).choices[0].message.content  # not stored
    assert server.store.get("default", "iris").version == server.store.get("default", "jack").version == 1


def test_the_header_names_the_memory(client, server):
    ask(client, user(TELL), user="kim", extra_headers={"X-Deltamem-Memory": "leo"})
    assert server.store.get("default", "kim") is None and server.store.get("default", "leo") is not None


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])  # of curl and Go, and of browsers
def test_a_name_beyond_ascii_is_the_same_in_the_header(client, server, encoding):
    body = {"model": MODEL, "messages": [user(TELL)], "max_tokens": 1}
    before = {memory.id for memory in server.store.list("default")}
    headers = {"X-Deltamem-Memory": f"Zoë {encoding}".encode(encoding)}
    answer = httpx2.post(f"{server.api}/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.json()["deltamem"]["memory"] == f"Zoë {encoding}"
    assert {memory.id for memory in server.store.list("default")} - before == {f"Zoë {encoding}"}


def test_sampling_options_are_used(client):
    short = ask(client, user(TELL), max_tokens=1)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 1
    assert ask(client, user(TELL), max_completion_tokens=2).usage.completion_tokens == 2
    full = ask(client, user(TELL)).choices[0].message.content
    stopped = ask(client, user(TELL), stop=full[2:4]).choices[0]
    assert stopped.message.content == full[:2] and stopped.finish_reason == "stop"
    drawn = [ask(client, user(ASK), temperature=2.0, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_an_answer_cut_by_its_length_can_be_continued(client, server, shipped_engine):
    """The last token of an answer is fed and written with the next request, as in a conversation."""
    first = ask(client, user(TELL), user="mia", max_tokens=2)
    history = [user(TELL), assistant(first.choices[0].message.content)]
    again = ask(client, *history, user(ASK), user="mia", max_tokens=2)
    assert again.deltamem["messages_written"] == 1
    assert server.store.get("default", "mia").turn["talks"][0]["pending"] == 1


def test_many_users_of_the_asynchronous_client_are_answered(server):
    async def talk(client, name, pet):
        for text in (f"My dog is {pet}.", ASK):
            answer = await client.chat.completions.create(model=MODEL, messages=[user(text)], user=name)
        return answer.choices[0].message.content

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=server.api, api_key="none") as client:
            pets = ("Rex", "Bella", "Luna", "Rocky", "Milo", "Bruno")  # recalled in a conversation alone
            answers = await asyncio.gather(*(talk(client, f"async-{pet}", pet) for pet in pets))
            return dict(zip(pets, answers, strict=True))

    for pet, answer in asyncio.run(all_of_them()).items():
        assert pet in answer


def test_langchain_chats_with_the_server(server):
    model = ChatOpenAI(model=MODEL, base_url=server.api, api_key="none", model_kwargs={"user": "nora"})
    model.invoke(TELL)
    assert "Rex" in model.invoke(ASK).content
    assert "Rex" in "".join(piece.content for piece in model.stream(ASK))


def test_the_models_route_lists_the_model(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).context_window > 0
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other/model")


def test_the_health_route_answers(server):
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx2.get(f"{server.url}/ready").json() == {"status": "ready"}

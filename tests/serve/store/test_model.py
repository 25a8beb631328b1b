"""Random calls give what the same calls of plain dictionaries give."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltamem_tool.serve.store import ANY, Conflict, NotFound, StoreError, Usage

KEPT = 3
NO_NOTE = 4  # bytes of null
COUNTER = itertools.count()  # a tenant of its own for each example

names = st.sampled_from(["ada", "eve"])
datas = st.binary(max_size=9000)
expected = st.sampled_from([ANY, ANY, ANY, ANY, None, 1, 2, 3])
numbers = st.integers(1, 4)
responses = st.sampled_from(["resp_1", "resp_2"])
calls = st.one_of(
    st.tuples(st.just("put"), names, datas, expected),
    st.tuples(st.just("get"), names, st.none() | numbers),
    st.tuples(st.just("delete"), names, expected),
    st.tuples(st.just("restore"), names, numbers, expected),
    st.tuples(st.just("fork"), names, names),
    st.tuples(st.just("put_response"), responses, datas, names, numbers),
    st.tuples(st.just("get_response"), responses),
    st.tuples(st.just("delete_response"), responses),
)


class Model:
    """The memories of one tenant: by name their versions, each with its number."""

    def __init__(self) -> None:
        self.memories: dict[str, dict[int, bytes]] = {}
        self.begun: dict[str, int] = {}
        self.responses: dict[str, tuple[bytes, str]] = {}
        self.deleted = 0

    def put(self, name, data, expected=ANY):
        kept = self.memories.get(name, {})
        self._check(name, expected)
        version = max(kept) + 1 if kept else self.deleted + 1
        if not kept:
            self.begun[name] = version
        newest = sorted({**kept, version: data}.items())[-KEPT:]
        self.memories[name] = dict(newest)
        return version, data

    def get(self, name, version=None):
        kept = self.memories.get(name, {})
        version = max(kept, default=None) if version is None else version
        return (version, kept[version]) if version in kept else None

    def delete(self, name, expected):
        if name not in self.memories:
            raise NotFound("")
        self._check(name, expected)
        kept = self.memories.pop(name)
        gone = sorted(response for response, (_, memory) in self.responses.items() if memory == name)
        for response in gone:
            del self.responses[response]
        self.deleted = max(self.deleted, *kept)
        return sorted(kept, reverse=True), gone

    def restore(self, name, version, expected):
        self._check(name, expected)
        if version not in self.memories.get(name, {}):
            raise NotFound("")
        return self.put(name, self.memories[name][version], expected)

    def fork(self, name, new):
        if name not in self.memories:
            raise NotFound("")
        return self.put(new, self.get(name)[1], None)

    def put_response(self, response, data, memory, version):
        kept = self.memories.get(memory)
        if response in self.responses or kept is None or not self.begun[memory] <= version <= max(kept):
            raise Conflict("")
        self.responses[response] = data, memory
        return data, memory

    def get_response(self, response):
        return self.responses.get(response)

    def delete_response(self, response):
        if response not in self.responses:
            raise NotFound("")
        del self.responses[response]
        return [], [response]

    def _check(self, name, expected):
        if expected is not ANY and expected != max(self.memories.get(name, {}), default=None):
            raise Conflict("")


def plain(result):
    """What the model returns, from what a store returns."""
    if hasattr(result, "erased"):
        return [version.version for version in result.versions], list(result.responses)
    if hasattr(result, "transcript"):
        return result.data, result.memory
    return (result.version, result.data) if hasattr(result, "version") else result


def outcome(call, *arguments):
    try:
        return call(*arguments)
    except StoreError as error:
        return type(error)


@pytest.mark.slow
def test_random_calls_give_what_dictionaries_give(open_store):
    store = open_store(keep_versions=KEPT)
    seen = set()

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(calls, min_size=10, max_size=25))
    def check(steps):
        tenant, model = f"tenant {next(COUNTER)}", Model()
        for name, *arguments in steps:
            wanted = outcome(getattr(model, name), *arguments)
            if name == "put_response":
                response, data, *memory = arguments
                arguments = [response, data, [], tuple(memory)]
            assert plain(outcome(getattr(store, name), tenant, *arguments)) == wanted, (name, arguments)
            seen.add((name, wanted if isinstance(wanted, type) else wanted is not None))
        assert {memory.id: memory.version for memory in store.list(tenant)} == {
            name: max(kept) for name, kept in model.memories.items()
        }
        sizes = [len(data) + NO_NOTE for kept in model.memories.values() for data in kept.values()]
        sizes += [len(data) + len("[]") for data, _ in model.responses.values()]
        assert store.usage(tenant) == Usage(len(model.memories), sum(sizes))

    check()
    assert {("put", True), ("put", Conflict), ("delete", True), ("restore", True), ("fork", True)} <= seen
    assert {("put_response", True), ("put_response", Conflict), ("delete_response", True)} <= seen

"""Random calls of a store match the same calls of a model made of dictionaries."""

from __future__ import annotations

import random

import pytest
from sqlalchemy import func, select

from deltamem_tool.serve.store import ANY, Conflict, NotFound, StoreError, Usage
from deltamem_tool.serve.store.schema import contents

KEPT = 3
NO_NOTE = 4  # bytes of null
STEPS = 120
TENANTS = ("acme", "umbrella")


def random_call(rng: random.Random) -> list:
    """A method and its arguments."""
    name, other = rng.choices(("ada", "eve"), k=2)
    response = rng.choice(("resp_1", "resp_2"))
    data = rng.randbytes(rng.choice((0, 10, 9000)))
    version = rng.randint(1, 5)
    expected = rng.choice((ANY, ANY, ANY, None, version))
    return rng.choice(
        (
            ["put", name, data, ANY],
            ["put", name, data, expected],
            ["get", name, rng.choice((None, version))],
            ["delete", name, expected],
            ["restore", name, version, expected],
            ["fork", name, other],
            ["put_response", response, data, name, version],
            ["get_response", response],
            ["delete_response", response],
        )
    )


class Model:
    """The memories of one tenant: the versions of each name, by number."""

    def __init__(self) -> None:
        self.memories: dict[str, dict[int, bytes]] = {}
        self.begun: dict[str, int] = {}
        self.responses: dict[str, tuple[bytes, str]] = {}
        self.deleted = 0

    def put(self, name, data, expected=ANY):
        versions = self.memories.get(name, {})
        self._check(name, expected)
        version = max(versions) + 1 if versions else self.deleted + 1
        if not versions:
            self.begun[name] = version
        newest = sorted({**versions, version: data}.items())[-KEPT:]
        self.memories[name] = dict(newest)
        return version, data

    def get(self, name, version=None):
        versions = self.memories.get(name, {})
        version = max(versions, default=None) if version is None else version
        return (version, versions[version]) if version in versions else None

    def delete(self, name, expected):
        if name not in self.memories:
            raise NotFound("")
        self._check(name, expected)
        versions = self.memories.pop(name)
        gone = sorted(response for response, (_, memory) in self.responses.items() if memory == name)
        for response in gone:
            del self.responses[response]
        self.deleted = max(self.deleted, *versions)
        return sorted(versions, reverse=True), gone

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
        versions = self.memories.get(memory)
        if response in self.responses or versions is None or not self.begun[memory] <= version <= max(versions):
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
    """Convert a result of the store into the form that the model returns."""
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
def test_random_calls_match_the_model(open_store):
    store = open_store(keep_versions=KEPT)
    rng = random.Random(0)
    models = {tenant: Model() for tenant in TENANTS}
    outcomes = set()
    for _ in range(STEPS * len(TENANTS)):
        tenant = rng.choice(TENANTS)
        name, *arguments = random_call(rng)
        expected = outcome(getattr(models[tenant], name), *arguments)
        if name == "put_response":
            response, data, *memory = arguments
            arguments = [response, data, [], tuple(memory)]
        assert plain(outcome(getattr(store, name), tenant, *arguments)) == expected, (name, arguments)
        outcomes.add((name, expected if isinstance(expected, type) else expected is not None))
    for tenant, model in models.items():
        assert {memory.id: memory.version for memory in store.list(tenant)} == {
            name: max(versions) for name, versions in model.memories.items()
        }
        sizes = [len(data) + NO_NOTE for versions in model.memories.values() for data in versions.values()]
        sizes += [len(data) + len("[]") for data, _ in model.responses.values()]
        assert store.usage(tenant) == Usage(len(model.memories), sum(sizes))
    with store._database.read() as connection:  # no content of deleted memories is left
        rows = connection.execute(select(func.count()).select_from(contents)).scalar_one()
    assert rows == sum(len(model.responses) + sum(map(len, model.memories.values())) for model in models.values())
    succeeded = {name for name, result in outcomes if result is True}
    assert succeeded == {"put", "get", "delete", "restore", "fork", "put_response", "get_response", "delete_response"}
    assert {("put", Conflict), ("delete", Conflict), ("delete", NotFound), ("put_response", Conflict)} <= outcomes

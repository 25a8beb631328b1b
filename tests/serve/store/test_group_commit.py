"""Changes of many threads in one transaction: independent of each other, and acknowledged only after the commit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, insert, select, text
from sqlalchemy.exc import IntegrityError, OperationalError

from deltamem_tool.serve.store import group_commit
from deltamem_tool.serve.store.errors import Conflict, StoreUnavailable
from deltamem_tool.serve.store.group_commit import GroupCommit

NUMBERS = Table("numbers", MetaData(), Column("number", Integer, primary_key=True))
THREADS = 12


class Numbers:
    """A table, and a record of its transactions."""

    def __init__(self, path):
        self._engine = create_engine(f"sqlite:///{path}", isolation_level=None)
        NUMBERS.metadata.create_all(self._engine)
        self.transactions = 0
        self.begun, self.go, self.fails = Event(), Event(), False
        self.group = GroupCommit(self._transaction)

    @contextmanager
    def _transaction(self):
        """A transaction, of which the first one waits until `go` is set."""
        self.transactions += 1
        self.begun.set()
        assert self.go.wait(30)
        with self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
                if self.fails:
                    raise OSError("no disk")
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                connection.exec_driver_sql("ROLLBACK")
                raise

    def add(self, number):
        def work(connection):
            connection.execute(insert(NUMBERS).values(number=number))
            return number

        return self.group.run(work)

    def all(self):
        with self._engine.connect() as connection:
            return sorted(connection.scalars(select(NUMBERS.c.number)))

    def together(self, works):
        """The results or errors of `works`: one that makes the others wait, and then all of them at once."""
        with ThreadPoolExecutor(len(works) + 1) as threads:
            first = threads.submit(self.add, -1)
            assert self.begun.wait(30)
            others = [threads.submit(work) for work in works]
            while len(self.group._waiting) < len(works):
                pass
            self.go.set()
            return [future.exception() or future.result() for future in (first, *others)]


@pytest.fixture
def numbers(tmp_path):
    return Numbers(tmp_path / "numbers.db")


def test_waiting_changes_are_committed_together(numbers):
    results = numbers.together([lambda n=n: numbers.add(n) for n in range(THREADS)])
    assert results == [-1, *range(THREADS)]
    assert numbers.all() == sorted(results) and numbers.transactions == 2


def test_changes_beyond_one_transaction_are_committed_next(numbers, monkeypatch):
    monkeypatch.setattr(group_commit, "MAX_TOGETHER", 5)
    numbers.together([lambda n=n: numbers.add(n) for n in range(THREADS)])
    assert numbers.all() == [-1, *range(THREADS)] and numbers.transactions == 1 + 3


def test_a_change_that_raises_does_not_affect_the_others(numbers):
    def raises(connection):
        connection.execute(insert(NUMBERS).values(number=100))
        raise Conflict("no", "", "")

    works = [lambda: numbers.add(1), lambda: numbers.group.run(raises), lambda: numbers.add(-1), lambda: numbers.add(2)]
    _, one, conflict, taken, two = numbers.together(works)
    assert (one, two) == (1, 2) and isinstance(conflict, Conflict) and isinstance(taken, IntegrityError)
    assert numbers.all() == [-1, 1, 2]


def test_no_change_is_acknowledged_when_the_transaction_fails(numbers):
    numbers.fails = True
    results = numbers.together([lambda n=n: numbers.add(n) for n in range(THREADS)])
    assert all(isinstance(error, OSError) for error in results) and numbers.all() == []


def test_a_failure_of_the_database_ends_the_whole_transaction(numbers):
    def broken(connection):
        connection.execute(text("SELECT * FROM nowhere"))

    results = numbers.together([lambda: numbers.add(1), lambda: numbers.group.run(broken), lambda: numbers.add(2)])
    assert results[0] == -1 and all(isinstance(error, OperationalError) for error in results[1:])
    assert numbers.all() == [-1]


def test_an_interrupted_thread_does_not_interrupt_others(numbers):
    def interrupted(connection):
        raise KeyboardInterrupt

    results = numbers.together([lambda: numbers.add(1), lambda: numbers.group.run(interrupted), lambda: numbers.add(2)])
    kinds = [type(error) for error in results[1:]]
    assert sorted(kinds, key=str) == sorted([KeyboardInterrupt, StoreUnavailable, StoreUnavailable], key=str)
    assert numbers.all() == [-1]


def test_a_change_that_times_out_raises_and_changes_nothing(numbers, monkeypatch):
    monkeypatch.setattr(group_commit, "TURN_SECONDS", 0.05)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(numbers.add, 1)
        assert numbers.begun.wait(30)
        with pytest.raises(StoreUnavailable, match="Nothing was changed"):
            numbers.add(2)
        numbers.go.set()
        assert first.result() == 1
    assert numbers.all() == [1]

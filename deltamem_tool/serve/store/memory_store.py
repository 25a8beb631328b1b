"""The store: the memories of many tenants with their versions, and the snapshots after responses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError

from deltamem_tool.errors import ConfigError
from deltamem_tool.serve.store.connect import open_database
from deltamem_tool.serve.store.contents import Contents
from deltamem_tool.serve.store.encryption import KEY_VARIABLE, AesGcm, Checksum, read_key
from deltamem_tool.serve.store.errors import Conflict, NotFound, StoreUnavailable
from deltamem_tool.serve.store.memory_rows import (
    check_expected,
    list_memories,
    list_versions,
    lock_memory,
    read_memory,
    remove_memory,
    write_version,
)
from deltamem_tool.serve.store.records import (
    ANY,
    ExpectedVersion,
    MemoryInfo,
    MemoryVersion,
    Quota,
    Receipt,
    StoredResponse,
    Usage,
    VersionInfo,
)
from deltamem_tool.serve.store.response_rows import read_response, remove_response, write_response
from deltamem_tool.serve.store.schema import memories, responses, set_up
from deltamem_tool.serve.store.usage import read_usage

KEEP_VERSIONS = 20
MAX_NAME = 200  # characters of a tenant or an id
EXPIRED_AT_ONCE = 1000  # memories, and responses, that one call of `expire` deletes
TRIES = 3  # if other programs create and delete the same row in the meantime
T = TypeVar("T")


class MemoryStore:
    """Memories in a database, by tenant and id. All methods can be called from any thread.

    A change is committed when its method returns, and has not happened if the method raises. If the environment
    variable `DELTAMEM_STORE_KEY` is set (32 bytes in base64), stored data is encrypted with that key.

    Args:
        url: `sqlite:///FOLDER/FILE`, or `postgresql://USER:PASSWORD@HOST/DATABASE`. With `?synchronous=normal`, SQLite
            does not wait for the disk at each commit. This is faster, but a power failure can lose the last changes.
        keep_versions: number of versions to keep of each memory.
        quota: quota of each tenant.
        clock: returns the seconds since 1970.

    Raises:
        ConfigError: the URL or the key is invalid, or the store has another key or the tables of another version.
        StoreUnavailable: the database cannot be reached.
        StoreDamaged: the file is not a store.
    """

    def __init__(
        self,
        url: str,
        *,
        keep_versions: int = KEEP_VERSIONS,
        quota: Quota | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if keep_versions < 1:
            raise ConfigError("The number of versions to keep is invalid.", "It must be 1 or more.", "Correct it.")
        key = os.environ.get(KEY_VARIABLE)
        cipher = Checksum() if key is None else AesGcm(read_key(key))
        self._keep_versions = keep_versions
        self._quota = quota or Quota()
        self._clock = clock
        self._database = open_database(url)
        try:
            with self._database.set_up() as connection:
                set_up(connection, cipher)
        except BaseException:
            self._database.close()
            raise
        self._form = Contents(cipher, self._database.overflow_pages())
        self._changed = True  # since the last erase; an earlier server may have been killed before it erased

    def close(self) -> None:
        """Close the connections to the database."""
        self._database.close()

    def ping(self) -> None:
        """Check that the database answers.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        with self._database.read() as connection:
            connection.execute(select(1))

    def get(self, tenant: str, id: str, version: int | None = None) -> MemoryVersion | None:
        """Return the newest version of a memory, or the requested one; None if there is none.

        Raises:
            StoreDamaged: the stored data is not what was written.
        """
        _check_names(tenant, id)
        with self._database.read() as connection:
            return read_memory(connection, self._form, tenant, id, version, self._clock())

    def put(
        self,
        tenant: str,
        id: str,
        data: bytes,
        expected: ExpectedVersion = ANY,
        turn: Mapping[str, Any] | None = None,
        expires_at: float | None = None,
    ) -> MemoryVersion:
        """Write the next version of a memory, or the first one.

        Args:
            tenant: tenant that the memory belongs to.
            id: id of the memory.
            data: content of a memory file.
            expected: version that this one replaces; None if the memory must not exist, ANY for any version.
            turn: what the memory has been fed of a conversation, as JSON.
            expires_at: time when the memory expires; None for never.

        Raises:
            Conflict: the memory does not have the expected version.
            QuotaExceeded: the tenant would store too much.
            ConfigError: the tenant or the id is not a valid name.
        """
        _check_names(tenant, id)

        def write(connection: Connection) -> MemoryVersion:
            return self._write(connection, tenant, id, data, expected, turn, expires_at)

        return self._transact(write)

    def delete(self, tenant: str, id: str, expected: ExpectedVersion = ANY) -> Receipt:
        """Delete a memory, all its versions, and the responses that were made with it.

        Raises:
            NotFound: there is no such memory.
            Conflict: the memory does not have the expected version.
        """
        _check_names(tenant, id)

        def remove(connection: Connection) -> Receipt:
            now = self._clock()
            row = lock_memory(connection, tenant, id, now)
            if row is None:
                raise _not_found_error("memory", id)
            check_expected(row, id, expected)
            return remove_memory(connection, row, now)

        return self._with_erasure(self._transact(remove))

    def list(self, tenant: str, after: str | None = None, limit: int = 100) -> tuple[MemoryInfo, ...]:
        """Return up to `limit` memories of a tenant, in the order of their ids, starting after the id `after`."""
        _check_names(tenant)
        with self._database.read() as connection:
            return list_memories(connection, tenant, after, limit, self._clock())

    def versions(self, tenant: str, id: str) -> tuple[VersionInfo, ...]:
        """Return the stored versions of a memory, newest first.

        Raises:
            NotFound: there is no such memory.
        """
        _check_names(tenant, id)
        with self._database.read() as connection:
            versions = list_versions(connection, tenant, id, self._clock())
        if not versions:
            raise _not_found_error("memory", id)
        return versions

    def restore(self, tenant: str, id: str, version: int, expected: ExpectedVersion = ANY) -> MemoryVersion:
        """Write an earlier version of a memory as its next one.

        Raises:
            NotFound: there is no such memory, or the version is no longer stored.
            Conflict: the memory does not have the expected version.
            QuotaExceeded: the tenant would store too much.
        """
        _check_names(tenant, id)

        def write(connection: Connection) -> MemoryVersion:
            check_expected(lock_memory(connection, tenant, id, self._clock()), id, expected)
            source = self._source(connection, tenant, id, version)
            return self._write(connection, tenant, id, source.data, expected, source.turn, source.expires_at)

        return self._transact(write)

    def fork(self, tenant: str, id: str, new_id: str, version: int | None = None) -> MemoryVersion:
        """Copy the newest version of a memory, or the requested one, to a new memory.

        Raises:
            NotFound: there is no such memory or version.
            Conflict: the new memory already exists.
            QuotaExceeded: the tenant would store too much.
        """
        _check_names(tenant, id, new_id)

        def write(connection: Connection) -> MemoryVersion:
            source = self._source(connection, tenant, id, version)
            return self._write(connection, tenant, new_id, source.data, None, source.turn, source.expires_at)

        return self._transact(write)

    def usage(self, tenant: str) -> Usage:
        """Return the storage used by a tenant."""
        _check_names(tenant)
        with self._database.read() as connection:
            return read_usage(connection, tenant)

    def put_response(
        self,
        tenant: str,
        response_id: str,
        data: bytes,
        transcript: Any,
        memory: tuple[str, int] | None = None,
        expires_at: float | None = None,
    ) -> StoredResponse:
        """Store the memory after a response, and the conversation that continues from there.

        Args:
            tenant: tenant that the response belongs to.
            response_id: id of the response, which must be new.
            data: content of a memory file.
            transcript: the conversation, as JSON.
            memory: id and version of the memory that the response was made with. If that memory is deleted, so is the
                response.
            expires_at: time when the response expires; None for never.

        Raises:
            Conflict: the response already exists, or the memory was deleted in the meantime.
            QuotaExceeded: the tenant would store too much.
        """
        _check_names(tenant, response_id, *(memory or ())[:1])

        def write(connection: Connection) -> StoredResponse:
            return write_response(
                connection,
                self._form,
                tenant=tenant,
                id=response_id,
                data=data,
                transcript=transcript,
                memory=memory,
                expires_at=expires_at,
                now=self._clock(),
                quota=self._quota,
            )

        return self._transact(write)

    def get_response(self, tenant: str, response_id: str) -> StoredResponse | None:
        """Return a response; None if there is none.

        Raises:
            StoreDamaged: the stored data is not what was written.
        """
        _check_names(tenant, response_id)
        with self._database.read() as connection:
            return read_response(connection, self._form, tenant, response_id, self._clock())

    def delete_response(self, tenant: str, response_id: str) -> Receipt:
        """Delete a response.

        Raises:
            NotFound: there is no such response.
        """
        _check_names(tenant, response_id)
        now = self._clock()
        receipt = self._transact(lambda connection: remove_response(connection, tenant, response_id, now))
        if receipt is None:
            raise _not_found_error("response", response_id)
        return self._with_erasure(receipt)

    def expire(self) -> int:
        """Delete expired memories and responses, up to a thousand of each, and return their number.

        Other methods do not return them from the moment they expire. This method removes them from the database, and
        removes everything replaced or deleted since the last call from its files. Call it regularly.
        """
        now = self._clock()
        with self._database.read() as connection:
            outdated = [
                connection.execute(
                    select(table.c.tenant, table.c.id).where(table.c.expires_at <= now).limit(EXPIRED_AT_ONCE)
                ).all()
                for table in (memories, responses)
            ]
        for tenant, id in outdated[0]:
            self._transact(partial(lock_memory, tenant=tenant, id=id, now=now))
        for tenant, id in outdated[1]:
            self._transact(partial(remove_response, tenant=tenant, id=id, now=now))
        number = sum(map(len, outdated))
        if self._changed:
            self._erase()
        return number

    def _write(
        self,
        connection: Connection,
        tenant: str,
        id: str,
        data: bytes,
        expected: ExpectedVersion,
        turn: Mapping[str, Any] | None,
        expires_at: float | None,
    ) -> MemoryVersion:
        now = self._clock()
        row = lock_memory(connection, tenant, id, now)
        check_expected(row, id, expected)
        return write_version(
            connection,
            self._form,
            row,
            tenant=tenant,
            id=id,
            data=data,
            turn=turn,
            expires_at=expires_at,
            now=now,
            keep=self._keep_versions,
            quota=self._quota,
        )

    def _source(self, connection: Connection, tenant: str, id: str, version: int | None) -> MemoryVersion:
        source = read_memory(connection, self._form, tenant, id, version, self._clock())
        if source is None:
            raise _not_found_error("memory or version", id)
        return source

    def _transact(self, change: Callable[[Connection], T]) -> T:
        """Run `change` in a transaction, and retry if another program created the same row in the meantime."""
        for _ in range(TRIES):
            try:
                result = self._database.change(change)
                self._changed = True
                return result
            except IntegrityError as error:
                conflict = error
        raise Conflict(
            "A memory or response with this name already exists.", "Another request created it.", "Use another name."
        ) from conflict

    def _with_erasure(self, receipt: Receipt) -> Receipt:
        return replace(receipt, erased=self._erase() is True)

    def _erase(self) -> bool | None:
        self._changed = False
        try:
            erased = self._database.erase()
        except StoreUnavailable:  # the deletion itself is committed; the next erase includes it
            erased = False
        if erased is False:
            self._changed = True
        return erased


def _check_names(*names: str) -> None:
    for name in names:
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise ConfigError(
                "A name in the store is invalid.",
                f"It must have 1 to {MAX_NAME} characters, all of them printable.",
                "Use another name.",
            )


def _not_found_error(kind: str, id: str) -> NotFound:
    return NotFound(f"There is no {kind} {id!r}.", "It never existed, was deleted, or has expired.", "Use another one.")

"""The tables of a store, and the checks when one is opened."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    insert,
    inspect,
    select,
)

from deltamem_tool.errors import ConfigError
from deltamem_tool.io.formats import is_newer
from deltamem_tool.serve.store.encryption import KEY_VARIABLE, Checksum, Cipher
from deltamem_tool.serve.store.errors import StoreDamaged

SCHEMA_VERSION = 1
_KEY_CHECK = b"deltamem"

metadata = MetaData()
# Sorted by bytes, as in SQLite, whatever the collation of the database.
_NAME = Text().with_variant(Text(collation="C"), "postgresql")


def _name(column: str) -> Column[str]:
    return Column(column, _NAME, primary_key=True)


# One row. `key_check` is a known text, encrypted; NULL if the store is not encrypted.
about = Table(
    "deltamem_store",
    metadata,
    Column("schema_version", Integer, nullable=False),
    Column("key_check", LargeBinary),
)
# The usage of each tenant. New memories begin above `deleted_version`, the highest version that was ever deleted, so
# that a client with an old version of a deleted memory cannot confuse it with a new memory of the same id.
tenants = Table(
    "deltamem_tenants",
    metadata,
    _name("tenant"),
    Column("memories", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("deleted_version", BigInteger, nullable=False),
)
memories = Table(
    "deltamem_memories",
    metadata,
    _name("tenant"),
    _name("id"),
    Column("first_version", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
)
# A separate table, so that its rows have the format that `overflow` expects.
contents = Table(
    "deltamem_contents",
    metadata,
    Column("key", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("content", LargeBinary, nullable=False),
)
versions = Table(
    "deltamem_versions",
    metadata,
    _name("tenant"),
    _name("id"),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("content", BigInteger, nullable=False),  # key of its row in `contents`
)
responses = Table(
    "deltamem_responses",
    metadata,
    _name("tenant"),
    _name("id"),
    Column("memory", _NAME),
    Column("digest", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("content", BigInteger, nullable=False),
)
Index("deltamem_memories_expiry", memories.c.expires_at, sqlite_where=memories.c.expires_at.is_not(None))
Index("deltamem_responses_expiry", responses.c.expires_at, sqlite_where=responses.c.expires_at.is_not(None))
Index("deltamem_responses_memory", responses.c.tenant, responses.c.memory)


def set_up(connection: Connection, cipher: Cipher) -> None:
    """Create the tables if there are none, or check that they belong to this version and this key.

    Raises:
        ConfigError: the tables belong to another version, or `cipher` does not have their key.
    """
    if not inspect(connection).has_table(about.name):
        metadata.create_all(connection)
        check = None if isinstance(cipher, Checksum) else cipher.seal(_KEY_CHECK, "key")
        connection.execute(insert(about).values(schema_version=SCHEMA_VERSION, key_check=check))
        return
    row = connection.execute(select(about)).one()
    if row.schema_version != SCHEMA_VERSION:
        raise ConfigError(
            f"The store's tables have version {row.schema_version}.",
            f"This version of deltamem reads version {SCHEMA_VERSION}.",
            "Update deltamem-tool."
            if is_newer(row.schema_version, SCHEMA_VERSION)
            else "Start with an empty database.",
        )
    _check_key(row.key_check, cipher)


def _check_key(check: bytes | None, cipher: Cipher) -> None:
    plain = isinstance(cipher, Checksum)
    if check is None and not plain:
        raise ConfigError(
            "The store is not encrypted.", f"{KEY_VARIABLE} is set.", "Unset it, or start with an empty database."
        )
    if check is not None and plain:
        raise ConfigError("The store is encrypted.", f"{KEY_VARIABLE} is not set.", "Set it to the store's key.")
    if check is not None:
        try:
            cipher.open(check, "key")
        except StoreDamaged as error:
            raise ConfigError(
                "The store is encrypted with another key.",
                f"The key in {KEY_VARIABLE} cannot decrypt it.",
                "Use the store's key.",
            ) from error

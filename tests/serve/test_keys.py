"""API keys: hashed in their file, and each belongs to one tenant."""

from __future__ import annotations

import hashlib

import pytest

from deltamem_tool.errors import ConfigError
from deltamem_tool.serve.errors import RequestError
from deltamem_tool.serve.keys import ApiKeys, new_key


def header(key):
    return {"authorization": f"Bearer {key}"}


def test_a_key_identifies_its_tenant_and_is_stored_only_as_a_hash(tmp_path):
    file = tmp_path / "keys"
    tenants = {new_key(file, tenant): tenant for tenant in ("acme", "acme", "globex-2")}
    assert len(tenants) == 3
    keys = ApiKeys.read(file)
    for key, tenant in tenants.items():
        assert keys.tenant_of(header(key)) == tenant
        assert key not in file.read_text() and hashlib.sha256(key.encode()).hexdigest() in file.read_text()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        header(""),
        header("dm-wrong"),
        {"authorization": "Basic {key}"},
        {"authorization": "{key}"},
        header("{key}x"),
    ],
)
def test_a_missing_or_wrong_key_raises(tmp_path, headers):
    key = new_key(tmp_path / "keys", "acme")
    headers = {name: value.format(key=key) for name, value in headers.items()}
    with pytest.raises(RequestError, match="missing or wrong") as refused:
        ApiKeys.read(tmp_path / "keys").tenant_of(headers)
    assert refused.value.status == 401 and refused.value.headers == {"WWW-Authenticate": "Bearer"}


def test_comments_and_empty_lines_are_kept(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n\n")
    key = new_key(file, "acme")
    assert file.read_text().startswith("# ours\n\nacme sha256:")
    assert ApiKeys.read(file).tenant_of(header(key)) == "acme"


@pytest.mark.parametrize("content", ["acme\n", "acme secret\n", "acme sha256:12\n", "two words sha256:" + "0" * 64])
def test_a_foreign_file_raises_and_is_unchanged(tmp_path, content):
    file = tmp_path / "keys"
    file.write_text(content)
    for use in (ApiKeys.read, lambda path: new_key(path, "acme")):
        with pytest.raises(ConfigError, match=r"Line 1 of .* is not a valid entry"):
            use(file)
    assert file.read_text() == content


def test_a_missing_file_or_one_without_keys_raises(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        ApiKeys.read(tmp_path / "keys")
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(ConfigError, match="contains no keys"):
        ApiKeys.read(tmp_path / "keys")


@pytest.mark.parametrize("tenant", ["", "a b", "../x", "ä", "x" * 65, "-x"])
def test_an_invalid_tenant_name_raises(tmp_path, tenant):
    with pytest.raises(ConfigError, match="is not a valid tenant name"):
        new_key(tmp_path / "keys", tenant)
    assert not (tmp_path / "keys").exists()

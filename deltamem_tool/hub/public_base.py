"""The name of the base model in a repository: a Hub id, never a local path."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from deltamem_tool._compat import REGEX_COMMIT_OID
from deltamem_tool.adapter.config_file import CONFIG_FILE
from deltamem_tool.errors import HubError
from deltamem_tool.hub.contents import Contents
from deltamem_tool.io.names import BUILTIN, hub_name, hub_uri, is_gguf, short_name
from deltamem_tool.onnx.contract import MANIFEST_FILE
from deltamem_tool.onnx.locate import ONNX_FOLDER

_CACHED = "models--"  # how the Hub's cache begins the name of a model's folder


class Base(NamedTuple):
    """The public name of a base model."""

    name: str | None  # a Hub id or a `builtin:` name; None if unknown
    revision: str | None  # commit on the Hub


def with_public_base(contents: Contents, base_model: str | None) -> tuple[Contents, Base]:
    """Return `contents` with the public name of the base model in its files, and that base.

    Args:
        contents: contents of a local folder.
        base_model: `OWNER/NAME` or `OWNER/NAME@REVISION`; by default the name that the adapter records.

    Raises:
        HubError: the adapter does not record the Hub id of its base model, and `base_model` is None.
    """
    base = _public_base(contents, base_model)
    files, adapter, manifest = dict(contents.files), contents.adapter, contents.onnx
    if adapter is not None and base != (adapter.base.name, adapter.base.revision):
        assert base.name is not None
        renamed = {"name": base.name, "revision": base.revision}
        files[CONFIG_FILE] = _edit_json(files[CONFIG_FILE], lambda content: content["base"].update(renamed))
        adapter = replace(adapter, base=replace(adapter.base, name=base.name, revision=base.revision))
    if manifest is not None and manifest.base_model != base.name:
        path = f"{ONNX_FOLDER}/{MANIFEST_FILE}"
        files[path] = _edit_json(files[path], lambda content: content.update(base_model=base.name))
        manifest = replace(manifest, base_model=base.name)
    return replace(contents, files=files, adapter=adapter, onnx=manifest), base


def _public_base(contents: Contents, base_model: str | None) -> Base:
    recorded = _recorded_base(contents)
    if base_model is not None:
        hub = hub_uri(base_model)
        name = short_name(hub)
        return Base(name, hub.revision or (recorded.revision if name == recorded.name else None))
    if recorded.name is not None and (recorded.name.startswith(BUILTIN) or recorded.revision or not contents.adapter):
        return recorded
    if contents.adapter is None:
        return Base(None, None)
    raise HubError(
        "The adapter does not name its base model on the Hub, so others could not find it.",
        "The adapter was created for a folder on this machine, or for a model that was not saved.",
        "Pass the base model's Hub id: --base-model OWNER/NAME, or OWNER/NAME@REVISION.",
    )


def _recorded_base(contents: Contents) -> Base:
    """Return the base that the files record. A folder of the Hub's cache becomes its Hub id, any other folder None."""
    if contents.adapter is not None:
        name, revision = contents.adapter.base.name, contents.adapter.base.revision
    else:
        assert contents.onnx is not None  # there is one of the two
        name, revision = contents.onnx.base_model or "", None
    path = Path(name)
    for folder in (path, *path.parents) if path.is_absolute() else ():
        owner_and_name = folder.name.removeprefix(_CACHED).split("--")
        if folder.name.startswith(_CACHED) and len(owner_and_name) == 2:
            below = path.relative_to(folder).parts
            commits = [part for part in below if REGEX_COMMIT_OID.fullmatch(part)]
            commit = commits[0] if commits else revision
            repository = "/".join(owner_and_name)
            if is_gguf(name) and commits:
                repository += f":{'/'.join(below[below.index(commits[0]) + 1 :])}"
            return Base(repository, commit)
    is_name = name.startswith(BUILTIN) or hub_name(name) is not None
    return Base(name, revision) if is_name else Base(None, None)


def _edit_json(file: Path | bytes, change: Callable[[Any], Any]) -> bytes:
    """Return a JSON file's bytes after `change` of its content."""
    content = json.loads(file if isinstance(file, bytes) else file.read_bytes())
    change(content)
    return (json.dumps(content, indent=2) + "\n").encode()

"""Create new adapters without loading the base model."""

from __future__ import annotations

from pathlib import Path

from deltamem_tool.adapter.find_base import base_of
from deltamem_tool.adapter.folder import AdapterFolder, read_adapter
from deltamem_tool.adapter.save import write_adapter
from deltamem_tool.base_model.attention import select_layers
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.io.atomic import check_overwrite
from deltamem_tool.io.names import check_revision
from deltamem_tool.memory.attach import fresh_adapter


def create_adapter(
    base: str,
    config: DeltaMemConfig,
    out: str | Path,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> AdapterFolder:
    """Write a fresh adapter for the checkpoint `base`, without loading it. Only a few columns of its weights are read.

    Python files of `base` run only with `trust_remote_code`.

    Raises:
        ArchitectureError: `base` cannot have a memory.
        ConfigError: the options do not fit `base`.
        DeltaMemError: `out` exists, or cannot be written.
        HubError: a revision is given for a folder.
    """
    check_overwrite(out, overwrite)
    check_revision(base, revision)
    checkpoint = BaseCheckpoint(base, revision, trust_remote_code)
    layers = select_layers(checkpoint.layers, config)
    adapter = fresh_adapter(config, layers, checkpoint.first_columns)
    write_adapter(adapter, base_of(checkpoint), out, overwrite)
    return read_adapter(out)

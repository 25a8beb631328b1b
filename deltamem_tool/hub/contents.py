"""The contents of a folder or a repository: an adapter, an ONNX folder under `onnx/`, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltamem_tool.adapter.config_file import CONFIG_FILE, PLOT_FILE, SUMMARY_FILE, WEIGHTS_FILE
from deltamem_tool.adapter.folder import AdapterFolder, read_adapter
from deltamem_tool.errors import DeltaMemError, HubError
from deltamem_tool.evaluation.report.evaluation_file import EVALUATION_FILE, read_evaluation
from deltamem_tool.io.safe_json import read_json
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.locate import ONNX_FOLDER
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.runtime.validate import check_onnx_folder

CARD_FILE = "README.md"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, SUMMARY_FILE, PLOT_FILE, EVALUATION_FILE)
ONNX_PATHS = tuple(f"{ONNX_FOLDER}/{file}" for file in contract.FILES)
REPO_FILES = (*ADAPTER_FILES, CARD_FILE, *ONNX_PATHS)  # no other files are sent or fetched


@dataclass(frozen=True)
class Contents:
    """An adapter, an ONNX folder that was exported from it, or both. They have been checked.

    Args:
        files: files by their path in a repository, without the card.
        adapter: None if there is none.
        onnx: the manifest of the ONNX folder; None if there is none.
        training: `training.json`.
        evaluation: `evaluation.json`, of this adapter.
        card: `README.md`.
    """

    files: Mapping[str, Path | bytes] = field(repr=False)
    adapter: AdapterFolder | None
    onnx: Manifest | None
    training: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    card: bytes | None = None

    @property
    def fingerprint(self) -> str:
        """The adapter's fingerprint, which memories are bound to."""
        if self.adapter is not None:
            return self.adapter.fingerprint
        assert self.onnx is not None  # there is one of the two
        return self.onnx.adapter

    @property
    def parts(self) -> list[str]:
        """Names of the parts, for messages."""
        return [*(["adapter"] if self.adapter else []), *(["ONNX folder"] if self.onnx else [])]

    def merge(self, other: Contents) -> Contents:
        """Return these contents with the part that only `other` has, which must be of the same adapter."""
        return replace(
            self,
            adapter=self.adapter or other.adapter,
            onnx=self.onnx or other.onnx,
            training=self.training if self.adapter else other.training,
            evaluation=self.evaluation or (None if self.adapter else other.evaluation),
        )


def read_contents(folder: Path, onnx: Path | None = None, evaluation: Path | None = None) -> Contents:
    """Read and check the contents of `folder`.

    Args:
        folder: an adapter folder, which may contain an ONNX folder `onnx`; or an ONNX folder.
        onnx: an ONNX folder outside `folder`.
        evaluation: file written by `deltamem eval --out`, if it is not in `folder`.

    Raises:
        HubError: the folder has neither part, or parts of two adapters; or the evaluation is of another adapter.
        AdapterError: the adapter is damaged.
        ExportError: the ONNX folder is damaged.
        DataError: the evaluation is damaged.
    """
    if not folder.is_dir():
        raise HubError(f"Folder {folder} not found.", "", "Pass an adapter folder or an ONNX folder.")
    adapter = read_adapter(folder) if (folder / CONFIG_FILE).is_file() else None
    inside = [place for place in (folder, folder / ONNX_FOLDER) if (place / contract.MANIFEST_FILE).is_file()]
    place = onnx or next(iter(inside), None)
    manifest = None if place is None else check_onnx_folder(place)
    if adapter is None and manifest is None:
        raise HubError(
            f"{folder} contains no adapter and no ONNX folder.",
            f"It has neither {CONFIG_FILE} nor {contract.MANIFEST_FILE}.",
            "Create one with `deltamem train` or `deltamem export`.",
        )
    if adapter is not None and manifest is not None and adapter.fingerprint != manifest.adapter:
        raise HubError(
            f"{place} was not exported from the adapter in {folder}.",
            "A memory file works with one of them only.",
            "Export the adapter again, or push the two to different repositories.",
        )
    files: dict[str, Path | bytes] = {}
    if adapter is not None:
        files |= {name: folder / name for name in ADAPTER_FILES if (folder / name).is_file()}
    if manifest is not None and place is not None:
        files |= {f"{ONNX_FOLDER}/{name}": place / name for name in contract.FILES if (place / name).is_file()}
    scores = evaluation or folder / EVALUATION_FILE
    results = read_evaluation(scores) if evaluation is not None or scores.is_file() else None
    card = folder / CARD_FILE
    contents = Contents(
        files,
        adapter,
        manifest,
        _json(folder / SUMMARY_FILE) if adapter is not None else None,
        results,
        card.read_bytes() if card.is_file() else None,
    )
    if results is not None:
        files[EVALUATION_FILE] = scores
        if results["adapter"] != contents.fingerprint:
            raise HubError(
                f"{scores} is the evaluation of another adapter.",
                "The model card would show figures that are not this adapter's.",
                "Evaluate this one: `deltamem eval ADAPTER --out evaluation.json`.",
            )
    return contents


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = read_json(file)
    except ValueError as error:
        raise DeltaMemError(f"{file} is not JSON.", f"{error}.", "Remove it, or train again.") from error
    if not isinstance(content, dict):
        raise DeltaMemError(f"{file} is not a JSON object.", "", "Remove it, or train again.")
    return content

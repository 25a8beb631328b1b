"""What a folder or a repository holds: an adapter, an ONNX folder, or both, with the ONNX under `onnx/`."""

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
from deltamem_tool.onnx.contract import Manifest
from deltamem_tool.onnx.locate import ONNX_FOLDER
from deltamem_tool.onnx.runtime.validate import check_onnx_folder

CARD_FILE = "README.md"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, SUMMARY_FILE, PLOT_FILE, EVALUATION_FILE)
ONNX_PATHS = tuple(f"{ONNX_FOLDER}/{file}" for file in contract.FILES)
REPO_FILES = (*ADAPTER_FILES, CARD_FILE, *ONNX_PATHS)  # nothing else is sent or fetched


@dataclass(frozen=True)
class Contents:
    """An adapter, an ONNX folder, or both of one adapter; checked.

    Args:
        files: what there is, by path in a repository, without the card.
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
        """Of the adapter, which memories are bound to."""
        if self.adapter is not None:
            return self.adapter.fingerprint
        assert self.onnx is not None  # there is one of the two
        return self.onnx.adapter

    @property
    def parts(self) -> list[str]:
        """What there is, in words."""
        return [*(["adapter"] if self.adapter else []), *(["ONNX folder"] if self.onnx else [])]

    def beside(self, other: Contents) -> Contents:
        """These, and of `other` the part that is missing here, if it is of the same adapter."""
        if other.fingerprint != self.fingerprint:
            return self
        return replace(
            self,
            adapter=self.adapter or other.adapter,
            onnx=self.onnx or other.onnx,
            training=self.training if self.adapter else other.training,
            evaluation=self.evaluation or (None if self.adapter else other.evaluation),
        )


def read_contents(folder: Path, onnx: Path | None = None, evaluation: Path | None = None) -> Contents:
    """Read and check what `folder` holds.

    Args:
        folder: an adapter folder, perhaps with an ONNX folder `onnx` in it; or an ONNX folder.
        onnx: an ONNX folder that is elsewhere.
        evaluation: what `deltamem eval --out` wrote, if it is not in `folder`.

    Raises:
        HubError: it holds neither, or parts of two adapters; or the evaluation is of another one.
        AdapterError, ExportError, DataError: a part is damaged.
    """
    if not folder.is_dir():
        raise HubError(f"There is no folder {folder}.", "", "Give an adapter folder or an ONNX folder.")
    adapter = read_adapter(folder) if (folder / CONFIG_FILE).is_file() else None
    inside = [place for place in (folder, folder / ONNX_FOLDER) if (place / contract.MANIFEST_FILE).is_file()]
    place = onnx or next(iter(inside), None)
    manifest = None if place is None else check_onnx_folder(place)
    if adapter is None and manifest is None:
        raise HubError(
            f"{folder} holds no adapter and no ONNX folder.",
            f"It has no {CONFIG_FILE} and no {contract.MANIFEST_FILE}.",
            "Make one with `deltamem train` or `deltamem export`.",
        )
    if adapter is not None and manifest is not None and adapter.fingerprint != manifest.adapter:
        raise HubError(
            f"{place} was not exported from the adapter in {folder}.",
            "A memory of one would be refused by the other.",
            "Export the adapter again, or push the two to different repositories.",
        )
    files: dict[str, Path | bytes] = {}
    if adapter is not None:
        files |= {name: folder / name for name in ADAPTER_FILES if (folder / name).is_file()}
    if manifest is not None and place is not None:
        files |= {f"{ONNX_FOLDER}/{name}": place / name for name in contract.FILES if (place / name).is_file()}
    scores = evaluation or folder / EVALUATION_FILE
    said = read_evaluation(scores) if evaluation is not None or scores.is_file() else None
    card = folder / CARD_FILE
    contents = Contents(
        files,
        adapter,
        manifest,
        _json(folder / SUMMARY_FILE) if adapter is not None else None,
        said,
        card.read_bytes() if card.is_file() else None,
    )
    if said is not None:
        files[EVALUATION_FILE] = scores
        if said["adapter"] != contents.fingerprint:
            raise HubError(
                f"{scores} is the evaluation of another adapter.",
                "",
                "Evaluate this one: `deltamem eval ADAPTER --out evaluation.json`.",
            )
    return contents


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        said = read_json(file)
    except ValueError as error:
        raise DeltaMemError(f"{file} is not JSON.", f"{error}.", "Remove it, or train again.") from error
    if not isinstance(said, dict):
        raise DeltaMemError(f"{file} is no JSON object.", "", "Remove it, or train again.")
    return said

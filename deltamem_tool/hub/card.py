"""The model card: a generated block inside a text that otherwise belongs to the user."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from jinja2 import Environment, StrictUndefined, Template

from deltamem_tool._version import __version__
from deltamem_tool.base_model import smollm2
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import HubError, first_line
from deltamem_tool.evaluation.conditions import STATE, readable_name
from deltamem_tool.evaluation.scoring.digits import mean_and_interval
from deltamem_tool.hub.contents import CARD_FILE, Contents
from deltamem_tool.hub.public_base import Base
from deltamem_tool.hub.repository import LIBRARY
from deltamem_tool.io.names import BACKBONE, BUILTIN, hub_uri, is_gguf
from deltamem_tool.onnx.manifest import Manifest

BEGIN = "<!-- deltamem: from here to the closing mark, `deltamem push` writes anew -->"
END = "<!-- /deltamem -->"
TAGS = ("delta-mem", "associative-memory", "arxiv:2605.12357")
DATASET = "deltamem-"  # prefix of the names of deltamem's tasks in a model-index
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_SPACE = re.compile(r"\[Talk to it in your browser\]\((\S+)\)")  # the link that the template writes
_TOY = "The backbone is a toy model with a vocabulary of 767 words. It only demonstrates the mechanism."
_WRITTEN = {
    "token": "written at every token",
    "message": "written at the end of every message",
    "sentence": "written at the end of every sentence",
}
_TRAINING = {  # keys of the recipe in training.json, and their names in the card
    "data.path": "data",
    "data.revision": "revision of the data",
    "training.batch_size": "batch size",
    "training.learning_rate": "learning rate",
    "training.optimizer": "optimizer",
    "training.scheduler": "schedule",
    "training.dtype": "dtype of the base",
    "training.seed": "seed",
}


def write_card(
    contents: Contents, repo_id: str, base: Base, old: bytes | None, license: str | None, space: str | None = None
) -> bytes:
    """Write the card of the repository `repo_id`.

    Args:
        contents: contents of the repository after the push.
        repo_id: `owner/name`.
        base: the base model under its public name.
        old: the existing card; its metadata and all text outside the generated block are kept.
        license: identifier for the metadata; None keeps that of the old card.
        space: address of its Space; None keeps that of the old card.

    Raises:
        HubError: the old card's metadata or marks are invalid.
    """
    card = _parse(f"---\n\n---\n\n# {repo_id.partition('/')[2]}\n".encode() if old is None else old)
    text = card.text
    linked = _SPACE.search(text)
    space = space or (linked and linked[1])
    newline = "\r\n" if "\r\n" in text else "\n"
    block = f"{BEGIN}\n\n{_block(contents, repo_id, base, space)}\n{END}".replace("\n", newline)
    if (text.count(BEGIN), text.count(END)) == (0, 0):
        card.text = text.rstrip() + 2 * newline + block + newline
    elif (text.count(BEGIN), text.count(END)) == (1, 1) and text.index(BEGIN) < text.index(END):
        card.text = text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]
    else:
        raise HubError(
            f"{CARD_FILE} has no valid deltamem block.",
            f"The marks {BEGIN.split(':')[0]} … --> and {END} must each occur once, in this order, or not at all.",
            "Correct them, or remove both marks.",
        )
    _describe(card.data, contents, repo_id, base.name, license, text)
    return str(card.content).encode()


def has_license(card: bytes) -> bool:
    """Return whether the card's metadata names a licence."""
    return bool(_parse(card).data.get("license"))


def _parse(card: bytes) -> ModelCard:
    try:
        return ModelCard(card.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise HubError(f"{CARD_FILE} is not UTF-8 text.", f"{error}.", "Save it in UTF-8.") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise HubError(
            f"The metadata of {CARD_FILE} is not valid.", f"{first_line(error)}.", "Correct its YAML."
        ) from error


def _describe(
    data: Any, contents: Contents, repo_id: str, base: str | None, license: str | None, old_text: str
) -> None:
    """Update the metadata of a card that had `old_text`."""
    if base is not None and base != BACKBONE:  # which is not on the Hub
        data.base_model = _hub_id(base)
        data.base_model_relation = "adapter"
    data.library_name = LIBRARY
    data.pipeline_tag = "text-generation"
    data.tags = [*dict.fromkeys([*(data.tags or []), *TAGS, *(["onnx"] if contents.onnx else [])])]
    if license is not None:
        data.license = license
    path = (contents.training or {}).get("recipe", {}).get("data.path")
    if isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/")):  # a data set of the Hub
        given = [data.datasets] if isinstance(data.datasets, str) else data.datasets or []
        users = [name for name in given if f"| data | {name} |" not in old_text]  # not from an earlier push
        names = list(dict.fromkeys([*users, path]))
        data.datasets = names if users else path
    others = [result for result in data.eval_results or [] if not result.dataset_type.startswith(DATASET)]
    data.eval_results = [*others, *_results(contents.evaluation)] or None
    if data.eval_results:
        data.model_name = data.model_name or repo_id.partition("/")[2]


def _results(evaluation: Mapping[str, Any] | None) -> list[EvalResult]:
    if evaluation is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            task_name=f"deltamem {evaluation['task']}, protocol {evaluation['protocol']}",
            dataset_type=f"{DATASET}{evaluation['task']}",
            dataset_name=f"deltamem {evaluation['task']}: {group}, {count} questions",
            dataset_config=group,  # results of one dataset and configuration are listed together
            metric_type=evaluation["metric"],
            metric_name=f"{readable_name(evaluation['metric'])}, {readable_name(name)}",
            metric_value=evaluation["scores"][name][at][0],
        )
        for at, (group, count) in enumerate(zip(evaluation["groups"], evaluation["questions"], strict=True))
        for name in evaluation["conditions"]
    ]


def _block(contents: Contents, repo_id: str, base: Base, space: str | None) -> str:
    is_builtin = base.name is not None and base.name.startswith(BUILTIN)
    if contents.adapter is not None:
        config, count, memory_bytes = (
            contents.adapter.config,
            len(contents.adapter.layer_indices),
            contents.adapter.memory_bytes,
        )
    else:
        assert contents.onnx is not None  # there is one of the two
        config = DeltaMemConfig.from_dict(dict(contents.onnx.mechanism))
        count, memory_bytes = len(contents.onnx.interface.state_shapes), contents.onnx.interface.memory_bytes
    return _template().render(
        contents=contents,
        repo_id=repo_id,
        base=_base(base),
        extra=_extra(contents, base),
        is_builtin=is_builtin,
        layers="one layer" if count == 1 else f"{count} layers",
        written=_WRITTEN[config.granularity],
        branches=", ".join(config.branches),
        memory_bytes=memory_bytes,
        mechanism=_mechanism(config),
        training=_training(contents.training),
        scores=_scores(contents.evaluation),
        onnx=_onnx(contents.onnx),
        scope=_TOY if base.name == BACKBONE else "",
        space=space,
        version=__version__,
    )


@cache
def _template() -> Template:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shell"] = shlex.join
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _base(base: Base) -> str:
    if base.name is None:
        return "a base model that is not named"
    if base.name == BACKBONE:
        return "the small backbone included in deltamem-tool"
    link = f"https://huggingface.co/{_hub_id(base.name)}"
    if base.name == smollm2.BUILTIN_NAME:
        return f"[{smollm2.NAME}]({link}) as a GGUF file in 4 bits"
    at = f" (revision `{base.revision}`)" if base.revision else ""
    return f"[{base.name}]({link}){at}"


def _hub_id(name: str) -> str:
    """Return the Hub id of a base model, without a revision or a file."""
    return smollm2.HUB_ID if name == smollm2.BUILTIN_NAME else hub_uri(name).id


def _extra(contents: Contents, base: Base) -> str:
    """Return the extra of deltamem-tool that loading the contents needs."""
    if contents.adapter is None:
        return "cpu"
    is_in_gguf = base.name is not None and (is_gguf(base.name) or base.name == smollm2.BUILTIN_NAME)
    return "gguf" if is_in_gguf else "torch"


def _mechanism(config: DeltaMemConfig) -> list[tuple[str, str]]:
    """The rows of the table: the main options, and those that differ from their defaults."""
    defaults, options = DeltaMemConfig().to_dict(), config.to_dict()
    main = ("rank", "state_heads", "heads", "granularity", "update_rule")
    return [
        (name.replace("_", " "), _cell(value))
        for name, value in options.items()
        if name in main or value != defaults[name]
    ]


def _training(summary: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not summary:
        return []
    recipe = summary.get("recipe") or {}
    rows = [("steps", summary.get("steps"))]
    rows += [(name, recipe.get(key)) for key, name in _TRAINING.items()]
    if recipe.get("data.path") is None:
        rows.append(("data", f"{recipe.get('data.generated', 'dialogues')} that deltamem-tool generates"))
    versions = summary.get("versions") or {}
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or None))
    return [(name, _cell(value)) for name, value in rows if value is not None]


def _scores(evaluation: Mapping[str, Any] | None) -> list[tuple[str, list[str]]]:
    """The rows of the table: a condition, and for each group its mean and interval."""
    if evaluation is None:
        return []
    rows = []
    for name in evaluation["conditions"]:
        cells = ["{} ({})".format(*mean_and_interval(*row)) for row in evaluation["scores"][name]]
        title = _cell(readable_name(name))
        rows.append((f"**{title}**" if name == STATE else title, cells))
    return rows


def _onnx(manifest: Manifest | None) -> str:
    """Describe the graph, and how well it agrees with PyTorch."""
    if manifest is None:
        return ""
    parts = [f"target {manifest.target}", manifest.interface.dtype]
    if manifest.quantize != "none":
        parts.append(manifest.quantize)
    if manifest.max_abs_diff is not None:
        parts.append(f"differs from PyTorch by at most {manifest.max_abs_diff:.0e}")
    return ", ".join(parts)


def _cell(value: Any) -> str:
    """Return text for a cell of a Markdown table, which a bar would end."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")

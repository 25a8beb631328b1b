"""The model card: one block that is written anew from what is known, in a text whose other words are the user's."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from jinja2 import Environment, StrictUndefined, Template

from deltamem_tool._version import __version__
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import HubError, first_line
from deltamem_tool.evaluation.conditions import STATE, in_words
from deltamem_tool.evaluation.scoring.digits import mean_and_interval
from deltamem_tool.hub.contents import CARD_FILE, Contents
from deltamem_tool.hub.public_base import Base
from deltamem_tool.hub.repository import LIBRARY
from deltamem_tool.io.names import BUILTIN

BEGIN = "<!-- deltamem: from here to the closing mark, `deltamem push` writes anew -->"
END = "<!-- /deltamem -->"
TAGS = ("delta-mem", "associative-memory", "arxiv:2605.12357")
DATASET = "deltamem-"  # how our tasks' names begin in a model-index
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_WRITTEN = {
    "token": "written at every token",
    "message": "written at the end of every message",
    "sentence": "written at the end of every sentence",
}
_TRAINING = {  # keys of training.json's recipe, and what the card calls them
    "data.path": "data",
    "data.revision": "revision of the data",
    "training.batch_size": "batch size",
    "training.learning_rate": "learning rate",
    "training.optimizer": "optimizer",
    "training.scheduler": "schedule",
    "training.dtype": "dtype of the base",
    "training.seed": "seed",
}


def write_card(known: Contents, repo_id: str, base: Base, old: bytes | None, license: str | None) -> bytes:
    """The card of `known` in the repository `repo_id`.

    Args:
        known: what the repository will hold.
        repo_id: `owner/name`.
        base: the base model as others find it.
        old: the card that is there; its metadata and all words outside our block are kept.
        license: identifier for the metadata; None keeps what the old card says.

    Raises:
        HubError: the old card's metadata or marks are broken.
    """
    card = _parsed(f"---\n\n---\n\n# {repo_id.partition('/')[2]}\n".encode() if old is None else old)
    text = card.text
    newline = "\r\n" if "\r\n" in text else "\n"
    block = f"{BEGIN}\n\n{_block(known, repo_id, base)}\n{END}".replace("\n", newline)
    if (text.count(BEGIN), text.count(END)) == (0, 0):
        card.text = text.rstrip() + 2 * newline + block + newline
    elif (text.count(BEGIN), text.count(END)) == (1, 1) and text.index(BEGIN) < text.index(END):
        card.text = text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]
    else:
        raise HubError(
            f"{CARD_FILE} has no clear block of deltamem.",
            f"The marks {BEGIN.split(':')[0]} … --> and {END} must each be there once, in this order, or not at all.",
            "Correct it there, or remove both marks.",
        )
    _describe(card.data, known, repo_id, base.name, license)
    return card.content.encode()


def says_license(card: bytes) -> bool:
    """Whether the card's metadata names a licence."""
    return bool(_parsed(card).data.get("license"))


def _parsed(card: bytes) -> ModelCard:
    try:
        return ModelCard(card.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise HubError(f"{CARD_FILE} is no text in UTF-8.", f"{error}.", "Save it in UTF-8.") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise HubError(
            f"The metadata of {CARD_FILE} cannot be read.", f"{first_line(error)}.", "Correct it there."
        ) from error


def _describe(data: Any, known: Contents, repo_id: str, base: str | None, license: str | None) -> None:
    """Put what is known into a card's metadata."""
    if base is not None and not base.startswith(BUILTIN):
        data.base_model = base
        data.base_model_relation = "adapter"
    data.library_name = LIBRARY
    data.pipeline_tag = "text-generation"
    own = [*TAGS, *(["onnx"] if known.onnx else [])]
    data.tags = [*(data.tags or []), *(tag for tag in own if tag not in (data.tags or []))]
    if license is not None:
        data.license = license
    dataset = _dataset(known)
    if dataset is not None:
        data.datasets = dataset
    others = [result for result in data.eval_results or [] if not result.dataset_type.startswith(DATASET)]
    own_results = _results(known)
    data.eval_results = [*others, *own_results] or None
    if data.eval_results:
        data.model_name = data.model_name or repo_id.partition("/")[2]


def _dataset(known: Contents) -> str | None:
    """The Hub id of the data, where it was trained on a data set of the Hub."""
    path = (known.training or {}).get("recipe", {}).get("data.path")
    return path if isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/")) else None


def _results(known: Contents) -> list[EvalResult]:
    said = known.evaluation
    if said is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            task_name=f"deltamem {said['task']}, protocol {said['protocol']}",
            dataset_type=f"{DATASET}{said['task']}",
            dataset_name=f"deltamem {said['task']}: {group}, {count} questions",
            dataset_config=group,  # results of one dataset and configuration are listed together
            metric_type=said["metric"],
            metric_name=f"{in_words(said['metric'])}, {in_words(name)}",
            metric_value=said["scores"][name][at][0],
        )
        for at, (group, count) in enumerate(zip(said["groups"], said["questions"], strict=True))
        for name in said["conditions"]
    ]


def _block(known: Contents, repo_id: str, base: Base) -> str:
    is_builtin = base.name is not None and base.name.startswith(BUILTIN)
    if known.adapter is not None:
        config, count, memory_bytes = known.adapter.config, len(known.adapter.layer_indices), known.adapter.memory_bytes
    else:
        assert known.onnx is not None  # there is one of the two
        config = DeltaMemConfig.from_dict(dict(known.onnx.mechanism))
        count, memory_bytes = len(known.onnx.interface.state_shapes), known.onnx.interface.memory_bytes
    return _template().render(
        known=known,
        repo_id=repo_id,
        base=_base(base),
        is_builtin=is_builtin,
        layers="one layer" if count == 1 else f"{count} layers",
        written=_WRITTEN[config.granularity],
        branches=", ".join(config.branches),
        memory_bytes=memory_bytes,
        mechanism=_mechanism(config),
        training=_training(known.training),
        scores=_scores(known.evaluation),
        onnx=_onnx(known),
        scope="The backbone is a toy of 767 words: it shows the mechanism, and nothing else." if is_builtin else "",
        version=__version__,
    )


@cache
def _template() -> Template:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shell"] = shlex.join
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _base(base: Base) -> str:
    if base.name is None:
        return "a base model that nobody has named here"
    if base.name.startswith(BUILTIN):
        return "the small backbone that deltamem-tool ships"
    at = f" (revision `{base.revision}`)" if base.revision else ""
    return f"[{base.name}](https://huggingface.co/{base.name}){at}"


def _mechanism(config: DeltaMemConfig) -> list[tuple[str, str]]:
    """The rows of the table: what is not as usual, and what everybody asks for."""
    usual, own = DeltaMemConfig().to_dict(), config.to_dict()
    shown = ("rank", "state_heads", "heads", "granularity", "update_rule")
    return [(name.replace("_", " "), _cell(own[name])) for name in own if name in shown or own[name] != usual[name]]


def _training(said: Any) -> list[tuple[str, str]]:
    if not said:
        return []
    recipe = said.get("recipe") or {}
    rows = [("steps", said.get("steps"))]
    rows += [(name, recipe.get(key)) for key, name in _TRAINING.items()]
    if recipe.get("data.path") is None:
        rows.append(("data", "dialogues that deltamem-tool generates"))
    versions = said.get("versions") or {}
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or None))
    return [(name, _cell(value)) for name, value in rows if value is not None]


def _scores(said: Any) -> list[tuple[str, list[str]]]:
    """The rows of the table: a condition, and for each group its mean and interval."""
    if said is None:
        return []
    rows = []
    for name in said["conditions"]:
        cells = ["{} ({})".format(*mean_and_interval(*row)) for row in said["scores"][name]]
        title = _cell(in_words(name))
        rows.append((f"**{title}**" if name == STATE else title, cells))
    return rows


def _onnx(known: Contents) -> str:
    """What the graph is, and how well it agrees with PyTorch."""
    found = known.onnx
    if found is None:
        return ""
    kind = [f"target {found.target}", found.interface.dtype]
    if found.quantize != "none":
        kind.append(found.quantize)
    if found.max_abs_diff is not None:
        kind.append(f"differs from PyTorch by {found.max_abs_diff:.0e} at most")
    return ", ".join(kind)


def _cell(value: Any) -> str:
    """In a table of Markdown, where a bar ends a cell."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")

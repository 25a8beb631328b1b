"""Write the table of supported model types, for `deltamem architectures` and for docs/architectures.md, anew:

PYTHONPATH=tests python -m base_model.support_table
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from base_model.exported import EXPORTED
from base_model.tiny_configs import UNBUILT, tiny_config
from deltamem_tool._compat import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from deltamem_tool.base_model.attention import AttentionLayer, attention_layers
from deltamem_tool.base_model.layouts import UNSUPPORTED
from deltamem_tool.base_model.support import TABLE, Support, summary, supported_types, transformers_version
from deltamem_tool.config import BRANCHES
from deltamem_tool.errors import ArchitectureError

COMMAND = "PYTHONPATH=tests python -m base_model.support_table"
DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
_MARKS = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- /table -->)", re.DOTALL)


def support(model_type: str) -> Support:
    """The row of a model type, read from a tiny model whose weights are never created."""
    if model_type in UNSUPPORTED:
        return Support(model_type, False, [], False, UNSUPPORTED[model_type])
    if model_type in UNBUILT:
        return Support(model_type, False, [], False, f"not tried: {UNBUILT[model_type]}")
    config = tiny_config(model_type)
    layers = layers_of(config)
    branches = [branch for branch in BRANCHES if all(branch in layer.projections for layer in layers)]
    reasons = list(dict.fromkeys(layer.note for layer in layers if layer.note))
    assert bool(reasons) == (len(branches) < len(BRANCHES)), f"{model_type} lacks branches, and no layer says why"
    if getattr(config, "is_decoder", False):
        config.is_decoder = False  # like most of its checkpoints
        try:
            layers_of(config)
        except ArchitectureError:
            reasons.append("only with is_decoder=True in its config: its tokens see later ones otherwise")
    return Support(model_type, True, branches, model_type in EXPORTED, "; ".join(reasons) or None)


def layers_of(config: PretrainedConfig) -> list[AttentionLayer]:
    with torch.device("meta"):
        return attention_layers(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def generate() -> list[Support]:
    return [support(model_type) for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]


def markdown(types: list[Support]) -> str:
    """The part of the docs between its two marks."""
    lines = [f"Of transformers {transformers_version()}:", *summary(types), ""]
    lines += ["| model type | branches | ONNX | what is missing |", "|---|---|---|---|"]
    for row in types:
        branches = " ".join(row.branches) if row.supported else "none"
        lines.append(f"| `{row.model_type}` | {branches} | {'yes' if row.export else '–'} | {row.reason or ''} |")
    return "\n".join(lines) + "\n"


def with_table(docs: str, types: list[Support]) -> str:
    changed, count = _MARKS.subn(lambda _: markdown(types), docs)
    assert count == 1, f"{DOCS} has no place for the table"
    return changed


def main() -> None:
    types = generate()
    rows = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in types)
    TABLE.write_text(f'{{"transformers": "{transformers.__version__}", "types": [\n{rows}\n]}}\n', encoding="utf-8")
    DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8"), supported_types()), encoding="utf-8")


if __name__ == "__main__":
    main()

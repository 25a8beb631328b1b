"""Write the folder that onnxruntime-genai loads: a graph with the interface that it needs, and its configuration.

The package starts with zeros as the state. A saved memory can still start a conversation, in two ways: as the default
of the graph's `initial` inputs, when the folder is written; or later in an adapter file of ONNX Runtime
(`.onnx_adapter`), which sets inputs that have a default, and which the package treats as the weights of a LoRA.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import onnx_ir
import onnxruntime
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.chat.text import ChatText
from deltamem_tool.chat.torch_engine import stop_tokens
from deltamem_tool.errors import ConfigError, ExportError, MemoryStateError
from deltamem_tool.io.atomic import write_atomically
from deltamem_tool.io.formats import CHAT_TEMPLATE_FILE
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.file import MemoryShape, check_memory
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.export.targets import Target
from deltamem_tool.onnx.manifest import Manifest

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def read_start(path: str | Path, adapter: DeltaMemAdapter, target: Target) -> MemoryState:
    """Read the memory file that a graph of `adapter` for `target` starts from.

    Raises:
        ConfigError: the graph takes the state as an input.
        MemoryStateError: the memory is missing or damaged, belongs to another adapter, or holds several conversations.
    """
    if not target.genai:
        raise ConfigError(
            f"A graph for {target.name} cannot contain a memory.",
            "It takes the state as an input.",
            "Leave the memory out, and pass it at run time.",
        )
    memory = MemoryState.load(path)
    _check_start(memory, adapter.memory_shape, adapter.fingerprint)
    return memory


def write_adapter_file(folder: str | Path, memory: str | Path, out: str | Path) -> None:
    """Write a memory file as an adapter file that starts conversations of a folder for onnxruntime-genai.

    Args:
        folder: a folder written by `deltamem export … --target genai`.
        memory: a memory file of the same adapter, with one conversation.
        out: the `.onnx_adapter` file, written whole or not at all.

    Raises:
        ExportError: `folder` is damaged, or is for another runtime.
        MemoryStateError: the memory is missing or damaged, or does not fit.
    """
    manifest = Manifest.read(contract.check_folder(folder))
    if not manifest.interface.genai:
        raise ExportError(
            f"{folder} needs no adapter file.", "Its graph takes the state as an input.", "Feed the memory's states."
        )
    start = MemoryState.load(memory)
    _check_start(start, MemoryShape(dict(manifest.interface.state_shapes)), manifest.adapter)
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(state) for name, state in _defaults(start).items()}
    )
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "memory"
        file.export_adapter(str(whole))
        write_atomically(out, whole.read_bytes())


def _check_start(memory: MemoryState, shape: MemoryShape, adapter: str) -> None:
    check_memory(memory.shape, memory.adapter, shape, adapter)
    if memory.batch_size != 1:
        raise MemoryStateError(
            "A memory to start from must hold one conversation.",
            f"This one holds {memory.batch_size} rows.",
            "Select one with `MemoryState.select`, and save it.",
        )


def _defaults(start: MemoryState) -> dict[str, NDArray[Any]]:
    """Return the states `[1, H, R, R]` by the names of the graph's inputs."""
    return {
        contract.carried_name(contract.INITIAL, i, contract.STATE): state.numpy() for i, state in start.layers.items()
    }


def _check_interface(interface: Interface) -> None:
    """Check that onnxruntime-genai can run a graph of this interface.

    Raises:
        ExportError: onnxruntime-genai cannot run it.
    """
    if interface.segment:
        raise ExportError(
            "onnxruntime-genai cannot run a memory that writes by messages or sentences.",
            "It does not tell the graph where a message or sentence ends.",
            "Export for another target, or use an adapter that writes every token.",
        )
    if any(layer.key != layer.value for layer in interface.layers):
        raise ExportError(
            "onnxruntime-genai cannot run this model.",
            "It needs one shape for a layer's keys and values, and those of this model differ.",
            "Export for another target.",
        )


def set_defaults(program: onnx_ir.Model, interface: Interface, start: MemoryState | None) -> None:
    """Give the graph's `initial` inputs the states of `start`, or zeros."""
    states = _defaults(start) if start is not None else {}
    inputs = {value.name: value for value in program.graph.inputs}
    for i, shape in interface.state_shapes.items():
        name = contract.carried_name(contract.INITIAL, i, contract.STATE)
        inputs[name].const_value = onnx_ir.tensor(states.get(name, np.zeros((1, *shape), np.float32)), name=name)
        program.graph.register_initializer(inputs[name])


def configuration(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, interface: Interface
) -> dict[str, dict[str, Any]]:
    """Return the content of `genai_config.json`.

    Raises:
        ExportError: onnxruntime-genai cannot run the graph, or the configs of the model lack the length of its context
            or the token that ends an answer.
    """
    _check_interface(interface)
    described = _model(model, tokenizer, interface)
    return {"model": described, "search": _search(model, interface) | {"max_length": described["context_length"]}}


def write_config(folder: Path, content: dict[str, dict[str, Any]]) -> None:
    """Write `genai_config.json`, and the chat template so that onnxruntime-genai renders what transformers renders."""
    template = folder / CHAT_TEMPLATE_FILE
    if template.is_file():
        template.write_text(with_explicit_whitespace(template.read_text(encoding="utf-8-sig")), encoding="utf-8")
    (folder / contract.GENAI_CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def with_explicit_whitespace(template: str) -> str:
    """Rewrite the text of `template` as string expressions, so that every engine renders the same whitespace.

    transformers strips line ends after blocks and indentation before them; onnxruntime-genai does not.
    """
    lexer = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    # The lexer has dropped the text that blocks strip before them; what they strip after them is in their token.
    pieces = []
    for _, kind, value in lexer.lex(template):
        if kind == "data":
            pieces.append(f"{{{{ {json.dumps(value, ensure_ascii=False)} }}}}")
        elif not kind.startswith(("comment", "raw")):
            pieces.append(value.rstrip() if kind in ("block_end", "variable_end") else value)
    return "".join(pieces)


def _model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, interface: Interface) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    heads, width = interface.layers[0].cache[contract.KEY]
    past, present = (
        {f"{side}_{part}_names": f"{prefix}.%d.{part}" for part in (contract.KEY, contract.VALUE)}
        for side, prefix in (("past", contract.PAST), ("present", contract.PRESENT))
    )
    return {
        "type": "decoder",
        "vocab_size": interface.vocab_size,
        "context_length": _context_length(interface),
        **_special_tokens(model, tokenizer, interface),
        "decoder": {
            "filename": contract.MODEL_FILE,
            # Otherwise every session logs, for every initial state, that it has a default.
            "session_options": {"log_severity_level": 3, "provider_options": []},
            "num_hidden_layers": len(interface.layers),
            "num_attention_heads": getattr(config, "num_attention_heads", heads),
            "num_key_value_heads": heads,
            "head_size": width,
            "hidden_size": config.hidden_size,
            "inputs": {name: name for name in (contract.INPUT_IDS, contract.ATTENTION_MASK)} | past,
            "outputs": {contract.LOGITS_OUTPUT: contract.LOGITS_OUTPUT} | present,
        },
    }


def _special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, interface: Interface) -> dict[str, Any]:
    """Return token ids by their names in the configuration. onnxruntime-genai uses 0 for a missing one."""
    token_ids: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        sources = (model.generation_config, model.config.get_text_config(decoder=True), tokenizer)
        ids = (getattr(source, name, None) for source in sources)
        token_ids[name] = next((value for value in ids if value is not None), None)
    end = token_ids["eos_token_id"]
    ends = [] if end is None else [end] if isinstance(end, int) else [*end]
    ends += sorted(stop_tokens(model, ChatText.from_tokenizer(tokenizer)).difference(ends))
    if not ends:
        raise ExportError(
            "The model's configs do not name the token that ends an answer.",
            "onnxruntime-genai would use token 0 instead.",
            "Set eos_token_id in the base model's generation_config.json.",
        )
    token_ids["eos_token_id"] = ends
    if token_ids["pad_token_id"] is None or token_ids["pad_token_id"] >= interface.vocab_size:
        token_ids["pad_token_id"] = token_ids["eos_token_id"][0]
    return {name: value for name, value in token_ids.items() if value is not None}


def _context_length(interface: Interface) -> int:
    if not interface.positions:
        raise ExportError(
            "The model's config does not have the length of its context.",
            "onnxruntime-genai needs this length.",
            "Set max_position_embeddings in the base model's config.json.",
        )
    return interface.positions


def _search(model: PreTrainedModel, interface: Interface) -> dict[str, Any]:
    """Return the search options: the model's own sampling, with one beam, because states do not follow their beams.

    Packed keys and values are written into one buffer of `max_length` columns, which onnxruntime-genai allocates.
    """
    wanted = {name: getattr(model.generation_config, name, None) for name in _SAMPLING}
    settings = {name: value for name, value in wanted.items() if value is not None}
    return {"do_sample": False, **settings, "num_beams": 1, "past_present_share_buffer": interface.packed}

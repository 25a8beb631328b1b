"""Which model types the ONNX export is known to work for, and what happened with the others.

Written down from `benchmarks/export_sweep.py`, whose last table is in benchmarks/results. Types that are in neither
take no memory (`deltamem_tool.layouts`) or have not been tried; none is refused for not being here.
"""

from __future__ import annotations

EXPORTED = frozenset(
    """
    apertus arcee aria_text axk1 bart beam bert bert-generation bigbird_pegasus biogpt bitnet blenderbot
    blenderbot-small bloom camembert codegen cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm data2vec-text
    deepseek_v2 deepseek_v3 diffllama dots1 electra emu3 ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon
    flex_olmo gemma gemma2 gemma3_text gemma3n_text glm4 gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite llama marian
    mbart mistral mixtral mpt olmo olmo2 opt phi phi3 qwen2 qwen3 qwen3_moe roberta smollm3 stablelm starcoder2
    whisper
    """.split()
)

_STATES = "its layers keep recurrent or convolutional states, which the graph does not carry"
_INDEXER = "its layers keep the keys of an indexer, which the graph does not carry"

# Why not, or the first line of what PyTorch's exporter said.
NOT_EXPORTED = {
    "afmoe": "Logits or states differ by 3; 0.001 is allowed",
    "axk2": _INDEXER,
    "bailing_hybrid": _STATES,
    "bamba": _STATES,
    "big_bird": "UserError: Constraints violated (tokens)",
    "dbrx": "GuardOnDataDependentSymNode: Could not guard on data-dependent expression Eq(u0, 0) …",
    "deepseek_v32": _INDEXER,
    "deepseek_v4": "Beside keys and values its layers keep DeepseekV4CSACache, which the graph does not carry",
    "doge": "UserError: Constraints violated (past, tokens)",
    "dots3_note": _INDEXER,
    "dots3_note_text": _INDEXER,
    "falcon_h1": _STATES,
    "gpt_neo": "UserError: Constraints violated (past, tokens)",
    "jamba": _STATES,
    "kimi_linear": _STATES,
    "lfm2": _STATES,
    "llama4_text": "DispatchError: No ONNX function found for <OpOverload(op='aten.unsqueeze' …",
    "nemotron_h": _STATES,
    "qwen3_next": _STATES,
    "xglm": "UserError: Constraints violated (past, tokens)",
    "zamba2": _STATES,
}

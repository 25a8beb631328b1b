"""Model types whose ONNX graph agrees with PyTorch, as the last table of `benchmarks/export_sweep.py` in
benchmarks/results says, which has the reasons of the others."""

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

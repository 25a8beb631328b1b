"""A config of a few megabytes at most for every model type that AutoModelForCausalLM knows.

One shrinker serves them all: it starts from the config that a type has by default and makes every field small whose
name it knows, in the sub-configs as well. What a type needs beyond that is a row of OWN.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

LAYERS = 4  # a hybrid with two kinds of layer, twice
HIDDEN = 32
HEADS = 4
HEAD = 8
VOCABULARY = 99
POSITIONS = 128
WINDOW = 8
PAD, END, START = 0, 1, 2

# Ids of markers that a text must not contain are at the end of the vocabulary: ids below this one are text.
TEXT_IDS = range(3, 80)


def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# The value of a field, by its name, in every config that has it.
SMALL: dict[str, Any] = {
    **_each("num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks", LAYERS),
    # also that of the decoder, which a cache takes as the number of layers
    **_each("encoder_layers num_encoder_layers", LAYERS),
    **_each("depth conf_num_hidden_layers", 2),
    **_each("hidden_size n_embd d_model emb_dim embedding_dim embedding_size word_embed_proj_dim", HIDDEN),
    **_each("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", HEADS),
    **_each("num_decoder_attention_heads num_encoder_attention_heads attention_heads conf_num_attention_heads", HEADS),
    **_each("swa_num_attention_heads", HEADS),
    **_each("num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads", HEADS // 2),
    **_each("head_dim swa_head_dim d_head d_kv kv_channels dim_head attention_head_size global_head_dim", HEAD),
    **_each("intermediate_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size", 48),
    **_each("decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size d_ff d_inner dff dim_ff feed_forward_size", 48),
    **_each("intermediate_size_mlp shared_experts_intermediate_size moe_shared_expert_intermediate_size", 48),
    **_each("dense_intermediate_size expert_ffn_hidden_size mlp_dim", 48),
    **_each(
        "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size", VOCABULARY
    ),
    **_each("max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length", POSITIONS),
    **_each("max_target_positions max_source_positions", POSITIONS),
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_each("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k", 2),
    **_each("n_shared_experts num_shared_experts moe_num_shared_experts n_group num_expert_group topk_group", 1),
    **_each("num_dense_layers first_k_dense_replace", 1),
    # low-rank projections of queries, keys and values
    **_each("q_lora_rank kv_lora_rank o_lora_rank", 16),
    **_each("qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim", HEAD),
    **_each("qk_head_dim", 2 * HEAD),
    **_each("index_head_dim index_n_heads index_topk", HEAD),
    # windows, chunks and blocks shorter than a prompt of a test
    **_each("sliding_window sliding_window_size attention_window_size window_size local_attention", WINDOW),
    **_each("attention_chunk_size local_attention_window_len", WINDOW),
    # recurrences and convolutions
    **_each("mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_heads n_mamba_heads", HEADS),
    **_each("linear_num_key_heads mamba_n_groups n_groups mamba_ngroups", 2),
    **_each("linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim", HEAD),
    **_each("mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank", HEAD),
    **_each("chunk_size mamba_chunk_size", WINDOW),
    # widths and tables of towers and of side branches
    **_each("out_hidden_size projector_input_dim projector_output_dim vision_output_dim hidden_size_global", HIDDEN),
    **_each("adapter_in_dim adapter_out_dim adapter_input_size downsample_hidden_size input_embedding_size", HIDDEN),
    **_each("output_embedding_size output_channels pronunciation_embed_dim shape_embed_dim", HIDDEN),
    **_each("shape_vocab_size pronunciation_vocab_size", VOCABULARY),
    **_each("image_size crop_size", 32),
    **_each("hidden_size_per_layer_input laurel_rank router_hidden_size hc_lowrank zero_expert_num", HEAD),
    **_each("mamba_d_ssm", 2 * HIDDEN),
    **_each("nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel", HIDDEN),
    # with 0.02, the logits of so small a model would be almost equal
    **_each("initializer_range init_std", 0.2),
}
SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
DEEPSEEK_V4 = ["sliding", "compressed_sparse", "heavily_compressed", "compressed_sparse"]
# Parts of half a head's width: time, height, width.
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
DROPOUT = ("dropout", "pdrop", "layerdrop", "drop_rate")

# What some types need in addition, in their own config or as a part of another one. A dotted name is a field of a
# sub-config. A row without a comment enables kinds of layer that published models have and the default lacks.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": VOCABULARY,
        "num_hidden_layers": LAYERS,  # not one of its fields, but its cache needs it
    },
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,  # no positions there
        },
    },
    "dbrx": {
        "attn_config.rope_theta": 10000.0,  # not one of its fields, but its attention needs it
        "attn_config.clip_qkv": 8,  # None by default, to which it cannot clip
    },
    "deepseek_v2": {"num_experts_per_tok": 2},  # None by default
    "deepseek_v4": {
        "layer_types": [f"{kind}_attention" for kind in DEEPSEEK_V4],
        "num_key_value_heads": 1,  # the only number that it supports
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "hc_sinkhorn_iters": 2,  # sequential in the graph
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "layer_types": SLIDING},
    "dots3_note": {
        "audio_config.feature_size": 16,
        "vision_config.pyramid_num_routed": [-1, 2],  # experts of each layer; more than one layer by default
    },
    "dots3_note_text": {
        "head_dim": 2 * HEAD,
        # the sliding layers have sizes of their own
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 3 * HEAD,
        "swa_qk_nope_head_dim": 2 * HEAD,
        "swa_v_head_dim": HEAD,
    },
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 2 * HEAD},
    "gemma4_unified_text": {"attention_k_eq_v": True, "global_head_dim": 2 * HEAD, "num_global_key_value_heads": 1},
    "glm4v_text": {"rope_parameters": {**MROPE, "mrope_section": [0, 1, 1], "partial_rotary_factor": 0.5}},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},  # otherwise the logits are almost equal
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    # otherwise two towers of a hundred million weights
    "janus_vision_model": {"projection_dim": HIDDEN},
    "janus_vqgan": {
        **_each("base_channels latent_channels projection_dim image_token_embed_dim", HIDDEN),
        "num_embeddings": VOCABULARY,
    },
    "laguna": {"layer_types": SLIDING, "num_attention_heads_per_layer": [2, HEADS] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},  # the heads together are twice as wide as the hidden size
    "mellum": {"layer_types": SLIDING},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_n_heads": 2,  # one for every head of keys
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"layer_types": SLIDING},
    "nemotron": {"num_key_value_heads": HEADS // 2},  # None by default, which its attention does not accept
    "nemotron_h": {
        "time_step_min": 1e-8,  # the scan respects it, the single step does not: they would differ
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp", "full_attention"],
        "num_hidden_layers": 5,
    },
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen2_vl_vision": {"embed_dim": HIDDEN},  # its width, 1280; the hidden size is that of its output
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen4_exp_text": {
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": VOCABULARY,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},  # one attention layer in four by default
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [8, 24],
        "hash_seed": 0,  # otherwise every call draws a new random hash
        "num_buckets": 2,
    },
    "xlm": {"causal": True},  # bidirectional otherwise
    "xlnet": {"attn_type": "uni"},  # the same
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # rounds the widths of its heads up to a multiple of 64
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"time_step_min": 1e-8},  # as in nemotron_h
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "sliding_window": WINDOW},
}
for _type in (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
).split():
    OWN.setdefault(_type, {})["is_decoder"] = True  # otherwise they attend in both directions


# Types of the mapping that cannot be built as a language model from a config alone.
UNBUILT = {
    "gemma3n": "its vision tower is timm's, which need not be installed (gemma3n_text is its decoder)",
    "gemma4_assistant": "all its layers read the keys of another model, which their config refuses",
    "gemma4_unified_assistant": "the same",
    "musicgen": "its decoder takes the decoder's config, but the mapping hands it the whole one",
    "musicgen_melody": "the same",
}


def tiny_config(model_type: str) -> PretrainedConfig:
    return _shrunk(CONFIG_MAPPING[model_type]())


# Of these, fields of other names say which layers have attention, or more than one, or see pictures.
UNLIKE = {"bamba", "jamba", "longcat_flash", "mllama"}
_DEPTHS = "num_hidden_layers decoder_layers num_decoder_layers encoder_layers num_encoder_layers".split()


def with_depth(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """The config with only the first `depth` layers of its decoder, unless the last ones read the keys of others."""
    text = _decoder(config)
    if not getattr(text, "num_kv_shared_layers", 0):
        for name in _by_layer(text):
            setattr(text, name, getattr(text, name)[:depth])
        for name in _DEPTHS:
            if hasattr(text, name):
                setattr(text, name, depth)
    return config


def layers_are_alike(config: PretrainedConfig) -> bool:
    """Whether all layers of the decoder are configured alike."""
    alike = all(value == value[:1] * LAYERS for value in _by_layer(_decoder(config)).values())
    return alike and config.model_type not in UNLIKE


def _decoder(config: PretrainedConfig) -> PretrainedConfig:
    """The decoder's part of the config; for an encoder with a decoder, transformers returns a copy."""
    text = config.get_text_config(decoder=True)
    return text if any(text is part for part in vars(config).values()) else config


def _by_layer(text: PretrainedConfig) -> dict[str, list[Any]]:
    return {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == LAYERS}


def _shrunk(config: PretrainedConfig, own: dict[str, Any] | None = None) -> PretrainedConfig:
    """A new config of the same class, so that its derived fields follow from the small ones."""
    own = {**OWN.get(config.model_type, {}), **(own or {})}
    names = {field.name for field in fields(config)}
    markers = iter(range(VOCABULARY - 1, TEXT_IDS.stop - 1, -1))
    changes: dict[str, Any] = {}
    for name in sorted(names):
        # not getattr, which raises for a field that has a value per layer in a heterogeneous model
        value = vars(config).get(config.attribute_map.get(name, name))
        if isinstance(value, PretrainedConfig):
            inner = {key.partition(".")[2]: own.pop(key) for key in list(own) if key.startswith(f"{name}.")}
            changes[name] = _shrunk(value, inner)
        elif name in SMALL and value is not None:
            changes[name] = [SMALL[name]] * LAYERS if isinstance(value, list) else SMALL[name]
        elif name in ("layer_types", "layers_block_type") and value:
            changes[name] = _rounds(value)
        elif name == "mlp_layer_types" and value:
            kinds = list(dict.fromkeys(value))
            changes[name] = kinds + kinds[-1:] * (LAYERS - len(kinds))
        elif any(part in name for part in DROPOUT) and isinstance(value, float):
            changes[name] = 0.0
        elif name.endswith(("_token_id", "_token_index")) and value is not None:
            changes[name] = next(markers)
    if "head_dim" in names:
        changes["head_dim"] = HEAD  # not every model that accepts None derives it
    if "kv_lora_rank" in names:
        changes["num_key_value_heads"] = HEADS  # every head gets its own keys from the latent vector
    changes.update(pad_token_id=PAD, eos_token_id=END, bos_token_id=START)
    if "decoder_start_token_id" in names:
        changes["decoder_start_token_id"] = START
    return type(config)(**{**changes, **own})


def _rounds(kinds: Iterable[str]) -> list[str]:
    """All kinds of layers of a hybrid in the order in which they first appear, repeated."""
    kinds = list(dict.fromkeys(kinds))
    return (kinds * LAYERS)[: max(LAYERS, len(kinds))]

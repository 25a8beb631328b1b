"""Translate the 49 config fields of the reference implementation (declare-lab/delta-Mem) to our options, and back."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deltamem_tool.config import DeltaMemConfig, broken_rules
from deltamem_tool.errors import AdapterError, problems_of

REFERENCE_CONFIG = "delta_mem_config.json"
_READER = TypeAdapter(DeltaMemConfig)

# The defaults of all fields of the reference, in its order.
DEFAULTS: dict[str, Any] = {
    "rank": 8,
    "alpha": 16.0,
    "beta_bias_init": -1.5,
    "normalize_qk": True,
    "couple_lambda": True,
    "state_update_mode": "standard",
    "rankwise_gates": True,
    "output_init": "zero",
    "base_slice_ref_width": 8,
    "online_gain": 0.05,
    "num_state_heads": 1,
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "memory_partition_routing": "soft",
    "memory_partition_basis": "shared",
    "tie_memory_partition_read_write": False,
    "memory_partition_read_mode": "softmax",
    "memory_partition_sigmoid_gate_bias_init": -2.0,
    "slot_read_top_k": 0,
    "global_memory_mode": "shared_rw",
    "global_memory_read_top_k": 0,
    "global_memory_merge_mode": "gated_residual",
    "global_memory_gate_bias_init": -2.0,
    "global_memory_read_logit_bias": 0.0,
    "memory_reader_layers": [],
    "memory_reader_hidden_size": 1024,
    "memory_reader_residual_scale": 0.1,
    "memory_reader_read_only": True,
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "memory_write_granularity": "token",
    "memory_write_proposals_per_message": 2,
    "synthetic_memory_slots": 1,
    "latent_memory_layers": [],
    "latent_memory_hidden_size": 1024,
    "latent_memory_residual_scale": 0.1,
    "latent_memory_slots": 4,
    "latent_memory_init_std": 0.002,
    "latent_gate_init": 0.01,
    "target_modules": ["self_attn"],
    "target_layers": [],
    "delta_heads": ["q", "k", "v", "o"],
    "delta_o_rmsnorm": False,
    "delta_o_rmsnorm_eps": 1e-6,
    "trainable_delta_scale": False,
    "delta_scale_init": 1.0,
    "delta_scale_max": 2.0,
    "delta_scale_granularity": "layer",
    "delta_scale_parameterization": "alpha_over_rank",
}
_REQUIRED = ("rank", "delta_heads")

# The reference's field for each of our options. The few with other spellings of their values are below.
_FIELDS = {
    "rank": "rank",
    "state_heads": "num_state_heads",
    "branches": "delta_heads",
    "alpha": "alpha",
    "layers": "target_layers",
    "granularity": "memory_write_granularity",
    "update_rule": "state_update_mode",
    "couple_lambda": "couple_lambda",
    "gates": "rankwise_gates",
    "beta_bias": "beta_bias_init",
    "delta_init": "output_init",
    "delta_scale": "trainable_delta_scale",
    "delta_scale_init": "delta_scale_init",
    "delta_scale_max": "delta_scale_max",
    "o_norm": "delta_o_rmsnorm",
    "o_norm_eps": "delta_o_rmsnorm_eps",
}
_VALUES: dict[str, dict[Any, str]] = {
    "memory_write_granularity": {"token": "token", "message_mean": "message", "sentence_mean": "sentence"},
    "rankwise_gates": {True: "row", False: "head"},
    # If two values mean the same to us, we write the first. They differ only in a fresh Δ.
    "output_init": {"zero": "zero", "random": "random", "base_slice_fixed": "base_slice", "base_slice": "base_slice"},
}
_SCALES = {"layer": "layer", "head": "branch"}  # delta_scale_granularity, if trainable_delta_scale is on
_OF_A_FRESH_DELTA = ("base_slice_ref_width", "online_gain")  # any number: they have no effect on a saved Δ
_ARCHIVED = DEFAULTS.keys() - {*_FIELDS.values(), *_OF_A_FRESH_DELTA, "delta_scale_granularity"}


def mechanism_of(fields: Mapping[str, Any], file: Path) -> DeltaMemConfig:
    """Return our options for the `fields` of the reference's config `file`. Missing fields have its defaults.

    Raises:
        AdapterError: a field is unknown, missing or has a value without a counterpart here; it is named.
    """
    problems = [f"{name} is missing" for name in _REQUIRED if name not in fields]
    for name in fields.keys() - DEFAULTS.keys():
        near = difflib.get_close_matches(name, DEFAULTS, n=1)
        problems.append(f"{name!r} is not known" + (f" (did you mean {near[0]!r}?)" if near else ""))
    full = {**DEFAULTS, **fields}
    for name in _ARCHIVED:
        if not _same(full[name], DEFAULTS[name]):
            problems.append(f"{name} is {full[name]!r}, and only {DEFAULTS[name]!r} is supported")
    for name, values in (*_VALUES.items(), ("delta_scale_granularity", _SCALES)):
        if not any(_same(full[name], value) for value in values):
            problems.append(f"{name} is {full[name]!r}, not one of {', '.join(map(repr, values))}")
    for name in ("target_layers", "delta_heads"):
        if not isinstance(full[name], list):
            problems.append(f"{name} is {full[name]!r}, not a list")
    for name in _OF_A_FRESH_DELTA:
        if type(full[name]) not in (int, float) or not abs(full[name]) < math.inf:
            problems.append(f"{name} is {full[name]!r}, not a number")
    if type(full["trainable_delta_scale"]) is not bool:
        problems.append(f"trainable_delta_scale is {full['trainable_delta_scale']!r}, not true or false")
    config = None
    if not problems:
        options = {ours: full[theirs] for ours, theirs in _FIELDS.items()}
        options |= {ours: _VALUES[theirs][full[theirs]] for ours, theirs in _FIELDS.items() if theirs in _VALUES}
        options["layers"] = full["target_layers"] or "all"
        options["delta_scale"] = _SCALES[full["delta_scale_granularity"]] if full["trainable_delta_scale"] else "fixed"
        try:
            config = _READER.validate_python(options)
        except ValidationError as error:
            problems += [problem.why for problem in problems_of(error, {}, names=_FIELDS)]
        else:
            problems += broken_rules(config, _FIELDS)
    if problems or config is None:
        raise AdapterError(
            f"{file} describes a mechanism that deltamem does not have.",
            f"Differences: {'; '.join(sorted(problems))}.",
            "Nothing was converted. Use an adapter of declare-lab/delta-Mem with token, message or sentence writes.",
        )
    return config


def config_of(config: DeltaMemConfig, layers: Sequence[int], original: Mapping[str, Any] = DEFAULTS) -> dict[str, Any]:
    """Return the reference's config for our options.

    Args:
        config: our options.
        layers: indices of the layers that have a memory.
        original: config that `mechanism_of` accepts. Its fields and their order are kept, and values that differ
            from `config` are changed.
    """
    fields = dict(original)
    was, now = mechanism_of(original, Path(REFERENCE_CONFIG)), config
    for ours, theirs in _FIELDS.items():
        value = getattr(now, ours)
        if value == getattr(was, ours):
            continue
        if ours == "layers":
            fields[theirs] = [] if value == "all" else list(layers) if isinstance(value, str) else list(value)
        elif ours == "delta_scale":
            fields[theirs] = value != "fixed"
            if value != "fixed":
                fields["delta_scale_granularity"] = next(name for name, known in _SCALES.items() if known == value)
        elif theirs in _VALUES:
            fields[theirs] = next(name for name, known in _VALUES[theirs].items() if known == value)
        else:
            fields[theirs] = list(value) if isinstance(value, tuple) else value
    return fields


def _same(value: object, legal: object) -> bool:
    """Return whether two values are equal, where true is not 1 but -2 is -2.0."""
    return isinstance(value, bool) == isinstance(legal, bool) and value == legal

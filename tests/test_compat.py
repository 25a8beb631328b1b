"""Names that `_compat` borrows from other libraries: they exist and behave as we need."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import nullcontext

import numpy
import onnx_ir
import pytest
import torch
from torch import nn

from deltamem_tool import _compat
from deltamem_tool._compat import BORROWED

# The checks of each name


def _counts_as_a_loop() -> bool:
    total, sums = _compat.scan(lambda carry, x: (carry + x, carry + x), torch.zeros(2), torch.ones(3, 2))
    return torch.equal(total, torch.full((2,), 3.0)) and torch.equal(sums[:, 0], torch.tensor([1.0, 2.0, 3.0]))


def _has_no_numbers() -> bool:
    with _compat.FakeTensorMode():
        tensor = torch.zeros(2, 3) @ torch.zeros(3, 4)
    return isinstance(tensor, _compat.FakeTensor) and tensor.shape == (2, 4)


def _sees_operations() -> bool:
    seen = []

    class Mode(_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.zeros(2).add(1)
    return len(seen) >= 2


def _grows(layer) -> bool:
    for _ in range(2):
        keys, values = layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    return keys.shape == values.shape == layer.keys.shape == (1, 2, 6, 4)


def _is_a_layer_class(name: str) -> bool:
    from transformers import DynamicCache

    return isinstance(getattr(_compat, name), type) and getattr(_compat, name).__module__ == DynamicCache.__module__


def _renames() -> bool:
    renamed, converted = _compat.rename_source_key("model.norm.weight", [], [], "model", {"model.norm.weight": None})
    return renamed == "model.norm.weight" and converted is None


def _moves_rows_back() -> bool:
    """Whether four rows of a head, neighbours in the file, become the halves that the model's rotary positions need."""
    process = _compat.TENSOR_PROCESSORS["llama"](config={"num_attention_heads": 1, "num_key_value_heads": 1}).process
    weights = numpy.arange(4.0).reshape(4, 1)
    names = ("blk.0.attn_q.weight", "blk.0.attn_v.weight")
    rows = [process(weights=weights, name=name).weights[:, 0].tolist() for name in names]
    return rows == [[0, 2, 1, 3], [0, 1, 2, 3]]


def _blob_digest() -> bool:  # of an empty blob in git
    return _compat.git_hash(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def _file_digest() -> bool:
    return _compat.sha_fileobj(io.BytesIO(b"")).hex().startswith("e3b0c44298fc1c14")


def _by_length() -> bool:
    return sorted(_compat.get_length_grouped_indices([5, 1, 4, 2], 2)) == [0, 1, 2, 3]


def _qwen3_is_listed(name: str, model_type: str) -> bool:
    return model_type in getattr(_compat, name)


def _exports() -> bool:
    return callable(_compat.OnnxExporter().export) and callable(_compat.OnnxExporter.save_program)


def _fuses() -> bool:
    text = """<ir_version: 10, opset_import: ["": 20]>
        g (float[B,2] x, float[3,2] w) => (float[B,3] y) { t = Transpose <perm=[1,0]> (w) y = MatMul(x, t) }"""
    model = onnx_ir.from_onnx_text(text)
    _compat.fuse_for_onnxruntime(model, "cpu")
    return [node.op_type for node in model.graph] == ["FusedMatMul"]


def _keeps_both(name: str, keys: str) -> bool:
    parts = (_compat.LinearAttentionLayer, getattr(_compat, keys))
    return all(issubclass(getattr(_compat, name), part) for part in parts)


FACTS: dict[str, Callable[[], bool]] = {
    "scan": _counts_as_a_loop,
    "FakeTensor": _has_no_numbers,
    "FakeTensorMode": _has_no_numbers,
    "TorchDispatchMode": _sees_operations,
    "tree_leaves": lambda: _compat.tree_leaves({"a": [1, (2,)]}) == [1, 2],
    "tree_map_only": lambda: _compat.tree_map_only(int, lambda n: n + 1, {"a": [1, "b"]}) == {"a": [2, "b"]},
    "DummyLayer": lambda: _is_a_layer_class("DummyLayer"),
    "DynamicIndexedLayer": lambda: issubclass(_compat.DynamicIndexedLayer, _compat.DynamicLayer),
    "DynamicLayer": lambda: _grows(_compat.DynamicLayer()),
    "DynamicSlidingWindowLayer": lambda: issubclass(_compat.DynamicSlidingWindowLayer, _compat.DynamicLayer),
    "LinearAttentionAndFullAttentionLayer": lambda: _keeps_both("LinearAttentionAndFullAttentionLayer", "DynamicLayer"),
    "LinearAttentionAndSlidingWindowAttentionLayer": lambda: _keeps_both(
        "LinearAttentionAndSlidingWindowAttentionLayer", "DynamicSlidingWindowLayer"
    ),
    "LinearAttentionLayer": lambda: issubclass(_compat.LinearAttentionLayer, _compat.LinearAttentionCacheLayerMixin),
    "LinearAttentionCacheLayerMixin": lambda: _is_a_layer_class("LinearAttentionCacheLayerMixin"),
    "StaticLayer": lambda: _compat.StaticLayer(max_cache_len=5).max_cache_len == 5,
    "TENSOR_PROCESSORS": _moves_rows_back,
    "GenerationMode": lambda: _compat.GenerationMode.ASSISTED_GENERATION in _compat.GenerationMode,
    "ACT2FN": lambda: torch.equal(_compat.ACT2FN["silu"](torch.ones(1)), nn.functional.silu(torch.ones(1))),
    "GradientCheckpointingLayer": lambda: issubclass(_compat.GradientCheckpointingLayer, nn.Module),
    "get_model_conversion_mapping": lambda: callable(_compat.get_model_conversion_mapping),
    "WeightConverter": lambda: not issubclass(_compat.WeightConverter, _compat.WeightRenaming),
    "WeightRenaming": lambda: not issubclass(_compat.WeightRenaming, _compat.WeightConverter),
    "rename_source_key": _renames,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": lambda: _qwen3_is_listed("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "qwen3"),
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": lambda: _qwen3_is_listed(
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "qwen2_vl"
    ),
    "Conv1D": lambda: _compat.Conv1D(6, 2).weight.shape == (2, 6),  # [in, out]
    "TRAINER_STATE_NAME": lambda: _compat.TRAINER_STATE_NAME == "trainer_state.json",
    "PREFIX_CHECKPOINT_DIR": lambda: _compat.PREFIX_CHECKPOINT_DIR == "checkpoint",
    "SAFE_WEIGHTS_NAME": lambda: _compat.SAFE_WEIGHTS_NAME == "model.safetensors",
    "PrinterCallback": lambda: hasattr(_compat.PrinterCallback, "on_log"),
    "get_length_grouped_indices": _by_length,
    "OptimizerNames": lambda: "adamw_torch" in [name.value for name in _compat.OptimizerNames],
    "INTEGRATION_TO_CALLBACK": lambda: "tensorboard" in _compat.INTEGRATION_TO_CALLBACK,
    "OnnxConfig": lambda: _compat.OnnxConfig(opset_version=20).opset_version == 20,
    "OnnxExporter": _exports,
    "fuse_for_onnxruntime": _fuses,
    "NotImplemented": lambda: issubclass(_compat.NotImplemented, Exception),
    "RepoFile": lambda: isinstance(_compat.RepoFile, type),
    "git_hash": _blob_digest,
    "sha_fileobj": _file_digest,
    "REGEX_COMMIT_OID": lambda: bool(_compat.REGEX_COMMIT_OID.fullmatch("0" * 40)),
    "HTTPError": lambda: issubclass(_compat.TimeoutException, _compat.HTTPError),
    "TimeoutException": lambda: issubclass(_compat.TimeoutException, Exception),
}


def test_every_borrowed_name_has_a_check():
    assert FACTS.keys() == BORROWED.keys()


@pytest.mark.parametrize("name", BORROWED)
def test_a_borrowed_name_behaves_as_needed(name):
    assert FACTS[name]()
    assert BORROWED[name].why and BORROWED[name].until


def test_unknown_names_raise():
    with pytest.raises(AttributeError, match="no attribute 'Cache'"):
        _compat.Cache  # noqa: B018


# The functions


def test_attention_implementation():
    from helpers.tiny import tiny_model

    assert _compat.attention_implementation(tiny_model(attention="eager").config) == "eager"


def test_commit_of_config():
    from helpers.tiny import tiny_config

    config = tiny_config()
    assert _compat.commit_of_config(config) is None
    config._commit_hash = "0" * 40  # as `from_pretrained` sets it
    assert _compat.commit_of_config(config) == "0" * 40


def test_generate_collects_stopping_criteria_after_creating_the_cache():
    from helpers.tiny import tiny_model

    model, calls = tiny_model(), []
    for name in (_compat.PREPARE_CACHE, _compat.STOPPING_CRITERIA):
        own = getattr(model, name)

        def call(generation_config, *args, _own=own, _name=name, **kwargs):
            calls.append((_name, generation_config))
            return _own(generation_config, *args, **kwargs)

        setattr(model, name, call)
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=1, eos_token_id=[7, 8])
    (first, config), (second, same) = calls
    assert (first, second) == (_compat.PREPARE_CACHE, _compat.STOPPING_CRITERIA) and config is same
    assert config is not model.generation_config  # or a cache would be stored in it


def test_one_gpu(tmp_path):
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = 3  # as on a machine with three of them
    assert arguments.n_gpu == 3
    _compat.use_one_gpu(arguments)
    assert arguments.n_gpu == 1


def test_changes_of():
    tensor = torch.zeros(2)
    counts = [_compat.changes_of([tensor])]
    assert _compat.changes_of([tensor]) == counts[0]
    tensor.add_(1)
    counts.append(_compat.changes_of([tensor]))
    tensor.data = torch.zeros(2)
    counts.append(_compat.changes_of([tensor]))
    assert len(set(map(str, counts))) == 3
    with torch.inference_mode():
        assert _compat.changes_of([tensor, torch.zeros(2)]) is None


def test_child_of():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert _compat.child_of(module, "0") is module[0] and _compat.child_of(module, "1") is None


def test_drop_hooks():
    from functools import partial

    module = torch.nn.Linear(2, 2)
    hooks = [partial(print, 1), partial(repr, 1), print]
    for hook in hooks:
        module.register_forward_hook(hook)
        module.register_forward_pre_hook(hook)
    _compat.drop_hooks(module, (print,))
    assert list(module._forward_hooks.values()) == list(module._forward_pre_hooks.values()) == hooks[1:]


def test_parameters_of():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))
    assert _compat.parameters_of([module]) == []
    assert _compat.parameters_of(module) == list(module.parameters())
    assert [type(parameter) for parameter in _compat.parameters_of(module)] == [torch.nn.Parameter] * 3


def test_without_packing_search():
    from transformers import masking_utils

    own = masking_utils.find_packed_sequence_indices
    with _compat.without_packing_search():
        assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0]])) is None
    assert masking_utils.find_packed_sequence_indices is own
    assert own(torch.tensor([[0, 1, 0]])) is not None


def test_without_stack_traces():
    from torch.fx import config

    with _compat.without_stack_traces():
        assert getattr(config, "do_not_emit_stack_traces", True)
    assert not getattr(config, "do_not_emit_stack_traces", False)


def test_amended_rewrites_keep_small_constants():
    import onnx
    import onnx_ir
    import onnxscript.optimizer

    graph = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float[2] x) => (float[2] y) { e = Constant<value_float = 1e-9>() z = Constant<value_float = 0.0>()
                                         a = Add(x, e) y = Add(a, z) }"""
    )
    sums = {}
    for name, context in (("kept", _compat.amended_rewrites()), ("dropped", nullcontext())):
        model = onnx_ir.serde.deserialize_model(graph)
        with context:
            onnxscript.optimizer.optimize(model)
        sums[name] = [node.op_type for node in model.graph].count("Add")
    assert sums == {"kept": 1, "dropped": 0}


def test_amended_rewrites_do_not_look_at_all_nodes_from_each(monkeypatch):
    import onnxscript.optimizer

    nodes, looks = 100, 0
    own = onnx_ir.Node.op_identifier

    def counted(node):
        nonlocal looks
        looks += 1
        return own(node)

    monkeypatch.setattr(onnx_ir.Node, "op_identifier", counted)
    found, chain = [], " ".join(f"x{i + 1} = Sin(x{i})" for i in range(nodes))
    for context in (_compat.amended_rewrites(), nullcontext()):
        text = f'<ir_version: 10, opset_import: ["": 20]> g (float[2] x0) => (float[2] x{nodes}) {{ {chain} }}'
        model, looks = onnx_ir.from_onnx_text(text), 0
        with context:
            onnxscript.optimizer.optimize(model)
        found.append(looks)
    assert found[0] < nodes**2 <= found[1]


def test_quiet_exporters(capsys, caplog):
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    with _compat.quiet_exporters():
        print("[torch.onnx] Run decompositions")
        warnings.warn("experimental", UserWarning, stacklevel=1)
        logging.getLogger("torch.onnx").warning("untested version")
    assert capsys.readouterr().out == "" and not caplog.records
    assert transformers_logging.get_verbosity() == before


def test_peft_model(recwarn):
    import peft
    from helpers.tiny import tiny_model

    model = _compat.peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    assert isinstance(model, peft.PeftModel)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_without_compilation():
    import torch
    from helpers.tiny import tiny_model

    model = tiny_model()
    compiled = torch.compile(model)
    assert type(compiled) is not type(model)
    assert _compat.without_compilation(compiled) is model is _compat.without_compilation(model)
    assert _compat.without_compilation(None) is None


def test_nothing_heavy_is_imported():
    import subprocess

    code = "import sys, deltamem_tool._compat; print(*{'torch', 'transformers', 'onnxruntime'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_the_names_of_methods_are_right():
    from transformers import GenerationMixin, Trainer

    assert callable(getattr(GenerationMixin, _compat.PREPARE_CACHE))
    assert callable(getattr(GenerationMixin, _compat.STOPPING_CRITERIA))
    assert callable(getattr(Trainer, _compat.TRAIN_SAMPLER))


def test_use_attention():
    from helpers.tiny import tiny_model

    model = tiny_model(attention="eager")
    with _compat.use_attention(model, "another"):
        assert _compat.attention_implementation(model.config) == "another"
    assert _compat.attention_implementation(model.config) == "eager"


def test_accelerate_hooks():
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    module, first, second = torch.nn.Linear(2, 2), AlignDevicesHook("cpu"), ModelHook()
    assert _compat.accelerate_hooks(module) == []
    add_hook_to_module(module, first)
    assert _compat.accelerate_hooks(module) == [first]
    add_hook_to_module(module, second, append=True)
    assert _compat.accelerate_hooks(module) == [first, second]


def test_hooks_of():
    module, before, after = torch.nn.Linear(2, 2), lambda *args: None, lambda *args: None
    module.register_forward_hook(after)
    module.register_forward_pre_hook(before)
    assert _compat.hooks_of(module) == [before, after]

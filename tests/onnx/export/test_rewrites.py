"""Every graph rewrite gives the same numbers before and after, and the fused memory matches PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes import common as common_passes
from torch import Tensor, nn
from torch.export import Dim

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ExportError
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.memory.decoder_call import without_memory
from deltamem_tool.memory.layer import DeltaMemLayer
from deltamem_tool.onnx.export.base_graph import without_memory as plain_interface
from deltamem_tool.onnx.export.base_graph import write_plain
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.export.fused_memory import Constants, FusedMemory
from deltamem_tool.onnx.export.mixed_norms import split_mixed_norms
from deltamem_tool.onnx.export.rewrites import REWRITES, optimize
from deltamem_tool.onnx.export.targets import TARGETS

TOLERANCE = 1e-5  # for the fused memory, whose gates and norm use other formulas for the same numbers
SAME = 1e-6  # for a rewrite that only moves operations
HALF = 5e-3  # a float16 sum of numbers up to 4
WIDTH, OUT = 16, {"q": 12, "k": 8, "v": 8, "o": 16}

CONFIGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "lambda_outside": {"update_rule": "lambda_outside"},
    "no_lambda": {"update_rule": "no_lambda"},
    "own_decay": {"couple_lambda": False},
    "own_decay_outside": {"couple_lambda": False, "update_rule": "lambda_outside"},
    "gates_by_head": {"gates": "head", "state_heads": 2},
    "branches_qkvo": {"branches": ("q", "k", "v", "o"), "state_heads": 3, "delta_scale": "branch"},
    "normed_o": {"o_norm": True, "delta_scale": "layer", "branches": ("o",)},
    "rank_1": {"rank": 1},
}


class Memories(nn.Module):
    """One memory of each config, used as the hooks do, all in one graph that is traced only once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.memories = nn.ModuleDict()
        for name, options in CONFIGS.items():
            config = DeltaMemConfig(**{"rank": 4, **options})
            memory = DeltaMemLayer(config, WIDTH, {branch: OUT[branch] for branch in config.branches})
            for parameter in memory.parameters():
                nn.init.normal_(parameter, std=0.4)
            with torch.no_grad():  # a gate that is 1 and one that is 0, in float32
                memory.gate.bias[0] = 200.0
                memory.gate.bias[-1] = -200.0 if len(memory.gate.bias) > 1 else 0.5
            self.memories[name] = memory

    def forward(self, hidden: Tensor, writes: Tensor, states: list[Tensor]) -> list[Tensor]:
        """For each memory: the state after the last token, and the correction of every branch."""
        results = []
        for memory, start in zip(self.memories.values(), states, strict=True):
            readings, state, *_ = memory(hidden, start, torch.ones_like(writes), writes)
            scaled = memory.scale_readings(readings)
            results += [state, *(memory.correction(branch, scaled) for branch in memory.config.branches)]
        return results

    def arguments(self, batch: int, tokens: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        random = torch.Generator().manual_seed(tokens)
        writes = torch.rand(batch, tokens, generator=random) < 0.7
        shapes = [(batch, *memory.config.state_shape) for memory in self.memories.values()]
        states = [torch.randn(shape, generator=random) for shape in shapes]
        return torch.randn(batch, tokens, WIDTH, generator=random), writes, states


@pytest.fixture(scope="module")
def memories() -> Memories:
    return Memories().eval()


@pytest.fixture(scope="module")
def fused_session(memories, tmp_path_factory) -> onnxruntime.InferenceSession:
    batch, tokens = Dim("batch"), Dim("tokens")
    axes = ({0: batch, 1: tokens}, {0: batch, 1: tokens}, [{0: batch} for _ in CONFIGS])
    fused = copy.deepcopy(memories)
    for name, memory in memories.memories.items():
        fused.memories[name] = FusedMemory(memory, Constants(memory.config))
    program = torch.onnx.export(fused, memories.arguments(2, 3), dynamo=True, dynamic_shapes=axes, verbose=False)
    file = tmp_path_factory.mktemp("lean") / "lean.onnx"
    program.save(file)
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 5), (2, 130)])
@torch.no_grad()
def test_the_lean_memory_matches_pytorch(memories, fused_session, batch, tokens):
    hidden, writes, states = memories.arguments(batch, tokens)
    expected = memories(hidden, writes, states)
    inputs = [hidden, writes, *states]
    feed = {value.name: x.numpy() for value, x in zip(fused_session.get_inputs(), inputs, strict=True)}
    for actual, reference in zip(fused_session.run(None, feed), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), reference, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
@torch.no_grad()
def test_the_lean_memory_keeps_an_unwritten_state_bit_identical(memories, fused_session):
    hidden, writes, states = memories.arguments(2, 7)
    for state in states:
        state[0, 0, 0] = 0.0
    inputs = [hidden, torch.zeros_like(writes), *states]
    feed = {value.name: x.numpy() for value, x in zip(fused_session.get_inputs(), inputs, strict=True)}
    outputs = iter(fused_session.run(None, feed))
    for (name, memory), state in zip(memories.memories.items(), states, strict=True):
        assert np.array_equal(next(outputs), state.numpy()), name
        for _ in memory.config.branches:
            next(outputs)


# A memory of two layers with states of 2 x 2.
STATES = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
agraph (float[B,T,2] a, float[B,1,2,2] s0, float[B,1,2,2] s1)
    => (float[B,T,2] y, float[B,1,2,2] "present.0.recurrent_state", float[B,1,2,2] "present.1.recurrent_state")
<int64[4] into = {-1,2,2,1}, int64[4] back = {-1,1,2,2}, int64[3] flat = {0,-1,2}>
{
    s0i = Reshape(s0, into)
    o0, s0o = com.microsoft.LinearAttention <q_num_heads=1, kv_num_heads=2, update_rule="linear", scale=1.0>
        (a, a, a, s0i)
    "present.0.recurrent_state" = Reshape(s0o, back)
    s1i = Reshape(s1, into)
    o1, s1o = com.microsoft.LinearAttention <q_num_heads=1, kv_num_heads=2, update_rule="linear", scale=1.0>
        (o0, a, a, s1i)
    "present.1.recurrent_state" = Reshape(s1o, back)
    y = Reshape(o1, flat)
}
"""
# A projection with a transposed weight and a bias, corrected by readings, and a sum that is no projection.
SUMS = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
agraph (float[B,T,2] x, float[B,T,3] r, float[B,T,4] p) => (float[B,T,4] y, float[B,T,4] z)
{
    w = Constant<value = float[4,2] {1,2,3,4,5,6,7,8}>()
    d = Constant<value = float[4,3] {1,0,2,-1,3,1,-2,2,1,0,1,1}>()
    b = Constant<value = float[4] {1,-1,2,0}>()
    xw = com.microsoft.FusedMatMul <transB=1> (x, w)
    xwb = Add(xw, b)
    rd = com.microsoft.FusedMatMul <transB=1> (r, d)
    y = Add(xwb, rd)
    z = Add(p, y)
}
"""
SUMS_OF_PRODUCTS = (
    SUMS.replace("com.microsoft.FusedMatMul <transB=1>", "MatMul")
    .replace("[4,", "[2,")
    .replace("float[2,2] {", "float[2,4] {")
    .replace("float[2,3]", "float[3,4]")
)


def matrix(*shape: int) -> str:
    """Random numbers in the language of ONNX's parser."""
    numbers = np.random.default_rng(shape).normal(size=np.prod(shape)).round(3)
    return f"float[{','.join(map(str, shape))}] {{{','.join(map(str, numbers))}}}"


# Attention of two heads over one of keys and values: q has a bias and a correction, k a bias, v neither.
PROJECTED = f"""
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
agraph (float[1,T,3] x, float[1,T,2] r, float[1,1,P,8] pk, float[1,1,P,8] pv, int32[1] last, int32 total)
    => (float[1,T,16] y, float[1,1,S,8] nk, float[1,1,S,8] nv)
{{
    wq = Constant<value = {matrix(3, 16)}>()
    wk = Constant<value = {matrix(3, 8)}>()
    wv = Constant<value = {matrix(3, 8)}>()
    dq = Constant<value = {matrix(2, 16)}>()
    bq = Constant<value = {matrix(16)}>()
    bk = Constant<value = {matrix(8)}>()
    xq = MatMul(x, wq)
    xqb = Add(xq, bq)
    rq = MatMul(r, dq)
    q = Add(xqb, rq)
    xk = MatMul(x, wk)
    k = Add(xk, bk)
    v = MatMul(x, wv)
    y, nk, nv = com.microsoft.GroupQueryAttention <num_heads=2, kv_num_heads=1> (q, k, v, pk, pv, last, total)
}}
"""
NORMS = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
agraph (float[B,T,4] x, float[B,T,4] a) => (float[B,T,4] y, float[B,T,4] z)
<float[4] w = {1,2,3,4}>
{
    s = Add(x, a)
    n = SimplifiedLayerNormalization <axis=-1, epsilon=1e-5> (s, w)
    y = Tanh(n)
    z = Neg(s)
}
"""
SHAPES = """
<ir_version: 10, opset_import: ["": 20]>
agraph (float[B,T,6] x) => (float[B,T,6] y, float[B,T,2,3] z)
<int64[4] apart = {0,0,2,3}>
{
    before = Shape(x)
    x1 = Reshape(x, apart)
    x2 = Reshape(x1, before)
    y = Neg(x2)
    z = Neg(x1)
}
"""
# Transposes of keys, queries and values and back, as transformers leaves them.
ATTENTION = """
<ir_version: 10, opset_import: ["": 20]>
agraph (float[B,T,2,3] q, float[B,2,S,3] k, float[B,2,S,3] v) => (float[B,T,6] y)
<int64[3] merged = {0,0,-1}, int64[4] apart = {0,0,2,-1}>
{
    q1 = Reshape(q, merged)
    q2 = Reshape(q1, apart)
    q3 = Transpose <perm=[0,2,1,3]> (q2)
    k1 = Transpose <perm=[0,2,1,3]> (k)
    k2 = Reshape(k1, merged)
    k3 = Reshape(k2, apart)
    k4 = Transpose <perm=[0,2,3,1]> (k3)
    v1 = Transpose <perm=[0,2,1,3]> (v)
    v2 = Reshape(v1, merged)
    v3 = Reshape(v2, apart)
    v4 = Transpose <perm=[0,2,1,3]> (v3)
    scores = MatMul(q3, k4)
    weights = Softmax <axis=-1> (scores)
    x = MatMul(weights, v4)
    x1 = Transpose <perm=[0,2,1,3]> (x)
    x2 = Reshape(x1, merged)
    x3 = Reshape(x2, apart)
    x4 = Tanh(x3)
    y = Reshape(x4, merged)
}
"""
GRAPHS = {
    "plain_products": SUMS,
    "plain_shapes": SHAPES,
    "joined_projections": PROJECTED,
    "joined_corrections": SUMS_OF_PRODUCTS,
    "skip_norms": NORMS,
    "gathered_states": STATES,
    "plain_attention": ATTENTION,
}
FEWER = {  # nodes
    "plain_products": 0,  # another operator each
    "plain_shapes": 2,
    "joined_projections": 3,  # instead of five products and sums more than two of each
    "joined_corrections": 1,  # the inputs are joined, a product and a sum go
    "skip_norms": 1,
    "gathered_states": -2,  # with two states, six replace four
    "plain_attention": 11,
}


def parsed(text: str) -> onnx_ir.Model:
    """The model in `text`, with the shapes of intermediate values and with constants as initializers."""
    model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True))
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def run(model: onnx_ir.Model) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    sizes = {"B": 2, "T": 5, "S": 7, "P": 4}
    feed: dict[str, Any] = {"last": np.array([sizes["P"] + sizes["T"] - 1], np.int32)}
    feed["total"] = np.array(sizes["P"] + sizes["T"], np.int32)
    for value in session.get_inputs():
        shape = [sizes.get(size, size) for size in value.shape]
        feed.setdefault(value.name, random.standard_normal(shape).astype(np.float32))
    feed = {value.name: feed[value.name] for value in session.get_inputs()}
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))


@pytest.mark.parametrize("name", GRAPHS)
def test_each_rewrite_preserves_the_results(name):
    before, after = parsed(GRAPHS[name]), parsed(GRAPHS[name])
    optimize(after, TARGETS["cpu"], without=set(REWRITES) - {name})
    assert len(before.graph) - len(after.graph) == FEWER[name]  # it was applied
    expected = run(before)
    actual = run(after)
    assert list(actual) == list(expected)
    for output, array in expected.items():
        np.testing.assert_allclose(actual[output], array, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("text", [*GRAPHS.values()])
def test_all_rewrites_together_preserve_the_results(text):
    before, after = parsed(text), parsed(text)
    optimize(after, TARGETS["cpu"])
    for output, array in run(before).items():
        np.testing.assert_allclose(run(after)[output], array, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("text", [*GRAPHS.values()])
def test_without_rewrites_the_graph_is_unchanged(text):
    before, after = parsed(text), parsed(text)
    optimize(after, TARGETS["cpu"], without=REWRITES)
    assert [node.op_type for node in after.graph] == [node.op_type for node in before.graph]


def test_reshapes_that_have_an_effect_are_kept():
    """Queries, keys and values with two heads get three; the result has three before and after."""
    text = ATTENTION.replace("int64[4] apart = {0,0,2,-1}", "int64[4] apart = {0,0,3,-1}")
    before, after = parsed(text), parsed(text)
    optimize(after, TARGETS["cpu"])
    assert len(before.graph) - len(after.graph) == 2
    np.testing.assert_allclose(run(after)["y"], run(before)["y"], rtol=SAME, atol=SAME)


MIXED_NORM = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
agraph (float[B,T,4] x, float[B,T,4] a, float[4] w) => (float[B,T,4] y, float16[B,T,4] z)
{
    x1 = Cast <to=10> (x)
    a1 = Cast <to=10> (a)
    y, m, d, z = com.microsoft.SkipSimplifiedLayerNormalization <epsilon=1e-5> (x1, a1, w)
}
"""


def test_a_float32_norm_accepts_a_float16_sum():
    model = parsed(MIXED_NORM)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="bound to different types"):
        run(model)
    split_mixed_norms(model.graph)
    actual = run(model)
    random = np.random.default_rng(0)
    x, a, w = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 4), (2, 5, 4), (4,)))
    total = (x.astype(np.float16) + a.astype(np.float16)).astype(np.float32)
    expected = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * w
    np.testing.assert_allclose(actual["z"].astype(np.float32), total, rtol=0, atol=HALF)
    np.testing.assert_allclose(actual["y"], expected, rtol=0, atol=HALF)


def test_a_norm_of_one_dtype_is_not_split():
    model = parsed(MIXED_NORM.replace("<to=10>", "<to=1>").replace("float16", "float"))
    split_mixed_norms(model.graph)
    assert [node.op_type for node in model.graph][-1] == "SkipSimplifiedLayerNormalization"


def test_an_unknown_rewrite_raises():
    with pytest.raises(ExportError, match=r"(?s)no rewrite 'faster'.*The rewrites are lean_memory, "):
        optimize(parsed(ATTENTION), TARGETS["cpu"], without=["faster"])


@pytest.mark.parametrize("target", TARGETS)
def test_exporting_without_an_unknown_rewrite_raises_for_any_target(target, qwen3, tmp_path):
    with pytest.raises(ExportError, match="no rewrite 'faster'"):
        export_onnx(qwen3.model, qwen3.tokenizer, tmp_path / "out", target=target, without=["lean_memory", "faster"])
    assert list(tmp_path.iterdir()) == []


MORE_NODES = 17  # at most, a layer


@pytest.mark.slow
def test_a_memory_adds_few_nodes_per_layer(qwen3, tmp_path):
    """This memory has two states and three branches, more than the default."""
    options, interface = CallOptions(qwen3.model, "last"), plain_interface(qwen3.manifest.interface)
    with without_memory():
        write_plain(qwen3.model, options, interface, TARGETS["cpu"], tmp_path / "plain")
    assert nodes_of_a_layer(qwen3.folder) - nodes_of_a_layer(tmp_path / "plain") <= MORE_NODES


def nodes_of_a_layer(folder: Path) -> int:
    """The number of nodes from one layer's attention to the next one's."""
    operators = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    first, second = (i for i, operator in enumerate(operators) if operator == "GroupQueryAttention")
    return second - first

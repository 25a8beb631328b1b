"""A graph in ONNX Runtime: carried tensors are not copied, and an unavailable provider raises."""

from __future__ import annotations

import ctypes

import numpy as np
import onnxruntime
import pytest
from onnxruntime import OrtValue

from deltamem_tool.errors import ConfigError, ExportError
from deltamem_tool.io.cores import usable_cores
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.runtime import providers
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.onnx.runtime.ortvalue import ELEMENT_TYPES, to_device, to_numpy


def called(graph, tokens, past):
    """One call over `tokens`, int `[B, T]`, none of it padding."""
    ids = np.array(tokens, np.int64)
    length = ids.shape[1] + next(value.shape()[2] for name, value in past.items() if name.endswith(".key"))
    return graph.step(ids, np.ones((len(ids), length), np.int64), np.ones(ids.shape, bool), past)


def test_outputs_are_passed_to_the_next_call_without_a_copy(portable_export, monkeypatch):
    """They are the same tensors at the same addresses. Only the logits are copied to numpy."""
    graph = OnnxModel(portable_export.folder).graph
    bound: dict[str, int] = {}
    bind = onnxruntime.IOBinding.bind_ortvalue_input
    monkeypatch.setattr(
        onnxruntime.IOBinding,
        "bind_ortvalue_input",
        lambda self, name, value: (bound.update({name: value.data_ptr()}), bind(self, name, value))[1],
    )
    read = []
    numpy = OrtValue.numpy
    monkeypatch.setattr(OrtValue, "numpy", lambda self: (read.append(self.shape()), numpy(self))[1])
    _, past = called(graph, [[65, 66, 67]], graph.empty_past(1))
    addresses = {name: value.data_ptr() for name, value in past.items()}
    assert all(isinstance(value, OrtValue) for value in past.values())
    assert past.keys() == {name for name in graph.interface.inputs() if name.startswith(contract.PAST)}
    bound.clear(), read.clear()
    called(graph, [[68]], past)
    assert bound == addresses
    assert read == [[1, 1, graph.interface.vocab_size]]


def test_a_call_does_not_change_its_past(portable_export):
    graph = OnnxModel(portable_export.folder).graph
    _, past = called(graph, [[65, 66, 67]], graph.empty_past(1))
    before = {name: to_numpy(value).copy() for name, value in past.items()}
    first, _ = called(graph, [[68, 69]], past)
    again, _ = called(graph, [[68, 69]], past)
    assert np.array_equal(first, again)
    for name, value in past.items():
        assert np.array_equal(to_numpy(value), before[name])


def test_states_are_copies(qwen3):
    graph = OnnxModel(qwen3.folder).graph
    states = {i: np.ones((1, 2, 4, 4), np.float32) for i in (0, 1)}
    past = graph.empty_past(1, states)
    states[0][:] = 7
    graph.states(past)[1][:] = 7
    assert all((state == 1).all() for state in graph.states(past).values())


def test_rows_are_joined_and_selected(portable_export):
    """Shorter rows get zeros on the left. One row with its own columns is unchanged."""
    graph = OnnxModel(portable_export.folder).graph
    _, short = called(graph, [[65, 66]], graph.empty_past(1))
    _, long = called(graph, [[70, 71, 72, 73]], graph.empty_past(1))
    joined = graph.join([short, long])
    for row, (past, columns) in enumerate([(short, np.arange(2, 4)), (long, np.arange(4))]):
        selected = graph.take(joined, row, columns)
        for name, value in past.items():
            assert np.array_equal(to_numpy(selected[name]), to_numpy(value)), name
    keys = to_numpy(joined[contract.carried_name(contract.PAST, 0, contract.KEY)])
    assert keys.shape[2] == 4 and not keys[0, :, :2].any() and keys[0, :, 2:].all()
    assert graph.join([long]) is long


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_tensors_of_every_dtype_are_returned(dtype):
    """bfloat16, which numpy lacks, is returned as bits."""
    stored = {contract.FLOAT32: np.float32, contract.FLOAT16: np.float16, contract.BFLOAT16: np.uint16}[dtype]
    for shape in ((2, 3, 4), (2, 0, 4)):
        array = np.arange(np.prod(shape)).reshape(shape).astype(stored)
        value = to_device(array[:, ::-1], dtype, "cpu")
        assert value.element_type() == ELEMENT_TYPES[dtype] and value.shape() == list(shape)
        assert to_numpy(value).dtype == stored and np.array_equal(to_numpy(value), array[:, ::-1])
    own = np.zeros(3, stored)
    value = to_device(own, dtype, "cpu")
    own[:] = 5
    assert not to_numpy(value).any()


def test_the_number_of_threads_is_set(qwen3, monkeypatch):
    def threads(model):
        return model.graph._session.get_session_options().intra_op_num_threads

    for name in ("OMP_NUM_THREADS", "ORT_INTRA_OP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert threads(OnnxModel(qwen3.folder)) == usable_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(OnnxModel(qwen3.folder)) == 5
    monkeypatch.setenv("ORT_INTRA_OP_NUM_THREADS", "4")
    assert threads(OnnxModel(qwen3.folder)) == 4
    assert threads(OnnxModel(qwen3.folder, threads=3)) == 3
    with pytest.raises(ConfigError, match="Invalid number of threads: 1025"):
        OnnxModel(qwen3.folder, threads=1025)
    monkeypatch.setenv("ORT_INTRA_OP_NUM_THREADS", "many")
    with pytest.raises(ConfigError, match="Invalid number of threads: many"):
        OnnxModel(qwen3.folder)


def test_an_unknown_provider_raises(qwen3, monkeypatch):
    with pytest.raises(ExportError, match="no provider 'tpu'"):
        OnnxModel(qwen3.folder, "tpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [providers.PROVIDERS["cpu"]])
    with pytest.raises(ExportError, match="onnxruntime-gpu"):
        OnnxModel(qwen3.folder, "cuda")


def test_a_session_that_fell_back_to_another_provider_raises(qwen3, monkeypatch):
    """ONNX Runtime falls back to the CPU with only a line on stderr, for example without a GPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(providers.PROVIDERS.values()))
    monkeypatch.setattr(providers, "_load_cuda", lambda: None)
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: session(path, options, providers=providers[-1:]),
    )
    with pytest.raises(ExportError, match="no usable device"):
        OnnxModel(qwen3.folder, "cuda")


@pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="no CUDA build")
def test_a_missing_library_of_cuda_is_named(qwen3, capfd):
    """Uses the real error of this build of ONNX Runtime without CUDA."""
    try:
        ctypes.CDLL("libcublasLt.so." + onnxruntime.cuda_version.partition(".")[0])
    except OSError:
        with pytest.raises(ExportError, match=r"libcublasLt\.so\.\d+, which cannot be loaded") as caught:
            OnnxModel(qwen3.folder, "cuda")
        assert "onnxruntime-gpu[cuda,cudnn]" in caught.value.next
        assert capfd.readouterr() == ("", "")  # no output of ONNX Runtime's loader
    else:
        pytest.skip("CUDA's libraries are here")


def test_the_missing_library_is_taken_from_the_loader_message(monkeypatch):
    """Covers each library, and errors that are not about a missing library, which are left to ONNX Runtime."""
    monkeypatch.setattr(providers, "_CUDA_LIBRARY", providers.Path(__file__))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda directory: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(providers.PROVIDERS.values()))

    def fails(message):
        def load(path):
            raise OSError(message)

        monkeypatch.setattr(ctypes, "CDLL", load)

    for library in ("libcudart.so.13", "libcudnn.so.9"):
        fails(f"{library}: cannot open shared object file: No such file or directory")
        with pytest.raises(ExportError, match=library.replace(".", r"\.")):
            providers.execution_providers("cuda")
    fails("/x/libonnxruntime_providers_cuda.so: undefined symbol: Provider_GetHost")
    assert providers.execution_providers("cuda") == [providers.PROVIDERS["cuda"], providers.PROVIDERS["cpu"]]

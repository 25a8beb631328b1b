"""Tiny engines of both runtimes, whose memories write by tokens, messages and sentences."""

from __future__ import annotations

import pytest
from chat.talking import make_engine
from helpers.shared_folder import folder_once
from helpers.tiny import randomise, tiny_model, tiny_tokenizer

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.runtime.engine import OnnxModel

GRANULARITIES = ("token", "message", "sentence")


def torch_engine(granularity: str) -> TorchModel:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4, state_heads=2, granularity=granularity)))
    return TorchModel(model, tokenizer)


def onnx_engine(granularity: str, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    def export(folder):
        engine = torch_engine(granularity)
        export_onnx(engine.model, tiny_tokenizer(), folder / "onnx", base_model="someone/tiny")

    return OnnxModel(folder_once(tmp_path_factory, f"serve-{granularity}", export) / "onnx")


@pytest.fixture(scope="module")
def engine() -> TorchModel:
    return make_engine(frozenset({40}))


@pytest.fixture(scope="session", params=[("torch", g) for g in GRANULARITIES] + [("onnx", g) for g in GRANULARITIES])
def any_engine(request, tmp_path_factory):
    runtime, granularity = request.param
    return torch_engine(granularity) if runtime == "torch" else onnx_engine(granularity, tmp_path_factory)

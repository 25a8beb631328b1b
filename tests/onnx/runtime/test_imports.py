"""Conversations in ONNX Runtime need neither torch nor transformers, and import quickly."""

from __future__ import annotations

import subprocess
import sys

IMPORT_SECONDS = 1.0  # of CPU


def test_a_conversation_runs_without_torch_and_transformers(qwen3, tmp_path):
    script = """
import sys
from deltamem_tool.chat.conversation import Conversation, Sampling
from deltamem_tool.memory.file import read_memory
from deltamem_tool.onnx.runtime.engine import OnnxModel
model = OnnxModel(sys.argv[1])
conversation = Conversation(model)
conversation.generate("Hello", Sampling(2))
conversation.save_memory(sys.argv[2])
Conversation(model, read_memory(sys.argv[2]))
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    arguments = [sys.executable, "-c", script, str(qwen3.folder), str(tmp_path / "memory.safetensors")]
    subprocess.run(arguments, check=True)


def test_the_runtime_imports_quickly():
    code = "import time, deltamem_tool.onnx.runtime.engine, deltamem_tool.chat.conversation; print(time.process_time())"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    ]
    assert min(seconds) < IMPORT_SECONDS  # Python's own start included

"""`deltamem run`: output, options and memory files match the library."""

from __future__ import annotations

import json

from click.testing import CliRunner

from deltamem_tool.chat.conversation import Answer, Conversation, Sampling
from deltamem_tool.cli.run import command
from deltamem_tool.errors import ExportError, MemoryStateError
from deltamem_tool.memory.file import read_memory
from deltamem_tool.onnx.runtime.engine import OnnxModel

TURNS = ("My cat is called Zoë 🐈.", "What is she called?")


def test_the_command_matches_the_library(qwen3, tmp_path):
    file = tmp_path / "memory.safetensors"
    options = [
        "--prompt",
        TURNS[0],
        "--prompt",
        TURNS[1],
        "--max-new-tokens",
        "4",
        "--save-memory",
        str(file),
        "--json",
    ]
    result = CliRunner().invoke(command, [str(qwen3.folder), *options])
    assert result.exit_code == 0, result.output
    conversation = Conversation(OnnxModel(qwen3.folder))
    answers = [conversation.generate(turn, Sampling(4)).text for turn in TURNS]
    report = {"answers": answers, "ended_by": ["length", "length"], "tokens": 8, "memory_file": str(file)}
    assert json.loads(result.stdout) == report

    options = ["--prompt", "Hi", "--system", "Be brief.", "--memory", str(file), "--max-new-tokens", "4"]
    result = CliRunner().invoke(command, [str(qwen3.folder), *options])
    conversation = Conversation(OnnxModel(qwen3.folder), conversation.memory)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert result.stdout == conversation.generate(messages, Sampling(4)).text + "\n"


def test_byte_order_marks_are_removed_and_invalid_characters_raise(qwen3):
    tokens = ["--max-new-tokens", "3"]
    plain = CliRunner().invoke(command, [str(qwen3.folder), "--prompt", "Hi", "--system", "Be brief.", *tokens])
    marked = ["--prompt", "\ufeffHi", "--system", "\ufeffBe brief."]
    assert CliRunner().invoke(command, [str(qwen3.folder), *marked, *tokens]).stdout == plain.stdout
    for option in ("--prompt", "--system", "--stop"):
        result = CliRunner().invoke(command, ["nowhere", "--prompt", "Hi", option, "caf\udce9"])
        assert result.exit_code == 2 and option in result.stderr and "not Unicode text" in result.stderr


def test_the_command_passes_its_options_to_the_library(qwen3, monkeypatch):
    calls = []

    def generate(self, content, sampling, on_text):
        calls.append((self.window, self.engine.graph._session.get_session_options().intra_op_num_threads, sampling))
        return Answer("said", (1, 2), "stop string")

    monkeypatch.setattr(Conversation, "generate", generate)
    options = "--prompt Hi --max-new-tokens 9 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --seed 4 --json"
    options += " --repetition-penalty 1.2 --stop END --stop STOP --window 99 --threads 2"
    result = CliRunner().invoke(command, [str(qwen3.folder), *options.split()])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ended_by"] == ["stop string"]
    assert calls == [(99, 2, Sampling(9, 0.5, 3, 0.9, 0.1, 1.2, 4, ("END", "STOP")))]
    result = CliRunner().invoke(command, [str(qwen3.folder), "--prompt", "Hi"])
    positions = qwen3.model.config.max_position_embeddings
    assert calls[1][::2] == (positions, Sampling())  # the command's defaults are the library's


def test_an_interrupted_answer_ends_the_command_and_is_remembered(qwen3, monkeypatch, tmp_path):
    """And keeps what was said until then, as it does where a later turn is refused; but not in the place of a file that
    is no memory."""
    options = ["--prompt", "Hi", "--save-memory", str(tmp_path / "memory")]
    refused = CliRunner().invoke(command, [str(qwen3.folder), *options, "--prompt", ""])
    assert isinstance(refused.exception, ExportError) and read_memory(tmp_path / "memory").states
    (tmp_path / "memory").unlink()
    monkeypatch.setattr(Conversation, "generate", lambda *inputs: Answer("sa", (1,), "interrupted"))
    result = CliRunner().invoke(command, [str(qwen3.folder), *options])
    assert result.exit_code == 1 and read_memory(tmp_path / "memory").states
    (tmp_path / "memory").write_text("a diary")
    result = CliRunner().invoke(command, [str(qwen3.folder), *options])
    assert isinstance(result.exception, MemoryStateError) and (tmp_path / "memory").read_text() == "a diary"

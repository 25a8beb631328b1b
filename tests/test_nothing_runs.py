"""Code in untrusted adapters, tokenizers and chat templates does not run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from helpers.tiny import tiny_tokenizer

from deltamem_tool import load
from deltamem_tool.adapter.config_file import CONFIG_FILE, WEIGHTS_FILE
from deltamem_tool.base_model.tokenizer import read_tokenizer
from deltamem_tool.chat.text import ChatText
from deltamem_tool.errors import AdapterError, ArchitectureError, DataError, ExportError
from deltamem_tool.segments.template import ChatTemplate

FIXTURE = Path(__file__).parent / "fixtures" / "adapter-format-1"
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FIXTURE / "adapter", tmp_path / "adapter")


@pytest.fixture
def canary(tmp_path):
    """A file that only untrusted code would write, and the source of such code."""
    file = tmp_path / "canary"
    return file, f"open({str(file)!r}, 'w').write('here')\n"


class Runs:
    """Runs `source` when it is unpickled."""

    def __init__(self, source):
        self.source = source

    def __reduce__(self):
        return exec, (self.source,)


def test_no_code_in_an_adapter_folder_runs(folder, canary):
    file, source = canary
    for name in ("deltamem.py", "modeling.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(source)
    for name in ("deltamem.bin", "deltamem.pt", "pytorch_model.bin", "deltamem.pkl"):
        (folder / name).write_bytes(pickle.dumps(Runs(source)))
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    load(folder, base=str(FIXTURE / "base"))
    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(Runs(source)))
    with pytest.raises(AdapterError):
        load(folder, base=str(FIXTURE / "base"))
    assert not file.exists()


def test_a_tokenizer_runs_no_code_and_prompts_for_nothing(tmp_path, canary, monkeypatch):
    file, source = canary
    folder = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(source)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run code"))
    with pytest.raises(ArchitectureError):
        read_tokenizer(folder)
    assert not file.exists()


@pytest.mark.parametrize(
    "template",
    [
        ESCAPE,
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages | map(attribute='__class__') | first }}{{ ''['__class__'].mro() }}",
    ],
)
def test_templates_cannot_escape_their_sandbox(template, canary):
    file, _ = canary
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template.replace("CANARY", str(file))
    messages = [{"role": "user", "content": "Hi"}]
    text = ChatText.from_tokenizer(tokenizer)
    with pytest.raises(ExportError, match="chat template refuses"):
        text.render(messages)
    for seen in (text.template, ChatTemplate.from_tokenizer(tokenizer)):  # ours and that of transformers
        with pytest.raises(DataError, match="refuses the conversation"):
            seen.render(messages)
    assert not file.exists() and len(messages) == 1


@pytest.mark.parametrize("template", ["{% if %}", "{{" * 300, "{% for m in messages %}"])
def test_invalid_templates_raise(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ExportError, match="cannot be read"):
        ChatText.from_tokenizer(tokenizer)

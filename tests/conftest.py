"""One thread, no network: set before anything imports torch or huggingface_hub."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys

gc.disable()  # until all is imported
# Background processes of a shell ignore Ctrl-C, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.update(
    OMP_WAIT_POLICY="passive",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest  # noqa: E402
from cli.command import deltamem  # noqa: E402, F401  (a fixture)
from fake_hub.isolation import hub  # noqa: E402, F401  (a fixture)
from helpers.shared_folder import folder_once  # noqa: E402

# Import nothing heavy here: pytest-xdist's main process imports this file and runs no test.


@pytest.fixture(scope="session")
def tokenizer():
    from helpers.tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A base model with a tokenizer on disk; read only."""
    from helpers.tiny import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("base") / "model", tokenizer)


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """NLTK's own reader of a sentence model, on one that knows two abbreviations; nothing is fetched."""
    import nltk

    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    (folder / "abbrev_types.txt").write_text("dr\nmr")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    yield
    nltk.tokenize._get_punkt_tokenizer.cache_clear()


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory):
    """A folder in which `deltamem quickstart --fast --out run` has run, with its output in `stdout`; read only."""

    def run(folder):
        command = [sys.executable, "-m", "deltamem_tool.cli", "quickstart", "--fast", "--out", "run"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        (folder / "stdout").write_text(result.stdout)

    return folder_once(tmp_path_factory, "quickstart", run)


@pytest.fixture(scope="session")
def quickstart_onnx(quickstart_run):
    """The shipped adapter on its backbone as an ONNX folder."""
    return quickstart_run / "run" / "onnx"


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32, a Hugging Face folder; read only. For tests marked `real_model`."""
    from smollm2 import fetch

    from deltamem_tool.errors import HubError

    try:
        return fetch()
    except HubError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The GGUF file from which `smollm2` is made; read only."""
    from deltamem_tool.base_model.smollm2 import fetch_gguf
    from deltamem_tool.errors import HubError

    try:
        return fetch_gguf()
    except HubError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def web_folder(tmp_path_factory):
    """The shipped adapter as a folder for browsers; read only."""
    from helpers.web_library import shipped_for_web

    return shipped_for_web(tmp_path_factory)


@pytest.fixture(scope="module")
def browser():
    """Chromium."""
    from helpers.browser import chromium

    with chromium() as browser:
        yield browser


# Created once for several tests, of which the first is slow: exports, a quickstart, processes.
SLOW_FIXTURES = {
    "export_again",
    "exported_with",
    "float16",
    "growths",
    "llama",
    "portable_export",
    "quickstart_run",
    "static_export",
}


def pytest_collection_modifyitems(items):
    """The fast ones first. Those that want the quickstart's run together: apart, one process would wait for it while
    another makes it."""
    for item in items:
        if not SLOW_FIXTURES.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (item.get_closest_marker("sweep") is not None, "quickstart_run" in item.fixturenames))


def pytest_collection_finish():
    """Exclude everything imported so far, about a million objects, from garbage collection."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    """Make everything collectable again before the interpreter ends."""
    gc.unfreeze()

"""One thread, no network: set before anything imports torch or huggingface_hub."""

from __future__ import annotations

import os

os.environ.update(
    OMP_WAIT_POLICY="passive",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny import save_checkpoint, tiny_tokenizer  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A base model with a tokenizer on disk; read only."""
    return save_checkpoint(tmp_path_factory.mktemp("base") / "model", tokenizer)


def pytest_collection_modifyitems(items):
    """The fast ones first: a hundred and more models come last."""
    items.sort(key=lambda item: "architectures" in item.path.parts)

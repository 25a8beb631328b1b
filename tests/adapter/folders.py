"""Contents of the adapter folders in these tests, and functions that damage them."""

from __future__ import annotations

import json

from safetensors.torch import load_file, save_file

from deltamem_tool import DeltaMemConfig
from deltamem_tool.adapter.config_file import CONFIG_FILE, WEIGHTS_FILE

CONFIG = DeltaMemConfig(rank=4, branches=("q", "o"), delta_init="base_slice")


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(change(tensors), folder / WEIGHTS_FILE)

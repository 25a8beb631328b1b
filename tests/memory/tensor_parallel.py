"""The functions of processes that share the weights of a base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.asked import Asked, item
from helpers.tiny import PAD, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM, DistributedConfig

from deltamem_tool import Conversation, DeltaMemConfig, MemoryCache, TorchModel, attach, evaluate, export_onnx, load
from deltamem_tool.base_model.launch import join_launched, launch_rank
from deltamem_tool.baselines.lora import Lora
from deltamem_tool.baselines.static import Static
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.cli.engines import load_on
from deltamem_tool.errors import ArchitectureError, ConfigError, ExportError
from deltamem_tool.evaluation.conditions import EvalProtocol
from deltamem_tool.memory.attach import adapter_of

PROCESSES = 2


def rank(number: int, folders: list[Path]) -> None:
    """Write the results of one process; torchrun would set the same variables."""
    environment = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": PROCESSES}
    os.environ |= {name: str(value) for name, value in environment.items()}
    meeting = f"file://{folders[0].parent / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=number, world_size=PROCESSES)
    try:
        for folder in folders:
            split = DistributedConfig(tp_plan="auto")
            torch.save(results(folder, "tp", distributed_config=split), folder / f"rank-{number}.pt")
            model = load(folder / "adapter", distributed_config=split)
            with pytest.raises(ExportError, match="devices or processes"):
                export_onnx(model, tiny_tokenizer(), folder / "onnx")
            loss = model(tokens(1, 5), cache=MemoryCache(model), labels=tokens(1, 5)).loss
            with pytest.raises(ConfigError, match="cannot be trained under tensor parallelism") as raised:
                loss.backward()
            assert "training.shard: fsdp2" in raised.value.next
    finally:
        torch.distributed.destroy_process_group()


def results(folder: Path, device: str, **options: Any) -> dict[str, Any]:
    """Calls, answers and memories of the adapter in `folder`, and where a new one of its base starts from.

    Args:
        folder: has the adapter, its base, a LoRA and a static adapter; gets the records of an evaluation.
        device: as `deltamem eval` takes it.
        options: which say the same of a base.
    """
    model = load_on(device, str(folder / "adapter"), {})
    tagged = adapter_of(model).config.granularity != "token"
    tags = torch.tensor([[0, 1, 1, 2, 1, 1, 1, 2, 0, 1, 2, 1, 1]] * 2, dtype=torch.int8) if tagged else None
    cache, ids = MemoryCache(model), tokens(2, 13)
    cache.segment_tags = tags
    with torch.no_grad():
        pieces = [model(ids[:, start:end], cache=cache).logits for start, end in ((0, 7), (7, 8), (8, 13))]
    memory = cache.memory
    conversation = Conversation(TorchModel(model, tiny_tokenizer()))
    answers = [conversation.generate(text, Sampling(max_new_tokens=4)).text for text in ("My dog is Rex.", "And?")]
    task, protocol = Asked([item(number, sessions=1 + number % 2) for number in range(5)]), EvalProtocol.parse("memory")
    evaluated = evaluate(
        model,
        tiny_tokenizer(),
        task,
        protocol,
        batch_size=2,
        lora=Lora.read(folder / "lora"),
        static=Static.read(folder / "static"),
        folder=folder / f"records-{device}",
    )
    start = {} if tagged else {"memory": memory.select([0])}
    generated, after = [], []
    for options_of in ({}, {"do_sample": True, "temperature": 0.8}, {"num_beams": 2}):
        cache = MemoryCache(model, **start)
        cache.segment_tags = None if tags is None else tags[:1]
        torch.manual_seed(3)
        generated += model.generate(ids[:1], cache=cache, max_new_tokens=4, pad_token_id=PAD, **options_of).tolist()
        after += cache.memory.layers.values()
    weights = [getattr(weight, "to_local", lambda weight=weight: weight)() for weight in model.base_model.parameters()]
    new = AutoModelForCausalLM.from_pretrained(folder / "base", **options)
    torch.manual_seed(0)
    columns = attach(new, DeltaMemConfig(rank=4, branches=("q", "v", "o"), delta_init="base_slice")).state_dict()
    return {
        "logits": torch.cat(pieces, dim=1),
        "states": [*memory.layers.values(), *memory.open_segments.values()],
        "states of the chat": [torch.from_numpy(state) for state in conversation.memory.states.values()],
        "states of generate": after,
        "columns": list(columns.values()),
        "words": (answers, generated, adapter_of(model).fingerprint, evaluated.records),
        "bytes": sum(weight.nbytes for weight in weights),
    }


def refused(folder: Path) -> None:
    """Load a base whose four query heads three processes cannot share."""
    torch.set_num_threads(1)
    join_launched()
    with pytest.raises(ArchitectureError, match="3 processes cannot share the query heads of this model") as raised:
        load(folder / "adapter", distributed_config=DistributedConfig(tp_plan="auto"))
    assert raised.value.next == "Start a number of processes that divides 2."


def exact(folders: list[Path]) -> None:
    """Write the logits and states of each base in float64, of this process among several."""
    torch.set_num_threads(1)
    join_launched()
    for folder in folders:
        actual = in_float64(folder, distributed_config=DistributedConfig(tp_plan="auto"))
        torch.save(actual, folder / f"exact-{launch_rank()}.pt")


def in_float64(folder: Path, **options: Any) -> list[torch.Tensor]:
    """The logits of one call, and the states after it, which are float32 all the same."""
    model = load(folder / "adapter", dtype="float64", **options)
    cache = MemoryCache(model)
    with torch.no_grad():
        logits = model(tokens(2, 13) % model.config.vocab_size, cache=cache).logits
    return [logits, *cache.memory.layers.values()]

"""Every supported model type, from a tiny random config, through the main steps of a user.

`pytest tests/base_model -k gpt2` runs one family.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.model_runs import relatively_close
from helpers.tiny import randomise
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import deltamem_tool as deltamem
from base_model.tiny_configs import TEXT_IDS, UNBUILT, layers_are_alike, tiny_config, with_depth
from deltamem_tool import DeltaMemConfig, MemoryCache
from deltamem_tool._compat import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from deltamem_tool.base_model.attention import attention_layers
from deltamem_tool.base_model.layouts import UNSUPPORTED
from deltamem_tool.config import BRANCHES
from deltamem_tool.memory.attach import adapter_of

pytestmark = pytest.mark.sweep

CUT_TOLERANCE = 1e-4  # float32 against float32, the same sums in another order
LENGTH, CUT = 12, 7
DEPTH = 2  # layers, if all are alike: a first and a last one

# Models whose output depends on how a text is split, even without a memory.
CUTS_APART = {
    "jamba": "a scan of more than one token starts from zeros",
    "zamba": "a scan of more than one token starts from zeros",
}
NEEDS_POSITIONS = {"bamba"}  # counts from zero in every call otherwise

# transformers saves their text decoders under types that AutoModelForCausalLM does not load.
NOT_LOADED = {"emu3", "mllama"}

TEXT = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(UNSUPPORTED) - set(UNBUILT))
# Vision-language models that the mapping lacks or knows only as a text decoder: tested whole, on text.
VISION = (
    "aria aya_vision cohere2_vision glm4v idefics2 idefics3 internvl janus llava llava_next llava_onevision mistral3 "
    "ovis2 paligemma qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe smolvlm"
).split()


def tiny_model(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(model_type)
    if layers_are_alike(config):
        config = with_depth(config, DEPTH)
    kind = AutoModelForImageTextToText if model_type in VISION else AutoModelForCausalLM
    return kind.from_config(config, attn_implementation="eager").eval()


def text(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (batch, LENGTH), generator=generator)


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, pieces: list[int]) -> tuple[Tensor, MemoryCache]:
    """Logits of `ids` fed in pieces of these lengths, and the cache."""
    cache, logits, start = MemoryCache(model), [], 0
    for length in pieces:
        positions = torch.arange(start, start + length).expand(len(ids), length)
        kwargs = {"position_ids": positions} if model.config.model_type in NEEDS_POSITIONS else {}
        logits.append(model(input_ids=ids[:, start : start + length], cache=cache, **kwargs).logits)
        start += length
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("model_type", [*TEXT, *VISION])
def test_a_memory_on_a_model_type(model_type: str, tmp_path: Path):
    model, ids = tiny_model(model_type), text(2)
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    branches = [branch for branch in BRANCHES if all(branch in layer.projections for layer in attention_layers(model))]

    adapter = deltamem.attach(model, DeltaMemConfig(rank=4, branches=tuple(branches)))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain), "a fresh adapter changes the logits"
    randomise(adapter)

    whole, cache = run(model, ids, [LENGTH])
    assert whole.isfinite().all() and not torch.allclose(whole, plain, atol=CUT_TOLERANCE), "the adapter does nothing"
    for pieces in ([1] * LENGTH, [CUT, LENGTH - CUT])[: 1 if model_type in CUTS_APART else 2]:
        same, after = run(model, ids, pieces)
        relatively_close(same, whole, CUT_TOLERANCE)
        for layer, state in cache.memory.layers.items():
            relatively_close(after.memory.layers[layer], state, CUT_TOLERANCE)

    if model_type not in NEEDS_POSITIONS and "logits_to_keep" in inspect.signature(model.forward).parameters:
        after = MemoryCache(model)
        with torch.no_grad():
            relatively_close(
                model(input_ids=ids, cache=after, logits_to_keep=1).logits[:, -1:], whole[:, -1:], CUT_TOLERANCE
            )
        for layer, state in cache.memory.layers.items():
            relatively_close(after.memory.layers[layer], state, CUT_TOLERANCE)

    beams = model.generate(ids, num_beams=2, max_new_tokens=4, do_sample=False)
    assert torch.equal(beams[:, :LENGTH], ids)

    trained = {name: weight.clone() for name, weight in adapter.state_dict().items()}
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    assert all(torch.equal(weight, base[name]) for name, weight in model.state_dict().items()), "the base has changed"
    still = [name for name, weight in adapter.state_dict().items() if torch.equal(weight, trained[name])]
    assert not still, "these do not train"

    trained_logits, _ = run(model, ids, [LENGTH])
    if model_type not in NOT_LOADED:
        check_the_folder(model, ids, trained_logits, tmp_path)

    deltamem.detach(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain), "detached, it is not what it was"


def check_the_folder(model: PreTrainedModel, ids: Tensor, logits: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "base")
    deltamem.save_adapter(model, tmp_path / "adapter")
    again = deltamem.load(tmp_path / "adapter", base=str(tmp_path / "base"), attn_implementation="eager")
    loaded = adapter_of(again).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in adapter_of(model).state_dict().items())
    assert torch.equal(run(again, ids, [LENGTH])[0], logits), "loaded, it computes something else"

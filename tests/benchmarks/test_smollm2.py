"""`benchmarks/smollm2.py`: the real checkpoint, and a random one of its shape."""

from __future__ import annotations

import pytest
import torch
from smollm2 import SHAPE, random_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@pytest.mark.real_model
def test_the_checkpoint_answers(smollm2):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.real_model
def test_a_random_checkpoint_has_the_shape_of_the_real_one(smollm2, tmp_path):
    real, random = (AutoConfig.from_pretrained(folder) for folder in (smollm2, random_checkpoint(tmp_path, layers=1)))
    names = SHAPE.keys() - {"rope_theta", "rms_norm_eps"} | {"model_type", "rope_parameters", "hidden_act"}
    assert {name: getattr(random, name) for name in names} == {name: getattr(real, name) for name in names}
    assert random.rms_norm_eps == pytest.approx(real.rms_norm_eps)

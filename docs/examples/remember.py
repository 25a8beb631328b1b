import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = Path(sys.argv[1])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
stop = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]  # an id, or a list of them
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
outputs = [output.name for output in session.get_outputs()]
carried = [name.replace("present", "past_key_values") for name in outputs[1:]]


def answer(prompt: str, states: dict[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    """The answer to `prompt` from an empty context and `states`, and the states after it."""
    past = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            sizes = [1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])]
            zeros = np.zeros(sizes, np.float16 if "16" in value.type else np.float32)
            past[value.name] = states.get(value.name, zeros)
    tokens, seen, generated = tokenizer.encode(prompt, add_special_tokens=False).ids, 0, []
    while len(generated) < 64:
        seen += len(tokens)
        masks = {"attention_mask": np.ones((1, seen), np.int64), "write_mask": np.ones((1, len(tokens)), bool)}
        logits, *present = session.run(outputs, {"input_ids": np.array([tokens], np.int64), **masks, **past})
        past = dict(zip(carried, present, strict=True))
        if (token := int(logits[0, -1].argmax())) in np.atleast_1d(stop):
            break
        generated, tokens = [*generated, token], [token]
    return tokenizer.decode(generated), {name: value for name, value in past.items() if name.endswith("_state")}


states = {}
for words in sys.argv[2:]:  # every prompt is a conversation of its own; what they share is the states
    text, states = answer(f"<|user|>{words}<|end|><|assistant|>", states)
    print(text)

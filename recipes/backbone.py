"""Train the backbone shipped with the package from scratch, on text that this script generates, without a memory.

    python recipes/backbone.py --out backbone

This takes about 20 minutes on 2 CPU cores and 1 GB of memory, and is seeded. The order of the stages matters:
in-context copying (induction) has to form on repeated random sequences before any dialogue. If both are mixed from the
start, recall stays at chance.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from deltamem_tool.data import dialogues
from deltamem_tool.io.atomic import write_atomically

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 2048
# With few kinds, knowing the kind of value that a question asks for is not enough.
KINDS_MIXED = (2, 3, len(dialogues.KINDS))
UNANSWERABLE = 0.15  # share of questions about facts that were not told


def build_tokenizer(special: tuple[str, ...] = SPECIAL, **options) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer. Every word of the dialogues is one token; other words are encoded as bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = sorted(
        {word for text in dialogues.lexicon() for word, _ in byte_level.pre_tokenize_str(text)} - set(alphabet)
    )
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet, *words])}
    # ignore_merges: a word in the vocabulary is one token; there are no merges for the others
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **options,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.06,  # at the usual 0.02 no induction forms at this size
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def repeated_batch(vocabulary: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return repeated random sequences, `[size, 80]`. Only repetitions can be predicted, so only they are scored. Each
    row has its own period: with a common one, a fixed offset would be enough, and no induction would form."""
    length = 80
    period = torch.randint(16, 49, (size, 1), generator=generator)
    position = torch.arange(length).expand(size, length)
    ids = torch.randint(len(SPECIAL), vocabulary, (size, length), generator=generator).gather(1, position % period)
    return ids, ids.masked_fill(position <= period, -100)


def conversation(rng: random.Random) -> list[dialogues.Message]:
    """Return a conversation with facts, small talk and questions, some of them about facts that were not told."""
    kinds = rng.choice(KINDS_MIXED)
    facts = dialogues.sample_facts(rng, rng.randint(1, 7), held_out=False, kinds=kinds)
    unsaid = facts.pop()
    split = rng.randint(0, len(facts))
    messages: list[dialogues.Message] = []
    known: list[dialogues.Fact] = []
    for told in (facts[:split], facts[split:]):
        messages += dialogues.fact_history(rng, told, held_out=False)
        known += told
        for _ in range(rng.randint(1, 3)):
            if not known or rng.random() < UNANSWERABLE:
                messages += [dialogues.user(unsaid.question(rng)), dialogues.assistant(unsaid.unknown)]
            else:
                messages += dialogues.question_exchange(rng, rng.choice(known))
    return messages


def dialogue_batches(tokenizer, size: int, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield conversations of similar length as `[size, T]`; all tokens except padding are scored."""
    while True:
        texts = [tokenizer.apply_chat_template(conversation(rng), tokenize=False) for _ in range(8 * size)]
        encoded = sorted(tokenizer(texts).input_ids, key=len)
        batches = [encoded[start : start + size] for start in range(0, len(encoded), size)]
        rng.shuffle(batches)
        for batch in batches:
            ids = tokenizer.pad({"input_ids": batch}, return_tensors="pt").input_ids
            yield ids, ids.masked_fill(ids == tokenizer.pad_token_id, -100)


@torch.no_grad()
def recall_from_context(model, tokenizer, facts: int, episodes: int, seed: int) -> float:
    """Return the exact match of the first question after held-out `facts` were told, all of them in the context."""
    rng = random.Random(seed)
    prompts, answers = [], []
    for _ in range(episodes):
        chosen = dialogues.sample_facts(rng, facts, held_out=True)
        asked = rng.choice(chosen)
        messages = [*dialogues.fact_history(rng, chosen, held_out=True), dialogues.user(asked.question(rng))]
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        answers.append(asked.answer)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    model.eval()
    output = model.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch.input_ids.shape[1] :]
    model.train()
    said = tokenizer.batch_decode(output, skip_special_tokens=True)
    return sum(text == answer for text, answer in zip(said, answers, strict=True)) / episodes


def fit(model, batches, steps: int, peak: float, last: float, name: str, stop_below: float = 0.0) -> None:
    """Train with AdamW, a short warm-up and a cosine from `peak` to `last`. Stop early when the mean loss is low."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.98))
    start, mean = time.time(), None
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = min(1, (step + 1) / 100) * (last + (peak - last) * cosine)
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % 100 == 0:
            print(f"{name} step {step + 1:5d}  loss {mean:.4f}  {time.time() - start:6.0f} s", flush=True)
            if mean < stop_below:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--induction-steps", type=int, default=4000, help="maximum; this stage ends when the loss is below 0.1"
    )
    parser.add_argument("--dialogue-steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer(model_max_length=CONTEXT)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens", flush=True)

    def induction() -> None:
        generator = torch.Generator().manual_seed(options.seed)
        batches = iter(lambda: repeated_batch(len(tokenizer), options.batch, generator), None)
        fit(model, batches, options.induction_steps, 2e-3, 2e-3, "induction", stop_below=0.1)

    def talk() -> None:
        batches = dialogue_batches(tokenizer, options.batch, random.Random(options.seed))
        fit(model, batches, options.dialogue_steps, 1.5e-3, 5e-5, "dialogues")

    # Each stage saves its weights, so that an interrupted run continues after the last complete stage.
    for name, stage in {"induction": induction, "dialogues": talk}.items():
        weights = options.out / "stages" / f"{name}.safetensors"
        if weights.is_file():
            model.load_state_dict(load_file(weights), strict=False)
        else:
            stage()
            write_atomically(
                weights, save({key: value for key, value in model.state_dict().items() if key != "lm_head.weight"})
            )

    figures = {str(facts): recall_from_context(model, tokenizer, facts, 400, seed=1) for facts in (1, 2, 4, 6, 8)}
    print("exact match from context, held-out facts:", figures, flush=True)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False, max_new_tokens=64
    )
    model.save_pretrained(options.out)
    tokenizer.backend_tokenizer.no_padding()  # left by the last batch
    tokenizer.save_pretrained(options.out)
    (options.out / "training.json").write_text(
        json.dumps({"seed": options.seed, "recall_from_context": figures}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()

"""Tokenizers with merges, trained on the texts of this folder's tests."""

from __future__ import annotations

from segments.templates import PLAIN, TALK
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["one.\ntwo.\n", "one.\ntwo.\nthree", "One. It is. It was. It", "Remember"]
CORPUS += ["Rex. Dr. Smith knows! Is it so? So yes. No Two Three", *(message["content"] for message in TALK)]


def trained(pre_tokenizer):
    """A tokenizer with merges. Its special token is <a>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel) else []
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<unk>", "<a>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=PLAIN)

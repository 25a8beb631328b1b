"""The limits of a model's input: how many tokens, and which token ids."""

from __future__ import annotations

from typing import Any, NamedTuple

from deltamem_tool.errors import DataError


class Limits(NamedTuple):
    """Of one context.

    Args:
        positions: the most tokens; None for any number.
        vocabulary: rows of the embedding, which token ids count from zero; None if the config does not say.
    """

    positions: int | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, config: Any) -> Limits:
        """Read them off a transformers config.

        Positions that are learned end there with an error, rotary ones in nonsense. Where a config stretches them, by
        YaRN say, some give the length before in `max_position_embeddings` and some the length after.
        """
        config = config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None)
        if not isinstance(positions, int) or positions < 1:
            positions = None
        else:
            rope = getattr(config, "rope_parameters", None) or {}
            for options in (rope, *rope.values()):  # of all layers, or by their kind
                if isinstance(options, dict):
                    factor = options.get("factor") or 1
                    before = options.get("original_max_position_embeddings") or 0
                    positions = max(positions, int(before * factor))
        vocabulary = getattr(config, "vocab_size", None)
        return cls(positions, vocabulary if isinstance(vocabulary, int) and vocabulary > 0 else None)


NO_LIMITS = Limits()


def unknown_token(token: object, id: int, vocabulary: int) -> DataError:
    """The error for a text with a token that the model has no embedding for."""
    return DataError(
        f"The text has a token that the model does not know: {token!r}.",
        f"Its id is {id}, and the model has {vocabulary} embeddings: the tokenizer is not the model's.",
        "Leave it out, or use the tokenizer that the model was trained with.",
    )

"""The limits of a model's input: how many tokens, and which token ids."""

from __future__ import annotations

from typing import Any, NamedTuple

from deltamem_tool.errors import DataError


class Limits(NamedTuple):
    """The limits of one context.

    Args:
        positions: maximum number of tokens; None if there is no limit.
        vocabulary: number of rows of the embedding, so that token ids are below it; None if the config does not say.
    """

    positions: int | None = None
    vocabulary: int | None = None

    @classmethod
    def from_config(cls, config: Any) -> Limits:
        """Return the limits in a transformers config.

        Beyond the limit, learned positions raise an error and rotary ones give nonsense. If a config extends the
        context, with YaRN for example, `max_position_embeddings` is the length before in some and after in others.
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
    """Return the error for a text with a token that the model has no embedding for."""
    return DataError(
        f"The text has a token that the model does not know: {token!r}.",
        f"Its id is {id}, and the model has {vocabulary} embeddings: the tokenizer is not the model's.",
        "Leave it out, or use the tokenizer that the model was trained with.",
    )

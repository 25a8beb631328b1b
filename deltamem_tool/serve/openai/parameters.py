"""The parameters of OpenAI's API: which of them have an effect, and how the others are answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from deltamem_tool.chat.sampling import MAX_NEW_TOKENS, Sampling
from deltamem_tool.segments.messages import Message
from deltamem_tool.serve.body import AS_INTEGER, Body
from deltamem_tool.serve.errors import RequestError
from deltamem_tool.serve.names import MemoryName
from deltamem_tool.serve.request_memory import MemoryOptions

MAX_STOP = 16
MAX_SEED = 2**63 - 1
MAX_MESSAGES = 256  # per request; half of `fed.MAX_DIGESTS`

KEY_HEADER = "idempotency-key"  # a client repeats it when it sends the request again

MaxTokens = Annotated[int, Field(ge=1, le=2**31), AS_INTEGER]

# Parameters that are accepted only with these values, which have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "max_tool_calls": (),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt": (),
    "reasoning": ({},),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Hints for OpenAI's servers about prompt caching and safety. They do not change the answer.
HINTS = ("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier")


def idempotency_key(headers: Mapping[str, str]) -> str | None:
    """Return the idempotency key of a request. An empty one, which any number of requests may have, counts as none."""
    return headers.get(KEY_HEADER) or None


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class ChatMessage(Body):
    """A message. Fields that OpenAI's client adds to an answer can be sent back if they are empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def message(self) -> Message:
        """Return the message as a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({} if self.name is None else {"name": self.name})


class StreamOptions(Body):
    """The contents of a stream. `include_obfuscation` is accepted without effect."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingOptions(Body):
    """Options for sampling an answer."""

    temperature: float | None = Field(default=None, ge=0, le=2, description="By default 0: the likeliest token.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=0, le=2**31), AS_INTEGER] | None = None
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED), AS_INTEGER] | None = None

    def sampling(self, max_new_tokens: int | None, stop: str | list[str] | None = None) -> Sampling:
        """Return these options together with the end of the answer."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
        seed = None if self.seed is None else self.seed % 2**64
        return Sampling(max_new_tokens or MAX_NEW_TOKENS, seed=seed, stop=stops, **options)


class AnswerRequest(SamplingOptions):
    """The fields that the bodies of chat completions and responses have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: MemoryName | None = Field(default=None, description="The memory. None: it starts from zeros and is not kept.")
    memory: MemoryOptions | None = None


def check_last_message(messages: list[Message]) -> None:
    """Check that the request asks something.

    Raises:
        RequestError: the last message is the assistant's, or there are only system messages.
    """
    if messages[-1]["role"] != "user":
        raise RequestError(
            "The last message is not a user message.",
            "The server answers the last message. It does not continue an answer that was begun.",
            "End with a message of the role user.",
            code="invalid_value",
            param="messages",
        )


def effective_parameters(body: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Return the parameters of `body` that have an effect, without nulls and without values that change nothing.

    Raises:
        RequestError: a parameter would change something but is not supported.
    """
    honoured = {}
    for name, value in body.items():
        if value is None or (name in HINTS and name not in known):
            continue
        if name in known or name not in NEUTRAL:
            honoured[name] = value
        elif not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            accepted = " or ".join(map(repr, NEUTRAL[name]))
            raise RequestError(
                f"{name} is not supported.",
                f"The only accepted value is {accepted}." if accepted else "",
                "Leave it out.",
                code="unsupported_parameter",
                param=name,
            )
    return honoured


def _same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)

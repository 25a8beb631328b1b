"""Convert text to tokens and back without transformers: tokenizer.json, the chat template, and streamed text."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from deltamem_tool.errors import DataError, ExportError
from deltamem_tool.io.formats import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from deltamem_tool.io.safe_json import read_bytes, read_text
from deltamem_tool.io.safe_json import read_json as read_any
from deltamem_tool.segments.messages import Message, check_unicode
from deltamem_tool.segments.template import ChatTemplate, Refusal

MAX_TOKENIZER_BYTES = 256 * 2**20  # the largest that we know, of 260,000 tokens, is of 33 MB


class ChatText:
    """A tokenizer and a chat template, which turn a model's messages into tokens.

    Args:
        tokenizer: tokenizer of the tokenizers package. It must not be shared, because truncation and padding are
            disabled on it.
        template: source of the chat template; None if the model only takes plain text.
        special_tokens: variables of the template, such as `bos_token`.

    Raises:
        ExportError: the template is not valid Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, special_tokens: Mapping[str, str]) -> None:
        tokenizer.no_truncation()  # a tokenizer.json keeps what its last user had set
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        try:
            self._template = None if template is None else _environment().from_string(template)
        except Exception as error:  # a template is a program of others: the reader of such programs raises anything
            raise _damaged_error("The chat template", error) from error

    @classmethod
    def from_folder(cls, folder: Path) -> ChatText:
        """Load the tokenizer and the template of an ONNX folder.

        Raises:
            ExportError: a file cannot be read.
        """
        try:
            tokenizer = Tokenizer.from_buffer(read_bytes(folder / TOKENIZER_FILE, MAX_TOKENIZER_BYTES))
        except Exception as error:  # the tokenizers package raises nothing narrower
            raise _damaged_error(TOKENIZER_FILE, error) from error
        options = read_json(folder / TOKENIZER_CONFIG_FILE)
        file = folder / CHAT_TEMPLATE_FILE
        try:
            source = read_text(file) if file.is_file() else _default(options.get("chat_template"))
        except ValueError as error:
            raise _damaged_error("The chat template", error) from error
        contents = {
            name: token.get("content") if isinstance(token, dict) else token
            for name, token in options.items()
            if name.endswith("_token")
        }
        special_tokens = {name: content for name, content in contents.items() if isinstance(content, str)}
        return cls(tokenizer, source, special_tokens)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> ChatText:
        """Use the tokenizer and the template of a fast transformers tokenizer.

        Raises:
            DataError: the tokenizer is not a fast one.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"A conversation cannot use a {type(tokenizer).__name__}.",
                "It is a slow tokenizer: it has no tokenizer.json.",
                "Use a fast tokenizer.",
            )
        special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if token}
        # A copy, because other users of the tokenizer change its truncation, padding and splitting.
        independent = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        return cls(independent, _default(tokenizer.chat_template), special_tokens)

    @cached_property
    def ids(self) -> frozenset[int]:
        """The ids of all tokens."""
        return frozenset(self.tokenizer.get_vocab(with_added_tokens=True).values())

    @cached_property
    def _end_tokens(self) -> frozenset[int]:
        """The tokenizer's end of a text, and the token with which the template ends an answer."""
        ids = [self.tokenizer.token_to_id(self._special_tokens.get("eos_token", ""))]
        if self.has_template:
            # Of what the template writes as plain text, nothing can be told from an answer.
            ids += [id for id in self.encode(self.template.closing().lstrip())[:1] if id in self._added_tokens]
        return frozenset(id for id in ids if id is not None)

    @cached_property
    def _added_tokens(self) -> Collection[int]:
        return self.tokenizer.get_added_tokens_decoder().keys()

    def stop_tokens(self, configured: int | Sequence[int] | None) -> frozenset[int]:
        """Return the token ids that end an answer.

        Args:
            configured: `eos_token_id` of the model's generation config. Many configs only name the end of a text, and
                not the token with which the chat template ends a message.
        """
        ids = [] if configured is None else [configured] if isinstance(configured, int) else configured
        return self._end_tokens | frozenset(ids)

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def render(self, messages: Sequence[Message], generation_prompt: bool = True) -> str:
        """Render the conversation as text; with `generation_prompt`, up to where the assistant speaks next.

        Raises:
            ExportError: there is no template, or it rejects the messages.
            DataError: a message has no role or no text, or the template leaves out a part of the messages.
        """
        if self._template is None:
            raise ExportError(
                "This model does not take messages.", "It has no chat template.", "Give it plain text instead."
            )
        try:
            return self.template.render(messages, generation_prompt)
        except Refusal as error:
            raise ExportError(
                "The chat template refuses the messages.", error.why, "Change the roles or their order."
            ) from error

    @cached_property
    def template(self) -> ChatTemplate:
        """The template, with what is learned about it by rendering."""
        return ChatTemplate("this model", self._write)

    def _write(self, messages: Sequence[Message], generation_prompt: bool, **template_kwargs: Any) -> str:
        assert self._template is not None
        known = {**self._special_tokens, **template_kwargs}
        return self._template.render(messages=messages, add_generation_prompt=generation_prompt, **known)

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Return token ids. `special_tokens` lets the tokenizer add its own, which templates write themselves.

        Raises:
            DataError: the text is not valid Unicode.
        """
        check_unicode(text, "The text")
        return self.tokenizer.encode(text, add_special_tokens=special_tokens).ids


class TextStream:
    """Converts tokens to text incrementally. A character appears only when all of its bytes are known.

    `tokenizers.decoders.DecodeStream` raises if a tokenizer with byte fallback gets bytes that are not UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # from here on tokens are decoded: what was given last stays as context for what follows
        self._end = 0  # the tokens before this one have come out

    def push(self, *tokens: int) -> str:
        """Return the text that `tokens` complete, which is often empty."""
        self._tokens += tokens
        return self._new(hold=True)

    def flush(self) -> str:
        """Return the remaining text when no more tokens follow."""
        return self._new(hold=False)

    def _new(self, hold: bool) -> str:
        before = self._tokenizer.decode(self._tokens[self._start : self._end])
        text = self._tokenizer.decode(self._tokens[self._start :])
        if hold and (len(text) <= len(before) or text.endswith("\ufffd")):
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return text[len(before) :]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from an ONNX folder; empty if there is no such file.

    Raises:
        ExportError: the file is not JSON, or not a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        content = read_any(file, finite=False)  # transformers writes Infinity
    except ValueError as error:
        raise _damaged_error(file.name, error) from error
    if not isinstance(content, dict):
        raise _damaged_error(file.name, "it is not a JSON object")
    return content


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The template language as transformers has it: templates come from the Hub and run in a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _default(template: Any) -> str | None:
    """The template among what a tokenizer has: one string, or several of which one is called default."""
    if isinstance(template, list):
        template = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
    source = template.get("default") if isinstance(template, dict) else template
    return source if isinstance(source, str) else None


def _damaged_error(part: str, why: object) -> ExportError:
    return ExportError(f"{part} of this ONNX folder cannot be read.", f"{why}.", "Export the model again.")

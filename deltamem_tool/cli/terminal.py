"""Terminal input with editing, history and completion of commands (prompt_toolkit); plain lines on a dumb terminal."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.utils import is_dumb_terminal

from deltamem_tool.chat.repl import Command
from deltamem_tool.cli.termination import termination_signals

HISTORY_FILE = "chat_history"


class Reader:
    """Reads lines from a terminal.

    Args:
        commands: completed after a `/`.
        history: a file that keeps lines from one chat to the next, readable by its owner alone; None keeps none.

    Raises:
        OSError: the history file cannot be written.
    """

    def __init__(self, commands: Mapping[str, Command], history: Path | None) -> None:
        self.was_empty = True
        self._session: PromptSession[str] | None = None
        if is_dumb_terminal():  # such as a buffer of Emacs, which knows no escape codes
            return
        self._session = PromptSession(
            history=InMemoryHistory() if history is None else _private_history(history),
            completer=CommandCompleter(commands),
            complete_while_typing=Condition(_is_command),  # room for the menu is kept only then
            prompt_continuation="  ",
            key_bindings=_bindings(),
            output=create_output(always_prefer_tty=True),  # the prompt is no part of answers that go to a file
        )

    def read(self) -> str:
        """The next line, or several where they were pasted or typed with Alt-Enter.

        Raises:
            EOFError: Ctrl-D in an empty line.
            KeyboardInterrupt: Ctrl-C; `was_empty` says whether nothing had been typed.
        """
        if self._session is None:
            return _line()
        handlers = {number: signal.getsignal(number) for number in termination_signals()}
        try:
            line = self._session.prompt([("ansicyan bold", "> ")], pre_run=partial(_handle_signals, handlers))
        except KeyboardInterrupt:
            self.was_empty = not self._session.default_buffer.text
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return line.encode("utf-8", "replace").decode()  # bytes that were no UTF-8 come as lone surrogates


def _handle_signals(handlers: Mapping[int, Any]) -> None:
    """Handle signals between two steps of the event loop: raised within one, prompt_toolkit would print a traceback."""

    def end(number: int, handler: Callable[[int, None], object]) -> None:
        try:
            handler(number, None)
        except KeyboardInterrupt as interrupt:
            app = get_app()
            if app.future is not None and not app.future.done():
                app.exit(exception=interrupt)

    for number, handler in handlers.items():
        if callable(handler):
            asyncio.get_running_loop().add_signal_handler(number, end, number, handler)


def _line() -> str:
    """The next line of stdin, which its terminal edits."""
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode(sys.stdin.encoding, "replace").rstrip("\r\n")


def history_file() -> Path:
    """Return the file that keeps the lines of all chats, where the operating system wants it."""
    return platformdirs.user_state_path("deltamem", appauthor=False) / HISTORY_FILE


def _private_history(file: Path) -> History:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    file.chmod(0o600)
    return FileHistory(str(file))


def _is_command() -> bool:
    return get_app().current_buffer.text.startswith("/")


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class CommandCompleter(Completer):
    """Completes names of commands, and files after those that take one."""

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self._commands = commands
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield completions of the text before the cursor."""
        text = document.text_before_cursor
        name, space, argument = text.partition(" ")
        if not text.startswith("/"):
            return
        if not space:
            for known, command in self._commands.items():
                if known.startswith(name):
                    yield Completion(known, -len(name), display_meta=command.help)
        elif name in self._commands and self._commands[name].argument == "FILE":
            yield from self._files.get_completions(Document(argument), complete_event)

"""The commands and turns of an interactive chat, independent of where its lines come from.

A line that begins with `/` is a command; any other line is a turn. With a memory file, the memory is written after
every line that changes it: to that file, or to a file beside it if that file holds another memory.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from deltamem_tool.chat.answer_output import AnswerOutput
from deltamem_tool.chat.conversation import Conversation, turn_content
from deltamem_tool.chat.generation import INTERRUPTED, LENGTH
from deltamem_tool.errors import ConfigError, DeltaMemError, MemoryStateError, domain_error
from deltamem_tool.io.atomic import check_writable, resolve
from deltamem_tool.io.names import expand_user
from deltamem_tool.memory.file import check_replaceable
from deltamem_tool.memory.shared_file import MemoryConflict, SharedMemoryFile
from deltamem_tool.segments.messages import BYTE_ORDER_MARK

if TYPE_CHECKING:
    from deltamem_tool.chat.generation import Answer
    from deltamem_tool.chat.sampling import Sampling

# What a model says must not steer the terminal: control characters but newline and tab, and C1.
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


class Chat:
    """The turns and commands of one chat.

    Args:
        conversation: generates the answers.
        sampling: options for the answers.
        system: system message before the first turn.
        memory_file: written after every line that changes the memory. A memory loaded from another file is written to a
            file beside it.
        out: output for answers and for results of commands.
        notices: output for everything else, such as saved files and failures.
    """

    def __init__(
        self,
        conversation: Conversation,
        sampling: Sampling,
        system: str | None = None,
        memory_file: SharedMemoryFile | None = None,
        out: Console | None = None,
        notices: Console | None = None,
    ) -> None:
        self.conversation = conversation
        self.over = False
        self.failures = 0  # lines that did not do what they asked for
        self.interrupted = False  # whether the last answer was stopped by hand
        self._sampling = sampling
        self._system = system
        self._given_file = memory_file
        self._memory_file = memory_file  # or one beside it
        self._done: list[_Load | None] = []  # what /undo can take back; None is a turn
        self._out = out or Console()
        self._notices = notices or Console(stderr=True)

    def handle(self, line: str) -> None:
        """Execute `line`. Errors are printed and counted, and the chat continues."""
        self.interrupted = False
        text = line.removeprefix(BYTE_ORDER_MARK).strip()
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._command(text)
            elif text:
                self._turn(text[1:] if text.startswith("//") else text)
        except Exception as error:
            user_error = domain_error(error)
            if user_error is None:
                raise
            self._fail(user_error)

    def notice(self, text: str) -> None:
        """Print a line that is not part of the conversation."""
        self._notices.print(Text(text, style="dim"), soft_wrap=True)

    def _save_memory(self) -> None:
        """Write the memory file, where there is one.

        Raises:
            MemoryStateError: it cannot be written, or another program has changed it.
        """
        if self._memory_file is None:
            return
        try:
            try:
                self._memory_file.write(self.conversation.memory)
            except KeyboardInterrupt:  # stops an answer, not the save that follows it
                self.interrupted = True
                self._memory_file.write(self.conversation.memory)
        except MemoryConflict as conflict:
            self._memory_file = conflict.beside
            raise
        except Exception as error:
            user_error = domain_error(error)
            if user_error is None:
                raise
            raise MemoryStateError(
                f"{self._memory_file.path} could not be written and is unchanged.",
                f"{user_error.what} {user_error.why}".strip(),
                "The next turn tries again. /save FILE writes to another file.",
            ) from error

    def _try_to_save(self) -> DeltaMemError | None:
        """Write the memory file, and return what went wrong."""
        try:
            self._save_memory()
        except DeltaMemError as error:
            return error
        return None

    def _turn(self, text: str) -> None:
        content = turn_content(self.conversation, text, self._system)
        dropped = self.conversation.context.dropped
        output = AnswerOutput(self._write)
        try:
            answer = self.conversation.generate(content, self._sampling, on_text=output)
        except KeyboardInterrupt:  # before the message was read, or a second one: one in the answer is taken inside
            self.interrupted = True
            self.notice("\nStopped. This turn is not part of the conversation.")
            return
        self.interrupted = answer.why == INTERRUPTED
        self._done.append(None)
        problem = self._try_to_save()
        try:
            output.end()
            self._report_end(answer, self.conversation.context.dropped - dropped)
        finally:  # which may be said where the answer could not be shown
            if problem is not None:
                self._fail(problem)

    def _report_end(self, answer: Answer, dropped: int) -> None:
        """Say how the answer ended; `dropped` messages left the context for it."""
        if answer.why == INTERRUPTED:
            self.notice("Stopped. What was said is part of the conversation.")
        elif answer.why == LENGTH:
            self.notice(
                f"Cut after {_count(len(answer.tokens), 'token')}: --max-new-tokens is reached, or the window is full."
            )
        if dropped > 0:
            self.notice(f"{_count(dropped, 'message')} left the window; the memory keeps a trace.")

    def _write(self, piece: str) -> None:
        self._out.file.write(piece.translate(_CONTROL) if self._out.is_terminal else piece)
        self._out.file.flush()

    def _show(self, *parts: RenderableType) -> None:
        self._out.print(*parts)

    def _fail(self, error: DeltaMemError) -> None:
        self.failures += 1
        self._notices.print(Text(error.what, style="red"), soft_wrap=True)
        for line in (error.why, error.next):
            if line:
                self._notices.print(Text(line), soft_wrap=True)

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.7)
            raise ConfigError(
                f"There is no command {name}.",
                f"Did you mean {near[0]}?" if near else "",
                "/help lists the commands. To send a message that begins with /, type // instead.",
            )
        argument = argument.strip()
        if argument and not command.argument:
            raise ConfigError(f"{name} takes no argument.", "", f"Type {name} alone.")
        if not argument and command.argument and not command.argument.startswith("["):
            raise ConfigError(f"{name} needs a file.", "", f"Type {name} {command.argument}.")
        command.run(self, argument)

    def _save(self, argument: str) -> None:
        path = expand_user(argument)
        check_replaceable(path)
        check_writable(path)
        if self._memory_file is not None and self._memory_file.is_at(path):
            self._save_memory()
        elif self._given_file is not None and self._given_file.is_at(path):
            self._given_file.write(self.conversation.memory, replace=True)
            self._memory_file = self._given_file
        else:
            self.conversation.save_memory(path)
        self.notice(f"Saved to {path}.")

    def _load(self, argument: str) -> None:
        path, former, given = expand_user(argument), self._memory_file, self._given_file
        is_given = given is not None and given.is_at(path)
        self.conversation.load_memory(path)
        self._done.append(_Load(former))
        self.notice(f"The memory is now that of {path}; the context is unchanged.")
        if is_given:
            self._given_file = self._memory_file = self.conversation.loaded[resolve(path)]
        elif given is not None:
            self._memory_file = given.beside()
            self.notice(f"From now on it is saved to {self._memory_file.path}, and {given.path} stays unchanged.")

    def _forget(self, _: str) -> None:
        self.conversation.forget()
        self._done.clear()
        try:
            self._save_memory()
        finally:
            self.notice("The memory and the context are empty.")

    def _undo(self, _: str) -> None:
        if not self.conversation.undo():
            raise ConfigError("There is nothing to undo.", "No turns are left.", "/forget empties the memory.")
        load = self._done.pop() if self._done else None
        if load is not None:
            self._memory_file = load.memory_file
        try:
            self._save_memory()
        finally:
            self.notice(f"The last {'turn' if load is None else '/load'} is undone, in the context and in the memory.")

    def _memory(self, argument: str) -> None:
        from deltamem_tool.memory.heatmap import heat_maps, norm_bars, strongest_layer

        memory = self.conversation.memory
        states = {layer: state[0] for layer, state in memory.states.items()}
        if argument and argument not in map(str, states):
            raise ConfigError(
                f"No layer {argument} has a memory.", f"There are {', '.join(map(str, states))}.", "Name one of these."
            )
        layer = int(argument) if argument else strongest_layer(states)
        self._show(norm_bars(states))
        if not any(state.any() for state in states.values()):
            self.notice("The memory is empty.")
        else:
            self._show(heat_maps(layer, states[layer]))
        if memory.open_segments:
            waiting = int(next(iter(memory.open_segments.values()))[0, -1])  # a segment's last number counts its tokens
            segment = self.conversation.engine.mechanism.granularity
            self.notice(f"{_count(waiting, 'token')} will be written when the {segment} ends.")

    def _context(self, _: str) -> None:
        context = self.conversation.context
        table = Table(box=None, show_header=False, pad_edge=False)
        window = f"{context.tokens:,} of {context.window:,}" if context.window else f"{context.tokens:,}; no limit"
        table.add_row("tokens in the window", window)
        table.add_row("messages in view", str(context.messages))
        table.add_row("messages dropped", str(context.dropped))
        self._show(table)

    def _help(self, _: str) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, command in COMMANDS.items():
            table.add_row(Text(f"{name} {command.argument}".strip()), Text(command.help))
        self._show(table)

    def _quit(self, _: str) -> None:
        self.over = True


class _Load(NamedTuple):
    """A memory loaded that can be taken back; `memory_file` was written before."""

    memory_file: SharedMemoryFile | None


@dataclass(frozen=True)
class Command:
    """A line that begins with `/`.

    Args:
        help: description of the command.
        run: called with the chat and the argument.
        argument: name of the argument, in brackets if it is optional; empty if there is none.
    """

    help: str
    run: Callable[[Chat, str], None]
    argument: str = ""


COMMANDS = {
    "/save": Command("Write the memory to a file.", Chat._save, "FILE"),
    "/load": Command("Load the memory from a file.", Chat._load, "FILE"),
    "/forget": Command("Empty the memory and the context; this cannot be undone.", Chat._forget),
    "/undo": Command("Undo the last turn or /load, in the context and in the memory.", Chat._undo),
    "/memory": Command("Show norms by layer, and a heat map of LAYER or the strongest.", Chat._memory, "[LAYER]"),
    "/context": Command("Show how much of the conversation is in the context.", Chat._context),
    "/help": Command("Show this list.", Chat._help),
    "/quit": Command("Quit; so does Ctrl-D.", Chat._quit),
}  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

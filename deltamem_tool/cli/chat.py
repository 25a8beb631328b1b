"""`deltamem chat`: chat with an adapter in PyTorch, or with an ONNX folder in ONNX Runtime."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamem_tool.cli.engines import (
    TENSOR_PARALLEL,
    check_runtime_options,
    follow_engine,
    is_follower,
    onnx_engine,
    torch_engine,
)
from deltamem_tool.cli.options import (
    NAME,
    TEXT,
    UserPath,
    allow_other_base,
    device,
    sampling_options,
    trust_remote_code,
    window,
)
from deltamem_tool.cli.termination import is_terminated
from deltamem_tool.errors import DataError
from deltamem_tool.io.atomic import check_writable
from deltamem_tool.onnx.locate import is_onnx

if TYPE_CHECKING:
    from deltamem_tool.chat.repl import Chat
    from deltamem_tool.cli.terminal import Reader


@click.command("chat")
@click.argument("model", type=NAME)
@click.option(
    "--memory",
    "memory_file",
    type=UserPath(dir_okay=False, path_type=Path),
    help="Memory file to start from. It is written after every turn, and created if it does not exist.",
)
@window
@click.option("--system", type=TEXT, help="System message before the first turn.")
@sampling_options
@click.option("--base", type=NAME, help="Folder or Hub id of an adapter's base model, if not the recorded one.")
@allow_other_base
@trust_remote_code
@device
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), help="Execution provider for an ONNX folder.  [default: cpu]"
)
@click.option("--no-history", is_flag=True, help="Do not keep a history file of the lines you type.")
def command(
    model: str,
    memory_file: Path | None,
    window: int | None,
    system: str | None,
    base: str | None,
    allow_other_base: bool,
    trust_remote_code: bool,
    device: str | None,
    provider: str | None,
    no_history: bool,
    **sampling: Any,
) -> None:
    """Chat with MODEL: an adapter (folder, Hub id or builtin:adapter) in PyTorch, or an ONNX folder in ONNX Runtime.

    In the chat, /help lists the commands, Ctrl-C stops an answer, and Ctrl-D leaves. If stdin is not a terminal, each
    of its lines is one message, and only the answers go to stdout.

    Example: deltamem chat builtin:adapter --memory me.safetensors
    """
    for_onnx = is_onnx(model)
    for_adapter = {"base": base, "allow_other_base": allow_other_base, "trust_remote_code": trust_remote_code}
    check_runtime_options(for_onnx, provider, **for_adapter, device=device)
    if is_follower(device):
        follow_engine(model, for_adapter)
        return
    if memory_file is not None:
        check_writable(memory_file)

    from deltamem_tool.chat.conversation import Conversation, Sampling
    from deltamem_tool.chat.repl import Chat
    from deltamem_tool.cli.console import SPINNER, STDERR, STDOUT
    from deltamem_tool.memory.shared_file import SharedMemoryFile

    chosen = Sampling(**sampling)
    file = None if memory_file is None else SharedMemoryFile(memory_file)
    if file is not None:
        file.read()  # what is wrong with it is an error before the model loads
    with STDERR.status("Loading the model", spinner=SPINNER):
        engine = onnx_engine(model, provider) if for_onnx else torch_engine(model, device, for_adapter)
        memory = None if file is None else file.read()  # another program may have written meanwhile
        conversation = Conversation(engine, memory, window=window)
    chat = Chat(conversation, chosen, system, file, out=STDOUT, notices=STDERR)
    if file is not None:
        if memory is None:
            file.write(conversation.memory)  # a disk that is full says so now
        chat.notice(f"{file.path} is {'new' if memory is None else 'loaded'}, and written after every turn.")
    if sys.stdin.isatty():
        _talk(chat, _reader(chat, no_history), goes_on=device != TENSOR_PARALLEL)
    else:
        _pipe(chat)
        if chat.failures:
            sys.exit(1)


def _reader(chat: Chat, no_history: bool) -> Reader:
    from deltamem_tool.chat.repl import COMMANDS
    from deltamem_tool.cli.terminal import Reader, history_file

    if no_history:
        return Reader(COMMANDS, None)
    try:
        return Reader(COMMANDS, history_file())
    except OSError as error:
        chat.notice(f"No history is kept: {history_file()} cannot be written ({error.strerror}).")
        return Reader(COMMANDS, None)


def _talk(chat: Chat, reader: Reader, goes_on: bool) -> None:
    """Lines from a terminal, until it is over.

    Args:
        chat: what takes them.
        reader: where they come from.
        goes_on: whether the chat does after Ctrl-C in an answer. A launcher ends its processes then, soon.
    """
    chat.notice(f"/help lists the commands. Ctrl-C stops an answer{'' if goes_on else ' and leaves'}, Ctrl-D leaves.")
    while not chat.over and not is_terminated() and (goes_on or not chat.interrupted):
        try:
            line = reader.read()
        except EOFError:
            break
        except KeyboardInterrupt:
            if reader.was_empty:
                chat.notice("Ctrl-D or /quit leaves.")
            continue
        try:
            chat.handle(line)
        except KeyboardInterrupt:
            chat.notice("Stopped.")
            if not goes_on:
                break


def _pipe(chat: Chat) -> None:
    """Lines from a file or another program; whoever interrupts an answer there means all of it."""
    try:
        for line in sys.stdin.buffer:  # as bytes: what is no text costs no line before it
            chat.handle(line.decode())
            if chat.interrupted:
                raise KeyboardInterrupt
            if chat.over:
                break
    except UnicodeDecodeError as error:
        raise DataError("stdin is not UTF-8 text.", f"{error}.", "Convert it first.") from error

"""Draw a session of `deltamem chat`, typed line by line in a terminal, for docs/chat.svg.

    printf '%s\n' 'My dog is Rex.' '/forget' | python scripts/chat_picture.py docs/chat.svg onnx --memory me.safetensors

The arguments after the name of the picture are passed to `deltamem chat`. Needs `pip install pexpect pyte`.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from itertools import groupby

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

PROMPT = "> "
WIDTH, HEIGHT = 96, 200
SECONDS = 0.5  # without output, after which a program that shows its prompt is waiting for a line


class Terminal(pyte.Screen):
    """The terminal of a program: it draws the output and answers queries to the terminal."""

    def __init__(self, program: pexpect.spawn) -> None:
        super().__init__(WIDTH, HEIGHT)
        self.program, self.stream = program, pyte.Stream(self)

    def write_process_input(self, data: str) -> None:
        """Answer the program's query for the position of the cursor."""
        self.program.send(data)

    def read_to_prompt(self) -> None:
        """Draw until the program waits for a line."""
        while True:
            try:
                self.stream.feed(self.program.read_nonblocking(4096, SECONDS))
            except pexpect.TIMEOUT:
                if self.display[self.cursor.y].rstrip() == PROMPT.rstrip():
                    return

    def drawn(self) -> list[Text]:
        """Return the drawn lines, except for the cursor's."""
        return [self._line(y) for y in range(self.cursor.y)]

    def _line(self, y: int) -> Text:
        line = Text()
        for style, chars in groupby((self.buffer[y][x] for x in range(self.columns)), _style):
            line.append("".join(char.data for char in chars), style)
        line.rstrip()
        return line


def _style(char: pyte.screens.Char) -> Style:
    return Style(color=_colour(char.fg), bgcolor=_colour(char.bg), bold=char.bold, reverse=char.reverse)


def _colour(name: str) -> str | None:
    """Convert a colour name of pyte to one of rich; None for the terminal's default."""
    if name == "default":
        return None
    if len(name) == 6 and set(name) <= set("0123456789abcdef"):
        return f"#{name}"
    return name.replace("bright", "bright_").replace("brown", "yellow")


def main() -> None:
    picture, *arguments = sys.argv[1:]
    able = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    program = pexpect.spawn("deltamem", ["chat", *arguments], dimensions=(HEIGHT, WIDTH), encoding="utf-8", env=able)
    terminal = Terminal(program)
    terminal.read_to_prompt()
    for line in sys.stdin.read().splitlines():
        program.send(line + "\r")
        terminal.read_to_prompt()
    program.close()
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    console.print(f"$ deltamem chat {shlex.join(arguments)}\n", highlight=False)
    for line in terminal.drawn():
        console.print(line, no_wrap=True)
    console.save_svg(picture, title="deltamem chat")


if __name__ == "__main__":
    main()

"""Draw a talk with `deltamem chat`, typed in a terminal line by line, as docs/chat.svg shows one.

    printf '%s\n' 'My dog is Rex.' '/forget' | python scripts/chat_picture.py docs/chat.svg onnx --memory me.safetensors

What comes after the picture's name goes to `deltamem chat`. Needs `pip install pexpect pyte`.
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
SECONDS = 0.5  # of silence after which a program that shows its prompt waits for a line


class Terminal(pyte.Screen):
    """The terminal of a program: draws what it prints, and answers what it asks of a terminal."""

    def __init__(self, program: pexpect.spawn) -> None:
        super().__init__(WIDTH, HEIGHT)
        self.program, self.stream = program, pyte.Stream(self)

    def write_process_input(self, data: str) -> None:
        """Answer the program, which asks where its cursor is."""
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
        """What is drawn, down to the line before the cursor's."""
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
    """A colour of pyte's in rich's words; None for the terminal's own."""
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

"""Reconstruct a command line as the user typed it, so that others can repeat it."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource


def command_line(context: click.Context) -> list[str]:
    """The words of the running command, options by their long names; of a path, the last part."""
    from deltamem_tool.evaluation.run_info import without_folders

    words = context.command_path.split()
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        setting = context.params[name]
        several: list[Any] = list(setting) if isinstance(setting, list | tuple) else [setting]
        for value in several:
            if isinstance(parameter, click.Option):
                words.append(parameter.opts[-1])
                if parameter.is_flag:
                    continue
            words.append(without_folders(str(value)))
    return words

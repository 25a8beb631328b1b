"""Options that several commands share."""

import click

trust_remote_code = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python files of the base model, where its architecture is one."
)

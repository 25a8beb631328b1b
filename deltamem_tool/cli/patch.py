"""`deltamem patch`: create a new adapter for a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from deltamem_tool.cli.options import NAME, SEED, UserPath, json_option, trust_remote_code
from deltamem_tool.config import DELTA_INITS, DELTA_SCALES, GATES, GRANULARITIES, PRESETS, UPDATE_RULES, DeltaMemConfig

_DEFAULTS = DeltaMemConfig()


def _option(
    flags: str, help: str, choices: tuple[str, ...] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return an option of the mechanism, with the default that it has in `DeltaMemConfig`."""
    default_value = getattr(_DEFAULTS, flags.split("/")[0].removeprefix("--").replace("-", "_"))
    default = ",".join(default_value) if isinstance(default_value, tuple) else default_value
    kind = click.Choice(choices) if choices else None
    return click.option(flags, type=kind, default=default, show_default=True, help=help)


@click.command()
@click.argument("base", type=NAME)
@click.option("--out", required=True, type=UserPath(), help="Adapter folder to write.")
@click.option("--revision", help="Branch, tag or commit of BASE on the Hub.")
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), help="Start from the paper's settings; other options override them."
)
@_option("--rank", "Rank of a state, which is a rank × rank matrix: 1 to 64.")
@_option("--state-heads", "Number of states per layer: 1 is the paper's TSW, 4 its MSW.")
@_option("--branches", "Attention projections to correct, out of q,k,v,o.")
@click.option("--heads", hidden=True, help="Old name of --branches.")
@_option("--layers", "Decoder layers that get a memory: all, front:12, middle:12, back:12, or 0,1,2 …")
@_option("--alpha", "Corrections are scaled by alpha / rank.")
@_option("--granularity", "Unit that is written at once; message is the paper's SSW.", GRANULARITIES)
@_option("--update-rule", "How the gates λ and β keep, erase and write.", UPDATE_RULES)
@_option("--couple-lambda/--own-lambda", "Use 1 − β for λ, or a separate projection.")
@_option("--gates", "Use one gate per row of a state, or one per head.", GATES)
@_option("--beta-bias", "Initial bias of the write gate β.")
@_option("--delta-init", "Initial value of Δ; with zero the model computes what BASE does.", DELTA_INITS)
@_option("--delta-scale", "Learn a scale for the corrections per layer or branch, or keep it fixed.", DELTA_SCALES)
@_option("--delta-scale-init", "Initial value of a learned scale.")
@_option("--delta-scale-max", "Upper bound of a learned scale.")
@_option("--o-norm/--no-o-norm", "Apply RMSNorm to the correction of the o branch.")
@_option("--o-norm-eps", "Epsilon of that RMSNorm.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed for the initial weights.")
@trust_remote_code
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    base: str,
    out: str,
    revision: str | None,
    preset: str | None,
    seed: int,
    trust_remote_code: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Create a new adapter for the checkpoint BASE (a folder, a GGUF file or a Hub id).

    Only a few columns of BASE's weights are read. With --delta-init zero, the model with the adapter computes exactly
    what BASE does until the adapter is trained.
    """
    heads = options.pop("heads")
    if heads is not None:
        click.echo("--heads is called --branches now.", err=True)
    options["branches"] = tuple((heads or options["branches"]).split(","))
    options["layers"] = _layers(options["layers"])
    by_default = click.core.ParameterSource.DEFAULT
    chosen = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) != by_default or (name == "branches" and heads is not None)
    }
    config = DeltaMemConfig.preset(preset, **chosen) if preset else DeltaMemConfig(**options)

    import torch

    from deltamem_tool.adapter.create import create_adapter
    from deltamem_tool.cli.console import quiet_libraries

    quiet_libraries()
    torch.manual_seed(seed)
    folder = create_adapter(base, config, out, revision, overwrite, trust_remote_code)
    if as_json:
        result = {"adapter": str(out), "parameters": folder.num_parameters(), "base": asdict(folder.base)}
        click.echo(json.dumps(result))
    else:
        click.echo(f"{folder.num_parameters():,} parameters in {out}, for {folder.base.name}.")
        click.echo(f"Next: deltamem inspect {out}, or train it with a recipe (`deltamem train --help`).")


def _layers(text: str) -> str | tuple[int, ...]:
    """Parse a list of indices; leave the name of a part to the config."""
    if not text[:1].isdigit():
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"{text!r} is neither a list such as 0,1,2 nor all, front:N, middle:N or back:N"
        raise click.BadParameter(message, param_hint="--layers") from None

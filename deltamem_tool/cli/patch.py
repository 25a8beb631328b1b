"""`deltamem patch`: a fresh adapter for a checkpoint."""

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
    """Return an option of the mechanism, with its default of `DeltaMemConfig`."""
    default_value = getattr(_DEFAULTS, flags.split("/")[0].removeprefix("--").replace("-", "_"))
    default = ",".join(default_value) if isinstance(default_value, tuple) else default_value
    kind = click.Choice(choices) if choices else None
    return click.option(flags, type=kind, default=default, show_default=True, help=help)


@click.command()
@click.argument("base", type=NAME)
@click.option("--out", required=True, type=UserPath(), help="Adapter folder to write.")
@click.option("--revision", help="Branch, tag or commit of BASE on the Hub.")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="The paper's settings; other options change them.")
@_option("--rank", "Rows and columns of a state, 1 to 64.")
@_option("--state-heads", "States a layer: 1 is the paper's TSW, 4 its MSW.")
@_option("--branches", "Corrected projections, out of q,k,v,o.")
@click.option("--heads", hidden=True, help="What --branches was called.")
@_option("--layers", "Decoder layers with a memory: all, front:12, middle:12, back:12, or 0,1,2 …")
@_option("--alpha", "Corrections are scaled by alpha / rank.")
@_option("--granularity", "What is written at once; message is the paper's SSW.", GRANULARITIES)
@_option("--update-rule", "How the gates keep, erase and write.", UPDATE_RULES)
@_option("--couple-lambda/--own-lambda", "λ is 1 − β, or has a projection of its own.")
@_option("--gates", "One gate per row of a state, or per head.", GATES)
@_option("--beta-bias", "Initial bias of the write gate.")
@_option("--delta-init", "Start of Δ; zero computes what BASE does.", DELTA_INITS)
@_option("--delta-scale", "A learned scale of the corrections, or none.", DELTA_SCALES)
@_option("--delta-scale-init", "Where a learned scale starts.")
@_option("--delta-scale-max", "What a learned scale stays below.")
@_option("--o-norm/--no-o-norm", "RMSNorm on the correction of the o branch.")
@_option("--o-norm-eps", "Its epsilon.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the fresh weights.")
@trust_remote_code
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
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
    """Write a fresh adapter for the checkpoint BASE (a folder, a GGUF file or a Hub id).

    Reads only a few columns of BASE's weights. With --delta-init zero the patched model computes exactly what BASE
    does, until the adapter is trained.
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

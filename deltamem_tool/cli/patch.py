from __future__ import annotations

import json
from dataclasses import asdict

import click

from deltamem_tool.config import DELTA_INITS, UPDATE_RULES, DeltaMemConfig

_USUAL = DeltaMemConfig()


@click.command()
@click.argument("base")
@click.option("--out", required=True, type=click.Path(), help="Adapter folder to write.")
@click.option("--revision", help="Branch, tag or commit of BASE on the Hub.")
@click.option("--rank", default=_USUAL.rank, show_default=True, help="Rows and columns of a state.")
@click.option(
    "--state-heads",
    default=_USUAL.state_heads,
    show_default=True,
    help="States a layer: 1 is the paper's TSW, 4 its MSW.",
)
@click.option(
    "--heads", default=",".join(_USUAL.heads), show_default=True, help="Corrected projections, out of q,k,v,o."
)
@click.option(
    "--layers", default=_USUAL.layers, show_default=True, help="Decoder layers with a memory: all, or 0,1,2 …"
)
@click.option("--alpha", default=_USUAL.alpha, show_default=True, help="Corrections are scaled by alpha / rank.")
@click.option(
    "--update-rule",
    default=_USUAL.update_rule,
    show_default=True,
    type=click.Choice(UPDATE_RULES),
    help="How the gates keep, erase and write.",
)
@click.option("--beta-bias", default=_USUAL.beta_bias, show_default=True, help="Initial bias of the write gate.")
@click.option(
    "--delta-init",
    default=_USUAL.delta_init,
    show_default=True,
    type=click.Choice(DELTA_INITS),
    help="Start of Δ; zero computes what BASE does.",
)
@click.option("--seed", default=0, show_default=True, help="Of the fresh weights.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(base, out, revision, heads, layers, seed, overwrite, as_json, **options) -> None:
    """Write a fresh adapter for the checkpoint BASE (a folder or a Hub id).

    Reads only a few columns of BASE's weights. With --delta-init zero the patched model computes exactly what BASE
    does, until the adapter is trained.
    """
    config = DeltaMemConfig(heads=tuple(heads.split(",")), layers=_layers(layers), **options)

    import torch

    from deltamem_tool.adapter import create_adapter
    from deltamem_tool.cli.console import quiet_libraries

    quiet_libraries()
    torch.manual_seed(seed)
    folder = create_adapter(base, config, out, revision, overwrite)
    if as_json:
        said = {"adapter": str(out), "parameters": folder.num_parameters(), "base": asdict(folder.base)}
        click.echo(json.dumps(said))
    else:
        click.echo(f"{folder.num_parameters():,} parameters in {out}, for {folder.base.name}.")
        click.echo(f"Next: deltamem inspect {out}, or train it with a recipe (`deltamem train --help`).")


def _layers(text: str) -> str | tuple[int, ...]:
    if text == "all":
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither 'all' nor a list like 0,1,2", param_hint="--layers") from None

"""Interpolate between the weights of two adapters: one, and another that was trained further from it.

Command: python recipes/average.py FIRST SECOND OUT [--share 0.5]

The result keeps most of the abilities of both (shown for other models in arXiv 2109.01903). Its weights are float16.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from safetensors.numpy import save

from deltamem_tool.adapter.config_file import CONFIG_FILE, WEIGHTS_FILE
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.io.atomic import atomic_folder


@click.command()
@click.argument("first")
@click.argument("second")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--share", type=click.FloatRange(0.0, 1.0), default=0.5, show_default=True, help="Weight of the second.")
def main(first: str, second: str, out: Path, share: float) -> None:
    """Write OUT, an adapter between FIRST and SECOND, which have the same base model and mechanism."""
    one, other = read_adapter(first), read_adapter(second)
    if (one.config, one.base.fingerprint) != (other.config, other.base.fingerprint):
        raise click.UsageError(f"{first} and {second} differ in their mechanism or in their base model.")
    a, b = one.numbers(), other.numbers()
    weights = {name: ((1.0 - share) * a[name] + share * b[name]).astype(np.float16) for name in a}
    with atomic_folder(out, overwrite=False) as staged:
        (staged / CONFIG_FILE).write_bytes((one.path / CONFIG_FILE).read_bytes())
        (staged / WEIGHTS_FILE).write_bytes(save(weights, {"format": "pt"}))
    click.echo(f"{out}: {1.0 - share:g} of {first} and {share:g} of {second}")


if __name__ == "__main__":
    main()

"""`deltamem export`: export a base model and its adapter as an ONNX folder."""

from __future__ import annotations

from pathlib import Path

import click

from deltamem_tool.cli.options import NAME, UserPath, allow_other_base, trust_remote_code
from deltamem_tool.onnx.contract import LOGITS, MIN_LENGTH
from deltamem_tool.onnx.export.targets import (
    DTYPES,
    GROUP_SIZE,
    GROUP_SIZES,
    NO_QUANTIZATION,
    QUANTIZATIONS,
    SYMMETRIC,
    TARGETS,
    target_of,
)
from deltamem_tool.onnx.manifest import Manifest

_SYMMETRY = ", ".join(f"{'symmetric' if value else 'asymmetric'} for {name}" for name, value in SYMMETRIC.items())


@click.command("export")
@click.argument("adapter", type=NAME)
@click.option("--out", type=UserPath(path_type=Path), required=True, help="ONNX folder to write.")
@click.option("--base", type=NAME, help="Folder or Hub id of the base model, if not the recorded one.")
@allow_other_base
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    default=next(iter(TARGETS)),
    show_default=True,
    help="Runtime for the graph. cpu and cuda: ONNX Runtime, with its fused operators for each; portable: any runtime, "
    "with standard ONNX operators only; web: onnxruntime-web, in browsers; genai: onnxruntime-genai.",
)
@click.option(
    "--logits",
    type=click.Choice(LOGITS),
    default=LOGITS[0],
    show_default=True,
    help="Return the logits of the last position, or of all positions.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=MIN_LENGTH),
    metavar="N",
    help="Give keys and values a fixed length of N tokens, as CUDA graphs need. By default they grow.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=DTYPES[0],
    show_default=True,
    help="Data type of the base model's weights and of keys and values. The memory is always float32.",
)
@click.option(
    "--quantize",
    type=click.Choice(list(QUANTIZATIONS)),
    default=NO_QUANTIZATION,
    show_default=True,
    help="Quantise the base model's weights to 8 or 4 bits; embedding and LM head to 8. The memory stays float32.",
)
@click.option(
    "--group-size",
    type=click.Choice(list(map(str, GROUP_SIZES))),
    help=f"With --quantize: number of weights that share a scale. Small groups are more accurate, large ones smaller "
    f"and faster.  [default: {GROUP_SIZE}]",
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help=f"With --quantize: centre the range of each group on zero, or store an offset.  [default: {_SYMMETRY}]",
)
@click.option(
    "--memory",
    type=UserPath(path_type=Path),
    help="For genai: memory file that conversations start from. Other graphs take one at run time.",
)
@trust_remote_code
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the folder's manifest as JSON.")
def command(
    adapter: str,
    out: Path,
    base: str | None,
    allow_other_base: bool,
    target: str,
    dtype: str,
    quantize: str,
    group_size: str | None,
    symmetric: bool | None,
    memory: Path | None,
    logits: str,
    max_length: int | None,
    trust_remote_code: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export the base model with ADAPTER (a folder or Hub id) as one ONNX graph that carries the memory."""
    from deltamem_tool.cli.console import stages
    from deltamem_tool.io.atomic import check_overwrite

    if memory is not None and not TARGETS[target].genai:
        raise click.UsageError(f"--memory is for the target genai: a graph for {target} takes the state as an input.")
    if quantize == NO_QUANTIZATION and (group_size, symmetric) != (None, None):
        raise click.UsageError("--group-size, --symmetric and --asymmetric are for --quantize int8 or int4.")
    target_of(target, dtype, quantize)
    check_overwrite(out, overwrite)
    if memory is not None:
        from deltamem_tool.memory.file import read_memory

        read_memory(memory)  # before anything is loaded
    with stages() as report:
        report("Loading the model", 0, 0)
        import torch

        from deltamem_tool.adapter.folder import read_adapter
        from deltamem_tool.adapter.load import load
        from deltamem_tool.base_model.tokenizer import tokenizer_of
        from deltamem_tool.onnx.export.export import export_onnx

        name = base or read_adapter(adapter).base.name
        model = load(
            adapter,
            base=base,
            allow_other_base=allow_other_base,
            trust_remote_code=trust_remote_code,
            dtype=getattr(torch, dtype),
        )
        manifest = export_onnx(
            model,
            tokenizer_of(model, for_chat=False),
            out,
            target=target,
            quantize=quantize,
            group_size=GROUP_SIZE if group_size is None else int(group_size),
            symmetric=symmetric,
            logits=logits,
            max_length=max_length or 0,
            memory=memory,
            base_model=Path(name).name if Path(name).exists() else name,  # a path says nothing on another machine
            overwrite=overwrite,
            progress=report,
        )
    if as_json:
        click.echo(manifest.to_json(), nl=False)
    else:
        click.echo(f"{out}: {_agreement(manifest)}")
        if not manifest.interface.packed and not TARGETS[target].is_standard:
            click.echo(
                f"The attention of {manifest.model_type} is not ONNX Runtime's operator: it is computed step by step, "
                "which takes longer (docs/export.md)."
            )


def _agreement(manifest: Manifest) -> str:
    if manifest.max_abs_diff is None:
        return "not compared: ONNX Runtime's CPU provider lacks operators for this graph. Try it where it shall run."
    differ = f"differ by at most {manifest.max_abs_diff:.1e}"
    if manifest.greedy_agreement is not None:
        tokens = f"{manifest.greedy_agreement:.1%} of greedy tokens are the same"
        return f"in {manifest.quantize}, ONNX Runtime and PyTorch {differ}; {tokens}."
    return f"ONNX Runtime and PyTorch {differ}."

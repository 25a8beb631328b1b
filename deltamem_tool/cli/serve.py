"""`deltamem serve`: serve many users, each with their own memory, over HTTP with OpenAI's API."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click

from deltamem_tool.cli.engines import (
    check_runtime_options,
    follow_engine,
    is_follower,
    onnx_engine,
    shipped_engine,
    torch_engine,
)
from deltamem_tool.cli.options import NAME, TEXT, UserPath, allow_other_base, device, trust_remote_code, window
from deltamem_tool.onnx.locate import is_onnx

KEYS_FILE = Path("deltamem-keys.txt")
STORE_FILE = Path("deltamem-memories.sqlite")


@click.command("serve")
@click.argument("model", type=NAME, required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 picks a free one.",
)
@click.option(
    "--api-keys",
    "keys_file",
    type=UserPath(dir_okay=False, path_type=Path),
    help=f"File of the API keys that the server accepts.  [default for --new-key: {KEYS_FILE}]",
)
@click.option(
    "--no-keys", is_flag=True, help="Accept requests without a key, even at an address that others can reach."
)
@click.option("--new-key", metavar="TENANT", type=TEXT, help="Add a key for TENANT to the file, print it, and exit.")
@click.option(
    "--store",
    "store_url",
    type=TEXT,
    help="Database of the memories: sqlite:///FOLDER/FILE, or postgresql://USER:PASSWORD@HOST/DATABASE for several "
    f"servers.  [default: {STORE_FILE} in the current folder]",
)
@click.option("--model-name", type=TEXT, help="Model name that clients see.  [default: MODEL]")
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Maximum batch size: answers generated at once.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Maximum number of waiting requests.",
)
@click.option(
    "--timeout",
    "seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="Time limit for a request, in seconds.",
)
@click.option(
    "--keep-versions",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Number of versions to keep of each memory.",
)
@click.option(
    "--max-memories", type=click.IntRange(min=1), help="Maximum number of memories per tenant.  [default: no limit]"
)
@click.option(
    "--max-bytes", type=click.IntRange(min=1), help="Maximum storage per tenant, in bytes.  [default: no limit]"
)
@window
@click.option("--base", type=NAME, help="Folder or Hub id of an adapter's base model, if not the recorded one.")
@allow_other_base
@trust_remote_code
@device
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), help="Execution provider for an ONNX folder.  [default: cpu]"
)
def command(
    model: str | None,
    host: str,
    port: int,
    keys_file: Path | None,
    no_keys: bool,
    new_key: str | None,
    store_url: str | None,
    model_name: str | None,
    max_batch: int,
    max_queue: int,
    seconds: float,
    keep_versions: int,
    max_memories: int | None,
    max_bytes: int | None,
    window: int | None,
    base: str | None,
    allow_other_base: bool,
    trust_remote_code: bool,
    device: str | None,
    provider: str | None,
) -> None:
    """Serve MODEL to many users: an adapter (folder, Hub id or builtin:adapter), or an ONNX folder.

    The server implements OpenAI's API. Each `user` has their own memory, which is stored before an answer is complete.
    On SIGTERM, the server finishes the requests that it has begun, and exits.

    A shipped adapter is exported once and runs in ONNX Runtime, if the extra `export` is installed and you do not pass
    --device.

    Example: deltamem serve builtin:adapter
    """
    from deltamem_tool.serve import keys

    if new_key is not None:
        click.echo(keys.new_key(keys_file or KEYS_FILE, new_key))
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    for_onnx = is_onnx(model)
    for_adapter = {"base": base, "allow_other_base": allow_other_base, "trust_remote_code": trust_remote_code}
    check_runtime_options(for_onnx, provider, **for_adapter, device=device)
    if is_follower(device):
        follow_engine(model, for_adapter)
        return

    from deltamem_tool.cli.console import SPINNER, STDERR
    from deltamem_tool.serve.logs import log_as_json
    from deltamem_tool.serve.server import bind, check_host, run
    from deltamem_tool.serve.settings import ServeSettings

    check_host(host, keys_file is not None, no_keys)
    settings = ServeSettings(
        model=model,
        store=store_url or f"sqlite:///{STORE_FILE}",
        api_keys=keys_file,
        no_keys=no_keys,
        model_name=model_name,
        max_batch=max_batch,
        max_queue=max_queue,
        timeout=seconds,
        keep_versions=keep_versions,
        max_memories=max_memories,
        max_bytes=max_bytes,
        window=window,
    )
    api_keys = settings.keys()
    with bind(host, port) as listener:
        engine = None if device or any(for_adapter.values()) else shipped_engine(model)
        if engine is None:
            with STDERR.status("Loading the model", spinner=SPINNER):
                engine = onnx_engine(model, provider) if for_onnx else torch_engine(model, device, for_adapter)
        app = settings.app(engine, api_keys)
        log_as_json()
        listener.listen()  # what comes from now on waits until uvicorn takes it
        where = listener.getsockname()[:2]
        STDERR.print(f"Serving {model} at http://{where[0]}:{where[1]}/v1", highlight=False, soft_wrap=True)
        with suppress(KeyboardInterrupt):  # uvicorn passes a signal on when all is done
            run(app, listener)

"""`anarcho serve`: a model behind HTTP, for clients of OpenAI's interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anarcho_cli.devices import Device
from anarcho_cli.models import Which


def serve(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="A run, a checkpoint or a model directory.")],
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; others than this machine's need a key.")
    ] = ("127.0.0.1"),
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="ANARCHO_API_KEY", help="Key that clients must send as a bearer token."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The model's name for clients; else its directory's.")
    ] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Most texts to generate at once.")] = 8,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Most tokens of prompt and text; else the model's.")
    ] = None,
    connections: Annotated[int, typer.Option("--connections", min=1, help="Most clients at once.")] = 64,
    max_body_bytes: Annotated[int, typer.Option("--max-body-bytes", min=1, help="Most bytes of a request.")] = 2**20,
    checkpoint: Annotated[Which, typer.Option("--checkpoint", help="Which checkpoint of a run.")] = Which.last,
    device: Annotated[Device, typer.Option("--device", help="Where the model runs.")] = Device.auto,
) -> None:
    """Serve a model at /v1/chat/completions and /v1/completions, until it is interrupted."""
    from anarcho_cli.models import find_model

    directory = find_model(model, which=checkpoint)
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise ValueError(f"--host {host} may be reached by others; give an --api-key, or listen at 127.0.0.1")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
        raise ValueError("--api-key holds characters that no header can carry, or none; expected printable ASCII")
    _require_extra()

    import socket

    from anarcho_model.generate.engine.torch import Engine

    from anarcho_cli.devices import resolve_device
    from anarcho_cli.output import note
    from anarcho_cli.serving.app import make_app
    from anarcho_cli.serving.limits import Limits, make_server
    from anarcho_cli.serving.worker import Worker
    from anarcho_cli.writing import Writer

    writer = Writer.load(directory, device=resolve_device(device).device)
    worker = Worker(Engine(writer.model, slots=slots, context=context))
    app = make_app(
        writer, worker, name=name or directory.name, limits=Limits(max_body_bytes=max_body_bytes), api_key=api_key
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        place = f"[{host}]" if ":" in host else host
        note(f"serving {directory} at http://{place}:{listener.getsockname()[1]}/v1")
        make_server(app, connections=connections).run(sockets=[listener])


def _require_extra() -> None:
    """Raise where FastAPI or uvicorn is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"this command needs {' and '.join(missing)}, which is not installed; run `pip install 'anarcho-cli[serve]'`"
        )

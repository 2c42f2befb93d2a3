"""`anarcho serve`: a model behind HTTP, for people at a chat page and for clients of OpenAI's interface."""

from __future__ import annotations

from typing import Annotated

import typer

from anarcho_cli.devices import Device
from anarcho_cli.models import Which
from anarcho_cli.sampling_options import (
    Checkpoint,
    KvBits,
    MinP,
    Model,
    RunsOn,
    RunsWith,
    Temperature,
    TopK,
    TopP,
    chosen_place,
)


def serve(
    model: Model,
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
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="A further name by which a server on this machine's own address may be reached, as through a proxy.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            help="An origin, such as https://example.org, whose pages may ask; else only our own page.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The model's name for clients; else its directory's.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens of any answer; else the context's rest."),
    ] = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Most texts to generate at once.")] = 8,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Most tokens of prompt and text; else the model's.")
    ] = None,
    connections: Annotated[
        int, typer.Option("--connections", min=1, help="Most clients at once; more are answered with 503.")
    ] = 64,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=0, help="Most texts that wait for a slot; more are answered with 429.")
    ] = 256,
    max_body_bytes: Annotated[int, typer.Option("--max-body-bytes", min=1, help="Most bytes of a request.")] = 2**20,
    checkpoint: Checkpoint = Which.last,
    backend: RunsWith = None,
    device: RunsOn = Device.auto,
    kv_bits: KvBits = None,
) -> None:
    """Serve a model until it is interrupted: a chat page at /, and OpenAI's interface at /v1.

    Sampling options hold where a request says nothing. At this machine's own address, a request must name this machine
    (or an --allow-host) in its Host header, and pages of other sites are refused, so that nothing that a browser shows
    can use the server unasked.
    """
    from anarcho_model.generate.sampling import SamplingConfig

    from anarcho_cli.models import find_model

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    SamplingConfig(**sampling)  # refused before anything is loaded
    directory = find_model(model, which=checkpoint)
    _check_access(host, api_key, allow_origin or [])
    _require_extra()

    import socket

    from anarcho_cli.output import note
    from anarcho_cli.serving.access import LOOPBACK, Access
    from anarcho_cli.serving.app import make_app
    from anarcho_cli.serving.limits import Limits, make_server
    from anarcho_cli.serving.worker import Worker
    from anarcho_cli.writing import Writer

    writer = Writer.load(directory, **chosen_place(backend, device), kv_bits=kv_bits)
    engine = writer.make_engine(slots=slots, context=context)
    hosts = LOOPBACK | {item.lower() for item in allow_host or []} if host in LOOPBACK else None
    app = make_app(
        writer,
        Worker(engine),
        name=name or directory.name,
        limits=Limits(max_body_bytes=max_body_bytes, max_waiting=max_waiting),
        access=Access(api_key=api_key, hosts=hosts, origins=frozenset(allow_origin or [])),
        defaults=SamplingConfig(max_new_tokens=max_new_tokens or engine.context, **sampling),
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=max(128, connections)) as listener:
        place = f"[{host}]" if ":" in host else host
        place = f"{place}:{listener.getsockname()[1]}"
        note(f"serving {directory}: the page at http://{place}/, OpenAI's interface at http://{place}/v1")
        make_server(app, connections=connections).run(sockets=[listener])


def _check_access(host: str, api_key: str | None, origins: list[str]) -> None:
    """Raise ValueError for a server that would be open to others, and for what no client could send."""
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise ValueError(f"--host {host} may be reached by others; give an --api-key, or listen at 127.0.0.1")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise ValueError("--api-key holds characters that no header can carry, or none; expected printable ASCII")
    from urllib.parse import urlsplit

    for origin in origins:
        parts = urlsplit(origin)
        if origin != f"{parts.scheme}://{parts.netloc}" or not parts.hostname or not origin.isascii():
            raise ValueError(f"--allow-origin is {origin!r}, expected a scheme and a host such as https://example.org")


def _require_extra() -> None:
    """Raise where FastAPI or uvicorn is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"this command needs {' and '.join(missing)}, which is not installed; run `pip install 'anarcho-cli[serve]'`"
        )

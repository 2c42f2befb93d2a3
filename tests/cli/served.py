"""A tiny model behind a server on a real socket, for the tests of the server."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

from anarcho_cli.serving.app import make_app
from anarcho_cli.serving.limits import make_server
from anarcho_cli.serving.worker import Worker
from anarcho_cli.writing import Writer
from anarcho_model import ModelConfig
from anarcho_model.torch import GPT
from anarcho_model.weights import save_pretrained
from anarcho_tokenize import TokenizerConfig, train_tokenizer


def tiny_model(directory: Path, *, context: int = 64) -> Path:
    """An untrained model with a tokenizer that has roles."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(["the whale and the sea, the ship. " * 100], config=TokenizerConfig(vocab_size=285))
    tokenizer.save(directory)
    network = GPT(ModelConfig(vocab_size=285, context_length=context, num_layers=1, dim=16, num_heads=2))
    network.init_weights(seed=0)
    save_pretrained(network, directory, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    return directory


class Served:
    """A running server; what it is given besides goes to `make_app`."""

    def __init__(
        self, model: Path, *, connections: int = 64, slots: int = 3, backend: str = "torch", **options: Any
    ) -> None:
        self.writer = Writer.load(model, device="cpu", backend=backend)
        self.worker = Worker(self.writer.make_engine(slots=slots))
        self.server = make_server(make_app(self.writer, self.worker, name="tiny", **options), connections=connections)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> Served:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.listener.getsockname(), timeout=10)

    def slow_down(self, seconds: float) -> None:
        """Let every step take so long; 0 takes it back."""
        engine = self.worker.engine
        engine.__dict__.pop("step", None)
        step = engine.step

        def slow() -> bool:
            time.sleep(seconds)
            return step()

        if seconds:
            engine.step = slow  # pyright: ignore[reportAttributeAccessIssue]

    def busy_within(self, seconds: float) -> bool:
        return self._within(seconds, busy=True)

    def idle_within(self, seconds: float) -> bool:
        return self._within(seconds, busy=False)

    def _within(self, seconds: float, *, busy: bool) -> bool:
        deadline = time.monotonic() + seconds
        while self.worker.engine.busy != busy and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.worker.engine.busy == busy

    def ask_all(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], str]:
        """Status, headers in lower case and text; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection(*self.listener.getsockname(), timeout=20)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {"Content-Type": "application/json", **{key.replace("_", "-"): value for key, value in headers.items()}}
        connection.request(method, path, body=content, headers=named)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, text

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON, or the text of a stream."""
        status, found, text = self.ask_all(method, path, body, **headers)
        return status, text if found["content-type"].startswith("text/event-stream") else json.loads(text)

    def chunks(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, without the last."""
        status, text = self.ask("POST", path, {**body, "stream": True})
        assert status == 200
        events = [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

"""A server that stands in for the Hugging Face Hub, for tests; with HF_ENDPOINT set to its address, its data sets are read as the hub's.

A data set `org/name` is the folder DIRECTORY/org/name, of one commit. Every file is at `/files/PATH`, too, as on any other server. It can
drop connections in the middle of a file, and answer with errors, so that what reads from it can be seen to go on.

    python tests/tokenize/hub_server.py DIRECTORY [--port P] [--drop-every-bytes N] [--fail-share P] [--seed S] [--without-ranges]

prints its address and serves until it is stopped.
"""

import argparse
import hashlib
import json
import random
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_BLOCK_BYTES = 2**14


class HubServer(ThreadingHTTPServer):
    """Serves a directory of data sets; what goes wrong is told by its attributes, at any time."""

    daemon_threads = True

    def __init__(self, directory: Path, *, port: int = 0, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.directory = directory
        self.drop_every_bytes: int | None = None
        """Each answer with a file's content ends, by a reset connection, after so many bytes."""
        self.fail_share = 0.0
        """Share of the requests for a file's content that are answered with 500."""
        self.failures: deque[int] = deque()
        """Statuses of the next answers to requests for a file's content: 0 closes the connection, 200 is as usual."""
        self.metadata_failures: deque[int] = deque()
        """The same of all other requests."""
        self.retry_after: int | None = None
        """Seconds that failures ask to wait."""
        self.has_ranges = True
        """Whether a file can be asked for from a byte on."""
        self.gated: set[str] = set()
        """Data sets that need a token."""
        self.log: list[tuple[str, str, str | None]] = []
        """Method, path and range of every request."""
        self.chance = random.Random(seed)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""


def commit_of(folder: Path) -> str:
    """Names what a data set holds, as a commit does."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return hashlib.sha1("".join(names).encode()).hexdigest()


@contextmanager
def serving(directory: Path) -> Iterator[HubServer]:
    """A server in a thread of this process."""
    server = HubServer(directory)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.log.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        is_content = self.command == "GET" and (parts[0] == "files" or "resolve" in parts)
        failures = server.failures if is_content else server.metadata_failures
        status = failures.popleft() if failures else 200
        if status != 200:
            self._fail(status)
        elif is_content and server.chance.random() < server.fail_share:
            self._fail(500)
        elif parts[0] == "files":
            self._send_file(server.directory.joinpath(*parts[1:]), commit=None)
        elif parts[0] == "api":
            self._answer_api(parts[2:])
        else:
            place = parts.index("resolve")
            self._resolve("/".join(parts[1:place]), parts[place + 1], "/".join(parts[place + 2 :]))

    def _fail(self, status: int) -> None:
        if not status:
            self._reset()
            return
        headers = {} if self.server.retry_after is None else {"Retry-After": str(self.server.retry_after)}
        self._send(b"", status=status, headers=headers)

    def _folder(self, name: str) -> Path | None:
        """The data set's folder; None after an answer that there is none, or that it needs a token."""
        folder = self.server.directory / name
        if not folder.is_dir():
            self._send(b"{}", status=404, headers={"X-Error-Code": "RepoNotFound"})
        elif name in self.server.gated and not self.headers.get("Authorization"):
            self._send(b"{}", status=401, headers={"X-Error-Code": "GatedRepo"})
        else:
            return folder
        return None

    def _revision(self, folder: Path, revision: str) -> str | None:
        commit = commit_of(folder)
        if revision in ("main", commit):
            return commit
        self._send(b"{}", status=404, headers={"X-Error-Code": "RevisionNotFound"})
        return None

    def _answer_api(self, parts: list[str]) -> None:
        kinds = ("revision", "tree", "paths-info")
        place = next((number for number, part in enumerate(parts) if part in kinds), len(parts))
        name, kind, rest = "/".join(parts[:place]), parts[place : place + 1], parts[place + 1 :]
        if (folder := self._folder(name)) is None:
            return
        if (commit := self._revision(folder, rest[0] if rest else "main")) is None:
            return
        if kind == ["tree"]:
            query = parse_qs(urlsplit(self.path).query)
            self._send_tree(
                folder, "/".join(rest[1:]), recursive=query.get("recursive", ["false"])[0].lower() == "true"
            )
        elif kind == ["paths-info"]:
            text = self.body.decode()
            paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            found = [folder / path for path in paths if (folder / path).exists()]
            self._send_json([_entry(folder, path) for path in found])
        else:
            files = [{"rfilename": str(file.relative_to(folder))} for file in folder.rglob("*") if file.is_file()]
            self._send_json(
                {"id": name, "sha": commit, "siblings": files, "private": False, "tags": [], "downloads": 0}
            )

    def _send_tree(self, folder: Path, path: str, *, recursive: bool) -> None:
        top = folder / path
        if not top.is_dir():
            self._send(b"{}", status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        self._send_json([_entry(folder, file) for file in sorted(top.rglob("*") if recursive else top.iterdir())])

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (folder := self._folder(name)) is None or (commit := self._revision(folder, revision)) is None:
            return
        self._send_file(folder / path, commit=commit)

    def _send_file(self, file: Path, *, commit: str | None) -> None:
        if not file.is_file():
            self._send(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Content-Type": "application/octet-stream"}
        if commit is not None:
            headers["X-Repo-Commit"] = commit
        start = 0
        if self.server.has_ranges:
            headers["Accept-Ranges"] = "bytes"
            wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
            start = int(wanted[0])
            end = int(wanted[1]) + 1 if wanted[1] else len(content)
            if "Range" in self.headers and start >= len(content):
                self._send(b"", status=416, headers={"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content)) - 1}/{len(content)}"
            content = content[start:end]
        is_part = self.server.has_ranges and "Range" in self.headers
        if not is_part:
            headers.pop("Content-Range", None)
        self._send(content, status=206 if is_part else 200, headers=headers, may_drop=True)

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _send(
        self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None, may_drop: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.server.drop_every_bytes if may_drop else None
        for start in range(0, len(body), _BLOCK_BYTES):
            block = body[start : start + _BLOCK_BYTES]
            if limit is not None and start + len(block) > limit:
                self.wfile.write(block[: limit - start])
                self.wfile.flush()
                self._reset(hard=self.server.chance.random() < 0.5)
                return
            self.wfile.write(block)

    def _reset(self, *, hard: bool = False) -> None:
        """End the connection; a hard end also throws away what the client has not yet received."""
        if hard:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close() if hard else self.connection.shutdown(socket.SHUT_RDWR)


def _entry(folder: Path, path: Path) -> dict[str, object]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    return {
        "type": "file",
        "path": name,
        "size": path.stat().st_size,
        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a directory of data sets as the Hugging Face Hub does.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "--drop-every-bytes", type=int, help="end each answer with a file's content after so many bytes"
    )
    parser.add_argument("--fail-share", type=float, default=0.0, help="share of requests for content answered with 500")
    parser.add_argument("--without-ranges", action="store_true", help="answer every request with the whole file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    server = HubServer(options.directory, port=options.port, seed=options.seed)
    server.drop_every_bytes, server.fail_share = options.drop_every_bytes, options.fail_share
    server.has_ranges = not options.without_ranges
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()

"""Files behind https, read as streams that survive the network.

When a connection fails, is dropped in the middle of a file, or the server is busy, reading waits and goes on at the very next byte, so that
whoever reads rows from the stream notices nothing. The pauses grow from one second to a minute, each shortened by chance so that many
readers do not come back at once. Requests go through the session of huggingface_hub, which knows proxies and certificates, and which does
not hand a token on to another host.
"""

import io
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from anarcho_tokenize.errors import SourceError

_LONGEST_PAUSE = 60.0
_LONGEST_ASKED_PAUSE = 300.0
_READ_TIMEOUT = 60.0
_CONNECT_TIMEOUT = 20.0
_READ_ON_BYTES = 2**20
"""A gap of up to so many bytes is read over, which is sooner done than another request."""
_BUSY = (408, 425, 429)
_CHANCE = random.Random()
"""Of its own, so that nobody's seeded numbers change."""


class NetworkError(SourceError):
    """The network failed more often in a row than is waited for; what was read so far is good, and reading can go on later."""


class Retries:
    """Waits after a failure, and gives up after so many without progress."""

    def __init__(
        self,
        name: str,
        *,
        retries: int,
        on_retry: Callable[[str], None] | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._name = name
        self._retries = retries
        self._on_retry = on_retry
        self._sleep = sleep or time.sleep
        self._failures = 0

    def succeeded(self) -> None:
        """Note progress."""
        self._failures = 0

    def wait(self, problem: str, *, asked_pause: float | None = None, cause: BaseException | None = None) -> None:
        """Wait before the next attempt; `asked_pause` is how long the server asks for. Raises NetworkError after the last one."""
        self._failures += 1
        if self._failures > self._retries:
            raise NetworkError(
                f"{self._name} cannot be reached: {problem}, after {self._failures} attempts; see to the network, and go on from here."
            ) from cause
        pause = min(_LONGEST_PAUSE, 2.0 ** (self._failures - 1)) * _CHANCE.uniform(0.75, 1.0)
        if asked_pause is not None:
            pause = max(pause, min(asked_pause, _LONGEST_ASKED_PAUSE))
        if self._on_retry is not None:
            self._on_retry(
                f"{self._name}: {problem}; attempt {self._failures} of {self._retries} follows in {pause:.0f} s."
            )
        self._sleep(pause)


class RemoteFile(io.RawIOBase):
    """A file at an address, which can seek; `size` and `version` are known once something has been read or sought from its end."""

    def __init__(
        self,
        url: str,
        *,
        name: str,
        retries: Retries,
        headers: Mapping[str, str] | None = None,
        is_pinned: bool = False,
    ) -> None:
        self._url = url
        self._name = name
        self._retries = retries
        self._headers = dict(headers or {})
        self._is_pinned = is_pinned
        self._place = 0
        self._is_moved = False
        self._response: Any = None
        self._chunks: Iterator[bytes] = iter(())
        self._ready = memoryview(b"")
        self._ready_place = 0
        self.size: int | None = None
        self.version: str | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_END:
            self.connect()
            if self.size is None:
                raise SourceError(f"{self._name} has no size that the server knows; expected a Content-Length.")
        place = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size or 0}[whence] + offset
        self._is_moved = self._is_moved or place != self._place
        self._place = place
        return place

    def readinto(self, buffer: Any, /) -> int:
        if self._is_moved and not 0 <= self._place - self._ready_place <= _READ_ON_BYTES:
            self._disconnect()
        self._is_moved = False
        while self.size is None or self._place < self.size:
            self.connect()
            surplus = min(self._place - self._ready_place, len(self._ready))
            self._ready, self._ready_place = self._ready[surplus:], self._ready_place + surplus
            if self._ready:
                return self._take(buffer)
            self._receive()
        return 0

    def connect(self) -> None:
        """Ask for the file from the present place on, until the server answers. Raises SourceError where it refuses."""
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import get_session, httpx

        while self._response is None and (self.size is None or self._place < self.size):
            ranges = {"Range": f"bytes={self._place}-"} if self._place else {}
            headers = {**self._headers, "Accept-Encoding": "identity", **ranges}
            timeout = httpx.Timeout(_READ_TIMEOUT, connect=_CONNECT_TIMEOUT)
            try:
                session = get_session()
                request = session.build_request("GET", self._url, headers=headers, timeout=timeout)
                response = session.send(request, stream=True, follow_redirects=True)
            except OfflineModeIsEnabled as error:
                raise offline_error(self._name) from error
            except (httpx.RequestError, OSError) as error:
                self._retries.wait(_problem(error), cause=error)
                continue
            self._accept(response)

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _accept(self, response: Any) -> None:
        """Read on from an answer, or wait where the server is busy."""
        status = response.status_code
        if status == 416:
            # Nothing is behind the place.
            self.size = self._place
            response.close()
            return
        if status >= 500 or status in _BUSY:
            pause = response.headers.get("Retry-After", "")
            response.close()
            self._retries.wait(f"the server answers {status}", asked_pause=float(pause) if pause.isdigit() else None)
            return
        if status not in (200, 206):
            response.close()
            raise refusal(self._name, status)
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        length = response.headers.get("Content-Length")
        start, size = (int(found[1]), found[2]) if status == 206 and found else (0, length)
        self._check(int(size) if size not in (None, "*") else None, response.headers.get("ETag"))
        # Without a size for the chunks, which would hold back what came before a failure.
        self._response, self._chunks, self._ready_place = response, response.iter_raw(), start

    def _check(self, size: int | None, version: str | None) -> None:
        """Refuse to go on in another file than the one that reading began in."""
        is_other = self.size is not None and size is not None and self.size != size
        if not self._is_pinned and self.version is not None and version is not None:
            is_other = is_other or version != self.version
        if is_other:
            raise SourceError(f"{self._name} has changed while it was read; expected it to stay, so begin anew.")
        self.size = size if size is not None else self.size
        self.version = version or self.version

    def _receive(self) -> None:
        """The next bytes of the answer, or the size at its end, or a failure that is waited for."""
        from huggingface_hub.utils import httpx

        if self._response is None:
            return
        try:
            chunk = next(self._chunks, b"")
        except (httpx.RequestError, httpx.StreamError, OSError) as error:
            self._disconnect()
            self._retries.wait(_problem(error), cause=error)
            return
        if chunk:
            self._ready = memoryview(chunk)
        elif self.size is None:
            self.size = self._ready_place
        else:
            self._disconnect()
            self._retries.wait(f"the connection ended at byte {self._ready_place:,} of {self.size:,}")

    def _take(self, buffer: Any) -> int:
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        self._ready_place += count
        self._place += count
        self._retries.succeeded()
        return count

    def _disconnect(self) -> None:
        response, self._response = self._response, None
        self._chunks, self._ready, self._ready_place = iter(()), memoryview(b""), 0
        if response is not None:
            response.close()


def refusal(name: str, status: int) -> SourceError:
    """What to do about an answer that another attempt would not change."""
    if status in (401, 403):
        return SourceError(
            f"{name} may not be read (HTTP {status}); ask for access on its page where it is gated, and set HF_TOKEN."
        )
    if status in (404, 410):
        return SourceError(f"{name} does not exist (HTTP {status}); check the name, and set HF_TOKEN if it is private.")
    return SourceError(f"{name} cannot be read: the server answers {status}; expected the file.")


def offline_error(name: str) -> SourceError:
    """The user has forbidden the network."""
    return SourceError(f"{name} needs the network, but HF_HUB_OFFLINE is set; unset it, or use files on this machine.")


def _problem(error: BaseException) -> str:
    text = str(error).strip().rstrip(".")
    return f"{type(error).__name__} ({text})" if text else type(error).__name__

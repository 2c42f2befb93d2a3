"""Unpacks compressed streams of bytes, and tells damaged or cut-off data from whole data.

Bytes come in steps of a fixed size whatever the reader asks for, so that all that precedes some damage is delivered, and the same bytes
each time: what can be read of a damaged file does not depend on where the reading of it was resumed.
"""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import Any

from anarcho_tokenize.errors import SourceError

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
_STEP_BYTES = 2**17
_PACKED_ZSTD_BYTES = 2**13
"""Small, since zstandard unpacks all that it is given at once, and text packs by a factor of five but zeros by thousands."""
_LARGEST_WINDOW = 2**31
_OPENERS: dict[str, Callable[[Any, str], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


class DamagedError(OSError):
    """Compressed data that cannot be unpacked."""


def unpack(stream: io.BufferedIOBase, compression: str, *, name: str) -> io.BufferedIOBase:
    """The unpacked bytes of a stream; `compression` is its ending, or empty. Raises SourceError where a module is missing."""
    if not compression:
        return stream
    if compression != ".zst":
        return io.BufferedReader(_Steps(_OPENERS[compression](stream, "rb")), _STEP_BYTES)
    if sys.version_info >= (3, 14):
        from compression import zstd

        return io.BufferedReader(_Steps(zstd.open(stream, "rb")), _STEP_BYTES)
    zstandard = require_zstandard(name)
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    return io.BufferedReader(_ZstandardReader(stream, decompressor, error=zstandard.ZstdError), _STEP_BYTES)


def require_zstandard(name: str) -> Any:
    """The module that reads .zst, None where Python has its own. Raises SourceError."""
    if sys.version_info >= (3, 14):
        return None
    try:
        import zstandard
    except ImportError as error:
        raise SourceError(f"{name} needs zstandard to be read; install anarcho-tokenize[zstd].") from error
    return zstandard


def unpacking_errors() -> tuple[type[Exception], ...]:
    """What reading such a stream raises for damaged, cut-off or unreadable files."""
    standard = (OSError, EOFError, lzma.LZMAError, zlib.error)
    module = sys.modules.get("compression.zstd")
    return standard if module is None else (*standard, module.ZstdError)


class _Steps(io.RawIOBase):
    """Reads a decompressor in equal steps."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._ready = self._ready or memoryview(self._file.read1(_STEP_BYTES))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class _ZstandardReader(io.RawIOBase):
    """Reads all frames of a .zst file, unlike `zstandard.open`, which takes a cut-off file for a whole one."""

    def __init__(self, file: io.BufferedIOBase, decompressor: Any, *, error: type[Exception]) -> None:
        self._file = file
        self._decompressor = decompressor
        self._error = error
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_PACKED_ZSTD_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            self._unpack()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self) -> None:
        frame = self._frame or self._decompressor.decompressobj()
        try:
            self._ready = memoryview(frame.decompress(self._packed))
        except self._error as error:
            raise DamagedError(str(error)) from error
        self._packed = frame.unused_data if frame.eof else b""
        self._frame = None if frame.eof else frame

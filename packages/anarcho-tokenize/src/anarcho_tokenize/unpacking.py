"""Opens compressed files as streams of their bytes, and tells a damaged or cut-off file from a whole one."""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from anarcho_tokenize.errors import SourceError

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
_CHUNK_BYTES = 2**17
_LARGEST_WINDOW = 2**31
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


class DamagedError(OSError):
    """Compressed data that cannot be unpacked."""


def open_unpacked(file: Path) -> IO[bytes]:
    """Open a file by its ending, unpacked. Raises SourceError where .zst cannot be read for want of a module."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        return _open_zstd(file)
    return _OPENERS.get(suffix, open)(file, "rb")


def unpacking_errors() -> tuple[type[Exception], ...]:
    """What reading such a stream raises for damaged, cut-off or unreadable files."""
    standard = (OSError, EOFError, lzma.LZMAError, zlib.error)
    module = sys.modules.get("compression.zstd")
    return standard if module is None else (*standard, module.ZstdError)


def _open_zstd(file: Path) -> IO[bytes]:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.open(file, "rb")
    try:
        import zstandard
    except ImportError as error:
        raise SourceError(f"{file} needs zstandard to be read; install anarcho-tokenize[zstd].") from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    return io.BufferedReader(_ZstandardReader(file.open("rb"), decompressor, error=zstandard.ZstdError))


class _ZstandardReader(io.RawIOBase):
    """Reads all frames of a .zst file, unlike `zstandard.open`, which takes a cut-off file for a whole one."""

    def __init__(self, file: IO[bytes], decompressor: Any, *, error: type[Exception]) -> None:
        self._file = file
        self._decompressor = decompressor
        self._error = error
        self._frame: Any = None
        self._packed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_CHUNK_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            self._unpack()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _unpack(self) -> None:
        frame = self._frame or self._decompressor.decompressobj()
        try:
            self._ready = frame.decompress(self._packed)
        except self._error as error:
            raise DamagedError(str(error)) from error
        self._packed = frame.unused_data if frame.eof else b""
        self._frame = None if frame.eof else frame

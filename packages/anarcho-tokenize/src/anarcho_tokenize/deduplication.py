"""Which rows have been seen: a set of hashes on disk, so that memory does not grow with the source, and an interrupted producer finds the
set as it was at its last commit.

SQLite keeps each hash with the number of the chunk of rows that it was first seen in; those of chunks that the producer has not committed
are deleted when it goes on.
"""

import sqlite3
from pathlib import Path

from anarcho_tokenize.errors import ShardError

_DISK_ERRORS = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")


class SeenRows:
    """A persistent set of 16-byte keys.

    Its methods raise OSError where the disk fails or is full, ShardError where the file is damaged.
    """

    def __init__(self, file: Path, *, chunks: int) -> None:
        """Open the set as it was after so many chunks. Raises ShardError where it is gone."""
        if chunks and not file.is_file():
            raise ShardError(
                f"{file} is missing, by which duplicates of the {chunks} chunks so far are known; prepare the data anew."
            )
        self._file = file
        self._connection = sqlite3.connect(file, isolation_level=None)
        try:
            self._connection.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA fullfsync = ON; PRAGMA cache_size = -65536;"
                "CREATE TABLE IF NOT EXISTS seen (key BLOB PRIMARY KEY, chunk INTEGER NOT NULL) WITHOUT ROWID;"
            )
            self._connection.execute("DELETE FROM seen WHERE chunk >= ?", (chunks,))
            self._connection.execute("BEGIN")
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise self._failure(error) from error

    def add(self, key: bytes, *, chunk: int) -> bool:
        """Note a key of a row of this chunk; returns whether it was there before."""
        try:
            cursor = self._connection.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, chunk))
        except sqlite3.DatabaseError as error:
            raise self._failure(error) from error
        return cursor.rowcount == 0

    def rewind(self, chunks: int) -> None:
        """Forget the keys that were added after so many chunks."""
        try:
            self._connection.execute("DELETE FROM seen WHERE chunk >= ?", (chunks,))
        except sqlite3.DatabaseError as error:
            raise self._failure(error) from error

    def flush(self) -> None:
        """Bring everything so far to disk."""
        try:
            self._connection.execute("COMMIT")
            self._connection.execute("BEGIN")
        except sqlite3.DatabaseError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Drop what was not flushed."""
        self._connection.close()

    def _failure(self, error: sqlite3.DatabaseError) -> Exception:
        if getattr(error, "sqlite_errorname", "").startswith(_DISK_ERRORS):
            return OSError(f"{self._file} cannot be written ({error}); see to the disk, and go on from here.")
        return ShardError(f"{self._file} is damaged ({error}); prepare the data anew.")

"""The optimizer's state as any framework reads it from a checkpoint, in one file or in parts: all of a tensor, or some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from anarcho_train.optimizer_layout import OPTIMIZER_FILE, read_layout


class StoredState:
    """The tensors of a state by name, of which no more is read than what is asked for."""

    def __init__(self, directory: Path, open_file: Callable[[Path], Any], join: Callable[[Sequence[Any]], Any]) -> None:
        self.layouts = read_layout(directory)
        whole = directory / OPTIMIZER_FILE
        self.place_of_all = whole if whole.exists() else directory / "optimizer-*.safetensors"
        """What a message about the state as a whole names."""
        self._open, self._join = open_file, join
        self._files: dict[Path, Any] = {}

    def place(self, name: str) -> Path:
        """The file that holds a tensor, or the first of several."""
        return self.layouts[name].pieces[0].path

    def tensor(self, name: str) -> Any:
        """All of a tensor."""
        rows = self.layouts[name].shape[:1]
        return self.rows(name, 0, rows[0]) if rows and rows[0] else self._file(self.place(name)).get_tensor(name)

    def rows(self, name: str, first: int, last: int) -> Any:
        """Rows ``first`` to ``last - 1`` of a tensor that has them."""
        found = []
        for piece in self.layouts[name].pieces:
            begin, end = max(first, piece.first), min(last, piece.first + piece.count)
            if begin < end:
                found.append(self._file(piece.path).get_slice(name)[begin - piece.first : end - piece.first])
        return found[0] if len(found) == 1 else self._join(found)

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = self._open(path)
        return self._files[path]


@contextmanager
def stored_state(directory: Path, *, framework: str, join: Callable[[Sequence[Any]], Any]) -> Iterator[StoredState]:
    """The state in a checkpoint's directory; ``join`` puts rows together. Raises ValueError where its files are no state."""
    with ExitStack() as stack:
        yield StoredState(directory, lambda path: stack.enter_context(safe_open(path, framework=framework)), join)

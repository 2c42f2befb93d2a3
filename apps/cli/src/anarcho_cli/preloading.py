"""Modules that take seconds to load, loaded on a thread while the command does something else: waits for processes, or for the disk."""

from __future__ import annotations

import importlib
import threading
from contextlib import suppress


def load_beside(*modules: str) -> None:
    """Begins to load modules; who imports one meanwhile waits for it, and is told if it cannot be loaded."""

    def load() -> None:
        with suppress(Exception):
            for module in modules:
                importlib.import_module(module)

    threading.Thread(target=load, name="preloading").start()

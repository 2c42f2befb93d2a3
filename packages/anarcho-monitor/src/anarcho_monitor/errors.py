"""The one error that users of this package meet: a sentence that says what was found, what was expected and what to do."""

from __future__ import annotations


class MonitorError(ValueError):
    """Bad input to a monitor: an impossible setting, a metrics file of another format, a missing extra."""

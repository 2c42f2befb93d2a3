"""What a report cannot be made of, or written to; the message is one sentence for the user."""

from __future__ import annotations


class ReportError(ValueError):
    """A run without records, or a place where no report may be written."""

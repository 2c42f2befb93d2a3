"""Rows as token ids: what is made of their contents, and what one rank of several has recorded of it for the others."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class EncodedDocument(NamedTuple):
    """One document as its part's shards store it."""

    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8] | None
    """1 where a token counts as a target; None for a text, of which every token does."""


class EncodedRow(NamedTuple):
    """A row that was encoded before, in place of its content."""

    documents: tuple[EncodedDocument, ...]
    num_bytes: tuple[int, ...]
    """UTF-8 bytes of each document."""


class NotRecordedError(Exception):
    """What is needed of the source was not recorded; the source itself has it."""

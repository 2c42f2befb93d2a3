"""The tokens that are not text, and the two characters that SentencePiece gives a meaning of its own.

Special tokens are SentencePiece control symbols: no raw text ever encodes to them, not even their own spelling.
There is no begin-of-text token: `<|endoftext|>` ends a document, and so stands before the next one.
"""

UNKNOWN = "<unk>"
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END = "<|end|>"

SPECIAL_TOKENS = (UNKNOWN, END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END)
"""In the order of their ids, from 0, in tokenizers that are trained here; a foreign model has them elsewhere.

SentencePiece wants an unknown token; byte fallback leaves it without use.
"""

LINE_BREAKS = ("\n", "\n\n")
"""Pieces that are always whole and never part of another one, so that text may be cut behind a run of line breaks."""

FIRST_LEARNED = len(SPECIAL_TOKENS) + len(LINE_BREAKS) + 256
"""Id of the first piece that is learned from text, behind special tokens, line breaks and bytes, where there are no user symbols."""

SPACE_MARK = "\u2581"
"""SentencePiece writes a space as this character, and would read this character as a space."""

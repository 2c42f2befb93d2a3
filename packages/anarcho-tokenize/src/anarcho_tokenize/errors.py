"""The errors of this package: each carries one sentence for the person who can repair the input.

A file that is missing raises the built-in `FileNotFoundError`, with such a sentence, too.
"""


class TokenizerError(ValueError):
    """A tokenizer cannot be trained, loaded or applied as asked."""


class SourceError(ValueError):
    """A text source holds something that is not the documents it should hold."""


class ShardError(ValueError):
    """Token shards cannot be written or read, or do not hold what their index says."""

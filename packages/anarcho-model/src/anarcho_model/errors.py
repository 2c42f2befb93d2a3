"""Errors that every back-end raises alike; free of any framework."""

__all__ = ["ContextError", "NotFiniteError"]


class ContextError(ValueError):
    """More tokens than the model's context, or than a cache, can hold."""


class NotFiniteError(ValueError):
    """A model whose numbers are NaN or infinite, of which nothing can be drawn or judged."""

    def __init__(self) -> None:
        super().__init__(
            "The model's logits are NaN or infinite, expected finite numbers; take an earlier checkpoint, or train with a "
            "lower learning rate."
        )

"""Errors that every back-end raises alike; free of any framework."""

__all__ = ["ContextError"]


class ContextError(ValueError):
    """More tokens than the model's context, or than a cache, can hold."""

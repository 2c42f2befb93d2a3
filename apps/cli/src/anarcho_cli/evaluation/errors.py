"""The error of evaluations."""


class EvaluationError(ValueError):
    """Something that cannot be evaluated as asked; the message is one sentence for the user."""

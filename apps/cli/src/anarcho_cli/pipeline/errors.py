"""What goes wrong with a pipeline for reasons that its user can mend."""


class PipelineError(ValueError):
    """A pipeline that cannot be run; the message is one sentence for the user."""

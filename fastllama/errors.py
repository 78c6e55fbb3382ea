"""Failures a user is told about in a sentence that are not mistakes in what was asked for."""


class TrainingFailedError(RuntimeError):
    """The run cannot go on; what is on disk is whole."""

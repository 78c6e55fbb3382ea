"""Failures a user is told about in a sentence that are not mistakes in what was asked for."""


class TrainingFailedError(RuntimeError):
    """The run cannot go on; what is on disk is whole."""


class FailedFirstError(RuntimeError):
    """What ended a process of several, before any other failed; its cause is the failure."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} failed")
        self.rank = rank


class FailedElsewhereError(RuntimeError):
    """A process ended because another, which tells why, had failed."""

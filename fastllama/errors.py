"""Failures that end a run, which the command line reports in one sentence; words for others."""


class TrainingFailedError(RuntimeError):
    """The run cannot continue. All files on disk are intact."""


class RankFailedError(RuntimeError):
    """This rank failed before all other ranks. `__cause__` is its failure."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} failed")
        self.rank = rank


class PeerFailedError(RuntimeError):
    """This rank failed after another rank. `__cause__` is its failure."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} failed after another rank")


class SideJobFailedError(ValueError):
    """A sample or a validation failed, on every rank alike. Training can continue."""


EXPECTED = (ValueError, OSError, TrainingFailedError)
"""Errors whose message is written for the user; any other error is a bug."""


def reason(error: BaseException) -> str:
    """Why something failed, on one line: the system's words, or type and message of the error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, SideJobFailedError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

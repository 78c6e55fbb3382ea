"""Failures that end a run. The command line reports them in one sentence."""


class TrainingFailedError(RuntimeError):
    """The run cannot continue. All files on disk are intact."""


class RankFailedError(RuntimeError):
    """This rank failed before all other ranks. `__cause__` is its failure."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} failed")
        self.rank = rank


class PeerFailedError(RuntimeError):
    """This rank ended because another rank failed first. The other rank reports the failure."""

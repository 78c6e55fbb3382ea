"""The result of an update, read on the host one update late."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UpdateResult:
    """The result of one update. The seconds of training and data are this rank's."""

    step: int
    """Optimizer updates since the run began, from 1."""
    end_position: int
    """Position in the data order after the update's last sequence."""
    loss: float
    """Mean loss of the update's tokens, in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    skip_reason: str
    """Why the update was skipped; empty if it was applied."""
    stop: bool
    """Whether any rank was asked to stop before the update."""
    training_seconds: float
    """Training seconds of this session at the end of the update, side jobs excluded."""
    data_wait_seconds: float
    """Seconds that the update waited for data."""
    collective_seconds: list[float]
    """Seconds that each rank spent in collectives two updates earlier."""
    sources: list["SourceResult"]
    """The part of each source in the update; empty with one source."""


@dataclass(frozen=True)
class SourceResult:
    """The part of one source in an update."""

    loss: float
    """Mean loss of the source's tokens, in nats; NaN without tokens."""
    tokens: int
    """Tokens of the source in the update."""
    tokens_total: int
    """Tokens of the source that the run has passed, skipped data included."""


class LateScalars:
    """Copies a small vector off the device without making the host wait for its update.

    `send` starts the copy to pinned memory. `receive`, called after the next update was launched,
    waits for a copy that has usually ended.
    """

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def send(self, values: Tensor) -> None:
        """Start copying a 1-D float tensor."""
        if values.device.type == "cpu":
            self._host = values
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        # Otherwise the wait would keep a core busy.
        self._copied = torch.cuda.Event(blocking=True)
        self._copied.record()

    def receive(self) -> list[float]:
        """The values sent last."""
        assert self._host is not None
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()

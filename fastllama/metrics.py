"""What an update tells: a row of numbers, the clock, and scalars that arrive a step late."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Row:
    """One logged update; the fields are the columns of metrics.csv, in their order."""

    step: int
    """Optimizer updates since the run began, from 1."""
    tokens: int
    """Tokens trained on by this process group, since it started; after a rewind again."""
    tokens_total: int
    """Tokens trained on since the run began."""
    loss: float
    """Mean negative log-likelihood of this update's tokens, in nats."""
    perplexity: float
    """exp(loss)."""
    lr: float
    """Learning rate of this update."""
    grad_norm: float
    """Global gradient norm before clipping."""
    tok_per_s: float
    """Tokens a second since the row before, over all devices, side jobs not counted."""
    time_s: float
    """Wall seconds since this process group started training."""
    data_wait_s: float
    """Seconds since the row before that training stood still for want of data."""
    skipped_steps: int
    """Updates refused since the run began because loss or gradient norm was bad."""
    progress: float
    """Share of the run's updates done."""
    eta_s: float
    """Wall seconds to the end at the pace so far."""
    mfu_causal: float | None = None
    """Model FLOPs over the devices' peak, attention counted below the diagonal."""
    mfu_palm: float | None = None
    """Model FLOPs over the devices' peak, attention counted in full."""
    val_loss: float | None = None
    """Loss on the held-out split after this update."""
    val_bits_per_byte: float | None = None
    """val_loss in bits over the bytes of text a token stands for: the same for any tokenizer."""
    peak_gib: float | None = None
    """Most memory PyTorch has had allocated on the main process's GPU so far, in GiB."""

    def line(self) -> str:
        """The row for the console."""
        parts = [
            f"step {self.step}",
            f"{self.progress:6.1%}",
            f"loss {self.loss:.4f}",
            f"ppl {self.perplexity:.1f}",
            f"lr {self.lr:.2e}",
            f"gnorm {self.grad_norm:.2f}",
            f"tok {human(self.tokens_total)}",
            f"{self.tok_per_s:,.0f} tok/s",
            f"{duration(self.time_s)}",
            f"eta {duration(self.eta_s)}",
            f"wait {self.data_wait_s:.2f}s",
        ]
        if self.mfu_causal is not None and self.mfu_palm is not None:
            parts.append(f"mfu {self.mfu_causal:.1%} causal {self.mfu_palm:.1%} palm")
        if self.peak_gib is not None:
            parts.append(f"peak {self.peak_gib:.1f} GiB")
        if self.skipped_steps:
            parts.append(f"skipped {self.skipped_steps}")
        if self.val_loss is not None and self.val_bits_per_byte is not None:
            parts.append(f"val {self.val_loss:.4f} ({self.val_bits_per_byte:.3f} bits/byte)")
        return "  ".join(parts)


COLUMNS = [field.name for field in fields(Row)]


def human(count: int) -> str:
    """A count of tokens in a few characters: 9,216 or 102.4k or 1.3B."""
    if count < 10_000:
        return f"{count:,}"
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if round(count / size, 1) >= 1:
            return f"{count / size:.1f}{letter}"
    return f"{count / 1000:.1f}k"


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


class Clock:
    """Seconds since training began, in all and without validation, samples and checkpoints."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._aside = 0.0

    def wall(self) -> float:
        return time.perf_counter() - self._start

    def launched(self) -> None:
        """Note that the whole of an update was handed to the device."""

    def training(self) -> float:
        """Those of the updates; to be asked where the last one launched is known to be done."""
        return self.wall() - self._aside

    @contextmanager
    def side_job(self) -> Iterator[None]:
        """Leave the time inside out of `training`."""
        before = self.wall()
        try:
            yield
        finally:
            self._aside += self.wall() - before


class DeviceClock(Clock):
    """A `Clock` whose training time is that between events on the current CUDA stream.

    The host notices the end of an update when it has launched the next one, but before a side job
    at once: by its own clock the update before one is too short, and the one after it too long.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seconds = 0.0
        self._begin = self._end = self._record()

    def launched(self) -> None:
        self._end = self._record()

    def training(self) -> float:
        self._end.synchronize()
        self._seconds += self._begin.elapsed_time(self._end) / 1000
        self._begin = self._end
        return self._seconds

    @contextmanager
    def side_job(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._begin = self._record()

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class LateScalars:
    """Carries a small vector off the device without making the host wait for the step it is from.

    `send` starts the copy to pinned memory; `receive`, called after the next step was launched,
    waits only for a copy that is long done.
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
        self._copied = torch.cuda.Event()
        self._copied.record()

    def receive(self) -> list[float]:
        """The values last sent."""
        assert self._host is not None
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()

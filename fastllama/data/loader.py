"""Micro-batches, read and copied to the device ahead of use.

A background thread fills a ring of pinned host buffers and, on CUDA, copies each to its device
buffer on a stream of its own. Events order the three: a copy waits until the batch before it in
the same slot has been used, the training stream waits for the copy, and a host buffer is refilled
only after its copy has ended. The training thread waits when the ring is empty: because the reader
is slow, and that time is counted, or because the device is still busy with the micro-batches it was
handed, and then nothing is lost.
"""

import queue
import threading
import time
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fastllama.data.batch import read_batch, sequences_at
from fastllama.data.stream import TokenStream


class _Slot:
    """One place of the ring: (2, B, T) int64, inputs and targets, on the host and the device."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.host = torch.empty(shape, dtype=torch.int64, pin_memory=on_cuda)
        self.device = torch.empty_like(self.host, device=device) if on_cuda else self.host
        self.copied = torch.cuda.Event() if on_cuda else None
        self.used = torch.cuda.Event() if on_cuda else None
        if self.used is not None:
            # The memory may be that of a tensor the stream of the allocation has still to read.
            self.used.record(torch.cuda.current_stream(device))


class BatchLoader:
    """Endless micro-batches of this rank, in the order `fastllama.data.order` gives.

    A round of micro-batches, one a rank, takes the next `batch_size * world_size` positions, so
    the set of sequences in an update depends on the global position alone, not on how the update
    is cut.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        position: int = 0,
        rank: int = 0,
        world_size: int = 1,
        depth: int = 4,
    ) -> None:
        """Start reading at the global `position`, counted in sequences since the run began."""
        self.wait_seconds = 0.0
        self._stream, self._seq_len, self._seed = stream, seq_len, seed
        self._first = position + rank * batch_size
        self._stride = batch_size * world_size
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Slot | Exception] = queue.SimpleQueue()
        self._current: _Slot | None = None
        for _ in range(depth):
            self._free.put(_Slot((2, batch_size, seq_len), device))
        self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)
        self._thread.start()

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) int64 on the device, valid until the next call.

        Raises:
            OSError: the shards could no longer be read.
        """
        used = self._release()
        start = time.perf_counter()
        slot = self._ready.get()
        if used is None or used.query():
            self.wait_seconds += time.perf_counter() - start
        if isinstance(slot, Exception):
            self._ready.put(slot)  # for a caller that asks again
            raise slot
        if slot.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.copied)
        self._current = slot
        return slot.device[0], slot.device[1]

    def _release(self) -> torch.cuda.Event | None:
        """Give the last batch's slot back; on CUDA, return the event of its last use."""
        if self._current is None:
            return None
        used = self._current.used
        if used is not None:
            used.record(torch.cuda.current_stream(self._device))
        self._free.put(self._current)
        self._current = None
        return used

    def _read_ahead(self) -> None:
        try:
            side = self._side
            if side is not None:
                # A new thread starts on GPU 0 and would make a context there.
                torch.cuda.set_device(self._device)
            first = self._first
            while (slot := self._free.get()) is not None:
                if slot.copied is not None:
                    slot.copied.synchronize()
                positions = range(first, first + slot.host.shape[1])
                sequences = sequences_at(positions, self._stream, self._seq_len, self._seed)
                read_batch(self._stream, sequences, slot.host)
                if slot.copied is not None and slot.used is not None and side is not None:
                    with torch.cuda.stream(side):
                        side.wait_event(slot.used)
                        slot.device.copy_(slot.host, non_blocking=True)
                        slot.copied.record(side)
                self._ready.put(slot)
                first += self._stride
        except Exception as error:  # handed to the training thread, which raises it
            self._ready.put(error)

    def close(self) -> None:
        """Stop the reader."""
        self._free.put(None)
        self._thread.join()
        if self._side is not None:
            # The allocator knows nothing of copies that are still to come to the buffers.
            self._side.synchronize()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

"""Micro-batches, read and copied to the device ahead of use.

A background thread fills a ring of pinned host buffers. On CUDA it copies each buffer to the device
on its own stream. Events order the work on one slot of the ring: a copy waits until training has
used the previous batch, training waits for the copy, and the thread refills the host buffer after
the copy.

The training thread waits when the ring is empty. If the device is idle, the reader is too slow and
the wait is counted. If the device is still busy with earlier micro-batches, the wait costs nothing
and is not counted.
"""

import queue
import threading
import time
from types import TracebackType
from typing import Self

import torch

from fastllama.data.batch import Batch, fill_batch
from fastllama.data.packing import Packing
from fastllama.data.training_data import TrainingData

FETCHED_SEQUENCES = 128
"""Sequences of a rank that are fetched ahead of those in the ring, where data is behind a URL."""


class _Slot:
    """Buffers of one micro-batch on the host and the device. On the CPU both are one buffer.

    `host` and `device` are inputs and targets, (2, B, T) int64. `host_sources` and
    `device_sources` are the number of each sequence's source, (B,) int64; None with one source.
    With packing there are also (B * T + 1,) int32 for any `cu_seqlens`.
    """

    def __init__(
        self,
        batch_size: int,
        seq_len: int,
        n_sources: int,
        device: torch.device,
        packing: Packing | None,
    ) -> None:
        on_cuda = device.type == "cuda"
        self.host = torch.empty(2, batch_size, seq_len, dtype=torch.int64, pin_memory=on_cuda)
        self.device = torch.empty_like(self.host, device=device) if on_cuda else self.host
        self.host_sources = self.device_sources = None
        if n_sources > 1:
            self.host_sources = torch.empty(batch_size, dtype=torch.int64, pin_memory=on_cuda)
            self.device_sources = self.host_sources
            if on_cuda:
                self.device_sources = torch.empty_like(self.host_sources, device=device)
        self._packing = packing
        if packing is not None:
            # For a document of each token. A part of it is used, and copied.
            size = self.host[0].numel() + 1
            self._host_borders = torch.empty(size, dtype=torch.int32, pin_memory=on_cuda)
            self._borders = self._host_borders
            if on_cuda:
                self._borders = torch.empty_like(self._host_borders, device=device)
            self._n_borders = 0
        # The reader waits for it nearly all the time, and should not keep a core busy.
        self.copied = torch.cuda.Event(blocking=True) if on_cuda else None
        self.used = torch.cuda.Event() if on_cuda else None
        if self.used is not None:
            # The allocator may reuse memory that pending kernels of the current stream still read.
            # The first copy to the buffer has to wait for them.
            self.used.record(torch.cuda.current_stream(device))

    def find_documents(self) -> None:
        """Write the borders of documents to the host, if there is packing."""
        if self._packing is not None:
            cu_seqlens = torch.from_numpy(self._packing.cu_seqlens(self.host.numpy()))
            self._n_borders = len(cu_seqlens)
            self._host_borders[: self._n_borders] = cu_seqlens

    def copy(self) -> None:
        """Start copying from the host to the device, on the current stream."""
        self.device.copy_(self.host, non_blocking=True)
        if self.host_sources is not None and self.device_sources is not None:
            self.device_sources.copy_(self.host_sources, non_blocking=True)
        if self._packing is not None:
            borders = self._host_borders[: self._n_borders]
            self._borders[: self._n_borders].copy_(borders, non_blocking=True)

    def batch(self) -> Batch:
        """The micro-batch on the device."""
        cu_seqlens = None if self._packing is None else self._borders[: self._n_borders]
        return Batch(self.device[0], self.device[1], self.device_sources, cu_seqlens)


class BatchLoader:
    """Endless micro-batches of one rank, in the order of `TrainingData`.

    One micro-batch of every rank together takes the next `batch_size * world_size` sequences. The
    set of sequences in an update therefore depends only on the global position, not on the number
    of ranks or the micro-batch size. `wait_seconds` sums the counted waits in `next`.
    """

    def __init__(
        self,
        data: TrainingData,
        *,
        seq_len: int,
        batch_size: int,
        device: torch.device,
        position: int = 0,
        rank: int = 0,
        world_size: int = 1,
        depth: int = 4,
        packing: Packing | None = None,
    ) -> None:
        """Start reading at global `position`, in blocks of `data` since the run began.

        `seq_len` divides the length of a block. `depth` is the number of micro-batches in the ring,
        with the one in use. `packing` keeps documents apart.
        """
        self.wait_seconds = 0.0
        self._data, self._seq_len = data, seq_len
        self._first = position * (data.block_len // seq_len) + rank * batch_size
        self._stride = batch_size * world_size
        self._world_size = world_size
        self._device = device
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Slot | Exception] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._current: _Slot | None = None
        for _ in range(depth):
            self._free.put(_Slot(batch_size, seq_len, len(data.streams), device, packing))
        self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next micro-batch, valid until the next call.

        Raises:
            OSError: a shard can no longer be read.
        """
        used = self._release()
        start = time.perf_counter()
        slot = self._ready.get()
        if used is None or used.query():
            self.wait_seconds += time.perf_counter() - start
        if isinstance(slot, Exception):
            self._ready.put(slot)  # A later call raises it again.
            raise slot
        if slot.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.copied)
        self._current = slot
        return slot.batch()

    def _release(self) -> torch.cuda.Event | None:
        """Return the slot of the previous batch to the ring.

        On CUDA, return the event after which training no longer reads the slot.
        """
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
            copy_stream = self._copy_stream
            is_remote = any(stream.is_remote for stream in self._data.streams)
            # The last sequence to fetch, counted over all ranks.
            n_ahead = max(self._stride, self._world_size * FETCHED_SEQUENCES)
            if copy_stream is not None:
                # A new thread starts on GPU 0 and would create a CUDA context there.
                torch.cuda.set_device(self._device)
            first = ahead = self._first
            while (slot := self._free.get()) is not None and not self._closed.is_set():
                while is_remote and ahead < first + n_ahead and not self._closed.is_set():
                    wanted = range(ahead, ahead + slot.host.shape[1])
                    self._data.fetch(self._data.places(wanted, self._seq_len), self._seq_len)
                    ahead += self._stride
                if slot.copied is not None:
                    slot.copied.synchronize()
                numbers = range(first, first + slot.host.shape[1])
                places = self._data.places(numbers, self._seq_len)
                fill_batch(self._data.read(places, self._seq_len), slot.host)
                if slot.host_sources is not None:
                    slot.host_sources.numpy()[:] = [place.source for place in places]
                slot.find_documents()
                if slot.copied is not None and slot.used is not None and copy_stream is not None:
                    with torch.cuda.stream(copy_stream):
                        copy_stream.wait_event(slot.used)
                        slot.copy()
                        slot.copied.record(copy_stream)
                self._ready.put(slot)
                first += self._stride
        except Exception as error:  # `next` raises it in the training thread.
            self._ready.put(error)

    def close(self) -> None:
        """Stop the reader thread after its micro-batch, and wait for its copies."""
        self._stop()
        self._thread.join()
        if self._copy_stream is not None:
            # The allocator does not know about pending copies and could reuse the buffers.
            self._copy_stream.synchronize()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            # Copies wait for training, which may wait for a collective that never ends.
            self._stop()

    def _stop(self) -> None:
        self._closed.set()
        # Free slots may be in front of it.
        self._free.put(None)

"""Records what memory the kernels touch, in Triton's interpreter, and counts bytes per row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from benchmarks.counts.launches import OPERATORS, SEQ_LEN, Operator, label, models
from fastllama_kernels.rms_norm import programs_per_multiprocessor

_TRITON_NAMES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass
class Touched:
    """What a launch did with one of its tensors."""

    tensor: Tensor
    read: np.ndarray[Any, np.dtype[np.bool_]] = field(init=False)
    written: np.ndarray[Any, np.dtype[np.bool_]] = field(init=False)
    read_again: int = 0
    """Elements that a later access read again."""

    def __post_init__(self) -> None:
        n_elements = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        self.read = np.zeros(n_elements, bool)
        self.written = np.zeros_like(self.read)


@dataclass(frozen=True)
class Moved:
    """Bytes that a launch moves, each byte counted once."""

    read_once: float
    written_once: float
    per_row: float
    read_again_per_row: float
    """More bytes, of tensors with rows, that a later access of a launch reads again."""
    issued_per_row: float
    """Bytes of all accesses to blocks of elements, including masked elements and repeated ones."""


@dataclass(frozen=True)
class Recorded:
    """A launch and what it touched."""

    label: str
    touched: dict[str, Touched]
    issued: int
    """Bytes of all accesses to blocks of elements."""


class _Recorder:
    """Looks at every access of the launch that runs."""

    def __init__(self) -> None:
        self.touched: dict[str, Touched] = {}
        self.issued = 0

    def start(self, tensors: dict[str, Tensor]) -> None:
        self.touched = {name: Touched(tensor) for name, tensor in tensors.items()}
        self.issued = 0

    def access(self, pointers: Any, mask: Any, writes: bool) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.asarray(pointers.data).astype(np.int64)
        if addresses.size > 1:
            self.issued += addresses.size * size
        used = np.unique(addresses[np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)])
        if not used.size:
            return
        touched = self._owner(int(used[0]))
        elements = (used - touched.tensor.untyped_storage().data_ptr()) // size
        if writes:
            touched.written[elements] = True
        else:
            touched.read_again += int(touched.read[elements].sum())
            touched.read[elements] = True

    def _owner(self, address: int) -> Touched:
        for touched in self.touched.values():
            start = touched.tensor.untyped_storage().data_ptr()
            if start <= address < start + touched.tensor.untyped_storage().nbytes():
                return touched
        raise ValueError(f"{address:#x} is in no tensor of the launch.")


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """Record the launches of this thread; Triton's interpreter has to be on."""
    launches: list[Recorded] = []
    recorder = _Recorder()
    call = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def record_call(executor: Any, *arguments: Any, **options: Any) -> None:
        named = dict(zip(executor.arg_names, arguments, strict=False)) | options
        tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
        recorder.start(tensors)
        call(executor, *arguments, **options)
        constants = {name: named[name] for name in executor.constexprs if name in named}
        pointers = {name: _TRITON_NAMES[x.dtype] for name, x in tensors.items()}
        name = label(executor.fn.__name__, constants, pointers)
        launches.append(Recorded(name, recorder.touched, recorder.issued))

    def record_load(builder: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        recorder.access(pointers, mask, writes=False)
        return load(builder, pointers, mask, *others)

    def record_store(builder: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        recorder.access(pointers, mask, writes=True)
        return store(builder, pointers, value, mask, *others)

    GridExecutor.__call__ = record_call
    InterpreterBuilder.create_masked_load = record_load
    InterpreterBuilder.create_masked_store = record_store
    try:
        yield launches
    finally:
        GridExecutor.__call__ = call
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def moved_by_recipes(operators: Sequence[Operator] = OPERATORS[:-1]) -> dict[str, Moved]:
    """Return what each launch of training the recipes moves, by its label.

    The last operator, linear_cross_entropy, launches what those before it do.
    """
    found: dict[str, Moved] = {}
    for model in models():
        # The programs of the norm's backward share its rows.
        shared = max(SEQ_LEN, programs_per_multiprocessor(model.n_embd))
        for train in operators:
            n_rows = shared if train in OPERATORS[:2] else 1
            with recorded() as few:
                train(model, n_rows)
            with recorded() as many:
                train(model, 2 * n_rows)
            for less, more in zip(few, many, strict=True):
                found.setdefault(less.label, _moved(less, more, n_rows))
    return found


def _moved(few: Recorded, many: Recorded, n_rows: int) -> Moved:
    """The line through a launch on `n_rows` and one on twice as many."""
    read_once = written_once = per_row = again = 0.0
    for name, less in few.touched.items():
        more, size = many.touched[name], less.tensor.element_size()
        read, written = (
            (int(x.sum()) * size, (int(y.sum()) - int(x.sum())) * size / n_rows)
            for x, y in ((less.read, more.read), (less.written, more.written))
        )
        read_once += read[0] - read[1] * n_rows
        written_once += written[0] - written[1] * n_rows
        per_row += read[1] + written[1]
        # Tensors without rows, such as weights and tables, are small and stay in the caches.
        if read[1]:
            again += (more.read_again - less.read_again) * size / n_rows
    issued = (many.issued - few.issued) / n_rows
    return Moved(read_once, written_once, per_row, again, issued)

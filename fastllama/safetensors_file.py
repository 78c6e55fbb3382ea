"""Writes safetensors files tensor by tensor. The library's writer holds a whole file in memory."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""Their names in safetensors."""


class Output(Protocol):
    """A binary file, of which only `write` is used."""

    def write(self, content: bytes | memoryview, /) -> object: ...


def write_safetensors(
    file: Output,
    layout: Mapping[str, Tensor],
    values: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write the header and the tensors of a file of https://github.com/huggingface/safetensors.

    Args:
        file: takes the content from its beginning.
        layout: the tensors by name. Only their shapes and dtypes are read, so they may be on the
            meta device. A dtype with larger items must come before one with smaller items, so that
            every tensor is aligned.
        values: the values of the tensors in the order of `layout`, in any dtype, on the CPU.
        metadata: texts for the header.

    Raises:
        OSError: `file` cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in layout.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    file.write(len(content).to_bytes(8, "little"))
    file.write(content)
    for tensor, value in zip(layout.values(), values, strict=True):
        file.write(stored(value, tensor.dtype))


def stored(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """The bytes of a tensor in `dtype`, as files of weights hold them."""
    return tensor.to(dtype).contiguous().flatten().view(torch.uint8).numpy().data

"""Token files as other tools write them, from the layouts that their sources define."""

import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

END = 1

Documents = Sequence[Sequence[int]]
"""Token ids of documents, without end tokens."""


def concatenated(documents: Documents) -> list[int]:
    """The stream of the documents, each with its end token."""
    return [token for document in documents for token in (*document, END)]


def flat(documents: Documents) -> list[int]:
    return [token for document in documents for token in document]


def write_raw(path: Path, documents: Documents, dtype: str = "<u2") -> Path:
    """nanoGPT's prepare.py: nothing but the ids."""
    path = path.with_suffix(".bin")
    np.array(concatenated(documents), dtype).tofile(path)
    return path


def write_npy(path: Path, documents: Documents, dtype: str = "<u2") -> Path:
    path = path.with_suffix(".npy")
    np.save(path, np.array(concatenated(documents), dtype))
    return path


def write_llm_c(
    path: Path, documents: Documents, magic: int = 20240520, version: int = 1, dtype: str = "<u2"
) -> Path:
    """llm.c's `write_datafile`: 256 int32 of header, then the ids."""
    path = path.with_suffix(".bin")
    ids = concatenated(documents)
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())
    return path


def write_datatrove(
    path: Path, documents: Documents, dtype: str = "<u2", metadata: bool = True, index: bool = True
) -> Path:
    """datatrove's `TokenizedFile`: ids, document ends, and a text about both."""
    path = path.with_suffix(".ds")
    ids = np.array(flat(documents), dtype)
    ids.tofile(path)
    if index:
        ends = list(accumulate(map(len, documents)))
        Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata:
        lines = (f"gpt2|{ids.itemsize}", str(ids.size), f"{ids.size} T")
        Path(f"{path}.metadata").write_text("\n".join(lines))
    return path


MEGATRON_CODES = {"<u1": 1, "<i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}


def write_megatron(
    path: Path,
    documents: Documents,
    dtype: str = "<u2",
    sequences: Sequence[int] | None = None,
    borders: Sequence[int] | None = None,
) -> Path:
    """Megatron-LM's `_IndexWriter`. By default each document is one sequence.

    `sequences` are lengths in tokens; `borders` the numbers of the sequences at which documents
    end, after a 0.
    """
    path = path.with_suffix(".bin")
    ids = np.array(flat(documents), dtype)
    ids.tofile(path)
    lengths = np.array(list(map(len, documents)) if sequences is None else sequences, "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * ids.itemsize
    indices = np.array(range(len(documents) + 1) if borders is None else borders, "<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, MEGATRON_CODES[dtype])
    counts = struct.pack("<QQ", lengths.size, indices.size)
    path.with_suffix(".idx").write_bytes(
        header + counts + lengths.tobytes() + pointers.astype("<i8").tobytes() + indices.tobytes()
    )
    return path


WRITERS: dict[str, Callable[[Path, Documents], Path]] = {
    "nanoGPT": write_raw,
    "llm.c": write_llm_c,
    "llm.c for Llama 3": lambda path, documents: write_llm_c(path, documents, 20240801, 7, "<u4"),
    "datatrove": write_datatrove,
    "datatrove, 32 bits": lambda path, documents: write_datatrove(path, documents, "<u4"),
    "datatrove without metadata": lambda path, documents: write_datatrove(
        path, documents, metadata=False
    ),
    "datatrove, 32 bits, without metadata": lambda path, documents: write_datatrove(
        path, documents, "<u4", metadata=False
    ),
    **{
        f"npy of {dtype}": lambda path, documents, dtype=dtype: write_npy(path, documents, dtype)
        for dtype in ("<u2", "<u4", "<i4", "<i8", ">i4")
    },
    **{
        f"Megatron of {dtype}": lambda path, documents, dtype=dtype: write_megatron(
            path, documents, dtype
        )
        for dtype in MEGATRON_CODES
    },
}

"""Reads records from Parquet, with memory bounded for any row group."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastllama.data.decompression import BUFFER_BYTES, DamagedInputError, check_expansion
from fastllama.data.records import EMPTY, NoText, Record, missing_field, too_long

BATCH_ROWS = 1024
BATCH_BYTES = 2**27
MAX_ROWS_PER_BYTE = 1000
"""A file may declare this many rows per byte, or 10 million. Each row costs time, even if null."""


def read_parquet(path: Path, field: str, skip: int, max_bytes: int) -> Iterator[Record]:
    """Yield the records of the rows after the first `skip`."""
    size = path.stat().st_size
    # A name that is not UTF-8 must reach Arrow as bytes.
    with pa.OSFile(os.fsencode(path)) as source, _open(source) as file:
        metadata = file.metadata
        rows = _check_rows(metadata, size)
        problem = _check_column(file.schema_arrow, field)
        if rows and problem:
            yield Record(1, replace(problem, records=rows, ends_file=True), size)
            return
        row = 0
        for group in range(metadata.num_row_groups):
            group_rows = metadata.row_group(group).num_rows
            if row + group_rows <= skip:
                row += group_rows
                continue
            batch_rows = _batch_rows(source, metadata, group, field)
            for content in _read_group(file, group, field, batch_rows, max_bytes):
                row += 1
                if row > skip:
                    yield Record(row, content, size * row // rows)


def _open(source: pa.NativeFile, **options: Any) -> pq.ParquetFile:
    # By default Arrow reads whole row groups, and ignores checksums.
    return pq.ParquetFile(
        source,
        pre_buffer=False,
        buffer_size=BUFFER_BYTES,
        page_checksum_verification=True,
        **options,
    )


def _check_rows(metadata: pq.FileMetaData, size: int) -> int:
    """The number of rows.

    Raises:
        DamagedInputError: the footer contradicts itself, or the file is too small for its rows.
    """
    rows = metadata.num_rows
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if rows != sum(groups) or any(group_rows < 0 for group_rows in groups):
        raise DamagedInputError(f"it declares {rows:,} rows, its row groups {sum(groups):,}")
    if rows > max(10**7, MAX_ROWS_PER_BYTE * size):
        raise DamagedInputError(f"it declares {rows:,} rows in {size:,} bytes")
    return rows


def _check_column(schema: pa.Schema, field: str) -> NoText | None:
    """Why the column `field` has no text in any row; None if it has."""
    if field not in schema.names:
        return missing_field(field, tuple(schema.names))
    kind = schema.types[schema.names.index(field)]
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binaries = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    if any(is_kind(kind) for is_kind in (*texts, *binaries)):
        return None
    return NoText(f"field {field!r} is of type {kind}, not a string")


def _batch_rows(source: pa.NativeFile, metadata: pq.FileMetaData, group: int, field: str) -> int:
    """Rows to read at once, so that a batch has about `BATCH_BYTES` at most."""
    chunk = _chunk(metadata, group, field)
    check_expansion(chunk.total_uncompressed_size, chunk.total_compressed_size)
    # Any row may repeat the longest value of the dictionary, which a single row makes known.
    with _open(source, metadata=metadata, read_dictionary=[field]) as file:
        batches = file.iter_batches(1, row_groups=[group], columns=[field], use_threads=False)
        first = next(batches, None)
        longest = pc.max(pc.binary_length(first.column(0).dictionary)).as_py() if first else 0
    mean = chunk.total_uncompressed_size // max(1, chunk.num_values)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, longest or 0, mean)))


def _read_group(
    file: pq.ParquetFile, group: int, field: str, batch_rows: int, max_bytes: int
) -> Iterator[str | NoText]:
    """Yield the content of every row of a row group.

    Raises:
        DamagedInputError: the group has other rows than it declares, or expands like a bomb.
    """
    compressed_bytes = _chunk(file.metadata, group, field).total_compressed_size
    text_bytes = rows = 0
    for batch in file.iter_batches(
        batch_rows, row_groups=[group], columns=[field], use_threads=False
    ):
        column = batch.column(0)
        if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
            column = column.cast(pa.large_binary())  # Arrow computes no length of a view.
        if pa.types.is_dictionary(column.type):
            lengths = pc.take(pc.binary_length(column.dictionary), column.indices)
        else:
            lengths = pc.binary_length(column)
        text_bytes += pc.sum(lengths).as_py() or 0
        check_expansion(text_bytes, compressed_bytes)
        for value, length in zip(column, lengths.to_pylist(), strict=True):
            yield too_long(max_bytes) if (length or 0) > max_bytes else _text_of(value, field)
        rows += len(column)
    declared = file.metadata.row_group(group).num_rows
    if rows != declared:
        raise DamagedInputError(f"row group {group} holds {rows:,} of its {declared:,} rows")


def _chunk(metadata: pq.FileMetaData, group: int, field: str) -> pq.ColumnChunkMetaData:
    names = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    return metadata.row_group(group).column(names.index(field))


def _text_of(value: pa.Scalar, field: str) -> str | NoText:
    try:
        text = value.as_py()
        if isinstance(text, bytes):
            text = text.decode()
    except UnicodeDecodeError as error:
        return NoText(f"not UTF-8 at byte {error.start}")
    return NoText(f"field {field!r} is null") if text is None else text or EMPTY

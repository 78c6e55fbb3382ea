"""Reads records from Parquet, with memory bounded for any row group."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastllama.data.decompression import (
    BUFFER_BYTES,
    DAMAGE,
    DamagedInputError,
    check_expansion,
    is_damage,
)
from fastllama.data.records import EMPTY, NoText, Record, missing_field, too_long
from fastllama.data.remote_files import RemoteFile
from fastllama.data.trees import TreeFile

BATCH_ROWS = 1024
BATCH_BYTES = 2**27
MAX_ROWS_PER_BYTE = 1000
"""A file may declare this many rows per byte, or 10 million. Each row costs time, even if null."""


def read_parquet(path: TreeFile, field: str, skip: int, max_bytes: int) -> Iterator[Record]:
    """Yield the records of the rows after the first `skip`."""
    with _source(path) as source, _open(source) as file:
        size = source.size()
        metadata = file.metadata
        rows = _check_rows(metadata, size)
        problem = _check_column(file.schema_arrow, field)
        if rows and problem:
            yield Record(1, replace(problem, records=rows, ends_file=True), size)
            return
        row = skip
        try:
            for row, content in _read_groups(source, file, field, skip, max_bytes):
                yield Record(row, content, size * row // rows)
        except DAMAGE as error:
            if not is_damage(error):
                raise
            raise DamagedInputError(str(error), max(1, rows - row)) from error


def _read_groups(
    source: pa.NativeFile, file: pq.ParquetFile, field: str, skip: int, max_bytes: int
) -> Iterator[tuple[int, str | NoText]]:
    """Yield the number and the content of the rows after the first `skip`."""
    metadata, size = file.metadata, source.size()
    end = 0
    for group in range(metadata.num_row_groups):
        group_rows = metadata.row_group(group).num_rows
        row, end = end, end + group_rows
        if end <= skip:
            continue
        # Arrow aborts the process if it is asked about a damaged column, so only about groups.
        group_bytes = metadata.row_group(group).total_byte_size
        check_expansion(group_bytes, size)
        longest = _longest_value(source, metadata, group, field)
        batch_rows = BATCH_BYTES // max(1, longest, group_bytes // max(1, group_rows))
        batches = file.iter_batches(
            max(1, min(BATCH_ROWS, batch_rows)),
            row_groups=[group],
            columns=[field],
            use_threads=False,
        )
        for content in _read_batches(batches, size, field, max_bytes):
            row += 1
            if row > skip:
                yield row, content
        if row != end:
            held = row - end + group_rows
            raise DamagedInputError(f"row group {group} holds {held:,} of its {group_rows:,} rows")


def _source(path: TreeFile) -> pa.NativeFile:
    if isinstance(path, RemoteFile):
        return pa.PythonFile(path.open(), "r")
    return pa.OSFile(os.fsencode(path))  # A name that is not UTF-8 must reach Arrow as bytes.


def _open(source: pa.NativeFile, **options: Any) -> pq.ParquetFile:
    # By default Arrow reads whole row groups, and ignores checksums. Its buffered reader bounds the
    # memory for large columns, but also allocates the 2 GB that a damaged page may declare.
    return pq.ParquetFile(
        source,
        pre_buffer=False,
        buffer_size=BUFFER_BYTES if source.size() > BATCH_BYTES else 0,
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
        columns = zip(schema.names, schema.types, strict=True)
        texts = tuple(name for name, kind in columns if _is_text(kind))
        return missing_field(field, tuple(schema.names), texts)
    if (count := schema.names.count(field)) > 1:
        return NoText(f"{count} columns have the name {field!r}: rename all but one")
    kind = schema.types[schema.names.index(field)]
    return None if _is_text(kind) else NoText(f"field {field!r} is of type {kind}, not a string")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binaries = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in (*texts, *binaries))


def _longest_value(source: pa.NativeFile, metadata: pq.FileMetaData, group: int, field: str) -> int:
    """Bytes of the longest value in the dictionary of a row group. Any row may repeat it.

    A delta encoding has no dictionary, and a row may repeat all of the row before it in a few
    bytes. `BATCH_BYTES`, and so batches of one row, where that may be.
    """
    # Read as a dictionary, a single row comes with all values of the dictionary page.
    with _open(source, metadata=metadata, read_dictionary=[field]) as file:
        rows = file.iter_batches(1, row_groups=[group], columns=[field], use_threads=False)
        try:
            first = next(rows, None)
        except OSError as error:
            # Damage, which the reading reports later, looks the same.
            if not is_damage(error):
                raise
            return BATCH_BYTES
    if first is None:
        return 0
    return pc.max(pc.binary_length(first.column(field).dictionary)).as_py() or 0


def _read_batches(
    batches: Iterator[pa.RecordBatch], size: int, field: str, max_bytes: int
) -> Iterator[str | NoText]:
    """Yield the content of every row of a row group, from a file of `size` bytes."""
    text_bytes = 0
    for batch in batches:
        # By its name: "a.b" also selects the field "b" of a column "a".
        column = batch.column(field)
        if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
            column = column.cast(pa.large_binary())  # Arrow computes no length of a view.
        if pa.types.is_dictionary(column.type):
            lengths = pc.take(pc.binary_length(column.dictionary), column.indices)
        else:
            lengths = pc.binary_length(column)
        text_bytes += pc.sum(lengths).as_py() or 0
        check_expansion(text_bytes, size)
        for value, length in zip(column, lengths.to_pylist(), strict=True):
            yield too_long(max_bytes) if (length or 0) > max_bytes else _text_of(value, field)


def _text_of(value: pa.Scalar, field: str) -> str | NoText:
    try:
        text = value.as_py()
        if isinstance(text, bytes):
            text = text.decode()
    except UnicodeDecodeError as error:
        return NoText(f"not UTF-8 at byte {error.start}")
    return NoText(f"field {field!r} is null") if text is None else text or EMPTY

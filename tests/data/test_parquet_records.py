import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastllama.data.documents import Document, Malformed, read_documents


def texts(path: Path) -> list[str]:
    return [record.text for record in read_documents([path]) if isinstance(record, Document)]


def problem(path: Path, after: Path) -> tuple[int, str]:
    """The number and reason of the only malformed record, before a file with a document."""
    *_, record, document = read_documents([path, after])
    assert isinstance(record, Malformed)
    assert isinstance(document, Document)
    assert record.where.startswith(f"{path}:")
    return int(record.where.removeprefix(f"{path}:")), record.reason


@pytest.fixture
def after(tmp_path: Path) -> Path:
    path = tmp_path / "z.txt"
    path.write_text("next")
    return path


STRINGS = ["ab", None, "", "é"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("encoded", [False, True])
def test_kinds_of_text_columns(tmp_path: Path, kind: pa.DataType, encoded: bool) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"id": range(4), "text": pa.array(STRINGS, kind)})
    pq.write_table(table, path, use_dictionary=encoded, row_group_size=3)
    assert texts(path) == ["ab", "é"]


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_encodings_without_a_dictionary(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "x.parquet"
    column = [None, "", *(f"text {number}" for number in range(5000))]
    pq.write_table(
        pa.table({"text": column}), path, use_dictionary=False, column_encoding={"text": encoding}
    )
    assert texts(path) == column[2:]


def test_delta_encoding_that_expands_like_a_bomb(tmp_path: Path, after: Path) -> None:
    path = tmp_path / "x.parquet"
    # In one page, each row after the first is a reference to the row before it.
    pq.write_table(
        pa.table({"text": pa.chunked_array([pa.array(["a" * 20_000_000])] * 60)}),
        path,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
        data_page_size=2**31 - 1,
    )
    number, reason = problem(path, after)
    assert number == 4
    assert "as in a decompression bomb" in reason
    # The peak of this process; no other test comes near it.
    assert pa.default_memory_pool().max_memory() < 2**30


def test_two_columns_of_one_name(tmp_path: Path, after: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert problem(path, after) == (1, "2 columns have the name 'text': rename all but one")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([["a"], ["b"]]),
        pa.array([{"text": "a"}, {"text": "b"}]),
        pa.array([True, None]),
        pa.array([None, None]),
        pa.array([b"ab", b"cd"], pa.binary(2)),
    ],
    ids=lambda column: str(column.type),
)
def test_other_columns_are_one_sentence(tmp_path: Path, after: Path, column: pa.Array) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": column}), path)
    number, reason = problem(path, after)
    assert number == 1
    assert reason == f"field 'text' is of type {pq.read_schema(path).types[0]}, not a string"


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "lat\udce9.parquet"
    with open(path, "wb") as file:
        pq.write_table(pa.table({"text": ["a"]}), file)
    assert texts(path) == ["a"]


@pytest.mark.parametrize(
    ("field", "others"),
    [
        ("text", {"meta": [{"text": "no"}]}),
        ("text", {"text.body": ["no"]}),
        ("a.b", {"a": [{"b": "no"}]}),
        ("", {"a": ["no"]}),
    ],
)
def test_column_beside_one_of_a_similar_name(
    tmp_path: Path, field: str, others: dict[str, list[object]]
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({**others, field: ["yes"]}), path)
    [document] = read_documents([path], field)
    assert isinstance(document, Document)
    assert document.text == "yes"


def test_other_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    value = pa.array(["no"])
    nested = pa.StructArray.from_arrays([value, value], names=["a", "a"])
    columns = [value, value, nested, pa.array(["yes"])]
    pq.write_table(pa.table(columns, names=["id", "id", "meta", "text"]), path)
    assert texts(path) == ["yes"]


def test_wrong_page_checksum(tmp_path: Path, after: Path) -> None:
    path = tmp_path / "x.parquet"
    column = [f"document {number}" for number in range(60)]
    pq.write_table(
        pa.table({"text": column}),
        path,
        row_group_size=20,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    data = path.read_bytes()
    path.write_bytes(data.replace(b"document 25", b"document 2x"))
    assert texts(path) == column[:20]
    number, reason = problem(path, after)
    assert number == 21
    assert reason.startswith("the rest of the file, 40 records, cannot be read (")
    assert "CRC" in reason
    [lost] = [record for record in read_documents([path]) if isinstance(record, Malformed)]
    assert lost.records == 40


def varint(number: int) -> bytes:
    """A number as Thrift writes it: zigzag, 7 bits a byte."""
    number *= 2
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])


def write_with_rows(path: Path, field: str, declared: int, everywhere: bool = False) -> None:
    """Write five rows, and declare another number in the footer, or in every part of it."""
    pq.write_table(pa.table({field: ["hello"] * 5}), path, compression="none")
    data = path.read_bytes()
    length = struct.unpack("<I", data[-8:-4])[0]
    footer = data[-8 - length : -8]
    changed = footer.replace(b"\x16" + varint(5) + b"\x19", b"\x16" + varint(declared) + b"\x19", 1)
    if everywhere:  # The number of rows of a row group comes before its offset in the file.
        changed = changed.replace(
            b"\x16" + varint(5) + b"\x26", b"\x16" + varint(declared) + b"\x26"
        )
    assert changed != footer
    path.write_bytes(data[: -8 - length] + changed + struct.pack("<I", len(changed)) + b"PAR1")


@pytest.mark.parametrize("field", ["text", "content"])
@pytest.mark.parametrize("declared", [0, 4, 10**15])
@pytest.mark.timeout(20)
def test_footer_declares_other_rows(tmp_path: Path, after: Path, field: str, declared: int) -> None:
    path = tmp_path / "x.parquet"
    write_with_rows(path, field, declared)
    number, reason = problem(path, after)
    assert number == 1
    assert f"it declares {declared:,} rows, its row groups 5" in reason


@pytest.mark.parametrize("field", ["text", "content"])
@pytest.mark.timeout(20)
def test_file_declares_too_many_rows(tmp_path: Path, after: Path, field: str) -> None:
    path = tmp_path / "x.parquet"
    write_with_rows(path, field, 10**15, everywhere=True)
    assert pq.read_metadata(path).row_group(0).num_rows == 10**15
    _, reason = problem(path, after)
    assert "it declares 1,000,000,000,000,000 rows in " in reason


def test_row_group_with_fewer_rows_than_it_declares(tmp_path: Path, after: Path) -> None:
    path = tmp_path / "x.parquet"
    write_with_rows(path, "text", 1000, everywhere=True)
    assert texts(path) == ["hello"] * 5
    number, reason = problem(path, after)
    assert number == 6
    assert "row group 0 holds 5 of its 1,000 rows" in reason


@pytest.mark.parametrize("store_schema", [False, True])
@pytest.mark.timeout(20)
def test_dictionary_that_expands_like_a_bomb(
    tmp_path: Path, after: Path, store_schema: bool
) -> None:
    path = tmp_path / "x.parquet"
    value = pa.array(["a" * 2_000_000])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 50_000, pa.int32()), value)
    pq.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=store_schema)
    assert path.stat().st_size < 2000
    before = pa.default_memory_pool().bytes_allocated()
    _, reason = problem(path, after)
    assert "as in a decompression bomb" in reason
    assert pa.default_memory_pool().bytes_allocated() - before < 2**20


def test_damaged_column_does_not_abort_the_process(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["hello"] * 5}), path)
    data = path.read_bytes()
    # The empty histogram in the statistics of the column declares 4 entries, in Thrift.
    damaged = data.replace(bytes.fromhex("19 06 19 26"), bytes.fromhex("19 46 19 26"))
    assert damaged != data
    path.write_bytes(damaged)
    program = """
import sys
from pathlib import Path
from fastllama.data.readers import read_file
print(*read_file(Path(sys.argv[1]), "text", 0, 100))
"""
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the file, 5 records, cannot be read (Repetition level histogram" in done.stdout


def test_page_that_declares_gigabytes(tmp_path: Path, after: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"text {number}" for number in range(20)]}), path)
    data = bytearray(path.read_bytes())
    # The header of the first page in Thrift: an unknown type, 1 byte, compressed 1.6 GB.
    header = bytes.fromhex("15 2e 15 02 15 8e e9 fc eb 0b 00")
    data[4 : 4 + len(header)] = header
    path.write_bytes(data)
    number, reason = problem(path, after)
    assert number == 1
    assert "row group 0 holds 0 of its 20 rows" in reason
    # The peak of this process; no other test comes near it.
    assert pa.default_memory_pool().max_memory() < 2**30

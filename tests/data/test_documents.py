import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.data.documents import Document, Empty, Malformed, Position, read_documents
from fastllama.data.records import MAX_DOCUMENT_MB


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": partial(bz2.compress, compresslevel=1),
    ".xz": lzma.compress,
}


def write_lines(path: Path, *records: object) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](lines.encode()))
    return path


def write_rows(path: Path, texts: list[str | None], row_group_size: int = 2) -> Path:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size)
    return path


def texts(*files: Path) -> list[str]:
    return [record.text for record in read_documents(files) if isinstance(record, Document)]


def malformed(*files: Path, max_mb: int = MAX_DOCUMENT_MB) -> list[tuple[str, str]]:
    return [
        (record.where, record.reason)
        for record in read_documents(files, max_document_mb=max_mb)
        if isinstance(record, Malformed)
    ]


@pytest.mark.parametrize("suffix", PACK)
def test_text_files_are_one_document_each(tmp_path: Path, suffix: str) -> None:
    text = "one\r\ntwo\n\nthree ü"
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(PACK[suffix](text.encode("utf-8-sig")))
    assert texts(path) == [text]


@pytest.mark.parametrize("suffix", PACK)
def test_json_lines_field(tmp_path: Path, suffix: str) -> None:
    path = write_lines(tmp_path / f"x.jsonl{suffix}", {"body": "a\nb"}, {"body": "é", "text": 1})
    records = list(read_documents([path], field="body"))
    assert [record.text for record in records if isinstance(record, Document)] == ["a\nb", "é"]
    assert records[-1].bytes_read == path.stat().st_size


def test_multi_member_gzip(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert texts(path) == ["a", "b"]


def test_skips_blank_lines_and_empty_documents(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"text": ""}\n  \n{"text": "a"}\n\n')
    assert malformed(path) == []
    assert texts(path) == ["a"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'"text"', "not a JSON object"),
        (b'{"other": "a", "more": 1}', "no field 'text' among other, more"),
        (b'{"text": 3}', "type int"),
        (b'{"text": null}', "is null"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
    ],
)
def test_malformed_lines(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert texts(path) == ["a", "b"]
    [(where, found)] = malformed(path)
    assert where == f"{path}:2"
    assert reason in found


def test_text_file_with_invalid_utf8(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"one\ntwo\xff\n")
    good = tmp_path / "good.txt"
    good.write_text("fine")
    assert texts(bad, good) == ["fine"]
    [(where, reason)] = malformed(bad, good)
    assert where == f"{bad}:1"
    assert reason == (
        "not UTF-8 in line 2; convert another encoding, as with `iconv -f WINDOWS-1252 -t UTF-8`"
    )


def test_suffixes_of_any_case(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl.gz", {"text": "a"})
    assert texts(path.rename(tmp_path / "X.JSONL.GZ")) == ["a"]
    rows = write_rows(tmp_path / "y.parquet", ["b"])
    assert texts(rows.rename(tmp_path / "Y.PARQUET")) == ["b"]


def test_empty_documents_and_files_are_yielded(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", {"text": ""}, {"text": "a"})
    rows = write_rows(tmp_path / "b.parquet", ["", "b"])
    names = ("c.txt", "d.jsonl", "e.json", "f.txt.gz")
    empty = [tmp_path / name for name in names]
    for path in empty:
        path.write_bytes(b"")
    records = list(read_documents([lines, rows, *empty]))
    assert [type(record) for record in records] == [Empty, Document] * 2 + [Empty] * 4
    assert [record.file for record in records] == [0, 0, 1, 1, 2, 3, 4, 5]
    for number, record in enumerate(records):
        assert (
            list(read_documents([lines, rows, *empty], start=record.next))
            == (records[number + 1 :])
        )


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compressed_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    records = [{"text": os.urandom(40).hex()} for _ in range(50_000)]
    write_lines(path, *records)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    after = write_lines(tmp_path / "b.jsonl", {"text": "next"})
    *head, last = texts(path, after)
    assert last == "next"
    assert 0 < len(head) < len(records)
    assert head == [record["text"] for record in records[: len(head)]]
    [(where, reason)] = malformed(path, after)
    assert where == f"{path}:{len(head) + 1}"
    size = path.stat().st_size
    assert reason.startswith("the rest of the file cannot be read, after ")
    assert f" of {size:,} bytes (" in reason
    assert record_counts_when_resumed(path, after) == {len(head) + 2}


def record_counts_when_resumed(*files: Path) -> set[int]:
    """Distinct numbers of records read before plus after a restart, over several restarts."""
    records = list(read_documents(files))
    cuts = {1, len(records) // 2, len(records) - 2, len(records) - 1}
    return {cut + len(list(read_documents(files, start=records[cut - 1].next))) for cut in cuts}


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_small_truncated_file_keeps_its_whole_documents(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    # zstd gives back whole blocks of 128 KiB, bzip2 of 100 kB.
    records = [{"text": os.urandom(40).hex()} for _ in range(4000)]
    data = write_lines(path, *records).read_bytes()
    path.write_bytes(data[:-20])
    found = texts(path)
    assert len(found) > 2000
    assert found == [record["text"] for record in records[: len(found)]]
    assert len(malformed(path)) == 1


@pytest.mark.parametrize(
    "name", ["x.jsonl.gz", "x.jsonl.zst", "x.txt.bz2", "x.json.xz", "x.txt.gz", "x.parquet"]
)
def test_wrong_content_for_suffix(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not in this format")
    after = write_lines(tmp_path / "y.jsonl", {"text": "next"})
    assert texts(path, after) == ["next"]
    [(where, reason)] = malformed(path, after)
    assert where == f"{path}:1"
    if path.suffix in PACK:
        assert f"or not compressed as {path.suffix} says; fetch it again, or correct" in reason


def test_unopenable_file_raises(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=f"cannot read {path}: Is a directory"):
        list(read_documents([path]))


def test_parquet_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.parquet", ["a", None, "", "d", "é"])
    assert texts(path) == ["a", "d", "é"]
    assert malformed(path) == [(f"{path}:2", "field 'text' is null")]


def test_parquet_column_types(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    column = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), path)
    numbers = tmp_path / "y.parquet"
    pq.write_table(pa.table({"text": [1]}), numbers)
    assert texts(path, numbers) == ["a", "b", "a"]
    assert malformed(path, numbers) == [
        (f"{numbers}:1", "field 'text' is of type int64, not a string")
    ]


def test_parquet_with_invalid_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    binary = pa.array([b"a", b"\xff", b"c"])
    column = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"text": column}), path)
    assert texts(path) == ["a", "c"]
    assert [where for where, _ in malformed(path)] == [f"{path}:2"]


def test_damaged_parquet_pages(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    column = [os.urandom(50).hex() for _ in range(1000)]
    pq.write_table(pa.table({"text": column}), path, row_group_size=500, compression="zstd")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : -2000] = bytes(len(data) - 2000 - len(data) // 2)
    path.write_bytes(data)
    after = write_lines(tmp_path / "y.jsonl", {"text": "next"})
    assert texts(path, after) == [*column[:500], "next"]
    assert [where for where, _ in malformed(path, after)] == [f"{path}:501"]


def test_parquet_without_the_field(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.parquet", ["a", "b", "c"])
    other = write_lines(tmp_path / "y.jsonl", {"body": "d"})
    missing, document = read_documents([path, other], field="body")
    assert isinstance(missing, Malformed)
    assert (missing.records, missing.reason) == (3, "no field 'body' among id, text")
    assert isinstance(document, Document)


def test_error_lists_the_existing_fields(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "x.jsonl", {"body": "a"}, {"title": "b"})
    rows = write_rows(tmp_path / "y.parquet", ["a"])
    with pytest.raises(
        ValueError, match=r"no record.*'content': choose one of body, text, title with"
    ):
        list(read_documents([lines, rows], field="content"))


def test_many_fields_are_few_in_messages(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {f"k{i}" + "x" * 100: "a" for i in range(50_000)})
    with pytest.raises(ValueError, match=r"choose one of k0x.* and 990 more with") as caught:
        list(read_documents([path]))
    assert len(str(caught.value)) < 1000
    [(_, reason)] = malformed(path, write_lines(tmp_path / "y.jsonl", {"text": "a"}))
    assert "and 49,990 more" in reason
    assert len(reason) <= 400


def test_messages_are_printable(tmp_path: Path) -> None:
    path = tmp_path / "lat\udce9\x1b[2J\n.jsonl"
    write_lines(path, {"\x1b]0;title\x07": "x"}, {"text": "\x1b"})
    [(where, reason)] = malformed(path)
    assert where == rf"{tmp_path}/lat\xe9\x1b[2J\n.jsonl:1"
    assert reason == r"no field 'text' among '\x1b]0;title\x07'"


def test_long_paths_are_short_in_messages(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["d" * 200] * 5)
    folder.mkdir(parents=True)
    path = write_lines(folder / "x.jsonl", {"text": None}, {"text": "a"})
    [(where, _)] = malformed(path)
    assert where.startswith(str(tmp_path))
    assert where.endswith("/x.jsonl:1")
    assert len(where) < 310


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl"
    for start in (Position(0, 0), Position(1, 0)):
        with pytest.raises(FileNotFoundError, match=f"^cannot read {path}: No such file"):
            list(read_documents([path], start=start))


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_wide_encodings_are_recognised_by_their_mark(
    tmp_path: Path, suffix: str, encoding: str
) -> None:
    mark = "\ufeff" if encoding.endswith("-be") else ""
    for name in ("x.txt", "x.jsonl", "x.json"):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(PACK[suffix]((mark + '{"text": "a"}\n').encode(encoding)))
        after = write_lines(tmp_path / "y.jsonl", {"text": "next"})
        assert texts(path, after) == ["next"]
        [(where, reason)] = malformed(path, after)
        assert where == f"{path}:1"
        assert f"it is {encoding.upper()[:6]}: convert it to UTF-8" in reason


def tar_of(text: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
    return archive.getvalue()


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.jsonl", "x.jsonl.gz", "x.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tar_of(b'{"text": "a"}\n'), "it is a tar archive: unpack it"),
        (b"%PDF-1.7\n", "it is a PDF: extract its text"),
        (b"7z\xbc\xaf\x27\x1c\0", "it is a 7z archive: unpack it"),
        (b"PAR1\x15", "it is Parquet: add .parquet to its name"),
        ("text\n".encode("utf-16-le"), "it is full of NUL bytes"),
        (bytes(10_000), "it is full of NUL bytes"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    after = write_lines(tmp_path / "y.jsonl", {"text": "next"})
    assert texts(path, after) == ["next"]
    [(where, found)] = malformed(path, after)
    assert where == f"{path}:1"
    assert reason in found


def test_text_with_a_nul_character(tmp_path: Path) -> None:
    for text in ("a text\0with it", "ab\0cd"):
        (tmp_path / "x.txt").write_text(text)
        assert texts(tmp_path / "x.txt") == [text]


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ('{"text": "a"} {"text": "b"}', "a line must hold one value: use `jq -c .`"),
        ('{"text": "a"}\r{"text": "b"}\r', "a line must hold one value: use `jq -c .`"),
        ('{"text": "a"},', "remove the comma after each value, as with `sed 's/,[[:space:]]*$//'`"),
        ('"a text"', 'not a JSON object; write a text as {"text": "…"}'),
        ("{", "a value must fill one line: end the name in .json, or use `jq -c .`"),
        ('[{"text": "a"},', "end the name of a file that is one array in .json"),
    ],
)
def test_remedy_for_lines_that_are_not_json(tmp_path: Path, line: str, remedy: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{line}\n{{"text": "next"}}\n')
    [(where, reason)] = malformed(path)
    assert where == f"{path}:1"
    assert reason.endswith(remedy)


@pytest.mark.parametrize("name", [" text", "a  b", "a, b", ""])
def test_field_that_is_not_one_word_is_quoted(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / "x.jsonl", {name: "a"})
    with pytest.raises(ValueError, match=f"choose one of '{name}' with --field"):
        texts(path)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (gzip.compress(b"a", mtime=0), "gzip: add .gz"),
        (zstd(b"a"), "zstd: add .zst"),
        (bz2.compress(b"a"), "bzip2: add .bz2"),
        (lzma.compress(b"a"), "xz: add .xz"),
        (b"PK\x03\x04", "ZIP archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_files_that_are_not_text(tmp_path: Path, name: str, content: bytes, remedy: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no document") as caught:
        list(read_documents([path]))
    assert remedy in str(caught.value)


@pytest.mark.parametrize("suffix", PACK)
def test_documents_over_the_limit_are_skipped(tmp_path: Path, suffix: str) -> None:
    long = "a" * 1_000_001
    lines = write_lines(tmp_path / f"x.jsonl{suffix}", {"text": "b"}, {"text": long}, {"text": "c"})
    text = tmp_path / f"y.txt{suffix}"
    text.write_bytes(PACK[suffix](long.encode()))
    rows = write_rows(tmp_path / "z.parquet", ["d", long, long[1:]])
    files = (lines, text, rows)
    problem = "longer than 1 MB: raise --max-document-mb, or split it"
    assert malformed(*files, max_mb=1) == [
        (f"{lines}:2", problem),
        (f"{text}:1", problem),
        (f"{rows}:2", problem),
    ]
    assert [len(text) for text in texts(*files)] == [
        1,
        1_000_001,
        1,
        1_000_001,
        1,
        10**6 + 1,
        10**6,
    ]


def test_without_documents_the_error_names_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a" * 1_000_001)
    with pytest.raises(ValueError, match=r"x\.txt:1: longer than 1 MB: raise --max-document-mb"):
        list(read_documents([path], max_document_mb=1))


def test_rejects_a_limit_of_zero(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--max-document-mb 0 is not a positive number"):
        list(read_documents([tmp_path / "x.txt"], max_document_mb=0))


def test_rejects_input_without_documents(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"text": ""}, {"body": "a"})
    with pytest.raises(ValueError, match=r"no document.*x\.jsonl:2: no field"):
        list(read_documents([path]))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
    st.integers(min_value=0),
)
def test_resumes_after_any_record(
    tmp_path_factory: pytest.TempPathFactory, contents: list[str | None], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("resume")
    plain = folder / "a.txt"
    plain.write_text("plain")
    files = [
        plain,
        write_rows(folder / "b.parquet", contents),
        write_lines(folder / "c.jsonl.gz", *({"text": content} for content in contents)),
    ]
    records = list(read_documents(files))
    cut %= len(records)
    assert list(read_documents(files, start=records[cut].next)) == records[cut + 1 :]

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.data.documents import (
    SUFFIXES,
    Document,
    Malformed,
    find_files,
    read_documents,
)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def write_lines(path: Path, *records: object) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](lines.encode()))
    return path


def write_rows(path: Path, texts: list[str | None], row_group_size: int = 2) -> Path:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size)
    return path


def texts(*files: Path) -> list[str]:
    return [record.text for record in read_documents(files) if isinstance(record, Document)]


def malformed(*files: Path) -> list[tuple[str, str]]:
    return [
        (record.where, record.reason)
        for record in read_documents(files)
        if isinstance(record, Malformed)
    ]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a/deep/c.jsonl", "a/d.txt.gz", ".hidden/e.txt", "a/.f.txt", "a/g.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def names(root: Path, files: list[Path]) -> list[str]:
    return [str(file.relative_to(root)) for file in files]


def test_folders_give_visible_supported_files(tree: Path) -> None:
    assert names(tree, find_files([str(tree)])) == ["a/d.txt.gz", "a/deep/c.jsonl", "b.txt"]


def test_patterns_match_subfolders(tree: Path) -> None:
    assert names(tree, find_files([f"{tree}/**/*.jsonl"])) == ["a/deep/c.jsonl"]
    assert names(tree, find_files([f"{tree}/a/*"])) == ["a/d.txt.gz", "a/deep/c.jsonl"]


def test_each_file_is_found_once(tree: Path) -> None:
    (tree / "z.txt").symlink_to(tree / "b.txt")
    files = find_files([str(tree / "b.txt"), f"{tree}/*.txt", str(tree / "a/../b.txt")])
    assert [file.resolve() for file in files] == [tree / "b.txt"]


def test_input_order_is_irrelevant(tree: Path) -> None:
    inputs = [str(tree / "b.txt"), str(tree / "a")]
    assert find_files(inputs) == find_files(inputs[::-1])


@pytest.mark.parametrize("name", ["missing.txt", "*.parquet", "a/.hidden"])
def test_rejects_input_without_files(tree: Path, name: str) -> None:
    with pytest.raises(ValueError, match="matches no file") as caught:
        find_files([str(tree), str(tree / name)])
    assert name in str(caught.value)


def test_rejects_unsupported_suffix(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"g\.md") as caught:
        find_files([str(tree / "a/g.md")])
    assert all(suffix in str(caught.value) for suffix in SUFFIXES)


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
    assert malformed(bad, good) == [(f"{bad}:1", "not UTF-8 in line 2")]


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
    assert "rest of the file" in reason
    assert record_counts_when_resumed(path, after) == {len(head) + 2}


def record_counts_when_resumed(*files: Path) -> set[int]:
    """Distinct numbers of records read before plus after a restart, over several restarts."""
    records = list(read_documents(files))
    cuts = {1, len(records) // 2, len(records) - 2, len(records) - 1}
    return {cut + len(list(read_documents(files, start=records[cut - 1].next))) for cut in cuts}


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.txt.gz", "x.parquet"])
def test_wrong_content_for_suffix(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not in this format")
    after = write_lines(tmp_path / "y.jsonl", {"text": "next"})
    assert texts(path, after) == ["next"]
    assert [where for where, _ in malformed(path, after)] == [f"{path}:1"]


def test_unopenable_file_raises(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
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
        (f"{numbers}:1", "field 'text' is of type int, not a string")
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
    records = list(read_documents([path, other], field="body"))
    assert [type(record) for record in records] == [Malformed, Malformed, Malformed, Document]


def test_error_lists_the_existing_fields(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "x.jsonl", {"body": "a"}, {"title": "b"})
    rows = write_rows(tmp_path / "y.parquet", ["a"])
    with pytest.raises(
        ValueError, match=r"no record.*'content': choose one of body, id, text, tit"
    ):
        list(read_documents([lines, rows], field="content"))


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

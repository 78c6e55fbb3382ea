import json
from dataclasses import asdict
from pathlib import Path

import pytest

from fastllama.data.accounting import LISTED_FILES, REPORTED_RECORDS, Accounting, ReadCounts
from fastllama.data.documents import START, read_documents
from fastllama.data.files import InputFiles, find_files
from fastllama.typed_json import parse_json


def write(path: Path, *records: object) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def files(tmp_path: Path) -> InputFiles:
    write(tmp_path / "a.jsonl", {"text": "a"}, {"text": ""}, {"body": "x"}, {"text": None})
    write(tmp_path / "b.jsonl", {"text": "b"}, {"text": "c"})
    (tmp_path / "c.txt").touch()
    (tmp_path / "d.csv").touch()
    return find_files([str(tmp_path)])


def test_summary(files: InputFiles, tmp_path: Path) -> None:
    reported: list[str] = []
    accounting = Accounting(reported.append)
    documents = accounting.documents(read_documents(files.paths))
    assert [document.text for document in documents] == ["a", "b", "c"]
    assert reported == [
        f"{tmp_path}/a.jsonl:3: no field 'text' among body",
        f"{tmp_path}/a.jsonl:4: field 'text' is null",
    ]
    assert accounting.summary(files) == [
        "3 files read: 3 documents, 2 without text, 2 malformed",
        f"  {tmp_path}/a.jsonl: 1 document, 1 without text, 2 malformed; "
        "first at 3: no field 'text' among body",
        f"  {tmp_path}/c.txt: 0 documents, 1 without text, 0 malformed",
        f"left out: other suffixes 1 ({tmp_path}/d.csv)",
    ]


def test_nothing_lost_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    files = find_files([str(tmp_path)])
    accounting = Accounting(pytest.fail)
    assert len(list(accounting.documents(read_documents(files.paths)))) == 1
    assert accounting.summary(files) == ["1 file read: 1 document, 0 without text, 0 malformed"]


def test_only_the_first_records_and_files_are_listed(tmp_path: Path) -> None:
    n_files = 3 * LISTED_FILES
    for number in range(n_files):
        write(tmp_path / f"{number:02}.jsonl", {"body": "x"}, {"text": "a"})
    files = find_files([str(tmp_path)])
    reported: list[str] = []
    accounting = Accounting(reported.append)
    assert len(list(accounting.documents(read_documents(files.paths)))) == n_files
    assert len(reported) == REPORTED_RECORDS
    first, *listed, more = accounting.summary(files)
    assert first.endswith(f"{n_files} malformed")
    assert len(listed) == LISTED_FILES
    assert more == f"  {n_files - LISTED_FILES} more files with records lost"


def test_parquet_without_the_column_counts_its_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a"] * 7}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("b")
    files = find_files([str(tmp_path)])
    accounting = Accounting(lambda line: None)
    assert len(list(accounting.documents(read_documents(files.paths)))) == 1
    assert accounting.counts.malformed == 7


@pytest.mark.parametrize("cut", range(7))
def test_counts_resume_at_any_record(files: InputFiles, cut: int) -> None:
    records = list(read_documents(files.paths))
    assert len(records) == 7
    whole = Accounting(lambda line: None)
    list(whole.documents(records))

    before = Accounting(lambda line: None)
    list(before.documents(records[:cut]))
    counts = parse_json(json.dumps(asdict(before.counts)), ReadCounts, "counts")
    after = Accounting(lambda line: None, counts)
    start = records[cut - 1].next if cut else START
    list(after.documents(read_documents(files.paths, start=start)))
    assert after.summary(files) == whole.summary(files)

"""Inputs behind URLs: they are read as the same files on a disk."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import fastllama.data.prepare as module
from fastllama import urls
from fastllama.data import remote_files
from fastllama.data.documents import Document, Malformed, read_documents
from fastllama.data.files import COMPRESSIONS, SUFFIXES, find_files
from fastllama.data.join import join
from fastllama.data.parts import Part
from fastllama.data.prepare import prepare
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer
from tests.cli.refusal import refusal
from tests.data.test_documents import PACK, write_lines, write_rows
from tests.data.test_join import check_equal
from tests.object_store import ObjectStore, fail, object_store, upload

TEXTS = [f"document {number}, of some length: " + "ab " * (number % 9) for number in range(40)]


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A store whose files take many requests."""
    monkeypatch.setattr(urls, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 100)
    with object_store() as store:
        yield store


@pytest.fixture
def corpus(tmp_path: Path, store: ObjectStore) -> Path:
    """One file of each kind and others, also uploaded to store://bucket/corpus."""
    folder = tmp_path / "corpus"
    for name in ("a b", "a", "a-b", "z/deep", ".git", "data", "saved"):
        (folder / name).mkdir(parents=True)
    for number, suffix in enumerate(SUFFIXES):
        path = folder / ("a", "a-b", "z/deep", "a b")[number % 4] / f"{number % 5}é{suffix}"
        texts = TEXTS[number : number + 20]
        compression = next(filter(suffix.endswith, COMPRESSIONS), "")
        match suffix.removesuffix(compression):
            case ".parquet":
                write_rows(path, texts, row_group_size=7)
            case ".txt":
                path.write_bytes(PACK[compression](texts[0].encode()))
            case ".json":
                path.write_bytes(
                    PACK[compression](json.dumps([{"text": t} for t in texts]).encode())
                )
            case _:
                write_lines(path, *({"text": text} for text in texts), {"other": 1})
    for name in ("README.md", ".git/x.txt", "a/.x.txt", "saved/x.arrow", "saved/state.json"):
        (folder / name).write_text("no input")
    for name in ("data/job.json", "data/manifest.json"):
        (folder / name).write_text("{}")
    # Damage: the first half of a compressed file, and no gzip at all.
    whole = folder / "a" / "half.jsonl.gz"
    write_lines(whole, *({"text": text} for text in TEXTS))
    whole.write_bytes(whole.read_bytes()[:-40])
    (folder / "z" / "no.txt.gz").write_bytes(b"no gzip")
    rows = folder / "z" / "rows.parquet"
    write_rows(rows, list(TEXTS), row_group_size=10)
    rows.write_bytes(rows.read_bytes().replace(TEXTS[25].encode(), b"?" * len(TEXTS[25])))
    upload(folder, "store://bucket/corpus")
    return folder


def content(inputs: list[str], root: str) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Names below `root`, records and entries left out of the files in `inputs`."""
    files = find_files(inputs)
    names = [str(path).removeprefix(root) for path in files.paths]
    records = []
    for record in read_documents(files.paths):
        kept = [type(record), record.file, record.next]
        if isinstance(record, Document):
            kept.append(record.text)
        elif isinstance(record, Malformed):
            # How much was read before a damage depends on the size of the requests.
            reason = re.sub("after [0-9,]+ of", "after … of", record.reason)
            kept += [record.where.removeprefix(root), reason, record.records]
        records.append(kept)
    left_out = {
        reason: [name.removeprefix(root) for name in entries.names]
        for reason, entries in files.left_out.items()
    }
    return names, records, left_out


@pytest.mark.parametrize(
    "pattern", ["", "/**/", "/a/*", "/**/*.jsonl*", "/*/*é.[jt]*", "/z/", "/a b/*2", "/*/deep/"]
)
def test_documents_are_those_of_the_same_files_on_a_disk(corpus: Path, pattern: str) -> None:
    local = content([f"{corpus}{pattern}"], str(corpus))
    remote = content([f"store://bucket/corpus{pattern}"], "store://bucket/corpus")
    assert remote == local
    assert any(kind is Document for kind, *_ in remote[1])


def test_each_file_is_read_once(corpus: Path) -> None:
    paths = find_files([str(corpus)]).paths
    # Folder by folder, as Python sorts paths, and not by the characters of whole paths.
    assert paths == sorted(path for path in paths if isinstance(path, Path))
    assert paths != sorted(paths, key=str)
    inputs = [f"store://bucket/corpus{str(path).removeprefix(str(corpus))}" for path in paths]
    assert list(map(str, find_files([*reversed(inputs), "store://bucket/corpus"]).paths)) == inputs
    assert len(find_files([*inputs, str(corpus)]).paths) == 2 * len(inputs)


def test_reading_continues_after_any_record(corpus: Path) -> None:
    paths = find_files(["store://bucket/corpus"]).paths
    records = list(read_documents(paths))
    for cut in range(0, len(records), 17):
        assert list(read_documents(paths, start=records[cut].next)) == records[cut + 1 :]


def test_other_file_systems(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    path = corpus / "a-b/1é.txt"
    try:
        memory.pipe_file("/bucket/x.txt", path.read_bytes())
        for name in ("memory://bucket/x.txt", f"file://{path}", "memory://bucket"):
            [document] = read_documents(find_files([name]).paths)
            assert getattr(document, "text", None) == TEXTS[1]
    finally:
        memory.rm("/bucket", recursive=True)
    # A folder on the disk may have such a name.
    monkeypatch.chdir(corpus)
    (corpus / "store:/bucket").mkdir(parents=True)
    shutil.copy(path, "store:/bucket/x.txt")
    assert find_files(["store://bucket/*.txt"]).paths == [corpus / "store:/bucket/x.txt"]


@pytest.fixture
def job(tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer, three files on a disk and in the store, and `prepare` in small steps."""
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "tokenizer.json")
    folder = tmp_path / "small"
    folder.mkdir()
    write_lines(folder / "a.jsonl.gz", *({"text": text} for text in TEXTS[:15]), {"other": 1})
    write_lines(folder / "b.jsonl", *({"text": text} for text in TEXTS[15:30]))
    write_rows(folder / "c.parquet", list(TEXTS[30:]), row_group_size=7)
    upload(folder, "store://bucket/small")
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(module, "BATCH_RECORDS", 7)
    return folder


def run(job: Path, output: str, inputs: str = "store://bucket/small") -> dict[str, bytes]:
    """Prepare `inputs` beside `job`; return the files that do not name the inputs."""
    folder = job.with_name(output)
    prepare([inputs], job.with_name("tokenizer.json"), folder, shard_tokens=499)
    names = (".lock", "job.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in names}


def test_prepare_gives_the_same_shards(job: Path, store: ObjectStore) -> None:
    assert run(job, "remote") == run(job, "local", str(job))
    inputs = json.loads((job.with_name("remote") / "job.json").read_text())["inputs"]
    info = store.info("/bucket/small/b.jsonl")
    assert inputs[1] == ["store://bucket/small/b.jsonl", info["size"], info["ETag"]]
    # Complete, it returns at once. With another input it is another job.
    run(job, "remote")
    store.pipe_file("/bucket/small/b.jsonl", b"changed")
    with pytest.raises(ValueError, match=r"another job \(inputs differ"):
        run(job, "remote")


def delete(store: ObjectStore, path: str) -> None:
    store.rm_file(path)


def change(store: ObjectStore, path: str) -> None:
    # Of the same size, so that only the version differs.
    store.pipe_file(path, store.store[path].getvalue().replace(b"document", b"DOCUMENT"))


def shorten(store: ObjectStore, path: str) -> None:
    store.pipe_file(path, store.store[path].getvalue()[:150])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (delete, r"cannot be read any more \(it does not exist\): put"),
        (change, "was changed while it was read: put"),
        (shorten, "was changed while it was read: put"),
    ],
)
def test_no_document_is_lost_with_an_input(
    job: Path, store: ObjectStore, damage: Any, problem: str
) -> None:
    whole, path = run(job, "whole"), "/bucket/small/b.jsonl"
    data, requests = store.store[path].getvalue(), []

    def damage_once(kind: str, requested: str) -> None:
        if requested == path and kind == "cat":
            requests.append(kind)
        if len(requests) == 3:
            ObjectStore.on_request = None
            damage(store, path)

    ObjectStore.on_request = damage_once
    with pytest.raises(ValueError, match=rf"store:/{path} {problem}.*same command again"):
        run(job, "data")
    assert (job.with_name("data") / "progress.json").exists()
    store.pipe_file(path, data)
    assert run(job, "data") == whole


class ServerError(Exception):
    """As of aiohttp and others: with the status of the answer."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


TRANSIENT = {
    "reset": lambda: ConnectionResetError(104, "Connection reset by peer"),
    "timeout": lambda: TimeoutError("timed out"),
    "503": lambda: ServerError(503),
    "429": lambda: ServerError(429),
    "truncated body": lambda: EOFError("3 of 100 bytes came"),
}


@pytest.mark.parametrize("error", TRANSIENT.values(), ids=TRANSIENT.keys())
def test_failures_of_the_network_are_tried_again(job: Path, error: Any) -> None:
    whole = list(read_documents(find_files(["store://bucket/small"]).paths))
    # The first of three tries may be that of any request.
    for kind in ("info", "cat"):
        ObjectStore.on_request = fail(2, error, kind)
        assert list(read_documents(find_files(["store://bucket/small"]).paths)) == whole
        ObjectStore.on_request = fail(10**6, error, kind)
        with pytest.raises(OSError, match=r"cannot read store://bucket/small.*: 3 tries failed"):
            list(read_documents(find_files(["store://bucket/small"]).paths))


def test_a_short_answer_is_no_end_of_the_file(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ObjectStore.cat_file
    monkeypatch.setattr(
        ObjectStore, "cat_file", lambda *args, **options: answer(*args, **options)[:9]
    )
    with pytest.raises(OSError, match="9 of 100 bytes came"):
        list(read_documents(find_files(["store://bucket/small"]).paths))
    monkeypatch.setattr(ObjectStore, "cat_file", lambda *args, **options: b"x" * 10**4)
    with pytest.raises(ValueError, match="the server sends only whole files; download it"):
        list(read_documents(find_files(["store://bucket/small"]).paths))


def test_nothing_half_read_is_recorded(job: Path) -> None:
    whole, failures = run(job, "whole"), 0
    for n_requests in range(3, 40, 3):
        left = n_requests

        def cut(kind: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise ConnectionResetError(104, "Connection reset by peer")

        ObjectStore.on_request = cut
        try:
            run(job, "data")
        except OSError as error:
            failures += "Connection reset by peer; check the network" in str(error)
    assert failures > 2
    ObjectStore.on_request = None
    assert run(job, "data") == whole


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("store://bucket/none", "matches no file (it does not exist): name files, folders"),
        ("store://none/*.txt", "matches no file (it does not exist): name files, folders"),
        ("store://bucket/README.md", "its suffix is not .txt"),
        (
            "nothing://x/y.txt",
            "fsspec knows no scheme nothing://; name a local path, or a URL",
        ),
        ("zip://x.txt::store://bucket/a.zip", "'::' chains URLs; name one URL"),
    ],
)
def test_mistakes(store: ObjectStore, url: str, problem: str) -> None:
    store.pipe_file("/bucket/README.md", b"x")
    with pytest.raises(ValueError, match=re.escape(problem)):
        find_files([url])


def test_a_mistake_ends_the_command(
    store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tokenizer.json"
    command = ("tokenizer", "train", "--input", "store://bucket/none", "--output", output)
    assert "matches no file (it does not exist)" in refusal(capsys, *command)
    assert not output.exists()


class NoCredentialsError(Exception):
    """As of botocore."""


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (lambda: PermissionError("Access Denied"), "permission denied (PermissionError: Access"),
        (lambda: ServerError(403), "permission denied (ServerError: status 403); give its library"),
        (NoCredentialsError, "no credentials; give its library credentials that may use it"),
        (lambda: ServerError(400), "ServerError: status 400"),
        (lambda: ServerError(404), "it does not exist"),
    ],
)
def test_refusals_of_a_server_are_not_repeated(
    store: ObjectStore, error: Any, problem: str
) -> None:
    requests: list[str] = []

    def refuse(kind: str, path: str) -> None:
        requests.append(path)
        raise error()

    ObjectStore.on_request = refuse
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        urls.patiently("store://bucket/x.txt", lambda files, path: files.info(path))
    assert problem in str(caught.value)
    assert "store://bucket/x.txt" in str(caught.value)
    assert len(requests) == 1


def test_a_full_disk_is_no_failure_of_the_network(store: ObjectStore) -> None:
    ObjectStore.on_request = fail(1, lambda: OSError(28, "No space left on device"), "info")
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        urls.patiently("store://bucket/x.txt", lambda files, path: files.info(path))


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("s3://bucket/x.txt", "reading s3:// needs s3fs: pip install 'fastllama[s3]'"),
        ("gs://bucket/x.txt", "reading gs:// needs gcsfs: pip install 'fastllama[gs]'"),
        ("https://host/x.txt", "reading https:// needs aiohttp: pip install 'fastllama[http]'"),
        ("abfs://bucket/x.txt", "reading abfs:// needs another library: Install adlfs to access"),
    ],
)
def test_a_missing_library_is_named(url: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **options: Any) -> None:
        raise ImportError

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(ValueError, match="reading") as caught:
        find_files([url])
    assert remedy in str(caught.value)


def test_parts(corpus: Path, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "tokenizer.json")
    inputs = [str(corpus / "a"), "store://bucket/corpus/a-b", "store://bucket/corpus/z"]
    for part in (None, Part(1, 3), Part(2, 3), Part(3, 3)):
        output = tmp_path / ("single" if part is None else "joined")
        prepare(inputs, tmp_path / "tokenizer.json", output, shard_tokens=100, part=part)
    join(tmp_path / "joined")
    check_equal(tmp_path / "joined", tmp_path / "single")

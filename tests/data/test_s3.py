"""Inputs in S3: s3fs with a server on the loopback, whose answers can fail."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import fastllama.data.prepare as module
from fastllama import urls
from fastllama.data import remote_files
from fastllama.data.dataset import open_folder
from fastllama.data.documents import Document, read_documents
from fastllama.data.files import find_files
from fastllama.data.prepare import prepare
from fastllama.data.stream import TokenStream
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer
from tests.cli.refusal import refusal
from tests.data.test_documents import write_lines, write_rows
from tests.s3_server import NEEDS_S3, Server, s3_server

pytestmark = NEEDS_S3
TEXTS = [f"document {number}, of some length: " + "ab " * (number % 9) for number in range(400)]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def server(shared_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(urls, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 2000)
    yield shared_server
    shared_server.reset()


@pytest.fixture
def corpus(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files on a disk and in s3://bucket/corpus, a tokenizer, `prepare` in small steps."""
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "tokenizer.json")
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    write_lines(folder / "a.jsonl.gz", *({"text": text} for text in TEXTS[:150]), {"other": 1})
    write_lines(folder / "b.jsonl", *({"text": text} for text in TEXTS[150:300]))
    write_rows(folder / "sub" / "c.parquet", list(TEXTS[300:]), row_group_size=70)
    (folder / "README.md").write_text("no input")
    files, _ = urls.file_system("s3://bucket")
    if not files.exists("bucket"):
        files.mkdir("bucket")
    files.put(f"{folder}/", "bucket/corpus/", recursive=True)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(module, "BATCH_RECORDS", 20)
    return folder


def run(corpus: Path, output: str, inputs: str = "s3://bucket/corpus") -> dict[str, bytes]:
    """Prepare `inputs`; return the files of the result that do not name the inputs."""
    folder = corpus.with_name(output)
    prepare([inputs], corpus.with_name("tokenizer.json"), folder, shard_tokens=499)
    names = (".lock", "job.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in names}


def texts(*inputs: str) -> list[str]:
    records = read_documents(find_files(inputs).paths)
    return [record.text for record in records if isinstance(record, Document)]


@pytest.mark.parametrize("pattern", ["", "/*", "/**/*.parquet", "/sub", "/b.jsonl"])
def test_documents_are_those_of_the_same_files_on_a_disk(corpus: Path, pattern: str) -> None:
    assert texts(f"s3://bucket/corpus{pattern}") == texts(f"{corpus}{pattern}") != []


def test_prepare_gives_the_same_shards(corpus: Path) -> None:
    assert run(corpus, "remote") == run(corpus, "local", str(corpus))
    inputs = json.loads((corpus.with_name("remote") / "job.json").read_text())["inputs"]
    tag = hashlib.md5((corpus / "b.jsonl").read_bytes()).hexdigest()
    assert inputs[1] == [
        "s3://bucket/corpus/b.jsonl",
        (corpus / "b.jsonl").stat().st_size,
        tag,
    ]


def test_web_servers(corpus: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (corpus / "b.jsonl").read_bytes()
    server.on_request = lambda method, path: ("200 OK", {"Content-Length": str(len(data))}, data)
    with pytest.raises(
        ValueError, match=r"b\.jsonl: .*the server sends only whole files; download"
    ):
        texts(f"{server.url}/b.jsonl")
    # In one request, the whole file is what was asked for.
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 10**6)
    assert texts(f"{server.url}/b.jsonl?download=true") == TEXTS[150:300]
    with pytest.raises(ValueError, match="its suffix is not"):
        texts(f"{server.url}/folder/")


def test_data_folders(corpus: Path, server: Server, tmp_path: Path) -> None:
    run(corpus, "data", str(corpus))
    folder = tmp_path / "data"
    files, _ = urls.file_system("s3://bucket")
    files.put(f"{folder}/", "bucket/data/", recursive=True)
    remote, manifest = open_folder("s3://bucket/data/", str(tmp_path / "cache"), 1.0)
    streams = [TokenStream(each, manifest, "train") for each in (folder, remote)]
    for index in range(0, streams[0].n_sequences(100), 3):
        streams[1].fetch(index + 1, 100)
        assert streams[1].read(index, 100).tolist() == streams[0].read(index, 100).tolist()
    manifest.check_contents(remote)
    files.rm_file("bucket/data/train-00001.npy")
    with pytest.raises(ValueError, match=r"s3://bucket/data/train-00001.npy is damaged: found no"):
        open_folder("s3://bucket/data")[1].check_files(open_folder("s3://bucket/data")[0])


BUSY = ("503 Slow Down", {}, b"<Error><Code>SlowDown</Code><Message>Slow down</Message></Error>")
CUT = ("206 Partial Content", {"Content-Length": "2000"}, b"too short")


@pytest.mark.parametrize("answer", [BUSY, CUT], ids=["503", "truncated body"])
def test_failures_are_tried_again(corpus: Path, server: Server, answer: Any) -> None:
    whole, failures = run(corpus, "whole"), 0

    def fail_twice(method: str, path: str) -> Any:
        nonlocal failures
        if path == "/bucket/corpus/b.jsonl" and method == "GET" and failures < 2:
            failures += 1
            return answer
        return None

    server.on_request = fail_twice
    assert run(corpus, "data") == whole
    assert failures == 2


@pytest.mark.parametrize("answer", [BUSY, CUT], ids=["503", "truncated body"])
def test_nothing_half_read_is_recorded(
    corpus: Path, server: Server, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, n_good = run(corpus, "whole"), 3

    def fail_later(method: str, path: str) -> Any:
        nonlocal n_good
        if path == "/bucket/corpus/b.jsonl" and method == "GET":
            n_good -= 1
            return answer if n_good < 0 else None
        return None

    files, _ = urls.file_system("s3://bucket")
    monkeypatch.setattr(type(files), "retries", 1)
    server.on_request = fail_later
    with pytest.raises(OSError, match=r"cannot read s3://bucket/corpus/b.jsonl: 3 tries failed"):
        run(corpus, "data")
    assert (corpus.with_name("data") / "progress.json").exists()
    server.reset()
    assert run(corpus, "data") == whole


def test_an_object_that_goes_or_changes_ends_the_reading(corpus: Path, server: Server) -> None:
    whole = run(corpus, "whole")
    data = (corpus / "b.jsonl").read_bytes()
    files, _ = urls.file_system("s3://bucket")
    for change, problem in (
        (lambda: files.rm_file("bucket/corpus/b.jsonl"), r"cannot be read any more \(it does not"),
        (
            lambda: files.pipe_file("bucket/corpus/b.jsonl", data.upper()),
            "was changed while it was",
        ),
    ):
        n_good = 3

        def change_later(method: str, path: str, change: Callable[[], Any] = change) -> None:
            nonlocal n_good
            if path == "/bucket/corpus/b.jsonl" and method == "GET":
                n_good -= 1
                if not n_good:
                    thread = threading.Thread(target=change)
                    thread.start()
                    thread.join(5)

        server.on_request = change_later
        output = corpus.with_name("data")
        with pytest.raises(ValueError, match=rf"s3://bucket/corpus/b\.jsonl {problem}"):
            run(corpus, "data")
        assert (output / "progress.json").exists()
        server.reset()
        files.pipe_file("bucket/corpus/b.jsonl", data)
        assert run(corpus, "data") == whole
        shutil.rmtree(output)


def test_mistakes(
    corpus: Path,
    server: Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def message(url: str) -> str:
        fsspec.filesystem("s3").clear_instance_cache()
        return refusal(capsys, "tokenizer", "train", "--input", url, "--output", corpus / "t.json")

    assert "matches no file (The specified bucket does not exist)" in message("s3://nothing/x.txt")
    assert "matches no file (it does not exist): name files" in message("s3://bucket/none.txt")
    assert "other suffixes 1 (s3://bucket/corpus/README.md)" in message("s3://bucket/corpus/*.md")
    assert 'Invalid bucket name "B_!"' in message("s3://B_!/x.txt")
    server.on_request = lambda method, path: ("403 Forbidden", {}, b"")
    denied = (
        "cannot read s3://bucket/x.txt: permission denied (PermissionError: Forbidden); set AWS"
    )
    assert denied in message("s3://bucket/x.txt")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(corpus))
    assert "cannot read s3://bucket/x.txt: no credentials; set AWS" in message("s3://bucket/x.txt")


def test_a_network_that_is_down(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.filesystem("s3").clear_instance_cache()
    monkeypatch.setattr(type(fsspec.filesystem("s3")), "retries", 1)
    with pytest.raises(OSError, match=r"cannot read s3://bucket/x.txt: 3 tries failed, the last w"):
        find_files(["s3://bucket/x.txt"])

"""Data sets of the hub by name: `datasets` streams them from a server on the loopback."""

import gzip
import io
import json
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fastllama.data.prepare as module
from fastllama.cli import main
from fastllama.data.documents import Document, Empty, Malformed, read_documents
from fastllama.data.files import find_files
from fastllama.data.hub import HubShard, HubSplit
from fastllama.data.join import join
from fastllama.data.parts import Part
from fastllama.data.prepare import prepare
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer
from tests.cli.refusal import refusal
from tests.data.test_join import check_equal
from tests.hub_server import Answer, HubServer, hub_server, needs_hub

TEXTS = [f"document {number}, of some length: " + "ab " * (number % 9) for number in range(60)]
ROWS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with hub_server(tmp_path / "cache") as hub:
        yield hub


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
    return file.getvalue()


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table, file = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return file.getvalue()


def csv(rows: list[dict[str, Any]]) -> bytes:
    return "".join(["text,id\n", *(f'"{row["text"]}",{row["id"]}\n' for row in rows)]).encode()


def zipped(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("folder/x.jsonl", json_lines(rows))
    return file.getvalue()


def webdataset(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for row in rows:
            for suffix, content in (("text", row["text"].encode()), ("json", b'{"a": 1}')):
                entry = tarfile.TarInfo(f"{row['id']:05}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


FORMATS = {
    "jsonl": json_lines,
    "jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "json": lambda rows: json.dumps(rows).encode(),
    "parquet": parquet,
    "arrow": arrow,
    "csv": csv,
    "zip": zipped,
    "tar": webdataset,
}


def write(folder: Path, suffix: str = "parquet", rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write three files of `rows` for the split train, and one for test."""
    folder.mkdir()
    for number in range(3):
        part = rows[20 * number : 20 * number + 20]
        (folder / f"train-{number}.{suffix}").write_bytes(FORMATS[suffix](part))
    (folder / f"test-0.{suffix}").write_bytes(FORMATS[suffix](rows[:1]))
    return folder


def texts(*inputs: str) -> list[str]:
    records = read_documents(find_files(inputs).paths)
    return [record.text for record in records if isinstance(record, Document)]


@needs_hub
@pytest.mark.parametrize("suffix", FORMATS)
def test_documents_of_every_format(hub: HubServer, tmp_path: Path, suffix: str) -> None:
    folder = write(tmp_path / "x", suffix)
    hub.commit("owner/name", folder)
    paths = find_files(["hub://owner/name"]).paths
    records = list(read_documents(paths))
    assert [(record.file, getattr(record, "text", record)) for record in records] == [
        (number // 20, text) for number, text in enumerate(TEXTS)
    ]
    for cut in (0, 11, 19, 58):
        assert list(read_documents(paths, start=records[cut].next)) == records[cut + 1 :]
    assert texts("hub://owner/name?split=test") == TEXTS[:1]
    if suffix in ("jsonl", "jsonl.gz", "json", "parquet"):
        assert texts(f"{folder}/train*") == TEXTS


@needs_hub
def test_configs_and_revisions(hub: HubServer, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, shift in ((first, 0), (second, 10)):
        folder.mkdir()
        for number, name in enumerate(("en", "fr")):
            at = 20 * number + shift
            (folder / f"{name}.jsonl").write_bytes(json_lines(ROWS[at : at + 3]))
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n"
            "- config_name: fr\n  data_files: fr.jsonl\n---\n"
        )
    old = hub.commit("owner/name", first)
    hub.commit("owner/name", second)
    assert texts("hub://owner/name?config=fr") == TEXTS[30:33]
    assert texts(f"HUB://owner/name?revision={old}&config=en&split=train") == TEXTS[:3]
    # In the order of names, each once.
    names = ["hub://owner/name?config=fr", "hub://owner/name?config=en&revision=main"]
    assert texts(*names, names[0]) == TEXTS[10:13] + TEXTS[30:33]


@needs_hub
def test_only_the_column_of_parquet_is_fetched(hub: HubServer, tmp_path: Path) -> None:
    # Larger than the blocks of 5 MB that are fetched at a time.
    rows = [row | {"image": os.urandom(1_500_000)} for row in ROWS[:20]]
    (tmp_path / "x").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x" / "a.parquet")
    hub.commit("owner/name", tmp_path / "x")
    assert texts("hub://owner/name") == TEXTS[:20]
    assert hub.bytes_sent < 20_000_000


@needs_hub
def test_a_folder_on_the_disk_is_no_data_set(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("owner/name", write(tmp_path / "x"))
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "name", rows=[{"text": "another"}] * 60)
    monkeypatch.chdir(tmp_path)
    assert texts("hub://owner/name") == TEXTS


@needs_hub
def test_records_without_text(hub: HubServer, tmp_path: Path) -> None:
    rows = [{"text": text} for text in (None, "", "é" * 500_001, 5, "good")]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jsonl").write_bytes(json_lines(rows))
    hub.commit("owner/name", tmp_path / "x")
    paths = find_files(["hub://owner/name"]).paths
    null, empty, long, number, good = read_documents(paths, max_document_mb=1)
    assert isinstance(null, Malformed)
    assert (null.where, null.reason) == (f"{paths[0]}:1", "field 'text' is null")
    assert isinstance(empty, Empty)
    assert isinstance(long, Malformed)
    assert long.reason.startswith("longer than 1 MB")
    assert isinstance(number, Malformed)
    assert number.reason == "field 'text' is of type int, not a string"
    assert isinstance(good, Document)
    assert good.text == "good"


@needs_hub
def test_columns_that_are_not_the_field_are_not_decoded(hub: HubServer, tmp_path: Path) -> None:
    rows = [row | {"image": "missing.png"} for row in ROWS]
    folder = write(tmp_path / "x", "jsonl", rows)
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n"
        "  - name: id\n    dtype: int64\n  - name: image\n    dtype: image\n---\n"
    )
    hub.commit("owner/name", folder)
    assert texts("hub://owner/name") == TEXTS


@needs_hub
def test_a_copy_in_the_cache_is_not_read(hub: HubServer, job: Path) -> None:
    import datasets

    datasets.load_dataset("owner/name")
    hub.commit("owner/name", write(job.with_name("y"), rows=ROWS[::-1]))
    assert texts("hub://owner/name") == TEXTS[::-1]
    hub.on_request = fail("README.md")
    with pytest.raises(OSError, match="check the network"):
        texts("hub://owner/name")


@pytest.fixture
def job(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer, a data set that is also a folder, and `prepare` in small steps."""
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "tokenizer.json")
    folder = write(tmp_path / "x")
    hub.commit("owner/name", folder)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(module, "BATCH_RECORDS", 7)
    return folder


def run(job: Path, output: str, *inputs: str, part: Part | None = None) -> dict[str, bytes]:
    """Prepare `inputs` beside `job`; return the files that do not name the inputs."""
    folder = job.with_name(output)
    tokenizer = job.with_name("tokenizer.json")
    prepare(inputs or ["hub://owner/name"], tokenizer, folder, shard_tokens=499, part=part)
    names = (".lock", "job.json")
    files = (path for path in folder.iterdir() if path.is_file() and path.name not in names)
    return {path.name: path.read_bytes() for path in files}


def fail(name: str) -> Callable[[str, str], Answer | None]:
    """An `on_request` that fails every request of a file; libraries do not repeat status 418."""
    return lambda method, path: (418, {}, b"") if path.endswith(name) else None


@needs_hub
def test_prepare_records_the_commit(hub: HubServer, job: Path) -> None:
    whole = run(job, "data")
    assert whole == run(job, "local", f"{job}/train*")
    [(old, _)] = hub.commits["owner/name"]
    record = json.loads((job.with_name("data") / "job.json").read_text())
    assert record["commits"] == {"owner/name@main": old}
    url = f"hub://owner/name?config=default&split=train&revision={old}"
    assert [(name, version) for name, _, version in record["inputs"]] == [
        (f"{url}#{number}/3", old) for number in (1, 2, 3)
    ]
    # The branch moves on. The job keeps its commit, and naming it changes nothing.
    hub.commit("owner/name", write(job.with_name("y"), rows=ROWS[::-1]))
    assert run(job, "data") == whole
    assert run(job, "data", url) == whole
    assert run(job, "other") != whole
    with pytest.raises(ValueError, match=r"another job \(inputs differ"):
        run(job, "data", "hub://owner/name?split=test")


@needs_hub
@pytest.mark.parametrize("shard", [2, 3])
def test_resuming_after_a_failure_of_the_network(hub: HubServer, job: Path, shard: int) -> None:
    whole = run(job, "whole")
    hub.on_request = fail(f"train-{shard - 1}.parquet")
    with pytest.raises(OSError, match=rf"#{shard}/3: .*418.*run the same command again"):
        run(job, "data")
    assert (job.with_name("data") / "progress.json").exists()
    hub.on_request = lambda method, path: None
    hub.commit("owner/name", write(job.with_name("y"), rows=ROWS[::-1]))
    assert run(job, "data") == whole


@needs_hub
def test_parts_read_the_same_commit(hub: HubServer, job: Path) -> None:
    inputs = [f"{job}/test-0.parquet", "hub://owner/name"]
    run(job, "whole", *inputs)
    for number in (1, 2, 3):
        run(job, "joined", *inputs, part=Part(number, 3))
        hub.commit("owner/name", write(job.with_name(f"y{number}"), rows=ROWS[::-1]))
        part = job.with_name("joined") / f"part-0000{number}-of-00003"
        assert json.loads((part / "job.json").read_text())["inputs"]
    join(job.with_name("joined"))
    check_equal(job.with_name("joined"), job.with_name("whole"))


@needs_hub
def test_tokenizer_train(hub: HubServer, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = job.with_name("new.json")
    main(["tokenizer", "train", "--input", "hub://owner/name", "--output", str(output)])
    assert "3 files read: 60 documents, 0 without text, 0 malformed" in capsys.readouterr().err
    assert output.exists()


def gate(method: str, path: str) -> Answer | None:
    is_file = path.endswith(".parquet")
    return (403, {"X-Error-Code": "GatedRepo"}, b"{}") if is_file else None


@needs_hub
@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("owner/none", "the hub has no such data set, or it is private: correct the name"),
        ("owner/name?revision=dev", "it has no such revision: name a branch, a tag or a commit"),
        ("owner/name?config=x", "it has no config 'x': choose one of default with ?config="),
        ("owner/configs", "it has several configs: choose one of en, fr with ?config="),
        ("owner/name?split=x", "it has no split 'x': choose one of train, test with ?split="),
        ("owner/fields", "has no text field 'text': choose one of title, body with --field"),
        ("owner/name --field id", "has no text field 'id': choose one of text with --field"),
        ("owner/numbers", "has no text field 'text': it has none"),
        ("owner/script", "it is a script, which `datasets` does not run: choose a data set"),
        ("owner/damaged", "datasets cannot read it ("),
        ("owner/empty", "datasets cannot read it (EmptyDatasetError"),
        ("ow..ner/name", "Cannot have -- or .. in repo_id"),
    ],
)
def test_refusals(
    hub: HubServer, job: Path, capfd: pytest.CaptureFixture[str], url: str, problem: str
) -> None:
    fields = [{"id": 1, "title": "x", "body": "y"}] * 60
    folders = {
        "fields": write(job.with_name("fields"), rows=fields),
        "numbers": write(job.with_name("numbers"), rows=[{"id": 1}] * 60),
    }
    for name, files in {
        "script": {"script.py": b"", "x.jsonl": json_lines(ROWS)},
        "damaged": {"x.jsonl": json_lines(ROWS[:5]) + b'{"text": "a\n'},
        "empty": {"README.md": b"# nothing"},
        "configs": {
            "README.md": b"---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n"
            b"- config_name: fr\n  data_files: fr.jsonl\n---\n",
            "en.jsonl": json_lines(ROWS),
            "fr.jsonl": json_lines(ROWS),
        },
    }.items():
        folders[name] = job.with_name(name)
        folders[name].mkdir()
        for file, content in files.items():
            (folders[name] / file).write_bytes(content)
    for name, folder in folders.items():
        hub.commit(f"owner/{name}", folder)
    output = job.with_name("new.json")
    args = ["tokenizer", "train", "--input", *f"hub://{url}".split(), "--output", str(output)]
    assert problem in refusal(capfd, *args)
    assert not output.exists()


@needs_hub
def test_a_gated_data_set(hub: HubServer, job: Path) -> None:
    hub.on_request = gate
    remedy = "it is gated: accept its conditions on https://huggingface.co/datasets/owner/name, and"
    with pytest.raises(ValueError, match=remedy):
        texts("hub://owner/name")


@needs_hub
def test_no_network(hub: HubServer, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.on_request = fail("")
    with pytest.raises(OSError, match=r"cannot read hub://owner/name: .*418.*check the network"):
        texts("hub://owner/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set: unset it, or name files"):
        texts("hub://owner/name")


def test_names_of_shards_are_in_their_order() -> None:
    split = HubSplit("owner/name", "a/b&c", "train", "f" * 40, 12, False, None)
    names = [str(HubShard(split, number)) for number in range(12)]
    commit = f"revision={split.commit}"
    assert names[0] == f"hub://owner/name?config=a%2Fb%26c&split=train&{commit}#01/12"
    assert names == sorted(names)


@pytest.mark.parametrize(
    "url",
    [
        "hub://",
        "hub://a/b/c",
        "hub://a/b?splt=train",
        "hub://a/b?split",
        "hub://a/b?split=",
        "hub://a/b#1/3",
    ],
)
def test_other_forms_of_a_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"write 'hub://OWNER/NAME', or 'hub://OWNER/NAME\?config"):
        find_files([url])


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    remedy = r"reading hub:// needs datasets: pip install 'fastllama\[hub\]'"
    with pytest.raises(ValueError, match=remedy):
        find_files(["hub://owner/name"])

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

import fastllama.data.prepare as module
from fastllama.atomic import locked
from fastllama.data.documents import Document, read_documents
from fastllama.data.files import find_files
from fastllama.data.manifest import Manifest
from fastllama.data.prepare import prepare
from fastllama.data.tokenizer import fingerprint, load_tokenizer, save_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
SHARD_TOKENS = 97
SETTINGS: dict[str, Any] = {"validation_fraction": 0.3, "shard_tokens": SHARD_TOKENS}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "dogs", "<EOS>", "naïve", "日本"]
EOS = 1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and 120 documents in three formats, one empty and three malformed records."""
    folder = tmp_path_factory.mktemp("source")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 30))) for _ in range(119)]
    save_tokenizer(train_tokenizer(texts, 400), folder / "tokenizer.json")
    corpus = folder / "corpus"
    corpus.mkdir()
    lines = [json.dumps({"text": text}) for text in texts]
    lines[10:10] = ["{broken", '{"text": ""}', '{"text": null}']
    (corpus / "a.jsonl").write_text("\n".join(lines[:60]))
    (corpus / "b.jsonl").write_text("\n".join(lines[60:]))
    (corpus / "c.jsonl.gz").write_bytes(b"no gzip")
    (corpus / "d.txt").write_text("the last document")
    return folder


@pytest.fixture
def commit_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(module, "BATCH_RECORDS", 7)


def run(source: Path, output: Path, **changes: Any) -> Manifest:
    settings = {**SETTINGS, **changes}
    inputs = settings.pop("inputs", [str(source / "corpus")])
    tokenizer = settings.pop("tokenizer", source / "tokenizer.json")
    return prepare(inputs, tokenizer, output, **settings)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def stream(folder: Path, split: str) -> np.ndarray:
    shards = Manifest.load(folder).splits[split].shards
    return np.concatenate([np.load(folder / shard.file) for shard in shards])


def documents(source: Path) -> list[str]:
    records = read_documents(find_files([str(source / "corpus")]).paths)
    return [record.text for record in records if isinstance(record, Document)]


def decoded(folder: Path, split: str) -> list[str]:
    tokens = stream(folder, split)
    assert tokens[-1] == EOS
    pieces = np.split(tokens, np.flatnonzero(tokens == EOS) + 1)[:-1]
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    return [tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces]


def test_each_document_is_in_one_split(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "data" / "new"
    manifest = run(source, output)
    train, validation = decoded(output, "train"), decoded(output, "validation")
    expected = documents(source)
    chosen = set(validation)
    assert train == [text for text in expected if text not in chosen]
    assert validation == [text for text in expected if text in chosen]
    assert 20 <= len(validation) <= 52
    for name, texts in (("train", train), ("validation", validation)):
        split = manifest.splits[name]
        assert split.documents == len(texts)
        assert split.text_bytes == sum(len(text.encode()) for text in texts)
        assert split.tokens == len(stream(output, name))
        *full, last = split.shards
        assert full
        assert {shard.tokens for shard in full} == {SHARD_TOKENS}
        assert 0 < last.tokens <= SHARD_TOKENS


def test_manifest_describes_the_folder(source: Path, tmp_path: Path) -> None:
    manifest = run(source, tmp_path / "data")
    assert manifest == Manifest.load(tmp_path / "data")
    manifest.check_contents(tmp_path / "data")
    tokenizer = load_tokenizer(source / "tokenizer.json")
    assert manifest.tokenizer_fingerprint == fingerprint(tokenizer)
    assert manifest.vocab_size == tokenizer.get_vocab_size()
    assert (manifest.dtype, manifest.end_token_id, manifest.skipped_records) == ("uint16", EOS, 3)
    shards = {shard.file for split in manifest.splits.values() for shard in split.shards}
    assert set(files_of(tmp_path / "data")) == {
        "job.json",
        "manifest.json",
        "tokenizer.json",
        *shards,
    }


def test_last_shard_may_be_full(source: Path, tmp_path: Path) -> None:
    tokens = run(source, tmp_path / "one", validation_fraction=0.0).splits["train"].tokens
    split = run(source, tmp_path / "two", validation_fraction=0.0, shard_tokens=tokens)
    assert [shard.tokens for shard in split.splits["train"].shards] == [tokens]
    assert set(split.splits) == {"train"}


def test_large_vocabulary_and_template(source: Path, tmp_path: Path) -> None:
    vocabulary = {"start": 0, "</s>": 70_000, "a": 69_999}
    tokenizer = Tokenizer(WordLevel(vocabulary, "a"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.post_processor = TemplateProcessing("start $A", special_tokens=[("start", 0)])
    save_tokenizer(tokenizer, tmp_path / "t.json")
    (tmp_path / "x.txt").write_text("a")
    output = tmp_path / "data"
    manifest = run(
        source,
        output,
        inputs=[str(tmp_path / "x.txt")],
        tokenizer=tmp_path / "t.json",
        validation_fraction=0.0,
    )
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_001)
    [split] = manifest.splits
    assert stream(output, split).tolist() == [69_999, 70_000]


def test_dtype_at_the_limit_of_16_bits(source: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a")
    for largest, dtype in ((65_535, "uint16"), (65_536, "uint32")):
        path = tmp_path / f"{largest}.json"
        tokenizer = Tokenizer(WordLevel({"a": 0, "</s>": largest}, "a"))
        tokenizer.add_special_tokens(["</s>"])
        save_tokenizer(tokenizer, path)
        output = tmp_path / str(largest)
        manifest = run(
            source,
            output,
            inputs=[str(tmp_path / "x.txt")],
            tokenizer=path,
            validation_fraction=0.0,
        )
        assert manifest.dtype == dtype
        assert stream(output, *manifest.splits).tolist() == [0, largest]


def test_result_is_independent_of_commits_and_batches(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "one")
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 200)
    run(source, tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


class StopError(Exception):
    pass


@pytest.mark.usefixtures("commit_every_batch")
@pytest.mark.parametrize("moment", ["before", "after"])
def test_resume_after_any_fsync_gives_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run(source, tmp_path / "reference")
    expected = files_of(tmp_path / "reference")
    fsync = os.fsync
    for last in itertools.count(1, 7):
        calls = itertools.count(1)

        def stop(descriptor: int) -> None:
            is_last = next(calls) == last  # noqa: B023
            if moment == "after" or not is_last:
                fsync(descriptor)
            if is_last:
                raise StopError

        output = tmp_path / str(last)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", stop)
            try:
                run(source, output)
            except StopError:
                pass
            else:
                break
        run(source, output)
        assert files_of(output) == expected
    assert last > 100


@pytest.mark.slow  # Kills many processes.
def test_resume_after_random_kills_gives_same_bytes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "reference")
    output = tmp_path / "data"
    program = f"""
import time
from pathlib import Path
import fastllama.data.prepare as module
module.COMMIT_SECONDS = 0
module.BATCH_RECORDS = 1
sync = module.SplitWriter.sync
module.SplitWriter.sync = lambda writer: (time.sleep(0.004), sync(writer))
module.prepare([{str(source / "corpus")!r}], Path({str(source / "tokenizer.json")!r}),
    Path({str(output)!r}), **{SETTINGS!r})
"""
    draw = random.Random()
    kills = 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        before = recorded(output)
        while process.poll() is None and recorded(output) == before:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 2
    assert files_of(output) == files_of(tmp_path / "reference")


def recorded(output: Path) -> bytes:
    try:
        return (output / "progress.json").read_bytes()
    except FileNotFoundError:
        return b""


def stop_after(monkeypatch: pytest.MonkeyPatch, commits: int) -> None:
    commit = module._commit
    commits_left = iter(range(commits - 1, -1, -1))

    def commit_and_stop(*arguments: Any) -> None:
        commit(*arguments)
        if not next(commits_left):
            raise OSError("no space left on the device")

    monkeypatch.setattr(module, "_commit", commit_and_stop)


@pytest.mark.usefixtures("commit_every_batch")
def test_interrupted_work_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "data"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(OSError, match="no space"):
            run(source, output)
    before = files_of(output)
    assert "progress.json" in before
    with pytest.raises(ValueError, match="run the same command again"):
        Manifest.load(output)
    with pytest.raises(ValueError, match=r"another job \(shard_tokens differ"):
        run(source, output, shard_tokens=50)
    with pytest.raises(ValueError, match=r"another job \(field differ"):
        run(source, output, field="body")
    assert files_of(output) == before
    [shard] = [path for path in output.glob("train-*") if not any(path.read_bytes()[:128])]
    os.truncate(shard, 128)
    with pytest.raises(ValueError, match=rf"{shard.name} lacks tokens"):
        run(source, output)


def test_complete_folder_returns_at_once(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "data"
    manifest = run(source, output)
    before = files_of(output)
    monkeypatch.setattr(module, "read_documents", None)
    capsys.readouterr()
    assert run(source, output) == manifest
    assert "already complete" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"another job \(validation_fraction differ"):
        run(source, output, validation_fraction=0.5)
    assert files_of(output) == before
    (output / "train-00000.npy").unlink()
    with pytest.raises(ValueError, match=r"train-00000.npy is damaged"):
        run(source, output)


def test_rejects_changed_input(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one")
    run(source, tmp_path / "data", inputs=[str(path)], validation_fraction=0.0)
    path.write_text("two, changed")
    with pytest.raises(ValueError, match=r"another job \(inputs differ"):
        run(source, tmp_path / "data", inputs=[str(path)], validation_fraction=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text("two, changed"), "was changed while it was read: restore"),
        (lambda path: path.unlink(), r"cannot be read any more \(No such file"),
    ],
)
def test_rejects_input_changed_while_read(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object],
    message: str,
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one")
    append_documents = module._append

    def append(*arguments: Any) -> None:
        change(path)
        append_documents(*arguments)

    monkeypatch.setattr(module, "_append", append)
    with pytest.raises(ValueError, match=rf"x\.txt {message}"):
        run(source, tmp_path / "data", inputs=[str(path)])


def delete(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.unlink()


def truncate(path: Path, patch: pytest.MonkeyPatch) -> None:
    # Between two records, so that nothing looks damaged.
    os.truncate(path, path.read_bytes().rindex(b"\n") + 1)


def make_unreadable(path: Path, patch: pytest.MonkeyPatch) -> None:
    # Root may read everything, so changing the mode of the file would have no effect.
    def refuse(given: Path, mode: str) -> Any:
        if given == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open(given, mode)

    patch.setattr("fastllama.data.readers.open", refuse, raising=False)


@pytest.mark.usefixtures("commit_every_batch")
@pytest.mark.parametrize("damage", [delete, truncate, make_unreadable])
def test_no_document_is_lost_with_an_input(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(source / "corpus", corpus)
    path = corpus / "b.jsonl"
    data, status = path.read_bytes(), path.stat()
    run(source, tmp_path / "reference", inputs=[str(corpus)])
    append_documents = module._append
    with monkeypatch.context() as patch:

        def damage_once(*arguments: Any) -> None:
            append_documents(*arguments)
            if path.exists() and path.stat().st_size == len(data):
                damage(path, patch)

        patch.setattr(module, "_append", damage_once)
        with pytest.raises((ValueError, OSError), match=rf"{path}.*run the same command again"):
            run(source, tmp_path / "data", inputs=[str(corpus)])
    assert "progress.json" in files_of(tmp_path / "data")
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    run(source, tmp_path / "data", inputs=[str(corpus)])
    assert files_of(tmp_path / "data") == files_of(tmp_path / "reference")


def test_rejects_folder_of_other_files(source: Path, tmp_path: Path) -> None:
    (tmp_path / "train-00000.npy").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(train-00000.npy\)"):
        run(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.npy"]
    assert files_of(tmp_path) == {"train-00000.npy": b"mine"}
    with pytest.raises(ValueError, match="is not a folder"):
        run(source, tmp_path / "train-00000.npy")


def test_replaces_a_job_without_recorded_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "data"
    output.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_commit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(source, output, shard_tokens=10)
    assert len(list(output.glob("train-*.npy"))) > 20
    run(source, output)
    run(source, tmp_path / "reference")
    assert files_of(output) == files_of(tmp_path / "reference")


def test_rejects_locked_folder(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    output.mkdir()
    with (
        locked(output),
        pytest.raises(ValueError, match="another process is writing into"),
    ):
        run(source, output)
    assert [path.name for path in output.iterdir()] == [".lock"]
    # The lock file does not block the next run.
    run(source, output)


def test_reports_ten_malformed_records(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("[bold]\n" * 12 + '{"text": "a"}\n')
    manifest = run(source, tmp_path / "data", inputs=[str(path)], validation_fraction=0.0)
    printed = capsys.readouterr().err.splitlines()
    places = [line.split(": ")[0] for line in printed if line.startswith(f"{path}:")]
    assert places == [f"{path}:{n}" for n in range(1, 11)]
    assert any("12 malformed records skipped" in line for line in printed)
    assert manifest.skipped_records == 12


def test_strict_stops_at_malformed_record(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:11: not JSON"):
        run(source, tmp_path / "data", strict=True)
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("commit_every_batch")
def test_input_without_documents_leaves_no_folder(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "a"}\n' * 20)
    with pytest.raises(ValueError, match="choose one of body"):
        run(source, tmp_path / "data", inputs=[str(path)])
    path.write_text("")
    with pytest.raises(ValueError, match="no document"):
        run(source, tmp_path / "data", inputs=[str(path)])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 1.0}, r"1\.0 is not in \[0, 1\)"),
        ({"validation_fraction": -0.1}, r"-0\.1 is not in"),
        ({"validation_fraction": float("nan")}, "nan is not in"),
        ({"shard_tokens": 0}, "shard tokens 0"),
        ({"workers": 0}, "workers 0"),
        ({"workers": 5000}, "workers 5000 is more than 1024: leave --workers out"),
        ({"end_token": "nothing"}, "'nothing'"),
        ({"end_token": "a"}, r"'a' is not a special token .*\(<SOS>, <EOS>, <PAD>, <UNK>\)"),
        ({"inputs": ["nowhere"]}, "'nowhere' matches no file"),
        ({"tokenizer": Path("nowhere")}, "nowhere does not exist"),
    ],
)
def test_rejects_invalid_settings(
    source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "data", **changes)
    assert not (tmp_path / "data").exists()


def test_end_token_by_name(source: Path, tmp_path: Path) -> None:
    manifest = run(source, tmp_path / "data", end_token="<PAD>")
    assert manifest.end_token_id == 2
    assert stream(tmp_path / "data", "train")[-1] == 2


def test_number_of_workers(source: Path, tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
import fastllama.data.prepare as module
from tokenizers import Tokenizer
count = lambda: len(list(Path("/proc/self/task").iterdir()))
before = count()
module.prepare([{str(source / "corpus")!r}], Path({str(source / "tokenizer.json")!r}),
    Path({str(tmp_path / "data")!r}), workers=7)
print(count() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == 7


def test_dropped_batches_wait_for_nothing() -> None:
    def slow() -> Iterator[int]:
        yield 1
        time.sleep(0.5)
        yield 2

    with module._mapped(int, slow()) as items:
        assert next(items) == 1
        began = time.perf_counter()
        # As garbage collection does after an error, at any moment and in any thread.
        items.close()  # type: ignore[attr-defined]
        assert time.perf_counter() - began < 0.25


def test_batches_are_encoded_together_and_in_order() -> None:
    both = threading.Barrier(2, timeout=30)

    def encode(number: int) -> int:
        if number < 2:
            both.wait()
        # The next one fails meanwhile.
        time.sleep(0.1 if number == 4 else 0)
        if number == 5:
            raise ValueError("five")
        return number * 10

    found: list[int] = []
    with module._mapped(encode, iter(range(7))) as results, pytest.raises(ValueError, match="five"):
        found.extend(results)
    assert found == [0, 10, 20, 30, 40]

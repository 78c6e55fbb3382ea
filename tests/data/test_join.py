"""Parts of a preparation, joined: the same tokens as those of one process."""

import gzip
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastllama.data.prepare as module
from fastllama.atomic import locked
from fastllama.config import Config, DataConfig, ModelConfig
from fastllama.data import prepare_state
from fastllama.data.dataset import open_dataset
from fastllama.data.files import find_files
from fastllama.data.join import join
from fastllama.data.manifest import JOINED_VERSION, Manifest
from fastllama.data.output_folder import split_of
from fastllama.data.parts import Part
from fastllama.data.prepare import prepare
from fastllama.data.prepare_state import JobRecord
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer
from fastllama.typed_json import DamagedFileError
from tests.data import foreign
from tests.data.interrupted import contents

SETTINGS: dict[str, Any] = {"validation_fraction": 0.3, "shard_tokens": 40}
N_PARTS = 4


class StopError(Exception):
    pass


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(train_tokenizer(["the quick brown fox"], 280), path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files: one is empty, one has no document, one is compressed."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for number in range(5):
        texts = [f"file {number}, the {'quick ' * draw.randrange(9)}" for _ in range(12)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        if number == 3:
            (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            (folder / f"{'abcde'[number]}.jsonl").write_text(lines)
    (folder / "f.jsonl").write_text('{"other": 1}\n{broken\n')
    (folder / "g.txt").write_text("")
    return folder


@pytest.fixture(scope="module")
def joined(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of the corpus, not joined yet. Tests work on copies."""
    output = tmp_path_factory.mktemp("joined") / "data"
    prepare_parts(corpus, tokenizer, output)
    return output


@pytest.fixture
def parts(joined: Path, tmp_path: Path) -> Path:
    return shutil.copytree(joined, tmp_path / "data")


def prepare_parts(
    corpus: Path, tokenizer: Path, output: Path, n_parts: int = N_PARTS, **changes: Any
) -> None:
    for number in range(1, n_parts + 1):
        prepare_part(corpus, tokenizer, output, Part(number, n_parts), **changes)


def prepare_part(
    corpus: Path, tokenizer: Path, output: Path, part: Part | None, **changes: Any
) -> Manifest:
    return prepare([str(corpus)], tokenizer, output, part=part, **{**SETTINGS, **changes})


def streams(folder: Path) -> dict[str, bytes]:
    """The tokens of each split, without the headers of the shards."""
    return {
        name: b"".join((folder / shard.file).read_bytes()[128:] for shard in split.shards)
        for name, split in Manifest.load(folder).splits.items()
    }


def without_shards(manifest: Manifest) -> Manifest:
    splits = {name: replace(split, shards=()) for name, split in manifest.splits.items()}
    return replace(manifest, format_version=0, splits=splits)


def sequences(folder: Path) -> Iterator[list[int]]:
    config = Config(
        model=ModelConfig(vocab_size=300, max_seq_len=16), data=DataConfig(path=str(folder))
    )
    train = open_dataset(replace(config, logging=replace(config.logging, sample_prompt="a"))).train
    places = train.places(range(train.streams[0].n_sequences(16)), 16)
    for tokens in train.read(places, 16):
        yield tokens.tolist()


def check_equal(joined: Path, single: Path) -> None:
    """Check that a joined folder has the data of a single process."""
    assert streams(joined) == streams(single)
    assert without_shards(Manifest.load(joined)) == without_shards(Manifest.load(single))
    assert JobRecord.load(joined) == JobRecord.load(single)
    assert (joined / "tokenizer.json").read_bytes() == (single / "tokenizer.json").read_bytes()
    Manifest.load(joined).check_contents(joined)


def test_joined_parts_train_like_one_folder(
    parts: Path, corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    prepare_part(corpus, tokenizer, tmp_path / "single", None)
    before = contents(parts)
    manifest = join(parts)
    after = contents(parts)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {".lock", "job.json", "manifest.json", "tokenizer.json"}
    check_equal(parts, tmp_path / "single")
    assert manifest == Manifest.load(parts)
    assert len({shard.file.partition("/")[0] for shard in manifest.splits["train"].shards}) > 2
    assert list(sequences(parts)) == list(sequences(tmp_path / "single"))


def prepare_killed(
    corpus: Path, tokenizer: Path, output: Path, part: Part, kills: list[int]
) -> None:
    """Prepare a part that is stopped at the nth flush of each run, for each n in `kills`."""
    fsync = os.fsync
    for last in kills:
        calls = 0

        def stop(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == last:  # noqa: B023
                raise StopError
            fsync(descriptor)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", stop)
            try:
                prepare_part(corpus, tokenizer, output, part)
            except StopError:
                continue
            break
    prepare_part(corpus, tokenizer, output, part)


FILES = st.lists(
    st.lists(st.integers(0, 30), max_size=12) | st.just([200] * 3), min_size=1, max_size=7
)


def check_killed_parts(tokenizer: Path, files: list[list[int]], n: int, kills: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COMMIT_SECONDS", 0)
        patch.setattr(module, "BATCH_RECORDS", 5)
        folder = Path(name)
        corpus = folder / "corpus"
        corpus.mkdir()
        # Of the training split.
        (corpus / "a.txt").write_text("a document")
        for number, words in enumerate(files):
            lines = [json.dumps({"text": f"{number} " + "fox " * count}) for count in words]
            (corpus / f"{number}.jsonl").write_text("\n".join([*lines, "{"]))
        for number in range(1, n + 1):
            prepare_killed(corpus, tokenizer, folder / "data", Part(number, n), kills)
        prepare_part(corpus, tokenizer, folder / "single", None)
        join(folder / "data")
        check_equal(folder / "data", folder / "single")


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FILES, st.integers(1, 5), st.lists(st.integers(1, 60), max_size=2))
def test_killed_parts(tokenizer: Path, files: list[list[int]], n: int, kills: list[int]) -> None:
    check_killed_parts(tokenizer, files, n, kills)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FILES, st.integers(1, 12), st.lists(st.integers(1, 90), max_size=4))
def test_many_killed_parts(
    tokenizer: Path, files: list[list[int]], n: int, kills: list[int]
) -> None:
    check_killed_parts(tokenizer, files, n, kills)


def test_lost_text_of_all_parts(tmp_path: Path) -> None:
    save_tokenizer(foreign.word_piece(), tmp_path / "tokenizer.json")
    for number, text in enumerate(["naïve ß Ω", "the cat sat", "Ωμέγα ß"]):
        (tmp_path / f"{number}.txt").write_text(text)
    inputs = [str(tmp_path / "?.txt")]
    for part in (None, Part(1, 3), Part(2, 3), Part(3, 3)):
        output = tmp_path / ("single" if part is None else "data")
        prepare(inputs, tmp_path / "tokenizer.json", output, part=part)
    loss = join(tmp_path / "data").text_loss
    assert loss is not None
    assert loss.characters == len("naïve ß Ω") + len("the cat sat") + len("Ωμέγα ß")
    assert loss == Manifest.load(tmp_path / "single").text_loss


def test_only_the_whole_has_notices(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_part(corpus, tokenizer, tmp_path / "data", Part(1, 2), validation_fraction=1e-9)
    printed = capsys.readouterr().err
    assert "warning: " not in printed
    assert "note: " not in printed
    prepare_part(corpus, tokenizer, tmp_path / "data", Part(2, 2), validation_fraction=1e-9)
    capsys.readouterr()
    join(tmp_path / "data")
    assert "warning: none of the documents (60) was held out" in capsys.readouterr().err


def test_more_parts_than_files(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    prepare_parts(corpus, tokenizer, output, 9)
    prepare_part(corpus, tokenizer, tmp_path / "single", None)
    empty = [path for path in sorted(output.iterdir()) if not Manifest.load(path).splits]
    assert len(empty) >= 9 - 7
    for path in empty:
        Manifest.load(path).check_contents(path)
        assert not list(path.glob("*.npy"))
    part = Part(int(empty[0].name[5:10]), 9)
    before = contents(output)
    assert prepare_part(corpus, tokenizer, output, part).splits == {}
    assert contents(output) == before
    join(output)
    check_equal(output, tmp_path / "single")


def test_held_out_documents(tokenizer: Path, tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(40)]
    held_out = [text for text in texts if split_of(text.encode(), 0.5) == "validation"]
    for name, chosen in (("a", held_out), ("b", sorted({*texts} - {*held_out}))):
        lines = [json.dumps({"text": text}) for text in chosen]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def prepare_both(pattern: str, output: Path) -> list[set[str]]:
        inputs = [str(tmp_path / pattern)]
        return [
            set(
                prepare(
                    inputs, tokenizer, output, validation_fraction=0.5, part=Part(number, 2)
                ).splits
            )
            for number in (1, 2)
        ]

    assert prepare_both("?.jsonl", tmp_path / "data") == [{"validation"}, {"train"}]
    assert set(join(tmp_path / "data").splits) == {"validation", "train"}
    assert prepare_both("a.jsonl", tmp_path / "held out") == [set(), {"validation"}]
    with pytest.raises(ValueError, match=r"all documents \(\d+\) were held out for validation"):
        join(tmp_path / "held out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"other": 1}', "have no document: every record is empty or malformed"),
        ("", "have no document"),
    ],
)
def test_parts_without_documents(tokenizer: Path, tmp_path: Path, text: str, message: str) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(text)
    for number in (1, 2):
        prepare([str(tmp_path / "?.jsonl")], tokenizer, tmp_path / "data", part=Part(number, 2))
    with pytest.raises(ValueError, match=message):
        join(tmp_path / "data")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        ".lock",
        Part(1, 2).folder,
        Part(2, 2).folder,
    }


def test_second_join(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = join(parts)
    before = contents(parts)
    capsys.readouterr()
    assert join(parts) == manifest
    assert f"{parts} is already complete" in capsys.readouterr().err
    assert contents(parts) == before


@pytest.mark.parametrize("moment", range(1, 7))
def test_join_after_a_killed_join(
    parts: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    fsync, calls = os.fsync, 0

    def stop(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise StopError
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        with pytest.raises(StopError):
            join(parts)
    join(parts)
    Manifest.load(parts).check_contents(parts)


def test_joined_folder_is_that_of_one_process(
    parts: Path, corpus: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = join(parts)
    before = contents(parts)
    assert prepare_part(corpus, tokenizer, parts, None) == manifest
    assert f"{parts} is already complete" in capsys.readouterr().err
    prepare_part(corpus, tokenizer, parts, Part(2, N_PARTS))
    assert f"{parts / Part(2, N_PARTS).folder} is already complete" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"another job \(shard_tokens differ"):
        prepare_part(corpus, tokenizer, parts, None, shard_tokens=7)
    assert contents(parts) == before


def test_deleted_part_is_prepared_again(parts: Path, corpus: Path, tokenizer: Path) -> None:
    manifest = join(parts)
    shutil.rmtree(parts / Part(2, N_PARTS).folder)
    with pytest.raises(DamagedFileError, match=r"part-00002-of-00004/train-00000\.npy is damaged"):
        manifest.check_files(parts)
    prepare_part(corpus, tokenizer, parts, Part(2, N_PARTS))
    manifest.check_contents(parts)


def test_parts_are_no_input(parts: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    expected = [path.name for path in find_files([str(corpus)]).paths]
    assert [path.name for path in find_files([str(tmp_path)]).paths] == expected
    join(parts)
    assert [path.name for path in find_files([str(tmp_path)]).paths] == expected


def test_unlisted_shard_in_the_folder_of_a_part(parts: Path) -> None:
    manifest = join(parts)
    listed = manifest.splits["train"].shards[0].file
    shutil.copy(parts / listed, (parts / listed).with_name("train-00099.npy"))
    with pytest.raises(
        DamagedFileError, match=r"part-00001-of-00004/train-00099\.npy is not listed"
    ):
        manifest.check_contents(parts)


@pytest.mark.parametrize(
    "file",
    [
        "../train-00000.npy",
        "/train-00000.npy",
        "part-00001-of-00004/../train-00000.npy",
        "part-00001-of-00004/notes.npy",
        "part-00001-of-00004/a/train-00000.npy",
        "part-1-of-4/train-00000.npy",
        "folder/train-00000.npy",
    ],
)
def test_manifest_with_another_path(parts: Path, file: str) -> None:
    manifest = join(parts)
    split = manifest.splits["train"]
    shards = (replace(split.shards[0], file=file), *split.shards[1:])
    replace(manifest, splits={"train": replace(split, shards=shards)}).save(parts)
    with pytest.raises(DamagedFileError, match=r"splits\.train\.shards\.0\.file: .*pattern"):
        Manifest.load(parts)


def test_only_a_joined_manifest_has_a_new_version(parts: Path) -> None:
    join(parts)
    versions = [
        json.loads((folder / "manifest.json").read_text())["format_version"]
        for folder in (parts, parts / Part(1, N_PARTS).folder)
    ]
    assert versions == [JOINED_VERSION, 2] == [3, 2]


def change_job(folder: Path, **changes: Any) -> None:
    path = folder / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_tokenizer(parts: Path, corpus: Path, tokenizer: Path) -> None:
    path = parts.with_name("other.json")
    save_tokenizer(train_tokenizer(["other words"], 270), path)
    prepare_again(parts, corpus, path)


def prepare_again(parts: Path, corpus: Path, tokenizer: Path, **changes: Any) -> None:
    """Put a part 2 of another command in place of the old one."""
    shutil.rmtree(parts / "part-00002-of-00004")
    prepare_part(corpus, tokenizer, parts.with_name("other"), Part(2, 4), **changes)
    (parts.with_name("other") / "part-00002-of-00004").rename(parts / "part-00002-of-00004")


def interrupt(parts: Path, corpus: Path, tokenizer: Path) -> None:
    """Leave of part 2 what a process has that is killed at its beginning."""
    for path in (parts / "part-00002-of-00004").iterdir():
        if path.name not in (".lock", "job.json"):
            path.unlink()


def copy_part(parts: Path, corpus: Path, tokenizer: Path) -> None:
    shutil.rmtree(parts / "part-00003-of-00004")
    shutil.copytree(parts / "part-00002-of-00004", parts / "part-00003-of-00004")


def more_input(parts: Path, corpus: Path, tokenizer: Path) -> None:
    more = parts.with_name("corpus")
    shutil.copytree(corpus, more)
    prepare_again(parts, more, tokenizer)


def shorten_a_shard(parts: Path, corpus: Path, tokenizer: Path) -> None:
    os.truncate(parts / "part-00002-of-00004" / "train-00000.npy", 100)


def another_number(parts: Path, corpus: Path, tokenizer: Path) -> None:
    shutil.copytree(parts / "part-00002-of-00004", parts / "part-00002-of-00003")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda parts, *_: shutil.rmtree(parts / "part-00003-of-00004"),
            r"lacks 1 of 4 parts \(3/4\): prepare them with --part, and join again",
        ),
        (copy_part, r"part-00003-of-00004/job\.json is damaged: found part 2/4, expected 3/4"),
        (other_tokenizer, r"same command \(tokenizer differ in job\.json\): delete the wrong part"),
        (
            lambda *paths: prepare_again(*paths, shard_tokens=50),
            r"part-00002-of-00004 and .*part-00001-of-00004 were .* \(shard_tokens differ",
        ),
        (more_input, r"same command \(all_inputs differ"),
        (interrupt, r"part-00002-of-00004 is not complete: run its command with --part 2/4 again"),
        (shorten_a_shard, r"part-00002-of-00004/train-00000\.npy is damaged"),
        (another_number, r"holds part-00001-of-00004 and part-00002-of-00003: delete"),
        (
            lambda parts, *_: (parts / "part-00002-of-00004" / "job.json").unlink(),
            r"part-00002-of-00004/job\.json is damaged: found no such file",
        ),
        (
            lambda parts, *_: change_job(parts / "part-00002-of-00004", part=None),
            r"part-00002-of-00004/job\.json is damaged: found part None",
        ),
        (
            lambda parts, *_: change_job(parts / "part-00002-of-00004", inputs=[]),
            r"the inputs in job\.json of the parts in .* are not those of the whole",
        ),
        (
            lambda parts, *_: (parts / "job.json").write_text("{"),
            r"data/job\.json: .*did not write it: restore it",
        ),
        (
            lambda parts, *_: shutil.copy(parts / "part-00001-of-00004" / "job.json", parts),
            r"data/job\.json is the job of other data than the parts",
        ),
        (
            lambda parts, *_: shutil.copy(parts / "part-00001-of-00004" / "manifest.json", parts),
            r"data/manifest\.json does not describe the parts as they are now",
        ),
        (
            lambda parts, *_: (parts / "tokenizer.json").write_text("mine"),
            r"data/tokenizer\.json is damaged or not the tokenizer of this job",
        ),
    ],
)
def test_parts_that_cannot_be_joined(
    parts: Path, corpus: Path, tokenizer: Path, change: Callable[..., object], message: str
) -> None:
    change(parts, corpus, tokenizer)
    before = contents(parts)
    with pytest.raises(ValueError, match=message):
        join(parts)
    after = contents(parts)
    after.pop(".lock", None)
    assert after == before


def test_parts_prepared_at_the_same_time(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    output = tmp_path / "shared" / "new" / "data"
    start = Barrier(N_PARTS)

    def prepare_with_others(number: int) -> None:
        start.wait()
        prepare_part(corpus, tokenizer, output, Part(number, N_PARTS))

    with ThreadPoolExecutor(N_PARTS) as threads:
        list(threads.map(prepare_with_others, range(1, N_PARTS + 1)))
    join(output)
    prepare_part(corpus, tokenizer, tmp_path / "single", None)
    check_equal(output, tmp_path / "single")


def test_part_that_appears_meanwhile(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_after(name: str, part: Part) -> None:
        """Another machine adds a part when this one has read the folder."""
        read = getattr(prepare_state, name)

        def read_and_add(folder: Path) -> Any:
            found = read(folder)
            (tmp_path / "data" / part.folder).mkdir(exist_ok=True)
            return found

        monkeypatch.setattr(prepare_state, name, read_and_add)

    add_after("parts_in", Part(2, 4))
    add_after("_visible_names", Part(3, 4))
    prepare_part(corpus, tokenizer, tmp_path / "data", Part(1, 4))


def test_part_that_is_being_prepared(parts: Path, corpus: Path, tokenizer: Path) -> None:
    interrupt(parts, corpus, tokenizer)
    with (
        locked(parts / "part-00002-of-00004"),
        pytest.raises(ValueError, match=r"another process is writing into .*part-00002-of-00004"),
    ):
        join(parts)
    with locked(parts), pytest.raises(ValueError, match=r"another process is writing into .*data:"):
        join(parts)
    prepare_part(corpus, tokenizer, parts, Part(2, 4))
    join(parts)


def test_folders_without_parts(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    prepare_part(corpus, tokenizer, tmp_path / "single", None)
    (tmp_path / "empty").mkdir()
    for name, message in {
        "single": "single has no parts, and its data needs no join",
        "single/manifest.json": r"manifest\.json is not a folder: name the --output",
        "empty": "empty has no parts: make them with `fastllama prepare --part`",
        "nowhere": "nowhere does not exist: name the --output",
    }.items():
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=message):
            join(tmp_path / name)
        assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (None, r"data holds parts: prepare the others with --part, and run `fastllama data join"),
        (Part(1, 3), r"data holds part 1/4, and part 1/3 belongs to another number of parts"),
    ],
)
def test_folder_of_other_parts(
    parts: Path, corpus: Path, tokenizer: Path, part: Part | None, message: str
) -> None:
    before = contents(parts)
    with pytest.raises(ValueError, match=message):
        prepare_part(corpus, tokenizer, parts, part)
    assert contents(parts) == before
    with pytest.raises(ValueError, match=r"holds parts that are not joined: .* data join"):
        Manifest.load(parts)


def test_part_of_another_command(parts: Path, corpus: Path, tokenizer: Path) -> None:
    more = parts.with_name("corpus")
    shutil.copytree(corpus, more)
    shutil.rmtree(parts / "part-00001-of-00004")
    before = contents(parts)
    for inputs, changes, name in (
        (more, {}, "all_inputs"),
        (corpus, {"shard_tokens": 9}, "shard_tokens"),
    ):
        message = rf"part-00002-of-00004 was prepared by another command \({name} differ"
        with pytest.raises(ValueError, match=message):
            prepare_part(inputs, tokenizer, parts, Part(1, 4), **changes)
        assert contents(parts) == before
    prepare_part(corpus, tokenizer, parts, Part(1, 4))


def test_parts_beside_other_files(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    prepare_part(corpus, tokenizer, tmp_path / "single", None)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in {
        "single": "single is the data folder of a single process: choose another --output for",
        "files": r"files holds other files \(notes\.txt\): choose another",
        "file": "file is not a folder",
    }.items():
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=message):
            prepare_part(corpus, tokenizer, tmp_path / name, Part(1, 2))
        assert contents(tmp_path) == before


def test_failed_part_leaves_the_others(parts: Path, corpus: Path, tokenizer: Path) -> None:
    shutil.rmtree(parts / "part-00004-of-00004")
    before = contents(parts)
    with pytest.raises(ValueError, match=r"f\.jsonl:1: .* or leave out --strict"):
        prepare_part(corpus, tokenizer, parts, Part(4, 4), strict=True)
    assert contents(parts) == before
    assert not (parts / "part-00004-of-00004").exists()

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastllama.data.manifest import MANIFEST_FILE, Manifest, Shard, Split, sha256_of
from fastllama.data.tokenizer import fingerprint, save_tokenizer, train_tokenizer
from fastllama.typed_json import DamagedFileError

TOKENIZER = train_tokenizer([], 260)
END = 1
TOKENS = np.array([5, 6, END, 259, END], np.uint16)
SHARD = "train-00000.npy"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / SHARD, TOKENS)
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer.json")
    make_manifest(tmp_path).save(tmp_path)
    return tmp_path


def make_manifest(folder: Path) -> Manifest:
    shard = Shard(SHARD, len(TOKENS), sha256_of(folder / SHARD))
    return Manifest(
        dtype="uint16",
        vocab_size=260,
        end_token_id=END,
        tokenizer_fingerprint=fingerprint(TOKENIZER),
        skipped_records=2,
        splits={"train": Split(len(TOKENS), documents=2, text_bytes=9, shards=(shard,))},
    )


def as_version_1(folder: Path) -> None:
    """Rewrite the manifest as fastllama wrote it before manifests had a checksum."""
    content = json.loads((folder / MANIFEST_FILE).read_text())
    del content["checksum"]
    (folder / MANIFEST_FILE).write_text(json.dumps({**content, "format_version": 1}))


def test_save_and_load(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest == make_manifest(folder)
    assert manifest.is_checksummed
    manifest.check_files(folder)
    manifest.check_contents(folder)


def test_version_1_has_no_checksum(folder: Path) -> None:
    as_version_1(folder)
    manifest = Manifest.load(folder)
    assert manifest == replace(make_manifest(folder), format_version=1)
    assert not manifest.is_checksummed
    manifest.check_contents(folder)
    manifest.save(folder)
    assert Manifest.load(folder).is_checksummed


def test_missing_folder_or_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=f"nowhere does not exist in {Path.cwd()}: give its whole path"
    ):
        Manifest.load(Path("nowhere"))
    no_data = r"is no data folder \(it has neither manifest\.json nor job\.json\): encode its text"
    for other, message in (
        ("corpus.txt", no_data),
        ("config.toml", "is a run folder, not a data folder: name the folder that"),
    ):
        (tmp_path / other).touch()
        with pytest.raises(ValueError, match=message):
            Manifest.load(tmp_path)
        (tmp_path / other).unlink()
    for kept in ("job.json", "progress.json"):
        (tmp_path / kept).touch()
        with pytest.raises(ValueError, match="run the same command again"):
            Manifest.load(tmp_path)
        (tmp_path / kept).unlink()
    (tmp_path / "job.json").touch()
    os.mkfifo(tmp_path / MANIFEST_FILE)
    with pytest.raises(ValueError, match="run the same command again"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": true}', "\x00"]
)
def test_unreadable_manifest(folder: Path, content: str) -> None:
    (folder / MANIFEST_FILE).write_text(content)
    with pytest.raises(DamagedFileError, match=r"manifest\.json: .*restore the file, or delete"):
        Manifest.load(folder)


def test_newer_format_version(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps({"format_version": 4, "new": True}))
    with pytest.raises(ValueError, match=r"format version 4.*upgrade"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"uint16"', '"tint16"', r"dtype: .*, not 'tint16'"),
        ("260", '"x"', r"vocab_size: .*, not 'x'"),
        ("260", "-1", r"vocab_size: .*, not -1"),
        ('"train-00000.npy"', "5", r"splits\.train\.shards\.0\.file: "),
        ('"train-00000.npy"', r'"a\u0000b"', r"shards\.0\.file: .*pattern"),
        ('"train-00000.npy"', '"../train-00000.npy"', r"shards\.0\.file: .*pattern"),
        ('"train-00000.npy"', r'"\ud800"', "invalid JSON|surrogate"),
        ('"skipped_records"', '"x"', r"skipped_records: field required"),
        ('"tokens": 5', '"tokens": 4', "the split train has .* tokens, and its shards"),
        ('"end_token_id": 1', '"end_token_id": 260', "260 is not below vocab_size 260"),
    ],
)
def test_damage_without_a_checksum(folder: Path, old: str, new: str, message: str) -> None:
    as_version_1(folder)
    content = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(content.replace(old, new, 1))
    with pytest.raises(DamagedFileError, match=rf"manifest\.json: .*({message})"):
        Manifest.load(folder)


def test_shard_listed_twice(folder: Path) -> None:
    manifest = make_manifest(folder)
    replace(manifest, splits={**manifest.splits, "validation": manifest.splits["train"]}).save(
        folder
    )
    with pytest.raises(DamagedFileError, match="a shard is listed twice"):
        Manifest.load(folder)


def test_fingerprint_depends_on_token_streams_only(folder: Path) -> None:
    manifest = make_manifest(folder)
    same = replace(manifest, skipped_records=0)
    assert same.fingerprint() == manifest.fingerprint()
    [shard] = manifest.splits["train"].shards
    changed = replace(manifest.splits["train"], shards=(replace(shard, sha256="0"),))
    for other in (
        replace(manifest, tokenizer_fingerprint="u"),
        replace(manifest, dtype="uint32"),
        replace(manifest, splits={"validation": manifest.splits["train"]}),
        replace(manifest, splits={"train": changed}),
    ):
        assert other.fingerprint() != manifest.fingerprint()


def damage_shard(path: Path, damage: str) -> None:
    data = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "header":
            path.write_bytes(bytes(128) + data[128:])
        case "short":
            path.write_bytes(data[:-1])
        case "long":
            path.write_bytes(data + b"\0")
        case "dtype":
            np.save(path, TOKENS.astype(np.int16))
        case "length":
            np.save(path, TOKENS[1:])
        case "shape":
            np.save(path, TOKENS.reshape(5, 1))
        case "link":
            path.unlink()
            path.symlink_to(path.name)
        case "folder":
            path.unlink()
            path.mkdir()
        case "pipe":
            path.unlink()
            os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("missing", "no such file"),
        ("empty", r"no valid \.npy file"),
        ("header", r"no valid \.npy file"),
        ("short", "137 bytes, expected 138"),
        ("long", "139 bytes, expected 138"),
        ("dtype", "int16"),
        ("length", r"shape \(4,\)"),
        ("shape", r"shape \(5, 1\)"),
        ("link", "no such file"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
    ],
)
def test_check_files_finds_damage(folder: Path, damage: str, found: str) -> None:
    path = folder / SHARD
    damage_shard(path, damage)
    with pytest.raises(ValueError, match=f"train-00000.npy is damaged.*{found}.*prepare"):
        Manifest.load(folder).check_files(folder)


def test_check_contents_finds_changed_tokens(folder: Path) -> None:
    manifest = Manifest.load(folder)
    changed = TOKENS.copy()
    changed[0] += 1
    np.save(folder / SHARD, changed)
    manifest.check_files(folder)
    with pytest.raises(ValueError, match="SHA-256"):
        manifest.check_contents(folder)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 5, 6])
def test_check_contents_finds_ids_beyond_vocabulary(
    folder: Path, monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    monkeypatch.setattr("fastllama.data.manifest.CHECK_CHUNK_TOKENS", chunk_tokens)
    make_manifest(folder).check_contents(folder)
    np.save(folder / SHARD, np.where(TOKENS == 259, 260, TOKENS).astype(np.uint16))
    with pytest.raises(ValueError, match="token id 260, expected ids below 260"):
        make_manifest(folder).check_contents(folder)


def test_check_contents_counts_documents(folder: Path) -> None:
    manifest = make_manifest(folder)
    split = replace(manifest.splits["train"], documents=3)
    with pytest.raises(DamagedFileError, match=r"3 documents in the split train.* 2 end tokens"):
        replace(manifest, splits={"train": split}).check_contents(folder)


def test_check_contents_finds_an_unlisted_shard(folder: Path) -> None:
    np.save(folder / "my-notes.npy", TOKENS)
    Manifest.load(folder).check_contents(folder)
    np.save(folder / "validation-00000.npy", TOKENS)
    with pytest.raises(DamagedFileError, match=r"validation-00000\.npy is not listed in manifest"):
        Manifest.load(folder).check_contents(folder)


def test_check_contents_checks_the_tokenizer(folder: Path) -> None:
    manifest = Manifest.load(folder)
    with pytest.raises(DamagedFileError, match=r"tokenizer\.json .* found 260 entries"):
        replace(manifest, vocab_size=261).check_contents(folder)
    save_tokenizer(train_tokenizer(["other other"], 262), folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"was not prepared with the tokenizer .*restore the file"):
        manifest.check_contents(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DamagedFileError, match=r"tokenizer\.json is missing or damaged"):
        manifest.check_contents(folder)


def test_manifest_given_as_the_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    with pytest.raises(ValueError, match=r"manifest\.json is a file: name the folder"):
        Manifest.load(tmp_path / "manifest.json")

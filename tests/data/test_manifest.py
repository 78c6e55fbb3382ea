import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastllama.data.manifest import MANIFEST_FILE, Manifest, Shard, Split, sha256_of

TOKENS = np.array([5, 6, 7, 299], np.uint16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "train-00000.npy", TOKENS)
    make_manifest(tmp_path).save(tmp_path)
    return tmp_path


def make_manifest(folder: Path, vocab_size: int = 300) -> Manifest:
    path = folder / "train-00000.npy"
    shard = Shard(path.name, len(TOKENS), sha256_of(path))
    return Manifest(
        dtype="uint16",
        vocab_size=vocab_size,
        end_token_id=1,
        tokenizer_fingerprint="t",
        skipped_records=2,
        splits={"train": Split(len(TOKENS), documents=1, text_bytes=9, shards=(shard,))},
    )


def test_save_and_load(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest == make_manifest(folder)
    manifest.check_files(folder)
    manifest.check_contents(folder)


def test_missing_folder_or_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="run the same prepare command again"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1}', "\x00"])
def test_unreadable_manifest(folder: Path, content: str) -> None:
    (folder / MANIFEST_FILE).write_text(content)
    with pytest.raises(ValueError, match="cannot be read"):
        Manifest.load(folder)


def test_newer_format_version(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps({"format_version": 2, "new": True}))
    with pytest.raises(ValueError, match=r"format version 2.*upgrade"):
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
            np.save(path, TOKENS.reshape(2, 2))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("missing", "no such file"),
        ("empty", r"no valid \.npy file"),
        ("header", r"no valid \.npy file"),
        ("short", r"no valid \.npy file"),
        ("long", "137 bytes, expected 136"),
        ("dtype", "int16"),
        ("length", r"shape \(3,\)"),
        ("shape", r"shape \(2, 2\)"),
    ],
)
def test_check_files_finds_damage(folder: Path, damage: str, found: str) -> None:
    path = folder / "train-00000.npy"
    damage_shard(path, damage)
    with pytest.raises(ValueError, match=f"train-00000.npy is damaged.*{found}.*prepare"):
        Manifest.load(folder).check_files(folder)


def test_check_contents_finds_changed_tokens(folder: Path) -> None:
    manifest = Manifest.load(folder)
    changed = TOKENS.copy()
    changed[0] += 1
    np.save(folder / "train-00000.npy", changed)
    manifest.check_files(folder)
    with pytest.raises(ValueError, match="SHA-256"):
        manifest.check_contents(folder)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 5])
def test_check_contents_finds_ids_beyond_vocabulary(
    folder: Path, monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    monkeypatch.setattr("fastllama.data.manifest.CHECK_CHUNK_TOKENS", chunk_tokens)
    make_manifest(folder).check_contents(folder)
    with pytest.raises(ValueError, match="token id 299, expected ids below 299"):
        make_manifest(folder, vocab_size=299).check_contents(folder)

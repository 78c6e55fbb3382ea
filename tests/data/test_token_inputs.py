"""Files that are no token files, or not those that they seem to be: one sentence each."""

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from fastllama.cli.data_import import DataImportOptions
from fastllama.data.import_tokens import import_tokens
from fastllama.data.token_inputs import FORMATS, open_token_inputs
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer
from tests.data import foreign
from tests.data.token_formats import (
    write_datatrove,
    write_llm_c,
    write_megatron,
    write_npy,
    write_raw,
)

DOCUMENTS = [[5, 6, 7], [8], [9, 10]]
INDEX_HEADER = 34
"""Bytes of a Megatron index before the lengths, of 4 bytes each, and the pointers, of 8."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """260 ids; the end token has id 1."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(train_tokenizer([], 260), path)
    return path


def patched(path: Path, at: int, layout: str, *values: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, at, *values)
    path.write_bytes(content)


def megatron(at: int, layout: str, *values: int) -> Callable[[Path], object]:
    """A Megatron file whose index is changed."""

    def write(folder: Path) -> None:
        path = write_megatron(folder / "a", DOCUMENTS)
        patched(path.with_suffix(".idx"), at, layout, *values)

    return write


def cut(path: Path, n: int) -> None:
    os.truncate(path, path.stat().st_size - n)


def extended(path: Path, n: int) -> None:
    path.write_bytes(path.read_bytes() + bytes(n))


def several_formats(folder: Path) -> None:
    write_npy(folder / "a", DOCUMENTS)
    write_raw(folder / "b", DOCUMENTS)


def several_tokenizers(folder: Path) -> None:
    for name in ("a", "b"):
        write_datatrove(folder / name, DOCUMENTS)
    metadata = folder / "b.ds.metadata"
    metadata.write_text(metadata.read_text().replace("gpt2", "llama"))


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    # What is no token file at all.
    "no file": (lambda f: (f / "notes.txt").write_text("a"), "matches no file.* .ds, .bin or .npy"),
    "empty raw file": (lambda f: (f / "a.bin").touch(), r"a\.bin holds no tokens: leave it out"),
    "empty array": (lambda f: np.save(f / "a.npy", np.empty(0, "<u2")), r"a\.npy holds no tokens"),
    "no array": (lambda f: (f / "a.npy").write_bytes(b"tokens"), r"a\.npy is no \.npy array"),
    "strings": (
        lambda f: np.save(f / "a.npy", np.array(["some", "words"])),
        r"a\.npy is no \.npy array of token ids \(its header is not one of version 1 for numbers",
    ),
    "floats": (lambda f: np.save(f / "a.npy", np.ones(4)), "holds float64 numbers, not token ids"),
    "2-D array": (
        lambda f: np.save(f / "a.npy", np.ones((4, 3), "<u2")),
        r"has the shape 4 x 3, and a token stream has one dimension: save array\.reshape\(-1\)",
    ),
    "scalar": (
        lambda f: np.save(f / "a.npy", np.uint16(4)),
        "has no dimension, and a token stream",
    ),
    "questions of llm.c": (
        lambda f: write_llm_c(f / "a", DOCUMENTS, magic=20240522),
        "holds multiple-choice questions of llm.c",
    ),
    "only empty documents": (
        lambda f: write_datatrove(f / "a", [[], []]),
        "the input files hold no tokens to train on",
    ),
    # Ids and the tokenizer.
    "id outside of the vocabulary": (
        lambda f: write_raw(f / "a", [[5, 6, 7, 260]]),
        r"a\.bin, read as raw-uint16, has token id 260 at position 3, and the tokenizer has 260 "
        r"ids: name the tokenizer that the file was written with, or another --format",
    ),
    "negative id": (
        lambda f: write_npy(f / "a", [[5, -1]], "<i8"),
        r"a\.npy, read as npy, has token id -1 at position 1, which is negative; -1 is often",
    ),
    "32 bits without a header": (
        lambda f: write_raw(f / "a", [[5] * 20], "<u4"),
        r"a\.bin has neither a header nor an \.idx file .*: say which with --format raw-uint16 or",
    ),
    "several formats": (
        several_formats,
        r"several formats, npy \(.*a\.npy\) and raw-uint16 \(.*b\.bin\): import them into separate",
    ),
    "several tokenizers": (
        several_tokenizers,
        r"several tokenizers, gpt2 \(.*a\.ds\) and llama \(.*b\.ds\): .* or delete the \.metadata",
    ),
    # Truncated files.
    "truncated raw file": (
        lambda f: cut(write_raw(f / "a", DOCUMENTS), 1),
        r"a\.bin is truncated, or its tokens do not have 2 bytes: 17 bytes of tokens",
    ),
    "truncated array": (
        lambda f: cut(write_npy(f / "a", DOCUMENTS), 4),
        r"a\.npy has 7 tokens, and its header counts 9: copy it again",
    ),
    "truncated llm.c": (
        lambda f: cut(write_llm_c(f / "a", DOCUMENTS), 2),
        r"a\.bin has 8 tokens, and its header counts 9: copy it again",
    ),
    "truncated header of llm.c": (
        lambda f: os.truncate(write_llm_c(f / "a", DOCUMENTS), 100),
        r"a\.bin is truncated within its header",
    ),
    "version of llm.c": (
        lambda f: write_llm_c(f / "a", DOCUMENTS, version=2),
        r"a\.bin has version 2 of the format 20240520, and fastllama reads version 1",
    ),
    # datatrove.
    "truncated .ds": (
        lambda f: cut(write_datatrove(f / "a", DOCUMENTS), 2),
        r"a\.ds\.index ends at token 6, and .*a\.ds has 5 tokens: copy both files again",
    ),
    "index that ends too early": (
        lambda f: cut(write_datatrove(f / "a", DOCUMENTS).with_suffix(".ds.index"), 8),
        r"a\.ds\.index ends at token 4, and .*a\.ds has 6 tokens",
    ),
    "truncated index": (
        lambda f: cut(write_datatrove(f / "a", DOCUMENTS).with_suffix(".ds.index"), 3),
        r"a\.ds\.index is truncated: its size is no multiple of 8 bytes",
    ),
    "index that does not ascend": (
        lambda f: patched(
            write_datatrove(f / "a", DOCUMENTS).with_suffix(".ds.index"), 0, "<2Q", 4, 3
        ),
        r"a\.ds\.index is damaged: the ends of its documents do not ascend",
    ),
    "metadata that counts otherwise": (
        lambda f: (
            write_datatrove(f / "a", DOCUMENTS)
            .with_suffix(".ds.metadata")
            .write_text("gpt2|2\n7\n7 T")
        ),
        r"a\.ds\.metadata counts 7 tokens, and .*a\.ds has 6",
    ),
    "no metadata": (
        lambda f: (
            write_datatrove(f / "a", DOCUMENTS).with_suffix(".ds.metadata").write_text("gpt2|3\n6")
        ),
        r"a\.ds\.metadata is not metadata of datatrove",
    ),
    "index without its file": (
        lambda f: write_datatrove(f / "a", DOCUMENTS).unlink(),
        r"a\.ds\.index belongs to a\.ds, which is not among the input files",
    ),
    "index that is a pipe": (
        lambda f: os.mkfifo(f"{write_datatrove(f / 'a', DOCUMENTS, index=False)}.index"),
        r"a\.ds\.index is a broken link or a special file",
    ),
    # Megatron.
    "idx without its file": (
        lambda f: write_megatron(f / "a", DOCUMENTS).unlink(),
        r"a\.idx belongs to a\.bin, which is not among the input files",
    ),
    "wrong magic": (megatron(0, "<B", 0), r"a\.idx is no index of Megatron-LM"),
    "version of Megatron": (megatron(9, "<Q", 2), r"a\.idx has version 2, and fastllama reads"),
    "unknown dtype": (megatron(17, "<B", 9), r"a\.idx has the unknown dtype code 9"),
    "floats of Megatron": (megatron(17, "<B", 7), r"a\.idx says that the file holds floats"),
    "idx of other counts": (megatron(18, "<Q", 4), r"a\.idx has 102 bytes, and its 4 sequences"),
    "dtype that contradicts the bin": (
        megatron(17, "<B", 4),
        r"a\.idx describes 16 bytes of tokens, and .*a\.bin has 12: copy both files again",
    ),
    "length that contradicts the pointers": (
        megatron(INDEX_HEADER, "<2i", 2, 2),
        r"a\.idx is damaged: sequence 1 does not begin where the one before it ends",
    ),
    "negative length": (
        megatron(INDEX_HEADER, "<2i", 5, -1),
        r"a\.idx is damaged: sequence 1 does not begin",
    ),
    "document indices": (
        megatron(INDEX_HEADER + 12 * 3 + 8 * 3, "<q", 2),
        r"a\.idx is damaged: its document indices do not go from 0 to the 3 sequences",
    ),
    "document indices that do not ascend": (
        megatron(INDEX_HEADER + 12 * 3 + 8, "<2q", 2, 1),
        r"a\.idx is damaged: the ends of its documents do not ascend",
    ),
    "truncated bin": (
        lambda f: cut(write_megatron(f / "a", DOCUMENTS), 2),
        r"a\.idx describes 12 bytes of tokens, and .*a\.bin has 10",
    ),
    "truncated idx": (
        lambda f: os.truncate(write_megatron(f / "a", DOCUMENTS).with_suffix(".idx"), 20),
        r"a\.idx is truncated within its header",
    ),
    "multimodal": (
        # A mode of one byte for each sequence.
        lambda f: extended(write_megatron(f / "a", DOCUMENTS).with_suffix(".idx"), 3),
        r"a\.idx describes multimodal data",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, tokenizer: Path, tmp_path: Path) -> None:
    write, sentence = REFUSALS[case]
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus")
    with pytest.raises(ValueError, match=sentence):
        import_tokens([str(tmp_path / "corpus")], tokenizer, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"validation_fraction": 1.0}, r"validation fraction 1\.0 is not in \[0, 1\)"),
        ({"shard_tokens": 0}, "shard tokens 0 is not a positive number"),
        ({"end_token": "a"}, "'a' is not a special token of the tokenizer: set --end-token to one"),
        ({"validation_fraction": 0.999}, "were held out for validation, and none is left"),
        (
            {"validation_fraction": 0.1, "validation_inputs": ["a.bin"]},
            "from --validation-input: leave out --validation-fraction",
        ),
        ({"named_format": "llm.c"}, "begins with 393221, not with 20240520 or 20240801"),
        ({"named_format": "megatron"}, r"a\.bin has no a\.idx beside it"),
        ({"named_format": "npy"}, r"a\.bin is no \.npy array"),
        ({"named_format": "raw-uint32"}, "is truncated, or its tokens do not have 4 bytes"),
    ],
)
def test_settings_that_do_not_fit(
    options: dict[str, Any], sentence: str, tokenizer: Path, tmp_path: Path
) -> None:
    path = write_raw(tmp_path / "a", DOCUMENTS)
    with pytest.raises(ValueError, match=sentence):
        import_tokens([str(path)], tokenizer, tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_stream_without_an_end_token_is_held_out(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.full(100, 5, "<u2").tofile(path)
    with pytest.raises(ValueError, match=r"hold no end token, .* --end-token, or leave"):
        import_tokens([str(path)], tokenizer, tmp_path / "data", validation_fraction=0.999)


def test_every_file_is_held_out(tokenizer: Path, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a", DOCUMENTS)
    with pytest.raises(ValueError, match="the input files hold no tokens to train on"):
        import_tokens([str(path)], tokenizer, tmp_path / "data", validation_inputs=[str(path)])


def test_tokenizer_without_an_end_token(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a", [[5, 6]])
    save_tokenizer(foreign.words("a", special=["<s>"]), tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="none of the usual end tokens"):
        import_tokens([str(path)], tmp_path / "tokenizer.json", tmp_path / "data")


def test_url(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot import s3://bucket/a\.ds: .* from a disk"):
        import_tokens(["s3://bucket/a.ds"], tokenizer, tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mega", r"mega does not exist: name .*/mega\.bin, whose index is found beside it"),
        ("mega.idx", r"mega\.idx belongs to /.*/mega\.bin: name that file instead"),
        ("trove.ds.index", r"trove\.ds\.index belongs to /.*/trove\.ds: name that file instead"),
    ],
)
def test_name_beside_a_token_file(
    name: str, sentence: str, tokenizer: Path, tmp_path: Path
) -> None:
    write_megatron(tmp_path / "mega", DOCUMENTS)
    write_datatrove(tmp_path / "trove", DOCUMENTS)
    with pytest.raises(ValueError, match=sentence):
        import_tokens([str(tmp_path / name)], tokenizer, tmp_path / "data")


def test_output_that_is_a_file(tokenizer: Path, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a", DOCUMENTS)
    with pytest.raises(ValueError, match="is not a folder: choose another --output"):
        import_tokens([str(path)], tokenizer, path)


def test_file_of_another_suffix(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    with pytest.raises(
        ValueError, match=r"its suffix is not \.ds, \.bin or \.npy; .*`fastllama prepare`"
    ):
        import_tokens([str(tmp_path / "a.parquet")], tokenizer, tmp_path / "data")


def test_raw_tokens_of_a_large_vocabulary(tmp_path: Path) -> None:
    """16 bits cannot hold its ids, but may hold all that occur."""
    path = write_raw(tmp_path / "a", [[5, 6, 7]])
    with pytest.raises(ValueError, match="may have 16 or 32 bits: say which with --format"):
        open_token_inputs([path], None, 2**16 + 1)
    [file] = open_token_inputs([path], "raw-uint16", 2**16 + 1)
    assert (file.dtype, file.tokens) == (np.dtype("<u2"), 4)


def test_raw_tokens_of_64_bits(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a", [[5] * 20], "<i8")
    with pytest.raises(ValueError, match=r"a\.bin, read as raw-uint32, is 0: .* 64 bits; save"):
        open_token_inputs([path], "raw-uint32", 2**16 + 1)
    # A stream of nothing but zeros has a width of its own.
    path = write_raw(tmp_path / "b", [[0] * 40], "<u4")
    [file] = open_token_inputs([path], "raw-uint32", 2**16 + 1)
    assert file.tokens == 41


def test_metadata_of_a_merger_describes_no_file(tmp_path: Path) -> None:
    path = write_datatrove(tmp_path / "a", DOCUMENTS)
    merged = tmp_path / "merged.ds.metadata"
    merged.write_text("gpt2|2\n6\n6 T")
    assert len(open_token_inputs([path, merged], None, 260)) == 1


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a", DOCUMENTS)
    [file] = open_token_inputs([path], None, 260)
    cut(path, 2)
    with pytest.raises(ValueError, match=r"a\.bin was truncated while it was read"):
        list(file.read(260))


def test_page_and_command_name_every_format() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    section = page.partition("## Token files of other tools")[2].partition("\n## ")[0]
    assert set(re.findall(r"\| `([^-]\S+)` \|$", section, re.MULTILINE)) == set(FORMATS)
    [_, *choices] = get_args(get_type_hints(DataImportOptions)["format"])
    assert choices == list(FORMATS)

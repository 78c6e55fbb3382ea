"""`data import`: token files of other tools become an ordinary data folder."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import fastllama.data.import_tokens as module
from fastllama.atomic import locked
from fastllama.data import token_inputs
from fastllama.data.import_tokens import import_tokens
from fastllama.data.manifest import Manifest
from fastllama.data.output_folder import split_of
from fastllama.data.prepare import prepare
from fastllama.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from tests.data import foreign
from tests.data.interrupted import contents
from tests.data.token_formats import (
    END,
    WRITERS,
    concatenated,
    write_datatrove,
    write_llm_c,
    write_megatron,
    write_npy,
    write_raw,
)

VOCAB_SIZE = 260
# Ids below 128 fit every dtype of the table.
DOCUMENTS = [[5, 6, 7], [8], [9, 0, 100, 127], [5, 6, 7], [40] * 30]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(train_tokenizer([], VOCAB_SIZE), path)
    return path


def streams(output: Path) -> dict[str, list[int]]:
    """The tokens of each split, of a folder that `data check` accepts."""
    manifest = Manifest.load(output)
    manifest.check_contents(output)
    return {
        name: np.concatenate([np.load(output / shard.file) for shard in split.shards]).tolist()
        for name, split in manifest.splits.items()
    }


def decoded_bytes(tokenizer: Tokenizer, documents: list[list[int]]) -> int:
    return sum(len(tokenizer.decode(document).encode()) for document in documents)


@pytest.mark.parametrize("name", WRITERS)
def test_formats(name: str, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    WRITERS[name](tmp_path / "corpus" / "a", DOCUMENTS)
    WRITERS[name](tmp_path / "corpus" / "b", [[77, 78]])
    manifest = import_tokens(
        [str(tmp_path / "corpus")], tokenizer, tmp_path / "data", shard_tokens=20
    )
    expected = concatenated([*DOCUMENTS, [77, 78]])
    assert streams(tmp_path / "data") == {"train": expected}
    split = manifest.splits["train"]
    assert (split.tokens, split.documents) == (len(expected), 6)
    assert [shard.tokens for shard in split.shards] == [20, 20, len(expected) - 40]
    assert manifest.dtype == "uint16"


def test_folder_is_that_of_prepare(tokenizer: Path, tmp_path: Path) -> None:
    """Text that is prepared, and its ids that are imported, differ in nothing but job.json."""
    texts = ["naïve 日本\n", "b" * 50, "<EOS> is text", "🦙"] * 3
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare([str(corpus)], tokenizer, tmp_path / "prepared", shard_tokens=70)
    ids = load_tokenizer(tokenizer)
    documents = [ids.encode(text, add_special_tokens=False).ids for text in texts]
    path = write_megatron(tmp_path / "tokens", documents)
    import_tokens([str(path)], tokenizer, tmp_path / "imported", shard_tokens=70)
    prepared, imported = contents(tmp_path / "prepared"), contents(tmp_path / "imported")
    assert prepared.pop("job.json") != imported.pop("job.json")
    assert prepared == imported


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    seed=st.integers(0, 99),
    writer=st.sampled_from(sorted(WRITERS)),
    shard_tokens=st.integers(3, 60),
    chunk=st.integers(1, 9),
    fraction=st.sampled_from([0.0, 0.5]),
    n_files=st.integers(1, 3),
)
def test_any_lengths(
    tokenizer: Path,
    lengths: list[int],
    seed: int,
    writer: str,
    shard_tokens: int,
    chunk: int,
    fraction: float,
    n_files: int,
) -> None:
    draw = np.random.default_rng(seed)
    documents = [draw.integers(2, 128, length).tolist() for length in lengths]
    is_indexed = writer.startswith(("datatrove", "Megatron"))
    # An index may describe documents without tokens. They give none, not even an end token.
    kept = [document for document in documents if document or not is_indexed]
    expected: dict[str, list[list[int]]] = {"train": [], "validation": []}
    for document in kept:
        start = np.array(document[:chunk], "<u4").tobytes()
        expected[split_of(start, fraction)].append(document)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        for place in (module, token_inputs):
            patch.setattr(place, "CHUNK_NUMBERS", chunk)
        patch.setattr(module, "HASHED_TOKENS", chunk)
        per_file = -(-len(documents) // n_files)
        for number, first in enumerate(range(0, len(documents), per_file)):
            WRITERS[writer](Path(folder) / str(number), documents[first : first + per_file])
        output = Path(folder) / "data"

        def run() -> Manifest:
            return import_tokens(
                [folder],
                tokenizer,
                output,
                validation_fraction=fraction,
                shard_tokens=shard_tokens,
            )

        if not expected["train"]:
            with pytest.raises(ValueError, match=r"no tokens to train on|were held out"):
                run()
            assert not output.exists()
            return
        manifest = run()
        found = streams(output)
    assert found == {name: concatenated(split) for name, split in expected.items() if split}
    for name, split in manifest.splits.items():
        assert split.documents == len(expected[name])
        # Each id above the special tokens is a byte.
        assert split.text_bytes == sum(id >= 4 for ids in expected[name] for id in ids)


def test_documents_of_several_sequences(tokenizer: Path, tmp_path: Path) -> None:
    path = write_megatron(
        tmp_path / "a", [[5, 6, 7, 8, 9]], sequences=[2, 1, 0, 2], borders=[0, 0, 2, 3, 4, 4]
    )
    import_tokens([str(path)], tokenizer, tmp_path / "data")
    assert streams(tmp_path / "data") == {"train": concatenated([[5, 6, 7], [8, 9]])}


def test_end_tokens_are_added_where_they_lack(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_datatrove(tmp_path / "a", [[5, END], [6], [END], [7, END, 8, END]])
    manifest = import_tokens([str(path)], tokenizer, tmp_path / "data")
    assert streams(tmp_path / "data")["train"] == [5, END, 6, END, END, 7, END, 8, END]
    assert manifest.splits["train"].documents == 5
    notes = capsys.readouterr().err
    assert "note: 1 of 4 documents lacked the end token '<EOS>', and got it" in notes
    assert "note: documents have the end token '<EOS>' inside, at 1 places, and end there" in notes
    assert "tokenizer gpt2" in notes


def test_stream_without_an_index_stays_as_it_is(tokenizer: Path, tmp_path: Path) -> None:
    """modded-nanogpt puts the end token before a document, and cuts documents between files."""
    for name, ids in (("a", [END, 5, 6, END, 7]), ("b", [8, END, 9])):
        np.array(ids, "<u2").tofile(tmp_path / f"{name}.bin")
    manifest = import_tokens([str(tmp_path)], tokenizer, tmp_path / "data")
    assert streams(tmp_path / "data")["train"] == [END, 5, 6, END, 7, 8, END, 9]
    assert manifest.splits["train"].documents == 3


def test_no_end_token_is_a_warning(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.array([0, 5, 6, 0, 7], "<u2").tofile(tmp_path / "a.bin")
    manifest = import_tokens([str(tmp_path / "a.bin")], tokenizer, tmp_path / "data")
    assert manifest.splits["train"].documents == 0
    streams(tmp_path / "data")
    assert (
        "warning: the end token '<EOS>' (id 1) does not occur in 5 tokens, so nothing tells where "
        "documents end; the files have '<SOS>': name it with --end-token"
    ) in capsys.readouterr().err
    manifest = import_tokens(
        [str(tmp_path / "a.bin")], tokenizer, tmp_path / "data-2", end_token="<SOS>"
    )
    assert manifest.splits["train"].documents == 2
    assert "warning: the end token" not in capsys.readouterr().err


def test_validation_files(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole folder may be named, too: no file falls into both splits."""
    write_raw(tmp_path / "train", DOCUMENTS)
    validation = write_raw(tmp_path / "val", [[70], [71, 72]])
    manifest = import_tokens(
        [str(tmp_path)], tokenizer, tmp_path / "data", validation_inputs=[str(validation)]
    )
    assert streams(tmp_path / "data") == {
        "train": concatenated(DOCUMENTS),
        "validation": concatenated([[70], [71, 72]]),
    }
    assert manifest.splits["validation"].documents == 2
    assert "is read for training" not in capsys.readouterr().err
    import_tokens([str(tmp_path)], tokenizer, tmp_path / "data-2")
    warnings = capsys.readouterr().err
    assert f"warning: {validation} is read for training: name it with --validation" in warnings


def test_copies_fall_into_one_split(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also long ones, whose first tokens decide."""
    for place in (module, token_inputs):
        monkeypatch.setattr(place, "CHUNK_NUMBERS", 16)
    monkeypatch.setattr(module, "HASHED_TOKENS", 16)
    draw = np.random.default_rng(0)
    documents = [draw.integers(2, 128, length).tolist() for length in (1, 9, 16, 17, 50, 70) * 3]
    path = write_npy(tmp_path / "a", documents + [[99]] * 3 + documents)
    import_tokens([str(path)], tokenizer, tmp_path / "data", validation_fraction=0.5)
    found = streams(tmp_path / "data")
    assert found.keys() == {"train", "validation"}
    for document in documents:
        n_copies = [
            str(tokens)[1:-1].count(str([*document, END])[1:-1]) for tokens in found.values()
        ]
        assert 0 in n_copies
        assert sum(n_copies) >= 2
    assert sum(map(len, found.values())) == len(concatenated(documents + [[99]] * 3 + documents))


@pytest.mark.parametrize("name", foreign.ALL)
@pytest.mark.parametrize("chunk", [2**20, 7])
def test_text_bytes(name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the text that the ids decode to, with any tokenizer."""
    for place in (module, token_inputs):
        monkeypatch.setattr(place, "CHUNK_NUMBERS", chunk)
    made = foreign.ALL[name]()
    save_tokenizer(made, tmp_path / "tokenizer.json")
    documents = [made.encode(text, add_special_tokens=False).ids for text in foreign.CORPUS]
    end = made.token_to_id("</s>")
    np.save(tmp_path / "a.npy", np.array([i for ids in documents for i in (*ids, end)], "<u2"))
    manifest = import_tokens(
        [str(tmp_path / "a.npy")], tmp_path / "tokenizer.json", tmp_path / "data"
    )
    assert manifest.splits["train"].text_bytes == decoded_bytes(made, documents)


def test_special_tokens_are_no_text(tmp_path: Path) -> None:
    made = foreign.byte_level()
    made.add_tokens(["added é"])
    save_tokenizer(made, tmp_path / "tokenizer.json")
    ids = [made.token_to_id(name) for name in ("<s>", "a", "added é", "</s>")]
    np.save(tmp_path / "a.npy", np.array(ids))
    manifest = import_tokens(
        [str(tmp_path / "a.npy")], tmp_path / "tokenizer.json", tmp_path / "data"
    )
    assert manifest.splits["train"].text_bytes == len("aadded é".encode())


def test_complete_folder_is_left_alone(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_llm_c(tmp_path / "a", DOCUMENTS)
    first = import_tokens([str(path)], tokenizer, tmp_path / "data")
    before = contents(tmp_path / "data")
    assert import_tokens([str(path)], tokenizer, tmp_path / "data") == first
    assert contents(tmp_path / "data") == before
    assert "already complete" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds data of another job \(shard_tokens differ"):
        import_tokens([str(path)], tokenizer, tmp_path / "data", shard_tokens=9)
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("changed", ["a.ds", "a.ds.index"])
def test_file_that_changes_meanwhile(
    changed: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_datatrove(tmp_path / "a", DOCUMENTS)
    complete = module._copy

    def copy_and_change(*arguments: Any) -> None:
        complete(*arguments)
        os.utime(tmp_path / changed, ns=(0, 0))

    monkeypatch.setattr(module, "_copy", copy_and_change)
    with pytest.raises(ValueError, match=rf"{re.escape(changed)} was changed while it was read"):
        import_tokens([str(path)], tokenizer, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("shard_tokens", [1000, 700])
def test_import_after_a_kill(shard_tokens: int, tokenizer: Path, tmp_path: Path) -> None:
    """It starts again, or another one does: only files of the first one are replaced."""
    path = write_npy(tmp_path / "a", DOCUMENTS * 50)
    output = tmp_path / "data"
    arguments = f"[{str(path)!r}], Path({str(tokenizer)!r}), Path({str(output)!r})"
    code = f"""
import time
from pathlib import Path
from fastllama.data import import_tokens as module
append = module.SplitWriter.append
module.SplitWriter.append = lambda writer, ids: (append(writer, ids), time.sleep(60))
module.import_tokens({arguments}, shard_tokens=1000)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2]) as process:
        while not (output / "train-00001.npy").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not (output / "manifest.json").exists()
    (output / "train-images.npy").write_text("mine")
    import_tokens([str(path)], tokenizer, output, shard_tokens=shard_tokens)
    assert streams(output) == {"train": concatenated(DOCUMENTS * 50)}
    assert (output / "train-images.npy").read_text() == "mine"


def test_folder_in_use(tokenizer: Path, tmp_path: Path) -> None:
    path = write_npy(tmp_path / "a", DOCUMENTS)
    (tmp_path / "data").mkdir()
    with locked(tmp_path / "data"), pytest.raises(ValueError, match="another process is writing"):
        import_tokens([str(path)], tokenizer, tmp_path / "data")


@pytest.mark.extra
@pytest.mark.skipif(
    find_spec("datatrove") is None, reason="no datatrove: make test-all installs it"
)
@pytest.mark.parametrize("end_token", [None, "<EOS>"])
@pytest.mark.parametrize("kind", ["in order", "shuffled", "Megatron"])
def test_files_of_datatrove(
    end_token: str | None, kind: str, tokenizer: Path, tmp_path: Path
) -> None:
    tokens = import_module("datatrove.pipeline.tokens")
    documents = import_module("datatrove.data")
    texts = [f"document number {number}" * (number % 3 + 1) for number in range(40)]
    options: dict[str, Any] = {
        "output_folder": str(tmp_path / "tokens"),
        "tokenizer_name_or_path": str(tokenizer),
        "eos_token": end_token,
    }
    if kind == "Megatron":
        step = tokens.MegatronDocumentTokenizer(**options)
    elif kind == "shuffled":
        step = tokens.DocumentTokenizer(**options, max_tokens_per_file=300, seed=0)
    else:
        step = tokens.DocumentTokenizer(**options, shuffle_documents=False)
    step.run(documents.Document(text=text, id=str(number)) for number, text in enumerate(texts))
    manifest = import_tokens([str(tmp_path / "tokens")], tokenizer, tmp_path / "data")
    [ids] = streams(tmp_path / "data").values()
    pieces = np.split(ids, np.flatnonzero(np.array(ids) == END) + 1)[:-1]
    decoder = load_tokenizer(tokenizer)
    found = [decoder.decode(piece.tolist()) for piece in pieces]
    assert sorted(found) == sorted(texts)
    assert (found == texts) == (kind != "shuffled")
    assert manifest.splits["train"].documents == 40
    assert manifest.splits["train"].text_bytes == sum(map(len, texts))

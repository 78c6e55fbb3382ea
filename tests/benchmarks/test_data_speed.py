"""How benchmarks/data_speed.py measures opening and reading of a data folder."""

from pathlib import Path

import pytest

import benchmarks.data_speed as module
from fastllama.data.manifest import Manifest
from fastllama.data.tokenizer import train_tokenizer


def test_opening_and_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_SECONDS", 0.05)
    folder = tmp_path / "data"
    module.make_folder(folder, train_tokenizer([], 260), n_shards=3, shard_tokens=2_500)
    assert Manifest.load(folder).splits["train"].tokens == 7_500
    assert all(seconds > 0 for seconds in module.time_opening(folder, 2))
    # Millions of tokens a second; a micro-batch a second would be 64.
    assert module.reading_rate(folder, 32, 2) > 1_000


@pytest.mark.parametrize("name", ["encode_batch", "encode_batch_fast"])
def test_rivals_encode_every_line(tmp_path: Path, name: str) -> None:
    corpus, tokenizer = tmp_path / "corpus.jsonl", tmp_path / "tokenizer.json"
    corpus.write_text('{"text": "one"}\n{"text": "two"}\n')
    train_tokenizer([], 260).save(str(tokenizer))
    printing = module.ALONE + "print(len(encode(['one', 'two'])), 'encoded')"
    command = [module.sys.executable, "-c", printing, str(corpus), str(tokenizer), name]
    assert module.seconds(command, "2 encoded") > 0

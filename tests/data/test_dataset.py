import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from fastllama.config import Config, DataConfig, ModelConfig
from fastllama.data.dataset import open_dataset
from fastllama.data.manifest import Manifest
from fastllama.data.tokenizer import (
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from tests.data.folder import VOCAB_SIZE, make_folder


def config_for(folder: Path) -> Config:
    return Config(
        model=ModelConfig(vocab_size=VOCAB_SIZE, max_seq_len=8), data=DataConfig(path=str(folder))
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    make_folder(folder, {"train": [range(20), range(20, 50)], "validation": [range(50, 70)]})
    return folder


def test_opens_streams_and_tokenizer(folder: Path) -> None:
    dataset = open_dataset(config_for(folder))
    assert dataset.sources[0].stream.n_tokens == 50
    (held_out,) = dataset.validation
    assert held_out.stream.read(0, 3).tolist() == [50, 51, 52, 53]
    assert dataset.tokenizer.get_vocab_size() == VOCAB_SIZE


# Eight inputs need nine tokens.
@pytest.mark.parametrize("validation", [{}, {"validation": [range(8)]}], ids=["none", "too short"])
def test_missing_or_short_validation_split(
    tmp_path: Path, validation: dict[str, list[range]]
) -> None:
    make_folder(tmp_path, {"train": [range(50)], **validation})
    assert open_dataset(config_for(tmp_path)).validation == ()


def test_data_of_exactly_one_sequence(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": [range(9)]})
    assert open_dataset(config_for(tmp_path)).train.epochs(1) == [1.0]
    make_folder(tmp_path, {"train": [range(8)]})
    with pytest.raises(ValueError, match="max_seq_len = 8 is longer than the data, 8 tokens in"):
        open_dataset(config_for(tmp_path))


def test_rejects_data_without_a_training_split(tmp_path: Path) -> None:
    make_folder(tmp_path, {"validation": [range(50)]})
    with pytest.raises(
        ValueError, match=r"has no training split: .* smaller --validation-fraction"
    ):
        open_dataset(config_for(tmp_path))


def test_data_tokenizer_option(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder)
    same = tmp_path / "same.json"
    # The fingerprint ignores formatting.
    same.write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text())))
    open_dataset(replace(config, data=replace(config.data, tokenizer=str(same))))

    other = tmp_path / "other.json"
    save_tokenizer(train_tokenizer(["other other other"], 270), other)
    with pytest.raises(ValueError, match=r"was not prepared with the tokenizer .*other\.json"):
        open_dataset(replace(config, data=replace(config.data, tokenizer=str(other))))


def test_rejects_changed_tokenizer(folder: Path) -> None:
    save_tokenizer(train_tokenizer(["other other other"], 270), folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"not prepared with the tokenizer .*data/tokenizer\.json"):
        open_dataset(config_for(folder))


def test_rejects_small_vocab_size(folder: Path) -> None:
    config = config_for(folder)
    config = replace(config, model=replace(config.model, vocab_size=VOCAB_SIZE - 1))
    with pytest.raises(ValueError, match="vocab_size = 259 is smaller than the tokenizer's 260"):
        open_dataset(config)


def test_prompt_length_excludes_template_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    template = TemplateProcessing("<SOS> $A <EOS>", special_tokens=[("<SOS>", 0), ("<EOS>", 1)])
    tokenizer.post_processor = template
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    replace(Manifest.load(folder), tokenizer_fingerprint=fingerprint(tokenizer)).save(folder)
    config = config_for(folder)
    open_dataset(replace(config, logging=replace(config.logging, sample_prompt="x" * 7)))
    with pytest.raises(ValueError, match="sample_prompt fills the 8 tokens of a sequence"):
        open_dataset(replace(config, logging=replace(config.logging, sample_prompt="x" * 8)))


def test_rejects_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        open_dataset(Config())
    with pytest.raises(ValueError, match="nowhere does not exist"):
        open_dataset(config_for(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("manifest.json", r"has neither manifest\.json nor job\.json"),
        ("tokenizer.json", r"tokenizer\.json is missing or damaged"),
        ("train-00001.npy", r"train-00001\.npy is damaged: found no such file"),
        ("validation-00000.npy", r"validation-00000\.npy is damaged: found no such file"),
    ],
)
def test_rejects_missing_file(folder: Path, file: str, message: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ValueError, match=message):
        open_dataset(config_for(folder))


@pytest.mark.parametrize("kept", [0, 40, -1])
def test_rejects_truncated_shard(folder: Path, kept: int) -> None:
    shard = folder / "train-00001.npy"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"train-00001\.npy is damaged"):
        open_dataset(config_for(folder))


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (np.zeros(30, np.uint32), r"uint32 of shape \(30,\)"),
        (np.zeros(29, np.uint16), r"uint16 of shape \(29,\)"),
    ],
)
def test_rejects_wrong_dtype_or_length(folder: Path, tokens: np.ndarray, found: str) -> None:
    np.save(folder / "train-00001.npy", tokens)
    with pytest.raises(ValueError, match=rf"found {found}, expected 30 uint16 tokens"):
        open_dataset(config_for(folder))

"""Random damage to every file of a data folder: an error that names the file, or the same result.

The damage is drawn from a seed. Nothing outside of the data folder may change.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllama.config import Config, DataConfig, LoggingConfig, ModelConfig
from fastllama.data.dataset import open_dataset
from fastllama.data.manifest import Manifest
from tests.data.interrupted import Preparation, contents, make_preparation

VALUES = [None, True, -1, 0, 10**30, 1.5, 1e300, "", "x", "../x", "/x", "a\0b", "\ud800", [], {}]


def flip_a_bit(data: bytes, draw: random.Random) -> bytes:
    # Headers of shards are short, so half of the flips are near the start.
    end = len(data) if draw.random() < 0.5 else min(130, len(data))
    at = draw.randrange(end)
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def insert(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.choice([b"\0", b"\xff", b"[" * 100_000, b"9" * 5000, b"-"]) + data[at:]


def replace_a_value(data: bytes, draw: random.Random) -> bytes:
    """Replace or remove a random value of a JSON file."""
    content = json.loads(data)
    places: list[tuple[Any, Any]] = []
    pending = [content]
    while pending:
        parent = pending.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        places += [(parent, key) for key in keys]
        pending += [parent[key] for key in keys if isinstance(parent[key], (dict, list))]
    parent, key = draw.choice(places)
    if draw.random() < 0.2:
        del parent[key]
    else:
        parent[key] = draw.choice(VALUES)
    return json.dumps(content).encode()


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file; return the kind of damage."""
    kinds = [flip_a_bit, flip_a_bit, cut, insert]
    if path.suffix == ".json":
        kinds += [replace_a_value, replace_a_value]
    kind = draw.choice(kinds)
    path.write_bytes(kind(path.read_bytes(), draw))
    return kind.__name__


def read_everything(data: Path) -> tuple[object, ...]:
    """Open a folder as training does, read it, and check it."""
    config = Config(
        model=ModelConfig(vocab_size=300, max_seq_len=8),
        data=DataConfig(path=str(data)),
        logging=LoggingConfig(sample_prompt="a"),
    )
    dataset = open_dataset(config)
    n_sequences = dataset.train.n_sequences(8)
    tokens = [dataset.train.read(index, 8).tolist() for index in range(n_sequences)]
    dataset.manifest.check_contents(data)
    return tokens, dataset.manifest.fingerprint(), dataset.validation_bytes_per_token


def damage_again_and_again(
    original: Path, seed: int, times: int, use: Callable[[Path], object]
) -> None:
    """Damage a random file of a copy of `original`, and `use` the copy, `times` times."""
    draw = random.Random(seed)
    root = original.parent
    copy = root / "copy"
    shutil.copytree(original, copy)
    names = sorted(path.name for path in original.iterdir() if path.name != ".lock")
    expected = use(copy)
    shutil.rmtree(copy)
    around = contents(root)
    n_errors = 0
    for number in range(times):
        shutil.copytree(original, copy)
        name = draw.choice(names)
        kind = damage(copy / name, draw)
        case = f"damage {number} of seed {seed}: {kind} in {name}"
        found, sentence = None, ""
        try:
            found = use(copy)
        except (ValueError, OSError) as error:
            sentence = str(error)
            n_errors += 1
        assert found == expected or name in sentence, f"{case}: {sentence}"
        assert "\n" not in sentence, f"{case}: {sentence}"
        shutil.rmtree(copy)
        assert contents(root) == around, case
    assert n_errors > times / 2


@pytest.fixture
def preparation(tmp_path: Path) -> Preparation:
    return make_preparation(tmp_path)


@pytest.mark.parametrize("seed", range(2))
def test_damaged_data_folder(preparation: Preparation, seed: int) -> None:
    preparation.run()
    damage_again_and_again(preparation.output, seed, 150, read_everything)


@pytest.mark.parametrize("seed", range(2))
def test_damaged_interrupted_folder(preparation: Preparation, seed: int) -> None:
    def resume(output: Path) -> tuple[Manifest, dict[str, bytes | str]]:
        manifest = preparation.run(output)
        assert manifest == Manifest.load(output)
        shards = {name: data for name, data in contents(output).items() if name.endswith(".npy")}
        return manifest, shards

    preparation.interrupt()
    damage_again_and_again(preparation.output, seed, 60, resume)

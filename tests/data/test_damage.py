"""Random damage to every file of a data folder: an error that names the file, or the same result.

The damage is drawn from a seed. Nothing outside of the data folder may change.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllama.data.manifest import Manifest
from tests.data.interrupted import Preparation, contents, make_preparation
from tests.fuzz.mutations import damage_bytes
from tests.fuzz.targets import TARGETS


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
        kind = damage_bytes(copy / name, draw)
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
    damage_again_and_again(
        preparation.output, seed, 150, lambda folder: TARGETS["data folder"].use(folder, folder)
    )


@pytest.mark.parametrize("seed", range(2))
def test_damaged_interrupted_folder(preparation: Preparation, seed: int) -> None:
    def resume(output: Path) -> tuple[Manifest, dict[str, bytes | str]]:
        manifest = preparation.run(output)
        assert manifest == Manifest.load(output)
        shards = {name: data for name, data in contents(output).items() if name.endswith(".npy")}
        return manifest, shards

    preparation.interrupt()
    damage_again_and_again(preparation.output, seed, 60, resume)

"""One model, however many processes train it and however they share it.

Started by torchrun, this file trains over the meshes it is asked for and prints what it measured.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from torch.distributed.tensor import DTensor

from fastllama.checkpoints.state import TrainState
from fastllama.config import Config, load_recipe
from fastllama.data.dataset import open_dataset
from fastllama.distributed.world import World, build_mesh, distributed
from fastllama.train import train_step
from fastllama.training.setup import build_state, open_loader
from fastllama.training.stopping import StopSignal
from fastllama_kernels import REFERENCE
from tests.sessions import bare_session, fresh_start
from tests.workspace import Workspace

N_UPDATES = 50
MESHES = {2: (1,), 4: (1, 2, 4)}
"""Replicas to split the processes into, by their number."""


def config_of(recipe: Path, replicate: int) -> Config:
    """50 updates of 8 sequences, in which pairs of four processes accumulate and gather again."""
    config, in_pairs = load_recipe(recipe), replicate == 2
    training = dataclasses.replace(
        config.training,
        batch_size=1 if in_pairs else 2,
        training_tokens=N_UPDATES * config.training.tokens_per_update,
    )
    parallel = dataclasses.replace(
        config.parallel, replicate=replicate, reshard_after_forward=in_pairs, timeout_minutes=1.0
    )
    # Smaller than in the recipe: the rounding of sums in another order grows with the steps.
    optimizer = dataclasses.replace(config.optimizer, max_lr=1e-3, min_lr=1e-4)
    return dataclasses.replace(config, training=training, parallel=parallel, optimizer=optimizer)


def train(recipe: Path, world: World, replicate: int) -> dict[str, Any]:
    """Loss and gradient norm of each update, and a digest of the weights before the first."""
    config = config_of(recipe, replicate)
    world = dataclasses.replace(world, mesh=build_mesh("cpu", replicate))
    dataset = open_dataset(config)
    session = bare_session(config, world, dataset)
    state = build_state(session, fresh_start(), REFERENCE)
    found: dict[str, Any] = {"weights": digest(state), "loss": [], "norm": []}
    with open_loader(session, state) as loader:
        for _ in range(N_UPDATES):
            loss, norm, *_ = train_step(session, state, loader, StopSignal()).tolist()
            found["loss"].append(loss)
            found["norm"].append(norm)
    return found


def digest(state: TrainState) -> str:
    whole = hashlib.sha256()
    for weight in state.model.parameters():
        whole.update(cast(DTensor, weight).full_tensor().detach().numpy().tobytes())
    return whole.hexdigest()


@pytest.fixture(scope="module")
def alone(workspace: Workspace) -> dict[str, Any]:
    with distributed(config_of(workspace.recipe, 1)) as world:
        return train(workspace.recipe, world, 1)


@pytest.mark.parametrize("n_processes", MESHES)
def test_processes_train_the_model_of_one(
    n_processes: int, workspace: Workspace, alone: dict[str, Any]
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={n_processes}", __file__, str(workspace.recipe)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    # Two runs that both learn nothing would agree as well.
    assert alone["loss"][-1] < alone["loss"][0] - 1
    for mesh, found in json.loads(done.stdout).items():
        assert found["weights"] == alone["weights"], mesh
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6), mesh
        assert found["norm"] == pytest.approx(alone["norm"], rel=1e-4), mesh


def main(recipe: Path) -> None:
    """Train over each mesh of as many processes; print what was found as JSON."""
    with distributed(config_of(recipe, 1)) as world:
        meshes = MESHES[world.size]
        found = {f"{n} x {world.size // n}": train(recipe, world, n) for n in meshes}
        if world.is_main:
            print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Training does not depend on the number of processes, shards and replicas.

Under torchrun this file is a script: it trains over each mesh of `MESHES` and prints the results.
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
"""Numbers of replicas to test, by number of processes."""


def config_of(recipe: Path, replicate: int) -> Config:
    """50 updates of 8 sequences; 2 replicas also accumulate gradients and reshard."""
    config, two_replicas = load_recipe(recipe), replicate == 2
    training = dataclasses.replace(
        config.training,
        batch_size=1 if two_replicas else 2,
        training_tokens=N_UPDATES * config.training.tokens_per_update,
    )
    parallel = dataclasses.replace(
        config.parallel,
        replicate=replicate,
        reshard_after_forward=two_replicas,
        timeout_minutes=1.0,
    )
    # Smaller than in the recipe: sums in another order round differently, and every update
    # amplifies the difference by its learning rate.
    optimizer = dataclasses.replace(config.optimizer, max_lr=1e-3, min_lr=1e-4)
    return dataclasses.replace(config, training=training, parallel=parallel, optimizer=optimizer)


def train(recipe: Path, world: World, replicate: int) -> dict[str, Any]:
    """Loss and gradient norm of each update, and a digest of the initial weights."""
    config = config_of(recipe, replicate)
    world = dataclasses.replace(world, mesh=build_mesh("cpu", replicate))
    dataset = open_dataset(config)
    session = bare_session(config, world, dataset)
    state = build_state(session, fresh_start(), REFERENCE)
    results: dict[str, Any] = {"weights": digest(state), "loss": [], "norm": []}
    with open_loader(session, state) as loader:
        for _ in range(N_UPDATES):
            loss, norm, *_ = train_step(session, state, loader, StopSignal()).tolist()
            results["loss"].append(loss)
            results["norm"].append(norm)
    return results


def digest(state: TrainState) -> str:
    """SHA-256 of the full weights."""
    sha256 = hashlib.sha256()
    for weight in state.model.parameters():
        sha256.update(cast(DTensor, weight).full_tensor().detach().numpy().tobytes())
    return sha256.hexdigest()


@pytest.fixture(scope="module")
def single(workspace: Workspace) -> dict[str, Any]:
    """The results of one process."""
    with distributed(config_of(workspace.recipe, 1)) as world:
        return train(workspace.recipe, world, 1)


@pytest.mark.parametrize("n_processes", MESHES)
def test_meshes_agree_with_one_process(
    n_processes: int, workspace: Workspace, single: dict[str, Any]
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
    # Two runs that learn nothing would agree too.
    assert single["loss"][-1] < single["loss"][0] - 1
    for mesh, results in json.loads(done.stdout).items():
        assert results["weights"] == single["weights"], mesh
        assert results["loss"] == pytest.approx(single["loss"], rel=1e-6), mesh
        assert results["norm"] == pytest.approx(single["norm"], rel=1e-4), mesh


def main(recipe: Path) -> None:
    """Train over each mesh of this number of processes; print the results as JSON."""
    with distributed(config_of(recipe, 1)) as world:
        meshes = MESHES[world.size]
        results = {f"{n} x {world.size // n}": train(recipe, world, n) for n in meshes}
        if world.is_main:
            print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

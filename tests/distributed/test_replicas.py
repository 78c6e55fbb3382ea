"""Training does not depend on the number of processes, shards and replicas, or on the kind of sums.

Under torchrun this file is a script: it trains each of `CASES` and prints the results.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


@dataclass(frozen=True)
class Case:
    """A mesh, how it sums the gradients of its micro-batches, and whether it reshards."""

    replicate: int = 1
    accumulate: Literal["auto", "unsharded", "sharded"] = "auto"
    reshard: bool = False
    """Over gloo a model that reshards has a group of parameters a block, and otherwise one."""


UNSHARDED, SHARDED = Case(1, "unsharded"), Case(1, "sharded")
REPLICAS_UNSHARDED, REPLICAS_SHARDED = Case(2, "unsharded", True), Case(2, "sharded", True)
CASES = {
    2: (Case(), Case(reshard=True), UNSHARDED, SHARDED),
    4: (Case(), REPLICAS_UNSHARDED, REPLICAS_SHARDED, Case(4)),
}
"""Cases to test, by number of processes."""


def config_of(recipe: Path, case: Case) -> Config:
    """50 updates of 8 sequences."""
    config = load_recipe(recipe)
    training = dataclasses.replace(
        config.training,
        # Of one sequence, there are several micro-batches per update on every mesh.
        batch_size=2 if case.accumulate == "auto" else 1,
        training_tokens=N_UPDATES * config.training.tokens_per_update,
    )
    parallel = dataclasses.replace(
        config.parallel,
        replicate=case.replicate,
        reshard_after_forward=case.reshard,
        accumulate=case.accumulate,
        timeout_minutes=1.0,
    )
    # Smaller than in the recipe: sums in another order round differently, and every update
    # amplifies the difference by its learning rate.
    optimizer = dataclasses.replace(config.optimizer, max_lr=1e-3, min_lr=1e-4)
    return dataclasses.replace(config, training=training, parallel=parallel, optimizer=optimizer)


def train(recipe: Path, world: World, case: Case) -> dict[str, Any]:
    """Loss and gradient norm of each update, and digests of the first and the last weights."""
    config = config_of(recipe, case)
    world = dataclasses.replace(world, mesh=build_mesh("cpu", case.replicate))
    dataset = open_dataset(config)
    session = bare_session(config, world, dataset)
    state = build_state(session, fresh_start(), REFERENCE)
    results: dict[str, Any] = {"weights": digest(state), "loss": [], "norm": []}
    with open_loader(session, state) as loader:
        for _ in range(N_UPDATES):
            loss, norm, *_ = train_step(session, state, loader, StopSignal()).tolist()
            results["loss"].append(loss)
            results["norm"].append(norm)
    return {**results, "trained": digest(state)}


def digest(state: TrainState) -> str:
    """SHA-256 of the full weights."""
    sha256 = hashlib.sha256()
    for weight in state.model.parameters():
        full = weight.full_tensor() if isinstance(weight, DTensor) else weight
        sha256.update(full.detach().numpy().tobytes())
    return sha256.hexdigest()


@pytest.fixture(scope="module")
def single(workspace: Workspace) -> dict[str, Any]:
    """The results of one process."""
    with distributed(config_of(workspace.recipe, Case())) as world:
        return train(workspace.recipe, world, Case())


# Two processes show in `make test` what four show on other meshes.
@pytest.mark.parametrize(
    "n_processes",
    [pytest.param(n, marks=[pytest.mark.slow] if n > 2 else []) for n in CASES],
)
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
    found = dict(zip(CASES[n_processes], json.loads(done.stdout), strict=True))
    for case, results in found.items():
        assert results["weights"] == single["weights"], case
        assert results["loss"] == pytest.approx(single["loss"], rel=1e-6), case
        assert results["norm"] == pytest.approx(single["norm"], rel=1e-4), case
    sums = [results for case, results in found.items() if case.accumulate != "auto"]
    assert sums[0]["loss"] == pytest.approx(sums[1]["loss"], rel=1e-6)


def main(recipe: Path) -> None:
    """Train each case of this number of processes; print the results as JSON, in order."""
    with distributed(config_of(recipe, Case())) as world:
        results = [train(recipe, world, case) for case in CASES[world.size]]
        if world.is_main:
            print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

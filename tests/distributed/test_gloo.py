"""FSDP2 over gloo: one group of parameters, its gather and its reduce-scatter.

One launch of this file under torchrun runs every case of three ranks.
"""

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from fastllama.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from fastllama.distributed import shared_memory
from fastllama.distributed.fsdp import shard_model
from fastllama.distributed.gloo import GlooAllGather, GlooReduceScatter, SharedMemories
from fastllama.distributed.world import World, distributed
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE

MODEL = ModelConfig(vocab_size=32, n_embd=16, n_layers=3, n_heads=2, multiple_of=16, max_seq_len=8)


@pytest.mark.parametrize(
    ("reshard", "groups"), [(False, {""}), (True, {"", "embedding", "output", "blocks"})]
)
def test_a_model_that_frees_nothing_is_one_group(
    reshard: Literal[True, False], groups: set[str]
) -> None:
    config = Config(
        model=MODEL,
        training=TrainingConfig(device="cpu", dtype="float32"),
        parallel=ParallelConfig(reshard_after_forward=reshard),
    )
    with torch.device("meta"):
        model = Llama(MODEL, REFERENCE)
    with distributed(config) as world:
        shard_model(model, config, World(0, 2, world.device, world.mesh))
    found = {
        name.split(".")[0] for name, part in model.named_modules() if isinstance(part, FSDPModule)
    }
    assert found - {"norm"} == groups


@dataclass(frozen=True)
class Case:
    """How three ranks gather and reduce."""

    dtype: str = "float32"
    op: str = "SUM"
    n_elements: int = 5
    """Of each rank's part. A round of the test's shared memory takes 64 bytes."""
    shares: str = "memory"
    """Or what is missing: "no folder", or "one machine" for the last rank."""


CASES = {
    "shared": Case(),
    "shared, bfloat16, mean": Case(dtype="bfloat16", op="AVG"),
    "shared, several rounds": Case(n_elements=100),
    "shared, several rounds, bfloat16": Case(dtype="bfloat16", n_elements=100),
    "sockets": Case(shares="no folder"),
    "sockets, bfloat16, mean": Case(dtype="bfloat16", op="AVG", shares="no folder"),
    "two machines": Case(op="AVG", shares="one machine"),
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    folder = tmp_path_factory.mktemp("shared")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [*command, __file__, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return cast(dict[str, str | None], json.loads(done.stdout))


@pytest.mark.parametrize("name", CASES)
def test_gathers_and_adds_the_parts_of_ranks(name: str, failures: dict[str, str | None]) -> None:
    assert failures[name] is None, failures[name]


def test_a_full_file_system_shares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    assert shared_memory._create() is not None
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert shared_memory._create() is None
    assert len(list(tmp_path.iterdir())) == 1


def check(case: Case, folder: Path) -> None:
    """Compare a gather and a reduction of this rank with float64."""
    group = cast(dist.ProcessGroup, dist.group.WORLD)
    rank, n_ranks, dtype = group.rank(), group.size(), getattr(torch, case.dtype)
    shared_memory.FOLDER = folder / ("missing" if case.shares == "no folder" else "")
    shared_memory.SIZE = 2 * n_ranks * 64
    memories = SharedMemories()
    with pytest.MonkeyPatch.context() as patch:
        if case.shares == "one machine" and rank == n_ranks - 1:
            patch.setattr(shared_memory, "_map", lambda path: None)
        assert (memories.of(group) is not None) == (case.shares == "memory")
    torch.manual_seed(0)
    inputs_RRN = torch.randn(n_ranks, n_ranks, case.n_elements).to(dtype)

    gathered_RN = torch.full((n_ranks, case.n_elements), torch.nan, dtype=dtype)
    GlooAllGather(memories)(gathered_RN.flatten(), inputs_RRN[rank, 0], group)
    assert gathered_RN.equal(inputs_RRN[:, 0])

    output_N = torch.full((case.n_elements,), torch.nan, dtype=dtype)
    op = getattr(dist.ReduceOp, case.op)
    GlooReduceScatter(memories)(output_N, inputs_RRN[rank].flatten(), group, op)
    parts_RN = inputs_RRN[:, rank].double()
    expected_N = parts_RN.mean(0) if case.op == "AVG" else parts_RN.sum(0)
    # One rounding for the sum and one for the mean, of at most the sum of absolute values.
    bound_N = 2 * torch.finfo(dtype).eps * parts_RN.abs().sum(0)
    assert ((output_N - expected_N).abs() <= bound_N).all()


def main(folder: Path) -> None:
    config = Config(model=MODEL, training=TrainingConfig(device="cpu", dtype="float32"))
    with distributed(config) as world:
        failures = {}
        for name, case in CASES.items():
            failure = None
            try:
                check(case, folder)
            except Exception as error:
                failure = f"rank {world.rank}: {error!r}"
            of_ranks: list[str | None] = [None] * world.size
            dist.all_gather_object(of_ranks, failure)
            failures[name] = next((one for one in of_ranks if one), None)
        if world.rank == 0:
            print(json.dumps(failures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

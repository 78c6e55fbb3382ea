"""Groups of processes: how they shard, wait, record, and tell which of them failed."""

import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastllama import flight_recorder
from fastllama.cli.errors import report_first_failure
from fastllama.config import Config, ModelConfig, ParallelConfig, TrainingConfig, load_recipe
from fastllama.distributed.flight_recorder import record_collectives
from fastllama.distributed.fsdp import resolve_resharding, shard_model
from fastllama.distributed.world import World, build_mesh, choose_device, distributed
from fastllama.errors import RankFailedError
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE
from tests.workspace import Workspace

# Runs the command, with an update on one rank that fails.
FAILING = """
import os, sys
import fastllama.train
from fastllama.cli import main

original, updates = fastllama.train.update, 0
def update(*args):
    global updates
    updates += 1
    if updates == 3 and os.environ["RANK"] == "1":
        raise RuntimeError("the third update went wrong")
    return original(*args)
fastllama.train.update = update
main(sys.argv[1:])
"""
RECIPE = Path(__file__).parents[2] / "configs" / "llama-3.1-8b.toml"
MODEL = ModelConfig(vocab_size=32, n_embd=16, n_layers=3, n_heads=2, multiple_of=16, max_seq_len=8)


@pytest.fixture
def eight() -> Iterator[None]:
    """The first of eight processes of which there are no others."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def sharded(**options: Any) -> Llama:
    parallel = ParallelConfig(**{"reshard_after_forward": True, **options})
    config = Config(model=MODEL, training=TrainingConfig(dtype="float32"), parallel=parallel)
    device = torch.device("cpu")
    with torch.device("meta"):
        model = Llama(MODEL, REFERENCE)
    shard_model(model, config, World(0, 8, device, build_mesh("cpu", parallel.replicate)))
    return model


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("replicate", "names", "shape"),
    [
        (1, ("shard",), (8,)),
        (2, ("replicate", "shard"), (2, 4)),
        (8, ("replicate", "shard"), (8, 1)),
    ],
)
def test_mesh(replicate: int, names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    mesh = build_mesh("cpu", replicate)
    assert (mesh.mesh_dim_names, mesh.shape) == (names, shape)
    # Neighbours are in one replica.
    assert mesh["shard"].mesh.tolist() == list(range(8 // replicate))


@pytest.mark.usefixtures("eight")
def test_each_block_is_gathered_ahead_of_its_use() -> None:
    model = sharded()
    states = [cast(FSDPModule, module)._get_fsdp_state() for module in (model, *model.blocks)]
    _, first, second, third = states
    forward = [state._states_to_forward_prefetch for state in states]
    backward = [state._states_to_backward_prefetch for state in states]
    assert forward == [[first], [second], [third], []]
    assert backward == [[third], [], [first], [second]]


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_reduced_in_the_type_asked_for(dtype: str) -> None:
    reduced: list[torch.dtype] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if operator is torch.ops.c10d._reduce_scatter_base_.default:
                reduced.append(args[0].dtype)
            return operator(*args, **(kwargs or {}))

    model = sharded(reduce_dtype=dtype)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with Watch():
        model(tokens, tokens).backward()
    assert reduced == [getattr(torch, dtype)] * 4


@pytest.mark.parametrize(("gibibytes", "reshard"), [(80, False), (40, True)])
def test_resharding_is_decided_by_the_memory_of_the_device(
    gibibytes: int, reshard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    config = load_recipe(RECIPE)
    with distributed(Config(training=TrainingConfig(device="cpu"))) as world:
        # Its own decision, as if it were one of 64.
        one_of_many = dataclasses.replace(world, size=64, device=torch.device("cuda"))
        resolved, reason = resolve_resharding(config, one_of_many)
        on_cpu, _ = resolve_resharding(config, world)
    assert resolved.parallel.reshard_after_forward is reshard
    assert f"keeping them needs 42.5 of {gibibytes}.0 GiB" in reason
    assert on_cpu.parallel.reshard_after_forward is False
    # The run folder keeps what was asked for.
    assert config.parallel.reshard_after_forward == "auto"


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, 8, 3),
        ("0,1,2,3,4,5,6,7", 8, 3),
        # Of each task its own.
        ("5", 1, 0),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1, 0),
        # A node with one, or with too few.
        (None, 1, None),
        ("0,1", 1, None),
        ("0,1", 2, None),
    ],
)
def test_device_of_a_process(
    visible: str | None, gpus: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if expected is None:
        remedy = "lower --nproc-per-node, or let each process see all GPUs of its node"
        with pytest.raises(ValueError, match=remedy):
            choose_device("cuda")
    else:
        assert choose_device("cuda") == torch.device("cuda", expected)


def test_collectives_wait_as_long_as_asked_for() -> None:
    config = Config(
        training=TrainingConfig(device="cpu"), parallel=ParallelConfig(timeout_minutes=3.0)
    )
    with distributed(config) as world:
        assert timeouts(world) == {timedelta(minutes=3)}
        world.set_timeout(60.0)
        assert timeouts(world) == {timedelta(minutes=60)}


def timeouts(world: World) -> set[timedelta]:
    groups = cast(list[Any], [dist.group.WORLD, *world.mesh.get_all_groups()])
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return {backend.options._timeout for backend in backends}


def test_collectives_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(flight_recorder.os, "environ", environment)
    assert record_collectives(tmp_path) == f"{tmp_path}/flight-recorder-"
    assert environment == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/flight-recorder-",
    }


@pytest.mark.parametrize(
    "asked",
    [
        {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/elsewhere/x"},
        {"TORCH_FR_BUFFER_SIZE": "0", "TORCH_FR_DUMP_TEMP_FILE": "/elsewhere/x"},
    ],
)
def test_recording_leaves_the_environment_of_the_user(
    asked: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**asked, "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    before = dict(environment)
    monkeypatch.setattr(flight_recorder.os, "environ", environment)
    assert record_collectives(tmp_path) == "/elsewhere/x"
    assert environment == before


def test_the_rank_that_fails_is_told_first_and_last(workspace: Workspace, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), "train", str(workspace.recipe)]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "first update done" in done.stdout
    sentence = "rank 1: RuntimeError: the third update went wrong"
    lines = [line for line in done.stderr.splitlines() if line.strip("=")]
    assert f"error: {sentence}" == next(line for line in lines if "error" in line.lower())
    assert lines[-1].endswith(sentence)
    # The other, which lost its peer, has nothing to add.
    assert done.stderr.count("error: rank") == 1
    assert "Connection closed" not in done.stderr


def test_a_failure_tells_where_collectives_were_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failure, mistake = RankFailedError(3), RankFailedError(3)
    failure.__cause__, mistake.__cause__ = RuntimeError("NCCL timed out"), ValueError("a mistake")
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "runs/x/flight-recorder-")
    report_first_failure(failure, debug=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: rank 3: RuntimeError: NCCL timed out"
    assert "runs/x/flight-recorder-RANK" in lines[1]
    report_first_failure(mistake, debug=False)
    assert "flight-recorder" not in capsys.readouterr().err


@pytest.mark.usefixtures("eight")
def test_an_error_of_the_main_process_keeps_nothing_alive() -> None:
    """The process group is in its frames, and must be gone before the interpreter ends."""

    class Held:
        pass

    def refuse() -> None:
        raise ValueError("no")

    def ask() -> None:
        held = Held()
        told.append(weakref.ref(held))
        world.from_main(refuse)

    told: list[weakref.ref[Held]] = []
    world = World(0, 8, torch.device("cpu"), build_mesh("cpu", 1))
    gc.disable()
    try:
        with pytest.raises(ValueError, match="no") as raised:
            ask()
        del raised
        assert told[0]() is None
    finally:
        gc.enable()

"""Process groups: meshes, devices, timeouts."""

import dataclasses
import gc
import os
import socket
import weakref
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from fastllama.config import Config, ParallelConfig, TrainingConfig, load_recipe
from fastllama.data.dataset import open_dataset
from fastllama.distributed.world import (
    World,
    build_mesh,
    choose_device,
    distributed,
    require_launcher,
    world_size,
)
from fastllama.errors import TrainingFailedError
from fastllama.training.setup import describe_run
from tests.sessions import bare_session, fresh_start
from tests.workspace import Workspace


@pytest.mark.usefixtures("rank_0_of_8")
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
    # Neighbouring ranks form a replica.
    assert mesh["shard"].mesh.tolist() == list(range(8 // replicate))


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, 8, 3),
        ("0,1,2,3,4,5,6,7", 8, 3),
        # The launcher shows each process a single GPU.
        ("5", 1, 0),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1, 0),
        # The node has fewer GPUs than processes.
        (None, 1, None),
        ("0,1", 1, None),
        ("0,1", 2, None),
    ],
)
def test_choose_device(
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


def test_settings_of_nccl_are_printed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(workspace.recipe)
    with distributed(config) as world:
        session = bare_session(config, world, open_dataset(config))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 7))
    names = ("TORCH_NCCL_DUMP_ON_TIMEOUT", "NCCL_IB_HCA", "MY_NCCL_NOTES")
    monkeypatch.setattr(os, "environ", dict.fromkeys(names, "mlx5"))
    lines = [
        describe_run(
            dataclasses.replace(
                session, world=dataclasses.replace(world, size=size, device=torch.device("cuda"))
            ),
            fresh_start(),
            "",
        )
        for size in (1, 2)
    ]
    settings = "nccl    2.29.7, NCCL_IB_HCA=mlx5, TORCH_NCCL_DUMP_ON_TIMEOUT=mlx5"
    assert [settings in each for each in lines] == [False, True]


def test_matmuls_add_their_parts_in_float32() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = True
    with distributed(Config(training=TrainingConfig(device="cpu"))):
        assert matmul.allow_bf16_reduced_precision_reduction is False


def test_timeout_of_every_group() -> None:
    config = Config(
        training=TrainingConfig(device="cpu"), parallel=ParallelConfig(timeout_minutes=3.0)
    )
    with distributed(config) as world:
        assert timeouts(world) == {timedelta(minutes=3)}
        world.set_timeout(60.0)
        assert timeouts(world) == {timedelta(minutes=60)}


def timeouts(world: World) -> set[timedelta]:
    """The timeouts of all process groups of `world`."""
    groups = cast(list[Any], [dist.group.WORLD, *world.mesh.get_all_groups()])
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return {backend.options._timeout for backend in backends}


@pytest.mark.usefixtures("rank_0_of_8")
def test_from_main_leaks_no_frames() -> None:
    """The frames of a raised error hold the process group, which must die before Python exits."""

    class Held:
        pass

    def fail() -> None:
        raise ValueError("no")

    def call_from_main() -> None:
        held = Held()
        references.append(weakref.ref(held))
        world.from_main(fail)

    references: list[weakref.ref[Held]] = []
    world = World(0, 8, torch.device("cpu"), build_mesh("cpu", 1))
    gc.disable()
    try:
        with pytest.raises(ValueError, match="no") as raised:
            call_from_main()
        del raised
        assert references[0]() is None
    finally:
        gc.enable()


def join(monkeypatch: pytest.MonkeyPatch, minutes: float = 1, **variables: object) -> None:
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "localhost",
        **variables,
    }.items():
        monkeypatch.setenv(name, str(value))
    parallel = ParallelConfig(timeout_minutes=minutes)
    with distributed(Config(training=TrainingConfig(device="cpu"), parallel=parallel)):
        pass


def test_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot meet at localhost:{port} .*; start with"):
            join(monkeypatch, MASTER_PORT=port)


def test_variable_of_the_launcher_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match=r"cannot meet at localhost:None .*MASTER_PORT expected"):
        join(monkeypatch)


def test_processes_that_do_not_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingFailedError, match="Not all of the 2 processes came to localhost:0"):
        join(monkeypatch, minutes=0.02, MASTER_PORT=0, WORLD_SIZE=2)
    assert capsys.readouterr().err == "waiting for 2 processes at localhost:0\n"


@pytest.mark.parametrize("size", ["", "abc", "0", "-1", "2.0"])
def test_world_size_that_is_no_number(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match="is no number of processes; unset it"):
        world_size()


def test_world_size_without_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    require_launcher()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="WORLD_SIZE = 3, but RANK is not set"):
        require_launcher()


@pytest.mark.parametrize("rank", ["3", "-1", "x", ""])
def test_rank_that_no_launcher_gives(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # It would wait for the others until the timeout.
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(ValueError, match=f"RANK = '{rank}' is none of the 3 processes"):
        require_launcher()


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_ranks_without_a_place_to_meet(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(variable, "29500")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    require_launcher()
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=f"WORLD_SIZE = 3, but {name} is not set"):
        require_launcher()

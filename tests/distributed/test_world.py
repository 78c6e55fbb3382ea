"""Process groups: meshes, devices, timeouts."""

import gc
import weakref
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from fastllama.config import Config, ParallelConfig, TrainingConfig
from fastllama.distributed.world import World, build_mesh, choose_device, distributed


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
